"""StiefAttention (arXiv:2601.21686): orthonormal bases that minimise the error of the whole decoder layer's output."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lowkey.ops.bases import principal_basis
from lowkey.ops.stiefel import FreeMatrix, Predictor
from lowkey.probe import Probe
from lowkey.types import Basis, Factors, Heads, LayerBases, LayerStatistics, device_of, head_blocks

BATCH = 4
WEIGHT_DECAY = 1e-4  # the paper's
DELTA = 1e-6  # early stopping, the paper's
WIDTH = 128  # of the predictor's hidden layers; the paper gives none


@dataclass(frozen=True)
class StiefAttention:
    """Bases P with P^T P = I that minimise E ||f(x) - f~(x)||_F / ||f(x)||_F over a layer's recorded inputs (Eq. 11-12).

    parametrisation: `free` trains one matrix per basis from the PCA solution, with ranks drawn at random in every step,
    so that its leading columns serve every rank (ours); `mlp` is the paper's: per candidate rank, and for keys and
    values apart (the other uncompressed), a network predicts the matrix from per-channel means and variances.
    key_bases, value_bases: `shared` over a layer's heads or `per_head`; the paper shares keys and not values.
    epochs: at most; training stops after `patience` epochs without gain on held-out windows; the paper has 5. lr: 0 is the form's
    own, 5e-3 for `mlp` (the paper's) and 1e-2 sqrt(128/d) for `free`, whose entries are of size d^-1/2.
    """

    summary: ClassVar[str] = "orthonormal bases trained on the decoder layer's output error"
    paper: ClassVar[str] = "arXiv:2601.21686"
    allocator: ClassVar[str] = "greedy"

    parametrisation: Literal["free", "mlp"] = "free"
    key_bases: Heads = "shared"
    value_bases: Heads = "per_head"
    epochs: int = 50
    patience: int = 10
    lr: float = 0.0

    def fit(self, statistics: LayerStatistics, probe: Probe, ranks: list[int], seed: int) -> LayerBases:
        fit = self._fit_free if self.parametrisation == "free" else self._fit_mlp
        return fit(statistics, probe, ranks, torch.Generator().manual_seed(seed))

    def _fit_free(self, statistics: LayerStatistics, probe: Probe, ranks: list[int], generator: torch.Generator) -> LayerBases:
        """One nested basis for keys and one for values, trained together."""
        start_k, start_v = self._start(statistics, probe)
        keys, values = FreeMatrix(start_k.columns), FreeMatrix(start_v.columns)

        def draw() -> tuple[int, int]:
            i, j = torch.randint(len(ranks), (2,), generator=generator).tolist()
            return ranks[i], ranks[j]

        judged = [(r, r) for r in ranks[1:-1:2] or ranks]
        lr = self.lr or 1e-2 * (128 / start_k.columns.shape[-1]) ** 0.5
        self._train([keys, values], lambda r: bases_of(keys(), values(), *r), draw, judged, lr, probe, generator)
        with torch.no_grad():
            return LayerBases(self._ordered(keys(), start_k), self._ordered(values(), start_v))

    def _fit_mlp(self, statistics: LayerStatistics, probe: Probe, ranks: list[int], generator: torch.Generator) -> LayerBases:
        """The paper's protocol: a predictor per rank and side, the other side left at full rank."""
        start_k, start_v = self._start(statistics, probe)
        d = start_k.columns.shape[-1]
        eye = torch.eye(d, device=device_of(probe.block)).unsqueeze(0)
        about_k = describe(statistics.keys(probe.layout), statistics.keys_mean(probe.layout), statistics, self.key_bases)
        about_v = describe(head_blocks(statistics.values, statistics.heads), statistics.values_mean, statistics, self.value_bases)

        def one(about: Tensor, pair: tuple[int, int], of: Callable[[Tensor], Factors]) -> tuple[int, Tensor]:
            predictor = Predictor(about, d, WIDTH, generator)
            self._train([predictor], lambda _: of(predictor()), lambda: pair, [pair], self.lr or 5e-3, probe, generator)
            return min(pair), predictor()[..., : min(pair)].detach().cpu()

        lower = [r for r in ranks if r < d]
        exact_k = tuple(one(about_k, (r, d), lambda p, r=r: bases_of(p, eye, r, d)) for r in lower)  # type: ignore[misc]
        exact_v = tuple(one(about_v, (d, r), lambda p, r=r: bases_of(eye, p, d, r)) for r in lower)  # type: ignore[misc]
        return LayerBases(Basis(start_k.columns, None, exact_k, start_k.spectrum), Basis(start_v.columns, None, exact_v, start_v.spectrum))

    def _start(self, statistics: LayerStatistics, probe: Probe) -> tuple[Basis, Basis]:
        keys, values = statistics.keys(probe.layout), head_blocks(statistics.values, statistics.heads)
        return principal_basis(keys, self.key_bases), principal_basis(values, self.value_bases)

    def _ordered(self, columns: Tensor, start: Basis) -> Basis:
        return Basis(columns.detach().cpu(), spectrum=start.spectrum)

    def _train(
        self,
        modules: list[nn.Module],
        factors: Callable[[tuple[int, int]], Factors],
        draw: Callable[[], tuple[int, int]],
        judged: list[tuple[int, int]],
        lr: float,
        probe: Probe,
        generator: torch.Generator,
    ) -> None:
        """AdamW with cosine annealing; keeps the parameters of the best epoch on the held-out windows, over the ranks `judged`."""
        device = device_of(probe.block)
        parameters = [p for m in modules for p in m.to(device).parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=WEIGHT_DECAY)
        steps = self.epochs * -(-probe.training // BATCH)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        best, kept, waited = self._judge(probe, factors, judged), [p.detach().clone() for p in parameters], 0
        for _ in range(self.epochs):
            for windows in probe.batches(BATCH, generator):
                optimizer.zero_grad()
                probe.error(windows, factors(draw())).log().backward()  # log: every rank pulls with its relative gain
                optimizer.step()
                schedule.step()
            error = self._judge(probe, factors, judged)
            if error < best - DELTA:
                best, kept, waited = error, [p.detach().clone() for p in parameters], 0
            elif (waited := waited + 1) == self.patience:
                break
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)

    @torch.no_grad()
    def _judge(self, probe: Probe, factors: Callable[[tuple[int, int]], Factors], ranks: list[tuple[int, int]]) -> float:
        """Mean log error: no rank outweighs the others."""
        return sum(math.log(max(probe.held_error(factors(pair)), 1e-12)) for pair in ranks) / len(ranks)


def bases_of(keys: Tensor, values: Tensor, rank_k: int, rank_v: int) -> Factors:
    k, v = keys[..., :rank_k], values[..., :rank_v]
    return Factors(k, k.mT, v, v.mT)


def describe(moments: Tensor, mean: Tensor, statistics: LayerStatistics, heads: Heads) -> Tensor:
    """Per-channel [mean; variance] (h|1, 2d), standardised so that the network's input has unit scale."""
    square = moments.diagonal(dim1=1, dim2=2) / statistics.tokens
    mean = mean.view_as(square)
    if heads == "shared":
        square, mean = square.mean(0, keepdim=True), mean.mean(0, keepdim=True)
    both = torch.cat([mean, square - mean.square()], dim=1)
    return (both - both.mean()) / both.std()
