"""Count the tensor operations of a call, and how often Python reads the value of a tensor.

Small operations cost more time than what they compute: each takes microseconds of Python and of dispatch. A
read of a value makes Python wait until a GPU has computed it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# torch marks the operations whose outcome (`item`, `equal`) or output shape (`nonzero`, `masked_select`,
# `unique`) depends on values
READING_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
INDEXING, ASSIGNING = ("index",), ("index_put", "index_put_", "_index_put_impl_")
COPYING = ("_to_copy", "copy_")
TORCH_FILES = str(Path(torch.__file__).parent)


@dataclass
class OperationCount:
    """What was counted.

    Attributes:
        by_name: dispatched operations by name, like `aten.add.Tensor`. Views count, too.
        reads_by_place: reads of values, by what reads and the line of Python that asks for it.
    """

    by_name: Counter[str] = field(default_factory=Counter)
    reads_by_place: Counter[str] = field(default_factory=Counter)

    @property
    def operations(self) -> int:
        """The number of operations that were dispatched."""
        return self.by_name.total()

    @property
    def value_reads(self) -> int:
        """The number of times that a value was read, or that a GPU would have been waited for."""
        return self.reads_by_place.total()

    def record_read(self, name: str) -> None:
        """Count a read by the innermost line of Python that is not torch's."""
        frame = sys._getframe(1)
        while frame.f_back and frame.f_code.co_filename.startswith((TORCH_FILES, __file__)):
            frame = frame.f_back
        file = "/".join(Path(frame.f_code.co_filename).parts[-2:])
        self.reads_by_place[f"{name} at {file}:{frame.f_lineno}"] += 1


@contextmanager
def counted_operations() -> Iterator[OperationCount]:
    """Count the operations and reads of the block.

    Operations are those that torch dispatches after it has taken composite ones apart. What a compiled kernel
    of lowkey computes is no operation.

    A read is whatever needs a tensor's value in Python, or would wait for a GPU: `item`, `tolist`, `bool`,
    `int` and `float` of a tensor, a tensor as an index or a size, `equal`, `nonzero`, `masked_select`,
    boolean masks as indices, `unique`, `repeat_interleave` by a tensor without `output_size`, and copies
    between a GPU and the CPU that are not asynchronous. `numpy()` and `data_ptr()` of a tensor in CPU memory
    hand out its memory, and count nothing.
    """
    count = OperationCount()
    reader = _FunctionCounter(count)
    with reader, _DispatchCounter(count, reader):
        yield count


class _FunctionCounter(TorchFunctionMode):
    """Counts reads that torch does not dispatch. `inside`: whether such a read is under way."""

    def __init__(self, count: OperationCount) -> None:
        super().__init__()
        self.count, self.inside = count, False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not self._reads(func, args, kwargs or {}):
            return func(*args, **(kwargs or {}))
        self.count.record_read(func.__name__)
        self.inside = True  # on the way it may copy from a GPU, which is the same read
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.inside = False

    def _reads(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if func in (Tensor.tolist, Tensor.__repr__):
            return True
        # numbers of Python are copied to a GPU, or tensors are read to become numbers of a new one
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor):
            data = kwargs.get("data", args[-1] if args else None)
            if isinstance(data, Tensor):
                return False
            usual = args[0].device if func is Tensor.new_tensor else "cpu"
            on_cpu = torch.device(kwargs.get("device") or usual).type == "cpu"
            return not on_cpu or any(isinstance(x, Tensor) for x in tree_leaves(data))
        return False


class _DispatchCounter(TorchDispatchMode):
    """Counts what is dispatched, and the reads among it that are no part of one of `reader`."""

    def __init__(self, count: OperationCount, reader: _FunctionCounter) -> None:
        super().__init__()
        self.count, self.reader = count, reader

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # under `torch.inference_mode` composite operations come whole; elsewhere torch takes them apart
        if torch.is_inference_mode_enabled():
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        self.count.by_name[str(func)] += 1
        if not self.reader.inside and _waits(func, args, kwargs):
            self.count.record_read(func.overloadpacket.__name__)
        return func(*args, **kwargs)


def _waits(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether Python, or the host of a GPU, needs values to go on."""
    name = func.overloadpacket.__name__
    if name in INDEXING:
        return bool(_masks(args[1]))
    if name in ASSIGNING:
        given, masks, value = [i for i in args[1] if i is not None], _masks(args[1]), args[2]
        adds = args[3] if len(args) > 3 else kwargs.get("accumulate")
        # a number of Python is filled in where a single mask is true, and nobody asks how often that is
        fills = len(given) == 1 and value.numel() == 1 and value.device.type == "cpu" and not adds
        return bool(masks) and not fills
    if name in COPYING:
        return _copies_over_the_bus(name, args, kwargs)
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    return bool(READING_TAGS.intersection(func.tags))


def _masks(indices: Any) -> list[Tensor]:
    """The boolean masks among indices, of which torch first finds the true places."""
    return [i for i in indices if i is not None and i.dtype in (torch.bool, torch.uint8)]


def _copies_over_the_bus(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a copy goes between the CPU and another device, and is waited for."""
    if name == "_to_copy":
        source, target = args[0].device, torch.device(kwargs.get("device") or args[0].device)
        waits = not kwargs.get("non_blocking")
    else:
        source, target = args[1].device, args[0].device
        waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
    return waits and (source.type == "cpu") != (target.type == "cpu")
