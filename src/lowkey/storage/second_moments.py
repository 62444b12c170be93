"""Collects second moments of keys, values and queries while the model reads a text, for calibration."""

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
    """A cache layer that stores no tokens, but sums outer products over them in fp64 on the CPU.

    Queries see the tokens of their own call only. The first `sinks` tokens are left out of the sums: caches
    keep them exactly, so no map has to serve them, and their keys and values are unlike all others.

    Args:
        rope: the model's rotary embedding, to undo the rotation of keys and queries.
        sinks: number of first tokens to leave out.

    Attributes:
        sums: by name. `keys_pre`, `keys_post`, `values` (h d, h d): joint second moments over all heads, of
            keys before and after rotation and of values. `queries_pre`, `queries_post` (h, d, d): of the g
            query heads of each KV head together. `keys_pre_mean`, `keys_post_mean`, `values_mean` (h d):
            sums, from which means are formed.
    """

    def __init__(self, rope: Rope, sinks: int = 0) -> None:
        super().__init__()
        self.rope, self.sinks = rope, sinks
        self.sums: dict[str, Tensor] = {}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare."""
        self.is_initialized = True

    def tensors(self) -> dict[str, Tensor]:
        """None: no tokens are held."""
        return {}

    def predicted_nbytes(self) -> int:
        """0: no tokens are held."""
        return 0

    def attend(self, keys: Tensor, values: Tensor, call: Call) -> Tensor:
        """Add the new tokens to the sums and answer the call; see `StoringLayer.attend`."""
        positions = batch_positions(self.seen - keys.shape[2], call, keys.shape[0])
        cos, sin = self.rope(positions, keys)
        queries = call.query.float()
        keys_pre = unrotate(keys.float(), cos, sin)
        queries_pre = unrotate(queries, cos.unsqueeze(1), sin.unsqueeze(1))
        for name, x in (("keys_pre", keys_pre), ("keys_post", keys.float()), ("values", values.float())):
            kept = x[:, :, self.sinks :]
            self._add(name, joint_moment(kept))
            self._add(f"{name}_mean", kept.sum((0, 2)).flatten())
        for name, x in (("queries_pre", queries_pre), ("queries_post", queries)):
            self._add(name, query_moment(x[:, :, :, self.sinks :]))
        return self.answer(keys, values, call)

    def answer(self, keys: Tensor, values: Tensor, call: Call) -> Tensor:
        """Attention over the tokens of the call alone; see `StoringLayer.attend`."""
        if call.softcap is None:
            return stock.attend(call.query, keys, values, call.mask, call.scaling)
        segment = Segment(call.query, keys, values, call.full_mask(keys.shape[2]))
        return grouped.attend([segment], call.scaling, call.softcap)

    def _add(self, name: str, moment: Tensor) -> None:
        # fp64 on the CPU: sums over millions of tokens, also where the accelerator has no fp64
        self.sums[name] = self.sums.get(name, 0) + moment.double().cpu()


def joint_moment(x: Tensor) -> Tensor:
    """The second moment (h d, h d) of keys or values (b, h, t, d), summed over tokens, heads side by side."""
    rows = x.transpose(1, 2).flatten(0, 1).flatten(1)
    return rows.mT @ rows


def query_moment(x: Tensor) -> Tensor:
    """The second moment (h, d, d) of queries (b, h, g, t, d), summed over tokens and grouped heads."""
    return torch.einsum("bhgtd,bhgte->hde", x, x)
