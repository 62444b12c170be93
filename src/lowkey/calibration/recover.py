"""`recover`: train a model for a little while through its compressed cache, so that it adapts to it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.calibration import trainable
from lowkey.calibration.held_out import HeldOut
from lowkey.calibration.objectives import OBJECTIVES, Student
from lowkey.calibration.trainable import TrainableModel
from lowkey.core import files, optimizer_state, text
from lowkey.core.options import Checked, nearest_name, option, shown
from lowkey.core.progress import Progress, silent
from lowkey.core.seeds import seed_of
from lowkey.core.types import Factors, LowkeyError, device_of
from lowkey.models import families, weights
from lowkey.models.attention_interface import attach
from lowkey.models.fingerprint import data_fingerprint, model_fingerprint
from lowkey.ops.schedule import warmup_cosine
from lowkey.plan.plan import Plan, versions

RECOVERY_FILE = "training"  # name of the unfinished training in the work folder


@dataclass(frozen=True)
class Recovery(Checked):
    """How to train.

    Args:
        stages: objectives in order, each with its number of steps (default 200 steps of `ce`).
            `distill`: every layer gets the ORIGINAL model's input of that layer; the relative squared error
            between its compressed output and the original layer's output, averaged over layers
            (arXiv:2507.11273, Eq. 7, stage I).
            `ce`: next-token cross-entropy, every layer compressed.
            `kl`: KL(original || compressed) of next-token distributions per token, of logits over
            `temperature` (not multiplied by its square, as in KV-Latent's code).
        rank: of the adapters (default 16).
        alpha: of the adapters (default 32).
        dropout: of the adapters (default 0).
        batch: windows per step (default 4).
        length: tokens per window (default 256).
        lr: peak learning rate of each stage (default 3e-4), reached after a share `warmup` of its steps; it
            then falls to 0 by a cosine.
        weight_decay: of AdamW (default 0.01). The plan's maps have none, since it would pull them to zero.
        warmup: share of a stage's steps (default 0.05).
        factors: whether to train the plan's maps too; they are then no longer orthonormal (default false).
        seed: of everything random (default 0).
        save_every: steps between two saves into the work folder (default 50).
        lora: linear layers of the decoder layers that are trained through LoRA adapters (arXiv:2106.09685),
            as patterns of their names in the layer, like `self_attn.*` or `mlp.gate_proj` (default all).
        full: those that are trained in full, as arXiv:2507.11273 trains attention (default none). What `lora`
            and `full` both name is trained in full.
        temperature: of the objective `kl` (default 1).
        lrs: a peak for each stage in place of `lr`.
        betas: of AdamW (default 0.9, 0.999).
        eps: of AdamW (default 1e-8).
    """

    stages: tuple[tuple[str, int], ...] = option((("ce", 200),), at_least=1, at_most=10**9)
    rank: int = option(16, at_least=1, at_most=2**16)
    alpha: int = option(32, at_least=1, at_most=2**20)
    dropout: float = option(0.0, at_least=0, below=1)
    batch: int = option(4, at_least=1, at_most=4096)
    length: int = option(256, at_least=8, at_most=2**24)
    lr: float = option(3e-4, above=0)
    weight_decay: float = option(0.01, at_least=0, at_most=1000)
    warmup: float = option(0.05, at_least=0, below=1)
    factors: bool = False
    seed: int = option(0, at_least=0)
    save_every: int = option(50, at_least=1)
    lora: tuple[str, ...] = option(("*",), any_text=True)
    full: tuple[str, ...] = option((), any_text=True)
    temperature: float = option(1.0, above=0, at_most=1000)
    lrs: tuple[float, ...] = option((), above=0)
    betas: tuple[float, float] = option((0.9, 0.999), at_least=0, below=1)
    eps: float = option(1e-8, above=0, at_most=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.stages:
            raise LowkeyError("stages (): there is nothing to train; give at least one, as in (('ce', 200),)")
        if self.lrs and len(self.lrs) != len(self.stages):
            raise LowkeyError(
                f"lrs {list(self.lrs)}: must have one rate for each of {len(self.stages)} stages; give as "
                "many, or lr for all"
            )


@dataclass(frozen=True)
class Recovered:
    """What `recover` returns. All of it but the records of steps is in the new plan's provenance too.

    Args:
        model: a plain model with what was learned in its weights.
        plan: the plan, re-issued for that model.
        losses: one record per step: {"step": 1.., "stage", "loss": before that step, "tokens": seen by then}.
        stages: of each stage the objective, its steps, and its first and last loss. Objectives differ, so
            losses of two stages cannot be compared.
        held_out: what can be compared: the next-token cross-entropy in nats on the embedded evaluation text,
            through the plan `before` and `after` the training, and of the original model with the `full`
            cache.
        exact: whether the plan loses nothing, so that there was nothing to recover (its maps at full rank are
            identities).
    """

    model: PreTrainedModel
    plan: Plan
    losses: list[dict]
    stages: list[dict]
    held_out: dict[str, float]
    exact: bool = False


def recover(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    texts: str | Sequence[str] | None = None,
    *,
    settings: Recovery = Recovery(),
    work: Path | None = None,
    progress: Progress = silent,
) -> Recovered:
    """Train a copy of a model through a plan.

    A query sees the plan's sinks and recent tokens exactly, as in a cache, and all others in low rank. The
    plan's integers and its policy are left out, since rounding and dropping have no gradient; the new plan
    has them again. On a CPU a resumed training gives the numbers of an uninterrupted one bit for bit.

    Args:
        model: stays as it is.
        tokenizer: the model's tokenizer.
        plan: made for this model; it stays as it is.
        texts: what to train on. None: the embedded calibration text.
        settings: how to train.
        work: a folder to save progress into and to resume from.
        progress: shows how far the training is.

    Raises:
        LowkeyError: if peft is missing, the plan is another model's or gives every token a rank of its own,
            settings are out of range, the text is shorter than a window, or the loss is no longer finite.
    """
    plan.check_fixed_ranks("recover")
    trainable.import_peft()
    weights.check_plain("recover", model, families.decoder_layers(model))
    _check(settings, model)
    plan.check(model)
    if not plan.factors:
        raise LowkeyError(
            "plan: has no low-rank maps, so that there is nothing to train through; give a plan of `lowkey "
            "compress`, or of `lowkey plan` on the axis rank"
        )
    if settings.length <= plan.sinks + plan.recent:
        raise LowkeyError(
            f"length {settings.length}: the plan keeps {plan.sinks + plan.recent} tokens exact, so that "
            "nothing would be compressed; give longer windows"
        )
    data = TrainingWindows.of(tokenizer, text.joined_texts(texts), settings)
    text.check_ids(data.ids, model)
    # Other settings, another plan or another text are another job with a folder of its own.
    folder = files.job_folder(work, _job(plan, data, settings))
    training = RecoveryTraining.of(model, plan, data, settings)
    if folder is not None and (saved := files.read_work(folder, RECOVERY_FILE)) is not None:
        training.restore(saved, folder)
    judge = HeldOut.of(tokenizer, model, settings.length)
    # Judged before the first step, and again after the last one on the merged model.
    with training.student.trainable.original() as original:
        held_out = {"full": judge.loss(original), "before": judge.loss(original, plan)}
    with torch.enable_grad():
        training.run(folder, progress)
    return _result(training, plan, judge, held_out)


def _check(settings: Recovery, model: PreTrainedModel) -> None:
    for name, _ in settings.stages:
        if name not in OBJECTIVES:
            raise LowkeyError(f"stage {shown(name)} is unknown; {nearest_name(name, OBJECTIVES)}")
    trainable.check_trainable(model, settings.lora, settings.full)
    longest = families.max_positions(model)
    if longest is not None and settings.length > longest:
        raise LowkeyError(f"length {settings.length}: the model has {longest} positions; give at most that")


@dataclass(frozen=True)
class TrainingWindows:
    """The windows of every training step, cut from a text.

    Args:
        ids: token ids (n,) of the whole text.
        start: the beginning-of-text token, if the tokenizer has one.
        settings: how to train.
    """

    ids: Tensor
    start: tuple[int, ...]
    settings: Recovery

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, corpus: str, settings: Recovery) -> TrainingWindows:
        """Tokenise a text.

        Raises:
            LowkeyError: if it is shorter than one window.
        """
        ids = text.encode(tokenizer, corpus)
        start = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
        if len(ids) < settings.length:
            raise LowkeyError(
                f"training text: {len(ids)} tokens are fewer than length {settings.length}; give more text "
                "or less length"
            )
        return cls(ids, start, settings)

    def at(self, step: int) -> Tensor:
        """Return the ids (batch, length) of one step, from random places.

        They depend on the seed and the step alone, so a resumed training reads the same windows.
        """
        body = self.settings.length - len(self.start)
        generator = torch.Generator().manual_seed(seed_of(self.settings.seed, step))
        places = torch.randint(len(self.ids) - body + 1, (self.settings.batch,), generator=generator)
        start = torch.tensor(self.start, dtype=torch.long).expand(len(places), -1)
        # `unfold` views all windows of the text at once: (n - body + 1, body).
        return torch.cat([start, self.ids.unfold(0, body, 1)[places]], dim=1)

    def fingerprint(self) -> str:
        """Return a checksum of the text's ids."""
        return data_fingerprint(torch.cat([torch.tensor(self.start, dtype=torch.long), self.ids]))


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed torch's global random numbers inside, and restore their state afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _tensors(f: Factors) -> dict[str, Tensor]:
    return {x.name: t for x in fields(f) if isinstance(t := getattr(f, x.name), Tensor)}


def _maps(f: Factors) -> dict[str, Tensor]:
    """Return the tensors that can be trained, which the order of heads cannot."""
    return {name: t for name, t in _tensors(f).items() if t.is_floating_point()}


def _trainable_copy(f: Factors, device: torch.device) -> Factors:
    """Return a copy in fp32 on a device.

    Each map gets memory of its own, since orthonormal maps down and up are views of one another.
    """
    copies = {name: t.detach().to(device, copy=True).contiguous() for name, t in _tensors(f).items()}
    return replace(f, **{name: t.float() if t.is_floating_point() else t for name, t in copies.items()})


@dataclass
class RecoveryTraining:
    """The training of a model through a plan, step by step.

    Args:
        student: the model in training.
        data: the windows of every step.
        settings: how to train.
        model_parameters: what is trained of the model, by name.
        maps: what is trained of the plan, by name; empty unless `settings.factors`.
        losses: the loss of every step done.
        between_steps: whether no step is half done, so that the state may be saved.
    """

    student: Student
    data: TrainingWindows
    settings: Recovery
    model_parameters: dict[str, Tensor]
    maps: dict[str, Tensor]
    losses: list[float] = field(default_factory=list)
    between_steps: bool = True

    def __post_init__(self) -> None:
        stages = self.settings.stages
        rates = self.settings.lrs or [self.settings.lr] * len(stages)
        # One entry per step: objective, step within its stage, steps of the stage, peak rate.
        self.schedule = [
            (name, k, steps, peak)
            for (name, steps), peak in zip(stages, rates, strict=True)
            for k in range(steps)
        ]
        self.optimizer = self._new_optimizer()

    @classmethod
    def of(
        cls, model: PreTrainedModel, plan: Plan, data: TrainingWindows, settings: Recovery
    ) -> RecoveryTraining:
        """Copy the model and the plan's maps, and prepare them for training."""
        adapter = {"r": settings.rank, "lora_alpha": settings.alpha, "lora_dropout": settings.dropout}
        # peft draws the adapters from torch's global random numbers.
        with _seeded(device_of(model), seed_of(settings.seed, "adapters")):
            twin = TrainableModel.of(model, settings.lora, settings.full, **adapter)
        layers = families.decoder_layers(twin.model)
        factors = {i: _trainable_copy(f, device_of(layers[i])) for i, f in plan.factors.items()}
        maps = {
            f"{i}.{name}": t.requires_grad_()
            for i, f in factors.items()
            for name, t in _maps(f).items()
            if settings.factors
        }
        student = Student(twin, plan, factors, settings.temperature)
        return cls(student, data, settings, twin.parameters(), maps)

    def _new_optimizer(self) -> torch.optim.AdamW:
        """Return a new optimizer; every stage has one, since its gradients have a size of their own."""
        groups: list[dict] = [{"params": list(self.model_parameters.values())}]
        if self.maps:
            groups.append({"params": list(self.maps.values()), "weight_decay": 0.0})
        s = self.settings
        return torch.optim.AdamW(groups, lr=s.lr, betas=s.betas, eps=s.eps, weight_decay=s.weight_decay)

    def run(self, folder: Path | None, progress: Progress) -> None:
        """Take all steps that are left, and save into the folder every few steps and when interrupted."""
        left = range(len(self.losses), len(self.schedule))
        try:
            for n in progress(left, "recovering", len(left)):
                self.step(n)
                if (n + 1) % self.settings.save_every == 0 or n == left[-1]:
                    self.save(folder)
        except KeyboardInterrupt:
            self.save(folder)
            raise

    def step(self, n: int) -> None:
        """Take step n, counted from 0 over all stages.

        Raises:
            LowkeyError: if the loss or its gradient is not finite.
        """
        name, k, steps, peak = self.schedule[n]
        if k == 0:
            self.optimizer = self._new_optimizer()
        # Every stage warms up and falls on its own.
        rate = peak * warmup_cosine(k, steps, self.settings.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        loss = self._backward(name, n)
        parameters = (*self.model_parameters.values(), *self.maps.values())
        # A loss may be finite while its gradient is not.
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise LowkeyError(
                f"lr {peak:g}: loss {loss:g} and gradient {float(norm):g} of step {n + 1} must be finite; "
                "give a smaller lr"
            )
        # An interrupt between these two lines would leave weights and losses of different steps.
        self.between_steps = False
        self.optimizer.step()
        self.losses.append(loss)
        self.between_steps = True

    def _backward(self, name: str, n: int) -> float:
        """Return the loss of step n after adding its gradients to those of the parameters."""
        device, loss = device_of(self.student.model), 0.0
        # Dropout draws from the global random numbers; the seed makes it depend on the step alone.
        with _seeded(device, seed_of(self.settings.seed, n, "dropout")):
            for part in OBJECTIVES[name](self.student, self.data.at(n).to(device)):
                part.backward()
                loss += float(part.detach())
        return loss

    # -- saving and resuming: random numbers depend on the seed and the step alone, so they have no state to
    # save

    def save(self, folder: Path | None) -> None:
        """Save the state of one step into one file; in the middle of a step nothing is saved."""
        if folder is None or not self.between_steps:
            return
        parameters = self.model_parameters | self.maps
        tensors = {f"parameter.{name}": p.detach() for name, p in parameters.items()}
        tensors |= optimizer_state.tensors_of(self.optimizer)
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        files.write_work(folder, RECOVERY_FILE, tensors)

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], folder: Path) -> None:
        """Restore what `save` saved.

        Raises:
            LowkeyError: if the tensors do not fit this training.
        """
        losses = tensors.get("losses")
        if (
            losses is None
            or losses.dtype != torch.float64
            or losses.ndim != 1
            or len(losses) > len(self.schedule)
        ):
            raise files.damaged_work(folder, "losses are not those of its steps")
        for name, p in (self.model_parameters | self.maps).items():
            p.copy_(files.checked_tensor(tensors, f"parameter.{name}", p, folder))
        optimizer_state.fill_state(self.optimizer, tensors, str(folder))
        self.losses = losses.tolist()

    def records(self) -> list[dict]:
        """Return one record per step, as `Recovered.losses` has them."""
        tokens = self.settings.batch * self.settings.length
        return [
            {"step": n, "stage": self.schedule[n - 1][0], "loss": loss, "tokens": n * tokens}
            for n, loss in enumerate(self.losses, 1)
        ]

    def stages(self) -> list[dict]:
        """Return one record per stage that was begun, as `Recovered.stages` has them."""
        records, start = [], 0
        for name, steps in self.settings.stages:
            losses, start = self.losses[start : start + steps], start + steps
            if losses:
                records.append({"objective": name, "steps": steps, "first": losses[0], "last": losses[-1]})
        return records


def _result(training: RecoveryTraining, plan: Plan, judge: HeldOut, held_out: dict[str, float]) -> Recovered:
    """Return the merged model and the plan re-issued for it."""
    model = training.student.trainable.merged().eval().requires_grad_(False)
    records, exact = training.records(), all(f.lossless for f in plan.factors.values())
    about = {
        "exact": exact,
        "settings": json.loads(json.dumps(asdict(training.settings))),  # as it comes back from a file
        "from_sha256": plan.provenance["model_sha256"],
        "data_sha256": training.data.fingerprint(),
        "tokens": records[-1]["tokens"],
        "stages": training.stages(),
        "versions": versions(),
    }
    # The weights have changed, so the plan must name the new model to be accepted by it.
    provenance = {**plan.provenance, "model_sha256": model_fingerprint(model), "recovered": about}
    issued = replace(plan, provenance=provenance)
    if maps := training.maps:
        trained = {
            i: {name: maps[f"{i}.{name}"].detach().to(t.device) for name, t in _maps(f).items()}
            for i, f in plan.factors.items()
        }
        factors = {i: replace(f, **trained[i]) for i, f in plan.factors.items()}
        issued = replace(issued, factors=factors, orthonormal=False)
    held_out["after"] = judge.loss(attach(model), issued)
    issued.provenance["recovered"]["held_out"] = held_out
    return Recovered(model, issued, records, about["stages"], held_out, exact)


def _job(plan: Plan, data: TrainingWindows, settings: Recovery) -> dict:
    """Return what tells this training from all others that may share a work folder."""
    # In fp64, so that maps have one checksum in every dtype that holds them exactly.
    digest = hashlib.sha256()
    for i, f in plan.factors.items():
        for name, t in _tensors(f).items():
            digest.update(
                f"{i}.{name}{tuple(t.shape)}".encode()
                + t.detach().double().cpu().contiguous().numpy().tobytes()
            )
    # How often it is saved does not change what is trained.
    return {
        "recover": {name: value for name, value in asdict(settings).items() if name != "save_every"},
        "plan": plan.describe(),
        "factors": digest.hexdigest(),
        "data": data.fingerprint(),
        "versions": versions(),
    }
