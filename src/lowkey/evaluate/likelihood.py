"""Perplexity, KL divergence from the full cache and agreement of the most likely token: with compression in
effect everywhere, and in decoding alone.
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
from lowkey.core.intervals import half_width
from lowkey.core.progress import Progress
from lowkey.core.types import device_of
from lowkey.evaluate import footprint
from lowkey.evaluate.settings import Setting

TOKENS_PER_PIECE = 32  # tokens that a setting which evicts reads at a time
# Tokens whose distributions are compared at a time: so few that their logits stay in the processor's cache.
LOGITS_AT_ONCE = 8


@torch.no_grad()
def measure_likelihood(
    model: PreTrainedModel,
    settings: Sequence[Setting],
    rows: Tensor,
    progress: Progress,
    measured: Measured | None = None,
) -> dict[str, dict]:
    """Perplexity, KL divergence and top-1 agreement.

    The first setting is the reference: its logits are computed once per window and compared with those of all
    others. A setting that evicts reads a window in pieces of `TOKENS_PER_PIECE` tokens and evicts after each.
    Each (window, setting) is one forward pass and one measurement; the first window's cache also gives the
    bytes of settings that evict nothing.

    Args:
        model: the model, attached.
        settings: what is compared. Those that need a second pass over their context are left out;
            `measure_decode` scores them.
        rows: windows of ids (n, t).
        progress: shows progress.
        measured: earlier measurements of the same job.

    Returns:
        By setting, what `row` gives. `kl` is KL(reference || setting) in nats per token.
    """
    measured, scored = measured or Measured(), [s for s in settings if not s.needs_second_pass]
    windows = [w for w in range(len(rows)) if any(_name(w, s) not in measured for s in scored)]
    todo = [(w, s) for w in measured.share(windows) for s in scored if _name(w, s) not in measured]
    reference: tuple[int, Reference] | None = None  # with the number of its window
    # Windows are the outer loop, so that only one window's logits are held.
    for w, setting in progress(todo, lambda unit: f"perplexity, {unit[1].name}"):
        ids = rows[w : w + 1].to(device_of(model))
        if reference is None or reference[0] != w:
            reference = None  # frees the logits of the window before
            reference = w, Reference(_logits(model, settings[0], ids, None if w else measured))
        score = partial(_scored, model, setting, settings[0], reference[1], ids, None if w else measured)
        measured.once(_name(w, setting), score)
    measured.gather()
    return {s.name: row([measured[_name(w, s)] for w in range(len(rows))]) for s in scored}


def _scored(
    model: PreTrainedModel,
    setting: Setting,
    first: Setting,
    reference: Reference,
    ids: Tensor,
    measured: Measured | None,
) -> dict:
    """Sums of one window under one setting. The first setting is scored by its own logits."""
    targets = ids[0, 1:]
    if setting is first:
        return reference.own(targets)
    return reference.score(_logits(model, setting, ids, measured), targets)


def _name(window: int, setting: Setting) -> str:
    """The name under which a window of a setting is saved."""
    return f"perplexity {window} {setting.name}"


def _logits(model: PreTrainedModel, setting: Setting, ids: Tensor, measured: Measured | None) -> Tensor:
    """Logits (t - 1, V) of every token but the last, which has no successor. `measured` takes the bytes."""
    cache = setting.make()
    pieces = ids.split(TOKENS_PER_PIECE, dim=1) if setting.evicts else [ids]
    logits = []
    for piece in pieces:
        with cache.reading(piece):
            logits.append(model(piece, past_key_values=cache).logits[0])
    if measured is not None and not setting.evicts:
        footprint.record_footprint(setting, cache, measured)
    return (logits[0] if len(logits) == 1 else torch.cat(logits))[:-1]


class Reference:
    """Logits of one window that all settings are compared with.

    Attributes:
        logits: (t - 1, V) in the model's dtype.
        total: log-sum-exp of each token's logits (t - 1), in fp32.
        top: most likely next token of each (t - 1).
    """

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        parts = [
            (x.logsumexp(-1), x.argmax(-1)) for x in (part.float() for part in logits.split(LOGITS_AT_ONCE))
        ]
        self.total, self.top = (torch.cat(each) for each in zip(*parts, strict=True))

    def own(self, targets: Tensor) -> dict:
        """What `score` gives for the reference itself.

        Args:
            targets: next tokens (t - 1).
        """
        nll = self.total.double() - self.logits.gather(1, targets.unsqueeze(1))[:, 0].double()
        return {"nll": float(nll.sum()), "kl": 0.0, "agree": len(targets), "tokens": len(targets)}

    def score(self, logits: Tensor, targets: Tensor) -> dict:
        """Compare logits with the reference.

        Args:
            logits: (t - 1, V).
            targets: next tokens (t - 1).

        Returns:
            Sums over the window in fp64: `nll`, `kl` and `agree` (tokens whose most likely successor is the
            reference's), and the number of `tokens`. With r and q the logits of the reference and of the
            setting, KL = E_r[r - q] + logsumexp(q) - logsumexp(r).
        """
        nll, kl, agree = [], [], 0
        for r, q, target, total, top in zip(
            *(x.split(LOGITS_AT_ONCE) for x in (self.logits, logits, targets, self.total, self.top)),
            strict=True,
        ):
            # fp32 for a few tokens at a time: a whole window of logits in fp32 would be twice the model's.
            r, q = r.float(), q.float()
            own_total = q.logsumexp(-1)
            nll.append((own_total - q.gather(1, target.unsqueeze(1))[:, 0]).double().sum())
            agree += int((q.argmax(-1) == top).sum())
            kl.append(
                ((r - total.unsqueeze(1)).exp_().mul_(r - q).sum(-1) + own_total - total).double().sum()
            )
        return {"nll": float(sum(nll)), "kl": float(sum(kl)), "agree": agree, "tokens": len(targets)}


@dataclass(frozen=True)
class _Sums:
    """Sums of all windows, one list per quantity."""

    nll: list[float]
    kl: list[float]
    agree: list[int]
    tokens: list[int]


def row(windows: Sequence[dict]) -> dict:
    """The fields of a row from the sums of its windows.

    Args:
        windows: what `Reference.score` gave for each window.

    Returns:
        Means per token; `perplexity_95` and `kl_95`, half of the 95 % intervals over windows, or None for
        fewer than three windows; and the sums per window.
    """
    nll, kl = ([_number(w[name]) for w in windows] for name in ("nll", "kl"))
    sums = _Sums(nll, kl, [w["agree"] for w in windows], [w["tokens"] for w in windows])
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
    """A measured number; what was not finite is saved as None."""
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
    """Perplexity and KL divergence of decoding alone.

    The first half of each window is read exactly and then stored compressed; the second half is scored, so
    that every scored token sees compressed predecessors only. A policy chooses once, behind the first half.

    Args:
        model: the model, attached.
        tokenizer: its tokenizer.
        settings: what is compared. The first is the reference of the divergence.
        rows: windows of ids (n, t).
        progress: shows progress.
        measured: earlier measurements of the same job.

    Returns:
        By setting, `perplexity_decode`; `kl_decode`, KL(reference || setting) in nats per token;
        `kl_decode_95`, half of its 95 % interval over windows, or None for fewer than three; and
        `per_window_decode`, sums over the scored tokens of each window.
    """
    measured = measured or Measured()
    names = {(w, s.name): f"decoding {w} {s.name}" for w in range(len(rows)) for s in settings}
    windows = [w for w in range(len(rows)) if any(names[w, s.name] not in measured for s in settings)]
    todo = [(w, s) for w in measured.share(windows) for s in settings if names[w, s.name] not in measured]
    reference: tuple[int, Reference] | None = None
    for w, setting in progress(todo, lambda unit: f"decode, {unit[1].name}"):
        ids = rows[w : w + 1].to(device_of(model))
        if reference is None or reference[0] != w:
            reference = None  # frees the logits of the window before
            reference = w, Reference(_decoded_logits(model, tokenizer, settings[0].make(), ids))
        score = partial(_decoded, model, tokenizer, setting, settings[0], reference[1], ids)
        measured.once(names[w, setting.name], score)
    measured.gather()
    found = {s.name: row([measured[names[w, s.name]] for w in range(len(rows))]) for s in settings}
    return {
        name: {
            "perplexity_decode": own["perplexity"],
            "kl_decode": own["kl"],
            "kl_decode_95": own["kl_95"],
            "per_window_decode": own["per_window"],
        }
        for name, own in found.items()
    }


def _decoded(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    setting: Setting,
    first: Setting,
    reference: Reference,
    ids: Tensor,
) -> dict:
    """Sums of the second half of one window under one setting."""
    targets = ids[0, ids.shape[1] // 2 + 1 :]
    if setting is first:
        return reference.own(targets)
    return reference.score(_decoded_logits(model, tokenizer, setting.make(), ids), targets)


def _decoded_logits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cache: LowkeyCache, ids: Tensor
) -> Tensor:
    """Logits (n, V) of the second half of a window (1, t), without those of its last token."""
    half = ids.shape[1] // 2
    cache.exact_prefill(True)
    prefill(model, tokenizer, cache, ids[:, :half])
    cache.exact_prefill(False)
    cache.freeze()  # a policy has chosen; the second half is decoding
    with cache.reading(ids[:, half:]):
        return model(ids[:, half:], past_key_values=cache).logits[0, :-1]


def _exp(x: float) -> float:
    """exp(x), infinite where math.exp would raise."""
    return math.exp(x) if not x > 700 else math.inf
