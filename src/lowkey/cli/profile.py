"""`lowkey profile`: the error of every rank in every layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lowkey.allocation.rank_grid import read_request
from lowkey.cli.checks import (
    check_method,
    check_model_options,
    check_sample,
    parse_layout,
    parse_pairs,
    read_corpus,
)
from lowkey.cli.console import note
from lowkey.cli.options import (
    METHOD,
    OUTPUT,
    AsJson,
    Calibration,
    CandidateRanks,
    Device,
    Dtype,
    LayoutOption,
    MethodOptions,
    Model,
    Seed,
    Windows,
)
from lowkey.core import files


def profile(
    model: Model,
    method: Annotated[
        str, typer.Option(metavar="NAME", help="the method whose bases are measured", rich_help_panel=METHOD)
    ] = "eigenattention",
    option: MethodOptions = None,
    layout: LayoutOption = None,
    ranks: CandidateRanks = None,
    calibration: Calibration = None,
    windows: Windows = 16,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="FOLDER",
            help="folder for profile.json and the plots",
            rich_help_panel=OUTPUT,
        ),
    ] = Path("profile"),
    as_json: AsJson = False,
) -> None:
    """Measure the error of every rank in every layer.

    Writes the error-rank surface of every layer and the spectra of its keys and values, as JSON and PNG.
    """
    options = parse_pairs(option)
    check_method(method, options)
    form = None if layout is None else parse_layout(layout)
    if ranks is not None:
        read_request(ranks)
    check_sample(windows, None, seed)
    check_model_options(model, dtype, device)
    corpus = read_corpus(calibration)
    files.check_folder(out, force=False, again="profile.json")

    from lowkey.calibration.calibrate import calibrate
    from lowkey.catalog import make_method
    from lowkey.cli.loading import make_sample, open_model
    from lowkey.core.progress import bars
    from lowkey.report import plots

    chosen = make_method(method, options)
    loaded, tokenizer = open_model(model, dtype, device)
    plan = calibrate(
        *(loaded, tokenizer, corpus),
        method=chosen,
        budget="100%",  # nothing is chosen
        allocator="uniform",
        layout=form,
        pairs=True,
        ranks=ranks,
        sample=make_sample(windows, None, seed),
        progress=bars,
    )
    measured = {name: plan.profile[name] for name in ("ranks", "surface", "spectra")}
    found = {
        "model": model,
        "method": plan.method,
        "layout": plan.layout,
        **measured,
        "layers": list(plan.factors),
    }
    with files.replacing_folder(out) as temporary:
        files.write_json(temporary / "profile.json", found, "profile")
        for name, draw in (("surface", plots.error_surface_figure), ("spectra", plots.spectra_figure)):
            draw(found).savefig(temporary / f"{name}.png", dpi=150)
    if as_json:
        print(json.dumps(found))
    else:
        note(f"profile.json, surface.png and spectra.png written to {out}")
