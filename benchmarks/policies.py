"""Every policy that evicts on the real model, beside the controls, in recall of facts.

    python benchmarks/policies.py OUT.json --model smollm2 --data one.txt --data two.txt \\
        --heads FOLDER --gates FOLDER [--budgets 25%,10% --draws 5 --contexts 4 --protocol after --only a;b]

A context has four facts. It is read and evicted once, and every fact is asked for over a copy of what was
kept (protocol `after`: nothing that evicts has seen a question). With protocol `with`, the first fact alone
is asked for: the question chooses what is kept, and is then asked again over it. Questions evict nothing and
are held beside the budget in both. A question is right if the model, shown the question and the answer so
far, prefers each digit of the answer, and then no further digit. That is what greedy writing gives.

Draws differ in the texts, the facts and the seeds of policies. Each context is written to OUT.jsonl as soon
as it is measured; the same command goes on after an interrupt. Intervals (95 %) are over draws; differences
from `random` have a paired bootstrap over contexts.
"""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import lowkey
from lowkey.catalog import make_policy
from lowkey.core import files, text
from lowkey.core.intervals import half_width, paired_bootstrap
from lowkey.core.progress import bars
from lowkey.core.types import LowkeyError
from lowkey.evaluate.asking import tensor_of
from lowkey.evaluate.machine import machine
from lowkey.evaluate.recall import FORMS, Fact, frame_of, usual_form
from lowkey.evaluate.settings import Setting, evicted, full, packed, planned
from lowkey.heads.needles import KEYS, draw_facts, sentence_ends, weave
from lowkey.heads.scores import HeadScores
from lowkey.models.loading import load
from lowkey.plan.plan import Plan
from lowkey.policies import POLICIES
from lowkey.policies.gates import Gates
from lowkey.storage.exact import DEFAULT_WINDOW

# rows beside every policy with its defaults: name of the row, policy, options
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "snapkv, max": ("snapkv", {"aggregation": "max"}),
    "snapkv, defensive": ("snapkv", {"aggregation": "defensive"}),
    "snapkv, layer-mass": ("snapkv", {"allocator": "layer-mass"}),
    "attention-matching, pursuit": ("attention-matching", {"keys": "pursuit"}),
}
INTEGERS = ("kivi4", "kivi2")  # rows of the same protocol that evict nothing


@dataclass(frozen=True)
class Context:
    """A text with facts and what is asked about it.

    Args:
        ids: of the template's beginning and the text.
        asked: ids of each question and of its answer.
    """

    ids: list[int]
    asked: list[tuple[list[int], list[int]]]


def main(
    out: Path,
    model: str = "smollm2",
    data: Annotated[list[Path] | None, typer.Option(help="held-out texts; repeat")] = None,
    heads: Annotated[Path | None, typer.Option(help="folder with heads-KIND.json")] = None,
    gates: Annotated[list[Path] | None, typer.Option(help="folders of `lowkey gates`; repeat")] = None,
    plans: Annotated[list[Path] | None, typer.Option(help="plans that evict nothing; repeat")] = None,
    budgets: str = "25%,10%",
    draws: int = 5,
    contexts: Annotated[int, typer.Option(help="of a draw")] = 4,
    tokens: Annotated[int, typer.Option(help="of a context")] = 1024,
    protocol: Annotated[str, typer.Option(help="after, or with")] = "after",
    only: Annotated[str, typer.Option(help="rows, separated by semicolons")] = "",
    dtype: str = "auto",
) -> None:
    """Measure all rows and print their table."""
    loaded, tokenizer = load(model, dtype, "cpu")
    lowkey.attach(loaded)
    scores = {
        path.stem.removeprefix("heads-"): HeadScores.load(path, loaded).per_kv_head().tolist()
        for path in sorted(heads.glob("heads-*.json") if heads else ())
    }
    learnt = {found.method: found for found in map(Gates.load, gates or ())}
    texts = [text.read_text(path, "data") for path in data or ()] or [text.embedded_text("evaluation")]
    ids = [tokenizer(words, add_special_tokens=False, verbose=False).input_ids for words in texts]
    drawn = {
        (draw, n): draw_context(random.Random(f"{draw} {n}"), tokenizer, ids[n % len(ids)], tokens)
        for draw in range(draws)
        for n in range(contexts)
    }
    log = out.with_suffix(".jsonl")
    done = read_log(log)
    kept = {f"plan {path.name}": planned(loaded, Plan.load(path), str(path)) for path in plans or ()}
    units = [(at, row) for at in drawn for row in rows(only, budgets.split(","), list(kept))]
    stock: dict[tuple[int, int], list[Tensor]] = {}
    refused: set[str] = set()
    for (draw, n), (name, policy, options, budget) in bars(units, lambda u: f"{u[1][0]} {u[1][3] or ''}"):
        if name in refused or (protocol, name, budget, draw, n) in done:
            continue
        context = drawn[draw, n]
        if (draw, n) not in stock:
            # the full cache's logits are needed for every row of a context, and only while it is measured
            stock = {(draw, n): answers(loaded, tokenizer, full(loaded), context, "after", 0)[0]}
        try:
            setting = kept.get(name) or make_setting(
                loaded, name, policy, options, budget, draw, context, protocol, scores, learnt
            )
        except LowkeyError as error:
            print(f"{name} {budget}: {error}", flush=True)
            refused.add(name)
            continue
        said, held = answers(loaded, tokenizer, setting, context, protocol, 1 if protocol == "with" else 0)
        judged = judge(tokenizer, context, stock[draw, n], said)
        line = {"protocol": protocol, "row": name, "budget": budget, "draw": draw, "context": n, "held": held}
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line | judged) + "\n")
    table = summary(read_log(log))
    files.write_json(out, {"environment": machine("cpu"), "rows": table}, "benchmark", ours=True)
    for row in table:
        print(row)


def rows(
    only: str, budgets: list[str], plans: list[str]
) -> Iterator[tuple[str, str, dict[str, Any], str | None]]:
    """Name, policy, options and budget of every row; what evicts nothing has no budget."""
    wanted = set(only.split(";")) if only else None
    plain = [("full", "", {}, None), *((name, "", {}, None) for name in [*INTEGERS, *plans])]
    named = [(name, name, {}) for name in POLICIES]
    named += [(name, policy, options) for name, (policy, options) in VARIANTS.items()]
    for row in [*plain, *((*policy, budget) for budget in budgets for policy in named)]:
        if wanted is None or row[0] in wanted:
            yield row


def draw_context(
    rng: random.Random, tokenizer: PreTrainedTokenizerBase, haystack: list[int], tokens: int
) -> Context:
    """A context of the form that suits the tokenizer.

    Args:
        rng: source of random numbers.
        tokenizer: the tokenizer.
        haystack: ids of the text.
        tokens: tokens of the context.
    """
    form = FORMS[usual_form(tokenizer)]
    frame, facts = frame_of(tokenizer, form), draw_facts(rng, 4, KEYS, form.digits)
    told = [frame.encode(form.statement.format(key=f.key, value=f.value)) for f in facts]
    ends = sentence_ends(tokenizer, haystack) if form.chat else ()
    body = weave(rng, haystack, told, tokens - len(frame.start), ends)

    def asked(fact: Fact) -> tuple[list[int], list[int]]:
        words, opening = form.question.format(key=fact.key), form.opening.format(key=fact.key)
        question = frame.question(words, opening) if frame.chat else frame.encode(words)
        return question, frame.encode(fact.answer)

    rng.shuffle(facts)
    return Context(frame.start + body, [asked(fact) for fact in facts])


def make_setting(
    model: PreTrainedModel,
    name: str,
    policy: str,
    options: dict[str, Any],
    budget: str | None,
    draw: int,
    context: Context,
    protocol: str,
    heads: dict[str, list[list[float]]],
    gates: dict[str, Gates],
) -> Setting:
    """The setting of a row; raises `LowkeyError` where a policy lacks what it has to be given."""
    if not policy:
        return full(model) if name == "full" else packed(model, name, DEFAULT_WINDOW)
    if budget is None:
        raise LowkeyError(f"policy {policy}: give a budget")
    seeded = {"seed": str(draw)} if policy == "random" else {}
    made = make_policy(policy, budget, options | seeded)
    if protocol == "with" or made.sees_answer:
        # the question, and the answer that an oracle sees, are held beside the budget
        question, answer = context.asked[0]
        beside = len(question) + (len(answer) if made.sees_answer else 0)
        kept = round(float(budget.rstrip("%")) / 100 * len(context.ids)) + beside
        made = replace(made, budget=f"{kept} tokens")
    return evicted(model, made, policy, len(context.ids), heads=heads, gates=gates)


@torch.no_grad()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    setting: Setting,
    context: Context,
    protocol: str,
    most: int,
) -> tuple[list[Tensor], float]:
    """What a setting predicts for every answer.

    Args:
        model: the model, attached.
        tokenizer: its tokenizer.
        setting: the setting.
        context: what is read and asked.
        protocol: `with` lets the first question choose what is kept.
        most: number of questions; 0 for all.

    Returns:
        Log probabilities (a + 1, vocabulary) for every answer of a tokens and the token after it, and the
        bytes that the context took, on average.
    """
    predicted, held = [], []
    shared = None
    for question, answer in context.asked[: most or None]:
        if setting.evicts and (protocol == "with" or setting.sees_answer):
            cache = setting.make()
            shown = context.ids + question + (answer if setting.sees_answer else [])
            lowkey.prefill(model, tokenizer, cache, tensor_of(model, shown), len(shown) - len(context.ids))
        else:
            if shared is None:
                shared = setting.make()
                lowkey.prefill(model, tokenizer, shared, tensor_of(model, context.ids))
                shared.freeze()  # a question evicts nothing
            cache = shared.branch()
        held.append(cache.nbytes())
        ids = tensor_of(model, question + answer)
        logits = model(ids, past_key_values=cache, logits_to_keep=len(answer) + 1).logits[0]
        predicted.append(logits.float().log_softmax(-1))
    return predicted, statistics.fmean(held)


def judge(
    tokenizer: PreTrainedTokenizerBase, context: Context, full: list[Tensor], said: list[Tensor]
) -> dict[str, list[float]]:
    """Whether each answer is right; its nats by token; KL(full || setting) by token of the answer."""
    right, nats, divergence = [], [], []
    for (_, answer), sure, own in zip(context.asked, full, said, strict=False):
        best = own.argmax(-1).tolist()
        ends = not str(tokenizer.decode(best[-1:])).lstrip(" ")[:1].isdigit()
        right.append(float(best[:-1] == answer and ends))
        nats.append(float(-own[:-1].gather(1, torch.tensor(answer)[:, None]).mean()))
        divergence.append(float(F.kl_div(own[:-1], sure[:-1], reduction="batchmean", log_target=True)))
    return {"right": right, "nats": nats, "kl": divergence}


def read_log(path: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The lines by protocol, row, budget, draw and context; a torn last line is dropped."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[row["protocol"], row["row"], row["budget"], row["draw"], row["context"]] = row
    return found


def summary(log: dict[tuple[Any, ...], dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each protocol, row and budget: means and half widths over draws, and differences from
    `random` at the same budget, in nats, with a paired bootstrap over contexts.
    """
    lines = list(log.values())
    table = []
    for protocol, name, budget in dict.fromkeys((x["protocol"], x["row"], x["budget"]) for x in lines):
        own = [x for x in lines if (x["protocol"], x["row"], x["budget"]) == (protocol, name, budget)]
        whole = {
            (x["draw"], x["context"]): x["held"]
            for x in lines
            if (x["protocol"], x["row"]) == (protocol, "full")
        }
        control = {
            (x["draw"], x["context"]): x
            for x in lines
            if (x["protocol"], x["row"], x["budget"]) == (protocol, "random", budget)
        }
        row: dict[str, Any] = {"protocol": protocol, "row": name, "budget": budget}
        shares = [x["held"] / whole[at] for x in own if (at := (x["draw"], x["context"])) in whole]
        row["bytes"] = statistics.fmean(shares) if shares else None
        row["questions"], row["draws"] = sum(len(x["right"]) for x in own), len({x["draw"] for x in own})
        for figure in ("right", "nats", "kl"):
            draws = [
                statistics.fmean(v for x in own if x["draw"] == draw for v in x[figure])
                for draw in sorted({x["draw"] for x in own})
            ]
            row[figure], row[f"{figure}_95"] = statistics.fmean(draws), half_width(draws)
        both = [
            [statistics.fmean(x["right"]) for x in (one, control[at])]
            for one in own
            if (at := (one["draw"], one["context"])) in control
        ]
        row["right_over_random"], row["right_over_random_95"] = None, None
        if both:
            over, *interval = paired_bootstrap(*zip(*both, strict=True))
            row["right_over_random"], row["right_over_random_95"] = over, interval
        table.append(row)
    return sorted(table, key=lambda r: (r["protocol"], r["budget"] or "", -r["right"], r["nats"]))


if __name__ == "__main__":
    typer.run(main)
