"""A small model for SmallKV: some layers of a model, briefly distilled from the whole of it.

    python benchmarks/small_child.py MODEL OUT --data NOVEL.txt [--data ...] [--minutes 20 --layers 0,1,5,...]

The child keeps the model's embeddings, its head and the layers that are named. It learns the model's
distribution of the next token (KL divergence), and the states between its layers that the model has at the
same places. It writes a model folder. Work that is stopped goes on from its last save, a save every 20 steps;
the time is the process's own. The embeddings and the head are not trained.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.core import text
from lowkey.models.loading import load

LENGTH, SAVE_EVERY, WARM_UP, RATE = 512, 20, 0.05, 1e-3
STATES = 2.0  # weight of the states beside the divergence

app = typer.Typer(add_completion=False)


@app.command()
def distil(
    model: str,
    out: Path,
    data: Annotated[list[Path], typer.Option()],
    minutes: float = 20,
    layers: str = "0,1,5,10,15,20,25,29",
) -> None:
    """Distil and save the child."""
    kept = [int(i) for i in layers.split(",")]
    teacher, tokenizer = load(model, "auto", "cpu")
    student = child_of(teacher, kept)
    optimizer = torch.optim.AdamW(
        [p for p in student.parameters() if p.requires_grad], RATE, betas=(0.9, 0.95), weight_decay=0.0
    )
    step, spent = resume(out, student, optimizer)
    windows = windows_of(data, tokenizer)
    start = time.process_time() - spent
    while (done := (time.process_time() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (done + 1e-3) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * done))
        losses = learn(teacher, student, windows[step % len(windows)].unsqueeze(0), kept)
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        print(f"step {step}, {done:.0%}: divergence {losses[0]:.3f}, states {losses[1]:.3f}", flush=True)
        if step % SAVE_EVERY == 0:
            save(out, student, tokenizer, optimizer, step, time.process_time() - start)
    save(out, student, tokenizer, optimizer, step, time.process_time() - start)


def child_of(model: PreTrainedModel, kept: list[int]) -> PreTrainedModel:
    """A model with some of another's layers, in fp32."""
    config = type(model.config).from_dict(model.config.to_dict() | {"num_hidden_layers": len(kept)})
    config.layer_types = None
    student = type(model)._from_config(config, dtype=torch.float32)
    own = {name: t.float() for name, t in model.state_dict().items() if ".layers." not in name}
    for place, layer in enumerate(kept):
        prefix = f"model.layers.{layer}."
        own |= {
            name.replace(prefix, f"model.layers.{place}."): t.float()
            for name, t in model.state_dict().items()
            if name.startswith(prefix)
        }
    student.load_state_dict(own)
    student.get_input_embeddings().weight.requires_grad_(False)
    student.get_output_embeddings().weight.requires_grad_(False)
    return student.train()


def windows_of(paths: list[Path], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Windows (n, LENGTH) of all texts, shuffled."""
    rows = []
    for path in paths:
        ids = torch.tensor(tokenizer(text.read_text(path, "data"), verbose=False).input_ids)
        rows.append(ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH))
    joined = torch.cat(rows)
    return joined[torch.randperm(len(joined), generator=torch.Generator().manual_seed(0))]


def learn(
    teacher: PreTrainedModel, student: PreTrainedModel, ids: Tensor, kept: list[int]
) -> tuple[float, float]:
    """Add the gradients of one window; returns both parts of the loss."""
    with torch.no_grad():
        known = teacher(ids, use_cache=False, output_hidden_states=True)
        wanted = known.logits[0].float().log_softmax(-1)
    with torch.autocast("cpu", torch.bfloat16):
        own = student(ids, use_cache=False, output_hidden_states=True)
    given = own.logits[0].float().log_softmax(-1)
    divergence = (wanted.exp() * (wanted - given)).sum(-1).mean()
    # what goes into a kept layer is what came out of all layers before it
    pairs = [(own.hidden_states[place], known.hidden_states[layer]) for place, layer in enumerate(kept)]
    states = torch.stack(
        [((x.float() - y.float()).square().sum(-1) / y.float().square().sum(-1)).mean() for x, y in pairs[1:]]
    ).mean()
    (divergence + STATES * states).backward()
    return float(divergence), float(states)


def save(
    out: Path,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    step: int,
    spent: float,
) -> None:
    """Write the model folder, and what the next start goes on from."""
    student.config.dtype = torch.bfloat16  # in which it is loaded
    half = {name: t.to(torch.bfloat16) for name, t in student.state_dict().items()}
    student.save_pretrained(out, state_dict=half)
    tokenizer.save_pretrained(out)
    state = {
        f"{i}.{name}": t for i, own in optimizer.state_dict()["state"].items() for name, t in own.items()
    }
    weights = {f"model.{name}": p.detach() for name, p in student.named_parameters() if p.requires_grad}
    from safetensors.torch import save_file

    save_file({name: t.contiguous() for name, t in (state | weights).items()}, out / "work.safetensors")
    (out / "work.json").write_text(json.dumps({"step": step, "seconds": spent}))


def resume(out: Path, student: PreTrainedModel, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Read what `save` wrote; returns (steps, seconds) so far."""
    if not (out / "work.json").exists():
        return 0, 0.0
    from safetensors.torch import load_file

    tensors = load_file(out / "work.safetensors")
    weights = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    student.load_state_dict(weights, strict=False)
    state: dict[int, dict] = {}
    for name, t in tensors.items():
        if not name.startswith("model."):
            index, _, part = name.partition(".")
            state.setdefault(int(index), {})[part] = t
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    about = json.loads((out / "work.json").read_text())
    return about["step"], about["seconds"]


if __name__ == "__main__":
    app()
