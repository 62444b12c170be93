"""StiefAttention's idea (arXiv:2601.21686) over all heads and the whole model: maps trained on what the
compressed model puts out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from lowkey.core import files, optimizer_state
from lowkey.core.head_groups import per_head_maps, side_by_side
from lowkey.core.options import option
from lowkey.core.types import Factors, LayerBases, device_of, head_blocks
from lowkey.methods.base import CalibrationContext, GradientMethod
from lowkey.models import families
from lowkey.ops.products import roots, signs
from lowkey.ops.schedule import falling
from lowkey.probes import model_probe

JOINT_JUDGEMENTS = 4  # how often held-out windows judge
JUDGING = 8  # of them, at most
JOINT_WARMUP = 0.1  # of the steps
BETAS = (0.9, 0.98)
GRADIENT_RIDGE = 1e-6


@dataclass(frozen=True)
class StiefJoint(GradientMethod):
    """Oblique projectors of a layer's heads together, trained at the chosen ranks on KL(original ||
    compressed) of the next tokens.

    arXiv:2601.21686 trains orthonormal bases per layer, on the relative error of that layer's output, in
    which massive tokens drown the others and which the cache's exact tokens dominate. Here latents are joint
    over heads and kept before rotation, every layer is compressed at once, queries see exactly what the cache
    keeps exactly, and the error is that of the model's own distribution.

    Start: `fisher-svd`, in closed form, which also gives the spectra by which ranks are chosen. Then, at
    those ranks, `steps` steps of Adam, each on one window of the fitting text, with a peak rate `lr`, a
    warm-up and a cosine. Trained are the maps in coordinates in which keys (values) are white: with C their
    second moment, down = C^{-1/2} U and up = W C^{1/2}. At the start U is orthonormal and W = U^T; both then
    move freely. Held-out windows judge a few times, and the best maps seen are kept, the start among them.
    Little text is soon learnt by heart: more windows help more than more steps.

    group: how many KV heads share one latent, a divisor of their number, or 0 for all.
    """

    summary: ClassVar[str] = (
        "fisher-svd, then maps of all layers trained on the divergence of the whole model"
    )
    paper: ClassVar[str] = "arXiv:2601.21686"
    has_finish: ClassVar[bool] = True

    steps: int = option(96, at_least=0, at_most=10**7)
    lr: float = option(2e-4, above=0, at_most=10)

    def tune(self, bases: dict[int, LayerBases], context: CalibrationContext) -> dict[int, LayerBases]:
        return self.closed_form(context, GRADIENT_RIDGE)

    def finish(self, factors: dict[int, Factors], context: CalibrationContext) -> dict[int, Factors]:
        heads = families.geometry(context.model).kv_heads
        training = MapTraining.of(factors, context.gradient_moments, heads // (self.group or heads), context)
        with torch.enable_grad():
            return training.run(self.steps, self.lr)


class White:
    """Maps down (G, n, r) and up (h, r, d) in coordinates in which what they map, of second moment (G, n, n),
    is white. Trained: down and up, (G, n, r) and (G, r, n)."""

    def __init__(self, moment: Tensor, down: Tensor, up: Tensor, device: torch.device) -> None:
        root, inverse = roots(moment, GRADIENT_RIDGE)
        self.t = moment.shape[-1] // up.shape[-1]
        inside, back = root @ down.double(), side_by_side(up, self.t).double() @ inverse
        length = inside.norm(dim=-2, keepdim=True)
        self.root, self.inverse = root.float().to(device), inverse.float().to(device)
        self.down, self.up = (
            (inside / length).float().to(device).requires_grad_(),
            (back * length.mT).float().to(device).requires_grad_(),
        )

    def maps(self) -> tuple[Tensor, Tensor]:
        return self.inverse @ self.down, per_head_maps(self.up @ self.root, self.t)

    @torch.no_grad()
    def balanced(self) -> tuple[Tensor, Tensor]:
        """On the CPU, each pair of columns of equal norms, as `fisher-svd` stores them."""
        down, up = (self.inverse @ self.down).cpu(), (self.up @ self.root).cpu()
        scale = (up.norm(dim=-1, keepdim=True).mT / down.norm(dim=-2, keepdim=True)).sqrt() * signs(down)
        return down * scale, per_head_maps(up / scale.mT, self.t)


@dataclass
class MapTraining:
    """The maps of all layers, and how far their training is."""

    context: CalibrationContext
    sides: dict[int, tuple[White, White]]

    @classmethod
    def of(
        cls,
        factors: dict[int, Factors],
        found: dict[int, dict[str, Tensor]],
        groups: int,
        context: CalibrationContext,
    ) -> MapTraining:
        def white(i: int, of: str, down: Tensor, up: Tensor) -> White:
            return White(
                head_blocks(found[i][of], groups),
                down,
                up,
                device_of(families.decoder_layers(context.model)[i]),
            )

        sides = {
            i: (white(i, "keys", f.k_down, f.k_up), white(i, "values", f.v_down, f.v_up))
            for i, f in factors.items()
        }
        return cls(context, sides)

    @property
    def parameters(self) -> list[Tensor]:
        return [p for pair in self.sides.values() for side in pair for p in (side.down, side.up)]

    def run(self, steps: int, lr: float) -> dict[int, Factors]:
        """The maps that the held-out windows found best. What is done is saved at every look, to go on from
        to the same maps.
        """
        optimizer, done = torch.optim.Adam(self.parameters, lr=lr, betas=BETAS), 0
        if (found := self._saved()) is not None:
            best, kept, done = self._restored(found, optimizer, steps)
        else:
            best, kept = self.judged(), copies(self.parameters)
        order = self._order(steps)
        for k in self.context.progress(range(done, steps), "training maps", steps - done):
            gradients = torch.autograd.grad(
                self.loss(self.context.training_windows[order[k]].unsqueeze(0)), self.parameters
            )
            for p, gradient in zip(self.parameters, gradients, strict=True):
                p.grad = gradient
            for group in optimizer.param_groups:
                group["lr"] = lr * falling(k, steps, JOINT_WARMUP)
            optimizer.step()
            if (k + 1) % max(1, steps // JOINT_JUDGEMENTS) == 0 or k + 1 == steps:
                if (now := self.judged()) < best:
                    best, kept = now, copies(self.parameters)
                self._save(optimizer, kept, best, k + 1)
        with torch.no_grad():
            for p, value in zip(self.parameters, kept, strict=True):
                p.copy_(value)
        return {i: Factors(*keys.balanced(), *values.balanced()) for i, (keys, values) in self.sides.items()}

    def loss(self, rows: Tensor) -> Tensor:
        """KL(original || compressed) per token of windows (b, t)."""
        model, ids = self.context.model, rows.to(device_of(self.context.model))
        with torch.no_grad():
            original = model(ids, use_cache=False).logits
        maps = {i: Factors(*keys.maps(), *values.maps()) for i, (keys, values) in self.sides.items()}
        found = model_probe.logits(
            model, ids, model_probe.reconstructions(model, maps, self.context.layout), self.context.exact
        )
        return model_probe.kl_divergence(found, original)

    @torch.no_grad()
    def judged(self) -> float:
        """The loss over held-out windows, of which a few are enough."""
        rows = self.context.held_out_windows[:JUDGING]
        return sum(float(self.loss(row.unsqueeze(0))) for row in rows) / len(rows)

    def _order(self, steps: int) -> list[int]:
        """Every window once, in random order, before any comes again."""
        generator, n = torch.Generator().manual_seed(self.context.seed), len(self.context.training_windows)
        return (
            torch.cat([torch.randperm(n, generator=generator) for _ in range(-(-steps // n))]).tolist()[
                :steps
            ]
            if steps
            else []
        )

    def _save(self, optimizer: torch.optim.Optimizer, kept: list[Tensor], best: float, done: int) -> None:
        if self.context.work is not None:
            found = {f"parameter.{n}": p.detach() for n, p in enumerate(self.parameters)} | {
                f"best.{n}": p for n, p in enumerate(kept)
            }
            found |= {
                "judged": torch.tensor(best, dtype=torch.float64),
                "done": torch.tensor(done),
                "widths": self._widths(),
            }
            found |= optimizer_state.tensors_of(optimizer)
            files.write_work(self.context.work, "training", found)

    def _widths(self) -> Tensor:
        """Of all latents. The job is the same for every budget, so these tell whose training was saved."""
        return torch.tensor([side.down.shape[-1] for pair in self.sides.values() for side in pair])

    def _saved(self) -> dict[str, Tensor] | None:
        found, own = files.read_work(self.context.work, "training"), self._widths()
        same = found is not None and torch.equal(
            files.checked_tensor(found, "widths", own, self.context.work or Path()), own
        )
        return found if same else None

    @torch.no_grad()
    def _restored(
        self, found: dict[str, Tensor], optimizer: torch.optim.Optimizer, steps: int
    ) -> tuple[float, list[Tensor], int]:
        work = self.context.work or Path()
        kept = [
            files.checked_tensor(found, f"best.{n}", p, work).to(p.device)
            for n, p in enumerate(self.parameters)
        ]
        for n, p in enumerate(self.parameters):
            p.copy_(files.checked_tensor(found, f"parameter.{n}", p, work))
        optimizer_state.fill_state(optimizer, found, str(work))
        done = int(files.checked_tensor(found, "done", torch.tensor(0), work))
        if not 0 < done <= steps:
            raise files.damaged_work(work, f"{done} of {steps} steps are done")
        return (
            float(files.checked_tensor(found, "judged", torch.zeros((), dtype=torch.float64), work)),
            kept,
            done,
        )


def copies(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]
