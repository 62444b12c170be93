"""StiefAttention (arXiv:2601.21686): orthonormal bases trained on a decoder layer's output error."""

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

WINDOWS_PER_STEP = 4  # of values, and of `free`
KEY_WINDOWS_PER_STEP = 1  # the paper's for keys
EPOCHS, PATIENCE = {"mlp": 50, "free": 100}, {"mlp": 5, "free": 30}  # those of `mlp` are the paper's
LEARNING_RATE = 5e-3  # the paper's
WEIGHT_DECAY = 1e-4  # the paper's
DELTA = 1e-6  # the least gain that counts for early stopping; the paper's
JUDGED_EVERY = 10  # epochs of `free` between two judgements by the held-out windows
FLOOR = 1e-5  # a layer error below it is rounding
HIDDEN_WIDTH = 128  # of the predictor's hidden layers; the paper gives none


@dataclass(frozen=True)
class StiefAttention(Method):
    """StiefAttention, an orthonormal method trained on the output error of each decoder layer.

    It minimises the mean over tokens of ||f_t(x) - f~_t(x)|| / ||f_t(x)|| over bases P with P^T P = I. f is a
    whole decoder layer, f~ the same layer with compressed keys and values, x its recorded inputs in the
    uncompressed model, and t a token that the cache does not keep exact
    (`lowkey.probes.layer_probe.relative_errors`). The paper's error is ||f(x) - f~(x)||_F / ||f(x)||_F of a
    whole window at once (Eq. 11-12), in which a few massive tokens alone count. Training uses AdamW with
    cosine annealing and stops early by held-out windows.

    Source: arXiv:2601.21686, version 1; no public code is known. Its ranks are 50 to 90 % of d (`--ranks`),
    and its budget is one of the (weighted) layer error. The abstract of version 2 announces a byte budget
    that is met step by step; the allocator `greedy` is our reading of it. The paper does not mention
    rotation. Since it folds the projections into the weights, keys are stored before rotation here.

    Args:
        parametrisation: `mlp` (default) is the paper's: per rank, and for keys and values apart with the
            other side uncompressed, a network predicts the matrix from per-channel means and variances.
            `free` (ours, as good in a fifth of the time) trains one matrix per basis, from the PCA solution.
            All ranks share it and each departs from it. Keys and values are trained together, every window at
            ranks of its own that are drawn at random.
        key_bases: `shared` (default, the paper's) has one basis for all KV heads of a layer, `per_head` one
            for each.
        value_bases: the same for values (default `per_head`, the paper's).
        epochs: at most. 0 (default) is 50 for `mlp` (the paper's) and 100 for `free`.
        patience: epochs without gain on held-out windows after which training stops. 0 (default) is 5 for
            `mlp` (the paper's) and 30 for `free`.
        lr: peak learning rate. 0 (default) is 5e-3 for `mlp` (the paper's) and 5e-3 * 128 / d for `free`.
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
        """Train bases of one layer, by the chosen parametrisation."""
        fit = self._fit_free if self.parametrisation == "free" else self._fit_mlp
        return fit(statistics, probe, ranks, torch.Generator().manual_seed(seed))

    def _fit_free(
        self, statistics: LayerStatistics, probe: LayerProbe, ranks: list[int], generator: torch.Generator
    ) -> LayerBases:
        """Train a matrix for every rank around a shared one, for keys and values together."""
        start_k, start_v = self._pca(statistics, probe)
        d, device, count = start_k.columns.shape[-1], device_of(probe.block), len(ranks)
        keys, values = (RankedMatrices(b.columns, count).to(device) for b in (start_k, start_v))
        # masks of full width, so that windows of different ranks fit into one batch
        kept = (torch.arange(d) < torch.tensor(ranks).unsqueeze(1)).float()[:, None, None].to(device)

        def factors(i: Tensor, j: Tensor) -> Factors:
            """Maps at the ranks numbered i for keys and j for values, one for each window."""
            return factors_of(keys(i) * kept[i], values(j) * kept[j])

        def loss(windows: Tensor) -> Tensor:
            i, j = (stratified_rows(len(windows), count, generator).to(device) for _ in range(2))
            # With the log every rank pulls with its relative gain. The floor silences a window that drew full
            # rank for keys and for values.
            return probe.errors(windows, factors(i, j)).clamp_min(FLOOR).log().mean()

        def judge() -> float:
            # every second rank, to save time; without full rank, whose error is 0
            judged = range(1, count - 1, 2) or range(count)
            numbers = (torch.tensor([i], device=device) for i in judged)
            return mean_log(probe.held_out_error(factors(i, i)) for i in numbers)

        lr = self.lr or LEARNING_RATE * 128 / d
        self._train([keys, values], loss, judge, JUDGED_EVERY, lr, WINDOWS_PER_STEP, probe, generator)
        return LayerBases(_basis_at_ranks(keys, start_k, ranks), _basis_at_ranks(values, start_v, ranks))

    def _fit_mlp(
        self, statistics: LayerStatistics, probe: LayerProbe, ranks: list[int], generator: torch.Generator
    ) -> LayerBases:
        """Train the paper's predictors: one per rank and side, the other side left at full rank."""
        start_k, start_v = self._pca(statistics, probe)
        d = start_k.columns.shape[-1]
        identity = torch.eye(d, device=device_of(probe.block)).unsqueeze(0)
        key_moments, value_moments = (
            statistics.keys(probe.layout),
            head_blocks(statistics.values, statistics.heads),
        )
        key_statistics = channel_statistics(
            key_moments, statistics.keys_mean(probe.layout), statistics, self.key_bases
        )
        value_statistics = channel_statistics(
            value_moments, statistics.values_mean, statistics, self.value_bases
        )

        def train(
            channels: Tensor, rank: int, batch: int, factors: Callable[[Tensor], Factors]
        ) -> tuple[int, Tensor]:
            """Train one predictor; `factors` makes the layer's maps of its basis (h|1, d, rank)."""
            predictor = Predictor(channels, d, HIDDEN_WIDTH, generator).to(device_of(probe.block))

            def loss(windows: Tensor) -> Tensor:
                return probe.errors(windows, factors(predictor()[..., :rank])).mean()

            def judge() -> float:
                return probe.held_out_error(factors(predictor()[..., :rank]))

            self._train([predictor], loss, judge, 1, self.lr or LEARNING_RATE, batch, probe, generator)
            return rank, predictor()[..., :rank].detach().cpu()

        lower = [r for r in ranks if r < d]
        exact_k = tuple(
            train(key_statistics, r, KEY_WINDOWS_PER_STEP, lambda p: factors_of(p, identity)) for r in lower
        )
        exact_v = tuple(
            train(value_statistics, r, WINDOWS_PER_STEP, lambda p: factors_of(identity, p)) for r in lower
        )
        return LayerBases(
            Basis(start_k.columns, None, exact_k, start_k.spectrum),
            Basis(start_v.columns, None, exact_v, start_v.spectrum),
        )

    def _pca(self, statistics: LayerStatistics, probe: LayerProbe) -> tuple[Basis, Basis]:
        keys, values = statistics.keys(probe.layout), head_blocks(statistics.values, statistics.heads)
        return principal_basis(keys, self.key_bases), principal_basis(values, self.value_bases)

    def _train(
        self,
        modules: list[nn.Module],
        loss: Callable[[Tensor], Tensor],
        judge: Callable[[], float],
        judged_every: int,
        lr: float,
        batch: int,
        probe: LayerProbe,
        generator: torch.Generator,
    ) -> None:
        """Train with AdamW and cosine annealing, and keep the parameters that the judge finds best.

        Args:
            modules: what is trained.
            loss: of the windows with these indices (b).
            judge: the error on held-out windows.
            judged_every: epochs between two judgements.
            lr: peak learning rate.
            batch: windows per step.
            probe: draws the windows.
            generator: of their order.
        """
        parameters = [p for m in modules for p in m.parameters()]
        epochs = self.epochs or EPOCHS[self.parametrisation]
        patience = self.patience or PATIENCE[self.parametrisation]
        steps = epochs * -(-probe.training_count // batch)
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        best_error, best, best_epoch = judge(), [p.detach().clone() for p in parameters], 0
        for epoch in range(1, epochs + 1):
            for windows in probe.batches(batch, generator):
                optimizer.zero_grad()
                loss(windows).backward()
                optimizer.step()
                schedule.step()
            if epoch % judged_every and epoch < epochs:
                continue
            error = judge()
            if error < best_error - DELTA:
                best_error, best, best_epoch = error, [p.detach().clone() for p in parameters], epoch
            elif epoch - best_epoch >= patience:
                break
        with torch.no_grad():
            for parameter, value in zip(parameters, best, strict=True):
                parameter.copy_(value)


def factors_of(keys: Tensor, values: Tensor) -> Factors:
    """Return the maps of orthonormal bases of keys and of values: down P, up P^T."""
    return Factors(keys, keys.mT, values, values.mT)


def stratified_rows(rows: int, count: int, generator: torch.Generator) -> Tensor:
    """Return `rows` random indices below `count`: one from each of `rows` equal strata, in random order."""
    strata = torch.randperm(rows, generator=generator) + torch.rand(rows, generator=generator)
    return (strata / rows * count).long().clamp(max=count - 1)


def mean_log(errors: Iterable[float]) -> float:
    """Return the mean of the logs of errors, in which no rank outweighs the others."""
    logs = [math.log(max(e, FLOOR)) for e in errors]
    return sum(logs) / len(logs)


@torch.no_grad()
def _basis_at_ranks(matrices: RankedMatrices, start: Basis, ranks: list[int]) -> Basis:
    """Return the trained matrix of every rank; that of the last one, full rank, serves all other ranks."""
    trained = matrices(torch.arange(len(ranks), device=matrices.departures.device)).cpu()
    # Every rank but full rank has a matrix of its own, of which it uses the first r columns.
    exact = tuple((r, q[..., :r].clone()) for r, q in zip(ranks[:-1], trained, strict=False))
    return Basis(trained[-1], None, exact, start.spectrum)


def channel_statistics(moments: Tensor, mean: Tensor, statistics: LayerStatistics, heads: Heads) -> Tensor:
    """Return the predictor's input: [mean; variance] of every channel (h|1, 2d), standardised to unit scale.

    Args:
        moments: second moments per head (h, d, d), summed over tokens.
        mean: (h d).
        statistics: says how many tokens there are.
        heads: `shared` averages over heads.
    """
    square = moments.diagonal(dim1=1, dim2=2) / statistics.tokens
    mean = mean.view_as(square)
    if heads == "shared":
        square, mean = square.mean(0, keepdim=True), mean.mean(0, keepdim=True)
    both = torch.cat([mean, square - mean.square()], dim=1)  # E[x^2] - E[x]^2 is the variance
    return (both - both.mean()) / both.std()
