"""Bits by importance on the real model: ZipVL beside other choices of tokens at equal shares and equal bytes.

    python benchmarks/mixed_bits.py docs/results/smollm2/mixed-bits.json --data one.txt --data two.txt \\
        [--windows 8 --tokens 512 --more 64]

Each window of a text is read over exact keys and then held as a row says; `kl` is KL(full || row) per token
of the tokens behind it, read over what is held. `kept` is the share of tokens that are kept, which the other
rows of a group take as their budget, or its bytes. `over` is the difference in KL from the group's first row,
with the 95 % interval of a paired bootstrap over windows. The two rows of a prompt that comes in one call
have all kept tokens whole: in `sparse`, only the tokens that a layer keeps attend while the prompt is read.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import lowkey
from lowkey.cache.cache import LowkeyCache
from lowkey.catalog import make_policy
from lowkey.core import files, text
from lowkey.core.intervals import half_width, paired_bootstrap
from lowkey.core.progress import bars
from lowkey.evaluate.machine import machine
from lowkey.models.loading import load
from lowkey.storage.exact import DEFAULT_WINDOW

TAU = {"tau": "0.975"}
TWO_TIERS = {"rest": "kivi2"}


@dataclass(frozen=True)
class Row:
    """What holds a window.

    Args:
        name: shown.
        policy: its name, or "" for none.
        bits: packing of the kept tokens, or None.
        options: of the policy.
        group: name of the row whose share or bytes is the budget, and that the KL is compared with.
        equal: `share` or `bytes`.
        exact: whether the window is read over exact keys and then held.
    """

    name: str
    policy: str = ""
    bits: str | None = None
    options: dict[str, str] = field(default_factory=dict)
    group: str = ""
    equal: str = "share"
    exact: bool = True


def rows() -> Iterator[Row]:
    """All rows; the first of a group comes before the others."""
    for bits in ("int4", "kivi4", "kivi2"):
        yield Row(bits, "", bits)
    for words, mass in (("", "false"), (", mass of sinks too", "true")):
        first = f"zipvl 4/2 bits{words}"
        own = TAU | {"protected_mass": mass}
        yield Row(first, "zipvl", "kivi4", own | TWO_TIERS)
        yield Row(
            f"zipvl, equal layers 4/2 bits{words}",
            "zipvl",
            "kivi4",
            {"allocator": "uniform"} | TWO_TIERS,
            first,
        )
        yield Row(f"snapkv 4/2 bits{words}", "snapkv", "kivi4", TWO_TIERS, first)
        yield Row(f"random 4/2 bits{words}", "random", "kivi4", TWO_TIERS, first)
        yield Row(f"snapkv 4 bits, dropped{words}", "snapkv", "kivi4", {}, first, "bytes")
        yield Row(f"zipvl 4 bits, dropped{words}", "zipvl", "kivi4", own)
    yield Row("read dense, dropped", "zipvl", None, TAU, exact=False)
    yield Row(
        "read sparse, dropped",
        "zipvl",
        None,
        TAU | {"sparse_prefill": "true"},
        "read dense, dropped",
        "",
        False,
    )


def main(
    out: Path,
    model: str = "smollm2",
    data: Annotated[list[Path] | None, typer.Option(help="held-out texts; repeat")] = None,
    windows: int = 8,
    tokens: Annotated[int, typer.Option(help="of a window")] = 512,
    more: Annotated[int, typer.Option(help="tokens behind it whose predictions are compared")] = 64,
) -> None:
    """Measure all rows and print their table."""
    loaded, tokenizer = load(model, "auto", "cpu")
    lowkey.attach(loaded)
    texts = [text.read_text(path, "data") for path in data or ()] or [text.embedded_text("evaluation")]
    ids = [tokenizer(words, add_special_tokens=False, verbose=False).input_ids for words in texts]
    found: dict[str, list[dict]] = {}
    for n in bars(range(windows), lambda n: f"window {n}"):
        own = ids[n % len(ids)]
        start = 2000 + (n // len(ids)) * (len(own) - 4000) // -(-windows // len(ids))
        window = torch.tensor([own[start : start + tokens + more]])
        for name, line in measure(loaded, tokenizer, window, tokens):
            found.setdefault(name, []).append(line)
    table = summary(found)
    about = {"model": model, "windows": windows, "tokens": tokens, "more": more}
    files.write_json(out, {"environment": machine("cpu"), **about, "rows": table}, "benchmark", ours=True)
    for row in table:
        print(row)


@torch.no_grad()
def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Tensor, tokens: int
) -> Iterator[tuple[str, dict]]:
    """The name of every row, and its KL, bytes and kept share on one window (1, t)."""
    cache = lowkey.make_cache(model)
    whole = read(model, tokenizer, cache, ids[:, :tokens], True)
    sure = behind(model, cache, ids[:, tokens:])
    known: dict[str, dict] = {}
    for row in rows():
        budget = None
        if row.group and row.equal:
            share, held = known[row.group]["kept"], known[row.group]["bytes"]
            budget = f"{100 * share:.6f}%" if row.equal == "share" else f"{held / 1024:.3f} KiB"
        policy = make_policy(row.policy, budget, row.options) if row.policy else None
        exact = DEFAULT_WINDOW if row.bits else None
        cache = lowkey.make_cache(model, policy=policy, bits=row.bits, exact=exact)
        held = read(model, tokenizer, cache, ids[:, :tokens], row.exact)
        kept = None
        if policy is not None:
            counts = [len(p) for layer in range(len(cache.layers)) for p in cache.kept_positions(layer)]
            kept = statistics.fmean(counts) / tokens
        logits = behind(model, cache, ids[:, tokens:])
        kl = float((sure.exp() * (sure - logits)).sum(-1).mean())
        known[row.name] = {"kl": kl, "bytes": held, "kept": kept, "share": held / whole}
        yield row.name, known[row.name]


def read(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cache: LowkeyCache, ids: Tensor, exact: bool
) -> int:
    """Read a window (1, t) into a cache, which evicts nothing more; returns the bytes held."""
    cache.exact_prefill(exact)
    lowkey.prefill(model, tokenizer, cache, ids)
    cache.exact_prefill(False)
    cache.freeze()
    return cache.nbytes()


def behind(model: PreTrainedModel, cache: LowkeyCache, ids: Tensor) -> Tensor:
    """Log probabilities (t, vocabulary) after each of the tokens (1, t) behind what a cache holds."""
    return model(ids, past_key_values=cache).logits[0].float().log_softmax(-1)


def summary(found: dict[str, list[dict]]) -> list[dict]:
    """Means over windows, half widths of their intervals, and differences from the first row of a group."""
    table = []
    for row in rows():
        lines = found[row.name]
        kl = [x["kl"] for x in lines]
        line: dict = {
            "row": row.name,
            "windows": len(lines),
            "kl": statistics.fmean(kl),
            "kl_95": half_width(kl),
        }
        line["bytes"] = statistics.fmean(x["share"] for x in lines)
        line["kept"] = None if row.policy == "" else statistics.fmean(x["kept"] for x in lines)
        line["over"], line["over_95"] = None, None
        if row.group:
            line["over"], *line["over_95"] = paired_bootstrap(kl, [x["kl"] for x in found[row.group]])
        line["by_window"] = kl
        table.append(line)
    return table


if __name__ == "__main__":
    typer.run(main)
