"""Which heads need all tokens of a chain: gates trained by reward (RLKV) and their controls, at equal rows.

    python benchmarks/chain_heads.py MODEL FOLDER OUT.json [--budgets 40%,25% --cases 24 --samples 8 ...]

MODEL follows chains (recipes/chains). FOLDER holds head scores of `lowkey heads`, NAME.json; each becomes a
row of every budget, with the gates of `reward` dealt to other heads, and random ones, beside them. The heads
of the highest gates keep all tokens and the others `sinks` + `recent`, in the cache of policy `rlkv`, which
evicts from the context before the question and at every step. Resumable: a setting that is in OUT.json is not
run again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import typer

from lowkey.core import files
from lowkey.core.progress import bars
from lowkey.evaluate.chains import measure_chains, summary_of_chains
from lowkey.evaluate.settings import Setting, evicted, full
from lowkey.heads.chains import ChainTask, draw_chains
from lowkey.heads.scores import HeadScores
from lowkey.models.loading import load
from lowkey.policies import POLICIES
from lowkey.policies.allocators import FullHeads

FULL, CONTROL, SEEDS = "full", "reward", 3
COLUMNS = ("heads by", "kept", "accuracy", "against `reward`", "look-ups", "tokens", "over-length")

app = typer.Typer(add_completion=False)


@app.command()
def run(
    model: str,
    folder: Path,
    out: Path,
    budgets: str = "40%,25%",
    cases: int = 24,
    samples: int = 8,
    context: int = 96,
    pairs: int = 16,
    shortest: int = 3,
    longest: int = 6,
    sinks: int = 4,
    recent: int = 8,
    seed: int = 1000,
) -> None:
    """Measure, and print the table."""
    loaded, tokenizer = load(model, "float32", "cpu")
    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"measured": {}}
    scores = {path.stem: HeadScores.load(path, loaded) for path in sorted(folder.glob("*.json"))}
    rankings = {name: own.per_kv_head().tolist() for name, own in scores.items()}
    shape = scores[CONTROL].per_kv_head().shape
    for number in range(SEEDS):
        rankings[f"shuffled {number}"] = scores[CONTROL].shuffled(number).per_kv_head().tolist()
        generator = torch.Generator().manual_seed(number)
        rankings[f"random {number}"] = torch.rand(shape, generator=generator).tolist()
    window = {"sinks": sinks, "recent": recent, "every": 1}
    settings: dict[str, Setting] = {FULL: full(loaded)}
    for budget in budgets.split(","):
        for name, ranking in rankings.items():
            split = FullHeads(importance=tuple(map(tuple, ranking)))
            policy = POLICIES["rlkv"](budget, allocator=split, **window)
            settings[f"{name} {budget}"] = evicted(loaded, policy, "rlkv", context)
        policy = POLICIES["streamingllm"](budget, **window)
        settings[f"even {budget}"] = evicted(loaded, policy, "streamingllm", context)
    task = ChainTask(pairs, shortest, longest)
    chains = draw_chains(tokenizer, cases, seed, task, context)
    for name in bars([n for n in settings if n not in found["measured"]], "settings"):
        (one,) = measure_chains(
            loaded,
            tokenizer,
            [settings[name]],
            chains,
            samples=samples,
            most=2 * (longest + 3),
            at_once=cases,
        ).values()
        found["measured"][name] = one
        found |= {"rows": rows(found["measured"]), "model": model, "cases": cases, "samples": samples}
        found |= {"window": window, "context": context, "task": [pairs, shortest, longest]}
        files.write_text(out, json.dumps(found) + "\n", ours=True)
    print(table(found["rows"]))


def rows(measured: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each setting; seeds of a control are one row, whose cases are those of all seeds."""
    groups: dict[str, list[str]] = {}
    for name in measured:
        words = name.split()
        groups.setdefault(" ".join([words[0], words[-1]]) if len(words) == 3 else name, []).append(name)
    pooled = {
        group: [merged(cases) for cases in zip(*(measured[name] for name in names), strict=True)]
        for group, names in groups.items()
    }
    whole, found = sum(case["held"] for case in pooled[FULL]), []
    for group in pooled:
        label, _, budget = group.partition(" ")
        reference = f"{CONTROL} {budget}" if budget and f"{CONTROL} {budget}" in pooled else FULL
        own = summary_of_chains({group: pooled[group], reference: pooled[reference]}, reference)[group]
        held = sum(case["held"] for case in pooled[group]) / whole
        found.append({"heads_by": label, "budget": budget or None, **own, "kept": held})
    return found


def merged(cases: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """One case as several settings answered it."""
    lists = {key: [x for case in cases for x in case[key]] for key in ("right", "links", "tokens", "over")}
    return {**lists, "held": sum(case["held"] for case in cases) / len(cases)}


def table(found: list[dict[str, Any]], budget: str | None = None) -> str:
    """A Markdown table, the best accuracy first; of one budget and the full cache, or of all."""
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    for row in sorted(found, key=lambda row: (row["budget"] or "z", row["accuracy"]), reverse=True):
        if budget and row["budget"] not in (None, budget):
            continue
        mean, low, high = row["difference"]
        against = f"{mean:+.2f} ({low:+.2f} to {high:+.2f})" if row["budget"] else "-"
        cells = [row["heads_by"], f"{100 * row['kept']:.1f} %", f"{row['accuracy']:.3f}", against]
        cells += [f"{row['links']:.2f}", f"{row['tokens']:.1f}", f"{100 * row['over_length']:.0f} %"]
        lines.append(tuple(cells))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    app()
