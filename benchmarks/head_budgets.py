"""Which budget per head: recall over an evicted cache, the question asked again, policies that differ in
their allocator alone.

    python benchmarks/head_budgets.py MODEL OUT.json [--contexts 512,768,1024 --cases 20 --seeds 3 ...]

Per context `cases` 1-hop questions, the same for all. HeadKV's scores are estimated anew with every seed, on
other text than the cases; `shuffled` deals the R2 scores of that seed to other heads. Writes each answer and
prints a Markdown table: exact match and its 95 % interval, by a bootstrap over questions. Resumable: a
context that is in OUT.json is not run again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.catalog import make_policy
from lowkey.core import files, text
from lowkey.core.progress import bars
from lowkey.evaluate.recall import answered, draw_episodes
from lowkey.evaluate.settings import Setting, evicted, full
from lowkey.heads.retrieval import estimate_heads
from lowkey.models.loading import load

BUDGETS = ("1.5%", "3%", "6%", "12%")
ALONE = ("streamingllm", "snapkv", "pyramidkv", "ada-kv")
SCORED = {"headkv-r": "copy", "headkv-r2": "r2", "shuffled": "r2"}

app = typer.Typer(add_completion=False)


@app.command()
def run(
    model: str,
    out: Path,
    contexts: str = "512,768,1024",
    cases: int = 20,
    seeds: int = 3,
    refeed: bool = True,
    option: Annotated[list[str] | None, typer.Option("-O")] = None,
) -> None:
    """Measure and print the table."""
    loaded, tokenizer = load(model, "auto", "cpu")
    options = dict(pair.split("=", 1) for pair in option or ["sinks=1", "recent=2"])
    found = (
        json.loads(out.read_text()) if out.exists() else {"options": options, "refeed": refeed, "answers": []}
    )
    done = {a["context"] for a in found["answers"]}
    todo = [c for c in map(int, contexts.split(",")) if c not in done]
    importance = [heads_of(loaded, tokenizer, seed) for seed in range(seeds)] if todo else []
    for context in todo:
        found["answers"] += answers(
            loaded, tokenizer, context, cases, refeed, settings_of(loaded, context, options, importance)
        )
        files.write_text(out, json.dumps(found) + "\n", ours=True)
    print(table(found["answers"]))


def heads_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int) -> dict[str, dict]:
    """Importance by policy name."""
    scores = {
        kind: estimate_heads(model, tokenizer, kind=kind, cases=100, context=900, seed=seed, progress=bars)
        for kind in ("copy", "r2")
    }
    tables = {"headkv-r": scores["copy"], "headkv-r2": scores["r2"], "shuffled": scores["r2"].shuffled(seed)}
    return {name: {SCORED[name]: s.per_kv_head().tolist()} for name, s in tables.items()}


def settings_of(
    model: PreTrainedModel, context: int, options: dict, importance: list[dict]
) -> dict[tuple, Setting]:
    """By (name, budget, seed)."""
    found: dict[tuple, Setting] = {("full", "100%", 0): full(model)}
    for budget in BUDGETS:
        for name in ALONE:
            own = {k: v for k, v in options.items() if name != "streamingllm" or k in ("sinks", "recent")}
            found[name, budget, 0] = evicted(model, make_policy(name, budget, own), name, context)
        for seed, heads in enumerate(importance):
            for name in SCORED:
                policy = make_policy("headkv-r" if name == "headkv-r" else "headkv-r2", budget, options)
                found[name, budget, seed] = evicted(model, policy, name, context, heads=heads[name])
    return found


@torch.no_grad()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    cases: int,
    refeed: bool,
    settings: dict[tuple, Setting],
) -> list[dict]:
    ids = text.encode(tokenizer, text.embedded_text("evaluation")).tolist()
    episodes = draw_episodes(tokenizer, ids, context, cases, context, "plain")
    rows = []
    for case, episode in enumerate(bars(episodes, f"context {context}")):
        for (name, budget, seed), setting in settings.items():
            right = answered(model, tokenizer, setting, episode, "plain", refeed)["right"]
            rows.append(
                {
                    "context": context,
                    "case": case,
                    "name": name,
                    "budget": budget,
                    "seed": seed,
                    "right": int(right),
                }
            )
    return rows


def table(rows: list[dict]) -> str:
    names = list(dict.fromkeys(r["name"] for r in rows if r["name"] != "full"))
    lines = [
        f"| full: {interval(rows, 'full', '100%')} | " + " | ".join(BUDGETS) + " |",
        "|---" * (len(BUDGETS) + 1) + "|",
    ]
    lines += [f"| {name} | " + " | ".join(interval(rows, name, b) for b in BUDGETS) + " |" for name in names]
    return "\n".join(lines)


def interval(rows: list[dict], name: str, budget: str) -> str:
    """Share of right answers and its 95 % bootstrap interval over questions; seeds of one question stay
    together.
    """
    by_question: dict[tuple, list[int]] = {}
    for r in rows:
        if (r["name"], r["budget"]) == (name, budget):
            by_question.setdefault((r["context"], r["case"]), []).append(r["right"])
    means = torch.tensor([sum(v) / len(v) for v in by_question.values()])
    drawn = means[
        torch.randint(len(means), (2000, len(means)), generator=torch.Generator().manual_seed(0))
    ].mean(1)
    low, high = drawn.quantile(torch.tensor([0.025, 0.975])).tolist()
    return f"{means.mean():.2f} ({low:.2f}-{high:.2f})"


if __name__ == "__main__":
    app()
