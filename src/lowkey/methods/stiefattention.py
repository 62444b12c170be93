"""StiefAttention (arXiv:2601.21686): orthonormal bases that minimise the error of the whole decoder layer's
output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lowkey.core.options import option
from lowkey.core.types import (
    Basis,
    Factors,
    Heads,
    LayerBases,
    LayerStatistics,
    Layout,
    device_of,
    head_blocks,
)
from lowkey.methods.base import Method
from lowkey.ops.bases import principal_basis
from lowkey.ops.stiefel import Predictor, RankedMatrices
from lowkey.probes.layer_probe import LayerProbe

WINDOWS_PER_STEP = 4
KEY_BATCH = 1  # the paper's windows per step, of keys; of values it has 4
EPOCHS, PATIENCE = {"mlp": 50, "free": 100}, {"mlp": 5, "free": 30}
WEIGHT_DECAY = 1e-4  # the paper's
DELTA = 1e-6  # early stopping, the paper's
JUDGED_EVERY = 10  # epochs of `free` between two looks at the held-out windows
FLOOR = 1e-5  # a layer error below it is rounding
HIDDEN_WIDTH = 128  # of the predictor's hidden layers; the paper gives none


@dataclass(frozen=True)
class StiefAttention(Method):
    """Bases P with P^T P = I that minimise the relative error of a layer's output over its recorded inputs.

    The error is the mean over tokens of ||f_t(x) - f~_t(x)|| / ||f_t(x)||, beside the tokens that the cache
    keeps exact (`lowkey.probes.layer_probe.relative_errors`). The paper's error is of a whole window at once
    (Eq. 11-12), in which a few massive tokens alone count.

    parametrisation: `mlp` is the paper's: per candidate rank, and for keys and values apart (the other
    uncompressed), a network predicts the matrix from per-channel means and variances. `free` (ours, as good
    in a fifth of the time) trains one matrix per basis from the PCA solution, which all ranks share and from
    which each departs, keys and values together, every window at ranks of its own, drawn at random.
    key_bases, value_bases: `shared` over a layer's heads or `per_head`; the paper shares keys and not values.
    epochs: at most; training stops after `patience` epochs without gain on held-out windows. lr: peak rate. 0
    is the form's own of each: for `mlp` the paper's 50, 5 and 5e-3, for `free` 100, 30 and 5e-3 (128/d). The
    paper's ranks are 50 to 90 % of d (`--ranks`), its budget one of the (weighted) layer error; the abstract
    of its second version announces a byte budget met step by step instead, which the allocator `greedy` is.
    Rotation is not mentioned; as the projections are folded into the weights, keys are stored before it.
    """

    summary: ClassVar[str] = "orthonormal bases trained on the decoder layer's output error"
    paper: ClassVar[str] = "arXiv:2601.21686"
    allocator: ClassVar[str] = "weighted-pareto"
    layout: ClassVar[Layout] = "pre_rope"
    grid: ClassVar[str] = "50%,60%,70%,80%,90%"
    serves_any_rank: ClassVar[bool] = False

    parametrisation: Literal["mlp", "free"] = "mlp"
    key_bases: Heads = "shared"
    value_bases: Heads = "per_head"
    epochs: int = option(0, at_least=0, at_most=10**6)
    patience: int = option(0, at_least=0, at_most=10**6)
    lr: float = option(0.0, at_least=0, at_most=10)

    def fit(self, statistics: LayerStatistics, probe: LayerProbe, ranks: list[int], seed: int) -> LayerBases:
        fit = self._fit_free if self.parametrisation == "free" else self._fit_mlp
        return fit(statistics, probe, ranks, torch.Generator().manual_seed(seed))

    def _fit_free(
        self, statistics: LayerStatistics, probe: LayerProbe, ranks: list[int], generator: torch.Generator
    ) -> LayerBases:
        """A matrix for every rank around a shared one, for keys and for values, trained together."""
        start_k, start_v = self._start(statistics, probe)
        d, device, count = start_k.columns.shape[-1], device_of(probe.block), len(ranks)
        keys, values = (RankedMatrices(b.columns, count).to(device) for b in (start_k, start_v))
        kept = (torch.arange(d) < torch.tensor(ranks).unsqueeze(1)).float()[:, None, None].to(device)

        def factors(i: Tensor, j: Tensor) -> Factors:
            return factors_of(keys(i) * kept[i], values(j) * kept[j])

        def loss(windows: Tensor) -> Tensor:
            i, j = (stratified_rows(len(windows), count, generator).to(device) for _ in range(2))
            # log: every rank pulls with its relative gain; the floor silences a window that drew both full
            # ranks
            return probe.errors(windows, factors(i, j)).clamp_min(FLOOR).log().mean()

        def judge() -> float:
            diagonal = (torch.tensor([i], device=device) for i in (range(1, count - 1, 2) or range(count)))
            return mean_log(probe.held_out_error(factors(i, i)) for i in diagonal)

        lr = self.lr or 5e-3 * 128 / d
        self._train([keys, values], loss, judge, JUDGED_EVERY, lr, WINDOWS_PER_STEP, probe, generator)
        return LayerBases(_ranked(keys, start_k, ranks), _ranked(values, start_v, ranks))

    def _fit_mlp(
        self, statistics: LayerStatistics, probe: LayerProbe, ranks: list[int], generator: torch.Generator
    ) -> LayerBases:
        """The paper's protocol: a predictor per rank and side, the other side left at full rank."""
        start_k, start_v = self._start(statistics, probe)
        d = start_k.columns.shape[-1]
        eye = torch.eye(d, device=device_of(probe.block)).unsqueeze(0)
        about_k = channel_statistics(
            statistics.keys(probe.layout), statistics.keys_mean(probe.layout), statistics, self.key_bases
        )
        about_v = channel_statistics(
            head_blocks(statistics.values, statistics.heads),
            statistics.values_mean,
            statistics,
            self.value_bases,
        )

        def one(about: Tensor, rank: int, batch: int, of: Callable[[Tensor], Factors]) -> tuple[int, Tensor]:
            predictor = Predictor(about, d, HIDDEN_WIDTH, generator).to(device_of(probe.block))

            def factors() -> Factors:
                return of(predictor()[..., :rank])

            def loss(windows: Tensor) -> Tensor:
                return probe.errors(windows, factors()).mean()

            self._train(
                [predictor],
                loss,
                lambda: probe.held_out_error(factors()),
                1,
                self.lr or 5e-3,
                batch,
                probe,
                generator,
            )
            return rank, predictor()[..., :rank].detach().cpu()

        lower = [r for r in ranks if r < d]
        exact_k = tuple(one(about_k, r, KEY_BATCH, lambda p: factors_of(p, eye)) for r in lower)
        exact_v = tuple(one(about_v, r, WINDOWS_PER_STEP, lambda p: factors_of(eye, p)) for r in lower)
        return LayerBases(
            Basis(start_k.columns, None, exact_k, start_k.spectrum),
            Basis(start_v.columns, None, exact_v, start_v.spectrum),
        )

    def _start(self, statistics: LayerStatistics, probe: LayerProbe) -> tuple[Basis, Basis]:
        keys, values = statistics.keys(probe.layout), head_blocks(statistics.values, statistics.heads)
        return principal_basis(keys, self.key_bases), principal_basis(values, self.value_bases)

    def _train(
        self,
        modules: list[nn.Module],
        loss: Callable[[Tensor], Tensor],
        judge: Callable[[], float],
        every: int,
        lr: float,
        batch: int,
        probe: LayerProbe,
        generator: torch.Generator,
    ) -> None:
        """AdamW with cosine annealing on `loss(windows)`; keeps the parameters that `judge`, asked every few
        epochs, finds best.
        """
        parameters = [p for m in modules for p in m.parameters()]
        epochs, patience = (
            self.epochs or EPOCHS[self.parametrisation],
            self.patience or PATIENCE[self.parametrisation],
        )
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, T_max=epochs * -(-probe.training_count // batch)
        )
        best, kept, gained = judge(), [p.detach().clone() for p in parameters], 0
        for epoch in range(1, epochs + 1):
            for windows in probe.batches(batch, generator):
                optimizer.zero_grad()
                loss(windows).backward()
                optimizer.step()
                schedule.step()
            if epoch % every and epoch < epochs:
                continue
            if (error := judge()) < best - DELTA:
                best, kept, gained = error, [p.detach().clone() for p in parameters], epoch
            elif epoch - gained >= patience:
                break
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)


def factors_of(keys: Tensor, values: Tensor) -> Factors:
    return Factors(keys, keys.mT, values, values.mT)


def stratified_rows(rows: int, count: int, generator: torch.Generator) -> Tensor:
    """`rows` random indices below `count`, evenly spread: one from each of `rows` equal strata, in random
    order.
    """
    strata = torch.randperm(rows, generator=generator) + torch.rand(rows, generator=generator)
    return (strata / rows * count).long().clamp(max=count - 1)


def mean_log(errors: Iterable[float]) -> float:
    """No rank outweighs the others."""
    logs = [math.log(max(e, FLOOR)) for e in errors]
    return sum(logs) / len(logs)


@torch.no_grad()
def _ranked(matrices: RankedMatrices, start: Basis, ranks: list[int]) -> Basis:
    found = matrices(torch.arange(len(ranks), device=matrices.own.device)).cpu()
    return Basis(
        found[-1],
        None,
        tuple((r, q[..., :r].clone()) for r, q in zip(ranks[:-1], found, strict=False)),
        start.spectrum,
    )


def channel_statistics(moments: Tensor, mean: Tensor, statistics: LayerStatistics, heads: Heads) -> Tensor:
    """Per-channel [mean; variance] (h|1, 2d), standardised so that the network's input has unit scale."""
    square = moments.diagonal(dim1=1, dim2=2) / statistics.tokens
    mean = mean.view_as(square)
    if heads == "shared":
        square, mean = square.mean(0, keepdim=True), mean.mean(0, keepdim=True)
    both = torch.cat([mean, square - mean.square()], dim=1)
    return (both - both.mean()) / both.std()
