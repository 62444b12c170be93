"""`recover`: a model is trained for a little while through the compression of its cache, and so learns to
live with it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.cache.cache import cache_of
from lowkey.calibration import trainable
from lowkey.calibration.held_out import HeldOut
from lowkey.calibration.trainable import TrainableModel
from lowkey.core import files, optimizer_state, text
from lowkey.core.options import Checked, nearest_name, option, shown
from lowkey.core.progress import Progress, silent
from lowkey.core.types import Factors, LowkeyError, device_of
from lowkey.models import families, weights
from lowkey.models.attention_interface import attach
from lowkey.models.fingerprint import data_fingerprint, model_fingerprint
from lowkey.ops.schedule import falling
from lowkey.plan.plan import Plan, versions
from lowkey.probes import model_probe
from lowkey.probes.layer_probe import LowRankReconstruction, OneLayerCache
from lowkey.storage.codec import LowRank
from lowkey.storage.coded import CodedLayer
from lowkey.storage.exact import Exact
from lowkey.storage.reconstruction import ReconstructionLayer

RECOVERY_FILE = "training"


@dataclass(frozen=True)
class Recovery(Checked):
    """How to train.

    stages: objectives in order, each with its number of steps. `distill`: every layer is fed the ORIGINAL
    model's input for that layer; the relative squared error between its compressed output and the original
    layer's output, averaged over layers (arXiv:2507.11273, Eq. 7, stage I). `ce`: next-token cross-entropy
    with compression everywhere. `kl`: KL(original || compressed) of next-token distributions, per token, of
    logits over `temperature` (not multiplied by its square, as KV-Latent's code has it).
    lora, full: linear maps of the decoder layers, as patterns of their names in the layer (`self_attn.*`,
    `mlp.gate_proj`): through LoRA adapters (arXiv:2106.09685), by default all, or in full, as
    arXiv:2507.11273 trains attention. What both name is trained in full.
    rank, alpha, dropout: of the adapters. batch, length: windows per step and tokens per window. lr: the peak
    of each stage, after a share `warmup` of its steps; it then falls to 0 by a cosine. lrs: a peak for each
    stage instead. betas, eps: of AdamW. factors: train the plan's maps too, which then are no longer
    orthonormal; weight_decay is for all but those, since it would pull maps to zero.
    save_every: steps between checkpoints, when there is a work folder.
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
                f"lrs {list(self.lrs)}: {len(self.stages)} stages have a rate each; give as many, or lr for "
                "all"
            )


@dataclass(frozen=True)
class Recovered:
    """A plain model with what was learned in its weights, the plan re-issued for it, and one record per step:
    {"step": 1.., "stage", "loss": before that step, "tokens": seen by then}. stages: of each the objective,
    its steps and its first and last loss; objectives differ, so that losses of two stages cannot be compared.
    held_out: what can: the next-token cross-entropy in nats on the embedded evaluation text through the plan,
    `before` and `after`, and of the model `full`, as it was with the full cache.
    exact: the plan lost nothing, so that nothing was to be recovered (its maps at full rank are identities).
    All but the records is said in the new plan's provenance too."""

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
    """Train a copy of `model` through `plan` on `texts` (the embedded calibration text when None); model and
    plan stay as they are.

    A query sees the plan's sinks and recent tokens exactly, as in a cache, and all others in low rank; the
    plan's integers are left out, since rounding has no gradient. work: a folder to save progress into and
    resume from; on a CPU a resumed training gives the numbers of an uninterrupted one bit for bit.
    Errors: LowkeyError when peft is missing, the plan is another model's, settings are out of range, the text
    is shorter than a window, or the loss is no longer finite.
    """
    trainable.peft()
    weights.check_plain("recover", model, families.decoder_layers(model))
    _check(settings, model)
    plan.check(model)
    if settings.length <= plan.sinks + plan.recent:
        raise LowkeyError(
            f"length {settings.length}: the plan keeps {plan.sinks + plan.recent} tokens exact, so that "
            "nothing would be compressed; give "
            "longer windows"
        )
    data = TrainingWindows.of(tokenizer, text.joined_texts(texts), settings)
    text.check_ids(data.ids, model)
    folder = files.job_folder(work, _describe(plan, data, settings))
    training = RecoveryTraining.of(model, plan, data, settings)
    if folder is not None and (found := files.read_work(folder, RECOVERY_FILE)) is not None:
        training.restore(found, folder)
    judge = HeldOut.of(tokenizer, model, settings.length)
    with training.student.adapted.original() as original:
        held_out = {"full": judge.loss(original), "before": judge.loss(original, plan)}
    with torch.enable_grad():
        training.run(folder, progress)
    return _finished(training, plan, judge, held_out)


def _check(settings: Recovery, model: PreTrainedModel) -> None:
    for name, _ in settings.stages:
        if name not in OBJECTIVES:
            raise LowkeyError(f"stage {shown(name)} is unknown; {nearest_name(name, OBJECTIVES)}")
    trainable.check_trainable(model, settings.lora, settings.full)
    longest = families.positions(model)
    if longest is not None and settings.length > longest:
        raise LowkeyError(f"length {settings.length}: the model has {longest} positions; give at most that")


def _seed(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7])


@dataclass(frozen=True)
class TrainingWindows:
    """ids (n,) of the whole text; start: the beginning-of-text token, or nothing."""

    ids: Tensor
    start: tuple[int, ...]
    settings: Recovery

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, joined: str, settings: Recovery) -> TrainingWindows:
        ids = text.encode(tokenizer, joined)
        start = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
        if len(ids) < settings.length:
            raise LowkeyError(
                f"training text: {len(ids)} tokens are fewer than length {settings.length}; give more text "
                "or less length"
            )
        return cls(ids, start, settings)

    def at(self, step: int) -> Tensor:
        """Ids (batch, length) of one step, from random places: nothing but the seed and the step decides
        which.
        """
        body = self.settings.length - len(self.start)
        generator = torch.Generator().manual_seed(_seed(self.settings.seed, step))
        places = torch.randint(len(self.ids) - body + 1, (self.settings.batch,), generator=generator)
        start = torch.tensor(self.start, dtype=torch.long).expand(len(places), -1)
        return torch.cat([start, self.ids.unfold(0, body, 1)[places]], dim=1)

    def fingerprint(self) -> str:
        return data_fingerprint(torch.cat([torch.tensor(self.start, dtype=torch.long), self.ids]))


@dataclass
class Student:
    """The model with what is trained of it, as it runs through the compressed cache and as it was."""

    adapted: TrainableModel
    plan: Plan
    factors: dict[int, Factors]
    temperature: float = 1.0

    @property
    def model(self) -> PreTrainedModel:
        return self.adapted.model

    def layer(self, i: int) -> ReconstructionLayer | CodedLayer:
        """Keys that turn at frequencies of their own cannot be rebuilt, only attended to."""
        factors, layout, rope = self.factors[i], self.plan.layout, families.rope(self.model, i)
        exact = Exact(self.plan.sinks, self.plan.recent)
        if factors.frequencies is not None:
            return CodedLayer(LowRank(factors, layout, rope), exact)
        return ReconstructionLayer(LowRankReconstruction(factors, layout, rope), exact)

    def logits(self, ids: Tensor) -> Tensor:
        """(b, t, V) in fp32, compressed everywhere."""
        return self.model(
            ids, past_key_values=cache_of(self.model, self.layer), use_cache=True
        ).logits.float()


def distillation_loss(student: Student, ids: Tensor) -> Iterator[Tensor]:
    """One part for each compressed layer: ||f~(x) - f(x)||^2 / ||f(x)||^2 at the original's x, over the
    number of layers.
    """
    blocks = families.decoder_layers(student.model)
    last = len(blocks) - 1
    with student.adapted.original() as model:
        states = model(ids, use_cache=False, output_hidden_states=True, logits_to_keep=1).hidden_states
        # the model's own last state is normed
        end = families.run_layer(model, last, blocks[last], states[last], None)
    outputs = [*states[1 : last + 1], end]
    for i in student.factors:
        found = families.run_layer(student.model, i, blocks[i], states[i], OneLayerCache(student.layer(i)))
        target = outputs[i].float()
        yield (found.float() - target).square().sum() / target.square().sum() / len(student.factors)


def cross_entropy(student: Student, ids: Tensor) -> Iterator[Tensor]:
    yield model_probe.next_token_loss(student.logits(ids), ids)


def divergence_loss(student: Student, ids: Tensor) -> Iterator[Tensor]:
    """KL(original || compressed) per token, at the student's temperature."""
    with student.adapted.original() as model:
        target = model(ids, use_cache=False).logits
    yield model_probe.kl_divergence(student.logits(ids), target, student.temperature)


# parts of a loss, whose sum is the loss: each is differentiated before the next is formed
OBJECTIVES: dict[str, Callable[[Student, Tensor], Iterator[Tensor]]] = {
    "distill": distillation_loss,
    "ce": cross_entropy,
    "kl": divergence_loss,
}


@contextmanager
def _randomness(device: torch.device, seed: int) -> Iterator[None]:
    """torch's own random numbers begin at `seed` inside, and go on outside as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _tensors(f: Factors) -> dict[str, Tensor]:
    return {x.name: t for x in fields(f) if isinstance(t := getattr(f, x.name), Tensor)}


def _maps(f: Factors) -> dict[str, Tensor]:
    """What can be trained, which the order of heads cannot."""
    return {name: t for name, t in _tensors(f).items() if t.is_floating_point()}


def _loose(f: Factors, device: torch.device) -> Factors:
    """A copy in fp32 on the layer's device; each map with memory of its own, for orthonormal ones are views
    of one another.
    """
    held = {name: t.detach().to(device, copy=True).contiguous() for name, t in _tensors(f).items()}
    return replace(f, **{name: t.float() if t.is_floating_point() else t for name, t in held.items()})


@dataclass
class RecoveryTraining:
    """Steps done are losses held. whole: no step is half done, so that what is held may be saved."""

    student: Student
    data: TrainingWindows
    settings: Recovery
    adapters: dict[str, Tensor]
    maps: dict[str, Tensor]
    losses: list[float] = field(default_factory=list)
    whole: bool = True

    def __post_init__(self) -> None:
        stages, lr = self.settings.stages, self.settings.lr
        rates = self.settings.lrs or [lr] * len(stages)
        self.schedule = [
            (name, k, steps, peak)
            for (name, steps), peak in zip(stages, rates, strict=True)
            for k in range(steps)
        ]
        self.optimizer = self._fresh()

    @classmethod
    def of(
        cls, model: PreTrainedModel, plan: Plan, data: TrainingWindows, settings: Recovery
    ) -> RecoveryTraining:
        lora = {"r": settings.rank, "lora_alpha": settings.alpha, "lora_dropout": settings.dropout}
        with _randomness(device_of(model), _seed(settings.seed, "adapters")):
            adapted = TrainableModel.of(model, settings.lora, settings.full, **lora)
        blocks = families.decoder_layers(adapted.model)
        factors = {i: _loose(f, device_of(blocks[i])) for i, f in plan.factors.items()}
        maps = {
            f"{i}.{name}": t.requires_grad_()
            for i, f in factors.items()
            for name, t in _maps(f).items()
            if settings.factors
        }
        return cls(
            Student(adapted, plan, factors, settings.temperature), data, settings, adapted.parameters(), maps
        )

    def _fresh(self) -> torch.optim.AdamW:
        """A new optimizer for every stage: another objective has gradients of another size."""
        groups: list[dict] = [{"params": list(self.adapters.values())}]
        if self.maps:
            groups.append({"params": list(self.maps.values()), "weight_decay": 0.0})
        s = self.settings
        return torch.optim.AdamW(groups, lr=s.lr, betas=s.betas, eps=s.eps, weight_decay=s.weight_decay)

    def run(self, folder: Path | None, progress: Progress) -> None:
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
        name, k, steps, peak = self.schedule[n]
        if k == 0:
            self.optimizer = self._fresh()
        rate = peak * falling(k, steps, self.settings.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        loss = self._differentiated(name, n)
        norm = nn.utils.get_total_norm(
            [p.grad for p in (*self.adapters.values(), *self.maps.values()) if p.grad is not None]
        )
        if not math.isfinite(loss) or not math.isfinite(norm):
            rule = f"loss {loss:g} and gradient {float(norm):g} of step {n + 1} must be finite"
            raise LowkeyError(f"lr {peak:g}: {rule}; give a smaller lr")
        self.whole = False
        self.optimizer.step()
        self.losses.append(loss)
        self.whole = True

    def _differentiated(self, name: str, n: int) -> float:
        """The loss of step n, its gradients being added to the parameters'."""
        device, loss = device_of(self.student.model), 0.0
        with _randomness(device, _seed(self.settings.seed, n, "dropout")):
            for part in OBJECTIVES[name](self.student, self.data.at(n).to(device)):
                part.backward()
                loss += float(part.detach())
        return loss

    # -- stopping and going on: random numbers depend on the seed and the step alone, so there is no state of
    # theirs to keep

    def save(self, folder: Path | None) -> None:
        """One file, so that it is of one step. In the middle of a step the last one stays."""
        if folder is None or not self.whole:
            return
        found = {f"parameter.{name}": p.detach() for name, p in (self.adapters | self.maps).items()}
        found |= optimizer_state.tensors_of(self.optimizer)
        files.write_work(
            folder, RECOVERY_FILE, found | {"losses": torch.tensor(self.losses, dtype=torch.float64)}
        )

    @torch.no_grad()
    def restore(self, found: dict[str, Tensor], folder: Path) -> None:
        losses = found.get("losses")
        if (
            losses is None
            or losses.dtype != torch.float64
            or losses.ndim != 1
            or len(losses) > len(self.schedule)
        ):
            raise files.damaged_work(folder, "losses are not those of its steps")
        for name, p in (self.adapters | self.maps).items():
            p.copy_(files.checked_tensor(found, f"parameter.{name}", p, folder))
        optimizer_state.fill_state(self.optimizer, found, str(folder))
        self.losses = losses.tolist()

    def records(self) -> list[dict]:
        size, names = self.settings.batch * self.settings.length, [entry[0] for entry in self.schedule]
        return [
            {"step": n, "stage": names[n - 1], "loss": loss, "tokens": n * size}
            for n, loss in enumerate(self.losses, 1)
        ]

    def stages(self) -> list[dict]:
        found, start = [], 0
        for name, steps in self.settings.stages:
            own, start = self.losses[start : start + steps], start + steps
            found += [{"objective": name, "steps": steps, "first": own[0], "last": own[-1]}] if own else []
        return found


def _finished(
    training: RecoveryTraining, plan: Plan, judge: HeldOut, held_out: dict[str, float]
) -> Recovered:
    model = training.student.adapted.merged().eval().requires_grad_(False)
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
    issued = replace(
        plan, provenance={**plan.provenance, "model_sha256": model_fingerprint(model), "recovered": about}
    )
    if maps := training.maps:
        back = {
            i: {name: maps[f"{i}.{name}"].detach().to(t.device) for name, t in _maps(f).items()}
            for i, f in plan.factors.items()
        }
        issued = replace(
            issued, factors={i: replace(f, **back[i]) for i, f in plan.factors.items()}, orthonormal=False
        )
    held_out["after"] = judge.loss(attach(model), issued)
    issued.provenance["recovered"]["held_out"] = held_out
    return Recovered(model, issued, records, about["stages"], held_out, exact)


def _describe(plan: Plan, data: TrainingWindows, settings: Recovery) -> dict:
    digest = hashlib.sha256()
    for i, f in plan.factors.items():
        for name, t in _tensors(f).items():
            digest.update(
                f"{i}.{name}{tuple(t.shape)}".encode()
                + t.detach().double().cpu().contiguous().numpy().tobytes()
            )
    about = {name: value for name, value in asdict(settings).items() if name != "save_every"}
    return {
        "recover": about,
        "plan": plan.describe(),
        "factors": digest.hexdigest(),
        "data": data.fingerprint(),
        "versions": versions(),
    }
