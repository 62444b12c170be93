"""`lowkey pretrain`: train a model from scratch, or train one further."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lowkey.cli import choices
from lowkey.cli.checks import check_word
from lowkey.cli.console import note
from lowkey.cli.options import MODEL, OUTPUT, TRAINING, AsJson
from lowkey.models.names import check_name
from lowkey.pretraining.recipe import Recipe

TRAINING_DEVICES = ("auto", "cpu", "cuda")


def pretrain(
    recipe: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE",
            help="a TOML file with the tables [model], [data] and [training], like recipes/lrkv-tiny.toml",
            show_default=False,
        ),
    ],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="a field of the recipe, like training.lr=1e-3; repeat for several",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help=f"where to train: {', '.join(TRAINING_DEVICES)}; for several GPUs use `accelerate launch`",
            rich_help_panel=MODEL,
        ),
    ] = "auto",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FOLDER",
            help="folder for the model, its log and its checkpoint (default: runs/RECIPE)",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(help="start again even if the folder holds another run", rich_help_panel=OUTPUT),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train a model from scratch, or train one further.

    A recipe with model.path trains that model further. Interrupted work resumes when the same command is
    given again.
    """
    what = Recipe.read(recipe, settings or ())
    check_word("device", device, TRAINING_DEVICES)
    if (kind := what.model.get("attention")) is not None and not {"path", "model_type"} & set(what.model):
        check_word("model.attention", kind, choices.ATTENTION_KINDS)
    if "path" in what.model:
        check_name(what.model["path"])

    from accelerate import PartialState

    from lowkey.cli.loading import quiet_libraries
    from lowkey.core.progress import bars
    from lowkey.pretraining import pretrain as run

    quiet_libraries()
    place = out or Path("runs") / recipe.stem
    found = run(what, place, progress=bars, device=device, force=force)
    if not PartialState().is_main_process:
        return
    summary = {"model": str(place), **{k: v for k, v in found.result.items() if k != "losses"}}
    if as_json:
        print(json.dumps(summary))
    else:
        note(f"model written to {place} {_outcome(summary)}")


def _outcome(result: dict[str, Any]) -> str:
    """The losses in words. The validation loss is named only if the last step was validated."""
    words = [
        f"after {result['steps']} steps{', DIVERGED' if result['diverged'] else ''}: training loss "
        f"{_number(result['loss'])}"
    ]
    if result["validation"] and (last := result["validation"][-1])["step"] == result["steps"]:
        words.append(
            f"validation {_number(last['validation_loss'])} nats/token = {_number(last['bits_per_byte'], 3)} "
            "bits/byte"
        )
    return ", ".join(words)


def _number(value: float | None, digits: int = 4) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"
