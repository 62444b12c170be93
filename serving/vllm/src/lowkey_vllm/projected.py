"""The engine's own attention kernel over latents as if they were heads, for keys that are stored rotated.

Queries are carried into the basis of the latents that they meet, and outputs out of it: plain products, which
torch.compile sees. Means: a query's product with the mean of keys is the same for every key, and falls out of
the softmax; the mean of values is added to the output.
"""

from __future__ import annotations

from typing import Any

import torch
from lowkey.core.types import Factors
from torch import Tensor
from vllm.model_executor.layers.attention import Attention


class ProjectedAttention(Attention):
    """vLLM's attention layer, whose heads are latents.

    Args:
        factors: of the layer.
        model_shape: (KV heads, width of a head) of the model.
        kernel_shape: the same of the kernel, from `lowkey.serving.routes`. Several latents may lie side by
            side in one head of the kernel.
        settings: of vLLM's layer.
    """

    def __init__(
        self, factors: Factors, model_shape: tuple[int, int], kernel_shape: tuple[int, int], **settings: Any
    ) -> None:
        (kv_heads, width), (heads, padded) = model_shape, kernel_shape
        super().__init__(head_size=padded, num_kv_heads=heads, **settings)
        self.model_heads, self.model_width = kv_heads, width
        self.groups = self.num_heads // kv_heads
        f = factors.to(torch.empty(0, dtype=self.dtype))
        t_k, t_v = f.merge
        self.has_order = f.order is not None
        maps: dict[str, Tensor | None] = {
            "order": f.order,
            "back": None if f.order is None else f.order.argsort(),
            "k_down": _joint_down(f.k_down, kv_heads // t_k, heads, padded),
            "v_down": _joint_down(f.v_down, kv_heads // t_v, heads, padded),
            "query_map": _placed(f.k_up, kv_heads, kv_heads // t_k, heads, padded).mT.contiguous(),
            "output_map": _placed(f.v_up, kv_heads, kv_heads // t_v, heads, padded),
            "k_mean": f.k_mean,
            "v_mean": f.v_mean,
        }
        for name, x in maps.items():
            self.register_buffer(name, x, persistent=False)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output_shape: torch.Size | None = None,
        output_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Attention over latents; see vLLM's `Attention.forward`. All are (tokens, heads width)."""
        n, h, d = query.shape[0], self.model_heads, self.model_width
        q, k, v = query.view(n, h, self.groups, d), key.view(n, h, d), value.view(n, h, d)
        if self.has_order:
            q, k, v = (x.index_select(1, self.order) for x in (q, k, v))
        if self.k_mean is not None:
            k = k - self.k_mean
        if self.v_mean is not None:
            v = v - self.v_mean
        q = torch.einsum("nhgd,hdr->nhgr", q, self.query_map)
        k, v = (
            torch.einsum("nkd,kdr->nkr", x.reshape(n, self.num_kv_heads, -1), down)
            for x, down in ((k, self.k_down), (v, self.v_down))
        )
        out = super().forward(q.reshape(n, -1), k.reshape(n, -1), v.reshape(n, -1))
        out = torch.einsum("nhgr,hrd->nhgd", out.view(n, h, self.groups, -1), self.output_map)
        if self.v_mean is not None:
            out = out + self.v_mean.unsqueeze(1)
        if self.has_order:
            out = out.index_select(1, self.back)
        return out.reshape(n, -1)


def _joint_down(down: Tensor, latents: int, heads: int, padded: int) -> Tensor:
    """The map from the model's heads, side by side, into each head of the kernel (heads, n, padded).

    Args:
        down: (latents|1, m, width), the maps into latents.
        latents: of the layer.
        heads: of the kernel, each with latents / heads latents side by side.
        padded: width of a head of the kernel.
    """
    down = down.expand(latents, -1, -1)
    rows, width = down.shape[1:]
    of_a_head = latents // heads
    joint = down.new_zeros(heads, of_a_head * rows, padded)
    for i in range(latents):
        head, slot = divmod(i, of_a_head)
        joint[head, slot * rows : (slot + 1) * rows, slot * width : (slot + 1) * width] = down[i]
    return joint


def _placed(up: Tensor, kv_heads: int, latents: int, heads: int, padded: int) -> Tensor:
    """The map of each model head out of its kernel head (h, padded, d): zero where other latents lie.

    Args:
        up: (h|1, width, d), the maps out of latents.
        kv_heads: h.
        latents: of the layer.
        heads: of the kernel.
        padded: width of a head of the kernel.
    """
    up = up.expand(kv_heads, -1, -1)
    width = up.shape[1]
    placed = up.new_zeros(kv_heads, padded, up.shape[2])
    for i in range(kv_heads):
        slot = i * latents // kv_heads % (latents // heads)
        placed[i, slot * width : (slot + 1) * width] = up[i]
    return placed
