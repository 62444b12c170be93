"""Options that several commands share, and the panels of the help in which options stand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowkey.cli.checks import with_range
from lowkey.core.layouts import LAYOUTS
from lowkey.models.names import DTYPES
from lowkey.models.packaged import PACKAGED

MODEL = "Model"
METHOD = "Method"
BUDGET = "Budget"
CACHE = "Cache"
POLICY = "Policy"
EXACT = "Exact tokens"
CALIBRATION = "Calibration"
TRAINING = "Training"
MEASURING = "Measuring"
LM_EVAL = "Tasks of lm-eval"
SHAPE = "Shape"  # of what `bench decode` times and `cost` counts
HARDWARE = "Hardware"
SERVER = "Server"
OUTPUT = "Output"
PANELS = (
    MODEL,
    METHOD,
    BUDGET,
    CACHE,
    POLICY,
    EXACT,
    CALIBRATION,
    TRAINING,
    MEASURING,
    LM_EVAL,
    SHAPE,
    HARDWARE,
    SERVER,
    OUTPUT,
)

NAMED = ", ".join(f"'{name}' (lowkey download {name})" for name in PACKAGED)
EMBEDDED_TEXT = "a UTF-8 text file (default: the embedded text)"
LAYOUT_HELP = f"which keys are stored: {' or '.join(LAYOUTS)}, after or before their rotation"
CONTEXT_HELP = "tokens per window (default: 512, or as many as the model has positions)"

SEED_HELP = "seed of all random numbers (at least 0)"

# -- model

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help=f"a model folder, a Hub id, a .gguf file, 'tiny' (comes with lowkey) or {NAMED}",
        show_default=False,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help=f"dtype to load the model in: {', '.join(DTYPES)} (auto: as it was saved)",
        rich_help_panel=MODEL,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="where the model runs: auto, cpu, cuda, cuda:N, or balanced (over several GPUs)",
        rich_help_panel=MODEL,
    ),
]
PlanArgument = Annotated[
    Path, typer.Argument(metavar="PLAN", help="a plan folder made for this model", show_default=False)
]

# -- method

MethodOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        "-O",
        metavar="NAME=VALUE",
        help="an option of the method, like epochs=5; repeat for several",
        rich_help_panel=METHOD,
    ),
]
LayoutOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help=f"{LAYOUT_HELP} (default: the method's own)", rich_help_panel=METHOD),
]
CandidateRanks = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        help="candidate ranks: a count like 8, ranks like 16,32,64, shares of the head dim like 50%,75%, or "
        "all (default: the method's own)",
        rich_help_panel=METHOD,
    ),
]

# -- calibration

Calibration = Annotated[
    Path | None, typer.Option(metavar="FILE", help=EMBEDDED_TEXT, rich_help_panel=CALIBRATION)
]
Windows = Annotated[
    int,
    typer.Option(
        metavar="N",
        help=with_range("Sample", "windows", "number of windows at most; a short text has fewer"),
        rich_help_panel=CALIBRATION,
    ),
]
Context = Annotated[
    int | None,
    typer.Option(metavar="N", help=with_range("Sample", "length", CONTEXT_HELP), rich_help_panel=CALIBRATION),
]
Seed = Annotated[int, typer.Option(metavar="N", help=SEED_HELP, rich_help_panel=CALIBRATION)]

# -- measuring

MeasuringText = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help=f"text to measure on: {EMBEDDED_TEXT}", rich_help_panel=MEASURING),
]
MeasuringContext = Annotated[
    int | None,
    typer.Option(metavar="N", help=with_range("Sample", "length", CONTEXT_HELP), rich_help_panel=MEASURING),
]
MeasuringSeed = Annotated[int, typer.Option(metavar="N", help=SEED_HELP, rich_help_panel=MEASURING)]

# -- budgets and policies

ALLOCATOR_OPTION_HELP = "an option of the allocator, like {}; repeat for several"
RankAllocatorOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--allocator-option",
        "-A",
        metavar="NAME=VALUE",
        help=ALLOCATOR_OPTION_HELP.format("energy=singular"),
        rich_help_panel=BUDGET,
    ),
]
PolicyOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        "-O",
        metavar="NAME=VALUE",
        help="an option of the policy, like recent=4; repeat for several",
        rich_help_panel=POLICY,
    ),
]
TokenAllocatorOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--allocator-option",
        "-A",
        metavar="NAME=VALUE",
        help=ALLOCATOR_OPTION_HELP.format("beta=10"),
        rich_help_panel=POLICY,
    ),
]
HeadFiles = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE",
        help="head scores that `lowkey heads` wrote; repeat for several kinds",
        rich_help_panel=POLICY,
    ),
]
GateFolders = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FOLDER",
        help="what a policy has learnt of the model, which `lowkey gates` wrote; repeat for several policies",
        rich_help_panel=POLICY,
    ),
]

SmallModel = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="a smaller model of the same tokenizer that reads along, for policies that choose by its "
        "attention",
        rich_help_panel=POLICY,
    ),
]

# -- output

OutFolder = Annotated[Path, typer.Argument(metavar="OUT", help="folder to write to", show_default=False)]
Force = Annotated[
    bool, typer.Option(help="replace a folder that lowkey wrote before", rich_help_panel=OUTPUT)
]
AsJson = Annotated[
    bool, typer.Option("--json", help="print one JSON object on stdout", rich_help_panel=OUTPUT)
]
