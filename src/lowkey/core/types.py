"""Letters, shared values and the one exception users see.

Letters: `b` batch, `t` new tokens, `s` stored tokens, `h` KV heads, `g` query heads per KV head, `d` head
dim, `r` rank, `D` model dim, `n` layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowkey.core.budget import Budget as Budget
from lowkey.core.errors import LowkeyError as LowkeyError
from lowkey.core.head_groups import block_hadamard, per_head_maps
from lowkey.core.layouts import LAYOUTS as LAYOUTS
from lowkey.core.layouts import Heads as Heads
from lowkey.core.layouts import Layout as Layout


@dataclass(frozen=True)
class Factors:
    """One layer's maps into and out of the stored basis. Every `t` KV heads side by side share one latent of
    width t r, so that r is the rank per head (rounded up where the width is no multiple of t: 2 of 3 heads of
    64 are 128 numbers, rank 43); a `1` in the place of `G` or `h`, possible when t is 1, means shared by all
    KV heads.

    With t = 1: `k ~= (k @ k_down) @ k_up` and `v ~= (v @ v_down) @ v_up`, so `q . k ~= (q @ k_up^T) . (k @
    k_down)`. k_down (G|1, t d, t r_K), k_up (h|1, t r_K, d), v_down (G|1, t d, t r_V), v_up (h|1, t r_V, d);
    t may differ between keys and values. order (h): the KV heads in the order in which they are grouped, or
    None for their own. k_mean, v_mean (h, d): what is taken off before, and put back after, in that order; or
    None. frequencies (r_K / 2): by which stored keys are rotated, channel j together with channel j + r_K /
    2, where these are not the model's own; k_down then takes keys that are not rotated, and there is no way
    back to the model's keys. t is 1.
    """

    k_down: Tensor
    k_up: Tensor
    v_down: Tensor
    v_up: Tensor
    order: Tensor | None = None
    k_mean: Tensor | None = None
    v_mean: Tensor | None = None
    frequencies: Tensor | None = None

    @property
    def merge(self) -> tuple[int, int]:
        """How many KV heads share one latent, of keys and of values."""
        d = self.k_up.shape[-1]
        return self.k_down.shape[-2] // d, self.v_down.shape[-2] // d

    @property
    def ranks(self) -> tuple[int, int]:
        """Numbers kept per KV head and token, rounded up."""
        t_k, t_v = self.merge
        return -(-self.k_down.shape[-1] // t_k), -(-self.v_down.shape[-1] // t_v)

    def numbers(self, heads: int) -> int:
        """Numbers that a token takes in this layer, of so many KV heads."""
        t_k, t_v = self.merge
        return heads // t_k * self.k_down.shape[-1] + heads // t_v * self.v_down.shape[-1]

    @property
    def per_head(self) -> bool:
        """Whether every head has latents of its own, in the model's rotation, and nothing is centred."""
        return self.merge == (1, 1) and all(
            x is None for x in (self.order, self.k_mean, self.v_mean, self.frequencies)
        )

    @property
    def static_numbers(self) -> int:
        """Numbers in all the maps, which one more user does not need again."""
        return sum(t.numel() for t in vars(self).values() if t is not None)

    def hadamard_rotated(self) -> Factors:
        """The same maps with latents turned by a block Hadamard transform; not those of keys that are rotated
        as they are stored.
        """
        k, v = (block_hadamard(down.shape[-1]).to(down) for down in (self.k_down, self.v_down))
        values = replace(self, v_down=self.v_down @ v, v_up=v @ self.v_up)
        return (
            values
            if self.frequencies is not None
            else replace(values, k_down=self.k_down @ k, k_up=k @ self.k_up)
        )

    def to(self, like: Tensor) -> Factors:
        """The same factors on the device and in the dtype of `like`."""
        moved = {
            name: t.to(like)
            for name, t in vars(self).items()
            if t is not None and name not in ("order", "frequencies")
        }
        kept = {
            name: t.to(like.device)
            for name, t in (("order", self.order), ("frequencies", self.frequencies))
            if t is not None
        }
        return replace(self, **moved, **kept)

    @property
    def lossless(self) -> bool:
        """Whether keys and values come back as they were: latents of full rank, of maps that undo one
        another.
        """
        if self.frequencies is not None:
            return False

        def undone(down: Tensor, up: Tensor, together: int) -> bool:
            joint = torch.cat(list(up.unflatten(0, (-1, together)).transpose(0, 1)), -1)  # (G, t r, t d)
            back = down.double() @ joint.double()
            return bool(
                (back - torch.eye(back.shape[-1], dtype=back.dtype, device=back.device)).abs().max() < 1e-4
            )

        return undone(self.k_down, self.k_up, self.merge[0]) and undone(self.v_down, self.v_up, self.merge[1])


def identity_factors(d: int) -> Factors:
    """Of full rank, shared by all heads."""
    return Factors(*(torch.eye(d).unsqueeze(0) for _ in range(4)))


@dataclass(frozen=True)
class Basis:
    """Nested maps for every rank: of t = `merge` heads side by side, the first t r columns serve rank r.
    `exact` holds ranks fitted alone.

    columns (G|1, t d, t d), orthonormal when `rows` is None, else `rows` (G|1, t d, t d) maps back; mean (h,
    d) or None.
    unit: only whole multiples of so many columns are taken, so that a rank that is rounded up holds whole
    heads and no more.
    """

    columns: Tensor
    rows: Tensor | None = None
    exact: tuple[tuple[int, Tensor], ...] = ()
    # (G|1, d) energies of t columns each, largest first; what energy rules read
    spectrum: Tensor | None = None
    merge: int = 1
    mean: Tensor | None = None
    unit: int = 1

    def at(self, rank: int) -> tuple[Tensor, Tensor]:
        """(down, up) of shapes (G|1, t d, w) and (h|1, w, d), with the width w = t rank, or the next multiple
        of `unit` below.
        """
        width = rank * self.merge // self.unit * self.unit
        down = dict(self.exact).get(rank, self.columns[..., :width])
        up = down.mT if self.rows is None else self.rows[..., :width, :]
        return down, per_head_maps(up, self.merge)


@dataclass(frozen=True)
class LayerBases:
    """order (h): KV heads in the order in which they are grouped, or None for their own."""

    keys: Basis
    values: Basis
    order: Tensor | None = None

    def at(self, rank_k: int, rank_v: int) -> Factors:
        return Factors(
            *self.keys.at(rank_k), *self.values.at(rank_v), self.order, self.keys.mean, self.values.mean
        )


@dataclass
class LayerStatistics:
    """Second moments of one layer over the calibration text, and how many tokens were seen.

    Sums of outer products in fp64: keys_pre, keys_post, values (h d, h d) jointly over heads; queries_pre and
    queries_post (h, d, d), the g query heads of a KV head stacked as rows (arXiv:2512.05916); inputs (D, D)
    of the attention block. Means: keys_pre_mean, keys_post_mean and values_mean (h d).
    """

    tokens: int
    keys_pre: Tensor
    keys_post: Tensor
    queries_pre: Tensor
    queries_post: Tensor
    values: Tensor
    inputs: Tensor
    keys_pre_mean: Tensor
    keys_post_mean: Tensor
    values_mean: Tensor

    def keys(self, layout: Layout) -> Tensor:
        """Per-head (h, d, d) second moment of the keys that this layout stores."""
        return head_blocks(self.keys_pre if layout == "pre_rope" else self.keys_post, self.heads)

    def keys_mean(self, layout: Layout) -> Tensor:
        return self.keys_pre_mean if layout == "pre_rope" else self.keys_post_mean

    def queries(self, layout: Layout) -> Tensor:
        return self.queries_pre if layout == "pre_rope" else self.queries_post

    @property
    def heads(self) -> int:
        return self.queries_pre.shape[0]


def head_blocks(joint: Tensor, heads: int) -> Tensor:
    """The (h, d, d) diagonal blocks of a joint (h d, h d) moment."""
    d = joint.shape[0] // heads
    blocks = joint.view(heads, d, heads, d).diagonal(dim1=0, dim2=2)
    return blocks.permute(2, 0, 1).contiguous()


def device_of(module: torch.nn.Module) -> torch.device:
    """Where a module computes: where its first weight is, or where accelerate brings it from the place to
    which it was offloaded.
    """
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    if device.type != "meta":
        return device
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    found = next((x for hook in hooks if (x := getattr(hook, "execution_device", None)) is not None), None)
    if found is None:
        raise LowkeyError(
            "model: its weights are on device 'meta' and hold no numbers; load the model with from_pretrained"
        )
    return torch.device(found)
