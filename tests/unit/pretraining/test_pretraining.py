"""The training loop against one written out by hand; validation, checkpoints, and losses that diverge."""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from trainings import MODEL, WORDS, command, curve, killed, recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowkey
from lowkey.core import files
from lowkey.core.types import LowkeyError
from lowkey.models import loading
from lowkey.pretraining import Recipe, Trained, models, pretrain
from lowkey.pretraining.corpus import prepare
from lowkey.pretraining.optim import rate
from lowkey.pretraining.rows import IGNORED, Order

FACTORS = {"embed_tokens": 10, "layers.0.*k_proj": 0.25, "norm": 0}


@pytest.mark.parametrize("factors", [{}, FACTORS])
def test_the_loop_is_the_plain_one(tmp_path, factors):
    """Written out: whole batches, no accumulation, AdamW by its formula, clipping by hand, every parameter at
    its own rate.
    """
    wanted = recipe(tmp_path, tokens=6 * 128, warmup=2, decay=0.3, clip=0.5, lr_factors=factors)
    found = pretrain(wanted, tmp_path / "out", device="cpu")
    corpus, t = prepare(wanted.data, tmp_path / "unused"), wanted.training
    with torch.random.fork_rng():
        torch.manual_seed(t.seed)
        model = models.build(wanted.model, corpus.tokenizer, t.length)
    parameters, order = list(model.parameters()), Order(corpus.training.rows(t.length), 4, t.seed)
    decay = [t.weight_decay * (p.ndim == 2 and p is not model.model.embed_tokens.weight) for p in parameters]
    times = [1.0] * len(parameters)
    for i, (name, _) in enumerate(model.named_parameters()):
        own = {"model.embed_tokens.weight": 10, "model.layers.0.self_attn.k_proj.weight": 0.25}
        times[i] = own.get(name, 0.0 if "norm" in name else 1.0) if factors else 1.0
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    for step in range(6):
        batch = corpus.training.batch(order.at(step), t.length)
        logits = model(input_ids=batch.ids, position_ids=batch.positions, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED)
        gradients = torch.autograd.grad(loss, parameters)
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        with torch.no_grad():
            for p, g, m, v, wd, own in zip(parameters, gradients, first, second, decay, times, strict=True):
                lr = own * t.lr * rate(t)(step)
                g = g * min(1.0, t.clip / norm)
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.95).add_(0.05 * g * g)
                p.mul_(1 - lr * wd)
                p.sub_(lr * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8))
        assert found.losses[step] == pytest.approx(loss.item(), abs=1e-4)
    ours, theirs = found.model.state_dict(), model.state_dict()
    assert all(torch.allclose(ours[name], theirs[name], atol=2e-4) for name in theirs)


def test_rates_of_their_own_are_told_and_survive_a_kill(tmp_path):
    wanted = recipe(tmp_path, tokens=8 * 128, save_every=3, optimizer="muon", lr_factors=FACTORS)
    whole = pretrain(wanted, tmp_path / "whole", device="cpu")
    killed(wanted, tmp_path / "cut", 5)
    again = pretrain(wanted, tmp_path / "cut", device="cpu")
    assert again.losses == whole.losses and curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert (
        again.losses
        != pretrain(
            replace(wanted, training=replace(wanted.training, lr_factors={})), tmp_path / "even", device="cpu"
        ).losses
    )
    sizes = {name: p.numel() for name, p in whole.model.named_parameters()}
    counts = {"embed_tokens": sizes["model.embed_tokens.weight"], "layers.0.*k_proj": 32 * 16, "norm": 5 * 32}
    told = {
        "step": 0,
        "tokens": 0,
        "lr_factors": {k: {"factor": FACTORS[k], "parameters": n} for k, n in counts.items()},
    }
    assert (
        curve(tmp_path / "cut")[0] == told
        and sum("lr_factors" in line for line in curve(tmp_path / "cut")) == 1
    )
    assert Recipe.read(tmp_path / "cut" / "recipe.toml") == wanted


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({"lm_head": 0.2}, "training.lr_factors 'lm_head': no trained parameter has such a name"),  # tied
        (
            {"embed_token": 2, "tokens": 3},
            "'tokens': parameter 'model.embed_tokens.weight' has another factor already",
        ),
        ({"norm": -1}, "training.lr_factors.norm -1: must be at least 0"),
        ({"norm": "high"}, "training.lr_factors.norm"),
        ("fast", "must be a table"),
    ],
)
def test_factors_that_match_no_parameter_are_refused(tmp_path, factors, message):
    with pytest.raises(LowkeyError, match=message):
        pretrain(recipe(tmp_path, lr_factors=factors), tmp_path / "out", device="cpu")
    assert not (tmp_path / "out" / "job.json").exists()


def test_validation_is_the_mean_over_all_that_is_held_out(tmp_path):
    wanted = recipe(tmp_path, tokens=8 * 128)
    found = pretrain(wanted, tmp_path / "out", device="cpu")
    held, t = prepare(wanted.data, tmp_path / "unused").held_out, wanted.training
    nats, count = 0.0, 0
    with torch.no_grad():
        for a, b in pairwise(held.starts):  # a document alone, cut where a row ends
            cuts = [a, *range(-(-(a + 1) // t.length) * t.length, b, t.length), b]
            for start, stop in pairwise(cuts):
                ids = torch.tensor(held.ids[start : min(stop + 1, b)].astype(np.int64))
                if len(ids) > 1:
                    logits = found.model(ids[None, : stop - start], use_cache=False).logits[0, : len(ids) - 1]
                    nats += float(F.cross_entropy(logits, ids[1:], reduction="sum"))
                    count += len(ids) - 1
    assert count == held.predicted
    last = found.result["validation"][-1]
    assert last["validation_loss"] == pytest.approx(nats / count, abs=1e-5)
    assert last["bits_per_byte"] == pytest.approx(nats / math.log(2) / held.text_bytes, abs=1e-5)
    assert [r["step"] for r in found.result["validation"]] == [0, 8]
    assert (
        found.result["initial_loss"]
        == found.result["validation"][0]["validation_loss"]
        > found.result["best_loss"]
    )


def test_the_result_is_a_checkpoint_that_others_read(tmp_path):
    wanted = recipe(tmp_path)
    found = pretrain(wanted, tmp_path / "out", device="cpu")
    assert found.losses[-1] < found.losses[0] - 1
    model, tokenizer = loading.load(str(tmp_path / "out"), device="cpu")
    stock, _ = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
        AutoTokenizer.from_pretrained(tmp_path / "out"),
    )
    ids = torch.tensor([tokenizer("the cat sat").input_ids])
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, found.model(ids).logits)
    cache = lowkey.make_cache(model, bits=8)
    assert model.generate(ids, max_new_tokens=4, past_key_values=cache, do_sample=False).shape == (
        1,
        ids.shape[1] + 4,
    )
    assert Recipe.of(tomllib.loads((tmp_path / "out" / "recipe.toml").read_text())) == wanted
    assert files.read_json(tmp_path / "out" / "result.json", "result", "training") == found.result
    assert not (tmp_path / "out" / "checkpoint.safetensors").exists()
    assert found.result["parameters"] == sum(p.numel() for p in found.model.parameters())


class Noting(torch.nn.Module):
    """Counts nothing: keeps what it was shown, and drops out like any module."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []
        self.inner = torch.nn.Embedding(300, 32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.seen.append(
            torch.cat([ids.float().flatten(), F.dropout(torch.ones(8), 0.5, training=self.training)])
        )
        return self.inner(ids)


def noted(folder: Path, layers: int) -> tuple[Trained, list[torch.Tensor]]:
    wanted = recipe(folder, tokens=4 * 128)
    # another depth draws more random numbers
    shape = {**MODEL, "num_hidden_layers": layers, "attention_dropout": 0.1}
    model = models.build(shape, prepare(wanted.data, folder).tokenizer, 32)
    model.model.embed_tokens, torch_state = Noting(), torch.get_rng_state()
    model.config.tie_word_embeddings = False
    with mock.patch.object(type(model), "save_pretrained"):
        found = pretrain(wanted, folder / f"out{layers}", model=model, device="cpu")
    assert torch.equal(torch_state, torch.get_rng_state()), (
        "the caller's random numbers go on as if nothing had happened"
    )
    return found, model.model.embed_tokens.seen


def test_rows_and_dropout_do_not_depend_on_the_model(tmp_path):
    torch.manual_seed(5)
    (one, rows_one), (two, rows_two) = noted(tmp_path, 1), noted(tmp_path, 2)
    assert one.losses != two.losses and len(rows_one) == len(rows_two) > 8
    assert all(torch.equal(a, b) for a, b in zip(rows_one, rows_two, strict=True))
    assert not torch.equal(rows_one[-1], rows_one[0])


def test_a_given_model_is_trained_in_place(tmp_path):
    wanted = recipe(tmp_path)
    start = models.build(MODEL, prepare(wanted.data, tmp_path).tokenizer, 32).to(torch.bfloat16)
    before = [p.detach().clone() for p in start.parameters()]
    start.model.embed_tokens.weight.requires_grad_(False)
    found = pretrain(replace(wanted, model={}), tmp_path / "out", model=start, device="cpu")
    assert found.model is start and start.dtype == torch.float32
    same = [torch.equal(a.float(), b) for a, b in zip(before, start.parameters(), strict=True)]
    assert same[0] and not any(same[1:])  # what was frozen stays
    with pytest.raises(LowkeyError, match="frozen"):
        pretrain(wanted, tmp_path / "b", model=start.requires_grad_(False), device="cpu")


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(tmp_path):
    wanted = recipe(tmp_path, lr=1e30, clip=0.0, warmup=12, decay=0.0, save_every=1)
    wanted = replace(wanted, training=replace(wanted.training, log_every=3))
    with pytest.raises(
        LowkeyError,
        match=r"training diverged at step \d+: loss .* at learning rate .*; give a smaller training.lr",
    ):
        pretrain(wanted, tmp_path / "out", device="cpu")
    going = replace(wanted, training=replace(wanted.training, stop_on_divergence=False))
    found = pretrain(going, tmp_path / "going", device="cpu")
    assert found.result["diverged"] and found.result["steps"] < 24
    assert found.result["max_grad_norm"] is None or not math.isfinite(sum(found.losses))
    assert (
        not list((tmp_path / "going").glob("checkpoint*"))
        and (tmp_path / "out" / "checkpoint.safetensors").exists()
    )
    assert files.read_json(tmp_path / "going" / "result.json", "result", "training") == found.result


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_weights_that_are_not_finite_at_the_end_are_refused(tmp_path):
    """The losses of the only step are; validation sees it."""
    wanted = recipe(tmp_path, lr=1e38, tokens=128, warmup=0.0, decay=0.0)
    with pytest.raises(LowkeyError, match=r"diverged at step 1: validation loss nan"):
        pretrain(wanted, tmp_path / "out", device="cpu")
    (tmp_path / "r.toml").write_text(wanted.toml())
    command(
        "pretrain",
        tmp_path / "r.toml",
        "--out",
        tmp_path / "going",
        "--set",
        "training.stop_on_divergence=false",
        "--device",
        "cpu",
    )
    status, _, err = command(
        *(
            "pretrain",
            tmp_path / "r.toml",
            "--out",
            tmp_path / "going",
            "--set",
            "training.stop_on_divergence=false",
            "--device",
            "cpu",
        )
    )
    assert status == 0 and "after 1 steps, DIVERGED" in err and "validation not finite nats/token" in err


def test_a_loss_that_climbs_stops_and_is_told(tmp_path):
    """Hot from the middle on: what is learned is lost again."""
    wanted = recipe(tmp_path, tokens=200 * 128, lr=1e-2, clip=0.0, evaluate_every=500, save_every=500)
    with (
        mock.patch("lowkey.pretraining.optim.rate", lambda training: lambda step: 1.0 if step < 60 else 20.0),
        pytest.raises(LowkeyError, match=r"diverged at step (\d+): loss"),
    ):
        pretrain(wanted, tmp_path / "out", device="cpu")
    assert 70 < len(curve(tmp_path / "out")) < 200


def test_too_little_text_and_uneven_batches_are_one_line(tmp_path):
    with pytest.raises(LowkeyError, match="tokens to train on"):
        pretrain(
            recipe(tmp_path, batch_tokens=4096, length=4096, tokens=4096, micro_batch=1),
            tmp_path / "a",
            device="cpu",
        )
    with pytest.raises(LowkeyError, match="micro_batch 3: does not divide"):
        pretrain(recipe(tmp_path, micro_batch=3), tmp_path / "b", device="cpu")
    with pytest.raises(LowkeyError, match=r"log_with 'nothing' is unknown; choose among .*tensorboard"):
        pretrain(recipe(tmp_path, log_with=["nothing"]), tmp_path / "c", device="cpu")
    with (
        mock.patch("lowkey.pretraining.loop.get_available_trackers", list),
        pytest.raises(LowkeyError, match="log_with 'tensorboard': is not installed; pip install tensorboard"),
    ):
        pretrain(recipe(tmp_path, log_with=["tensorboard"]), tmp_path / "c", device="cpu")
    with pytest.raises(LowkeyError, match="device 'tpu'"):
        pretrain(recipe(tmp_path), tmp_path / "d", device="tpu")


@pytest.mark.parametrize("training", [{"precision": "bf16"}, {"gradient_checkpointing": True}])
def test_bf16_and_gradient_checkpointing_train_the_same_model(tmp_path, training):
    plain = pretrain(recipe(tmp_path, tokens=8 * 128), tmp_path / "plain", device="cpu")
    other = pretrain(recipe(tmp_path, tokens=8 * 128, **training), tmp_path / "other", device="cpu")
    assert np.allclose(other.losses, plain.losses, atol=0.05)
    assert other.model.dtype == torch.float32
    assert (other.losses == plain.losses) is (training != {"precision": "bf16"})


# -- the command line


def test_the_command_trains_and_eval_and_generate_take_it(tmp_path):
    (tmp_path / "r.toml").write_text(recipe(tmp_path, tokens=40 * 128).toml())
    out = tmp_path / "out"
    status, printed, err = command(
        "pretrain", tmp_path / "r.toml", "--out", out, "--set", "training.seed=3", "--device", "cpu", "--json"
    )
    told = json.loads(printed)
    assert (status, told["model"], told["steps"]) == (0, str(out), 40) and "losses" not in told, err
    assert "seed = 3" in (out / "recipe.toml").read_text()
    assert command("generate", out, "--prompt", "the cat", "--tokens", 3, "--device", "cpu")[0] == 0
    (tmp_path / "long.txt").write_text(" ".join(WORDS * 60))
    small = ("--windows", 2, "--task", "perplexity", "--device", "cpu", "--out", tmp_path / "e.json")
    status, _, err = command("eval", out, "--data", tmp_path / "long.txt", *small)
    assert status == 0, err
    # all that it has positions for
    assert json.loads((tmp_path / "e.json").read_text())["environment"]["data"]["context"] == 32


def test_the_command_says_what_is_wrong_in_one_line(tmp_path):
    (tmp_path / "r.toml").write_text("[model]\nhiden_size = 3")
    status, out, err = command("pretrain", tmp_path / "r.toml", "--out", tmp_path / "out", "--device", "cpu")
    assert (status, out) == (2, "") and "did you mean 'hidden_size'" in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()
