"""Perplexity, KL to the full model, top-1 agreement: with compression everywhere; and perplexity of decoding
alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.cache.cache import LowkeyCache
from lowkey.cache.prefill import prefill
from lowkey.core.files.measured import Measured
from lowkey.core.progress import Progress
from lowkey.core.types import device_of
from lowkey.evaluate import footprint
from lowkey.evaluate.intervals import half_width
from lowkey.evaluate.settings import Setting

TOKENS_PER_PIECE = 32  # tokens that a setting which evicts reads at a time
LOGITS_AT_ONCE = (
    8  # tokens whose distributions are compared at a time: what they take stays near the processor
)


@torch.no_grad()
def measure_likelihood(
    model: PreTrainedModel,
    settings: Sequence[Setting],
    rows: Tensor,
    progress: Progress,
    measured: Measured | None = None,
) -> dict[str, dict]:
    """Token perplexity, kl and top1_agreement of every setting over windows (n, t) of ids, by the setting's
    name.

    The first setting is the reference, whose logits are formed once per window for all others: kl is
    KL(reference || setting) in nats per token. A setting that evicts reads a window in pieces of TOKENS_PER_PIECE tokens
    and evicts after each; one that must repeat its context first is left out: `measure_decode` scores it.
    Every (window, setting) is one forward pass and one measurement of `measured`, and the first window's
    cache tells the bytes of settings that evict nothing.
    """
    measured, scored = measured or Measured(), [s for s in settings if not s.needs_second_pass]
    todo = [(w, s) for w in range(len(rows)) for s in scored if _name(w, s) not in measured]
    reference: tuple[int, Reference] | None = None
    for w, setting in progress(todo, lambda unit: f"perplexity, {unit[1].name}"):
        ids = rows[w : w + 1].to(device_of(model))
        if reference is None or reference[0] != w:
            reference = None  # two are not held at once
            reference = w, Reference(_logits(model, settings[0], ids, measured))
        measured.once(
            _name(w, setting), partial(_scored, model, setting, settings[0], reference[1], ids, measured)
        )
    return {s.name: row([measured[_name(w, s)] for w in range(len(rows))]) for s in scored}


def _scored(
    model: PreTrainedModel, setting: Setting, first: Setting, of: Reference, ids: Tensor, measured: Measured
) -> dict:
    """One window under one setting; the full cache, which is the first, is scored from its own logits."""
    return (
        of.own(ids[0, 1:])
        if setting is first
        else of.score(_logits(model, setting, ids, measured), ids[0, 1:])
    )


def _name(window: int, setting: Setting) -> str:
    return f"perplexity {window} {setting.name}"


def _logits(model: PreTrainedModel, setting: Setting, ids: Tensor, measured: Measured) -> Tensor:
    """(t - 1, V): of every token but the last, which has no successor."""
    cache = setting.make()
    pieces = ids.split(TOKENS_PER_PIECE, dim=1) if setting.evicts else [ids]
    logits = [model(piece, past_key_values=cache).logits[0] for piece in pieces]
    if not setting.evicts:
        footprint.note(setting, cache, measured)
    return (logits[0] if len(logits) == 1 else torch.cat(logits))[:-1]


class Reference:
    """What all settings are compared with in one window: logits (t - 1, V) in the model's dtype."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        parts = [
            (x.logsumexp(-1), x.argmax(-1)) for x in (part.float() for part in logits.split(LOGITS_AT_ONCE))
        ]
        self.total, self.top = (torch.cat(each) for each in zip(*parts, strict=True))

    def own(self, targets: Tensor) -> dict:
        """As `score`, of the reference itself."""
        nll = self.total.double() - self.logits.gather(1, targets.unsqueeze(1))[:, 0].double()
        return {"nll": float(nll.sum()), "kl": 0.0, "agree": len(targets), "tokens": len(targets)}

    def score(self, logits: Tensor, targets: Tensor) -> dict:
        """Sums over the window's tokens in fp64. KL = E[r - q] + log sum exp q - log sum exp r under the
        reference r.
        """
        nll, kl, agree = [], [], 0
        for r, q, target, total, top in zip(
            *(x.split(LOGITS_AT_ONCE) for x in (self.logits, logits, targets, self.total, self.top)),
            strict=True,
        ):
            r, q = r.float(), q.float()
            mine = q.logsumexp(-1)
            nll.append((mine - q.gather(1, target.unsqueeze(1))[:, 0]).double().sum())
            agree += int((q.argmax(-1) == top).sum())
            kl.append(((r - total.unsqueeze(1)).exp_().mul_(r - q).sum(-1) + mine - total).double().sum())
        return {"nll": float(sum(nll)), "kl": float(sum(kl)), "agree": agree, "tokens": len(targets)}


@dataclass(frozen=True)
class _Sums:
    """Of every window."""

    nll: list[float]
    kl: list[float]
    agree: list[int]
    tokens: list[int]


def row(windows: Sequence[dict]) -> dict:
    """What a row of the result says, given each window's sums; perplexity_95 and kl_95 are half of the 95 %
    intervals over windows, as long as there are at least three."""
    sums = _Sums(**{name: [_number(w[name]) for w in windows] for name in ("nll", "kl", "agree", "tokens")})  # type: ignore[arg-type]
    tokens = sum(sums.tokens)
    perplexity = _exp(sum(sums.nll) / tokens)
    spread, kl_95 = (
        half_width([x / n for x, n in zip(each, sums.tokens, strict=True)]) for each in (sums.nll, sums.kl)
    )
    return {
        "perplexity": perplexity,
        "perplexity_95": None if spread is None else perplexity * spread,  # to first order
        "kl": sum(sums.kl) / tokens,
        "kl_95": kl_95,
        "top1_agreement": sum(sums.agree) / tokens,
        "per_window": vars(sums),
    }


def _number(x: float | None) -> float:
    """Measurements hold None in the place of what is not finite."""
    return math.nan if x is None else x


# -- decoding alone


@torch.no_grad()
def measure_decode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Sequence[Setting],
    rows: Tensor,
    progress: Progress,
    measured: Measured | None = None,
) -> dict[str, dict]:
    """perplexity_decode of every setting over windows (n, t) of ids: the second half of each is scored, after
    the first half was read exactly and then stored compressed, so that every later token sees compressed
    predecessors only."""
    measured = measured or Measured()
    todo = [(w, s) for w in range(len(rows)) for s in settings if f"decode {w} {s.name}" not in measured]
    for w, setting in progress(todo, lambda unit: f"decode, {unit[1].name}"):
        ids = rows[w : w + 1].to(device_of(model))
        measured.once(f"decode {w} {setting.name}", lambda: _decode(model, tokenizer, setting.make(), ids))  # noqa: B023
    found = {s.name: [_number(measured[f"decode {w} {s.name}"]) for w in range(len(rows))] for s in settings}
    tokens = len(rows) * (rows.shape[1] - rows.shape[1] // 2 - 1)
    return {name: {"perplexity_decode": _exp(sum(nll) / tokens)} for name, nll in found.items()}


def _decode(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cache: LowkeyCache, ids: Tensor
) -> float:
    """The sum of the negative log-likelihoods of the second half, but for its first token."""
    half = ids.shape[1] // 2
    cache.exact_prefill(True)
    prefill(model, tokenizer, cache, ids[:, :half])
    cache.exact_prefill(False)
    cache.freeze()  # a policy has chosen; the second half is decoding
    logits, targets = model(ids[:, half:], past_key_values=cache).logits[0, :-1], ids[0, half + 1 :]
    parts = zip(logits.split(LOGITS_AT_ONCE), targets.split(LOGITS_AT_ONCE), strict=True)
    return float(
        sum(
            torch.nn.functional.cross_entropy(x.float(), y, reduction="none").double().sum() for x, y in parts
        )
    )


def _exp(x: float) -> float:
    """Infinite where math.exp would raise."""
    return math.exp(x) if not x > 700 else math.inf
