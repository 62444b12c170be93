"""Models of `lowkey.attention`, as `lowkey convert` and `lowkey pretrain` write them.

Their own modules compute; pages hold what `Attention.project` says is stored of a token.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from lowkey.attention import LowkeyForCausalLM as OwnModel
from lowkey.attention.base import Attention, LayerCall, split_into_heads
from lowkey.attention.rotary import RotaryCall
from lowkey.core.types import LowkeyError
from lowkey.serving.requests import PlanRequest, check_own_engine
from lowkey.storage.packing import Unpacked
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import KVCacheSpec

from .batch import Builder, Metadata
from .latent import page_spec
from .pages import Layout, Side, SidePages


class OwnBackend(AttentionBackend):
    """Says to vLLM how batches are described; our modules compute."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]

    @staticmethod
    def get_name() -> str:
        """The name under which it is registered."""
        return "LOWKEY_OWN"

    @staticmethod
    def get_impl_cls() -> type:
        """No class computes for vLLM."""
        raise NotImplementedError

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        """The class that makes metadata."""
        return Builder


class Pages(nn.Module, AttentionLayerBase):
    """The pages of one layer, which vLLM finds by their name.

    Args:
        name: of the layer.
        layout: how what is stored lies in a page.
    """

    impl = None

    def __init__(self, name: str, layout: Layout) -> None:
        super().__init__()
        self.layer_name, self.layout, self.kv_cache = name, layout, torch.tensor([])
        self.held: tuple[int, tuple[SidePages, SidePages]] | None = None

    def get_attn_backend(self) -> type[AttentionBackend]:
        """How batches are described."""
        return OwnBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """What a page takes."""
        return page_spec(self.layout, vllm_config.cache_config.block_size)

    def sides(self) -> tuple[SidePages, SidePages]:
        """The two tensors of all tokens, in the engine's cache, which stays where it is."""
        if self.held is None or self.held[0] != self.kv_cache.data_ptr():
            self.held = self.kv_cache.data_ptr(), self.layout.of(self.kv_cache)
        return self.held[1]


class LowkeyForCausalLM(nn.Module):
    """One of our models, as vLLM calls models."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        _check(config, vllm_config)
        config._attn_implementation = "sdpa"
        self.own = OwnModel(config).eval()
        context, dtype = vllm_config.compilation_config.static_forward_context, vllm_config.model_config.dtype
        self.pages = nn.ModuleList()
        with torch.no_grad():
            hidden = torch.zeros(1, 1, config.hidden_size, dtype=dtype)
            at = torch.zeros(1, 1, dtype=torch.long)
            rope = self.own.model.rotary_emb(hidden, at)
            for i, layer in enumerate(self.own.model.layers):
                stored = _projected(layer.self_attn, hidden, rope, at)[1:]
                layout = Layout(*(Side(x.shape[1], x.shape[3], Unpacked(), dtype) for x in stored))
                pages = Pages(f"model.layers.{i}.self_attn.attn", layout)
                context[pages.layer_name] = pages
                self.pages.append(pages)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """The embeddings of tokens (n)."""
        return self.own.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """The hidden states (n, D) of the new tokens of a batch."""
        hidden = (self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds).unsqueeze(0)
        metadata: Any = get_forward_context().attn_metadata
        if metadata is None:  # a batch of no meaning, by which the engine measures memory
            return hidden[0]
        first: Any = self.pages[0]
        md: Metadata = metadata[first.layer_name]
        n, at = len(md.positions), positions.unsqueeze(0)
        hidden, at = hidden[:, :n], at[:, :n]
        rope = self.own.model.rotary_emb(hidden, at)
        for pages, layer in zip(self.pages, self.own.model.layers, strict=True):
            normed = layer.input_layernorm(hidden)
            hidden = hidden + _attended(pages, layer.self_attn, normed, rope, at, metadata[pages.layer_name])
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        out = self.own.model.norm(hidden)[0]
        return nn.functional.pad(out, (0, 0, 0, len(positions) - n))

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """The logits of hidden states (n, D)."""
        return self.own.lm_head(hidden)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Take the weights of a checkpoint. Returns: the names of all parameters."""
        lacking = self.own.load_state_dict(dict(weights), strict=False).missing_keys
        self.own.tie_weights()
        tied = set(self.own.all_tied_weights_keys)
        if lacking := [name for name in lacking if name not in tied]:
            raise LowkeyError(f"model lacks weights ({min(lacking)}); it is incomplete: save it again")
        return {f"own.{name}" for name, _ in self.own.named_parameters()}


def _check(config: Any, vllm_config: VllmConfig) -> None:
    """Refuse what is not served of our own models. Raises: LowkeyError."""
    given: Any = vllm_config.additional_config
    if PlanRequest.read(given.get("lowkey") if isinstance(given, dict) else None).plan is not None:
        raise LowkeyError(
            f"model with attention {config.attention!r} stores a small form of its own, which plans do not "
            "read; serve it without one"
        )
    parallel = vllm_config.parallel_config
    check_own_engine(
        config,
        str(vllm_config.cache_config.cache_dtype),
        parallel.tensor_parallel_size,
        parallel.pipeline_parallel_size,
    )


def _projected(
    attention: Attention, hidden: Tensor, rope: RotaryCall, at: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, and the two tensors that the new tokens store."""
    call = LayerCall(None, attention._rope(rope, hidden, at), at, True, {})
    query = attention.q_norm(split_into_heads(attention.q_proj(hidden), attention.heads))
    return attention.project(hidden, query, call)


def _attended(
    pages: Any, attention: Attention, hidden: Tensor, rope: RotaryCall, at: Tensor, md: Metadata
) -> Tensor:
    """The attention block's output (1, n, D): tokens are stored, then each sequence attends to its own."""
    query, *stored = _projected(attention, hidden, rope, at)
    sides = pages.sides()
    for side, x in zip(sides, stored, strict=True):
        side.write(x, *md.places)
    whole, outs = attention._rope(rope, hidden, at), []
    for i, length in enumerate(md.lengths):
        new = slice(md.starts[i], md.starts[i + 1])
        blocks = md.table[i, : -(-length // md.block_size)].long()
        parts = [side.read(blocks.unsqueeze(0))[:, :, :length].to(hidden.dtype) for side in sides]
        seen = torch.arange(length, device=hidden.device)
        mask = None if new.stop - new.start == 1 else (seen <= at[0, new].unsqueeze(1))[None, None]
        call = LayerCall(mask, _cut(whole, new), at[:, new], True, {})
        outs.append(attention.attend(query[:, :, new], *parts, call)[0])
    return attention.finish(torch.cat(outs, 1), hidden)


def _cut(rope: RotaryCall, new: slice) -> RotaryCall:
    """The rotations of some of the new tokens."""
    narrow = None if rope.narrow is None else (rope.narrow[0][:, new], rope.narrow[1][:, new])
    other = None if rope.other is None else _cut(rope.other, new)
    return rope._replace(cos=rope.cos[:, new], sin=rope.sin[:, new], narrow=narrow, other=other)
