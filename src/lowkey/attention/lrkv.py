"""Low-rank key-value attention (arXiv:2601.11471): keys and values of each head are shared ones plus a
low-rank part of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .base import (
    POSITION_NUMBERS,
    Attention,
    LayerCall,
    as_one_head,
    by_rows,
    split_into_heads,
    with_positions,
    without_positions,
)
from .configuration_lowkey import LowkeyConfig
from .costs import Costs, projection_costs
from .parts import in_fp32_or_wider, norm_folded, weight_of
from .rotary import rotated_by


class LowRankKV(Attention):
    """Low-rank key-value attention: a kind between grouped-query and multi-head attention.

    W_K of head i is `W_shared[group of i] + U_i B_i^T`, with U_i (D, r) and B_i (d, r); values likewise.
    Stores shared keys and values (G d numbers each) and latents x U_i (H r each): 2 (G d + H r) numbers per
    token. Values are read without being rebuilt in every mode. Keys depend on `lrkv_rope_mode`:

    - `full`: the paper's model, keys rotated at full width. The paper's identity "rotated latents times B^T"
      does not hold for rotation by pairs, since the two do not commute. So stored keys are unrotated, and are
      rebuilt and rotated at every read: this is small at rest, but not fast. Masks leave gaps and positions
      jump, so only a token itself can say where it stands: its position is stored too, as `POSITION_NUMBERS`
      more numbers. Frequencies that follow the length (dynamic, longrope) are those of the newest token, for
      all keys.
    - `latent` (ours): scores are rotated shared keys . rotated queries + rotated latents . rotated (query
      B_i). This is another model than the paper's, exact without rebuilding keys. r must be even. Training
      attends over concatenated vectors of d + r.
    - `partial` (ours): only the last qk_rope_head_dim dimensions of the shared key are rotated, and B_i does
      not reach them. It is exact without rebuilding, too.

    With `decode` = `auto`, a single new token is read absorbed, because keys and values of all heads would be
    written out for it alone. qk_norm norms rebuilt keys in mode `full`; otherwise shared keys and latents,
    each by itself.

    Source: arXiv:2601.11471. G > 1 is implied by the paper, but not evaluated there.
    """

    def __init__(self, config: LowkeyConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        d, rank, self.mode = config.head_dim, config.lrkv_rank, config.lrkv_rope_mode
        shared = config.num_key_value_heads * d
        self.rank, self.reach, self.rebuilds = rank, _reach(config), _rebuilds(config)
        self.stores_positions = self.rebuilds
        self.num_key_value_groups = 1  # keys and values are written out for every query head
        self.k_proj, self.v_proj = self.linear(shared), self.linear(shared)
        self.k_norm = self.norm(d)
        if rank:
            self.k_down, self.v_down = (self.linear(self.heads * rank, bias=False) for _ in range(2))
            self.k_up = nn.Parameter(torch.empty(self.heads, rank, self.reach))
            self.v_up = nn.Parameter(torch.empty(self.heads, rank, d))
            self.latent_norm = nn.Identity() if self.mode == "full" else self.norm(rank)

    def project(self, hidden: Tensor, query: Tensor, call: LayerCall) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, and what the new tokens store; see `Attention.project`."""
        groups = self.config.num_key_value_heads
        keys, values = (split_into_heads(part(hidden), groups) for part in (self.k_proj, self.v_proj))
        # Keys that are rebuilt at every read are normed and rotated then.
        if not self.rebuilds:
            keys = rotated_by(self.k_norm(keys), call.rope)
        if not self.rank:
            return rotated_by(query, call.rope), as_one_head(keys), as_one_head(values)
        latents = self.latent_norm(split_into_heads(self.k_down(hidden), self.heads))
        if call.rope.narrow is not None:  # mode `latent`: both meet rotated, at the width of the latent
            latents = rotated_by(latents, call.rope.narrow)
            carried = rotated_by(query @ self.k_up.mT, call.rope.narrow)
            query = torch.cat((rotated_by(query, call.rope), carried), -1)
        else:
            query = rotated_by(query, call.rope)
        stored = as_one_head(keys, latents)
        if self.rebuilds and call.cached:
            assert call.positions is not None
            stored = with_positions(stored, call.positions)
        return query, stored, as_one_head(values, split_into_heads(self.v_down(hidden), self.heads))

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, call: LayerCall
    ) -> tuple[Tensor, Tensor | None]:
        """Attention over everything stored; see `Attention.attend`."""
        rotation = call.rope[:2]
        if self.rebuilds and call.cached:
            keys, positions = without_positions(keys)
            rotation = call.rope.at(positions, keys)
        shared_k, latent_k = self._parts(keys)
        shared_v, latent_v = self._parts(values)
        absorbed = query.shape[2] == 1 if self.config.decode == "auto" else self.config.decode == "absorbed"
        if self.rebuilds:
            keys = rotated_by(self.k_norm(self._every_head(shared_k, latent_k, "k")), rotation)
            if absorbed:
                return self._mixed(query @ keys.mT, shared_v, latent_v, call)
            return self.dense(query, keys, self._every_head(shared_v, latent_v, "v"), call)
        if absorbed and self.rank:
            return self._mixed(self._scores(query, shared_k, latent_k), shared_v, latent_v, call)
        if self.mode == "latent" and self.rank:
            return self._side_by_side(query, (shared_k, latent_k), (shared_v, latent_v), call)
        return self.dense(
            query, self._every_head(shared_k, latent_k, "k"), self._every_head(shared_v, latent_v, "v"), call
        )

    def _parts(self, stored: Tensor) -> tuple[Tensor, Tensor]:
        """Split what is stored (b, 1, s, G d + H r) into the shared part (b, G, s, d) and latents (b, H, s,
        r).
        """
        edge = self.config.num_key_value_heads * self.config.head_dim
        shared = split_into_heads(stored[:, 0, :, :edge], self.config.num_key_value_heads)
        latents = stored[:, 0, :, edge:]
        return shared, split_into_heads(latents, self.heads) if self.rank else latents.unsqueeze(1)

    def _every_head(self, shared: Tensor, latents: Tensor, which: str) -> Tensor:
        """Keys (`which` = `k`) or values (`v`) of all heads, written out (b, H, s, d)."""
        every = shared.repeat_interleave(self.heads // shared.shape[1], 1)
        if not self.rank:
            return every
        if which == "v":
            return every + latents @ self.v_up
        own = latents @ self.k_up
        if self.reach == every.shape[-1]:
            return every + own
        return torch.cat((every[..., : self.reach] + own, every[..., self.reach :]), -1)

    def _scores(self, query: Tensor, shared: Tensor, latents: Tensor) -> Tensor:
        """Scores (b, H, t, s) without rebuilding keys."""
        d = shared.shape[-1]
        # In mode `latent` `project` has carried and rotated the query already.
        carried = query[..., d:] if self.mode == "latent" else query[..., : self.reach] @ self.k_up.mT
        # Query heads of a shared head are rows of one product.
        grouped = query[..., :d].unflatten(1, (shared.shape[1], -1))
        first = by_rows(grouped.flatten(2, 3), shared.mT).unflatten(2, grouped.shape[2:4]).flatten(1, 2)
        return first + by_rows(carried, latents.mT)

    def _mixed(
        self, scores: Tensor, shared: Tensor, latents: Tensor, call: LayerCall
    ) -> tuple[Tensor, Tensor]:
        """Outputs of heads from unscaled scores, without rebuilding values."""
        weights = self.weights(scores, call)
        grouped = weights.unflatten(1, (shared.shape[1], -1))
        first = by_rows(grouped.flatten(2, 3), shared).unflatten(2, grouped.shape[2:4]).flatten(1, 2)
        return (first + by_rows(weights, latents) @ self.v_up).transpose(1, 2), weights

    def _side_by_side(
        self, query: Tensor, keys: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor], call: LayerCall
    ) -> tuple[Tensor, Tensor | None]:
        """Attention over vectors of d + r: the shared part beside the latent."""
        groups = self.heads // keys[0].shape[1]
        k, v = (
            torch.cat((shared.repeat_interleave(groups, 1), latents), -1)
            for shared, latents in (keys, values)
        )
        out, weights = self.dense(query, k, v, call)
        # the output has d channels of shared values, and r of latents that the up-map brings to d
        d = self.config.head_dim
        return out[..., :d] + torch.einsum("bthr,hrd->bthd", out[..., d:], self.v_up), weights

    def effective(self) -> tuple[Tensor, Tensor]:
        """Maps to the keys and values of each query head. Under qk_norm in the modes `latent` and `partial`,
        the shared part and the latents are divided by norms of their own, which are left out.
        """
        groups = self.config.num_key_value_heads
        maps = norm_folded(weight_of(self.k_proj, groups), self.k_norm), weight_of(self.v_proj, groups)
        k, v = (shared.repeat_interleave(self.heads // groups, 0) for shared in maps)
        own = self.residuals()
        return (k, v) if own is None else (k + own[0], v + own[1])

    def residuals(self) -> tuple[Tensor, Tensor] | None:
        """B_i U_i^T of keys, zero in dimensions it does not reach, and of values, (H, d, D) each; None at
        rank 0.
        """
        if not self.rank:
            return None
        down_k, down_v = (weight_of(part, self.heads) for part in (self.k_down, self.v_down))
        keys = in_fp32_or_wider(self.k_up).mT @ norm_folded(down_k, self.latent_norm)
        keys = nn.functional.pad(keys, (0, 0, 0, self.config.head_dim - self.reach))
        if self.mode == "full":
            keys = norm_folded(keys, self.k_norm)
        return keys, in_fp32_or_wider(self.v_up).mT @ down_v

    def initialize(self) -> None:
        """Start the low-rank part with lrkv_init_scale times the norm of the shared part. Neither of its
        factors is zero.
        """
        if self.rank:
            for up in (self.k_up, self.v_up):
                init.normal_(up, std=self.config.lrkv_init_scale / self.rank**0.5)

    @staticmethod
    def costs(config: LowkeyConfig) -> Costs:
        """What one layer takes."""
        heads, groups, d, r, hidden = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.lrkv_rank,
            config.hidden_size,
        )
        parameters, token = projection_costs(config, d, d)
        shared, down = 2 * hidden * groups * d, 2 * hidden * heads * r
        up_k, up_v = heads * r * _reach(config), heads * r * d
        norms = (d + (r if config.lrkv_rope_mode != "full" else 0)) if config.qk_norm else 0
        biases = 2 * groups * d if config.attention_bias else 0
        stored = 2 * (groups * d + heads * r) + (POSITION_NUMBERS if _rebuilds(config) else 0)
        total = parameters + shared + down + up_k + up_v + norms + biases
        token, up = token + shared + down, up_k + up_v
        plain, wide, mode = 2 * heads * d, 2 * heads * (d + r), config.lrkv_rope_mode
        # Up-maps act on queries and outputs where latents are read, and on every stored token where keys or
        # values are written out.
        whole = wide if mode == "latent" or config.decode == "absorbed" else plain
        if mode == "latent" or (mode == "partial" and config.decode != "expanded"):
            return Costs(total, stored, stored, token + up, whole, token + up, wide)
        if config.decode == "expanded":
            return Costs(total, stored, stored, token + up, whole, token, plain + up)
        return Costs(total, stored, stored, token + up, whole, token + up_v, up_k + heads * (2 * d + r))


def _rebuilds(config: LowkeyConfig) -> bool:
    """Whether keys are stored unrotated and must be rebuilt to be read."""
    return config.lrkv_rope_mode == "full" and config.lrkv_rank > 0


def _reach(config: LowkeyConfig) -> int:
    """Dimensions of a key head that its low-rank part reaches."""
    return (
        config.head_dim - config.qk_rope_head_dim if config.lrkv_rope_mode == "partial" else config.head_dim
    )
