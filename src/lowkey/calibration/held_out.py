"""A model before and after it is trained, judged by one objective on text that it is not trained on."""

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

JUDGING_WINDOWS, JUDGING_LENGTH = 8, 512  # at most


@dataclass(frozen=True)
class HeldOut:
    """rows (n, t): the first windows of the embedded evaluation text."""

    rows: Tensor

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, length: int) -> HeldOut:
        ids = text.encode(tokenizer, text.embedded_text("evaluation"), model)
        return cls(
            text.windows(ids, tokenizer, min(length, JUDGING_LENGTH), "evaluation text", least=1)[
                :JUDGING_WINDOWS
            ]
        )

    @torch.no_grad()
    def loss(self, model: PreTrainedModel, plan: Plan | None = None) -> float:
        """Next-token cross-entropy (nats per token) through a cache of the plan, its exact tokens included,
        or of the full cache.
        """
        rows = self.rows.to(device_of(model)).unsqueeze(1)
        caches = (cache_from(model, Origin(weakref.ref(model), plan)) for _ in rows)
        found = [
            next_token_loss(model(ids, past_key_values=c, use_cache=True).logits, ids)
            for ids, c in zip(rows, caches, strict=True)
        ]
        return float(torch.stack(found).double().mean())
