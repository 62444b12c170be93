"""A training run on disk: one file with everything, replaced in one step, and a file that says which run a
folder belongs to.

Random numbers and the order of the data depend on the seed and the step only, and the learning rate on the
step, so none of them has a state to save.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from lowkey.core import files
from lowkey.core.types import LowkeyError

CHECKPOINT, JOB_FILE, RESULT, TOKEN_FOLDER, FINISHED = (
    "checkpoint.safetensors",
    "job.json",
    "result.json",
    "tokens",
    ".finished",
)
RUN_FILE = "run"  # kind of file that job.json is
# What each optimizer keeps for a parameter.
STATES = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "Muon": {"momentum_buffer"}}
# Names of the files that a finished run writes; others of such a name are not overwritten.
PUBLISHED = (
    r"(generation_)?config\.json|model.*\.safetensors.*|.*token.*\.json|vocab.*|merges.*|chat_template.*"
    r"|recipe\.toml|[^/]*\.py"
)
# Fields of [training] that may change when a run resumes: they change no number.
FREE = ("save_every", "log_every", "log_with", "compile", "stop_on_divergence")


def claim(out: Path, job: Mapping[str, Any], force: bool) -> None:
    """Mark a folder as this job's.

    Args:
        out: the folder.
        job: what makes two runs the same run.
        force: delete the checkpoint and result of another job.

    Raises:
        LowkeyError: the folder is another job's and `force` is False.
    """
    marker = out / JOB_FILE
    if force:
        # The log is cut when the run begins, and weights are replaced when it ends.
        for name in (RESULT, CHECKPOINT):
            (out / name).unlink(missing_ok=True)
    elif marker.exists():
        if difference := _difference(files.read_json(marker, "job", RUN_FILE)["job"], job):
            raise LowkeyError(
                f"output {str(out)!r} holds another run ({difference}); choose another folder, or --force to "
                "start anew"
            )
        return
    files.write_json(marker, {"job": job}, RUN_FILE)


def check_run_folder(out: Path, force: bool, source: str | None = None) -> None:
    """Check the output folder before any work: it can be written; it is new, empty, or a run's; it is not the
    model that is trained further; and where a model will be written there is nothing that lowkey did not
    write.

    Args:
        out: the folder.
        force: whether another run may be replaced.
        source: the model that is trained further, or None.

    Raises:
        LowkeyError: one of these rules is broken.
    """
    if source is not None and Path(source).resolve() == out.resolve():
        raise LowkeyError(
            f"output {str(out)!r}: is the model of model.path, which would be overwritten; choose another "
            "folder"
        )
    files.check_writable(out)
    if out.exists() and not out.is_dir():
        raise LowkeyError(f"output {str(out)!r} is a file; choose a folder")
    if not out.is_dir():
        return
    marked = files.kind_of(out / JOB_FILE) == RUN_FILE
    if not marked and any(p.name != TOKEN_FOLDER and not files.is_staging_folder(p) for p in out.iterdir()):
        raise LowkeyError(
            f"output {str(out)!r} already holds files, and no run of lowkey's; choose another folder"
        )
    for name in files.unlisted_files(out):
        if re.fullmatch(PUBLISHED, name) or (
            name == CHECKPOINT and files.kind_of(out / name) != "checkpoint"
        ):
            raise LowkeyError(
                f"output {str(out)!r}: lowkey did not write {name!r} there, or it was changed since; move it "
                "away"
            )


def training_job(recipe: Mapping[str, Any], tokens: str, model: str) -> dict[str, Any]:
    """What makes two runs the same run: the recipe, the data and the initial weights. Left out are fields of
    the recipe that do not change numbers.

    Args:
        recipe: tables of the recipe.
        tokens: fingerprint of the tokens.
        model: fingerprint of the initial weights.
    """
    training = {k: v for k, v in recipe["training"].items() if k not in FREE}
    data = {k: v for k, v in recipe["data"].items() if k != "cache"}
    return {"model": recipe["model"], "data": data, "training": training, "tokens": tokens, "weights": model}


def _difference(there: Any, here: Any, place: str = "") -> str:
    """The first difference of two tables in words, or an empty text."""
    if not (isinstance(there, dict) and isinstance(here, dict)):
        return "" if there == here else f"{place} {there!r} there, {here!r} here"
    for name in {**there, **here}:
        if first := _difference(there.get(name), here.get(name), f"{place}.{name}".strip(".")):
            return first
    return ""


def save_checkpoint(
    path: Path, model: nn.Module, optimizers: Sequence[Optimizer], about: dict[str, Any], write: bool
) -> None:
    """Save a run in one file. Every process takes part, because sharded tensors are gathered.

    Args:
        path: the file.
        model: the model.
        optimizers: its optimizers.
        about: plain values that describe the progress.
        write: whether this process writes the file.
    """
    tensors = {f"model.{name}": whole(t) for name, t in full_weights(model).items()}
    # Optimizers know parameters by identity and number; in the file they have their names.
    names = {id(p): name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        for p, state in optimizer.state.items():
            tensors |= {f"optimizer.{names[id(p)]}.{key}": whole(t) for key, t in state.items()}
    if write:
        tensors["about"] = torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8)
        files.write_tensors(path, tensors, "checkpoint")


@torch.no_grad()
def restore_checkpoint(path: Path, model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """Fill a model and its optimizers from a file.

    Args:
        path: the file.
        model: the model.
        optimizers: its optimizers.

    Returns:
        What `save_checkpoint` was given as `about`.

    Raises:
        LowkeyError: the file does not fit them.
    """

    def refuse(rule: str) -> LowkeyError:
        return LowkeyError(
            f"checkpoint {str(path)!r}: {rule}; it is not this run's: delete it, or start anew with --force"
        )

    saved = files.read_tensors(
        path, "checkpoint", "checkpoint", remedy="delete it, or start anew with --force"
    )
    if missing := ({f"model.{name}" for name in full_weights(model)} | {"about"}) - saved.keys():
        raise refuse(f"lacks {min(missing)}")
    for name, t in full_weights(model).items():
        if saved[f"model.{name}"].shape != t.shape or saved[f"model.{name}"].dtype != t.dtype:
            raise refuse(f"{name} has another shape or dtype")
    try:
        about = files.parse_json(bytes(saved["about"].tolist()).decode())
    except (ValueError, TypeError) as error:
        raise refuse(f"its description cannot be read ({error})") from None
    # Everything was checked before the first weight changes. Tensors are freed as they are copied.
    for name, t in full_weights(model).items():
        t.copy_(_like(t, saved.pop(f"model.{name}")))
    names = {id(p): name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        plain = optimizer.state_dict()
        ordered = [p for group in optimizer.param_groups for p in group["params"]]
        plain["state"] = {i: _state(saved, names[id(p)], p) for i, p in enumerate(ordered)}
        if not all(_is_state(plain["state"][i], optimizer, p) for i, p in enumerate(ordered)):
            raise refuse("the state of an optimizer does not fit its weights")
        optimizer.load_state_dict(plain)
    return about


def _is_state(state: Mapping[str, Tensor], optimizer: Optimizer, p: Tensor) -> bool:
    """Whether this can be what an optimizer keeps for a parameter. It keeps nothing for one that never had a
    gradient.
    """
    known = STATES.get(type(optimizer).__name__, set(state))
    shapes = all(t.shape == (() if name == "step" else p.shape) for name, t in state.items())
    return not state or (set(state) == known and shapes)


def _state(saved: Mapping[str, Tensor], name: str, p: Tensor) -> dict[str, Tensor]:
    """What an optimizer keeps for a parameter, by name, from all tensors of a checkpoint."""
    prefix = f"optimizer.{name}."
    state = {key.removeprefix(prefix): t for key, t in saved.items() if key.startswith(prefix)}
    # A key with a dot belongs to a parameter whose name begins with this one's.
    return {key: _like(p, t) if t.shape == p.shape else t for key, t in state.items() if "." not in key}


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name; tied parameters occur once."""
    kept = model.state_dict().keys()
    buffers = {name: b for name, b in model.named_buffers() if name in kept}
    return dict(model.named_parameters()) | buffers


def gathered_tensor(t: Tensor) -> Tensor:
    """A sharded tensor put together. Every process takes part."""
    t = t.detach()
    return t.full_tensor() if isinstance(t, DTensor) else t


def whole(t: Tensor) -> Tensor:
    """A tensor put together, on the CPU."""
    return gathered_tensor(t).cpu()


def _like(t: Tensor, new: Tensor) -> Tensor:
    """A new tensor on the device of `t`, sharded like it."""
    return (
        distribute_tensor(new.to(t.device), t.device_mesh, t.placements)
        if isinstance(t, DTensor)
        else new.to(t.device)
    )
