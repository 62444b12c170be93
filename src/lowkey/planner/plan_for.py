"""`plan_for`: from a budget of memory to the plan that loses least within it."""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.calibration.calibrate import Sample, calibrate
from lowkey.calibration.limits import BUDGET_LENGTH
from lowkey.core import text
from lowkey.core.options import Checked, Range, checked, nearest_name, option, shown
from lowkey.core.progress import Progress, silent
from lowkey.core.types import Budget, LowkeyError
from lowkey.evaluate.recall import question_room
from lowkey.evaluate.result import Task, evaluate
from lowkey.evaluate.settings import Setting, full, planned
from lowkey.models import families
from lowkey.models.attention_interface import attach
from lowkey.plan.plan import Plan
from lowkey.planner.candidates import (
    AXES,
    Candidate,
    Composer,
    packings_within,
    policy_keeping,
    share_of_tokens,
)
from lowkey.planner.costs import AxisCosts, Curve
from lowkey.planner.memory import in_words, least_bytes
from lowkey.policies import PLANNED, POLICIES
from lowkey.storage.exact import DEFAULT_WINDOW
from lowkey.storage.packing import NO_BITS

RANK_BITS = (NO_BITS, "kivi8", "kivi4")  # packings of latents; two bits lost at every budget measured
KEPT = (0.75, 0.5, 0.3, 0.15)  # shares of the tokens at which dropping them is measured
# Shares of the tokens for which combinations are predicted. The best of each group is measured: what is
# forgotten does not show in KL, so that recall may want fewer ranks or fewer tokens than KL does.
TRIED = ((1.0,), (0.85, 0.7), (0.6, 0.5), (0.4, 0.3), (0.25, 0.2))
# Where few tokens are kept, the exact window is most of them: eight bits with this window are tried, too.
SHORT_WINDOW, EIGHT_BITS = 8, "int8"

SHORTEST = 64  # tokens of a window


@dataclass(frozen=True)
class Search(Checked):
    """How much is measured.

    Args:
        windows: windows of calibration text on which candidates are compared.
        held_out: windows of held-out text on which the best are compared again.
        context: tokens of a window, of which the first half is the prompt.
        cases: recall cases of the best; 0 to ask for no recall.
    """

    windows: int = option(4, at_least=1, at_most=2**16)
    held_out: int = option(6, at_least=1, at_most=2**16)
    context: int = option(1024, at_least=SHORTEST, at_most=2**24)
    cases: int = option(16, at_least=0, at_most=10**6)


SAMPLE, SEARCH = Sample(), Search()
Measure = Callable[[Sequence[Plan], str, str, int | None, int], dict]
"""Compares plans: the plans, a text, its name, windows (None for the usual) and recall cases -> a result."""


@dataclass(frozen=True)
class Planned:
    """What the planner found.

    Args:
        plan: the choice.
        choice: its row of the frontier.
        frontier: what was measured, by bytes: rank, bits, tokens, axes, bytes per token, KL and recall.
        result: the comparison on held-out text, as `lowkey eval` writes it.
    """

    plan: Plan
    choice: dict
    frontier: list[dict]
    result: dict


def plan_for(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: str | Sequence[str] | None = None,
    *,
    keep: str | Budget,
    tokens: int | None = None,
    axes: Sequence[str] = AXES,
    policy: str = PLANNED,
    held_out: str | None = None,
    sample: Sample = SAMPLE,
    search: Search = SEARCH,
    work: Path | None = None,
    progress: Progress = silent,
) -> Plan:
    """Return the plan that loses least within a budget, over rank, bits and tokens together.

    Args:
        model: a supported model in eval mode; it becomes attached.
        tokenizer: the model's.
        texts: what to calibrate on and to compare candidates on; None for the embedded text.
        keep: bytes of one sequence in the layers that can be compressed: a share like `12.5%`, a rate like
            `4 KiB/token`, or a total like `64 MiB`.
        tokens: length of the sequence that bytes are counted for; None for 1024, or as many as the model has
            positions.
        axes: which of `rank`, `bits` and `tokens` may be made smaller.
        policy: a name of `lowkey.policies.POLICIES`, which chooses the tokens that are kept.
        held_out: text on which the choice is checked; None for the last quarter of `texts`, or for the
            embedded evaluation text if there are none.
        sample: the calibration windows of low rank.
        search: how much is measured.
        work: a folder that progress is saved into, and from which the same job resumes.
        progress: shows how far the work is.

    Raises:
        LowkeyError: for a budget that nothing can meet, a length that the model does not have, unknown axes
            or policies, or too short a text.
    """
    return search_plans(
        model,
        tokenizer,
        texts,
        keep=keep,
        tokens=tokens,
        axes=axes,
        policy=policy,
        held_out=held_out,
        sample=sample,
        search=search,
        work=work,
        progress=progress,
    ).plan


def search_plans(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: str | Sequence[str] | None = None,
    *,
    keep: str | Budget,
    tokens: int | None,
    axes: Sequence[str],
    policy: str,
    held_out: str | None,
    sample: Sample,
    search: Search,
    work: Path | None,
    progress: Progress,
) -> Planned:
    """As `plan_for`, with all that was measured."""
    check_axes(axes)
    check_policy(policy, axes)
    tokens = _length(model, tokens)
    words, unseen = _split(texts, held_out)
    attach(model)
    search = replace(search, context=_context(model, tokenizer, search))
    for name, given in (("calibration text", words), ("held-out text", unseen)):
        if (count := len(text.encode(tokenizer, given))) < search.context:
            raise LowkeyError(
                f"{name}: {count} tokens are too few for a window of {search.context}; give a longer text, "
                "or windows of fewer tokens"
            )
    temporary = tempfile.TemporaryDirectory() if work is None else nullcontext(str(work))
    with temporary as folder:
        place = Path(folder)
        composer = Composer(
            model,
            lambda budget, bits, recent: calibrate(
                model,
                tokenizer,
                words,
                budget=budget,
                bits=bits,
                at=tokens,
                recent=recent,
                sample=sample,
                work=place / "fit",
                progress=progress,
            ),
            policy_keeping(policy),
            tokens,
        )
        budget = bytes_of(Budget.parse(keep), composer)
        if composer.held(composer.without_ranks(NO_BITS, 1.0)) <= budget:
            return _uncompressed(composer)
        _check_budget(composer, budget, keep, axes, policy)
        measure = partial(_measure, model, tokenizer, search, place, progress)
        plans = _single(composer, budget, axes) | _combined(composer, budget, axes, measure, words)
        if not plans:
            raise LowkeyError(
                f"keep {keep}: no combination of {', '.join(axes)} holds {tokens} tokens in so little; give "
                "more, or a longer context"
            )
        result = measure(list(plans.values()), unseen, "held-out", search.held_out, 0)
        if search.cases:
            _add_recall(result, plans, unseen, search.cases, measure)
    for (candidate, plan), row in zip(plans.items(), result["rows"][1:], strict=True):
        row |= {"axes": list(candidate.axes), "bytes_planned": composer.held(plan) / tokens}
    rows = [
        _frontier_row(composer, plan, candidate, row)
        for (candidate, plan), row in zip(plans.items(), result["rows"][1:], strict=True)
    ]
    best = _best(rows)
    frontier = sorted(rows, key=lambda row: (row["bytes_per_token"], row["kl"]))
    for row, own in zip(result["rows"][1:], rows, strict=True):
        row["chosen"] = own is best
    chosen = list(plans.values())[rows.index(best)]
    profile = {**chosen.profile, "at": tokens, "frontier": frontier, "choice": best}
    plan = replace(chosen, profile=profile, budget=composer.budget_text(budget))
    return Planned(plan, best, frontier, result)


def _add_recall(result: dict, plans: dict[Candidate, Plan], words: str, cases: int, measure: Measure) -> None:
    """Measure recall where it can decide: of the best choice on a single axis, and of what has less KL."""
    rows = list(zip(plans.items(), result["rows"][1:], strict=True))
    single = [row["kl_decode"] for (candidate, _), row in rows if len(candidate.axes) == 1]
    asked = [(plan, row) for (_, plan), row in rows if row["kl_decode"] <= min(single, default=math.inf)]
    recalled = measure([plan for plan, _ in asked], words, "recall", None, cases)
    for row, own in zip([result["rows"][0], *(row for _, row in asked)], recalled["rows"], strict=True):
        row |= {name: value for name, value in own.items() if name.startswith(("exact_match", "recall_"))}


def check_axes(axes: Sequence[str]) -> None:
    """Refuse axes that are none, or none at all. Raises: LowkeyError."""
    if isinstance(axes, str):
        raise LowkeyError(f"axes {axes!r}: give a list, like ['rank', 'bits']")
    for axis in axes:
        if axis not in AXES:
            raise LowkeyError(f"axis {shown(axis)} is unknown; {nearest_name(axis, AXES)}")
    if not axes:
        raise LowkeyError(f"axes: none is left to make smaller; give some of {', '.join(AXES)}")


def check_policy(policy: str, axes: Sequence[str]) -> None:
    """Refuse policies that a plan on these axes cannot hold. Raises: LowkeyError."""
    if policy not in POLICIES:
        raise LowkeyError(f"policy {shown(policy)} is unknown; {nearest_name(policy, POLICIES)}")
    if "tokens" not in axes:
        return
    made = policy_keeping(policy)(0.5).with_head_scores({})  # refuses if it needs head scores
    if made.reads_along:
        raise LowkeyError(
            f"policy {policy!r} has a small model read along, which a plan does not hold; give another policy"
        )
    if made.needs_whole_keys and set(axes) != {"tokens"}:
        raise LowkeyError(
            f"policy {policy!r} {made.needs_whole_keys}, which excludes the other axes; give the axis tokens "
            "alone, or another policy"
        )


def _length(model: PreTrainedModel, tokens: int | None) -> int:
    """The length that bytes are counted for. Raises: LowkeyError if the model has no sequence of it."""
    if tokens is None:
        return families.readable_length(model, BUDGET_LENGTH)
    checked("tokens", tokens, int, Range(at_least=1, at_most=2**24), BUDGET_LENGTH)
    if (longest := families.readable_length(model, tokens)) < tokens:
        raise LowkeyError(f"tokens {tokens}: the model has {longest} positions; give at most that")
    return tokens


def _check_budget(
    composer: Composer, budget: float, keep: str | Budget, axes: Sequence[str], policy: str
) -> None:
    """Refuse a budget below the least that the axes allow. Raises: LowkeyError."""
    least = least_bytes(composer.model, composer.tokens, axes, policy, RANK_BITS)
    if budget < least:
        raise LowkeyError(
            f"keep {keep}: {composer.tokens} tokens take at least {in_words(least, up=True)} on the axes "
            f"{', '.join(axes)} ({100 * least / composer.full_bytes:.3g}% of the full cache); give more, "
            "more axes or a longer context"
        )


def _context(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, search: Search) -> int:
    """The tokens of a window: no more than the model reads, with a question and its answer if it is asked."""
    longest = families.max_positions(model)
    if longest is None:
        return search.context
    room = question_room(tokenizer) if search.cases else 0
    return max(SHORTEST, min(search.context, longest - room))


def _uncompressed(composer: Composer) -> Planned:
    """The plan that compresses nothing, where the whole cache fits. Nothing is measured."""
    row = {
        "rank": 1.0,
        "bits": NO_BITS,
        "tokens": 1.0,
        "axes": [],
        "bytes_per_token": composer.full_bytes / composer.tokens,
        "kl": 0.0,
        "recall": None,
    }
    plan = composer.without_ranks(NO_BITS, 1.0)
    profile = {"at": composer.tokens, "frontier": [row], "choice": row}
    return Planned(replace(plan, profile=profile), row, [row], {})


def bytes_of(budget: Budget, composer: Composer) -> float:
    """A budget in bytes of one sequence. Raises: LowkeyError for tokens."""
    if budget.unit == "tokens":
        raise LowkeyError(f"keep {budget}: give bytes, like '12.5%', '4 KiB/token' or '64 MiB'")
    full_rate = composer.full_bytes / composer.tokens
    return budget.share(int(full_rate), composer.tokens) * composer.full_bytes


def _split(texts: str | Sequence[str] | None, held_out: str | None) -> tuple[str, str]:
    """(text to calibrate and to compare on, text to check the choice on)."""
    if texts is None:
        return text.embedded_text("calibration"), held_out or text.embedded_text("evaluation")
    words = text.joined_texts(texts)
    if held_out is not None:
        return words, held_out
    cut = len(words) * 3 // 4
    return words[:cut], words[cut:]


def _single(composer: Composer, budget: float, axes: Sequence[str]) -> dict[Candidate, Plan]:
    """The choices that make a single axis smaller, within the budget."""
    found: dict[Candidate, Plan] = {}
    if "rank" in axes:
        candidate = Candidate(NO_BITS, 1.0, True)
        if (plan := composer.compose(candidate, budget)) is not None:
            found[candidate] = plan
    if "bits" in axes:
        names = packings_within(composer, budget)
        most = [name for name in names if name[-1] == names[0][-1]]
        for name in most[:3]:
            found[Candidate(name, 1.0, False)] = composer.without_ranks(name, 1.0)
    if "tokens" in axes and (share := share_of_tokens(composer, budget)) is not None:
        found[Candidate(NO_BITS, share, False)] = composer.without_ranks(NO_BITS, share)
    return found


def _combined(
    composer: Composer, budget: float, axes: Sequence[str], measure: Measure, words: str
) -> dict[Candidate, Plan]:
    """The combinations that are expected to lose least, measured on calibration text."""
    bits = RANK_BITS if "bits" in axes else (NO_BITS,)
    groups = TRIED if "tokens" in axes else ((1.0,),)
    shares = tuple(itertools.chain(*groups))
    if "rank" not in axes:
        return _packed_and_evicted(composer, budget) if {"bits", "tokens"} <= set(axes) else {}
    costs, sizes = _costs(composer, budget, bits, shares, measure, words)
    plans: dict[Candidate, Plan] = {}
    if "bits" in axes and "tokens" in axes:
        plans |= _most_tokens(composer, budget, EIGHT_BITS, SHORT_WINDOW)
    for group in groups:
        expected = sorted(
            (costs.predicted(name, sizes[name, share], share), name, share)
            for name in bits
            for share in group
            if (name, share) in sizes and len(Candidate(name, share, True).axes) > 1
        )
        made = (
            (candidate, plan)
            for _, name, share in expected
            for low_rank in (True, False)
            if len((candidate := Candidate(name, share, low_rank)).axes) > 1
            and (plan := composer.compose(candidate, budget)) is not None
            and composer.held(plan) > 0.8 * budget
        )
        plans.update(itertools.islice(made, 1))
    return plans


def _packed_and_evicted(composer: Composer, budget: float) -> dict[Candidate, Plan]:
    """The combinations of every rank: each packing that does not hold all tokens, with as many as fit."""
    usual = DEFAULT_WINDOW.recent
    packings = [*((name, usual) for name in RANK_BITS if name != NO_BITS), (EIGHT_BITS, SHORT_WINDOW)]
    plans: dict[Candidate, Plan] = {}
    for bits, recent in packings:
        if composer.compose(Candidate(bits, 1.0, False, recent), budget) is None:
            plans |= _most_tokens(composer, budget, bits, recent)
    return plans


def _most_tokens(composer: Composer, budget: float, bits: str, recent: int) -> dict[Candidate, Plan]:
    """Every rank in a packing, with so many recent tokens exact, and as many tokens as then fit."""
    low, high, best = 0.0, 1.0, None
    for _ in range(20):
        middle = (low + high) / 2
        candidate = Candidate(bits, middle, False, recent)
        try:
            plan = composer.compose(candidate, budget)
        except LowkeyError:  # fewer tokens than a policy always keeps
            low = middle
            continue
        if plan is None:
            high = middle
        else:
            low, best = middle, (candidate, plan)
    return {} if best is None else dict([best])


def _costs(
    composer: Composer,
    budget: float,
    bits: Sequence[str],
    shares: Sequence[float],
    measure: Measure,
    words: str,
) -> tuple[AxisCosts, dict[tuple[str, float], float]]:
    """What each axis costs, measured, and the bytes of the ranks that each combination leaves room for.

    Those bytes are counted with all tokens kept.
    """
    sizes = {(name, share): min(budget / share, composer.full_bytes) for name in bits for share in shares}
    points: dict[tuple[str, float], Plan] = {}
    for name in bits:
        whole = composer.held(composer.without_ranks(name, 1.0))
        for share in (1.0, 0.5, 0.25):
            size = min(budget / share, composer.full_bytes)
            if size >= whole:
                points[name, float(whole)] = composer.without_ranks(name, 1.0)
            elif (plan := composer.compose(Candidate(name, 1.0, True), size)) is not None:
                points[name, float(composer.held(plan))] = plan
    kept = [share for share in KEPT if len(shares) > 1]
    dropped = {share: composer.without_ranks(NO_BITS, share) for share in kept}
    rows = measure([*points.values(), *dropped.values()], words, "costs", None, 0)["rows"][1:]
    curves: dict[str, dict[float, float]] = {}
    for (name, size), row in zip(points, rows, strict=False):
        curves.setdefault(name, {})[size] = row["kl_decode"]
    of_tokens = {share: row["kl_decode"] for share, row in zip(dropped, rows[len(points) :], strict=True)}
    costs = AxisCosts(
        {name: Curve.of(own) for name, own in curves.items()}, Curve.of(of_tokens) if of_tokens else None
    )
    return costs, {(name, share): size for (name, share), size in sizes.items() if name in curves}


def _measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    search: Search,
    work: Path,
    progress: Progress,
    plans: Sequence[Plan],
    words: str,
    label: str,
    windows: int | None,
    cases: int,
) -> dict:
    """Compare plans with the full cache on a text: recall if there are cases, else KL of decoding."""
    settings = [full(model)] + [_setting(model, i, plan) for i, plan in enumerate(plans)]
    task = Task({label: words}, search.context, windows or search.windows, max(1, cases))
    names = ["recall"] if cases else ["decode"]
    return evaluate(model, tokenizer, settings, task, names, progress, work / label)


def _setting(model: PreTrainedModel, number: int, plan: Plan) -> Setting:
    setting, kept = planned(model, plan, ""), []
    if plan.factors:
        kept.append(f"rank {100 * rank_share(plan):.1f}%")
    if plan.bits is not None:
        kept.append(plan.bits)
    if plan.policy is not None:
        kept.append(f"{plan.policy['name']} {Budget.parse(plan.policy['budget'])}")
    return replace(setting, name=f"{number + 1}: {', '.join(kept)}")


def rank_share(plan: Plan) -> float:
    """The share of the numbers of a token that a plan stores, in the mean over layers."""
    heads, shapes = plan.geometry["kv_heads"], plan.stored_shapes()
    stored = sum(heads // merge * width for layer in shapes for merge, width in layer)
    return stored / (2 * heads * plan.geometry["head_dim"] * len(shapes))


def _frontier_row(composer: Composer, plan: Plan, candidate: Candidate, row: dict) -> dict:
    """What a result says of one plan."""
    return {
        "rank": rank_share(plan),
        "bits": candidate.bits,
        "tokens": candidate.tokens,
        "axes": list(candidate.axes),
        "bytes_per_token": composer.held(plan) / composer.tokens,
        "kl": row["kl_decode"],
        "recall": row.get("exact_match"),
    }


def _best(rows: Sequence[dict]) -> dict:
    """The least KL among those that recall at least as much as the best choice on a single axis."""
    single = [row for row in rows if len(row["axes"]) == 1]
    needed = min(single, key=lambda row: row["kl"])["recall"] if single else None
    enough = [row for row in rows if needed is None or (row["recall"] or 0.0) >= needed]
    return min(enough, key=lambda row: row["kl"])
