"""Gives the attention layers of a model that vLLM has built what a plan says."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import torch
from lowkey.core.types import LowkeyError, identity_factors
from lowkey.models.families import configured_geometry
from lowkey.models.loading import local_folder
from lowkey.plan.plan import Plan
from lowkey.serving.requests import PlanRequest, check_cache_dtype, check_engine, served_plan
from lowkey.serving.rotation import configured_rope
from lowkey.serving.routes import CPU_HEAD_SIZES, GPU_HEAD_SIZES, ExactShape, Route, exact_shape, routes
from lowkey.storage.codec import Codec, LowRank, Plain
from lowkey.storage.packing import Unpacked, scheme_or_none
from torch import nn
from transformers import AutoConfig
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index

from .batch import Shared
from .exact import ExactPages
from .latent import LatentAttention
from .pages import Layout, Side
from .projected import ProjectedAttention
from .windowed import WindowedAttention

logger = init_logger("vllm.lowkey")


def equip(model: nn.Module, vllm_config: VllmConfig) -> None:
    """Replace the attention layers of a model by such that store what the plan says, if there is one.

    Args:
        model: one of vLLM's, before its weights are loaded.
        vllm_config: of the engine; `additional_config["lowkey"]` is what `PlanRequest` reads.

    Raises:
        LowkeyError: for what cannot be served.
    """
    given: Any = vllm_config.additional_config
    request = PlanRequest.read(given.get("lowkey") if isinstance(given, dict) else None)
    if request.plan is None:
        return
    cache_dtype = str(vllm_config.cache_config.cache_dtype)
    check_engine(
        cache_dtype,
        vllm_config.parallel_config.tensor_parallel_size,
        vllm_config.speculative_config is not None,
    )
    folder = local_folder(str(vllm_config.model_config.model))
    config = AutoConfig.from_pretrained(folder)
    plan = served_plan(request, Path(folder), config)
    assert plan is not None
    # compiled graphs are kept by this configuration, and depend on the shapes of the plan's maps
    given["lowkey_digest"] = plan.digest()
    device = torch.device(vllm_config.device_config.device_type)
    shape = configured_geometry(config)
    found = routes(
        plan,
        shape.compressible,
        (shape.kv_heads, shape.head_dim),
        torch.empty(0, dtype=vllm_config.model_config.dtype).element_size(),
        CPU_HEAD_SIZES if device.type == "cpu" else GPU_HEAD_SIZES,
        request.kernel == "own",
    )
    check_cache_dtype(cache_dtype, {route.name for route in found.values()})
    block = vllm_config.cache_config.block_size
    kv_bytes = 2 * shape.kv_heads * shape.head_dim * vllm_config.model_config.dtype.itemsize
    stored = sum(route.token_bytes for route in found.values())
    exact = exact_shape(plan, kv_bytes, len(found), block, stored * block)
    rope = configured_rope(config, device)
    codecs = _codecs(plan, list(found), replace(rope, module=Remembering(rope.module)))
    shared = Shared()
    replaced = set()
    for name, part in list(model.named_modules()):
        attention = getattr(part, "attn", None)
        if type(attention) is not Attention:
            continue
        layer = extract_layer_index(name)
        if layer in found:
            route, codec = found[layer], codecs[layer]
            part.attn = _replacement(attention, plan, layer, route, codec, exact, shared, vllm_config)
            replaced.add(layer)
    inner: Any = getattr(model, "model", model)
    here = range(inner.start_layer, inner.end_layer)  # other processes of a pipeline hold the others
    if missing := set(found) & set(here) - replaced:
        raise LowkeyError(
            f"model: layer {min(missing)} has no attention that can be replaced; serve it without a plan"
        )
    _tell(request, plan, found)


class Remembering:
    """A rotary module that answers at once if it is asked again for the positions of the same batch."""

    KEPT: ClassVar[int] = 4  # answers: a batch asks for its new tokens, and for the tokens that these see

    def __init__(self, module: Any) -> None:
        self.module = module
        self.known: OrderedDict[tuple[int, torch.dtype], tuple[torch.Tensor, Any]] = OrderedDict()

    def __call__(self, like: torch.Tensor, positions: torch.Tensor) -> Any:
        """(cos, sin) of positions, in the dtype of `like`."""
        # by identity: all layers of a batch ask with the same tensor, which is kept and cannot be another
        key = id(positions), like.dtype
        if key not in self.known:
            self.known[key] = positions, self.module(like, positions)
            if len(self.known) > self.KEPT:
                self.known.popitem(last=False)
        return self.known[key][1]


def _codecs(plan: Plan, layers: list[int], rope: Any) -> dict[int, Codec]:
    """The form of each layer's keys and values. A Hadamard transform is folded into the plan's maps."""
    packed = scheme_or_none(plan.bits)
    rotated = packed is not None and packed.hadamard_rotated
    if not plan.factors and not rotated:
        return dict.fromkeys(layers, Plain())
    head_dim, layout = plan.geometry["head_dim"], plan.layout
    if not plan.factors:
        plain = identity_factors(head_dim).hadamard_rotated()
        return {i: LowRank(plain, "post_rope", rope) for i in layers}
    return {i: LowRank(f.hadamard_rotated() if rotated else f, layout, rope) for i, f in plan.factors.items()}


def _replacement(
    stock: Attention,
    plan: Plan,
    layer: int,
    route: Route,
    codec: Codec,
    exact: ExactShape | None,
    shared: Shared,
    vllm_config: VllmConfig,
) -> Attention:
    """The attention that takes a stock layer's place, and its name."""
    settings = {
        "num_heads": stock.num_heads,
        "scale": stock.impl.scale,
        "cache_config": vllm_config.cache_config,
        "quant_config": stock.quant_config,
        "prefix": stock.layer_name,
    }
    context = vllm_config.compilation_config.static_forward_context
    del context[stock.layer_name]
    if route.name == "projected":
        return ProjectedAttention(
            plan.factors[layer], (stock.num_kv_heads, stock.head_size), (route.heads, route.width), **settings
        )
    packed = scheme_or_none(plan.bits)
    packings = (packed.keys, packed.values) if packed else (Unpacked(), Unpacked())
    settings |= {"head_size": stock.head_size, "num_kv_heads": stock.num_kv_heads, "shared": shared}
    if exact is None:
        return LatentAttention(codec, packings, **settings)
    side = Side(stock.num_kv_heads, stock.head_size, Unpacked(), vllm_config.model_config.dtype)
    pages = ExactPages(
        f"{stock.layer_name}.exact", Layout(side, side), exact.tokens, plan.sinks, plan.recent, exact.window
    )
    context[pages.layer_name] = pages
    return WindowedAttention(codec, packings, pages, route.token_bytes, **settings)


def _tell(request: PlanRequest, plan: Plan, found: dict[int, Route]) -> None:
    """Log how layers are stored, those that are alike together."""
    logger.info("lowkey: plan %s (%s, %s)", request.plan, plan.method["name"], plan.layout)
    for route, rows in groupby(found.items(), key=lambda item: item[1]):
        indices = [i for i, _ in rows]
        logger.info(
            "lowkey: layers %d to %d: %s, %g bytes per token",
            indices[0],
            indices[-1],
            route.name,
            route.token_bytes,
        )
