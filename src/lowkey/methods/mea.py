"""MEA's virtual heads (arXiv:2601.19611): every KV head a scalar combination of few cached ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lowkey.core.types import Basis, LayerBases, LayerStatistics
from lowkey.methods.base import Method, whole_head_numbers, whole_head_ranks
from lowkey.ops.aligning import align_heads, head_gram
from lowkey.ops.bases import principal
from lowkey.ops.commuting import spread_energy
from lowkey.ops.products import joint_moments
from lowkey.probes.layer_probe import LayerProbe


@dataclass(frozen=True)
class MEA(Method):
    """MEA's post-training compression: H' component heads are cached in place of h KV heads.

    Every KV head is a combination of the component heads, k_h ~= sum_c w_ch k'_c with scalars w; keys and
    values have component heads of their own (Eq. 10-11). A token takes H' d numbers, which is a rank of H' d
    / h per head, rounded up. Scalars commute with RoPE, so both layouts give the same components, and a query
    can be carried into them.

    Source: arXiv:2601.19611, section 5.2 and Eq. 36-38. The paper trains on 22 billion tokens afterwards. It
    chooses layers by the increase of the loss when one layer is compressed, which is
    `calibrate(judge="loss")`.

    Args:
        basis: how component heads are found.
            `weights` (default) is the paper's, without data: SVD of the flattened projections over heads.
            Components are scaled so that the mixing is orthonormal; singular values stand on neither side.
            Biases, which the paper does not have, count as the weights of one more input.
            `activations` (ours): eigenvectors of the head Gram matrix E[k_h . k_g], the best scalar mixing of
            what is cached, normalised keys included.
            `aligned` (ours): heads are first aligned, since they are determined only up to a transform that
            their reader undoes. Values are rotated by one orthogonal matrix per head, which the output
            projection undoes, and keys by one phase per frequency, which commutes with RoPE. Alignment and
            mixing are improved in turns, for every H' apart.
    """

    summary: ClassVar[str] = "KV heads as scalar combinations of few cached component heads"
    paper: ClassVar[str] = "arXiv:2601.19611"
    allocator: ClassVar[str] = "uniform"

    basis: Literal["weights", "activations", "aligned"] = "weights"

    def candidates(self, heads: int, head_dim: int, ranks: list[int]) -> list[int]:
        """Return the ranks of whole component heads."""
        return whole_head_ranks(heads, head_dim, ranks)

    def numbers_per_token(self, rank: int, heads: int, head_dim: int) -> int:
        """Return H' d, the numbers of the component heads that a rank stands for."""
        return whole_head_numbers(rank, heads, head_dim)

    def fit(self, statistics: LayerStatistics, probe: LayerProbe, ranks: list[int], seed: int) -> LayerBases:
        """Return the mixing bases of keys and of values."""
        h = statistics.heads
        d = len(statistics.values) // h
        if self.basis == "weights":
            moments = probe.white_moments(
                "pre_rope", "basis 'weights'", "use basis 'activations' or 'aligned'"
            )
        else:
            moments = joint_moments(statistics, probe.layout)
        # joint moments (h d, h d) as one (d, d) block per pair of heads: (h, h, d, d)
        keys, values = (joint.view(h, d, h, d).transpose(1, 2) for joint in moments)
        if self.basis != "aligned":
            return LayerBases(mixing_basis(head_gram(keys), d), mixing_basis(head_gram(values), d))
        # A rank r per head stands for r h / d component heads.
        counts = [r * h // d for r in self.candidates(h, d, ranks) if r < d]
        return LayerBases(aligned_basis(keys, counts, probe.rotary_dim), aligned_basis(values, counts, 0))


def mixing_basis(gram: Tensor, d: int) -> Basis:
    """Return the basis of the best scalar mixing of heads.

    Args:
        gram: head Gram matrix (h, h).
        d: head dim.

    Returns:
        Columns in units of d: one whole component head after another, the one with most energy first.
    """
    mixing, energy = principal(gram)
    # Component c takes channel j of every head, times one scalar for each head.
    columns = torch.kron(mixing.contiguous(), torch.eye(d, dtype=mixing.dtype))
    return Basis(
        columns.unsqueeze(0).float(), spectrum=spread_energy(energy.unsqueeze(0), d), merge=len(gram), unit=d
    )


def aligned_basis(blocks: Tensor, counts: list[int], rotary: int) -> Basis:
    """Return the basis of aligned and mixed heads.

    Args:
        blocks: joint second moments (h, h, d, d), one block per pair of heads.
        counts: numbers of component heads to serve; each gets an alignment and a mixing of its own, unless
            mixing without alignment keeps more energy.
        rotary: channels of a head that are rotated; 0 lets any orthogonal matrix align heads.
    """
    h, d = len(blocks), blocks.shape[-1]
    unaligned = principal(head_gram(blocks))[1]
    # kept: energy that n component heads keep together; h of them keep all
    exact, kept = [], {h: float(unaligned.sum())}
    for n in counts:
        alignments, mixing, aligned = align_heads(blocks, n, rotary)
        kept[n] = max(aligned, float(unaligned[:n].sum()))
        # Otherwise the columns of plain mixing, which serve every rank, are better at this one.
        if aligned == kept[n]:
            columns = (alignments.unsqueeze(2) * mixing[:, None, :, None]).flatten(0, 1).flatten(1)
            exact.append((-(-n * d // h), columns.unsqueeze(0).float()))
    spectrum = spread_energy(_energy_per_head(kept), d)
    return replace(mixing_basis(head_gram(blocks), d), exact=tuple(exact), spectrum=spectrum)


def _energy_per_head(kept: dict[int, float]) -> Tensor:
    """Return what each component head adds, (1, h), from the energy that n component heads keep together.

    Where only the sum of several is known, each of them gets an equal part.
    """
    energies: list[float] = []
    for n in sorted(kept):
        more, below = n - len(energies), sum(energies)
        energies += [max(0.0, kept[n] - below) / more] * more
    return torch.tensor([energies], dtype=torch.float64)
