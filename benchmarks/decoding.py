"""What eviction while a text is written does to the text: every policy beside `random`, on the real model.

    python benchmarks/decoding.py OUT.json [--model smollm2 --gates FOLDER --tokens 320 --samples 2
    --budgets 96,48 --every 16 --temperature 0.7 --only a;b]

Every prompt is answered `samples` times, all in one batch. The prompt stays whole; of what is written, so
many tokens are kept, chosen anew every few steps. The noise of sampling is the same for all rows of the
table: a policy that changed nothing would write what the full cache writes. Each setting is written to
OUT.work as soon as it is measured; the same command goes on after an interrupt.

Figures of a sample, over the tokens until the answer ended: `kl`, nats per token of KL(full || policy) along
the sample's own text, and over its last quarter; `agreed`, tokens until it first differs from the full
cache's sample; `length`; `over`, whether it did not end; `repeated`, the share of its 4-grams that stood
before. Rows have means with 95 % intervals of a bootstrap over samples, and paired differences from `random`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import lowkey
from lowkey.catalog import make_policy
from lowkey.core import files
from lowkey.core.intervals import paired_bootstrap
from lowkey.core.progress import bars
from lowkey.evaluate.asking import Frame
from lowkey.evaluate.machine import machine
from lowkey.evaluate.settings import Setting, evicted, full
from lowkey.models.loading import load
from lowkey.policies.gates import Gates

PROMPTS = (
    "Write a long story about a lighthouse keeper who finds a letter in a bottle.",
    "Explain step by step how bread is baked, from the grain to the table.",
    "Tell me about the history of the bicycle, century by century.",
    "Write a detailed travel diary of one week in the mountains.",
    "List twenty different trees and say something about each of them.",
    "Describe how a steam engine works, part by part, and who made it better.",
    "Write a dialogue between a teacher and a student about why the sky is blue.",
    "Plan a garden for a small house, month by month, and give reasons.",
)
POLICIES: dict[str, tuple[str, dict[str, str]]] = {
    "random": ("random", {}),
    "streamingllm": ("streamingllm", {}),
    "snapkv": ("snapkv", {}),
    "tova": ("tova", {}),
    "h2o": ("h2o", {}),
    "kv-compress": ("kv-compress", {}),
    "r-kv": ("r-kv", {}),
    "keydiff": ("keydiff", {}),
    "expected-attention": ("expected-attention", {}),
    "triattention": ("triattention", {}),
    "fast-kvzip": ("fast-kvzip", {}),
}
FIGURES = ("kl", "kl_last_quarter", "agreed", "length", "over", "repeated")
GRAM = 4


@dataclass(frozen=True)
class Batch:
    """What all settings continue.

    Args:
        ids: (n, t), prompts padded on the left.
        mask: (n, t), 1 for tokens.
        noise: (tokens, n, vocabulary), Gumbel noise of every step.
        ends: ids that end an answer.
    """

    ids: Tensor
    mask: Tensor
    noise: Tensor
    ends: set[int]


def main(
    out: Path,
    model: str = "smollm2",
    gates: Annotated[list[Path] | None, typer.Option(help="folders of `lowkey gates`; repeat")] = None,
    tokens: Annotated[int, typer.Option(help="of an answer, at most")] = 320,
    samples: Annotated[int, typer.Option(help="of each prompt")] = 2,
    budgets: Annotated[str, typer.Option(help="tokens kept of what is written")] = "96,48",
    every: Annotated[int, typer.Option(help="steps between two choices")] = 16,
    temperature: float = 0.7,
    only: Annotated[str, typer.Option(help="policies, separated by semicolons")] = "",
    dtype: str = "auto",
) -> None:
    """Measure all rows and print them."""
    loaded, tokenizer = load(model, dtype, "cpu")
    lowkey.attach(loaded)
    learnt = {found.method: found for found in map(Gates.load, gates or ())}
    batch = batch_of(loaded, tokenizer, samples, tokens)
    work = out.with_suffix(".work")
    work.mkdir(parents=True, exist_ok=True)
    chosen = [name for name in POLICIES if not only or name in only.split(";")]
    pairs = [("full", 0), *((name, int(budget)) for budget in budgets.split(",") for name in chosen)]
    for name, budget in bars(pairs, lambda pair: f"{pair[0]} {pair[1]}"):
        place = work / f"{name}-{budget}.json"
        if place.exists():
            continue
        setting = full(loaded)
        if budget:
            policy, options = POLICIES[name]
            given = options | {"protect_prompt": "true", "every": str(every)}
            if policy == "random":
                given["seed"] = "1"
            made = make_policy(policy, f"{budget} tokens", given)
            setting = evicted(loaded, made, policy, batch.ids.shape[1] + tokens, gates=learnt)
        written, held = write(loaded, setting, batch, tokens, temperature)
        place.write_text(json.dumps({"held": held, "written": written}), encoding="utf-8")
    rows = list(summary(work, pairs))
    files.write_json(out, {"environment": machine("cpu"), "rows": rows}, "benchmark", ours=True)
    for row in rows:
        print(row["policy"], row["budget"], {figure: round(row[figure], 3) for figure in FIGURES})


def batch_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: int, tokens: int) -> Batch:
    """All prompts in the chat template, each `samples` times, and the noise of their samples."""
    frame = Frame.of(tokenizer)
    prompts = [frame.start + frame.question(words) for words in PROMPTS for _ in range(samples)]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(x)) + x for x in prompts])
    mask = torch.tensor([[0] * (longest - len(x)) + [1] * len(x) for x in prompts])
    shape = (tokens, len(prompts), model.config.get_text_config().vocab_size)
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(0)).clamp_(1e-20).log_().neg_()
    return Batch(ids, mask, noise.log_().neg_(), frame.ends(model))


@torch.no_grad()
def write(
    model: PreTrainedModel, setting: Setting, batch: Batch, tokens: int, temperature: float
) -> tuple[list[dict[str, Any]], int]:
    """Answer all prompts over a setting's cache.

    Returns:
        For each sample its ids until the answer ended and `kl` of every one of them; and the bytes held when
        the last step was done.
    """
    cache, mask, out, said = setting.make(), batch.mask, [], []
    logits = model(
        batch.ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp_min(0),
        past_key_values=cache,
        logits_to_keep=1,
    ).logits[:, -1]
    for step in range(tokens):
        said.append(logits.float().log_softmax(-1).half())
        out.append((logits.float() / temperature + batch.noise[step]).argmax(-1))
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        logits = model(
            out[-1][:, None],
            attention_mask=mask,
            position_ids=mask.sum(1, keepdim=True) - 1,
            past_key_values=cache,
        ).logits[:, -1]
    held, written = cache.nbytes(), torch.stack(out, 1)
    return [one_sample(model, batch, i, written[i], said) for i in range(len(written))], held


def one_sample(
    model: PreTrainedModel, batch: Batch, row: int, written: Tensor, said: Sequence[Tensor]
) -> dict[str, Any]:
    """What a row wrote, and at every token the divergence from what the full cache predicts there."""
    ended = [i for i, token in enumerate(written.tolist()) if token in batch.ends]
    length = ended[0] if ended else len(written)
    prompt = batch.ids[row][batch.mask[row].bool()]
    ids = torch.cat([prompt, written[:length]])[None]
    sure = model(ids, logits_to_keep=length + 1).logits[0, :-1].float().log_softmax(-1)
    own = torch.stack([x[row] for x in said[:length]]).float()
    kl = (sure.exp() * (sure - own)).sum(-1)
    return {"ids": written[:length].tolist(), "ended": bool(ended), "kl": kl.tolist()}


def summary(work: Path, pairs: Sequence[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    """A row of the table for every setting."""
    found = {
        pair: json.loads((work / f"{pair[0]}-{pair[1]}.json").read_text(encoding="utf-8")) for pair in pairs
    }
    reference = found["full", 0]["written"]
    for (name, budget), one in found.items():
        own = [figures(x, y) for x, y in zip(one["written"], reference, strict=True)]
        row: dict[str, Any] = {"policy": name, "budget": budget, "samples": len(own), "held": one["held"]}
        control = found.get(("random", budget))
        for figure in FIGURES:
            values = [x[figure] for x in own]
            row[figure], *row[f"{figure}_95"] = paired_bootstrap(values, [0.0] * len(own))
            if control is not None:
                base = [figures(x, y)[figure] for x, y in zip(control["written"], reference, strict=True)]
                over, *interval = paired_bootstrap(values, base)
                row[f"{figure}_over_random"], row[f"{figure}_over_random_95"] = over, interval
        yield row


def figures(sample: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """The figures of a sample beside the full cache's own."""
    ids, kl = sample["ids"], sample["kl"]
    differs = (i for i, (a, b) in enumerate(zip(ids, reference["ids"], strict=False)) if a != b)
    grams = [tuple(ids[i : i + GRAM]) for i in range(len(ids) - GRAM + 1)]
    return {
        "kl": statistics.fmean(kl) if kl else 0.0,
        "kl_last_quarter": statistics.fmean(kl[-max(1, len(kl) // 4) :]) if kl else 0.0,
        "agreed": next(differs, min(len(ids), len(reference["ids"]))),
        "length": len(ids),
        "over": float(not sample["ended"]),
        "repeated": 1 - len(set(grams)) / len(grams) if grams else 0.0,
    }


if __name__ == "__main__":
    typer.run(main)
