"""Saves a cache as a folder and loads it again.

The folder holds what every layer holds, and what the cache was made of. What is read is checked against the
model and against itself before it is used: kernels read and write memory where its numbers tell them to.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lowkey.cache.cachecheck import flaw
from lowkey.core import files
from lowkey.core.types import LowkeyError, device_of
from lowkey.models import families
from lowkey.plan.plan import Plan
from lowkey.policies.gates import GATES_JSON, Gates
from lowkey.storage.exact import Exact, SinkPoints, SinkRule
from lowkey.storage.file_names import FILE_NAMES, attribute_name, file_name

if TYPE_CHECKING:  # that module imports this one
    from lowkey.cache.cache import Origin

CACHE_FORMAT = 2
CACHE_JSON, CACHE_TENSORS, CACHE_FILE = "cache.json", "cache.safetensors", "cache"
CACHE_PLAN, CACHE_GATES = "plan", "gates"  # folders
CACHE_FIELDS = {"model": str, "model_sha256": str, "versions": dict, "layers": list, "tensors_sha256": str}
NULLABLE_FIELDS = ("policy", "bits", "exact", "plan")  # must be there and may be null
STOCK = ("keys", "values")  # the tensors of transformers' own layers
FLAGS = ("exact_prefill", "frozen")
LARGEST_COUNT = 2**31  # all counts are smaller


def write_cache(path: Path, layers: Sequence[Any], about: dict, origin: Origin, force: bool) -> None:
    """Write a cache as a folder, in one step.

    Args:
        path: the folder.
        layers: of the cache.
        about: what else cache.json says.
        origin: what the cache was made of.
        force: whether to replace another folder that lowkey wrote.

    Raises:
        LowkeyError: if it cannot be written.
    """
    files.check_folder(path, force, again=CACHE_JSON)
    with files.replacing_folder(path) as temporary:
        tensors = {
            f"{i}.{file_name(name)}": t
            for i, layer in enumerate(layers)
            for name, t in _tensors(layer).items()
        }
        words, points = _exact_parts(origin.exact)
        checksum = files.write_tensors(temporary / CACHE_TENSORS, tensors | points, CACHE_FILE)
        plan_checksum = None if origin.plan is None else origin.plan.save(temporary / CACHE_PLAN)
        gates_checksum = None if origin.gates is None else origin.gates.save(temporary / CACHE_GATES)
        numbers = [
            {file_name(name): int(getattr(layer, name)) for name in _numbers(layer)} for layer in layers
        ]
        whole = {
            "format": CACHE_FORMAT,
            **about,
            "exact": words,
            "layers": numbers,
            "plan": plan_checksum,
            "gates": gates_checksum,
            "tensors_sha256": checksum,
        }
        files.write_json(temporary / CACHE_JSON, whole, CACHE_FILE)


def read_cache(path: Path) -> tuple[dict, dict[str, Tensor], Plan | None, Gates | None]:
    """Read a folder that `write_cache` wrote.

    Returns:
        (what cache.json says, the tensors by layer and attribute, the plan or None, the gates or None), all
        of one version.

    Raises:
        LowkeyError: if it is missing, damaged, or of a newer format.
    """
    return files.read_consistently(path, lambda: _read(path))


def _read(path: Path) -> tuple[dict, dict[str, Tensor], Plan | None, Gates | None]:
    about = files.read_json(path / CACHE_JSON, "cache", CACHE_FILE, CACHE_FORMAT)
    typed = all(isinstance(about.get(name), kind) for name, kind in CACHE_FIELDS.items())
    if not typed or not set(NULLABLE_FIELDS) <= set(about):
        raise damaged_cache(path, "cache.json lacks or garbles a field")
    if about["format"] < 2 and about["policy"] is not None:
        raise LowkeyError(
            f"cache {str(path)!r}: format 1 holds the tokens of a policy in another way than this version; "
            "make it again"
        )
    tensors = files.read_tensors(
        path / CACHE_TENSORS, "cache", CACHE_FILE, about["tensors_sha256"], finite=False
    )
    wanted = {"plan": path / CACHE_PLAN / "plan.json", "gates": path / CACHE_GATES / GATES_JSON}
    for what, place in wanted.items():  # caches of earlier versions know no gates
        if about.get(what) is not None and files.stated_checksum(place, what) != about[what]:
            raise damaged_cache(path, f"its folder {what!r} is another one than it was made with")
    plan = None if about["plan"] is None else Plan.load(path / CACHE_PLAN)
    gates = None if about.get("gates") is None else Gates.load(path / CACHE_GATES)
    return about, tensors, plan, gates


def restore_cache(
    path: Path, layers: Sequence[Any], about: dict, tensors: dict[str, Tensor], model: PreTrainedModel
) -> None:
    """Give fresh layers what the file says they held.

    Args:
        path: the folder, for messages.
        layers: fresh layers of the same cache.
        about: what cache.json says.
        tensors: of the file.
        model: that will go on with the cache.

    Raises:
        LowkeyError: for what does not fit the model or contradicts itself.
    """
    numbers = about["layers"]
    if len(numbers) != len(layers):
        raise damaged_cache(path, f"it has {len(numbers)} layers, and the model {len(layers)}")
    names = [[file_name(name) for name in _numbers(layer)] for layer in layers]
    if not all(_are_counts(n, own) for n, own in zip(numbers, names, strict=True)):
        raise damaged_cache(path, "counters of its layers are missing or no counts")
    held = _by_layer(path, tensors, len(layers))
    if any(held) and not all(held):  # a saved cache has seen tokens in all layers or in none
        raise damaged_cache(path, "some of its layers hold something and others nothing")
    shapes = _shapes(model) if any(held) else []
    groups = 1 if families.stores_own_form(model.config) else families.geometry(model).groups
    for i, (layer, own, counts) in enumerate(zip(layers, held, numbers, strict=True)):
        if own:
            _fill(path, i, layer, own, shapes[i], model)
        elif any(value for name, value in counts.items() if name not in FLAGS):
            raise damaged_cache(path, f"layer {i} counts tokens and holds none")
        for name, value in counts.items():
            setattr(layer, attribute_name(name), value)
        if own and (rule := flaw(layer, own, shapes[i], groups)):
            raise damaged_cache(path, f"layer {i}: {rule}")
    pairs = zip(layers, held, strict=True) if any(held) else ()
    lengths_and_batches = {(layer.get_seq_length(), len(_first(own))) for layer, own in pairs}
    if len(lengths_and_batches) > 1:
        raise damaged_cache(path, "its layers have seen different numbers of tokens or rows")


def _fill(
    path: Path,
    i: int,
    layer: Any,
    own: dict[str, Tensor],
    shape: tuple[int, int, int],
    model: PreTrainedModel,
) -> None:
    """Give one layer its tensors.

    The layer is first given a sequence without tokens, which tells the names and dtypes of its tensors.
    """
    device = device_of(families.decoder_layers(model)[i])
    heads, k, v = shape
    like = [torch.empty(1, heads, 0, d, dtype=model.dtype, device=device) for d in (k, v)]
    layer.update(*like)
    empty = _tensors(layer)
    if set(own) != set(empty):
        raise damaged_cache(path, f"layer {i} holds other things than such a layer does")
    # integers must be of the very dtype; floating-point numbers may be converted
    for name, t in own.items():
        dtype = empty[name].dtype
        if t.dtype != dtype and not (t.is_floating_point() and dtype.is_floating_point):
            raise damaged_cache(path, f"layer {i}: {file_name(name)} is of {t.dtype}")
        new = t.to(device, dtype)  # a model may go on in another dtype than it was filled in
        if t.dtype != dtype and bool(t.isfinite().all()) and not bool(new.isfinite().all()):
            raise LowkeyError(
                f"cache {str(path)!r}: holds numbers beyond those of {dtype}; load the model as bfloat16 or "
                "wider"
            )
        setattr(layer, name, new)


def _by_layer(path: Path, tensors: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    by_layer: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for whole, t in tensors.items():
        index, _, name = whole.partition(".")
        if index == "rule":  # a tensor of the sink rule, which `exact_from` reads
            continue
        of_a_layer = index.isdecimal() and str(int(index)) == index and int(index) < count
        if not (of_a_layer and name and name not in FILE_NAMES):
            raise damaged_cache(path, f"it holds {whole!r:.60}, which is of no layer")
        by_layer[int(index)][attribute_name(name)] = t
    return by_layer


def _first(own: dict[str, Tensor]) -> Tensor:
    """A tensor whose length is the batch size."""
    return next(own[name] for name in ("offset", "keys") if name in own)


def _are_counts(counts: object, names: Sequence[str]) -> bool:
    if not isinstance(counts, dict) or set(counts) != set(names):
        return False
    return all(
        type(value) is int and 0 <= value < (2 if name in FLAGS else LARGEST_COUNT)
        for name, value in counts.items()
    )


def _shapes(model: PreTrainedModel) -> list[tuple[int, int, int]]:
    """For each layer, (heads, width of a key, width of a value) that it stores.

    A model that stores a form of its own is asked by letting it store one token.
    """
    if not families.stores_own_form(model.config):
        shape = families.geometry(model)
        return [(shape.kv_heads, shape.head_dim, shape.head_dim)] * shape.layers
    cache: Any = DynamicCache()
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.long, device=device_of(model)), past_key_values=cache)
    return [(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in cache.layers]


def _exact_parts(exact: Exact | None) -> tuple[dict | None, dict[str, Tensor]]:
    """Exact tokens as JSON, and the tensors of their sink rule."""
    if exact is None:
        return None, {}
    words = {name: getattr(exact, name) for name in ("sinks", "recent", "prefill")}
    rule = exact.rule
    if rule is None:
        return words, {}
    known = {"channels": rule.channels, "emergence": rule.emergence, "model_sha256": rule.model_sha256}
    points = {f"rule.{i}.{name}": t for i, own in rule.layers.items() for name, t in vars(own).items()}
    return words | {"rule": known | {"layers": list(rule.layers)}}, points


def exact_from(path: Path, words: dict | None, tensors: dict[str, Tensor]) -> Exact | None:
    """Exact tokens from what cache.json says and the tensors of the file.

    Raises:
        LowkeyError: if they are damaged.
    """
    points = {name: t for name, t in tensors.items() if name.startswith("rule.")}
    # what a file says is read as it is, and whatever goes wrong means that the file is damaged
    try:
        rule = words.get("rule") if words is not None else None
        if len(points) != (2 * len(rule["layers"]) if rule else 0):
            raise ValueError("points of its sink rule are missing")
        if words is None:
            return None
        if rule is not None:
            layers = {
                int(i): _points(points[f"rule.{i}.centres"], points[f"rule.{i}.radius"])
                for i in rule["layers"]
            }
            if not all(type(n) is int and n >= 0 for n in (*rule["channels"], rule["emergence"])):
                raise ValueError("channels of its sink rule are no indices")
            rule = SinkRule(layers, tuple(rule["channels"]), rule["emergence"], str(rule["model_sha256"]))
        return Exact(**(words | {"rule": rule}))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise damaged_cache(path, f"exact tokens: {error}") from None


def _points(centres: Tensor, radius: Tensor) -> SinkPoints:
    """Sink points from a file. Raises: ValueError if they are none."""
    if centres.ndim != 3 or radius.ndim != 1 or len(centres) != len(radius) or not len(radius):
        raise ValueError("points of its sink rule are none")
    if not files.all_finite((centres, radius)) or not (
        centres.is_floating_point() and radius.is_floating_point()
    ):
        raise ValueError("points of its sink rule are not finite")
    return SinkPoints(centres, radius)


def _tensors(layer: Any) -> dict[str, Tensor]:
    """The tensors that a layer holds, by attribute."""
    if not layer.is_initialized:
        return {}
    return layer.tensors() if hasattr(layer, "tensors") else {name: getattr(layer, name) for name in STOCK}


def _numbers(layer: Any) -> Sequence[str]:
    """The counters of a layer that are saved, by attribute."""
    return getattr(layer, "saved_counters", ("cumulative_length",) if layer.is_sliding else ())


def damaged_cache(path: Path, rule: str) -> LowkeyError:
    """The error for a cache file that breaks a rule."""
    return LowkeyError(f"cache {str(path)!r}: {rule:.200}; it is damaged or not one of ours: make it again")
