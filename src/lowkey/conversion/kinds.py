"""What the weights of one layer's attention become, for each kind of attention.

Vectors are rows, and heads are (heads, d, inputs): keys = [inputs, 1] @ k[h].T.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowkey.attention import LowkeyConfig
from lowkey.attention.mla import temperature
from lowkey.conversion.gauge import aligned_weights, averaged_energy, every, joint, mixed_energy
from lowkey.conversion.source import Weights
from lowkey.core.options import Checked, option
from lowkey.core.types import LowkeyError
from lowkey.ops.aligning import head_gram
from lowkey.ops.bases import principal
from lowkey.ops.commuting import commuting_basis
from lowkey.ops.products import square_root

HEAD_POOLINGS = ("mean", "first")
BASES = ("weights", "aligned")
FREQUENCIES = ("high", "spread")
POOLING = ("gqa", "mqa", "lrkv")
# Added to a moment, as a share of the mean of its diagonal: so little that it moves nothing that was seen.
MOMENT_RIDGE = 1e-12

Named = dict[str, Tensor]


@dataclass(frozen=True)
class ConversionOptions(Checked):
    """How heads become fewer.

    Args:
        heads: what stands for a group of heads (`gqa`, `mqa`, the shared heads of `lrkv`): their `mean`
            (default) or the `first`.
        basis: `weights`, heads as they are (default), or `aligned` (ours), heads that are aligned first,
            which changes nothing the source computes.
        frequencies: frequencies of a rotated slice that is narrower than a head: `high`, the highest of the
            source, with a smaller base (default), or `spread` over all of them, with its base.
    """

    heads: str = option("mean", choices=HEAD_POOLINGS)
    basis: str = option("weights", choices=BASES)
    frequencies: str = option("high", choices=FREQUENCIES)


@dataclass(frozen=True)
class RotaryFrequencies:
    """Rotary frequencies of the source and of the new model.

    Args:
        source: angles per position (d / 2) of the source's channel pairs.
        narrow: angles per position (p / 2) of the channel pairs that the new model rotates at a width of its
            own.
        scaling: factor that the source's rotation multiplies a product of two vectors with.
    """

    source: Tensor
    narrow: Tensor
    scaling: float

    def channels(self) -> tuple[Tensor, Tensor]:
        """Which channels of the source a narrow slice keeps.

        The highest frequencies are the same at any width, in every kind of scaling. Spread frequencies are
        the same where the width divides the head dim, unless YaRN has changed some of them by their place.

        Returns:
            Channels whose frequencies are nearest to the narrow ones, first and second halves of pairs one
            after the other, and all other channels.

        Raises:
            LowkeyError: two narrow frequencies are nearest to the same one.
        """
        # Frequencies are spaced geometrically, so the nearest is nearest in logarithm.
        gaps = (self.source.log().unsqueeze(0) - self.narrow.log().unsqueeze(1)).abs()
        pairs = gaps.argmin(1) if len(self.narrow) else torch.zeros(0, dtype=torch.long)
        if len(pairs.unique()) < len(pairs):
            raise LowkeyError(
                f"a rotated slice of width {2 * len(pairs)}: two of its frequencies are nearest to the same "
                "one; give another width"
            )
        others = torch.tensor(
            [f for f in range(len(self.source)) if f not in pairs.tolist()], dtype=torch.long
        )
        return torch.cat([pairs, pairs + len(self.source)]), torch.cat([others, others + len(self.source)])


@dataclass(frozen=True)
class Layer:
    """What a conversion reads.

    Args:
        weights: the source's attention.
        config: the new configuration of this layer.
        options: how heads become fewer.
        rope: rotary frequencies.
        moment: second moment (D + 1, D + 1) of the attention's inputs and a constant 1; None for white
            inputs.
        gated: whether more than a linear map follows attention.
    """

    weights: Weights
    config: LowkeyConfig
    options: ConversionOptions
    rope: RotaryFrequencies
    moment: Tensor | None
    gated: bool

    @property
    def inputs(self) -> Tensor | None:
        """The moment without the constant."""
        return None if self.moment is None else self.moment[:-1, :-1]


def low_rank(weight: Tensor, moment: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """The best low-rank factors of projections.

    Under white inputs this is the truncated SVD of `weight`. Under a second moment M it is that of weight
    M^1/2, and the map back is exact without an inverse, since the best subspace is spanned by eigenvectors of
    weight M weight^T.

    Args:
        weight: projections (*b, n, D).
        moment: second moment (D, D) of the inputs; None for white ones.
        rank: the rank; past n, factors are zero.

    Returns:
        `down` (*b, rank, D) and `up` (*b, rank, n): x @ down.T @ up is the best approximation of x @
        weight.T.

    Source: arXiv:2407.21118, as a PCA of outputs.
    """
    # The eigenvectors of the Gram matrix of outputs, or of inputs where these are fewer.
    if weight.shape[-2] > weight.shape[-1]:
        columns = _tall(weight, moment)[..., :rank]
    else:
        gram = weight @ weight.mT if moment is None else weight @ moment @ weight.mT
        columns = principal(gram)[0][..., :rank]
    missing = (0, 0, 0, rank - columns.shape[-1])
    return torch.nn.functional.pad(columns.mT @ weight, missing), torch.nn.functional.pad(columns.mT, missing)


def _tall(weight: Tensor, moment: Tensor | None) -> Tensor:
    """The same columns (*b, n, D) where there are more outputs than inputs, from the smaller Gram matrix,
    that of M^1/2 weight^T. Directions that the moment has not seen come last, but are there.
    """
    if moment is not None:
        seen = moment + MOMENT_RIDGE * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
        weight = weight @ square_root(seen.unsqueeze(0))[0]
    return torch.linalg.qr(weight @ principal(weight.mT @ weight)[0]).Q


def pooled_heads(heads: Tensor, groups: int, form: str) -> Tensor:
    """One head for each group: (heads, ...) to (groups, ...)."""
    split = heads.unflatten(0, (groups, -1))
    return split.mean(1) if form == "mean" else split[:, 0]


# -- what all have


def queries_and_output(layer: Layer, q: Tensor, o_bias: Tensor) -> Named:
    """Weights of queries and of the output projection."""
    low = layer.config.q_lora_rank is not None
    named = linear(f"q_proj{'.up' if low else ''}", q, layer.config.attention_bias)
    named["o_proj.weight"] = layer.weights.o.transpose(0, 1).flatten(1)
    return named | ({"o_proj.bias": o_bias} if layer.config.attention_bias else {})


def linear(name: str, heads: Tensor, bias: bool) -> Named:
    """Weights of a projection, by name, from heads (heads, d, inputs + 1)."""
    rows = heads.flatten(0, 1)
    return {f"{name}.weight": rows[:, :-1], **({f"{name}.bias": rows[:, -1]} if bias else {})}


def rotated_slice(heads: Tensor, groups: int, kept: Tensor, moment: Tensor | None) -> tuple[Tensor, Tensor]:
    """A rotated key slice that stands for some channels of a group's heads.

    For each frequency it is the complex combination of the heads that captures most of them. It commutes with
    rotation, so that the query of a head is carried into the slice by the transform of that head: key ~=
    slice @ transform^T.

    Args:
        heads: key heads (heads, d, n).
        groups: number of groups.
        kept: the channels that are kept, e of them.
        moment: second moment of the inputs, or None.

    Returns:
        `transform` (heads, d, e) and `slices` (groups, e, n).

    Source: TransMLA, arXiv:2502.07864, at freqfold 1.
    """
    d, transforms, slices = heads.shape[1], [], []
    for group in heads.unflatten(0, (groups, -1)):
        gram = joint(group, moment).transpose(1, 2).flatten(2).flatten(0, 1)
        transform = commuting_basis(gram.unsqueeze(0), len(group), d)[0][0, :, :d].unflatten(0, (-1, d))[
            ..., kept
        ]
        transforms.append(transform)
        slices.append(torch.einsum("hde,hdn->en", transform, group))
    return torch.cat(transforms), torch.stack(slices)


def outward(layer: Layer, lost: Tensor) -> Tensor:
    """The output's bias with biases of values that are lost added to it. Attention weights add up to 1, so a
    bias of the values is one of the output.

    Args:
        layer: the layer.
        lost: what values lack at every token (H, d).

    Raises:
        LowkeyError: a gate or norm follows attention, so that a bias cannot be moved through it.
    """
    if lost.any() and layer.gated:
        raise LowkeyError(
            "attention_bias: values have biases and a gate or norm follows attention, so none can be moved; "
            "use 'gqa'"
        )
    return layer.weights.o_bias + torch.einsum("hod,hd->o", layer.weights.o, lost)


# -- kinds


def grouped(layer: Layer) -> Named:
    """`mha`, `gqa`, `mqa`: heads are repeated, which is exact, or pooled, biases included.

    Source: arXiv:2305.13245, mean pooling.
    """
    w, groups = _aligned(layer), layer.config.num_key_value_heads
    k, v = (pooled_heads(every(x, w.heads[0]), groups, layer.options.heads) for x in (w.k, w.v))
    layer = replace(layer, weights=w)
    bias = layer.config.attention_bias
    return queries_and_output(layer, w.q, w.o_bias) | linear("k_proj", k, bias) | linear("v_proj", v, bias)


def low_rank_kv(layer: Layer) -> Named:
    """`lrkv`: shared heads are pooled, and what is left of every head is a truncated SVD.

    Mode `full` is exact at rank d. The other modes are other models, so their start loses something. In mode
    `latent`, the latent keeps the channels of a key that it rotates at their own frequency (nearly so if the
    rank does not divide d); at rank d these are all, and the start is exact. In mode `partial` only the
    shared head has rotated channels, the `rotated_slice` of its group; all other channels, with the low-rank
    part, stay unrotated. Biases of values are kept whole; of biases of keys the means over groups are kept.

    Source: the model is arXiv:2601.11471, which trains from scratch; this start is ours.
    """
    w, d, mode = _aligned(layer), layer.config.head_dim, layer.config.lrkv_rope_mode
    layer = replace(layer, weights=w)
    # Everything is written out for query heads: each has latents of its own.
    heads, groups = w.heads[0], layer.config.num_key_value_heads
    shared_k, shared_v = (pooled_heads(every(x, heads), groups, layer.options.heads) for x in (w.k, w.v))
    left_k, left_v = (every(x, heads) - every(s, heads) for x, s in ((w.k, shared_k), (w.v, shared_v)))
    q, rank = w.q, layer.config.lrkv_rank
    down_v, up_v = low_rank(left_v[..., :-1], layer.inputs, rank)
    if mode == "latent":
        # A latent must rotate as its channels do, so it holds channels of the key itself.
        kept, _ = layer.rope.channels()
        down_k, up_k = left_k[:, kept, :-1], torch.eye(d, dtype=q.dtype)[kept].expand(heads, -1, -1)
    elif mode == "partial":
        kept, free = layer.rope.channels()
        transform, slices = rotated_slice(every(w.k, heads), groups, kept, layer.moment)
        # Unrotated channels miss the factor that the source's rotation has, so queries get it.
        q = torch.cat([q[:, free] * layer.rope.scaling, transform.mT @ q], 1)
        shared_k = torch.cat([shared_k[:, free], slices], 1)
        down_k, up_k = low_rank(left_k[:, free, :-1], layer.inputs, rank)
    else:
        down_k, up_k = low_rank(left_k[..., :-1], layer.inputs, rank)
    bias = layer.config.attention_bias
    named = (
        queries_and_output(layer, q, outward(layer, left_v[..., -1]))
        | linear("k_proj", shared_k, bias)
        | linear("v_proj", shared_v, bias)
    )
    if rank:
        named |= {
            "k_down.weight": down_k.flatten(0, 1),
            "k_up": up_k,
            "v_down.weight": down_v.flatten(0, 1),
            "v_up": up_v,
        }
    return named


def components(layer: Layer) -> Named:
    """`mea`: the truncated SVD over heads of the flattened projections, or of what they make of the inputs if
    moments are given (ours). Biases are mixed with them. Exact with as many components as KV heads, which are
    then the heads themselves.

    Source: arXiv:2601.19611, section 5.2, Eq. 36-38.
    """
    w, count = _aligned(layer), layer.config.mea_num_component_heads
    layer = replace(layer, weights=w)
    named = queries_and_output(layer, w.q, w.o_bias)
    for name, heads in (("k", w.k), ("v", w.v)):
        mixing = torch.eye(len(heads), dtype=heads.dtype)
        if count < len(heads):
            mixing = principal(head_gram(joint(heads, layer.moment)))[0][:, :count]
        composed = torch.einsum("hm,hdn->mdn", mixing, heads)
        named |= linear(f"{name}_proj", composed, layer.config.attention_bias)
        named[f"{name}_mix"] = mixing.mT
    return named


def latent(layer: Layer) -> Named:
    """`mla`: one rotated key slice for all heads, and one latent for the rest: the truncated SVD of what is
    left of all keys, and of all values.

    A model that rotates all channels has no exact form here, unless it has one KV head and the slice is as
    wide. The slice is the `rotated_slice` of all KV heads at its own frequencies. What is left of keys goes
    into the latent unrotated: with qk_nope_head_dim = d all of it; with d - e the channels whose frequencies
    the slice lacks. The latent's norm is off. Biases are kept whole and go where their weights go: those of
    the slice to the down-map, all others to the up-map.
    """
    w, (heads, stored) = layer.weights, layer.weights.heads
    d, rotated = layer.config.head_dim, layer.config.mla_rotate
    n, e, c = layer.config.qk_nope_head_dim, layer.config.qk_rope_head_dim, layer.config.kv_lora_rank
    kept, free = layer.rope.channels()
    transform, (slice_k,) = rotated_slice(w.k, 1, kept, layer.moment)
    rest_k, rest_q = (w.k - transform @ slice_k, w.q) if n == d else (w.k[:, free], w.q[:, free])
    aligned_q = every(transform, heads).mT @ w.q
    # The new model divides scores by sqrt(n + e) where the source divides by sqrt(d).
    scale = ((n + e) / d) ** 0.5 / temperature(layer.config)
    q = (
        torch.cat([rest_q * layer.rope.scaling, aligned_q * (1 if rotated else layer.rope.scaling)], 1)
        * scale
    )
    # One truncated SVD over the rest of all keys and all values, which share the latent.
    rest = torch.cat([rest_k, w.v], 1)
    down, up = low_rank(rest.flatten(0, 1)[:, :-1], layer.inputs, c)
    if layer.config.mla_latent_scale:
        down = down / (layer.config.hidden_size / c) ** 0.5
    up = every(up.mT.unflatten(0, (stored, -1)), heads)
    named = queries_and_output(layer, q, w.o_bias)
    named |= {"kv_a_proj.weight": torch.cat([down, slice_k[:, :-1]]), "kv_b_proj.weight": up.flatten(0, 1)}
    if layer.config.attention_bias:
        named["kv_a_proj.bias"] = torch.cat([slice_k.new_zeros(c), slice_k[:, -1]])
        named["kv_b_proj.bias"] = every(rest[..., -1], heads).flatten()
    return named


def _aligned(layer: Layer) -> Weights:
    """The source's heads, aligned if that was asked for and heads become fewer."""
    w, config = layer.weights, layer.config
    if layer.options.basis == "weights":
        return w
    if config.attention == "mea":
        count = config.mea_num_component_heads
        return aligned_weights(w, 1, count, mixed_energy(count), layer.moment) if count < w.heads[1] else w
    groups = config.num_key_value_heads
    return aligned_weights(w, groups, 1, averaged_energy, layer.moment) if groups < w.heads[1] else w


CONVERSIONS: dict[str, Callable[[Layer], Named]] = {
    "mha": grouped,
    "gqa": grouped,
    "mqa": grouped,
    "lrkv": low_rank_kv,
    "mea": components,
    "mla": latent,
}
