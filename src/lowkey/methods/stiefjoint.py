"""StiefAttention's idea (arXiv:2601.21686) for all heads and layers of a model together."""

from __future__ import annotations

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
from lowkey.ops.products import column_signs, root_and_inverse
from lowkey.ops.schedule import warmup_cosine
from lowkey.probes import model_probe
from lowkey.probes.gradients import GradientMoments

JOINT_JUDGEMENTS = 4  # how many times the held-out windows judge
DIVERGENCE_WINDOWS = 8  # how many of them, at most
JOINT_WARMUP = 0.1  # share of the steps
BETAS = (0.9, 0.98)  # of Adam
GRADIENT_RIDGE = 1e-6  # added to second moments, relative to their mean eigenvalue
MAP_TRAINING_FILE = "training"  # name of the unfinished training in the work folder


@dataclass(frozen=True)
class StiefJoint(GradientMethod):
    """StiefAttention extended (ours): oblique maps, trained on the divergence of the whole model.

    It starts from `fisher-svd`, in closed form, whose spectra also decide the ranks. Then, at the chosen
    ranks, Adam minimises KL(original || compressed) of the next tokens, one training window per step, with a
    warm-up and a cosine decay. Held-out windows judge a few times; the best maps are kept, the start among
    them. A little text is soon learnt by heart: more windows help more than more steps.

    The maps are trained in coordinates in which keys (or values) are white. With C their second moment,
    down = C^{-1/2} U and up = W C^{1/2}. At the start U is orthonormal and W = U^T; then both move freely.

    Source: arXiv:2601.21686, which trains orthonormal bases per layer on the relative error of that layer's
    output. In that error a few massive tokens drown all others, and it is dominated by the tokens that the
    cache keeps exactly. Here latents are joint over heads and stored before rotation, all layers are
    compressed at once, queries see exactly what the cache keeps exactly, and the error is that of the model's
    own distribution.

    Args:
        group: how many KV heads share one latent; it divides their number, or is 0 (default) for all.
        steps: training steps of one window each (default 96).
        lr: peak learning rate (default 2e-4).
    """

    summary: ClassVar[str] = (
        "fisher-svd, then maps of all layers trained on the divergence of the whole model"
    )
    paper: ClassVar[str] = "arXiv:2601.21686"
    has_finish = True

    steps: int = option(96, at_least=0, at_most=10**7)
    lr: float = option(2e-4, above=0, at_most=10)

    def tune(self, bases: dict[int, LayerBases], context: CalibrationContext) -> dict[int, LayerBases]:
        """Return the closed form of `fisher-svd` for all layers."""
        return self.closed_form(context, GRADIENT_RIDGE)

    def finish(self, factors: dict[int, Factors], context: CalibrationContext) -> dict[int, Factors]:
        """Train the maps of all layers at the chosen ranks."""
        heads = families.geometry(context.model).kv_heads
        groups = heads // (self.group or heads)
        training = MapTraining.of(factors, context.gradient_moments, groups, context)
        with torch.enable_grad():
            return training.run(self.steps, self.lr)


class WhitenedMaps:
    """The maps of one layer's keys or values, in coordinates in which what they map is white.

    Attributes:
        root, inverse: C^{1/2} and C^{-1/2} of the second moment C, (G, n, n) with n = t d.
        down, up: the trained maps U (G, n, r) and W (G, r, n).
    """

    def __init__(self, moment: Tensor, down: Tensor, up: Tensor, device: torch.device) -> None:
        """Start from maps.

        Args:
            moment: C (G, n, n).
            down: (G, n, r).
            up: (h, r, d).
            device: of the layer.
        """
        root, inverse = root_and_inverse(moment, GRADIENT_RIDGE)
        self.t = moment.shape[-1] // up.shape[-1]
        white_down, white_up = root @ down.double(), side_by_side(up, self.t).double() @ inverse
        # Each pair of a column of `down` and a row of `up` is scaled so that the column has norm 1.
        length = white_down.norm(dim=-2, keepdim=True)
        self.root, self.inverse = root.float().to(device), inverse.float().to(device)
        self.down = (white_down / length).float().to(device).requires_grad_()
        self.up = (white_up * length.mT).float().to(device).requires_grad_()

    def maps(self) -> tuple[Tensor, Tensor]:
        """Return the maps (down (G, n, r), up (h, r, d)) of keys or values themselves."""
        return self.inverse @ self.down, per_head_maps(self.up @ self.root, self.t)

    @torch.no_grad()
    def balanced(self) -> tuple[Tensor, Tensor]:
        """Return `maps` on the CPU, each column and its row of equal norms, as `fisher-svd` has them."""
        down, up = (self.inverse @ self.down).cpu(), (self.up @ self.root).cpu()
        scale = (up.norm(dim=-1, keepdim=True).mT / down.norm(dim=-2, keepdim=True)).sqrt() * column_signs(
            down
        )
        return down * scale, per_head_maps(up / scale.mT, self.t)


@dataclass
class MapTraining:
    """The training of all layers' maps.

    Args:
        context: the model, the windows and the work folder.
        sides: by layer, the maps of keys and of values.
    """

    context: CalibrationContext
    sides: dict[int, tuple[WhitenedMaps, WhitenedMaps]]

    @classmethod
    def of(
        cls, factors: dict[int, Factors], moments: GradientMoments, groups: int, context: CalibrationContext
    ) -> MapTraining:
        """Start from factors, in the coordinates that second moments (h d, h d) of `groups` groups give."""
        sides = {}
        for i, f in factors.items():
            device = device_of(families.decoder_layers(context.model)[i])
            keys, values = (head_blocks(moments[i][name], groups) for name in ("keys", "values"))
            sides[i] = (
                WhitenedMaps(keys, f.k_down, f.k_up, device),
                WhitenedMaps(values, f.v_down, f.v_up, device),
            )
        return cls(context, sides)

    @property
    def parameters(self) -> list[Tensor]:
        """All that is trained."""
        return [p for pair in self.sides.values() for side in pair for p in (side.down, side.up)]

    def run(self, steps: int, lr: float) -> dict[int, Factors]:
        """Train, and return the maps that the held-out windows found best.

        Whenever these judge, the state is saved into the work folder. A resumed training gives the same maps.
        """
        optimizer, done = torch.optim.Adam(self.parameters, lr=lr, betas=BETAS), 0
        saved = self._saved()
        if saved is not None:
            best_loss, best, done = self._restore(saved, optimizer, steps)
        else:
            best_loss, best = self.held_out_loss(), [p.detach().clone() for p in self.parameters]
        order = self._window_order(steps)  # of the whole training, so that a resumed one goes on in it
        for step in self.context.progress(range(done, steps), "training maps", steps - done):
            loss = self.loss(self.context.training_windows[order[step]].unsqueeze(0))
            # `grad` and not `backward`, which would also fill the gradients of the model's own weights
            for p, gradient in zip(self.parameters, torch.autograd.grad(loss, self.parameters), strict=True):
                p.grad = gradient
            for group in optimizer.param_groups:
                group["lr"] = lr * warmup_cosine(step, steps, JOINT_WARMUP)
            optimizer.step()
            if (step + 1) % max(1, steps // JOINT_JUDGEMENTS) == 0 or step + 1 == steps:
                judged = self.held_out_loss()
                if judged < best_loss:
                    best_loss, best = judged, [p.detach().clone() for p in self.parameters]
                self._save(optimizer, best, best_loss, step + 1)
        with torch.no_grad():
            for p, value in zip(self.parameters, best, strict=True):
                p.copy_(value)
        return {i: Factors(*keys.balanced(), *values.balanced()) for i, (keys, values) in self.sides.items()}

    def loss(self, rows: Tensor) -> Tensor:
        """Return KL(original || compressed) per token of windows (b, t), in nats."""
        model, ids = self.context.model, rows.to(device_of(self.context.model))
        with torch.no_grad():
            original = model(ids, use_cache=False).logits
        maps = {i: Factors(*keys.maps(), *values.maps()) for i, (keys, values) in self.sides.items()}
        transforms = model_probe.reconstructions(model, maps, self.context.layout)
        compressed = model_probe.logits(model, ids, transforms, self.context.exact)
        return model_probe.kl_divergence(compressed, original)

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Return the mean loss over a few held-out windows."""
        rows = self.context.held_out_windows[:DIVERGENCE_WINDOWS]
        return sum(float(self.loss(row.unsqueeze(0))) for row in rows) / len(rows)

    def _window_order(self, steps: int) -> list[int]:
        """Return a window for each step: every window once, in random order, before any comes again."""
        generator, n = torch.Generator().manual_seed(self.context.seed), len(self.context.training_windows)
        rounds = [torch.randperm(n, generator=generator) for _ in range(-(-steps // n))]
        return torch.cat(rounds).tolist()[:steps] if rounds else []

    # -- saving and resuming

    def _save(
        self, optimizer: torch.optim.Optimizer, best: list[Tensor], best_loss: float, done: int
    ) -> None:
        if self.context.work is None:
            return
        tensors = {f"parameter.{n}": p.detach() for n, p in enumerate(self.parameters)}
        tensors |= {f"best.{n}": p for n, p in enumerate(best)}
        tensors |= {
            "judged": torch.tensor(best_loss, dtype=torch.float64),
            "done": torch.tensor(done),
            "widths": self._widths(),
        }
        tensors |= optimizer_state.tensors_of(optimizer)
        files.write_work(self.context.work, MAP_TRAINING_FILE, tensors)

    def _widths(self) -> Tensor:
        """Return the widths of all latents.

        The folder of a job is the same for every budget, so the widths tell which ranks were trained.
        """
        return torch.tensor([side.down.shape[-1] for pair in self.sides.values() for side in pair])

    def _saved(self) -> dict[str, Tensor] | None:
        """Return the saved training, or None if there is none or it is that of other ranks."""
        work = self.context.work
        tensors = files.read_work(work, MAP_TRAINING_FILE)
        if work is None or tensors is None:
            return None
        widths = self._widths()
        return tensors if torch.equal(files.checked_tensor(tensors, "widths", widths, work), widths) else None

    @torch.no_grad()
    def _restore(
        self, tensors: dict[str, Tensor], optimizer: torch.optim.Optimizer, steps: int
    ) -> tuple[float, list[Tensor], int]:
        """Restore parameters and optimizer. Returns the best loss, its parameters, and the steps done."""
        work = self.context.work or Path()

        def checked(name: str, like: Tensor) -> Tensor:
            return files.checked_tensor(tensors, name, like, work)

        best = [checked(f"best.{n}", p).to(p.device) for n, p in enumerate(self.parameters)]
        for n, p in enumerate(self.parameters):
            p.copy_(checked(f"parameter.{n}", p))
        optimizer_state.fill_state(optimizer, tensors, str(work))
        done = int(checked("done", torch.tensor(0)))
        if not 0 < done <= steps:
            raise files.damaged_work(work, f"{done} of {steps} steps are done")
        return float(checked("judged", torch.zeros((), dtype=torch.float64))), best, done
