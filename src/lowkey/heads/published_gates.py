"""Gates of Fast KVzip that its authors trained (arXiv:2601.17668), in the form in which we use them.

Theirs read the hidden state x of a token, ours the queries, keys and values y = P x + c that a layer makes
of it. Where queries and keys pass no norm and P, which has more rows than columns, loses nothing, a linear
map W of x is the map W P^+ of y - c.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowkey.core import files
from lowkey.core.errors import LowkeyError
from lowkey.core.files.torch_archive import read_torch_archive
from lowkey.core.options import Checked, option
from lowkey.models import families
from lowkey.models.fingerprint import model_fingerprint
from lowkey.models.projections import projections
from lowkey.ops.sink_gate import WIDTH
from lowkey.policies.fast_kvzip import FastKVzip
from lowkey.policies.gates import Gates

MOST_LOST = 1e-3  # of a gate's maps, that queries, keys and values may not tell


@dataclass(frozen=True)
class PublishedGates(Checked):
    """How published gates are read.

    Args:
        bias_factor: how often their bias counts. The published code uses it once (default 1). Its training
            adds it twice, and 2 makes up for that.
    """

    bias_factor: int = option(1, at_least=1, at_most=2)


def convert_gates(model: PreTrainedModel, path: Path, how: PublishedGates = PublishedGates()) -> Gates:
    """Read the published gates of a model, a `.pt` file, without running anything of it.

    Args:
        model: the model that they were trained for.
        path: the file.
        how: how they are read.

    Raises:
        LowkeyError: for a model whose hidden states cannot be had from its queries, keys and values, or a
            file that is damaged or of another model.
    """
    name, config = model.config._name_or_path, model.config
    train = f"train gates with `lowkey gates {name or 'MODEL'} OUT --method {FastKVzip.learns}`"
    if families.is_own(config) or families.family(config).normed:
        raise LowkeyError(
            f"published gates of {name!r}: they read hidden states, which cannot be had from queries and "
            f"keys that passed a norm; {train}"
        )
    remedy = f"give the file that was published for this model, or {train}"
    what = "published gates"
    found = read_torch_archive(path, what, remedy)
    states, count = found.get("module") if isinstance(found, dict) else None, config.num_hidden_layers
    if not (isinstance(states, list) and len(states) == count):
        raise LowkeyError(f"{what} {str(path)!r}: hold no gates of {count} layers; {remedy}")
    layers = []
    for i in families.geometry(model).compressible:
        state = states[i]
        heads, groups = families.head_sizes(model)[:2]
        wanted = _published_shapes(heads, groups, config.hidden_size)
        if not isinstance(state, dict) or {n: _shape(t) for n, t in state.items()} != wanted:
            raise LowkeyError(f"{what} {str(path)!r}: layer {i} is not of this model's shape; {remedy}")
        state = {n: t.float().clone() for n, t in state.items()}
        if not files.all_finite(state.values()):
            raise LowkeyError(f"{what} {str(path)!r}: layer {i} holds numbers that are not finite; {remedy}")
        layers.append(_converted(model, i, state, how.bias_factor, train))
    settings = {"source": "published", "file_sha256": files.file_checksum(path, what), **asdict(how)}
    return Gates(FastKVzip.learns, tuple(layers), name, model_fingerprint(model), settings)


def _published_shapes(heads: int, groups: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """The tensors of one published gate."""
    return {
        "k_base": (heads, 1, 16, WIDTH),
        "b": (heads, 1, groups),
        "q_proj.weight": (heads * groups * WIDTH, hidden),
        "q_proj.bias": (heads * groups * WIDTH,),
        "k_proj.weight": (heads * WIDTH, hidden),
        "q_norm.weight": (WIDTH,),
        "k_norm.weight": (WIDTH,),
    }


def _shape(t: Any) -> tuple[int, ...] | None:
    return tuple(t.shape) if isinstance(t, Tensor) else None


def _converted(
    model: PreTrainedModel, layer: int, state: dict[str, Tensor], bias_factor: int, remedy: str
) -> dict[str, Tensor]:
    """One gate that reads what the layer's projections give, in place of what they read."""
    maps = projections(model, layer)
    parts = ((maps.q, maps.q_bias), (maps.k, maps.k_bias), (maps.v, maps.v_bias))
    made = torch.cat([weight.flatten(0, 1) for weight, _ in parts]).double()
    offset = torch.cat(
        [(w.new_zeros(w.shape[:2]) if bias is None else bias).flatten() for w, bias in parts]
    ).double()
    back = torch.linalg.pinv(made)
    new = {}
    for name in ("q_proj", "k_proj"):
        weight = state[f"{name}.weight"].double()
        own = weight @ back
        lost = float((weight - own @ made).norm() / weight.norm().clamp_min(1e-300))
        if lost > MOST_LOST:
            raise LowkeyError(
                f"published gates: queries, keys and values of layer {layer} do not tell its hidden state "
                f"({lost:.2g} of a gate is lost); {remedy}"
            )
        new[name] = own, state.get(f"{name}.bias", torch.zeros(())).double() - own @ offset
    heads, groups = state["b"].shape[0], state["b"].shape[2]
    (query, query_bias), (key, key_bias) = new["q_proj"], new["k_proj"]
    converted = {
        "query": query.view(heads, groups, WIDTH, -1),
        "query_bias": query_bias.view(heads, groups, WIDTH),
        "key": key.view(heads, WIDTH, -1),
        "key_bias": key_bias.view(heads, WIDTH),
        "query_norm": state["q_norm.weight"],
        "key_norm": state["k_norm.weight"],
        "sinks": state["k_base"][:, 0],
        "bias": bias_factor * state["b"][:, 0],
    }
    return {name: t.float().contiguous() for name, t in converted.items()}
