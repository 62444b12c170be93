"""SmallKV on the real model: which tokens a small model keeps, beside policies of the model's own.

    python benchmarks/small_model.py OUT.json --model smollm2 --small CHILD --data one.txt --data two.txt \\
        [--plain smollm2-child-before-training] [--budgets 25%,10% --contexts 16 --tokens 1024 --windows 2]

A context has four facts; the question about one of them chooses what is kept, and is then asked again over
it, with its tokens beside the budget (protocol `with` of benchmarks/policies.py, whose contexts these are).
`kl_text` is KL(full || setting) per token over the second half of windows of plain text, of which the first
half was read and evicted. Rows of one budget take the same bytes in the large model. Bytes stand in three
columns: the large model's rows, the small model's cache and the small model's weights.

`SnapKV` and `H2O` are the bound of `window=8` and of all queries: with the model beside itself every head is
matched with itself, and both keep the same tokens (a test says so). `shuffled` matches heads at random. Each
context is written to OUT.jsonl as soon as it is measured; the same command goes on after an interrupt.
"""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from policies import Context, draw_context, judge
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import lowkey
from lowkey.core import files, text
from lowkey.core.intervals import half_width
from lowkey.core.progress import silent
from lowkey.evaluate.asking import tensor_of
from lowkey.evaluate.likelihood import measure_decode
from lowkey.evaluate.machine import machine
from lowkey.evaluate.settings import Setting, full
from lowkey.models.loading import load
from lowkey.policies import H2O, Random, SmallKV, SmallKVTokens, SnapKV
from lowkey.policies.base import Policy

WINDOW = {"window": 8, "kernel": 7}


@dataclass(frozen=True)
class Shuffled(SmallKVTokens):
    """`SmallKVTokens` whose heads are matched at random."""

    def match(self, own: Tensor, small: Tensor, tokens: int) -> Tensor:
        """A random head of the small model for each head; see `SmallKVTokens.match`."""
        drawn = torch.Generator().manual_seed(tokens)
        return torch.randint(0, small.shape[1], own.shape[:2], generator=drawn)


def policies(budget: str) -> dict[str, Policy]:
    """The policies by the name of their row."""
    return {
        "SnapKV": SnapKV(budget),
        "tokens, window": SmallKVTokens(budget, **WINDOW),
        "tokens, window, untrained": SmallKVTokens(budget, **WINDOW),
        "H2O": H2O(budget),
        "tokens, all queries": SmallKVTokens(budget),
        "random": Random(budget),
        "values, window, sum": SmallKV(budget, **WINDOW),
        "values, window, exact": SmallKV(budget, **WINDOW, mix="exact"),
        "shuffled, window": Shuffled(budget, **WINDOW),
        "values, all queries, sum": SmallKV(budget),
    }


def main(
    out: Path,
    model: str = "smollm2",
    small: Annotated[str, typer.Option(help="the small model")] = "",
    plain: Annotated[str, typer.Option(help="the small model before it was trained")] = "",
    data: Annotated[list[Path] | None, typer.Option(help="held-out texts; repeat")] = None,
    budgets: str = "25%,10%",
    contexts: int = 16,
    tokens: int = 1024,
    windows: int = 2,
    rows: Annotated[str, typer.Option(help="rows, separated by semicolons; empty for all")] = "",
) -> None:
    """Measure all rows and print their table."""
    loaded, tokenizer = load(model, "auto", "cpu")
    beside = load(small, "auto", "cpu")[0]
    untrained = load(plain, "auto", "cpu")[0] if plain else None
    texts = [text.read_text(path, "data") for path in data or ()] or [text.embedded_text("evaluation")]
    ids = [tokenizer(words, add_special_tokens=False, verbose=False).input_ids for words in texts]
    log = out.with_suffix(".jsonl")
    done = read_log(log)
    for n in range(contexts):
        context = draw_context(random.Random(f"0 {n}"), tokenizer, ids[n % len(ids)], tokens)
        sure: list[Tensor] = []
        for budget in budgets.split(","):
            for name, policy in policies(budget).items():
                helper = untrained if name.endswith("untrained") else beside
                wanted = not rows or name in rows.split(";")
                if (n, budget, name) in done or helper is None or not wanted:
                    continue
                sure = sure or [answers(loaded, tokenizer, None, helper, context)[0]]
                said, held = answers(loaded, tokenizer, policy, helper, context)
                line = {"context": n, "budget": budget, "row": name, **held}
                line |= judge(tokenizer, context, sure, [said])
                if n < windows:
                    start = 20_000 + 4 * tokens * n
                    window = torch.tensor([ids[n % len(ids)][start : start + tokens]])
                    line["kl_text"] = text_divergence(loaded, tokenizer, policy, helper, window)
                with log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
    table = summary(list(read_log(log).values()))
    files.write_json(out, {"environment": machine("cpu"), "rows": table}, "benchmark", ours=True)
    for row in table:
        print(row)


def setting_of(model: PreTrainedModel, policy: Policy, small: PreTrainedModel) -> Setting:
    """The setting of a policy."""
    beside = small if policy.reads_along else None
    return Setting(
        type(policy).__name__,
        {},
        lambda: lowkey.make_cache(model, policy=policy, small=beside),
        evicts=True,
        small=beside,
    )


@torch.no_grad()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    policy: Policy | None,
    small: PreTrainedModel,
    context: Context,
) -> tuple[Tensor, dict[str, int]]:
    """Log probabilities (a + 1, vocabulary) of the answer to the first question, and the bytes by column."""
    question, answer = context.asked[0]
    shown = tensor_of(model, context.ids + question)
    if policy is None:
        cache = lowkey.make_cache(model)
        lowkey.prefill(model, tokenizer, cache, shown[:, : len(context.ids)])
    else:
        kept = round(float(str(policy.budget).rstrip("%")) / 100 * len(context.ids)) + len(question)
        cache = setting_of(model, replace(policy, budget=f"{kept} tokens"), small).make()
        lowkey.prefill(model, tokenizer, cache, shown, len(question))
    held = {
        "large": cache.nbytes() - cache.small_nbytes(),
        "small_cache": cache.small_nbytes(),
        "small_weights": cache.small_weights_nbytes(),
        "full": len(context.ids) * bytes_of_token(model),
    }
    ids = tensor_of(model, question + answer)
    with cache.reading(ids):
        logits = model(ids, past_key_values=cache, logits_to_keep=len(answer) + 1).logits[0]
    return logits.float().log_softmax(-1), held


def bytes_of_token(model: PreTrainedModel) -> int:
    """The bytes of a token in the model's full cache."""
    cache = lowkey.make_cache(model)
    model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache)
    return cache.nbytes()


def text_divergence(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    policy: Policy,
    small: PreTrainedModel,
    window: Tensor,
) -> float:
    """KL(full || setting) per token of the second half of a window (1, t)."""
    settings = [full(model), setting_of(model, policy, small)]
    return measure_decode(model, tokenizer, settings, window, silent)[settings[1].name]["kl_decode"]


def read_log(path: Path) -> dict[tuple[int, str, str], dict]:
    """The lines by context, budget and row; a torn last line is dropped."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[row["context"], row["budget"], row["row"]] = row
    return found


def summary(lines: Sequence[dict]) -> list[dict]:
    """A row for each budget and policy, over the contexts that all of them have."""
    names = {(x["budget"], x["row"]) for x in lines}
    whole = [
        n for n in {x["context"] for x in lines} if len([x for x in lines if x["context"] == n]) == len(names)
    ]
    table = []
    for budget, name in dict.fromkeys((x["budget"], x["row"]) for x in lines):
        own = [x for x in lines if (x["budget"], x["row"]) == (budget, name) and x["context"] in whole]
        if not own:
            continue
        row: dict = {"budget": budget, "row": name, "contexts": len(own)}
        for figure in ("right", "nats", "kl"):
            values = [x[figure][0] for x in own]
            row[figure], row[f"{figure}_95"] = statistics.fmean(values), half_width(values)
        told = [x["kl_text"] for x in own if "kl_text" in x]
        row["kl_text"], row["windows"] = (statistics.fmean(told), len(told)) if told else (None, 0)
        for column in ("large", "small_cache", "small_weights", "full"):
            row[column] = statistics.fmean(x[column] for x in own)
        table.append(row)
    return table


if __name__ == "__main__":
    typer.run(main)
