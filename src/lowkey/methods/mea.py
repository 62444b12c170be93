"""Virtual heads (arXiv:2601.19611, section 5.2): few component heads are cached, and every KV head is a
scalar combination of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lowkey.core.types import Basis, LayerBases, LayerStatistics
from lowkey.methods.base import Method, whole_head_numbers, whole_head_ranks
from lowkey.ops.aligning import alignment, head_gram
from lowkey.ops.bases import principal
from lowkey.ops.commuting import spread_energy
from lowkey.ops.products import joint_moments
from lowkey.probes.layer_probe import LayerProbe


@dataclass(frozen=True)
class MEA(Method):
    """H' component heads stand for h KV heads, keys and values apart (Eq. 10-11): H' d numbers, and a rank of
    H' d / h, rounded up.

    basis: `weights` is the paper's, without data: the SVD over heads of the flattened projections (Eq. 36-38;
    components are scaled to an orthonormal mixing, so that the singular values stand in neither side; biases,
    of which the paper has none, count as the weights of one more input). `activations` (ours): eigenvectors
    of the head Gram E[k_h . k_g], the best scalar mixing of what is cached, normed keys included. `aligned`
    (ours): heads are first turned towards one another, values by an orthogonal matrix each, which the output
    projection undoes, and keys by a phase per frequency, which commutes with RoPE; then mixed. Turns and
    mixing are found in turns, per H'. Scalars and phases commute with RoPE, so that either layout gives the
    same components, and a query can be carried into them. Layers are as sensitive as
    `calibrate(judge="loss")` finds them, the paper's measure; the paper trains on 22 B tokens afterwards.
    """

    summary: ClassVar[str] = "KV heads as scalar combinations of few cached component heads"
    paper: ClassVar[str] = "arXiv:2601.19611"
    allocator: ClassVar[str] = "uniform"

    basis: Literal["weights", "activations", "aligned"] = "weights"

    def candidates(self, heads: int, head_dim: int, ranks: list[int]) -> list[int]:
        return whole_head_ranks(heads, head_dim, ranks)

    def numbers_per_token(self, rank: int, heads: int, head_dim: int) -> int:
        return whole_head_numbers(rank, heads, head_dim)

    def fit(self, statistics: LayerStatistics, probe: LayerProbe, ranks: list[int], seed: int) -> LayerBases:
        h = statistics.heads
        d = len(statistics.values) // h
        if self.basis == "weights":
            moments = probe.white_moments(
                "pre_rope", "basis 'weights'", "use basis 'activations' or 'aligned'"
            )
        else:
            moments = joint_moments(statistics, probe.layout)
        blocks = [joint.view(h, d, h, d).transpose(1, 2) for joint in moments]
        if self.basis != "aligned":
            keys, values = (mixing_basis(head_gram(b), d) for b in blocks)
            return LayerBases(keys, values)
        counts = [r * h // d for r in self.candidates(h, d, ranks) if r < d]
        keys, values = (
            aligned_basis(b, counts, rotary) for b, rotary in zip(blocks, (probe.rotary_dim, 0), strict=True)
        )
        return LayerBases(keys, values)


def mixing_basis(gram: Tensor, d: int) -> Basis:
    """The eigenvectors of the head Gram (h, h), whole component heads one after another."""
    mixing, energy = principal(gram)
    columns = torch.kron(mixing.contiguous(), torch.eye(d, dtype=mixing.dtype))
    return Basis(
        columns.unsqueeze(0).float(), spectrum=spread_energy(energy.unsqueeze(0), d), merge=len(gram), unit=d
    )


def aligned_basis(blocks: Tensor, counts: list[int], rotary: int) -> Basis:
    """For every count of component heads turns and a mixing of its own, where they keep more than mixing
    alone does.
    """
    h, d = len(blocks), blocks.shape[-1]
    alone = principal(head_gram(blocks))[1]
    exact, kept = [], {h: float(alone.sum())}
    for n in counts:
        turns, mixing, held = alignment(blocks, n, rotary)
        kept[n] = max(held, float(alone[:n].sum()))
        if held == kept[n]:
            columns = (turns.unsqueeze(2) * mixing[:, None, :, None]).flatten(0, 1).flatten(1)
            exact.append((-(-n * d // h), columns.unsqueeze(0).float()))
    return replace(
        mixing_basis(head_gram(blocks), d), exact=tuple(exact), spectrum=spread_energy(_energies(kept), d)
    )


def _energies(kept: dict[int, float]) -> Tensor:
    """(1, h): what each component head adds, from what so many keep together; evenly where only the sum of
    several is known.
    """
    found: list[float] = []
    for n in sorted(kept):
        more, below = n - len(found), sum(found)
        found += [max(0.0, kept[n] - below) / more] * more
    return torch.tensor([found], dtype=torch.float64)
