"""Values that all packages share, and the letters that shapes are written with.

Letters: `b` sequences of a batch, `t` new tokens, `s` stored tokens, `h` KV heads, `g` query heads per KV
head, `H` query heads, `G` groups of KV heads that share a latent, `d` head dim, `r` rank, `D` model dim, `n`
layers.
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
    """The low-rank maps of one layer, into and out of the stored basis.

    With one latent per head (t = 1): k ~= (k @ k_down) @ k_up and v ~= (v @ v_down) @ v_up, and therefore
    q . k ~= (q @ k_up^T) . (k @ k_down). Otherwise every t KV heads side by side share one latent of width
    t r. A rank always counts numbers per KV head; where the width is no multiple of t it is rounded up (2 of
    3 heads of 64 are 128 numbers, rank 43). t may differ between keys and values. With t = 1, a map may have
    1 in the place of G or h: it is then shared by all heads.

    Args:
        k_down: (G|1, t d, t r_K).
        k_up: (h|1, t r_K, d).
        v_down: (G|1, t d, t r_V).
        v_up: (h|1, t r_V, d).
        order: (h), the KV heads in the order in which they are grouped; None for the model's order.
        k_mean: (h, d), subtracted from keys before they are projected and added after, in that order; None
            for none.
        v_mean: (h, d), the same for values.
        frequencies: (r_K / 2), radians per position. Given if stored keys are rotated by frequencies of their
            own, channel j together with channel j + r_K / 2. k_down then takes keys that are not rotated,
            there is no way back to the model's keys, and t is 1.
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
        """Numbers kept per KV head and token, of keys and of values, rounded up."""
        t_k, t_v = self.merge
        return -(-self.k_down.shape[-1] // t_k), -(-self.v_down.shape[-1] // t_v)

    def numbers(self, heads: int) -> int:
        """Numbers that a token takes in this layer, given its KV heads."""
        t_k, t_v = self.merge
        return heads // t_k * self.k_down.shape[-1] + heads // t_v * self.v_down.shape[-1]

    @property
    def per_head(self) -> bool:
        """Whether every head has latents of its own, in the model's rotation and without means."""
        return self.merge == (1, 1) and all(
            x is None for x in (self.order, self.k_mean, self.v_mean, self.frequencies)
        )

    @property
    def rebuilds_keys(self) -> bool:
        """Whether the model's keys can be rebuilt from what is stored. If not, stored keys can only be
        attended to.
        """
        return self.frequencies is None

    @property
    def static_numbers(self) -> int:
        """Numbers in all the maps, which are held once however many sequences are stored."""
        return sum(t.numel() for t in vars(self).values() if t is not None)

    def hadamard_rotated(self) -> Factors:
        """The same maps, with latents rotated by a block Hadamard transform.

        It spreads what is large in a few channels over all of them, which integers hold better. Keys that are
        rotated by frequencies of their own keep their channels, since those come in pairs.
        """
        # H is its own inverse, so H H between the maps changes nothing but what is stored
        k, v = (block_hadamard(down.shape[-1]).to(down) for down in (self.k_down, self.v_down))
        values = replace(self, v_down=self.v_down @ v, v_up=v @ self.v_up)
        if self.frequencies is not None:
            return values
        return replace(values, k_down=self.k_down @ k, k_up=k @ self.k_up)

    def to(self, like: Tensor) -> Factors:
        """The same factors on the device and in the dtype of `like`; indices and frequencies keep theirs."""
        cast = {
            name: t.to(like)
            for name, t in vars(self).items()
            if t is not None and name not in ("order", "frequencies")
        }
        moved = {  # to another device only
            name: t.to(like.device)
            for name, t in (("order", self.order), ("frequencies", self.frequencies))
            if t is not None
        }
        return replace(self, **cast, **moved)

    @property
    def lossless(self) -> bool:
        """Whether keys and values come back as they were: full rank, and maps that undo one another."""
        if not self.rebuilds_keys:
            return False

        def undone(down: Tensor, up: Tensor, t: int) -> bool:
            joint = torch.cat(list(up.unflatten(0, (-1, t)).transpose(0, 1)), -1)  # (G, t r, t d)
            back = down.double() @ joint.double()
            eye = torch.eye(back.shape[-1], dtype=back.dtype, device=back.device)
            return bool((back - eye).abs().max() < 1e-4)

        return undone(self.k_down, self.k_up, self.merge[0]) and undone(self.v_down, self.v_up, self.merge[1])


def identity_factors(d: int) -> Factors:
    """Maps of full rank that change nothing, shared by all heads."""
    return Factors(*(torch.eye(d).unsqueeze(0) for _ in range(4)))


@dataclass(frozen=True)
class Basis:
    """Nested maps for every rank of the keys or the values of a layer.

    Heads are taken in groups of t = `merge` side by side. Rank r is served by the first t r columns.

    Args:
        columns: (G|1, t d, t d), the map into the latent; orthonormal if `rows` is None.
        rows: (G|1, t d, t d), the map back; None for the transpose of `columns`.
        exact: (rank, columns) of ranks that were fitted on their own and replace the nested columns.
        spectrum: (G|1, d), the energy of every t columns, largest first, for rules that read energies.
        merge: t.
        mean: (h, d), subtracted before the map and added after; None for none.
        unit: only whole multiples of so many columns are taken, so that a rank that was rounded up holds
            whole heads and no more.
    """

    columns: Tensor
    rows: Tensor | None = None
    exact: tuple[tuple[int, Tensor], ...] = ()
    spectrum: Tensor | None = None
    merge: int = 1
    mean: Tensor | None = None
    unit: int = 1

    def at(self, rank: int) -> tuple[Tensor, Tensor]:
        """The maps at a rank.

        Returns:
            (down (G|1, t d, w), up (h|1, w, d)), with the width w = t rank, or the next multiple of `unit`
            below.
        """
        width = rank * self.merge // self.unit * self.unit
        down = dict(self.exact).get(rank, self.columns[..., :width])
        up = down.mT if self.rows is None else self.rows[..., :width, :]
        return down, per_head_maps(up, self.merge)


@dataclass(frozen=True)
class LayerBases:
    """The bases of one layer.

    Args:
        keys: maps of keys.
        values: maps of values.
        order: (h), the KV heads in the order in which they are grouped; None for the model's order.
    """

    keys: Basis
    values: Basis
    order: Tensor | None = None

    def at(self, rank_k: int, rank_v: int) -> Factors:
        """The maps at a rank of keys and a rank of values."""
        return Factors(
            *self.keys.at(rank_k), *self.values.at(rank_v), self.order, self.keys.mean, self.values.mean
        )


@dataclass
class LayerStatistics:
    """Second moments of one layer over the calibration text, in fp64.

    Moments are sums of outer products over tokens. `pre` and `post` mean before and after rotation.

    Args:
        tokens: number of tokens summed over.
        keys_pre: (h d, h d), joint over heads.
        keys_post: (h d, h d), joint over heads.
        queries_pre: (h, d, d), the g query heads of a KV head stacked as rows (arXiv:2512.05916).
        queries_post: (h, d, d), the same.
        values: (h d, h d), joint over heads.
        inputs: (D, D), of what the attention block reads.
        keys_pre_mean: (h d).
        keys_post_mean: (h d).
        values_mean: (h d).
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
        """The second moment (h, d, d) of each head's keys, as this layout stores them."""
        return head_blocks(self.keys_pre if layout == "pre_rope" else self.keys_post, self.heads)

    def keys_mean(self, layout: Layout) -> Tensor:
        """The mean (h d) of the keys that this layout stores."""
        return self.keys_pre_mean if layout == "pre_rope" else self.keys_post_mean

    def queries(self, layout: Layout) -> Tensor:
        """The second moment (h, d, d) of the queries that meet the keys of this layout."""
        return self.queries_pre if layout == "pre_rope" else self.queries_post

    @property
    def heads(self) -> int:
        """The number of KV heads."""
        return self.queries_pre.shape[0]


def head_blocks(joint: Tensor, heads: int) -> Tensor:
    """The diagonal blocks (h, d, d) of a joint moment (h d, h d)."""
    d = joint.shape[0] // heads
    blocks = joint.view(heads, d, heads, d).diagonal(dim1=0, dim2=2)
    return blocks.permute(2, 0, 1).contiguous()


def device_of(module: torch.nn.Module) -> torch.device:
    """The device on which a module computes.

    That is where its first weight is, or the device to which accelerate brings offloaded weights.

    Raises:
        LowkeyError: for weights without numbers.
    """
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    if device.type != "meta":
        return device
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    target = next((x for hook in hooks if (x := getattr(hook, "execution_device", None)) is not None), None)
    if target is None:
        raise LowkeyError(
            "model: its weights are on device 'meta' and hold no numbers; load the model with from_pretrained"
        )
    return torch.device(target)
