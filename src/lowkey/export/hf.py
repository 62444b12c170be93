"""Fold a plan into the weights: a checkpoint of the same architecture with fewer or narrower KV heads.

That is possible if the plan leaves, for every group of t KV heads, one head that the model could have had
itself. Its keys must allow rotation as they are (arXiv:2406.07056, Eq. 11-14, under RoPE with maps that
commute), or must be those channels of the old keys that a rotary embedding of a smaller width rotates at the
same frequencies (arXiv:2507.11273, with strided pairs).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lowkey.attention import register
from lowkey.core import files
from lowkey.core.types import Factors, LowkeyError
from lowkey.methods import METHODS
from lowkey.models import families, weights
from lowkey.models.families import Geometry, Rope
from lowkey.models.projections import ProjectionPart, Projections, projection_parts, projections
from lowkey.ops.commuting import commutes
from lowkey.ops.rope import rotate
from lowkey.plan.plan import Plan
from lowkey.version import __version__

EQUAL = 1e-4  # two rotations of unit vectors count as the same up to this difference


def export_hf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    path: str | Path,
    force: bool = False,
) -> Path:
    """Write the model with a plan folded in, its tokenizer and a model card as one folder, all of it or
    nothing.

    The new model computes what `model` computes with `make_cache(model, plan)`, up to rounding in its dtype.

    Args:
        model: the model that the plan is of.
        tokenizer: its tokenizer.
        plan: the plan.
        path: the folder.
        force: replace what is there.

    Returns:
        The folder.

    Raises:
        LowkeyError: another model's plan; a plan of a form that no plain checkpoint has (the message says
            which, and what to do); `path` holds files and `force` is False; or it cannot be written.
    """
    folder = Path(path)
    weights.check_plain("export", model, families.decoder_layers(model))
    plan.check(model)
    _check_axes(plan)
    merge, width = plain_shape(model, plan)
    files.check_folder(folder, force)
    smaller = converted(model, plan, merge, width)
    if families.is_own(model.config):
        register()  # saves the code of our models beside the weights
    with files.replacing_folder(folder) as temporary:
        smaller.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        files.write_text(temporary / "README.md", checkpoint_card(model, plan, merge, width))
    return folder


# -- which plans


def _check_axes(plan: Plan) -> None:
    """Refuse a plan without low-rank maps, with ranks of tokens, or with a policy. Raises: LowkeyError."""
    plan.check_fixed_ranks("export")
    if not plan.factors:
        raise LowkeyError(
            "plan: has no low-rank maps to fold into the weights; use it with `lowkey generate --plan`, or "
            "make one with `lowkey compress`"
        )
    if plan.policy is not None:
        raise LowkeyError(
            f"plan: drops tokens by policy {plan.policy['name']!r}, which no plain checkpoint does; use the "
            "plan, or make one with `lowkey compress --sinks 0 --recent 0`"
        )


def plain_shape(model: PreTrainedModel, plan: Plan) -> tuple[int, int]:
    """The shape of the smaller model.

    Returns:
        How many KV heads become one, and the width of a head.

    Raises:
        LowkeyError: no plain checkpoint can hold the plan.
    """
    shape, d = families.geometry(model), families.geometry(model).head_dim
    kind = model.config.get_text_config().model_type
    if families.family(model.config).normed:
        raise LowkeyError(
            f"model of family {kind!r}: norms keys after their projection, so no map folds into its weights; "
            "use the plan"
        )
    if not families.linear_output(model.config):
        raise LowkeyError(
            f"model of family {kind!r}: gates or norms the heads' outputs, so no map folds into its weights; "
            "use the plan"
        )
    if len(shape.compressible) < shape.layers:
        raise LowkeyError(
            f"model of family {kind!r}: only {len(shape.compressible)} of its {shape.layers} layers can be "
            "compressed, and a plain checkpoint has as many KV heads in all of them; use the plan"
        )
    factors = list(plan.factors.values())
    forms = sorted({(f.merge, f.ranks, f.k_down.shape[-1]) for f in factors})
    (t, t_v), (r, r_v), width = forms[0]
    remedy = _remedy(shape, changing_rope := families.length_dependent_rope(model))
    if plan.sinks or plan.recent:
        raise _refused(
            plan,
            f"it keeps {plan.sinks} sinks and {plan.recent} recent tokens exact",
            "compress with --sinks 0 --recent 0",
        )
    if not all(f.rebuilds_keys for f in factors):
        method = METHODS.get(plan.method["name"])
        options = _written(method.plain_options) if method else ""
        raise _refused(
            plan,
            "it rotates keys at frequencies of its own",
            f"compress with {options}" if options else "use the plan",
        )
    # Every reason that holds for some plan, and whether it holds for this one; the first is told.
    reasons = {
        f"it narrows heads whose rope_type {changing_rope!r} changes its frequencies with the length": bool(
            changing_rope
        )
        and width < d,
        "it subtracts means from keys or values": any(
            f.k_mean is not None or f.v_mean is not None for f in factors
        ),
        "its layers have other ranks than one another": len(forms) > 1,
        f"it merges the keys of {t} heads and the values of {t_v}": t != t_v,
        f"it keeps rank {r} of keys and {r_v} of values": r != r_v,
        f"it keeps every channel of every head (rank {r})": r == d,
        f"it leaves latents of width {width} where a head is {d} wide": t > 1 and width != d,
    }
    for reason, bad in reasons.items():
        if bad:
            raise _refused(plan, reason, remedy)
    if not all(commutes_with_rotation(model, f, t, width) for f in factors):
        reason = (
            "its key maps do not commute with rotary embedding"
            if t > 1
            else f"it does not keep the channels that a rotary embedding of width {r} rotates at the same "
            "frequencies"
        )
        raise _refused(plan, reason, remedy)
    return t, width


def _remedy(shape: Geometry, changing: str | None) -> str:
    """How to compress a model of this shape so that it can be exported."""
    exact = "--sinks 0 --recent 0"
    if shape.kv_heads == 1:  # none to merge, so that its one head becomes narrower
        return (
            "use the plan"
            if changing
            else f"compress with {_method_for('narrower heads')} --budget 50% {exact}"
        )
    group = next(n for n in range(2, shape.kv_heads + 1) if shape.kv_heads % n == 0)
    more = "" if group != 2 or shape.kv_heads % 4 else " (25% with -O group=4)"
    return f"compress with {_method_for('fewer heads')} {exact} --budget {-(-100 // group)}%{more}"


def _method_for(form: str) -> str:
    """Options of `lowkey compress` for a method whose plans can become a plain checkpoint of this form."""
    name, kind = next((name, kind) for name, kind in METHODS.items() if kind.plain_form == form)
    return f"--method {name} {_written(kind.plain_options)}"


def _written(options: Mapping[str, str]) -> str:
    return " ".join(f"-O {name}={value}" for name, value in options.items())


def _refused(plan: Plan, reason: str, remedy: str) -> LowkeyError:
    """The error for a plan that no plain checkpoint can hold."""
    options = "".join(f" {n}={v}" for n, v in plan.method["parameters"].items())
    return LowkeyError(
        f"plan of method {plan.method['name']!r}{options and f' with{options}'} is not GQA-shaped: {reason}; "
        f"{remedy}"
    )


def commutes_with_rotation(model: PreTrainedModel, f: Factors, merge: int, width: int) -> bool:
    """Whether rotating keys before a layer's maps equals rotating what the maps keep, as the smaller model
    does.

    Args:
        model: the model that the plan was made for.
        f: the factors of one of its layers.
        merge: KV heads of the model that share one head of the smaller one.
        width: width of a head of the smaller model.
    """
    f = in_order(f, families.geometry(model).kv_heads, width)
    if merge > 1:
        rotary = families.rope(model, 0)(torch.zeros(1, 1, dtype=torch.long), torch.empty(0))[0].shape[-1]
        return commutes(f.k_down, rotary) and commutes(f.k_up, rotary)
    return all(
        _rotates_alike(model, down, width) for maps in (f.k_down, f.k_up.mT) for down in maps.unique(dim=0)
    )


def _rotates_alike(model: PreTrainedModel, down: Tensor, width: int) -> bool:
    """Whether maps (d, width) carry the model's rotation into that of the same embedding for heads of that
    width.
    """
    wide = families.rope(model, 0)
    narrow = families.narrower_rope(wide, smaller_config(model, 1, width))
    longest = families.max_positions(model) or 1
    # Powers of two tell all frequencies apart, since angles of high ones wrap around and those of low ones do
    # not.
    positions = torch.tensor([[0, *(2**i for i in range(longest.bit_length()))]])
    before, after = (
        _rotated(x, rope, positions) for x, rope in ((torch.eye(len(down)), wide), (down, narrow))
    )
    return bool((before @ down - after).abs().max() <= EQUAL * down.abs().max())


def _rotated(x: Tensor, rope: Rope, positions: Tensor) -> Tensor:
    """Rows (n, d), rotated to positions (1, s): (n, s, d)."""
    cos, sin = (y[0].cpu() for y in rope(positions, x))
    return rotate(x.unsqueeze(1).expand(-1, positions.shape[1], -1), cos, sin)


# -- the smaller model


def converted(model: PreTrainedModel, plan: Plan, merge: int, width: int) -> PreTrainedModel:
    """The smaller model. It shares what it can with `model`. Its buffers hold no data, which is enough to
    save it.

    Args:
        model: the model that the plan was made for.
        plan: a plan with the same ranks in every layer.
        merge: KV heads of the model that share one head of the smaller one.
        width: width of a head of the smaller model.
    """
    # Nothing is allocated: parameters are assigned below.
    with torch.device("meta"):
        smaller = type(model)(smaller_config(model, merge, width))
    # tensors are their own keys: parameters are told apart by identity
    names: dict[Tensor, str] = {parameter: name for name, parameter in smaller.named_parameters()}
    state = model.state_dict()
    for i, factors in plan.factors.items():
        new = layer_weights(model, smaller, i, in_order(factors, plan.geometry["kv_heads"], width))
        state |= {names[parameter]: value.to(model.dtype) for parameter, value in new.items()}
    smaller.load_state_dict(state, assign=True)
    smaller.tie_weights()
    smaller.generation_config = model.generation_config
    return smaller


def smaller_config(model: PreTrainedModel, merge: int, width: int) -> PreTrainedConfig:
    """The configuration of the smaller model.

    Args:
        model: the model.
        merge: number of KV heads that become one.
        width: width of a head.
    """
    config = copy.deepcopy(model.config)
    inner, shape = config.get_text_config(), families.geometry(model)
    inner.num_key_value_heads = shape.kv_heads // merge
    if families.is_own(inner) and merge > 1:
        inner.attention = "gqa"  # also if it was `mha`, whose number of heads is fixed
    if width != shape.head_dim:
        inner.head_dim = width
    return config


def in_order(f: Factors, heads: int, width: int) -> Factors:
    """Factors with one map per head, in fp32 on the CPU, and with channels of narrower heads in the order
    that the wide heads have.

    Args:
        f: the factors of one layer.
        heads: KV heads of the layer.
        width: width of a head of the smaller model.
    """
    f = f.to(torch.empty(0))
    down, up, v_down, v_up = (x.expand(heads // m, -1, -1) if len(x) == 1 else x for x, m in _sides(f))
    if width < up.shape[-1]:
        # Each latent channel is mostly one old channel; the narrow rotary embedding expects them in old
        # order.
        order = down.abs().argmax(-2).argsort(-1)
        down, up = (
            down.gather(-1, order.unsqueeze(-2).expand_as(down)),
            up.gather(-2, order.unsqueeze(-1).expand_as(up)),
        )
    return replace(
        f,
        k_down=down,
        k_up=up,
        v_down=v_down,
        v_up=v_up,
        order=torch.arange(heads) if f.order is None else f.order,
    )


def _sides(f: Factors) -> Iterator[tuple[Tensor, int]]:
    """The four maps, each with the number of heads that it merges."""
    yield from zip((f.k_down, f.k_up, f.v_down, f.v_up), (f.merge[0], 1, f.merge[1], 1), strict=True)


def layer_weights(
    model: PreTrainedModel, smaller: PreTrainedModel, i: int, f: Factors
) -> dict[Tensor, Tensor]:
    """Weights of one layer's attention in the smaller model.

    Args:
        model: the model that the plan was made for.
        smaller: the smaller model; its parameters need hold no data.
        i: index of the layer.
        f: the layer's factors, as `in_order` gives them.

    Returns:
        The new value of every parameter, in fp32.
    """
    block: Any = families.decoder_layers(model)[i].self_attn
    narrow: Any = families.decoder_layers(smaller)[i].self_attn
    new = factors_folded(projections(model, i), f, block.scaling / narrow.scaling)
    new_weights = {narrow.o_proj.weight: new.o.transpose(0, 1).flatten(1)}
    parts = projection_parts(smaller, i)
    for part, weight, bias in zip(
        parts, (new.q, new.k, new.v), (new.q_bias, new.k_bias, new.v_bias), strict=True
    ):
        _fill(new_weights, part, weight, bias)
    return new_weights


def _fill(new_weights: dict, part: ProjectionPart, weight: Tensor, bias: Tensor | None) -> None:
    """Put the rows of one projection into its parameters."""
    for parameter, value in ((part.linear.weight, weight), (part.linear.bias, bias)):
        if value is not None:
            new_weights.setdefault(parameter, torch.empty(parameter.shape))[part.rows] = value.flatten(0, 1)


def factors_folded(p: Projections, f: Factors, scale: float) -> Projections:
    """Projections of the smaller model. Keys and values are made as latents, queries in their basis (times
    `scale`), and outputs are read from the latents of values.

    Args:
        p: the layer's projections in the model that the plan was made for.
        f: the layer's factors, as `in_order` gives them.
        scale: the model's factor on scores over that of the smaller one, whose heads have another width.
    """
    h, t = len(f.k_up), len(f.k_up) // len(f.k_down)
    # Biases go through the same maps as one more input.
    q, k, v = (_with_bias(w, b) for w, b in ((p.q, p.q_bias), (p.k, p.k_bias), (p.v, p.v_bias)))
    q = scale * torch.einsum("hwd,hgdn->hgwn", f.k_up, q.unflatten(0, (h, -1))[f.order]).flatten(0, 1)
    k, v = (
        down.mT @ x[f.order].unflatten(0, (-1, t)).flatten(1, 2) for down, x in ((f.k_down, k), (f.v_down, v))
    )
    o = torch.einsum("hwd,hgnd->hgnw", f.v_up, p.o.unflatten(0, (h, -1))[f.order]).flatten(0, 1)
    q, q_bias = _without_bias(q, p.q_bias)
    k, k_bias = _without_bias(k, p.k_bias)
    v, v_bias = _without_bias(v, p.v_bias)
    return Projections(q, k, v, o, q_bias, k_bias, v_bias, p.normed)


def _with_bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    """Weights (heads, d, D) with biases (heads, d) as the weight of one more input."""
    return weight if bias is None else torch.cat([weight, bias.unsqueeze(-1)], -1)


def _without_bias(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The inverse of `_with_bias`."""
    return (x, None) if bias is None else (x[..., :-1], x[..., -1])


def checkpoint_card(model: PreTrainedModel, plan: Plan, merge: int, width: int) -> str:
    """The model card, in Markdown.

    Args:
        model: the model that the plan was made for.
        plan: the plan.
        merge: KV heads of the model that share one head of the smaller one.
        width: width of a head of the smaller model.
    """
    g, known, inner = plan.geometry, plan.provenance, model.config.get_text_config()
    heads, itemsize = g["kv_heads"], model.dtype.itemsize
    before, after = (
        len(plan.factors) * 2 * n * itemsize for n in (heads * g["head_dim"], heads // merge * width)
    )
    name = known.get("model") or "a model"
    needs = (
        "the code beside the weights (trust_remote_code=True)" if families.is_own(inner) else "transformers"
    )
    share, dtype = f"{100 * after / before:.1f} %", str(model.dtype).removeprefix("torch.")
    data = str(known.get("data_sha256"))[:16]
    return f"""---
library_name: transformers
tags: [kv-cache-compression]
---
# {name} with a smaller KV cache

{heads // merge} KV heads of width {width} in the place of {heads} of {g["head_dim"]}: the cache takes
{after} bytes per token instead of {before} ({share}) in {dtype}. The architecture is
`{inner.model_type}` as before, and nothing but {needs} is needed:

```python
model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")
```

Made by lowkey {__version__} from the weights of {name}: method `{plan.method["name"]}`
{plan.method["parameters"]}, calibrated on {known.get("tokens")} tokens
(sha256 `{data}`, seed {known.get("seed")}).
The licence of the original weights applies.
"""
