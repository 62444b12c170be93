"""The time of a decode step under every kind of cache, against the run that was committed last.

    python benchmarks/bench.py [OUT.json] [--model smollm2 --context 1k,4k --threads 1,2 --rounds 15]
    python benchmarks/bench.py --quick

Without --model, `tiny` and, if it was downloaded, `smollm2` are timed, at the contexts of CONTEXTS. All
figures go into one file, with the machine's description: docs/results/bench/MACHINE.json unless OUT is given.
They are compared with the file of this name that was committed last, or with another machine's where there
is none. Compared are times over those of transformers' own cache in the same run. The exit status is 1 if a
step has become 10 % slower. Run it on an idle machine of two cores or more; it takes less than 20 minutes.
What a stopped run has finished, context by context, lies in OUT.partial; the same command goes on there.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.cache.cache import LowkeyCache, make_cache
from lowkey.calibration.calibrate import Sample, calibrate
from lowkey.catalog import make_policy
from lowkey.cli.checks import parse_numbers
from lowkey.cli.loading import open_model
from lowkey.cli.tables import show_steps
from lowkey.core import files
from lowkey.core.files.measured import Measured
from lowkey.core.progress import bars
from lowkey.evaluate.machine import machine
from lowkey.evaluate.step_bench import StepTiming, step_bench
from lowkey.methods import KQSVD, PCA
from lowkey.models import packaged

ROOT = Path(__file__).parents[1]
FOLDER = Path("docs") / "results" / "bench"
SLOWER = 1.1  # times the committed quotient
CONTEXTS = {"tiny": "256,1k", "smollm2": "1k,4k,8k"}
ROUNDS = {"tiny": 45, "smollm2": 15}  # a step of `tiny` takes milliseconds
# What a step of smollm2 may take of a stock step, by context and setting.
BARS: dict[int, dict[str, float]] = {
    4096: {"snapkv:10%": 0.78, "int4": 0.9, "kivi2": 0.9, "rank:50%": 0.95, "joint:50%": 1.1},
    8192: {"snapkv:10%": 0.65, "int4": 0.75, "kivi2": 0.75, "rank:50%": 0.85, "joint:50%": 1.0},
}
BARS[4096] |= dict.fromkeys(("rank:50%+kivi2", "joint:50%+kivi2"), 1.1)
BARS[8192] |= dict.fromkeys(("rank:50%+kivi2", "joint:50%+kivi2"), 1.0)
BAR_AT_1K = 1.1  # of every setting


def main(
    out: Annotated[Path | None, typer.Argument(help="where to write all figures")] = None,
    model: Annotated[list[str] | None, typer.Option(help="a model; repeat for several")] = None,
    context: Annotated[str | None, typer.Option(help="tokens of prompts, like 1k,8k")] = None,
    threads: Annotated[
        str | None, typer.Option(help="CPU threads (default: 1,2, or as many as there are)")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="rounds of two steps each")] = None,
    quick: Annotated[bool, typer.Option(help="a smoke test: `tiny` only, few tokens, one round")] = False,
) -> None:
    """Time, write, compare."""
    where = machine("cpu")
    counts = threads or ",".join(str(n) for n in (1, 2) if n <= where["cores"])
    names = model or (["tiny", *(["smollm2"] if packaged.is_present("smollm2") else [])])
    if quick:
        names, context, counts, rounds = ["tiny"], "64", "1", 1
    place = out or ROOT / FOLDER / f"{machine_name(where)}.json"
    timings = {
        name: StepTiming(
            parse_numbers("context", context or CONTEXTS.get(name, "1k"), "StepTiming", "contexts"),
            parse_numbers("threads", counts, "StepTiming", "threads"),
            rounds or ROUNDS.get(name, 15),
        )
        for name in names
    }
    described = {name: asdict(timing) for name, timing in timings.items()}
    job = {"machine": {k: v for k, v in where.items() if k != "load"}, "models": described}
    work = files.work_beside(place) if out or not quick else None
    found = {"format": 1, "environment": where, "models": timed(timings, Measured(work, job))}
    for result in found["models"].values():
        show_steps(result)
    before = None if quick else committed(ROOT, place)
    if work is not None:
        files.write_json(place, found, "benchmark", ours=True)
        files.remove_work(work)
        print(f"written to {place}")
    for line in missed_bars(found):
        print(line)
    if quick:
        return
    if before is None:
        print("nothing was committed before, so that nothing is compared")
        return
    name, old = before
    if old["environment"]["processor"] != where["processor"]:
        print(f"{name} is of another machine ({old['environment']['processor']}); quotients may differ")
    if lines := slower(found, old):
        print(f"slower than {name}:", *lines, sep="\n")
        raise typer.Exit(1)
    print(f"no step is 10 % slower than in {name}")


def timed(timings: dict[str, StepTiming], measured: Measured) -> dict[str, Any]:
    """The results of `step_bench` by model.

    Args:
        timings: of each model.
        measured: earlier results of the same job, one for each context.
    """

    def prepared(name: str) -> tuple[Any, ...]:
        model, tokenizer = open_model(name, "auto", "cpu")
        return model, tokenizer, settings(model, tokenizer)

    once, found = cache(prepared), {}
    try:
        for name, timing in timings.items():
            results = []
            for context in timing.contexts:
                one = replace(timing, contexts=(context,))
                measure = lambda name=name, one=one: step_bench(*once(name), one, bars)  # noqa: E731
                results.append(measured.once(f"{name} {context}", measure))
            found[name] = results[-1] | {"rows": [row for result in results for row in result["rows"]]}
    finally:
        measured.write()  # also after an interrupt: the same command then goes on
    return found


def settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Callable[[], LowkeyCache]]:
    """What makes an empty cache, by name.

    `rank` has a latent for each head, of rotated keys, `joint` one for all heads of a layer, of keys before
    their rotation. Times depend on shapes alone, so that a few windows of text are enough to fit them.
    """
    few = Sample(windows=4, length=64)
    fit = partial(calibrate, model, tokenizer, budget="50%", allocator="uniform", sample=few, bits="none")
    ranks = {
        "rank:50%": fit(method=PCA(), layout="post_rope"),
        "joint:50%": fit(method=KQSVD(group=0), layout="pre_rope"),
    }
    made = partial(make_cache, model)
    return {
        "full": made,
        "snapkv:10%": partial(made, policy=make_policy("snapkv", "10%", {})),
        **{bits: partial(made, bits=bits) for bits in ("int8", "int4", "kivi2")},
        **{name: partial(made, plan) for name, plan in ranks.items()},
        **{f"{name}+kivi2": partial(made, plan, bits="kivi2") for name, plan in ranks.items()},
    }


def machine_name(where: dict[str, Any]) -> str:
    """A file name for a machine, like `amd-epyc-2-cores`."""
    words = re.sub(r"\W+", "-", where["processor"].lower()).strip("-")
    return f"{words}-{where['cores']}-cores"


def committed(root: Path, place: Path) -> tuple[str, dict[str, Any]] | None:
    """The result that was committed last in docs/results/bench: of the same file name, else of any.

    Args:
        root: of the repository.
        place: the file that will be written.

    Returns:
        Its name and what it holds; None if there is none, or no git.
    """

    def git(*words: str) -> str:
        ran = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True)
        return ran.stdout if ran.returncode == 0 else ""

    try:
        there = git("ls-tree", "--name-only", "HEAD", f"{FOLDER}/").splitlines()
        changed = git("log", "--format=", "--name-only", "--", str(FOLDER)).splitlines()
    except OSError:
        return None
    newest_first = [name for name in dict.fromkeys(changed) if name in there and name.endswith(".json")]
    same = [name for name in newest_first if Path(name).name == place.name]
    if not newest_first:
        return None
    name = (same or newest_first)[0]
    return name, json.loads(git("show", f"HEAD:{name}"))


def slower(found: dict[str, Any], old: dict[str, Any]) -> list[str]:
    """A line for each step whose time over stock's is 10 % above that of an earlier result.

    Three rounds of four must be slower than the earlier median, too; else the difference is within the noise.
    """
    before = {key: row["ratio_to_stock"] for key, row in _rows(old).items()}
    return [
        f"{_named(key)}: {row['ratio_to_stock']:.2f} of stock's time, {before[key]:.2f} before"
        for key, row in _rows(found).items()
        if key in before and row["ratio_to_stock"] > SLOWER * before[key] and row["spread"][0] > before[key]
    ]


def missed_bars(found: dict[str, Any]) -> list[str]:
    """A line for each step of smollm2 that takes longer than its bar allows."""
    lines = []
    for key, row in _rows(found).items():
        model, context, _, setting = key
        bar = BAR_AT_1K if context == 1024 else BARS.get(context, {}).get(setting)
        if model == "smollm2" and bar is not None and row["ratio_to_stock"] > bar:
            lines.append(f"{_named(key)}: {row['ratio_to_stock']:.2f} of stock's time, its bar is {bar:.2f}")
    return lines


def _named(key: tuple[str, int, int, str]) -> str:
    """A row in words."""
    model, context, threads, setting = key
    return f"{model}, {context} tokens, {threads} {'thread' if threads == 1 else 'threads'}, {setting}"


def _rows(found: dict[str, Any]) -> dict[tuple[str, int, int, str], dict[str, Any]]:
    """Rows by model, context, threads and setting, without those of stock."""
    return {
        (name, row["context"], row["threads"], row["setting"]): row
        for name, result in found["models"].items()
        for row in result["rows"]
        if row["setting"] != "stock"
    }


if __name__ == "__main__":
    typer.run(main)
