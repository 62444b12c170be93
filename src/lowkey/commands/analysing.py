"""Commands that look into a trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lowkey import files, text
from lowkey.commands.common import AsJson, Device, Dtype, Model, Seed, err, hold, within
from lowkey.diversity import Compared
from lowkey.diversity import diversity as measure
from lowkey.loading import load
from lowkey.progress import bars
from lowkey.show import show_diversity


def diversity(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for diversity.json and the plots")] = Path("diversity"),
    data: Annotated[Path | None, typer.Option(help="a UTF-8 text file for attention maps (default: the embedded text)")] = None,
    windows: Annotated[int, typer.Option(help=within(Compared, "windows", "windows of text whose attention maps are compared"))] = 8,
    context: Annotated[int, typer.Option(help=within(Compared, "context", "tokens per window"))] = 128,
    inits: Annotated[
        int,
        typer.Option(help=within(Compared, "inits", "random initialisations beside it; each takes the memory of a model; 0: none")),
    ] = 3,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """How different the heads of every layer are, by weights (queries with keys, values with output) and by where they look, beside the
    same configuration at random."""
    from lowkey.report.diversity import cosines_figure, diversity_figure

    files.check_folder(out, force=False, again="diversity.json")
    hold(Compared, windows=windows, context=context, inits=inits, seed=seed)
    corpus = text.read_text(data, "data") if data else None
    loaded, tokenizer = load(model, dtype, device)
    found = measure(loaded, tokenizer, corpus, windows=windows, context=context, inits=inits, seed=seed, progress=bars)
    found = {**found, "data": str(data) if data else "embedded"}
    with files.replacing_folder(out) as temporary:
        files.write_json(temporary / "diversity.json", found, "diversity")
        for name, draw in (("diversity", diversity_figure), ("cosines", cosines_figure)):
            draw(found).savefig(temporary / f"{name}.png", dpi=150)
    err.print(f"diversity.json, diversity.png and cosines.png written to {out}", highlight=False, soft_wrap=True)
    print(json.dumps(found)) if as_json else show_diversity(found)
