"""The training loop. `pretrain` trains a model by a recipe, and resumes where it was stopped, to the same
numbers.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.attention import register
from lowkey.core import files
from lowkey.core.errors import on_one_line
from lowkey.core.progress import Progress, silent
from lowkey.core.seeds import seed_of
from lowkey.core.types import LowkeyError
from lowkey.models import loading
from lowkey.models.fingerprint import model_fingerprint
from lowkey.pretraining import checkpoint, health, models
from lowkey.pretraining.corpus import Corpus, prepare
from lowkey.pretraining.log import finite
from lowkey.pretraining.recipe import Recipe
from lowkey.pretraining.run import Run, check_job

TRAINING_FILE = "training"  # kind of file that result.json is


@dataclass(frozen=True)
class Trained:
    """A finished run.

    Args:
        model: the model in evaluation mode.
        tokenizer: its tokenizer.
        losses: training loss of each step in nats per token, before the step's update.
        result: what result.json holds: steps, tokens and parameters; seconds and tokens_per_second of
            training steps alone; loss, the mean of the last tenth of the steps; initial_loss and best_loss of
            validation; validation, one record per evaluation (step, tokens, validation_loss in nats per
            token, bits_per_byte); diverged and spikes (see `health`); max_grad_norm before clipping; and
            losses. None stands for what is not finite. A run that was allowed to diverge ends at the first
            loss that is not finite: it has fewer steps, no validation after that, and the weights it ended
            with.
    """

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
    """Train a model by a recipe.

    The folder gets a checkpoint that `from_pretrained` reads, the log, the recipe and result.json. The same
    call again resumes from the last checkpoint, on the same machine to the same numbers bit for bit, or
    returns what is finished. The order of data and dropout depend on the recipe's seed and the step only,
    never on the model. Several GPUs are used under `accelerate launch`, with FSDP2 and its own mixed
    precision if they are configured there.

    Args:
        recipe: the recipe.
        out: the folder.
        model: a model that is trained in place, in fp32, instead of a new one of the recipe's [model].
        progress: shows progress over steps.
        device: `auto`, `cpu` or `cuda`.
        force: replace another run in the folder.

    Raises:
        LowkeyError: a bad recipe or text, a folder that belongs to another run, or a loss that diverges.
    """
    out = Path(out)
    checkpoint.check_run_folder(out, force, recipe.model.get("path") if model is None else None)
    if model is None and models.validate(recipe.model) == "path":
        loading.check_model_name(recipe.model["path"])
    accelerator = _accelerator(recipe, out, device)
    progress = progress if accelerator.is_main_process else silent
    # The others find the tokens that the first process has made.
    with accelerator.main_process_first():
        corpus = prepare(recipe.data, out / checkpoint.TOKEN_FOLDER, progress)
    # The caller's random state is restored at the end.
    with torch.random.fork_rng(devices=[accelerator.device] if accelerator.device.type == "cuda" else []):
        torch.manual_seed(recipe.training.seed)
        if model is None:
            model = models.build(recipe.model, corpus.tokenizer, recipe.training.length)
        models.check_reads(model.config, corpus.tokenizer, recipe.training.length)
        check_job(recipe.training, corpus, accelerator.num_processes, model)
        job = checkpoint.training_job(recipe.describe(), corpus.fingerprint, model_fingerprint(model))
        if accelerator.is_main_process:
            checkpoint.claim(out, job, force)
        accelerator.wait_for_everyone()
        if (out / checkpoint.RESULT).exists():
            return _finished(out, model.float().to(accelerator.device), corpus)
        if recipe.training.log_with:
            accelerator.init_trackers("lowkey")
        run = Run.of(recipe, corpus, accelerator, model.float(), out)
        with torch.enable_grad():
            train(run, progress)
    return _publish(run)


def _accelerator(recipe: Recipe, out: Path, device: str) -> Accelerator:
    """accelerate's accelerator for the device and the trackers of a recipe.

    Raises:
        LowkeyError: an unknown or missing device or tracker.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise LowkeyError(f"device {device!r} is unknown; choose auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise LowkeyError("device 'cuda': no CUDA device is available; use --device cpu")
    wanted = list(recipe.training.log_with)
    for name in wanted:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise LowkeyError(
                f"training.log_with {name!r} is unknown; choose among {', '.join(LOGGER_TYPE_TO_CLASS)}"
            )
        if name not in get_available_trackers():
            raise LowkeyError(
                f"training.log_with {name!r}: is not installed; pip install {name}, or leave it out"
            )
    try:
        return Accelerator(cpu=device == "cpu", log_with=wanted or None, project_dir=out if wanted else None)
    except ValueError as error:  # accelerate keeps one device per process
        raise LowkeyError(
            f"device {device!r}: accelerate is set up otherwise in this process ({error}); start a new one"
        ) from error


def train(run: Run, progress: Progress) -> None:
    """Train until the last step, or until the loss is not finite. Ctrl-C takes effect at the end of a step,
    which is saved.
    """
    settings, accelerator, started = run.settings, run.accelerator, run.seconds
    if not run.losses:
        run.log_rate_factors()
        run.evaluate()
    left = range(len(run.losses), settings.steps)
    with interrupts(accelerator.num_processes == 1) as interrupted:
        for step in progress(left, "pretraining", len(left)):
            run.set_rate(step)
            rows = run.order.at(step)
            count = run.corpus.training.targets(rows, settings.length)
            total = torch.zeros((), device=accelerator.device)
            parts = len(rows) // accelerator.num_processes // run.micro
            for part, batch in enumerate(run.shares(rows), 1):
                # Dropout depends on the step only, so that a resumed run draws the same.
                torch.manual_seed(seed_of(settings.seed, step, part, accelerator.process_index))
                with run.synced(last=part == parts):
                    # The mean over all tokens of the step, wherever they are.
                    loss = run.nats(batch) / max(1, count)
                    # accelerate averages gradients over devices; they should add up.
                    accelerator.backward(loss * accelerator.num_processes)
                total += loss.detach()
            norm = accelerator.clip_grad_norm_(run.parameters, settings.clip or math.inf)
            for optimizer in run.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            # Losses stay on the device until they are needed: reading them would wait for it.
            run.pending.append((total, checkpoint.gathered_tensor(norm)))
            done = step + 1
            last = done == settings.steps
            if done % settings.log_every == 0 or last:
                run.read_back()
                run.report(started)
                started = run.seconds
            if done % settings.evaluate_every == 0 or last:
                run.read_back()
                run.evaluate()
            if done % settings.save_every == 0 or last or interrupted:
                run.save()
            if interrupted:
                raise KeyboardInterrupt
            if run.stopped:
                break


@contextmanager
def interrupts(alone: bool) -> Iterator[list[int]]:
    """Hold back a first Ctrl-C within the context; a second one interrupts at once.

    It acts in the main thread of a single process only, because several processes would not stop at the same
    step.

    Args:
        alone: whether there is one process.

    Returns:
        A list that is not empty after a Ctrl-C.
    """
    received: list[int] = []
    if not alone or threading.current_thread() is not threading.main_thread():
        yield received
        return

    def receive(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, receive)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)


# -- the end


def _publish(run: Run) -> Trained:
    """Write the files of a finished run, result.json last: it says that the run is finished."""
    full = {name: checkpoint.whole(t) for name, t in checkpoint.full_weights(run.plain).items()}
    result = _result(run)
    register()  # a model of our own is saved with its code
    if run.accelerator.is_main_process:
        with files.replacing_folder(run.out / checkpoint.FINISHED) as temporary:
            run.plain.save_pretrained(temporary, state_dict=full)
            run.corpus.tokenizer.save_pretrained(temporary)
            files.write_text(temporary / "recipe.toml", run.recipe.toml())
        files.join_folder(run.out / checkpoint.FINISHED, run.out)
        files.write_json(run.out / checkpoint.RESULT, result, TRAINING_FILE)
        (run.out / checkpoint.CHECKPOINT).unlink(missing_ok=True)
    run.accelerator.wait_for_everyone()
    for tracker in run.accelerator.trackers:  # accelerate's end_training would leave the process group too
        tracker.finish()
    return Trained(run.plain.eval(), run.corpus.tokenizer, run.losses, result)


def _result(run: Run) -> dict[str, Any]:
    """What result.json holds."""
    steps, size = len(run.losses), run.settings.batch_tokens
    validation = [r["validation_loss"] for r in run.validation if r["validation_loss"] is not None]
    plain = {
        "steps": steps,
        "tokens": steps * size,
        "parameters": sum(p.numel() for p in run.plain.parameters()),
        "seconds": run.seconds,
        "tokens_per_second": steps * size / run.seconds,
        "loss": float(np.mean(run.losses[-max(1, steps // 10) :])),
        "initial_loss": validation[0] if validation else None,
        "best_loss": min(validation) if validation else None,
        # A run is stopped if any loss, that of validation included, is not finite.
        "diverged": run.stopped or health.diverged(run.losses, run.settings.steps),
        "spikes": health.spikes(run.losses),
        "max_grad_norm": float(np.max(run.norms)),
    }
    return {
        **finite(plain),
        "validation": run.validation,
        "losses": [x if math.isfinite(x) else None for x in run.losses],
    }


def _finished(out: Path, model: PreTrainedModel, corpus: Corpus) -> Trained:
    """A finished run, read from its folder.

    Raises:
        LowkeyError: it is damaged.
    """
    try:
        result = files.read_json(out / checkpoint.RESULT, "result", TRAINING_FILE)
        if not _is_result(result):
            raise ValueError("result.json lacks a field or has an invalid one")
        files.verify(out, "run")
        loaded: Any = type(model).from_pretrained(out, dtype=torch.float32, output_loading_info=True)
        kept, loading_report = loaded
        if loading_report["missing_keys"]:  # transformers would leave random numbers in their place
            raise ValueError(f"its model lacks {sorted(loading_report['missing_keys'])[0]}")
        model.load_state_dict(kept.state_dict())
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise LowkeyError(
            f"output {str(out)!r}: a finished run that is damaged ({on_one_line(error)}); start anew with "
            "--force"
        ) from None
    return Trained(
        model.eval(), corpus.tokenizer, [math.nan if x is None else x for x in result["losses"]], result
    )


def _is_result(result: dict[str, Any]) -> bool:
    """Whether this is what `_result` gives."""
    losses, held = result.get("losses"), result.get("validation")
    if not (
        {"tokens", "loss", "diverged"} <= result.keys()
        and isinstance(losses, list)
        and isinstance(held, list)
    ):
        return False
    whole = all(x is None or type(x) in (int, float) for x in losses) and all(
        isinstance(r, dict) and "step" in r for r in held
    )
    return whole and type(result.get("steps")) is int and result["steps"] == len(losses)
