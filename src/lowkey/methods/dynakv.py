"""DynaKV (arXiv:2603.04411): a trained gate gives every token a rank of its own.

Only the paper's abstract is known to us: post-training, low rank, and a compression rate for each token. All
else here is OUR design: the bases (PCA), the levels (d, d/2, d/4, d/8), what the gate sees, its loss, and how
its budget is met. `lowkey.calibration.dynamic` makes plans of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from lowkey.core import files, optimizer_state
from lowkey.core.head_groups import group_latents, rebuilt_heads
from lowkey.core.options import Checked, option
from lowkey.core.progress import Progress, silent
from lowkey.core.types import (
    Factors,
    Heads,
    LayerBases,
    LayerStatistics,
    Layout,
    LowkeyError,
    device_of,
    head_blocks,
)
from lowkey.models import families
from lowkey.models.families import Rope
from lowkey.ops.bases import principal_basis
from lowkey.ops.rope import rotate, unrotate
from lowkey.ops.schedule import warmup_cosine
from lowkey.probes import model_probe
from lowkey.storage.bucketed import Gate
from lowkey.storage.reconstruction import KVTransform

LEVEL_WARMUP = 0.05  # share of the steps
COLDEST = 0.2  # share of the temperature at which its linear fall ends
GATE_FILE = "gates"  # name of the unfinished training in the work folder
LEVEL_JUDGEMENTS = 5  # how many times the held-out windows judge
STEEPNESS = 10.0  # of a gate at the start: its scores differ by this times the share of energy kept
PRICE_DOUBLINGS, PRICE_HALVINGS = 12, 12  # to enclose the price, and to find it
SHARE_ROUNDING = 1e-6  # by which a mean share may exceed the target
CoordinateMap = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # of keys and values, each (b, h, t, d)


@dataclass(frozen=True)
class GateTraining(Checked):
    """How gates are trained.

    Args:
        target: the mean share of coordinates that tokens keep, over tokens and layers (default 0.5).
        steps: training steps (default 200).
        lr: peak learning rate of AdamW (default 5e-3).
        batch: windows per step (default 4).
        hidden: width of a gate's hidden layer (default 64).
        temperature: of the softmax over levels, at the start (default 1).
        straight: whether tokens take one level each in training too, with the gradient of the softmax
            (straight through). Otherwise (default) each takes a mixture, which becomes sharper as the
            temperature falls.
        penalty: weight of the squared excess over the target (default 50).
        seed: of everything random (default 0).
    """

    summary: ClassVar[str] = (
        "a trained gate gives every token a rank of its own (our design, after the abstract)"
    )
    paper: ClassVar[str] = "arXiv:2603.04411"

    target: float = option(0.5, above=0, at_most=1)
    steps: int = option(200, at_least=0, at_most=10**7)
    lr: float = option(5e-3, above=0)
    batch: int = option(4, at_least=1, at_most=4096)
    hidden: int = option(64, at_least=1, at_most=2**16)
    temperature: float = option(1.0, above=0, at_most=1000)
    straight: bool = False
    penalty: float = option(50.0, above=0, at_most=1e9)
    seed: int = option(0, at_least=0)


@dataclass(frozen=True)
class TrainedGates:
    """The gates of all layers, and what they cost on held-out windows.

    Args:
        gates: by layer.
        share: the mean share of coordinates that held-out tokens keep.
        divergence: KL(original || compressed) per held-out token, in nats.
    """

    gates: dict[int, Gate]
    share: float
    divergence: float


def levels_of(head_dim: int) -> tuple[int, ...]:
    """Return the ranks that a token may keep, widest first: d, d/2, d/4 and d/8, if whole."""
    return tuple(head_dim // part for part in (1, 2, 4, 8) if head_dim % part == 0)


def check_target(target: float, head_dim: int) -> None:
    """Check that a mean share of coordinates can be reached.

    Raises:
        LowkeyError: if the target is below the share of the smallest level.
    """
    least = levels_of(head_dim)[-1]
    share = least / head_dim
    if target < share:
        raise LowkeyError(
            f"target {target:g} (a budget of {100 * target:g}%): tokens keep at least {least} of {head_dim} "
            f"coordinates; give {share:g} or more ({100 * share:g}%)"
        )


def pca_bases(statistics: LayerStatistics, layout: Layout, key_bases: Heads = "shared") -> LayerBases:
    """Return uncentred PCA of keys and of values (per head), as the method `pca` has it."""
    values = head_blocks(statistics.values, statistics.heads)
    return LayerBases(
        principal_basis(statistics.keys(layout), key_bases), principal_basis(values, "per_head")
    )


def train_gates(
    model: PreTrainedModel,
    bases: dict[int, LayerBases],
    rows: Tensor,
    held_out: int,
    layout: Layout,
    settings: GateTraining = GateTraining(),
    progress: Progress = silent,
    work: Path | None = None,
) -> TrainedGates:
    """Train gates for all layers through the whole model, which stays as it is.

    In every step the gates draw a level for each token and layer, relaxed (Gumbel-softmax, arXiv:1611.01144):
    keys and values are the mixture of what the levels would give back. The loss is
    KL(original || compressed) per token + penalty * relu(mean share - target)^2. In use, a token takes the
    level of its largest score, after a price for each coordinate is subtracted. The price is found by
    bisection on the held-out windows, as low as the target allows. The gates that do best there are kept,
    those at the start among them, which give all tokens of a layer the same level.

    Neither the relaxed nor the straight-through form always does better. On the embedded model at a target of
    3/8, the KL of the evaluation text is 0.15 relaxed and 0.37 straight through with rotated keys, and 0.15
    and 0.13 with unrotated ones. The better PCA plan of that size has 0.25 and 0.10: with unrotated keys it
    gains by giving values more rank than keys, which levels here do not.

    Args:
        model: an attached model.
        bases: nested bases with one latent per head, by layer.
        rows: token ids (n, t), unpadded.
        held_out: how many of the last rows only judge.
        layout: whether keys are stored before or after their rotation.
        settings: how to train.
        progress: shows how far the training is.
        work: a folder of this very job, to save into at every judgement and to resume from, to the same
            gates.

    Raises:
        LowkeyError: if the target is below the share of the smallest level.
    """
    d = next(iter(bases.values())).keys.columns.shape[-1]
    levels = levels_of(d)
    check_target(settings.target, d)
    layers = families.decoder_layers(model)
    maps = {i: b.at(d, d).to(torch.empty(0, device=device_of(layers[i]))) for i, b in bases.items()}
    mean_squares = _mean_squares(model, maps, rows[:-held_out], layout, settings.batch)
    gates = _initial_gates(mean_squares, levels, settings)
    with torch.enable_grad():
        return _GateTrainer(model, maps, layout, levels, settings, rows, held_out, gates, work).run(progress)


@dataclass
class ObservedReconstruction:
    """Rebuilds a layer's keys and values from coordinates that a function sees and may change.

    Args:
        factors: maps of full rank, with one latent per head.
        layout: whether keys are stored before or after their rotation.
        rope: the layer's rotary embedding.
        observe: gets the coordinates of keys and of values (b, h, t, d) and returns those to rebuild from.
    """

    factors: Factors
    layout: Layout
    rope: Rope
    observe: CoordinateMap

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values (b, h, t, d) rebuilt from their coordinates."""
        cos, sin = self.rope(torch.arange(keys.shape[2], device=keys.device).unsqueeze(0), keys)
        unrotated, f = self.layout == "pre_rope", self.factors
        k, v = self.observe(
            group_latents(unrotate(keys, cos, sin) if unrotated else keys, f.k_down),
            group_latents(values, f.v_down),
        )
        keys = rebuilt_heads(k, f.k_up)
        return rotate(keys, cos, sin) if unrotated else keys, rebuilt_heads(v, f.v_up)


@torch.no_grad()
def _mean_squares(
    model: PreTrainedModel, maps: dict[int, Factors], rows: Tensor, layout: Layout, batch: int
) -> dict[int, Tensor]:
    """Return the mean squares (2 h, d) of the coordinates of keys and values in every layer."""
    sums: dict[int, Tensor] = {}

    def adding_up(i: int) -> CoordinateMap:
        def observe(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            squares = torch.cat([keys, values], 1).square().sum((0, 2))
            sums[i] = sums[i] + squares if i in sums else squares
            return keys, values

        return observe

    transforms = {
        i: ObservedReconstruction(f, layout, families.rope(model, i), adding_up(i)) for i, f in maps.items()
    }
    for ids in rows.to(device_of(model)).split(batch):
        model_probe.logits(model, ids, transforms)
    return {i: s / rows.numel() for i, s in sums.items()}


def _initial_gates(
    mean_squares: dict[int, Tensor], levels: tuple[int, ...], settings: GateTraining
) -> dict[int, Gate]:
    """Return gates that do not look at their token yet.

    The score of a level is the share of its layer's energy that it keeps, times `STEEPNESS`. So with a
    rising price all tokens go from level to level together.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    gates = {}
    for i, mean in mean_squares.items():
        width = mean.numel()
        hidden = torch.randn(width, settings.hidden, generator=generator).to(mean) * width**-0.5
        energies = torch.stack([side.sum(0) / side.sum() for side in mean.chunk(2)])
        kept = torch.stack([energies[:, :r].sum() for r in levels])
        # a channel without energy would have an infinite scale
        scale = mean.clamp_min(1e-6 * float(mean.mean())).rsqrt()
        no_bias = mean.new_zeros(settings.hidden)
        gates[i] = Gate(
            scale, hidden, no_bias, mean.new_zeros(settings.hidden, len(levels)), STEEPNESS * kept
        )
    return gates


@dataclass
class _GateTrainer:
    """The training of all layers' gates.

    Args:
        model: the model.
        maps: of full rank, by layer.
        layout: whether keys are stored before or after their rotation.
        levels: ranks that a token may keep, the widest first.
        settings: how to train.
        rows: token ids (n, t).
        held_out: how many of the last rows only judge.
        gates: by layer.
        work: the folder to save into, or None.
        done: steps done.
    """

    model: PreTrainedModel
    maps: dict[int, Factors]
    layout: Layout
    levels: tuple[int, ...]
    settings: GateTraining
    rows: Tensor
    held_out: int
    gates: dict[int, Gate]
    work: Path | None = None
    done: int = 0

    def run(self, progress: Progress) -> TrainedGates:
        """Train, and return the gates that the held-out windows found best."""
        s, saved = self.settings, files.read_work(self.work, GATE_FILE)
        best = self.judge() if saved is None else self._saved_best(saved)
        # training goes on from copies, so that `best` stays what was judged
        self.gates = {
            i: Gate(g.scale, *(t.detach().clone().requires_grad_() for t in _trained(g)))
            for i, g in best.gates.items()
        }
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=s.lr, weight_decay=0.0)
        self.generator, training = torch.Generator().manual_seed(s.seed), self.rows[: -self.held_out]
        if saved is not None:
            self._restore(saved)
        for k in progress(range(self.done, s.steps), "training gates", s.steps - self.done):
            self.step(k, training[torch.randperm(len(training), generator=self.generator)[: s.batch]])
            if (k + 1) % max(1, s.steps // LEVEL_JUDGEMENTS) == 0 or k + 1 == s.steps:
                best, self.done = min(best, self.judge(), key=lambda gates: gates.divergence), k + 1
                self._save(best)
        return best

    def step(self, k: int, ids: Tensor) -> None:
        """Take step k on windows (b, t)."""
        s, parameters = self.settings, self.parameters()
        for group in self.optimizer.param_groups:
            group["lr"] = s.lr * warmup_cosine(k, max(1, s.steps), LEVEL_WARMUP)
        loss = self.loss(ids, s.temperature * max(COLDEST, 1 - k / s.steps), self.generator)
        # `grad` and not `backward`, which would also fill the gradients of the model's own weights
        for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.grad = gradient
        self.optimizer.step()

    def parameters(self) -> list[Tensor]:
        """Return all that is trained."""
        return [p for gate in self.gates.values() for p in _trained(gate)]

    def loss(self, ids: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
        """Return the training loss of windows (b, t), with Gumbel noise from the generator."""

        def draw_levels(scores: Tensor) -> Tensor:
            # Gumbel noise, -log(-log u); u is kept off 0 and 1, whose logs are infinite
            uniform = torch.rand(scores.shape, generator=generator).clamp(1e-9, 1 - 1e-7).to(scores)
            soft = ((scores - (-uniform.log()).log()) / temperature).softmax(-1)
            # straight through: the value of the one-hot choice, the gradient of the softmax
            return _one_hot(soft) + soft - soft.detach() if self.settings.straight else soft

        divergence, share = self.divergence_and_share(ids, self.gates, draw_levels)
        return divergence + self.settings.penalty * (share - self.settings.target).relu().square()

    def divergence_and_share(
        self, ids: Tensor, gates: dict[int, Gate], choose: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return KL(original || compressed) per token and the mean share of coordinates kept.

        The arguments are those of `forward`.
        """
        ids = ids.to(device_of(self.model))
        compressed, share = self.forward(ids, gates, choose)
        with torch.no_grad():
            original = self.model(ids, use_cache=False).logits
        return model_probe.kl_divergence(compressed, original), share

    def forward(
        self, ids: Tensor, gates: dict[int, Gate], choose: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Run the model while every token keeps as many coordinates as its level says.

        Args:
            ids: windows (b, t).
            gates: by layer.
            choose: makes of a token's scores (b, t, levels) the weights of its levels, which sum to 1.

        Returns:
            Logits (b, t, V) and the mean share of coordinates kept.
        """
        shares: list[Tensor] = []
        d = self.levels[0]

        def gated_by(gate: Gate) -> CoordinateMap:
            def observe(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
                weights = choose(gate(keys, values))
                ranks = torch.tensor(self.levels, device=weights.device)
                # A mixture of levels keeps coordinate j with the weight of all levels wider than j.
                within = (torch.arange(d, device=weights.device) < ranks.unsqueeze(1)).to(weights)
                kept = (weights @ within).unsqueeze(1)
                shares.append((weights @ (ranks / d)).mean().to(ids.device))
                return keys * kept, values * kept

            return observe

        transforms: dict[int, KVTransform] = {
            i: ObservedReconstruction(f, self.layout, families.rope(self.model, i), gated_by(gates[i]))
            for i, f in self.maps.items()
        }
        logits = model_probe.logits(self.model, ids, transforms)
        return logits, torch.stack(shares).mean()

    # -- judging

    @torch.no_grad()
    def judge(self) -> TrainedGates:
        """Return the gates at the lowest price that keeps the held-out windows within the target."""
        gates = _with_price(self.gates, self._price(), self.levels)
        batches = self.rows[-self.held_out :].split(self.settings.batch)
        sums = [torch.stack(self.divergence_and_share(ids, gates, _one_hot)) * len(ids) for ids in batches]
        divergence, share = (torch.stack(sums).sum(0) / self.held_out).tolist()
        return TrainedGates(gates, share, divergence)

    def _price(self) -> float:
        """Return the lowest price that keeps within the target, by bisection.

        It lies between the first of 1, 2, 4, ... that is high enough and the first of -1, -2, -4, ... that is
        too low.
        """
        powers = [2.0**i for i in range(PRICE_DOUBLINGS)]
        high = next((p for p in powers if self._is_within_target(p)), powers[-1])
        low = next((-p for p in powers if not self._is_within_target(-p)), -powers[-1])
        for _ in range(PRICE_HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if self._is_within_target(middle) else (middle, high)
        return high

    def _is_within_target(self, price: float) -> bool:
        gates, device = _with_price(self.gates, price, self.levels), device_of(self.model)
        batches = self.rows[-self.held_out :].to(device).split(self.settings.batch)
        shares = [float(self.forward(ids, gates, _one_hot)[1]) * len(ids) for ids in batches]
        return sum(shares) / self.held_out <= self.settings.target + SHARE_ROUNDING

    # -- saving and resuming

    def _save(self, best: TrainedGates) -> None:
        if self.work is None:
            return
        tensors = {
            f"{i}.{name}": t.detach() for i, gate in best.gates.items() for name, t in vars(gate).items()
        }
        tensors |= {f"parameter.{n}": p.detach() for n, p in enumerate(self.parameters())}
        tensors |= optimizer_state.tensors_of(self.optimizer)
        tensors |= {
            "judged": torch.tensor([best.share, best.divergence], dtype=torch.float64),
            "random": self.generator.get_state(),
            "done": torch.tensor(self.done),
        }
        files.write_work(self.work, GATE_FILE, tensors)

    def _saved_best(self, tensors: dict[str, Tensor]) -> TrainedGates:
        gates = {
            i: Gate(**{name: self._checked(tensors, f"{i}.{name}", t) for name, t in vars(gate).items()})
            for i, gate in self.gates.items()
        }
        judged = self._checked(tensors, "judged", torch.zeros(2, dtype=torch.float64))
        return TrainedGates(gates, *judged.tolist())

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        for n, p in enumerate(self.parameters()):
            p.data.copy_(self._checked(tensors, f"parameter.{n}", p))
        optimizer_state.fill_state(self.optimizer, tensors, str(self.work))
        self.generator.set_state(self._checked(tensors, "random", self.generator.get_state()))
        self.done = int(self._checked(tensors, "done", torch.tensor(0)))
        if self.work is not None and not 0 < self.done <= self.settings.steps:
            raise files.damaged_work(self.work, f"{self.done} of {self.settings.steps} steps are done")

    def _checked(self, tensors: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
        return files.checked_tensor(tensors, name, like, self.work or Path()).to(like.device)


def _one_hot(scores: Tensor) -> Tensor:
    """Return 1 for the largest score of the last dimension and 0 for all others."""
    return F.one_hot(scores.argmax(-1), scores.shape[-1]).to(scores)


def _with_price(gates: dict[int, Gate], price: float, levels: tuple[int, ...]) -> dict[int, Gate]:
    """Return copies whose scores are lower by the price of the coordinates that a level keeps.

    Args:
        gates: by layer.
        price: of all coordinates of a token.
        levels: ranks that a token may keep, the widest first.
    """
    shares = torch.tensor(levels) / levels[0]
    copies = {
        i: Gate(**{name: t.detach().clone() for name, t in vars(gate).items()}) for i, gate in gates.items()
    }
    return {
        i: replace(gate, out_bias=gate.out_bias - price * shares.to(gate.out_bias))
        for i, gate in copies.items()
    }


def _trained(gate: Gate) -> tuple[Tensor, ...]:
    """Return the parameters of a gate; its scale is fixed."""
    return gate.hidden, gate.hidden_bias, gate.out, gate.out_bias
