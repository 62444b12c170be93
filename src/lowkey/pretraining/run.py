"""A run in progress: the prepared model, its losses so far, and the parts of a training step."""

from __future__ import annotations

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
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from lowkey.core.types import LowkeyError
from lowkey.pretraining import checkpoint, health, optim
from lowkey.pretraining.corpus import Corpus
from lowkey.pretraining.log import Log, finite
from lowkey.pretraining.recipe import Recipe, Training
from lowkey.pretraining.rows import IGNORED, Batch, Order, Stream

RUN_STATE = ("losses", "norms", "validation", "seconds", "logged")  # fields that a checkpoint holds


@dataclass
class Run:
    """A run in progress.

    Args:
        recipe: the recipe.
        corpus: its tokens.
        accelerator: accelerate's accelerator.
        plain: the model itself.
        model: the model as accelerate has prepared it, perhaps compiled.
        optimizers: prepared optimizers.
        out: output folder.
        losses: loss of every step that was read back from the device.
        norms: gradient norm of every such step.
        pending: (loss, norm) of later steps, still on the device.
        validation: records of evaluations.
        seconds: time of training steps.
        logged: number of steps that the log covers.
        stopped: whether a loss was not finite.
    """

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
    stopped: bool = False

    def __post_init__(self) -> None:
        self.settings = training = self.recipe.training
        self.order = Order(self.corpus.training.rows(training.length), training.rows, training.seed)
        self.micro = _micro_batch(training, self.accelerator.num_processes)
        self.rate = optim.rate(training)
        self.parameters = list(self.model.parameters())
        self.clock = time.perf_counter()  # when the time that counts began
        self.log: Log | None = None  # in the main process only

    @classmethod
    def of(
        cls, recipe: Recipe, corpus: Corpus, accelerator: Accelerator, model: PreTrainedModel, out: Path
    ) -> Run:
        """Prepare a run; restore it if there is a checkpoint."""
        model.train()
        if recipe.training.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        made: list[Optimizer] = optim.optimizers(model, recipe.training)
        prepared, *optimizers = accelerator.prepare(model, *made)
        running = torch.compile(prepared) if recipe.training.compile else prepared
        # weights are read and written through the model itself, without wrappers that add to names
        run = cls(recipe, corpus, accelerator, accelerator.unwrap_model(prepared), running, optimizers, out)
        if (out / checkpoint.CHECKPOINT).exists():
            run._restore()
        if accelerator.is_main_process:
            run.log = Log(out, len(run.losses))
        return run

    # -- one step

    def shares(self, rows: np.ndarray) -> Iterator[Batch]:
        """This device's part of the rows (k), one micro-batch after the other."""
        own_rows = rows.reshape(self.accelerator.num_processes, -1)[self.accelerator.process_index]
        for part in own_rows.reshape(-1, self.micro):
            yield _moved(self.corpus.training.batch(part, self.settings.length), self.accelerator.device)

    def nats(self, batch: Batch) -> Tensor:
        """Cross-entropy summed over a batch, in nats, fp32."""
        bf16 = self.settings.precision == "bf16" and self.model.training
        with torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=bf16):
            logits = self.model(input_ids=batch.ids, position_ids=batch.positions, use_cache=False).logits
        return F.cross_entropy(
            logits.float().flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )

    def synced(self, last: bool) -> AbstractContextManager:
        """A context in which gradients are summed over devices only in the `last` micro-batch of a step."""
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    def set_rate(self, step: int) -> None:
        """Set the learning rates of a step."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.settings.lr * group["factor"] * self.rate(step)

    # -- looking at it

    def log_rate_factors(self) -> None:
        """Write the first line of the log if parameters have learning rates of their own: by pattern, its
        factor and the number of parameters.
        """
        if self.log is not None and (given := self.settings.lr_factors):
            sizes = {name: p.numel() for name, p in self.plain.named_parameters()}
            record = {
                pattern: {
                    "factor": factor,
                    "parameters": sum(sizes[name] for name in optim.matched(pattern, sizes)),
                }
                for pattern, factor in given.items()
            }
            self.log.write({"step": 0, "tokens": 0, "lr_factors": record})

    def read_back(self) -> None:
        """Read pending losses back from the device, and give up if they are bad."""
        if self.pending:
            self.seconds += time.perf_counter() - self.clock
            stacked = torch.stack([torch.stack([loss, norm]) for loss, norm in self.pending])
            # Each device has its share of a loss; the norm is of gradients that are reduced already.
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
        """Give up if the loss has diverged."""
        if self.stopped or health.diverged(self.losses, self.settings.steps):
            self._give_up(f"loss {self.losses[-1]:.4g} and gradient norm {self.norms[-1]:.4g}")

    def _give_up(self, what: str) -> None:
        """Raise if the recipe says to stop on divergence.

        Raises:
            LowkeyError: what has diverged, and at which learning rate.
        """
        step = len(self.losses)
        at = f"{what} at learning rate {self.settings.lr * self.rate(max(0, step - 1)):.3g}"
        if self.settings.stop_on_divergence:
            raise LowkeyError(
                f"training diverged at step {step}: {at}; give a smaller training.lr (the last checkpoint is "
                "kept)"
            )

    def report(self, started: float) -> None:
        """Write a line of the log about the steps since the last line.

        Args:
            started: `seconds` at the last line.
        """
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
        self._log_record(record)

    def _log_record(self, record: dict[str, Any]) -> None:
        """Write a record to the log and to trackers."""
        if self.log is not None:
            self.log.write(record)
        if self.settings.log_with:
            values = {
                k: v for k, v in finite(record).items() if k not in ("step", "tokens") and v is not None
            }
            self.accelerator.log(values, step=record["step"])

    @torch.no_grad()
    def evaluate(self) -> None:
        """Measure the validation loss over held-out tokens, in fp32, and log it. It does not count in the
        reported time.

        Bits per byte follow from the tokens per byte of everything that is held out, even if evaluate_tokens
        takes less.
        """
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
        self._log_record(self.validation[-1])
        self.clock = time.perf_counter()
        if not math.isfinite(nats):
            self.stopped = True
            self._give_up(f"validation loss {nats / count:.4g}")

    # -- keeping it

    def save(self) -> None:
        """Save the run in one file. If a loss is not finite, the last good checkpoint stays."""
        self.read_back()
        if self.stopped:
            return
        about = {name: getattr(self, name) for name in RUN_STATE}
        inner = [optimizer.optimizer for optimizer in self.optimizers]
        checkpoint.save_checkpoint(
            self.out / checkpoint.CHECKPOINT, self.plain, inner, about, self.accelerator.is_main_process
        )
        self.accelerator.wait_for_everyone()
        self.clock = time.perf_counter()

    def _restore(self) -> None:
        """Fill the run from its checkpoint.

        Raises:
            LowkeyError: the checkpoint does not fit.
        """
        inner = [optimizer.optimizer for optimizer in self.optimizers]
        path = self.out / checkpoint.CHECKPOINT
        about = checkpoint.restore_checkpoint(path, self.plain, inner)
        if not _is_progress(about, self.settings.steps):
            raise LowkeyError(
                f"checkpoint {str(path)!r}: has no valid progress; delete it, or start anew with --force"
            )
        for name in RUN_STATE:
            setattr(self, name, about[name])


def _is_progress(about: Any, steps: int) -> bool:
    """Whether this is what `Run.save` says of a run of so many steps."""
    if not (isinstance(about, dict) and set(about) == set(RUN_STATE)):
        return False
    losses, norms, logged = about["losses"], about["norms"], about["logged"]
    # a checkpoint is a file like any other, and its numbers are used as indices
    numbers = all(isinstance(x, list) and all(type(n) in (int, float) for n in x) for x in (losses, norms))
    if (
        not numbers
        or not 0 < len(losses) == len(norms) <= steps
        or type(logged) is not int
        or not 0 <= logged <= len(losses)
    ):
        return False
    held = about["validation"]
    known = isinstance(held, list) and all(
        isinstance(r, dict) and {"step", "validation_loss"} <= set(r) for r in held
    )
    return known and type(about["seconds"]) in (int, float) and about["seconds"] >= 0


@torch.no_grad()
def held_out_loss(run: Run, held: Stream) -> tuple[float, int]:
    """Loss over held-out tokens. Rows are split over devices, and filled up with empty ones.

    Args:
        run: the run.
        held: held-out documents.

    Returns:
        Nats over all tokens that are predicted, and the number of these.
    """
    length, devices = run.settings.length, run.accelerator.num_processes
    rows = math.ceil((len(held.ids) - 1) / length)
    if run.settings.evaluate_tokens:
        rows = min(rows, math.ceil(run.settings.evaluate_tokens / length))
    numbers = np.arange(math.ceil(rows / (devices * run.micro)) * devices * run.micro)
    total = torch.zeros((), dtype=torch.float64, device=run.accelerator.device)
    own_rows = numbers.reshape(devices, -1)[run.accelerator.process_index]
    for part in own_rows.reshape(-1, run.micro):
        # Devices must make the same number of steps; a row behind the end predicts nothing.
        part = np.where(part < rows, part, held.rows(length) + 1)
        total += run.nats(_moved(held.batch(part, length), total.device))
    return float(run.accelerator.reduce(total, "sum")), held.targets(numbers[:rows], length)


def check_job(settings: Training, corpus: Corpus, devices: int, model: PreTrainedModel) -> None:
    """Check that there is something to train on, and something to train.

    Args:
        settings: how to train.
        corpus: the tokens.
        devices: number of devices.
        model: the model.

    Raises:
        LowkeyError: there is not.
    """
    micro = _micro_batch(settings, devices)
    if not micro or settings.rows % (micro * devices):
        share = f"{settings.rows} rows of a step on {devices} devices"
        raise LowkeyError(
            f"training.micro_batch {settings.micro_batch}: does not divide {share} evenly; change it, "
            "batch_tokens, or the devices"
        )
    if not corpus.training.rows(settings.length):
        n = len(corpus.training.ids)
        raise LowkeyError(
            f"training.length {settings.length}: the text gives {n} tokens to train on; give more text or "
            "less length"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise LowkeyError("model: every parameter is frozen; let some of them train with requires_grad_()")
    optim.factors(model, settings)


def _micro_batch(settings: Training, devices: int) -> int:
    """Rows per forward pass and device."""
    return settings.micro_batch or settings.rows // devices


def _moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on another device."""
    return Batch(*(t.to(device, non_blocking=True) for t in (batch.ids, batch.positions, batch.targets)))
