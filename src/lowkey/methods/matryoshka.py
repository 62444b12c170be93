"""MatryoshkaKV (arXiv:2410.14731): orthogonal bases trained through the whole model so that every leading
part of them serves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lowkey.core.options import option
from lowkey.core.types import Basis, Factors, LayerBases, LayerStatistics, device_of, head_blocks
from lowkey.methods.base import CalibrationContext, Method
from lowkey.models import families
from lowkey.ops.bases import principal
from lowkey.ops.schedule import falling
from lowkey.probes import model_probe
from lowkey.probes.layer_probe import LayerProbe

WARMUP_SHARE = 0.1  # of the steps; the published code has 100 warm-up steps in an epoch
JUDGEMENTS = 8  # how often the held-out windows judge
JUDGED = 3  # ranks that they judge at


@dataclass(frozen=True)
class MatryoshkaKV(Method):
    """Orthogonal U_K, U_V (d x d) of every KV head, of which a rank r uses the first r columns.

    Start: PCA of keys and of values per KV head after their mean is taken off (`centred`); the mean is put
    back when they are read. Then U = U_start @ cayley(A - A^T), with A = 0 at first, is trained together with
    the means through the whole model, every layer compressed; the model itself stays as it is. Loss: `kl`
    KL(original || compressed) + (1 - kl) cross-entropy, 0.25 as in the published code; AdamW with peak rate
    `lr`, 1e-3 as there, a linear warm-up and a cosine; `steps` steps of a calibration batch.

    Cross-entropy also fits the bases to the calibration text. With little of it, kl = 1 serves other text
    better: with the embedded model and texts (6 thousand tokens), the cross-entropy of the evaluation text
    grows by 0.63 nats at a quarter of full rank before tuning, by 0.50 after it, and by 0.42 with kl = 1; at
    half of full rank by 0.11, 0.14 and 0.10.

    Random ranks: the paper draws one per layer and head, for keys and values apart, at each step. Latents of
    a layer have one width here, so its heads share their rank; every window of a batch has ranks of its own,
    as in the published code, whose batches are single windows. Ours: ranks come from calibration's candidates
    (there 16, 32, ... 128); held-out windows judge every few steps, at a few ranks that all layers share, and
    the best bases seen are kept, the start among them.

    The published code repeats keys for every query head and gives each a basis, which loses what grouped
    heads save; here bases are per KV head. The paper then lowers, step by step, the rank of that (layer,
    head, K or V) whose reduction changes the final hidden state least, on the very task that is evaluated;
    here calibration's allocators choose ranks on neutral text, by default the greedy one.
    """

    summary: ClassVar[str] = "orthogonal bases trained through the whole model at random ranks"
    paper: ClassVar[str] = "arXiv:2410.14731"
    has_tune: ClassVar[bool] = True

    centred: bool = True
    kl: float = option(0.25, at_least=0, at_most=1)
    steps: int = option(200, at_least=0, at_most=10**7)
    lr: float = option(1e-3, above=0, at_most=10)

    def fit(self, statistics: LayerStatistics, probe: LayerProbe, ranks: list[int], seed: int) -> LayerBases:
        keys = self._start(
            statistics.keys(probe.layout), statistics.keys_mean(probe.layout), statistics.tokens
        )
        values = self._start(
            head_blocks(statistics.values, statistics.heads), statistics.values_mean, statistics.tokens
        )
        return LayerBases(keys, values)

    def _start(self, moments: Tensor, mean: Tensor, tokens: int) -> Basis:
        """moments (h, d, d) summed over so many tokens; mean (h d)."""
        mean = mean.view(len(moments), -1).double()
        if not self.centred:
            vectors, energy = principal(moments)
            return Basis(vectors.float(), spectrum=energy)
        vectors, energy = principal(moments - tokens * mean.unsqueeze(2) * mean.unsqueeze(1))
        return Basis(vectors.float(), spectrum=energy, mean=mean.float())

    def tune(self, bases: dict[int, LayerBases], context: CalibrationContext) -> dict[int, LayerBases]:
        """Train the bases of all layers together. course.rows: unpadded ids; the gradients of the model's
        parameters are left alone.
        """
        training = _BasisTraining.of(bases, context, self.kl)
        with torch.enable_grad():
            training.run(self.steps, self.lr)
        return {
            i: LayerBases(k.basis(bases[i].keys), v.basis(bases[i].values))
            for i, (k, v) in training.sides.items()
        }


def cayley(skew: Tensor) -> Tensor:
    """(I - S)(I + S)^-1 of skew-symmetric S (..., d, d): orthogonal, and the identity at 0."""
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(eye + skew, eye - skew)  # the two factors commute


class CayleyBasis:
    """The keys or values of one layer: a basis turned away from its start, and a mean. Trained: `parameters`."""

    def __init__(self, basis: Basis, device: torch.device) -> None:
        self.start = basis.columns.to(device)
        self.a = torch.zeros_like(self.start, requires_grad=True)
        self.mean = None if basis.mean is None else basis.mean.to(device, copy=True).requires_grad_()
        self.parameters = [self.a] if self.mean is None else [self.a, self.mean]

    def maps(self, ranks: Tensor) -> tuple[Tensor, Tensor]:
        """Down and up for ranks (b), each (b, h, d, d): of full width with zeros in the columns beyond the
        rank.
        """
        kept = torch.arange(self.start.shape[-1]) < ranks.unsqueeze(1)
        columns = self.start @ cayley(self.a - self.a.mT) * kept[:, None, None].to(self.start)
        return columns, columns.mT

    @torch.no_grad()
    def basis(self, start: Basis) -> Basis:
        """With the turned columns, in fp64 on the CPU until they are stored."""
        skew = (self.a - self.a.mT).cpu().double()
        mean = None if self.mean is None else self.mean.detach().cpu()
        return replace(start, columns=(start.columns.double() @ cayley(skew)).float(), mean=mean)


@dataclass
class _BasisTraining:
    context: CalibrationContext
    kl: float
    sides: dict[int, tuple[CayleyBasis, CayleyBasis]]

    @classmethod
    def of(cls, bases: dict[int, LayerBases], context: CalibrationContext, kl: float) -> _BasisTraining:
        devices = {i: device_of(families.decoder_layers(context.model)[i]) for i in bases}
        return cls(
            context,
            kl,
            {
                i: (CayleyBasis(b.keys, devices[i]), CayleyBasis(b.values, devices[i]))
                for i, b in bases.items()
            },
        )

    def run(self, steps: int, lr: float) -> None:
        """Ends at the best parameters that the held-out windows saw."""
        parameters = [p for pair in self.sides.values() for side in pair for p in side.parameters]
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)  # decay would pull the means to 0
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda k: falling(k, max(1, steps), WARMUP_SHARE)
        )
        best, kept, every = self.judged(), _copies(parameters), max(1, steps // JUDGEMENTS)
        generator = torch.Generator().manual_seed(self.context.seed)
        for k in self.context.progress(range(steps), "tuning matryoshka", steps):
            rows = self.context.training_windows[
                torch.randperm(len(self.context.training_windows), generator=generator)[: self.context.batch]
            ]
            gradients = torch.autograd.grad(self.loss(rows, self.drawn(len(rows), generator)), parameters)
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient
            optimizer.step()
            schedule.step()
            if ((k + 1) % every == 0 or k + 1 == steps) and (found := self.judged()) < best:
                best, kept = found, _copies(parameters)
        with torch.no_grad():
            for p, value in zip(parameters, kept, strict=True):
                p.copy_(value)

    def drawn(self, windows: int, generator: torch.Generator) -> Tensor:
        """Ranks (n, 2, b): of every layer, of keys and of values, in every window."""
        ranks = torch.tensor(self.context.measured_ranks)
        return ranks[torch.randint(len(ranks), (len(self.sides), 2, windows), generator=generator)]

    def loss(self, rows: Tensor, ranks: Tensor) -> Tensor:
        """Of windows (b, t) at ranks (n, 2, b|1)."""
        model, ids = self.context.model, rows.to(device_of(self.context.model))
        with torch.no_grad():
            original = model(ids, use_cache=False).logits
        found = model_probe.logits(
            model,
            ids,
            model_probe.reconstructions(model, self.factors(ranks), self.context.layout),
            self.context.exact,
        )
        return self.kl * model_probe.kl_divergence(found, original) + (
            1 - self.kl
        ) * model_probe.next_token_loss(found, ids)

    def factors(self, ranks: Tensor) -> dict[int, Factors]:
        pairs = zip(self.sides.items(), ranks, strict=True)
        return {
            i: Factors(*keys.maps(k), *values.maps(v), None, keys.mean, values.mean)
            for (i, (keys, values)), (k, v) in pairs
        }

    @torch.no_grad()
    def judged(self) -> float:
        """The loss of the held-out windows, summed over them and over a few ranks that all layers share."""
        batches = self.context.held_out_windows.split(self.context.batch)
        ranks = [torch.full((len(self.sides), 2, 1), r) for r in evaluated_ranks(self.context.measured_ranks)]
        return float(torch.stack([self.loss(rows, r) * len(rows) for r in ranks for rows in batches]).sum())


def evaluated_ranks(ranks: list[int]) -> list[int]:
    """Evenly spaced among the candidates below the full rank, which needs no judging."""
    lower = ranks[:-1] or ranks
    return lower[:: -(-len(lower) // JUDGED)]


def _copies(parameters: list[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]
