"""`lowkey diversity`: how different the heads of each layer are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lowkey.cli.checks import check_model_options, check_settings, read_corpus, with_range
from lowkey.cli.console import note
from lowkey.cli.options import MEASURING, OUTPUT, AsJson, Device, Dtype, MeasuringSeed, MeasuringText, Model
from lowkey.core import files


def diversity(
    model: Model,
    data: MeasuringText = None,
    windows: Annotated[
        int,
        typer.Option(
            metavar="N",
            help=with_range("Compared", "windows", "windows of text whose attention maps are compared"),
            rich_help_panel=MEASURING,
        ),
    ] = 8,
    context: Annotated[
        int,
        typer.Option(
            metavar="N",
            help=with_range("Compared", "context", "tokens per window"),
            rich_help_panel=MEASURING,
        ),
    ] = 128,
    inits: Annotated[
        int,
        typer.Option(
            metavar="N",
            help=with_range(
                "Compared",
                "inits",
                "random initialisations to compare with; each takes the memory of a model; 0: none",
            ),
            rich_help_panel=MEASURING,
        ),
    ] = 3,
    seed: MeasuringSeed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="FOLDER",
            help="folder for diversity.json and the plots",
            rich_help_panel=OUTPUT,
        ),
    ] = Path("diversity"),
    as_json: AsJson = False,
) -> None:
    """Measure how different the heads of each layer are.

    Heads are compared by their weights (queries with keys, values with outputs) and by their attention maps.
    Models of the same configuration with random weights serve as a reference.
    """
    check_settings("Compared", windows=windows, context=context, inits=inits, seed=seed)
    check_model_options(model, dtype, device)
    corpus = read_corpus(data, "data")
    files.check_folder(out, force=False, again="diversity.json")

    from lowkey.cli.loading import open_model
    from lowkey.cli.tables import show_diversity
    from lowkey.core.progress import bars
    from lowkey.heads.diversity import diversity as measure
    from lowkey.report.diversity import cosines_figure, diversity_figure

    loaded, tokenizer = open_model(model, dtype, device)
    result = measure(
        loaded, tokenizer, corpus, windows=windows, context=context, inits=inits, seed=seed, progress=bars
    )
    result = {**result, "data": str(data) if data else "embedded"}
    with files.replacing_folder(out) as temporary:
        files.write_json(temporary / "diversity.json", result, "diversity")
        for name, draw in (("diversity", diversity_figure), ("cosines", cosines_figure)):
            draw(result).savefig(temporary / f"{name}.png", dpi=150)
    note(f"diversity.json, diversity.png and cosines.png written to {out}")
    if as_json:
        print(json.dumps(result))
    else:
        show_diversity(result)
