"""Chunks of prompts over pages of latents, by the engine's own kernel for CPUs.

Stored tokens are rebuilt, a few thousand at a time, into pages of keys and values as the model makes them.
There the engine's kernel attends, causally and to every sequence's own tokens, as it does without a plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from lowkey.serving.routes import CPU_HEAD_SIZES
from lowkey.storage.codec import Codec, Plain
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from .pages import SidePages

TOKENS_AT_ONCE = 4096  # that are rebuilt together; more do not fit into caches of a CPU


@dataclass
class Reading:
    """Sequences side by side in a batch that are read together.

    Args:
        new: where their new tokens are in the batch.
        blocks: (1, pages of latents), of all of them.
        positions: (1, tokens), of what these hold.
        pages: with keys and values as the model makes them.
        size: tokens of such a page.
        table: (b, most pages), int32, which of them are of each sequence.
        starts: (b + 1), int32, where the new tokens of each begin.
        lengths: (b), int32, tokens of each.
        made: what all layers have in common.
    """

    new: slice
    blocks: Tensor
    positions: Tensor
    pages: int
    size: int
    table: Tensor
    starts: Tensor
    lengths: Tensor
    made: tuple[Tensor, Tensor, str] | None = field(default=None, kw_only=True)

    def prepared(self, query: Tensor, heads: int) -> tuple[Tensor, Tensor, str]:
        """(room for pages of keys and values, the kernel's schedule, its instructions), made once.

        Args:
            query: (n, H, d), of the batch.
            heads: KV heads.
        """
        if self.made is None:
            width = query.shape[2]
            isa = _get_attn_isa(query.dtype, self.size, width, "auto")
            schedule = ops.cpu_attn_get_scheduler_metadata(
                num_reqs=len(self.lengths),
                num_heads=query.shape[1],
                num_kv_heads=heads,
                head_dim=width,
                seq_lens=self.lengths,
                dtype=query.dtype,
                query_start_loc=self.starts,
                causal=True,
                sliding_window_size=-1,
                isa=isa,
                enable_kv_split=True,
            )
            room = query.new_empty(self.pages, heads, 2 * self.size, width)
            self.made = room, schedule, isa
        return self.made


def readings(starts: Sequence[int], lengths: Sequence[int], table: Tensor, size: int) -> list[Reading]:
    """Group the sequences of a batch that have more than one new token.

    Args:
        starts: (b + 1), where the new tokens of each sequence begin.
        lengths: (b), tokens of each.
        table: (b, n), the blocks of each.
        size: tokens of a page.
    """
    return [_reading(rows, starts, lengths, table, size) for rows in groups(starts, lengths)]


def groups(starts: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """The sequences that are read together; their new tokens lie side by side in the batch."""
    found: list[list[int]] = []
    held = 0
    for i, length in enumerate(lengths):
        if starts[i + 1] - starts[i] == 1:
            continue
        if not found or found[-1][-1] != i - 1 or held + length > TOKENS_AT_ONCE:
            found.append([])
            held = 0
        found[-1].append(i)
        held += length
    return found


def _reading(
    rows: Sequence[int], starts: Sequence[int], lengths: Sequence[int], table: Tensor, size: int
) -> Reading:
    """The sequences `rows` of a batch; see `readings`."""
    pages = [-(-lengths[i] // size) for i in rows]
    blocks = torch.cat([table[i, :n] for i, n in zip(rows, pages, strict=True)]).long()
    own = torch.zeros(len(rows), max(pages), dtype=torch.int32)
    at = 0
    for row, n in zip(own, pages, strict=True):
        row[:n] = torch.arange(at, at + n)
        at += n
    begin = starts[rows[0]]
    return Reading(
        slice(begin, starts[rows[-1] + 1]),
        blocks.unsqueeze(0),
        torch.cat([torch.arange(n * size) for n in pages]).unsqueeze(0),
        at,
        size,
        own,
        torch.tensor([starts[i] - begin for i in (*rows, rows[-1] + 1)], dtype=torch.int32),
        torch.tensor([lengths[i] for i in rows], dtype=torch.int32),
    )


def reads(codec: Codec, like: Tensor, head_size: int) -> bool:
    """Whether the engine's kernel can read what this codec stores, once it is rebuilt.

    Args:
        codec: of the layer.
        like: on the device of the model.
        head_size: of the model.
    """
    rebuilds = isinstance(codec, Plain) or codec.factors.frequencies is None
    return like.device.type == "cpu" and head_size in CPU_HEAD_SIZES and rebuilds


def attend(
    how: Reading,
    codec: Codec,
    sides: tuple[SidePages, SidePages],
    query: Tensor,
    output: Tensor,
    scale: float,
    softcap: float | None,
) -> None:
    """Attend with new tokens that are stored already.

    Args:
        how: whose.
        codec: of the layer.
        sides: its stored keys and values.
        query: (n, H, d), of the batch.
        output: (n, H, d), the results.
        scale: what scores are multiplied with.
        softcap: the soft cap of scaled scores, or None.
    """
    k, v = rebuilt(how, codec, sides, query.dtype)
    attend_to(how, codec, (k, v), query, output, scale, softcap)


def rebuilt(
    how: Reading, codec: Codec, sides: tuple[SidePages, SidePages], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The keys and values (1, h, tokens, d) that are stored as latents."""
    k, v = (side.read(how.blocks).to(dtype) for side in sides)
    return codec.rebuilt_keys(k, how.positions), codec.expand_values(v)


def attend_to(
    how: Reading,
    codec: Codec,
    tokens: tuple[Tensor, Tensor],
    query: Tensor,
    output: Tensor,
    scale: float,
    softcap: float | None,
) -> None:
    """As `attend`, to keys and values (1, h, tokens, d) of all pages."""
    k, v = tokens
    if (back := codec.inverse_order) is not None:
        k, v = k[:, back], v[:, back]
    room, schedule, isa = how.prepared(query, k.shape[1])
    keys, values = room.chunk(2, dim=2)
    slots = torch.arange(k.shape[2])
    ops.cpu_attn_reshape_and_cache(*(x[0].transpose(0, 1) for x in (k, v)), keys, values, slots, isa)
    ops.cpu_attention_with_kv_cache(
        query=query[how.new],
        key_cache=keys,
        value_cache=values,
        output=output[how.new],
        query_start_loc=how.starts,
        seq_lens=how.lengths,
        scale=scale,
        causal=True,
        alibi_slopes=None,
        sliding_window=-1,
        block_table=how.table,
        softcap=softcap or 0,
        scheduler_metadata=schedule,
        s_aux=None,
    )
