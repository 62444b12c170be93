"""Attention of decode steps over pages on a CPU, compiled by numba; see `numba_cpu` for what is shared.

An engine that serves many users keeps the tokens of each in pages of as many tokens, and says for each user
in which blocks of memory these lie. A step reads them there, whatever packing holds them: one call for all
users of a layer. What does not change from step to step is prepared once: addresses, functions, and the maps
that rebuild keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from lowkey.backends import numba_cpu
from lowkey.backends.numba_cpu import GROUPS, KERNEL_KINDS
from lowkey.backends.stored import StoredRows

READING = 2  # reading a token takes as long as so many of its products with queries
_PLAIN = "float32"
POSITIONS_BEHIND = 32  # of a rotation, behind the longest sequence: keys are rebuilt several at a time


@dataclass(frozen=True)
class PagedSide:
    """Keys or values in pages.

    Args:
        stored: the numbers, as lanes; which of them are read, pages say.
        of_a_page: lanes from block to block.
        of_a_head: lanes from stored head to stored head.
        heads: stored heads.
    """

    stored: StoredRows
    of_a_page: int
    of_a_head: int
    heads: int


class Turns:
    """A rotary embedding at positions in order, as vectors of keys take it. Layers share it.

    Attributes:
        columns: first columns and counts of the vectors of a key; see `numba_cpu.key_vectors`.
        slots: the column of each number of a packed query, -1 for none.
        table: (n, pairs of vectors, 2, LANES), cosines and sines.
    """

    def __init__(self, rotation: np.ndarray, d: int) -> None:
        """Bring it into this form.

        Args:
            rotation: (n, 2, p / 2), cosines and sines in fp32.
            d: channels of a key.
        """
        lanes, half = numba_cpu.kernel_module().LANES, rotation.shape[2]
        self.columns, self.slots = numba_cpu.key_vectors(half, d, lanes)
        wide = numba_cpu.turns_of_vectors(rotation, len(self.slots) // 2)
        self.table = np.ascontiguousarray(wide.reshape(len(wide), 2, -1, lanes).swapaxes(1, 2))


@dataclass(frozen=True)
class PagedRebuilding:
    """How keys are rebuilt from latents: by a linear map, a mean, and a rotation at each token's position.

    Args:
        maps: (h, r, d), for each KV head.
        mean: (h, d), added before the rotation; None for none.
        turns: the rotation of all positions up to the end of a page.
    """

    maps: Tensor
    mean: Tensor | None
    turns: Turns


def available() -> bool:
    """Whether numba is installed."""
    return numba_cpu.available()


def reads(keys: PagedSide, values: PagedSide) -> bool:
    """Whether keys and values can be read where they lie. Values must be packed one token at a time."""
    return values.stored.unit == 1 and all(numba_cpu.reads(x.stored) for x in (keys, values))


class Pages:
    """The pages of a layer, whose tokens the queries of decode steps attend to.

    Attributes:
        width: channels of outputs, those of stored values.
    """

    def __init__(
        self,
        queries: int,
        keys: PagedSide,
        values: PagedSide,
        block: int,
        rebuilding: PagedRebuilding | None = None,
    ) -> None:
        """Prepare.

        Args:
            queries: of each row. A page has as many rows as there are groups of heads that share no stored
                head with others.
            keys: of the layer.
            values: of the layer.
            block: tokens of a page.
            rebuilding: how keys are rebuilt, for which queries are in the model's basis; None if queries meet
                them as they are.
        """
        kernel, shared = _kernel(), numba_cpu.kernel_module()
        self.rows = int(np.lcm(keys.heads, values.heads))
        self.heads = 1 if rebuilding is None else len(rebuilding.maps) // self.rows
        self.group = g = _group(queries // self.heads)
        self.block, self.width = block, values.stored.width
        self.sides = _side(keys), _side(values)
        self.functions, self.described = (
            np.zeros(n, np.int64) for n in (kernel.FUNCTION_COUNT, kernel.NUMBERS_OF_KEYS)
        )
        passes = -(-queries // self.heads // g) * self.heads
        groups, value_kind = values.stored.groups, numba_cpu.kind_read(values.stored)
        # the addresses above point into these
        self.held: list[object] = [keys.stored, values.stored]
        with numba_cpu.LOCK:
            if values.stored.bits and passes > 1:  # decoded once for all passes
                decoder = numba_cpu.rebuilding_module().decoder(numba_cpu.kind_stored(values.stored), 0)
                self.functions[kernel.DECODES_VALUES] = decoder.address
                groups = 1, groups[0] * groups[1]
                value_kind = _PLAIN if groups[1] >= shared.LANES else f"narrow {_PLAIN}"
            self.functions[kernel.SOFTENS] = shared.softener(g).address
            self.functions[kernel.MIXES] = shared.mixer(g, value_kind).address
            if rebuilding is None:
                self.functions[kernel.SCORES_KEYS] = shared.scorer(
                    g, numba_cpu.kind_read(keys.stored)
                ).address
                self.key_slots = numba_cpu.query_slots(keys.stored, shared.LANES)
            else:
                self._prepare_rebuilding(keys.stored, rebuilding)
        self.value_slots = numba_cpu.number_slots(*groups, self.width, shared.LANES, True)

    def _prepare_rebuilding(self, keys: StoredRows, how: PagedRebuilding) -> None:
        """Pack the maps of keys that are rebuilt, and describe them."""
        kernel, lanes, rebuilding = _kernel(), numba_cpu.kernel_module().LANES, numba_cpu.rebuilding_module()
        by_pairs = int(rebuilding.MULTIPLIES_PAIRS and how.maps.dtype == torch.bfloat16)
        h = len(how.maps)
        columns, self.key_slots = how.turns.columns, how.turns.slots
        vectors, numbers = columns.shape[1], keys.groups[0] * keys.groups[1]
        words = -(-numbers // 2) if by_pairs else numbers
        maps = np.zeros((h, vectors // 2, words, 2, lanes), np.float32)
        means = np.zeros((h, vectors // 2, 2, lanes), np.float32)
        for x, out, as_pairs, count in ((how.maps, maps, by_pairs, words), (how.mean, means, 0, 1)):
            if x is None:
                continue
            x = x.unsqueeze(1) if x.ndim == 2 else x
            strides = (x.element_size() * n for n in x.stride())
            pack = rebuilding.packer(KERNEL_KINDS[x.dtype], as_pairs).ctypes
            at = columns.ctypes.data, columns.ctypes.data + columns.strides[0]
            pack(x.data_ptr(), *strides, *x.shape[:2], vectors, *at, count, out.ctypes.data)
        tables = maps, means, how.turns.table
        self.held += tables
        self.described[:] = *(x.ctypes.data for x in tables), vectors // 2, words
        self.functions[kernel.SCORES_KEYS] = kernel.page_rebuilder(self.group, by_pairs).address
        # words of plain numbers are read where they lie
        in_place = not keys.bits and (keys.width % 2 == 0 if by_pairs else keys.dtype == torch.float32)
        if not in_place or self.block % rebuilding.TILE:
            decoder = rebuilding.decoder(numba_cpu.kind_stored(keys), by_pairs)
            self.functions[kernel.DECODES_KEYS] = decoder.address

    def attend(
        self,
        query: Tensor,
        table: Tensor,
        lengths: np.ndarray,
        scaling: float,
        softcap: float | None = None,
        hidden: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Attention of one token of each of some sequences over the sequence's pages.

        Args:
            query: (b rows, m, r), rows of a sequence side by side, and the queries of each KV head.
            table: (b, n), int32, the blocks of each sequence.
            lengths: (b), int64, tokens of each.
            scaling: what scores are multiplied with.
            softcap: the soft cap of scaled scores, or None.
            hidden: first tokens of each sequence that are not seen.

        Returns:
            (sums of stored values (b rows, m, width), the log-sum-exp of scores (b rows, m)), in fp32; 0 and
            -inf for a sequence of which nothing is seen.
        """
        attend = _kernel().attend_pages
        out, lse = (np.empty((*query.shape[:2], *rest), np.float32) for rest in ((self.width,), ()))
        with numba_cpu.LOCK, numba_cpu.compiling(attend):
            attend(
                self.functions,
                self.group,
                self.heads,
                *numba_cpu.score_scales(scaling, softcap),
                numba_cpu.as_numbers(query, 2),
                self.key_slots,
                self.value_slots,
                *self.sides,
                self.described,
                np.ascontiguousarray(table.numpy()),
                lengths,
                self.block,
                hidden,
                out,
                lse,
                numba_cpu.usable_threads(),
            )
        return torch.from_numpy(out), torch.from_numpy(lse)


def _group(queries: int) -> int:
    """How many queries share one reading of the keys, if there are so many."""
    return min(GROUPS, key=lambda g: -(-queries // g) * (g + READING))


def _side(x: PagedSide) -> np.ndarray:
    """Keys or values as the kernel takes them."""
    numbers, *scales, stride, scale_stride, channel, scale_channel, groups, size, unit = (
        numba_cpu.place_of(x.stored)[i] for i in (0, 1, 2, 5, 6, 7, 8, 9, 10, 11)
    )
    lane = x.stored.numbers.stride(0) * x.stored.numbers.element_size()
    where = x.of_a_page * lane, x.of_a_head * lane, x.heads
    strides = stride, scale_stride, channel, scale_channel
    return np.array([numbers, *scales, *where, *strides, groups, size, unit], np.int64)


@cache
def _kernel() -> ModuleType:
    """The compiled module, loaded on first use."""
    numba_cpu.kernel_module()
    from lowkey.backends import numba_pages_kernel

    return numba_pages_kernel
