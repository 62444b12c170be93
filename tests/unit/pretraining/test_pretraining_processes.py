"""Training on several processes, on the CPU, gives the same curve as one process.

Replicated (DDP) and sharded (FSDP2), also after a kill.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from trainings import recipe

from lowkey.pretraining import Recipe, Trained, pretrain

# accelerate shards on GPUs alone; told that it does so here, it takes the same path, through gloo.
WORKER = """
import os, signal, sys
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from lowkey.pretraining import Recipe, loop, pretrain

def sharded(*given, plain=loop._accelerator):
    made = plain(*given)
    made.state.distributed_type = DistributedType.FSDP
    made.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap"
    )
    assert made.is_fsdp2
    return made

def progress(items, label, total=None):
    for item in items:
        if label == "pretraining" and item == int(sys.argv[4]):
            os.kill(os.getpid(), signal.SIGKILL)
        yield item

loop.silent = progress  # of every process but the first
if sys.argv[1] == "sharded":
    loop._accelerator = sharded
made = pretrain(Recipe.read(sys.argv[2]), sys.argv[3], device="cpu", progress=progress)
kind = type(next(made.model.parameters())).__name__
assert made.losses and (kind == "DTensor") == (sys.argv[1] == "sharded")
# Python's own end aborts a process in which a thread of gloo is just letting go of a tensor.
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
"""


def on_two(form: str, wanted: Recipe, out: Path, die_at: int = -1) -> None:
    """Train on two processes, which are killed -9 when `die_at` steps are done."""
    worker, path = out.with_name("worker.py"), out.with_name("recipe.toml")
    worker.write_text(WORKER)
    path.write_text(wanted.toml())
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "FSDP_VERSION": "2"}
    done = subprocess.run(
        [*launch, str(worker), form, str(path), str(out), str(die_at)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode == 0) == (die_at < 0), done.stderr


def agree(out: Path, one: Trained, alone: Path) -> None:
    """The finished run in `out` gave the same losses, norms' maximum and weights as one process did."""
    result = json.loads((out / "result.json").read_text())
    assert result["losses"] == pytest.approx(one.losses, abs=1e-5) and len(one.losses) == 24
    assert result["max_grad_norm"] == pytest.approx(one.result["max_grad_norm"], rel=1e-5)
    assert result["best_loss"] == pytest.approx(one.result["best_loss"], abs=1e-5)
    ours, theirs = load_file(out / "model.safetensors"), load_file(alone / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) < 1e-5


def test_two_processes_train_as_one_does(tmp_path):
    wanted = recipe(tmp_path)
    one = pretrain(wanted, tmp_path / "one", device="cpu")
    on_two("replicated", wanted, tmp_path / "two")
    agree(tmp_path / "two", one, tmp_path / "one")


def test_a_killed_sharded_training_ends_as_one_process_does(tmp_path):
    """Weights and optimizer are gathered from the shards, and dealt out again."""
    wanted = recipe(tmp_path)
    lrkv = {
        **wanted.describe(),
        "model": {**wanted.model, "attention": "lrkv", "lrkv_rank": 2, "num_key_value_heads": 1},
    }
    wanted = Recipe.of(lrkv)
    one = pretrain(wanted, tmp_path / "one", device="cpu")
    on_two("sharded", wanted, tmp_path / "two", die_at=13)
    assert (tmp_path / "two" / "checkpoint.safetensors").exists() and not (
        tmp_path / "two" / "result.json"
    ).exists()
    on_two("sharded", wanted, tmp_path / "two")
    agree(tmp_path / "two", one, tmp_path / "one")
