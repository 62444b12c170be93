"""One loss for a model before and after it is trained, on text that it is not trained on."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.cache.cache import Origin, cache_from
from lowkey.core import text
from lowkey.core.types import device_of
from lowkey.plan.plan import Plan
from lowkey.probes.model_probe import next_token_loss

JUDGING_WINDOWS, JUDGING_LENGTH = 8, 512  # windows, and tokens of a window, at most


@dataclass(frozen=True)
class HeldOut:
    """The first windows of the embedded evaluation text.

    Args:
        rows: token ids (n, t).
    """

    rows: Tensor

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, length: int) -> HeldOut:
        """Tokenise the text and cut windows of at most `length` tokens."""
        ids = text.encode(tokenizer, text.embedded_text("evaluation"), model)
        windows = text.windows(ids, tokenizer, min(length, JUDGING_LENGTH), "evaluation text", least=1)
        return cls(windows[:JUDGING_WINDOWS])

    @torch.no_grad()
    def loss(self, model: PreTrainedModel, plan: Plan | None = None) -> float:
        """Return the next-token cross-entropy in nats per token.

        Args:
            model: an attached model.
            plan: compresses the cache; its exact tokens stay exact. None: the full cache.
        """
        rows = self.rows.to(device_of(model)).unsqueeze(1)
        caches = (cache_from(model, Origin(weakref.ref(model), plan)) for _ in rows)
        losses = [
            next_token_loss(model(ids, past_key_values=cache, use_cache=True).logits, ids)
            for ids, cache in zip(rows, caches, strict=True)
        ]
        return float(torch.stack(losses).double().mean())
