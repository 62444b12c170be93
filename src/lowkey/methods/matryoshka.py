"""MatryoshkaKV (arXiv:2410.14731): nested orthogonal bases trained through the whole model."""

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
from lowkey.ops.schedule import warmup_cosine
from lowkey.probes import model_probe
from lowkey.probes.layer_probe import LayerProbe

WARMUP_SHARE = 0.1  # of the steps; the published code has 100 warm-up steps in an epoch
JUDGEMENTS = 8  # how many times the held-out windows judge
JUDGED_RANKS = 3  # how many ranks they judge at


@dataclass(frozen=True)
class MatryoshkaKV(Method):
    """MatryoshkaKV, nested orthogonal bases trained through the whole model.

    Every KV head has orthogonal matrices U_K and U_V (d x d); rank r uses their first r columns. They start
    at PCA of keys and of values, per head, and are U = U_start cayley(A - A^T) with A = 0 at first. A and the
    means are trained with every layer compressed, at ranks drawn at random; the model itself stays as it is.
    The loss is kl KL(original || compressed) + (1 - kl) cross-entropy. The optimiser is AdamW with a linear
    warm-up and a cosine decay. Held-out windows judge every few steps at a few ranks that all layers share.
    The best bases are kept, the start among them.

    Cross-entropy also fits the bases to the calibration text. With little text, `kl=1` serves other text
    better. With the embedded model and texts (6 thousand tokens), the cross-entropy of the evaluation text at
    a quarter of full rank grows by 0.63 nats before training, by 0.50 after it, and by 0.42 with `kl=1`; at
    half of full rank by 0.11, 0.14 and 0.10.

    Source: arXiv:2410.14731 and its code. Where we differ:

    - The paper draws one rank per layer and head, for keys and for values. Here the latents of a layer have
      one width, so its heads share their rank. Every window of a batch has ranks of its own, as in the code,
      whose batches are single windows.
    - Ranks come from calibration's grid; the paper's are 16, 32, ... 128.
    - The code repeats keys for every query head and gives each a basis, which loses what grouped heads save.
      Here a basis belongs to a KV head.
    - The paper lowers step by step the rank of that (layer, head, K or V) whose reduction changes the final
      hidden state least, on the very task that is evaluated. Here a rank allocator chooses on neutral text,
      by default the greedy one.

    Args:
        centred: subtract the mean of keys and of values before the basis, and add it back after (default
            true).
        kl: weight of the divergence, from 0 to 1 (default 0.25, the code's).
        steps: training steps, one calibration batch each (default 200).
        lr: peak learning rate (default 1e-3, the code's).
    """

    summary: ClassVar[str] = "orthogonal bases trained through the whole model at random ranks"
    paper: ClassVar[str] = "arXiv:2410.14731"
    has_tune: ClassVar[bool] = True

    centred: bool = True
    kl: float = option(0.25, at_least=0, at_most=1)
    steps: int = option(200, at_least=0, at_most=10**7)
    lr: float = option(1e-3, above=0, at_most=10)

    def fit(self, statistics: LayerStatistics, probe: LayerProbe, ranks: list[int], seed: int) -> LayerBases:
        """Return PCA per head, from which `tune` starts."""
        layout, tokens = probe.layout, statistics.tokens
        value_moments = head_blocks(statistics.values, statistics.heads)
        return LayerBases(
            self._pca(statistics.keys(layout), statistics.keys_mean(layout), tokens),
            self._pca(value_moments, statistics.values_mean, tokens),
        )

    def _pca(self, moments: Tensor, mean: Tensor, tokens: int) -> Basis:
        """Return PCA per head from moments (h, d, d), summed over so many tokens, and the mean (h d)."""
        mean = mean.view(len(moments), -1).double()
        if not self.centred:
            vectors, energy = principal(moments)
            return Basis(vectors.float(), spectrum=energy)
        # sum of (k - mean)^T (k - mean) = sum of k^T k - tokens * mean^T mean
        vectors, energy = principal(moments - tokens * mean.unsqueeze(2) * mean.unsqueeze(1))
        return Basis(vectors.float(), spectrum=energy, mean=mean.float())

    def tune(self, bases: dict[int, LayerBases], context: CalibrationContext) -> dict[int, LayerBases]:
        """Train the bases of all layers together. The model's parameters get no gradients."""
        training = _BasisTraining.of(bases, context, self.kl)
        with torch.enable_grad():
            training.run(self.steps, self.lr)
        return {
            i: LayerBases(k.basis(bases[i].keys), v.basis(bases[i].values))
            for i, (k, v) in training.sides.items()
        }


def cayley(skew: Tensor) -> Tensor:
    """Return (I - S)(I + S)^-1 of skew-symmetric S (..., d, d): orthogonal, and the identity at S = 0."""
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(eye + skew, eye - skew)  # the factors commute


class CayleyBasis:
    """The trained basis of one layer's keys or values: U_start cayley(A - A^T), and a mean.

    Attributes:
        start: U_start (h, d, d).
        a: A (h, d, d).
        mean: (h, d), or None.
        parameters: what is trained: A, and the mean if there is one.
    """

    def __init__(self, basis: Basis, device: torch.device) -> None:
        self.start = basis.columns.to(device)
        # A = 0 makes the Cayley transform the identity, so training starts at `start`
        self.a = torch.zeros_like(self.start, requires_grad=True)
        self.mean = None if basis.mean is None else basis.mean.to(device, copy=True).requires_grad_()
        self.parameters = [self.a] if self.mean is None else [self.a, self.mean]

    def maps(self, ranks: Tensor) -> tuple[Tensor, Tensor]:
        """Return the maps down and up, each (b, h, d, d), at ranks (b) of b windows.

        They have full width, with zeros in the columns beyond the rank, so that windows of different ranks
        fit into one tensor.
        """
        kept = torch.arange(self.start.shape[-1]) < ranks.unsqueeze(1)
        columns = self.start @ cayley(self.a - self.a.mT) * kept[:, None, None].to(self.start)
        return columns, columns.mT

    @torch.no_grad()
    def basis(self, start: Basis) -> Basis:
        """Return `start` with the trained columns and mean, computed in fp64 on the CPU."""
        skew = (self.a - self.a.mT).cpu().double()
        mean = None if self.mean is None else self.mean.detach().cpu()
        return replace(start, columns=(start.columns.double() @ cayley(skew)).float(), mean=mean)


@dataclass
class _BasisTraining:
    """The training of all layers' bases.

    Args:
        context: the model and the windows.
        kl: weight of the divergence in the loss.
        sides: by layer, the bases of keys and of values.
    """

    context: CalibrationContext
    kl: float
    sides: dict[int, tuple[CayleyBasis, CayleyBasis]]

    @classmethod
    def of(cls, bases: dict[int, LayerBases], context: CalibrationContext, kl: float) -> _BasisTraining:
        """Start from bases of all layers, each on the device of its layer."""
        sides = {}
        for i, b in bases.items():
            device = device_of(families.decoder_layers(context.model)[i])
            sides[i] = CayleyBasis(b.keys, device), CayleyBasis(b.values, device)
        return cls(context, kl, sides)

    def run(self, steps: int, lr: float) -> None:
        """Train, and leave the parameters at those that the held-out windows found best."""
        windows, batch = self.context.training_windows, self.context.batch
        parameters = [p for pair in self.sides.values() for side in pair for p in side.parameters]
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)  # decay would pull the means to 0
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warmup_cosine(step, max(1, steps), WARMUP_SHARE)
        )
        best_loss, best = self.held_out_loss(), [p.detach().clone() for p in parameters]
        generator = torch.Generator().manual_seed(self.context.seed)
        steps_between = max(1, steps // JUDGEMENTS)
        for step in self.context.progress(range(steps), "tuning matryoshka", steps):
            rows = windows[torch.randperm(len(windows), generator=generator)[:batch]]
            loss = self.loss(rows, self.draw_ranks(len(rows), generator))
            # `grad` and not `backward`, which would also fill the gradients of the model's own weights
            for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                p.grad = gradient
            optimizer.step()
            schedule.step()
            if (step + 1) % steps_between == 0 or step + 1 == steps:
                judged = self.held_out_loss()
                if judged < best_loss:
                    best_loss, best = judged, [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p, value in zip(parameters, best, strict=True):
                p.copy_(value)

    def draw_ranks(self, windows: int, generator: torch.Generator) -> Tensor:
        """Draw a rank for the keys and the values of every layer in every window: (n, 2, windows)."""
        ranks = torch.tensor(self.context.measured_ranks)
        return ranks[torch.randint(len(ranks), (len(self.sides), 2, windows), generator=generator)]

    def loss(self, rows: Tensor, ranks: Tensor) -> Tensor:
        """Return the training loss of windows (b, t) at ranks (n, 2, b|1)."""
        model, ids = self.context.model, rows.to(device_of(self.context.model))
        # computed anew for each batch: stored logits of all windows would take too much memory
        with torch.no_grad():
            original = model(ids, use_cache=False).logits
        transforms = model_probe.reconstructions(model, self.factors(ranks), self.context.layout)
        compressed = model_probe.logits(model, ids, transforms, self.context.exact)
        divergence = model_probe.kl_divergence(compressed, original)
        return self.kl * divergence + (1 - self.kl) * model_probe.next_token_loss(compressed, ids)

    def factors(self, ranks: Tensor) -> dict[int, Factors]:
        """Return the maps of every layer at ranks (n, 2, b); they have a leading dimension b."""
        pairs = zip(self.sides.items(), ranks, strict=True)
        return {
            i: Factors(*keys.maps(k), *values.maps(v), None, keys.mean, values.mean)
            for (i, (keys, values)), (k, v) in pairs
        }

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Return the loss summed over held-out windows and over a few ranks that all layers share."""
        batches = self.context.held_out_windows.split(self.context.batch)
        ranks = [torch.full((len(self.sides), 2, 1), r) for r in evaluated_ranks(self.context.measured_ranks)]
        return float(torch.stack([self.loss(rows, r) * len(rows) for r in ranks for rows in batches]).sum())


def evaluated_ranks(ranks: list[int]) -> list[int]:
    """Return a few evenly spaced ranks below the full one, at which there is no error to judge."""
    lower = ranks[:-1] or ranks
    # every n-th, with n = len(lower) / JUDGED_RANKS rounded up
    return lower[:: -(-len(lower) // JUDGED_RANKS)]
