"""DynaKV (arXiv:2603.04411): a learnt gate gives every token a rank of its own.

Of the paper only the abstract is known: post-training, low rank, and a compression rate for each token. All
that is below is OUR design: the bases (PCA), the levels (d, d/2, d/4, d/8), what the gate sees, its loss, and
how its budget is met. It gives no ordinary plan, whose ranks are the same for all tokens:
`lowkey.calibration.dynamic` makes caches of it.
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
from lowkey.ops.schedule import falling
from lowkey.probes import model_probe
from lowkey.storage.bucketed import Gate
from lowkey.storage.reconstruction import KVTransform

LEVEL_WARMUP = 0.05  # of the steps
COLDEST = 0.2  # of the temperature, which falls to it in a line
UNFINISHED = "gates"  # in the work folder
LEVEL_JUDGEMENTS = 5  # how often the held-out windows judge
STEEP = 10.0  # of a gate at the start: how much a token minds to lose all its energy
PRICE_DOUBLINGS, PRICE_HALVINGS = 12, 12  # of the price, to enclose it and to find it
ROUNDING = 1e-6  # of a mean share
Look = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class GateTraining(Checked):
    """How gates are trained.

    target: the mean share of coordinates that tokens keep, over tokens and layers. hidden: width of a gate's
    hidden layer. temperature: of the softmax over levels, at the start. straight: tokens take one level each
    in training too, with the softmax's gradient (straight through); else each takes a mixture, which grows
    sharper. penalty: weight of the squared excess over the target.
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
    """Trained gates by layer; the mean share of coordinates that held-out tokens keep, and KL(original ||
    compressed) per token there.
    """

    gates: dict[int, Gate]
    share: float
    divergence: float


def levels_of(head_dim: int) -> tuple[int, ...]:
    """Ranks that a token may keep, the widest first: d, d/2, d/4 and d/8, as far as they are whole."""
    return tuple(head_dim // part for part in (1, 2, 4, 8) if head_dim % part == 0)


def check_target(target: float, head_dim: int) -> None:
    """Errors: LowkeyError for a mean share of coordinates below that of the least level."""
    least = levels_of(head_dim)[-1]
    share = least / head_dim
    if target < share:
        rule = f"tokens keep at least {least} of {head_dim} coordinates"
        raise LowkeyError(
            f"target {target:g} (a budget of {100 * target:g}%): {rule}; give {share:g} or more "
            f"({100 * share:g}%)"
        )


def bases(statistics: LayerStatistics, layout: Layout, key_bases: Heads = "shared") -> LayerBases:
    """Uncentred PCA of keys and of values, as the plain baseline has it."""
    values = head_blocks(statistics.values, statistics.heads)
    return LayerBases(
        principal_basis(statistics.keys(layout), key_bases), principal_basis(values, "per_head")
    )


def train_gates(
    model: PreTrainedModel,
    found: dict[int, LayerBases],
    rows: Tensor,
    held: int,
    layout: Layout,
    settings: GateTraining = GateTraining(),
    progress: Progress = silent,
    work: Path | None = None,
) -> TrainedGates:
    """Gates for all layers over nested bases with one latent per head, trained through the whole model, which
    stays as it is.

    rows (n, t): unpadded ids; the last `held` only judge. In every step gates draw a level for each token and
    layer, relaxed (Gumbel-softmax, arXiv:1611.01144): keys and values are the mixture of what the levels
    would rebuild. Loss: KL(original || compressed) per token + penalty * relu(mean share - target)^2. Neither
    this nor the straight-through form always does better: on the embedded model at a target of 3/8, KL on the
    evaluation text is 0.15 relaxed and 0.37 straight with rotated keys, 0.15 and 0.13 with unrotated ones.
    The better PCA plan of that size has 0.25 and 0.10: with unrotated keys it gains by giving values more
    rank than keys, which levels here do not. What serves is the level of a token's largest number, after a
    price for each coordinate is taken off. The price is found by bisection on the held-out windows, as low as
    the target allows. Gates that do best there are kept, those at the start among them: they give all tokens
    of a layer the same level. work: a folder of this very job, to save into at every look and to go on from,
    to the same gates.
    Errors: LowkeyError when the target is below the least level.
    """
    d = next(iter(found.values())).keys.columns.shape[-1]
    levels = levels_of(d)
    check_target(settings.target, d)
    blocks = families.decoder_layers(model)
    maps = {i: b.at(d, d).to(torch.empty(0, device=device_of(blocks[i]))) for i, b in found.items()}
    squares = _squares(model, maps, rows[:-held], layout, settings.batch)
    with torch.enable_grad():
        return _GateTrainer(
            model, maps, layout, levels, settings, rows, held, _fresh(squares, levels, settings), work
        ).run(progress)


@dataclass
class ObservedReconstruction:
    """A layer's keys and values rebuilt from coordinates that `look` has seen, and may have changed."""

    factors: Factors
    layout: Layout
    rope: Rope
    look: Look

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.rope(torch.arange(keys.shape[2], device=keys.device).unsqueeze(0), keys)
        pre, f = self.layout == "pre_rope", self.factors
        k, v = self.look(
            group_latents(unrotate(keys, cos, sin) if pre else keys, f.k_down),
            group_latents(values, f.v_down),
        )
        keys = rebuilt_heads(k, f.k_up)
        return rotate(keys, cos, sin) if pre else keys, rebuilt_heads(v, f.v_up)


@torch.no_grad()
def _squares(
    model: PreTrainedModel, maps: dict[int, Factors], rows: Tensor, layout: Layout, batch: int
) -> dict[int, Tensor]:
    """Mean squares (2 h, d) of the coordinates of keys and values in every layer."""
    sums: dict[int, Tensor] = {}

    def looking(i: int) -> Look:
        def look(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            found = torch.cat([keys, values], 1).square().sum((0, 2))
            sums[i] = sums[i] + found if i in sums else found
            return keys, values

        return look

    for ids in rows.to(device_of(model)).split(batch):
        model_probe.logits(
            model,
            ids,
            {
                i: ObservedReconstruction(f, layout, families.rope(model, i), looking(i))
                for i, f in maps.items()
            },
        )
    return {i: s / rows.numel() for i, s in sums.items()}


def _fresh(squares: dict[int, Tensor], levels: tuple[int, ...], settings: GateTraining) -> dict[int, Gate]:
    """Gates that see nothing yet: a level's number is the share of its layer's energy that it keeps, so that
    with a rising price all tokens go from level to level."""
    generator = torch.Generator().manual_seed(settings.seed)
    gates = {}
    for i, mean in squares.items():
        width = mean.numel()
        hidden = torch.randn(width, settings.hidden, generator=generator).to(mean) * width**-0.5
        energies = torch.stack([side.sum(0) / side.sum() for side in mean.chunk(2)])
        kept = torch.stack([energies[:, :r].sum() for r in levels])
        scale = mean.clamp_min(1e-6 * float(mean.mean())).rsqrt()
        gates[i] = Gate(
            scale,
            hidden,
            mean.new_zeros(settings.hidden),
            mean.new_zeros(settings.hidden, len(levels)),
            STEEP * kept,
        )
    return gates


@dataclass
class _GateTrainer:
    model: PreTrainedModel
    maps: dict[int, Factors]
    layout: Layout
    levels: tuple[int, ...]
    settings: GateTraining
    rows: Tensor
    held: int
    gates: dict[int, Gate]
    work: Path | None = None
    done: int = 0

    def run(self, progress: Progress) -> TrainedGates:
        s, found = self.settings, self.saved()
        best = self.judged() if found is None else self.best_of(found)
        self.gates = {i: _loose(g) for i, g in best.gates.items()}
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=s.lr, weight_decay=0.0)
        self.generator, training = torch.Generator().manual_seed(s.seed), self.rows[: -self.held]
        if found is not None:
            self.restore(found)
        for k in progress(range(self.done, s.steps), "training gates", s.steps - self.done):
            self.step(k, training[torch.randperm(len(training), generator=self.generator)[: s.batch]])
            if (k + 1) % max(1, s.steps // LEVEL_JUDGEMENTS) == 0 or k + 1 == s.steps:
                best, self.done = min(best, self.judged(), key=lambda found: found.divergence), k + 1
                self.save(best)
        return best

    def step(self, k: int, ids: Tensor) -> None:
        s, parameters = self.settings, self.parameters()
        for group in self.optimizer.param_groups:
            group["lr"] = s.lr * falling(k, max(1, s.steps), LEVEL_WARMUP)
        loss = self.loss(ids, s.temperature * max(COLDEST, 1 - k / s.steps), self.generator)
        for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.grad = gradient
        self.optimizer.step()

    def parameters(self) -> list[Tensor]:
        return [p for gate in self.gates.values() for p in _trained(gate)]

    # -- stopping and going on

    def save(self, best: TrainedGates) -> None:
        if self.work is None:
            return
        found = {
            f"{i}.{name}": t.detach() for i, gate in best.gates.items() for name, t in vars(gate).items()
        }
        found |= {
            f"parameter.{index}": p.detach() for index, p in enumerate(self.parameters())
        } | optimizer_state.tensors_of(self.optimizer)
        judged = torch.tensor([best.share, best.divergence], dtype=torch.float64)
        found |= {"judged": judged, "random": self.generator.get_state(), "done": torch.tensor(self.done)}
        files.write_work(self.work, UNFINISHED, found)

    def saved(self) -> dict[str, Tensor] | None:
        return files.read_work(self.work, UNFINISHED)

    def best_of(self, found: dict[str, Tensor]) -> TrainedGates:
        gates = {
            i: Gate(**{name: self._fits(found, f"{i}.{name}", t) for name, t in vars(gate).items()})
            for i, gate in self.gates.items()
        }
        return TrainedGates(gates, *self._fits(found, "judged", torch.zeros(2, dtype=torch.float64)).tolist())

    def restore(self, found: dict[str, Tensor]) -> None:
        for index, p in enumerate(self.parameters()):
            p.data.copy_(self._fits(found, f"parameter.{index}", p))
        optimizer_state.fill_state(self.optimizer, found, str(self.work))
        self.generator.set_state(self._fits(found, "random", self.generator.get_state()))
        self.done = int(self._fits(found, "done", torch.tensor(0)))
        if self.work is not None and not 0 < self.done <= self.settings.steps:
            raise files.damaged_work(self.work, f"{self.done} of {self.settings.steps} steps are done")

    def _fits(self, found: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
        return files.checked_tensor(found, name, like, self.work or Path()).to(like.device)

    def loss(self, ids: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
        def drawn(numbers: Tensor) -> Tensor:
            uniform = torch.rand(numbers.shape, generator=generator).clamp(1e-9, 1 - 1e-7).to(numbers)
            soft = ((numbers - (-uniform.log()).log()) / temperature).softmax(-1)
            return _one_hot(soft) + soft - soft.detach() if self.settings.straight else soft

        divergence, share = self.passed(ids, self.gates, drawn)
        return divergence + self.settings.penalty * (share - self.settings.target).relu().square()

    def passed(
        self, ids: Tensor, gates: dict[int, Gate], choose: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """KL(original || compressed) per token and the mean share of coordinates kept, of windows (b, t)."""
        ids = ids.to(device_of(self.model))
        scores, share = self.through(ids, gates, choose)
        with torch.no_grad():
            original = self.model(ids, use_cache=False).logits
        return model_probe.kl_divergence(scores, original), share

    def through(
        self, ids: Tensor, gates: dict[int, Gate], choose: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Logits and mean share when every token of every layer takes the levels in the proportions that
        `choose` makes of its numbers.
        """
        shares: list[Tensor] = []
        d = self.levels[0]

        def looking(gate: Gate) -> Look:
            def look(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
                weights = choose(gate(keys, values))
                ranks = torch.tensor(self.levels, device=weights.device)
                kept = (
                    weights @ (torch.arange(d, device=weights.device) < ranks.unsqueeze(1)).to(weights)
                ).unsqueeze(1)
                shares.append((weights @ (ranks / d)).mean().to(ids.device))
                return keys * kept, values * kept

            return look

        storages: dict[int, KVTransform] = {
            i: ObservedReconstruction(f, self.layout, families.rope(self.model, i), looking(gates[i]))
            for i, f in self.maps.items()
        }
        scores = model_probe.logits(self.model, ids, storages)
        return scores, torch.stack(shares).mean()

    # -- judging

    @torch.no_grad()
    def judged(self) -> TrainedGates:
        """The gates at the least price that keeps the held-out windows to the target."""
        gates = _priced(self.gates, self._price(), self.levels)
        batches = self.rows[-self.held :].split(self.settings.batch)
        sums = (
            torch.stack([torch.stack(self.passed(ids, gates, _one_hot)) * len(ids) for ids in batches]).sum(0)
            / self.held
        )
        return TrainedGates(gates, float(sums[1]), float(sums[0]))

    def _price(self) -> float:
        """Found between the first of 1, 2, 4 ... that is high enough and the first of -1, -2, -4 ... that is
        too low.
        """
        reach = [2.0**i for i in range(PRICE_DOUBLINGS)]
        high = next((p for p in reach if self._within(p)), reach[-1])
        low = next((-p for p in reach if not self._within(-p)), -reach[-1])
        for _ in range(PRICE_HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if self._within(middle) else (middle, high)
        return high

    def _within(self, price: float) -> bool:
        gates, device = _priced(self.gates, price, self.levels), device_of(self.model)
        batches = self.rows[-self.held :].to(device).split(self.settings.batch)
        shares = [float(self.through(ids, gates, _one_hot)[1]) * len(ids) for ids in batches]
        return sum(shares) / self.held <= self.settings.target + ROUNDING


def _one_hot(numbers: Tensor) -> Tensor:
    """The largest alone."""
    return F.one_hot(numbers.argmax(-1), numbers.shape[-1]).to(numbers)


def _priced(gates: dict[int, Gate], price: float, levels: tuple[int, ...]) -> dict[int, Gate]:
    """Copies whose numbers are less by the price of the coordinates kept, which is `price` for all of them."""
    shares = torch.tensor(levels) / levels[0]
    copies = {
        i: Gate(**{name: t.detach().clone() for name, t in vars(gate).items()}) for i, gate in gates.items()
    }
    return {
        i: replace(gate, out_bias=gate.out_bias - price * shares.to(gate.out_bias))
        for i, gate in copies.items()
    }


def _loose(gate: Gate) -> Gate:
    return Gate(gate.scale, *(t.detach().clone().requires_grad_() for t in _trained(gate)))


def _trained(gate: Gate) -> tuple[Tensor, ...]:
    return gate.hidden, gate.hidden_bias, gate.out, gate.out_bias
