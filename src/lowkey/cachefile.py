"""A cache on disk: what every layer holds, and what it was made with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowkey import families, files
from lowkey.layers.exact import Exact, FixedPoints, SinkRule
from lowkey.plan import Plan
from lowkey.types import LowkeyError, device_of

FORMAT = 1
JSON, TENSORS, PLAN = "cache.json", "cache.safetensors", "plan"
STOCK = ("keys", "values")  # what transformers' own layers hold


def write(path: Path, layers: Sequence[Any], about: dict, plan: Plan | None, exact: Exact | None, force: bool) -> None:
    """All of it or nothing."""
    if not force:
        files.check_ours(path, {JSON, TENSORS, PLAN})
    with files.replacing_folder(path) as temporary:
        tensors = {f"{i}.{name}": t for i, layer in enumerate(layers) for name, t in _tensors(layer).items()}
        words, points = _exact_parts(exact)
        files.write_tensors(temporary / TENSORS, tensors | points)
        if plan is not None:
            plan.save(temporary / PLAN)
        numbers = [{name: int(getattr(layer, name)) for name in _numbers(layer)} for layer in layers]
        whole = {"format": FORMAT, **about, "exact": words, "layers": numbers, "tensors_sha256": files.sha256(temporary / TENSORS)}
        files.write_json(temporary / JSON, whole)


def read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    about = files.read_json(path / JSON, "cache")
    version = about.get("format")
    if not isinstance(version, int) or version < 1:
        raise _damaged(path)
    if version > FORMAT:
        raise LowkeyError(f"cache {str(path)!r}: format {version} is newer than {FORMAT}, the newest known here; upgrade lowkey")
    tensors = files.read_tensors(path / TENSORS, "cache")
    if about.get("tensors_sha256") != files.sha256(path / TENSORS) or not {"model_sha256", "policy", "bits", "exact", "layers"} <= set(
        about
    ):
        raise _damaged(path)
    return about, tensors


def restore(path: Path, layers: Sequence[Any], about: dict, tensors: dict[str, Tensor], model: PreTrainedModel) -> None:
    """Give fresh layers what the file says they held."""
    if not isinstance(about["layers"], list) or len(about["layers"]) != len(layers):
        raise _damaged(path)
    heads, d = (1, 1) if families.stores_its_own(model.config) else _shape(model)
    for i, (layer, numbers) in enumerate(zip(layers, about["layers"], strict=True)):
        own = {name.split(".", 1)[1]: t for name, t in tensors.items() if name.split(".", 1)[0] == str(i)}
        if not own:
            continue
        device = device_of(families.decoder_layers(model)[i])
        like = torch.empty(_batch(own), heads, 0, d, dtype=model.dtype, device=device)
        layer.update(like, like)
        if set(own) != set(_tensors(layer)) or set(numbers) != set(_numbers(layer)):
            raise _damaged(path)
        fresh = _tensors(layer)  # what is in the model's dtype follows the model that goes on
        moved = {name: t.to(device, fresh[name].dtype if t.is_floating_point() else t.dtype) for name, t in own.items()}
        for name, value in {**numbers, **moved}.items():
            setattr(layer, name, value)


def _shape(model: PreTrainedModel) -> tuple[int, int]:
    shape = families.geometry(model)
    return shape.kv_heads, shape.head_dim


def _exact_parts(exact: Exact | None) -> tuple[dict | None, dict[str, Tensor]]:
    """In words, and the tensors of its rule."""
    if exact is None:
        return None, {}
    words = {name: getattr(exact, name) for name in ("sinks", "recent", "prefill")}
    rule = exact.rule
    if rule is None:
        return words, {}
    known = {"channels": rule.channels, "emergence": rule.emergence, "model_sha256": rule.model_sha256}
    points = {f"rule.{i}.{name}": t for i, found in rule.layers.items() for name, t in vars(found).items()}
    return words | {"rule": known | {"layers": list(rule.layers)}}, points


def exact_from(path: Path, words: dict | None, tensors: dict[str, Tensor]) -> Exact | None:
    """The inverse of what `write` does."""
    if words is None:
        return None
    try:
        rule = words.get("rule")
        if rule is not None:
            points = {int(i): FixedPoints(tensors[f"rule.{i}.centres"], tensors[f"rule.{i}.radius"]) for i in rule["layers"]}
            rule = SinkRule(points, tuple(rule["channels"]), int(rule["emergence"]), str(rule["model_sha256"]))
        return Exact(**(words | {"rule": rule}))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise _damaged(path) from None


def _batch(own: dict[str, Tensor]) -> int:
    """Rows of the batch; every layer holds something that says."""
    return len(next(own[name] for name in ("offset", "keys_codes", "keys") if name in own))


def _tensors(layer: Any) -> dict[str, Tensor]:
    if not layer.is_initialized:
        return {}
    return layer.tensors() if hasattr(layer, "tensors") else {name: getattr(layer, name) for name in STOCK}


def _numbers(layer: Any) -> Sequence[str]:
    return getattr(layer, "numbers", ("cumulative_length",) if layer.is_sliding else ())


def _damaged(path: Path) -> LowkeyError:
    return LowkeyError(f"cache {str(path)!r} is damaged or not one of ours; make it again")
