"""The loop: `pretrain` trains a model by a recipe, and goes on where it was stopped, to the same numbers."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers
from safetensors.torch import load_model
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey import files
from lowkey.fingerprint import model_fingerprint
from lowkey.pretraining import checkpoint, health, models, optim
from lowkey.pretraining.corpus import Corpus, prepare
from lowkey.pretraining.log import Log, finite
from lowkey.pretraining.recipe import Recipe
from lowkey.pretraining.rows import IGNORED, Batch, Order, Stream
from lowkey.progress import Progress, silent
from lowkey.types import LowkeyError


@dataclass(frozen=True)
class Trained:
    """The model in eval mode, its tokenizer, the training loss of every step (nats per token, before the step's update), and what
    result.json holds: steps, tokens, parameters, seconds, tokens_per_second, initial_loss and best_loss (validation), validation (one
    record per evaluation: step, tokens, validation_loss in nats per token, bits_per_byte), loss (mean of the last tenth of the steps),
    diverged, spikes, max_grad_norm."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    losses: list[float]
    result: dict[str, Any]


def pretrain(
    recipe: Recipe,
    out: str | Path,
    *,
    model: PreTrainedModel | None = None,
    progress: Progress = silent,
    device: str = "auto",
    force: bool = False,
) -> Trained:
    """Train by `recipe` and write a checkpoint that `from_pretrained` reads, the log, the recipe and result.json into the folder `out`.

    model: trained in place, in fp32, instead of a fresh one of the recipe's [model]. device: auto, cpu or cuda; several GPUs by running
    under `accelerate launch`, FSDP2 and its own mixed precision included. The same call again goes on after the last checkpoint, on the
    same machine to the same numbers bit for bit, or returns what is finished. force: start anew.
    Data order and dropout depend on the recipe's seed and the step alone, never on the model.
    Errors: LowkeyError for a bad recipe or text, a folder that belongs to another run, or a loss that diverges.
    """
    out = Path(out)
    checkpoint.check_folder(out, force)
    if model is None:
        models.validate(recipe.model)
    accelerator = _accelerator(recipe, out, device)
    progress = progress if accelerator.is_main_process else silent
    with accelerator.main_process_first():
        corpus = prepare(recipe.data, out / checkpoint.TOKENS, progress)
    with torch.random.fork_rng(devices=[accelerator.device] if accelerator.device.type == "cuda" else []):
        torch.manual_seed(recipe.training.seed)
        if model is None:
            model = models.build(recipe.model, corpus.tokenizer, recipe.training.length)
        models.check(model.config, corpus.tokenizer, recipe.training.length)
        job = checkpoint.job_of(recipe.describe(), corpus.fingerprint, model_fingerprint(model))
        if accelerator.is_main_process:
            checkpoint.claim(out, job, force)
        accelerator.wait_for_everyone()
        if recipe.training.log_with:
            accelerator.init_trackers("lowkey")
        if (out / checkpoint.RESULT).exists():
            return _finished(out, model, corpus)
        run = Run.of(recipe, corpus, accelerator, model.float(), out)
        with torch.enable_grad():
            train(run, progress)
    return _publish(run)


def _accelerator(recipe: Recipe, out: Path, device: str) -> Accelerator:
    if device not in ("auto", "cpu", "cuda"):
        raise LowkeyError(f"device {device!r} is unknown; choose auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise LowkeyError("device 'cuda': no CUDA device is available; use --device cpu")
    wanted = list(recipe.training.log_with)
    for name in wanted:
        if name not in LOGGER_TYPE_TO_CLASS or not filter_trackers([name], out):
            raise LowkeyError(f"training.log_with {name!r}: is unknown or not installed; known are {', '.join(LOGGER_TYPE_TO_CLASS)}")
    try:
        return Accelerator(cpu=device == "cpu", log_with=wanted or None, project_dir=out if wanted else None)
    except ValueError as error:  # accelerate keeps one device per process
        raise LowkeyError(f"device {device!r}: accelerate is set up otherwise in this process ({error}); start a new one") from error


@dataclass
class Run:
    """A run in flight. model: as accelerate has prepared it. losses, norms: of every step that was read back; pending: (loss, norm) of
    later ones, still on the device. whole: between two steps, so that what is held may be saved. stopped: the loss is not finite."""

    recipe: Recipe
    corpus: Corpus
    accelerator: Accelerator
    plain: PreTrainedModel
    model: Any
    optimizers: list[Any]
    out: Path
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    pending: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    validation: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    logged: int = 0
    whole: bool = False
    stopped: bool = False

    def __post_init__(self) -> None:
        training, rows = self.recipe.training, self.corpus.training.rows(self.recipe.training.length)
        self.settings = training
        if not rows:
            n = len(self.corpus.training.ids)
            raise LowkeyError(f"training.length {training.length}: the text gives {n} tokens to train on; give more text or less length")
        self.order = Order(rows, training.rows, training.seed)
        self.micro = _micro_batch(training.rows, training.micro_batch, self.accelerator.num_processes)
        self.rate = optim.rate(training)
        self.parameters = list(self.model.parameters())
        self.clock = time.perf_counter()
        self.log: Log | None = None

    @classmethod
    def of(cls, recipe: Recipe, corpus: Corpus, accelerator: Accelerator, model: PreTrainedModel, out: Path) -> Run:
        """Prepared, and restored when there is a checkpoint."""
        if not any(p.requires_grad for p in model.parameters()):
            raise LowkeyError("model: every parameter is frozen; let some of them train with requires_grad_()")
        model.train()
        if recipe.training.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        made: list[Optimizer] = optim.optimizers(model, recipe.training)
        prepared, *optimizers = accelerator.prepare(model, *made)
        if recipe.training.compile:
            prepared.compile()
        run = cls(recipe, corpus, accelerator, accelerator.unwrap_model(prepared), prepared, optimizers, out)
        if (out / checkpoint.CHECKPOINT).exists():
            run._restore()
        if accelerator.is_main_process:
            run.log = Log(out, len(run.losses))
        return run

    # -- one step

    def shares(self, rows: np.ndarray) -> Iterator[Batch]:
        """This device's part of the rows (k,), a micro-batch after the other."""
        mine = rows.reshape(self.accelerator.num_processes, -1)[self.accelerator.process_index]
        for part in mine.reshape(-1, self.micro):
            yield _moved(self.corpus.training.batch(part, self.settings.length), self.accelerator.device)

    def nats(self, batch: Batch) -> Tensor:
        """Cross-entropy over the batch, summed, in fp32."""
        bf16 = self.settings.precision == "bf16" and self.model.training
        with torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=bf16):
            logits = self.model(input_ids=batch.ids, position_ids=batch.positions, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED, reduction="sum")

    def synced(self, last: bool) -> AbstractContextManager:
        """Gradients meet across devices once per step."""
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    def set_rate(self, step: int) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.settings.lr * self.rate(step)

    # -- looking at it

    def read_back(self) -> None:
        """Bring pending numbers from the device, and stop when they are bad."""
        if self.pending:
            self.seconds += time.perf_counter() - self.clock
            stacked = torch.stack([torch.stack([loss, norm]) for loss, norm in self.pending])
            stacked[:, 0] = self.accelerator.reduce(stacked[:, 0].contiguous(), "sum")
            for loss, norm in stacked.tolist():
                self.losses.append(loss)
                self.norms.append(norm)
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    self.stopped = True
                    break
            self._check()
        self.pending.clear()
        self.clock = time.perf_counter()

    def _check(self) -> None:
        if self.settings.stop_on_divergence and (self.stopped or health.diverged(self.losses, self.settings.steps)):
            step = len(self.losses)
            rate = self.settings.lr * self.rate(step - 1)
            what = f"loss {self.losses[-1]:.4g} and gradient norm {self.norms[-1]:.4g} at learning rate {rate:.3g}"
            raise LowkeyError(f"training diverged at step {step}: {what}; give a smaller training.lr (the last checkpoint is kept)")

    def report(self, started: float) -> None:
        """One line of the log on the steps since the last one."""
        step, since = len(self.losses), self.logged
        passed, size = self.seconds - started, self.settings.batch_tokens
        record = {
            "step": step,
            "tokens": step * size,
            "loss": float(np.mean(self.losses[since:])),
            "lr": self.settings.lr * self.rate(step - 1),
            "grad_norm": float(np.max(self.norms[since:])),
            "tokens_per_second": (step - since) * size / passed if passed > 0 else 0.0,
        }
        self.logged = step
        self._tell(record)

    def _tell(self, record: dict[str, Any]) -> None:
        if self.log is not None:
            self.log.write(record)
        if self.settings.log_with:
            values = {k: v for k, v in finite(record).items() if k not in ("step", "tokens") and v is not None}
            self.accelerator.log(values, step=record["step"])

    @torch.no_grad()
    def evaluate(self) -> None:
        """Validation loss over the held-out part in fp32, a line of its own in the log. Not part of the time that is reported."""
        held = self.corpus.held_out
        if held is None or self.stopped:
            return
        self.model.eval()
        nats, count = held_out_loss(self, held)
        self.model.train()
        per_byte = held.predicted / held.text_bytes / math.log(2)
        step = len(self.losses)
        record = {"step": step, "tokens": step * self.settings.batch_tokens, "validation_loss": nats / count}
        self.validation.append(finite({**record, "bits_per_byte": nats / count * per_byte}))
        self._tell(self.validation[-1])
        self.clock = time.perf_counter()

    # -- keeping it

    def save(self) -> None:
        """All of it, in one file. What is not finite is not worth keeping: the last good checkpoint stays."""
        self.read_back()
        if self.stopped:
            return
        held = ("losses", "norms", "validation", "seconds", "logged")
        about = {name: getattr(self, name) for name in held}
        inner = [optimizer.optimizer for optimizer in self.optimizers]
        checkpoint.save(self.out / checkpoint.CHECKPOINT, self.plain, inner, about, self.accelerator.is_main_process)
        self.accelerator.wait_for_everyone()
        self.clock = time.perf_counter()

    def _restore(self) -> None:
        inner = [optimizer.optimizer for optimizer in self.optimizers]
        for name, value in checkpoint.restore(self.out / checkpoint.CHECKPOINT, self.plain, inner).items():
            setattr(self, name, value)


def train(run: Run, progress: Progress) -> None:
    """The loop."""
    settings, accelerator, started = run.settings, run.accelerator, run.seconds
    if not run.losses:
        run.evaluate()
    left = range(len(run.losses), settings.steps)
    try:
        for step in progress(left, "pretraining", len(left)):
            run.whole = False
            torch.manual_seed(_seed(settings.seed, step, accelerator.process_index))
            run.set_rate(step)
            rows = run.order.at(step)
            count = run.corpus.training.targets(rows, settings.length)
            total = torch.zeros((), device=accelerator.device)
            parts = len(rows) // accelerator.num_processes // run.micro
            for part, batch in enumerate(run.shares(rows), 1):
                with run.synced(last=part == parts):
                    loss = run.nats(batch) / max(1, count)
                    accelerator.backward(loss * accelerator.num_processes)  # gradients are averaged over devices
                total += loss.detach()
            norm = accelerator.clip_grad_norm_(run.parameters, settings.clip or math.inf)
            for optimizer in run.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            run.pending.append((total, checkpoint.gathered(norm)))
            done = step + 1
            last = done == settings.steps
            if done % settings.log_every == 0 or last:
                run.read_back()
                run.report(started)
                started = run.seconds
            if done % settings.evaluate_every == 0 or last:
                run.read_back()
                run.evaluate()
            if done % settings.save_every == 0 or last:
                run.save()
            if run.stopped:
                break
            run.whole = True
    except KeyboardInterrupt:
        if run.whole and accelerator.num_processes == 1:
            run.save()
        raise


@torch.no_grad()
def held_out_loss(run: Run, held: Stream) -> tuple[float, int]:
    """(nats over all tokens predicted, their number). The rows are split over devices, rounded up with empty ones."""
    length, devices = run.settings.length, run.accelerator.num_processes
    rows = math.ceil((len(held.ids) - 1) / length)
    if run.settings.evaluate_tokens:
        rows = min(rows, math.ceil(run.settings.evaluate_tokens / length))
    numbers = np.arange(math.ceil(rows / (devices * run.micro)) * devices * run.micro)
    total = torch.zeros((), dtype=torch.float64, device=run.accelerator.device)
    mine = numbers.reshape(devices, -1)[run.accelerator.process_index]
    for part in mine.reshape(-1, run.micro):
        part = np.where(part < rows, part, held.rows(length) + 1)  # a row behind the end predicts nothing
        total += run.nats(_moved(held.batch(part, length), total.device))
    return float(run.accelerator.reduce(total, "sum")), held.targets(numbers[:rows], length)


def _micro_batch(rows: int, asked: int, devices: int) -> int:
    micro = asked or rows // devices
    if not micro or rows % (micro * devices):
        share = f"{rows} rows of a step on {devices} devices"
        raise LowkeyError(f"training.micro_batch {asked}: does not divide {share} evenly; change it, batch_tokens, or the devices")
    return micro


def _moved(batch: Batch, device: torch.device) -> Batch:
    return Batch(*(t.to(device, non_blocking=True) for t in (batch.ids, batch.positions, batch.targets)))


def _seed(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7])


# -- the end


def _publish(run: Run) -> Trained:
    """Files one by one, result.json last: it says that the run is finished."""
    full = {name: checkpoint.whole(t) for name, t in checkpoint.weights(run.plain).items()}
    result = _result(run)
    if run.accelerator.is_main_process:
        run.plain.save_pretrained(run.out, state_dict=full)
        run.corpus.tokenizer.save_pretrained(run.out)
        files.write_text(run.out / "recipe.toml", run.recipe.toml())
        files.write_json(run.out / checkpoint.RESULT, result)
        (run.out / checkpoint.CHECKPOINT).unlink(missing_ok=True)
    if run.settings.log_with:
        run.accelerator.end_training()
    run.accelerator.wait_for_everyone()
    return Trained(run.plain.eval(), run.corpus.tokenizer, run.losses, result)


def _result(run: Run) -> dict[str, Any]:
    steps, size = len(run.losses), run.settings.batch_tokens
    found = [r["validation_loss"] for r in run.validation if r["validation_loss"] is not None]
    plain = {
        "steps": steps,
        "tokens": steps * size,
        "parameters": sum(p.numel() for p in run.plain.parameters()),
        "seconds": run.seconds,
        "tokens_per_second": steps * size / run.seconds,
        "loss": float(np.mean(run.losses[-max(1, steps // 10) :])),
        "initial_loss": found[0] if found else None,
        "best_loss": min(found) if found else None,
        "diverged": run.stopped or health.diverged(run.losses, run.settings.steps),
        "spikes": health.spikes(run.losses),
        "max_grad_norm": float(np.max(run.norms)),
    }
    return {**finite(plain), "validation": run.validation, "losses": [x if math.isfinite(x) else None for x in run.losses]}


def _finished(out: Path, model: PreTrainedModel, corpus: Corpus) -> Trained:
    result = files.read_json(out / checkpoint.RESULT, "result")
    load_model(model, out / "model.safetensors", strict=False)
    return Trained(model.eval(), corpus.tokenizer, [math.nan if x is None else x for x in result["losses"]], result)
