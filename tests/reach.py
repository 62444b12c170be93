"""What an object keeps alive: an oracle for byte counts that follows references and asks no layer."""

from __future__ import annotations

import gc
import types
import weakref

import torch
from torch import Tensor

STOP = (
    type,
    types.ModuleType,
    torch.nn.Module,
    weakref.ReferenceType,
    types.CodeType,
    types.FrameType,
    torch.dtype,
    torch.device,
)
# attributes that hold a plan's maps, gates and sink points
MAPS = ("origin", "codec", "codecs", "gate", "sink_points", "exact", "gates", "plan_maps")


def storages(root: object, skip: tuple[str, ...] = ()) -> dict[int, int]:
    """Bytes of the distinct storages behind all tensors that `root` reaches, by address; attributes named in
    `skip` are not followed.

    It follows containers, attributes, closures, bound methods and partial functions, but not modules, classes
    and weak references.
    """
    found: dict[int, int] = {}
    seen, todo = set(), [root]
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, STOP):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
            todo += [item.grad if item.is_leaf else None, *vars(item).values()]
        elif isinstance(item, types.FunctionType):  # not its globals
            todo += [
                *(cell.cell_contents for cell in item.__closure__ or ()),
                item.__defaults__,
                item.__kwdefaults__,
            ]
        elif hasattr(item, "__dict__") and not isinstance(item, types.BuiltinFunctionType):
            own = vars(item)
            todo += [value for name, value in own.items() if name not in skip]
            todo += [
                x
                for x in gc.get_referents(item)
                if x is not own and not any(x is own.get(name) for name in own)
            ]
        else:
            todo += gc.get_referents(item)
    return found


def held(cache: object) -> int:
    """Bytes that a cache keeps alive, without what belongs to a plan."""
    return sum(storages(cache, MAPS).values())


def maps(cache: object) -> int:
    """Bytes of a plan's maps, gates and sink points."""
    roots = [
        getattr(x, name)
        for x in (cache, *cache.layers)
        for name in MAPS
        if getattr(x, name, None) is not None
    ]
    return sum(storages(roots).values())
