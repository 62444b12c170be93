"""Perplexity, KL to the full model, top-1 agreement: with compression everywhere, and decode-only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.cache import LowkeyCache
from lowkey.evaluate.settings import Setting
from lowkey.prefill import prefill
from lowkey.progress import Progress
from lowkey.types import device_of

CHUNK = 32


@dataclass
class Tally:
    """Sums over scored tokens."""

    nll: float = 0.0
    nll_decode: float = 0.0
    kl: float = 0.0
    agree: int = 0
    tokens: int = 0
    tokens_decode: int = 0

    def row(self) -> dict:
        late = {"perplexity_decode": _exp(self.nll_decode / self.tokens_decode)}
        if not self.tokens:
            return late
        return late | {
            "perplexity": _exp(self.nll / self.tokens),
            "kl": self.kl / self.tokens,
            "top1_agreement": self.agree / self.tokens,
        }


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Sequence[Setting],
    rows: Tensor,
    batch: int,
    progress: Progress,
) -> dict[str, dict]:
    """Token perplexity etc. of every setting over windows (n, t) of ids, by the setting's name.

    The full model's logits are formed once per batch. kl is KL(full || setting) in nats per token. perplexity_decode
    scores the second half of each window: the first half is read exactly, then stored compressed, and every later token
    sees compressed predecessors only. A setting that evicts reads a window in pieces of CHUNK tokens and evicts after each; one that
    must repeat its context first has perplexity_decode alone.
    """
    tallies = {s.name: Tally() for s in settings}
    for ids in progress(rows.to(device_of(model)).split(batch), "perplexity"):
        reference = model(ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        for setting in settings:
            _score(tallies[setting.name], model, tokenizer, setting, ids, reference)
    return {name: tally.row() for name, tally in tallies.items()}


def _score(
    tally: Tally, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, setting: Setting, ids: Tensor, reference: Tensor
) -> None:
    if not setting.repeats:
        logits = _logits(model, setting, ids)[:, :-1].float().log_softmax(-1)
        tally.nll += _nll(logits, ids[:, 1:])
        tally.kl += float((reference.exp() * (reference - logits)).sum())
        tally.agree += int((logits.argmax(-1) == reference.argmax(-1)).sum())
        tally.tokens += ids[:, 1:].numel()
    late = _decode_logits(model, tokenizer, setting.make(), ids)
    targets = ids[:, ids.shape[1] // 2 + 1 :]
    tally.nll_decode += _nll(late, targets)
    tally.tokens_decode += targets.numel()


def _logits(model: PreTrainedModel, setting: Setting, ids: Tensor) -> Tensor:
    cache = setting.make()
    pieces = ids.split(CHUNK, dim=1) if setting.evicts else [ids]
    return torch.cat([model(piece, past_key_values=cache).logits for piece in pieces], dim=1)


def _decode_logits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cache: LowkeyCache, ids: Tensor) -> Tensor:
    """Log-probabilities (b, t/2 - 1, V) of the second half over a cache whose first half was read exactly."""
    half = ids.shape[1] // 2
    cache.exact_prefill(True)
    prefill(model, tokenizer, cache, ids[:, :half])
    cache.exact_prefill(False)
    cache.freeze()  # a policy has chosen; the second half is decoding
    return model(ids[:, half:], past_key_values=cache).logits[:, :-1].float().log_softmax(-1)


def _exp(x: float) -> float:
    """Infinite where math.exp would raise."""
    return math.exp(x) if not x > 700 else math.inf


def _nll(log_probabilities: Tensor, targets: Tensor) -> float:
    return -float(log_probabilities.gather(-1, targets.unsqueeze(-1)).double().sum())
