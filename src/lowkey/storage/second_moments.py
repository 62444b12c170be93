"""Calibration's eye: a cache layer that stores nothing but second moments of what passes."""

from __future__ import annotations

import torch
from torch import Tensor

from lowkey.backends import grouped, stock
from lowkey.backends.segment import Segment
from lowkey.models.attention_interface import Call
from lowkey.models.families import Rope
from lowkey.ops.rope import unrotate
from lowkey.storage.base import StoringLayer, batch_positions


class SecondMomentLayer(StoringLayer):
    """Sums outer products over tokens but the first `sinks`, in fp64 on the CPU; attends to what the call
    brings and forgets it.

    Sinks are kept as they are, so that no map need serve them, and they are unlike all other tokens.

    sums: keys_pre, keys_post, values (h d, h d); queries_pre, queries_post (h, d, d); keys_pre_mean,
    keys_post_mean, values_mean (h d).
    """

    def __init__(self, rope: Rope, sinks: int = 0) -> None:
        super().__init__()
        self.rope, self.sinks = rope, sinks
        self.sums: dict[str, Tensor] = {}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def predicted_nbytes(self) -> int:
        return 0

    def attend(self, keys: Tensor, values: Tensor, call: Call) -> Tensor:
        positions = batch_positions(self.seen - keys.shape[2], call, keys.shape[0])
        cos, sin = self.rope(positions, keys)
        queries = call.query.float()
        plain_k, plain_q = (
            unrotate(keys.float(), cos, sin),
            unrotate(queries, cos.unsqueeze(1), sin.unsqueeze(1)),
        )
        for name, x in (("keys_pre", plain_k), ("keys_post", keys.float()), ("values", values.float())):
            kept = x[:, :, self.sinks :]
            self._add(name, joint_moment(kept))
            self._add(f"{name}_mean", kept.sum((0, 2)).flatten())
        for name, x in (("queries_pre", plain_q), ("queries_post", queries)):
            self._add(name, query_moment(x[:, :, :, self.sinks :]))
        if call.softcap is None:
            return stock.attend(call.query, keys, values, call.mask, call.scaling)
        return grouped.attend(
            [Segment(call.query, keys, values, call.full_mask(keys.shape[2]))], call.scaling, call.softcap
        )

    def _add(self, name: str, moment: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0) + moment.double().cpu()


def joint_moment(x: Tensor) -> Tensor:
    """(b, h, t, d) -> (h d, h d), heads side by side."""
    rows = x.transpose(1, 2).flatten(0, 1).flatten(1)
    return rows.mT @ rows


def query_moment(x: Tensor) -> Tensor:
    """(b, h, g, t, d) -> (h, d, d), the g query heads of a KV head stacked as rows."""
    return torch.einsum("bhgtd,bhgte->hde", x, x)
