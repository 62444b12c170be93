"""`lowkey`: one sub-command per verb. Bad input is one line on stderr and exit status 2; progress goes to stderr."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from lowkey import files, text
from lowkey.allocate import ALLOCATORS
from lowkey.bench import decode_bench
from lowkey.cache import make_cache
from lowkey.calibrate import Sample, calibrate, describe
from lowkey.echo import ECHOES, estimate_echo
from lowkey.evaluate.result import TASKS, Task, evaluate
from lowkey.evaluate.settings import evicted, full, packed, planned
from lowkey.generate import stream
from lowkey.heads import KINDS, HeadScores, estimate_heads
from lowkey.loading import load, make_method, make_policy
from lowkey.methods import METHODS
from lowkey.needles import TASKS as NEEDLES
from lowkey.plan import Plan
from lowkey.policies import POLICIES, policy_words
from lowkey.policies.allocators import ALLOCATORS as HEAD_ALLOCATORS
from lowkey.policies.allocators import HeadImportance
from lowkey.policies.base import Policy
from lowkey.progress import bars
from lowkey.show import pairs_of, screen, show_bench, show_heads, show_plan, show_rows
from lowkey.types import LAYOUTS, Budget, Layout, LowkeyError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, help=__doc__)
bench = typer.Typer(no_args_is_help=True, help="Time parts of lowkey on this machine.")
app.add_typer(bench, name="bench")
err = Console(stderr=True, markup=False, emoji=False)  # paths and names are printed as they are
UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # what a command line that does not parse raises; typer does not export it

Model = Annotated[str, typer.Argument(help="a model folder, a Hub id, or 'tiny' (the embedded model)")]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")]
Dtype = Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, or balanced over several GPUs")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="seed of the calibration sample and of training")]


@app.command()
def compress(
    model: Model,
    out: Annotated[Path, typer.Argument(help="folder to write the plan to")],
    method: Annotated[str, typer.Option(help="a name that `lowkey methods` lists, or package.module:Class")] = "stiefattention",
    budget: Annotated[str | None, typer.Option(help="bytes kept: '50%' or '64 KiB/token' (50% when no budget is given)")] = None,
    error_budget: Annotated[float | None, typer.Option(help="instead: the largest relative layer-output error, like 0.03")] = None,
    allocator: Annotated[str | None, typer.Option(help=f"how ranks are split: {', '.join(ALLOCATORS)}")] = None,
    layout: Annotated[str, typer.Option(help="post_rope (nothing is expanded back) or pre_rope")] = "post_rope",
    calibration: Annotated[Path | None, typer.Option(help="a UTF-8 text file (default: the embedded text)")] = None,
    windows: Annotated[int, typer.Option(help="calibration windows")] = 32,
    context: Annotated[int, typer.Option(help="tokens per calibration window")] = 512,
    rank_multiple: Annotated[int, typer.Option(help="hold every rank to a multiple of this")] = 1,
    sinks: Annotated[int, typer.Option(help="first tokens kept exact")] = 0,
    recent: Annotated[int, typer.Option(help="last tokens kept exact")] = 0,
    heads: Annotated[list[Path] | None, typer.Option(help="a file of head scores to keep in the plan, for policies on top of it")] = None,
    option: Annotated[list[str] | None, typer.Option("--option", "-O", help="an option of the method, like epochs=5")] = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    force: Annotated[bool, typer.Option(help="replace a folder that holds files")] = False,
    as_json: AsJson = False,
) -> None:
    """Fit a method on text and write a plan. Interrupted work resumes when the same command is given again."""
    work = files.check_output(out, force)
    _at_least(4, windows=windows)
    _at_least(8, context=context)
    chosen, form = make_method(method, _options(option)), _layout(layout)
    asked = None if budget is None else Budget.parse(budget)
    corpus = text.read_text(calibration, "calibration") if calibration else None
    loaded, tokenizer = load(model, dtype, device)
    plan = calibrate(
        *(loaded, tokenizer, corpus),
        method=chosen,
        budget=asked,
        error_budget=error_budget,
        allocator=allocator,
        layout=form,
        sample=Sample(windows, context, seed),
        rank_multiple=rank_multiple,
        sinks=sinks,
        recent=recent,
        heads=_head_scores(heads, loaded),
        work=work,
        progress=bars,
    )
    plan.save(out, force)
    shutil.rmtree(work, ignore_errors=True)
    show_plan(plan, out, as_json)


@app.command("eval")
def evaluate_command(
    model: Model,
    plan: Annotated[list[Path] | None, typer.Option(help="a plan folder; repeat to compare several")] = None,
    bits: Annotated[list[int] | None, typer.Option(help="also rows of packed integers: 8, 4 (both when not given)")] = None,
    policy: Annotated[str | None, typer.Option(help="eviction policies that `lowkey policies` lists, separated by commas")] = None,
    budget: Annotated[str | None, typer.Option(help="what policies keep: '10%' or '64 tokens'; several separated by commas")] = None,
    heads: Annotated[list[Path] | None, typer.Option(help="a file of head scores that `lowkey heads` wrote")] = None,
    option: Annotated[list[str] | None, typer.Option("--option", "-O", help="an option of the policies, like recent=4")] = None,
    refeed: Annotated[bool, typer.Option(help="recall: ask again over what was kept, so that the first answer token is tested too")] = True,
    data: Annotated[Path | None, typer.Option(help="a UTF-8 text file (default: the embedded text)")] = None,
    task: Annotated[list[str] | None, typer.Option(help=f"{', '.join(TASKS)} (all when not given)")] = None,
    context: Annotated[int, typer.Option(help="tokens per window and per recall case")] = 512,
    windows: Annotated[int, typer.Option(help="windows of text to score")] = 16,
    cases: Annotated[int, typer.Option(help="recall cases")] = 20,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    out: Annotated[Path | None, typer.Option(help="result file (default: results/eval-MODEL-TIME.json)")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the full cache, plans, policies and packed integers on the same text: quality, bytes really held, speed.

    One row for each policy and budget; with one --plan, policies evict on top of it.
    """
    place = out or Path("results") / f"eval-{Path(model).name}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    files.check_file(place)
    _at_least(1, windows=windows, cases=cases)
    policies = _policies(policy, budget, option)
    corpus = text.read_text(data, "data") if data else text.embedded("evaluation")
    loaded, tokenizer = load(model, dtype, device)
    plans = [(Plan.load(p, loaded), str(p)) for p in plan or []]
    scores = _head_scores(heads, loaded)
    settings = [full(loaded)] + [planned(loaded, *p) for p in plans]
    below: list[tuple[Plan | None, str | None]] = [*plans] or [(None, None)]
    settings += [evicted(loaded, wanted, name, context, *p, heads=scores) for name, wanted in policies for p in below]
    settings += [packed(loaded, b) for b in bits or (8, 4)]
    what = Task(corpus, str(data) if data else "embedded", context, windows, cases, seed, refeed=refeed)
    names = [name for item in task or TASKS for name in item.split(",")]
    result = evaluate(loaded, tokenizer, settings, what, names, bars)
    files.write_json(place, result)
    err.print(f"result written to {place}", highlight=False, soft_wrap=True)
    print(json.dumps(result)) if as_json else show_rows(result)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="text to continue")],
    plan: Annotated[Path | None, typer.Option(help="a plan folder")] = None,
    bits: Annotated[int | None, typer.Option(help="8 or 4: packed integers")] = None,
    policy: Annotated[str | None, typer.Option(help="an eviction policy that `lowkey policies` lists")] = None,
    budget: Annotated[str | None, typer.Option(help="what the policy keeps: '10%' or '64 tokens'")] = None,
    heads: Annotated[list[Path] | None, typer.Option(help="a file of head scores that `lowkey heads` wrote")] = None,
    option: Annotated[list[str] | None, typer.Option("--option", "-O", help="an option of the policy, like every=32")] = None,
    tokens: Annotated[int, typer.Option(help="new tokens at most")] = 64,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Continue a prompt over a compressed cache; ends with tokens/s and the bytes held against the full cache."""
    _at_least(1, tokens=tokens)
    wanted = _policies(policy, budget, option)
    if len(wanted) > 1:
        raise LowkeyError(f"policy {policy!r} with budget {budget!r}: generate takes one policy and one budget")
    loaded, tokenizer = load(model, dtype, device)
    chosen = Plan.load(plan, loaded) if plan else None
    evicting = wanted[0][1].fitted(_importance(chosen, _head_scores(heads, loaded))) if wanted else None
    cache = make_cache(loaded, chosen, evicting, bits=bits)
    summary = stream(loaded, tokenizer, prompt, cache, tokens, None if as_json else sys.stdout)
    if as_json:
        print(json.dumps(summary))
        return
    held, whole = summary["bytes_held"], summary["bytes_full"]
    err.print(
        f"\n{summary['tokens_per_s']:.1f} tokens/s; the cache holds {held:,} bytes, {100 * held / whole:.1f}% of {whole:,}", highlight=False
    )


@app.command()
def profile(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for profile.json and the plots")] = Path("profile"),
    method: Annotated[str, typer.Option(help="whose bases to profile")] = "eigenattention",
    layout: Annotated[str, typer.Option(help="post_rope or pre_rope")] = "post_rope",
    calibration: Annotated[Path | None, typer.Option(help="a UTF-8 text file (default: the embedded text)")] = None,
    windows: Annotated[int, typer.Option(help="calibration windows")] = 16,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """The error-rank surface of every layer and the spectra of keys and values, as JSON and PNG."""
    from lowkey.report import plots

    _at_least(4, windows=windows)
    corpus = text.read_text(calibration, "calibration") if calibration else None
    loaded, tokenizer = load(model, dtype, device)
    plan = calibrate(
        loaded, tokenizer, corpus, method=make_method(method, {}), layout=_layout(layout), sample=Sample(windows, seed=seed), progress=bars
    )
    found = {"model": model, "method": describe(make_method(method, {})), **plan.profile, "layers": list(plan.factors)}
    files.write_json(out / "profile.json", found)
    for name, draw in (("surface", plots.error_surface_figure), ("spectra", plots.spectra_figure)):
        with files.replacing(out / f"{name}.png") as temporary:
            draw(found).savefig(temporary, format="png", dpi=150)
    print(json.dumps(found)) if as_json else err.print(f"profile.json, surface.png and spectra.png written to {out}", highlight=False)


@app.command("heads")
def heads_command(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="the JSON file to write")] = Path("heads.json"),
    kind: Annotated[str, typer.Option(help=f"the score: {', '.join([*KINDS, *ECHOES])}")] = "r2",
    task: Annotated[str | None, typer.Option(help=f"{', '.join(NEEDLES)} (default: the kind's own)")] = None,
    haystack: Annotated[Path | None, typer.Option(help="a UTF-8 text file (default: the embedded text)")] = None,
    cases: Annotated[int, typer.Option(help="cases to ask; those answered right count")] = 100,
    context: Annotated[int, typer.Option(help="tokens of the longest cases; the shortest have a fifth")] = 1024,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    force: Annotated[bool, typer.Option(help="replace a file")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure which heads find the answer in a long text, for policies that split their budget by it."""
    files.check_file(out, force)
    corpus = text.read_text(haystack, "haystack") if haystack else None
    loaded, tokenizer = load(model, dtype, device)
    if kind in ECHOES:
        found = estimate_echo(loaded, tokenizer, kind=kind, cases=cases, context=context, seed=seed, progress=bars)
    else:
        found = estimate_heads(
            loaded, tokenizer, kind=kind, task=task, haystack=corpus, cases=cases, context=context, seed=seed, progress=bars
        )
    found.save(out)
    print(json.dumps({"heads": str(out), **found.describe()})) if as_json else show_heads(found, out, cases)


@bench.command()
def decode(
    context: Annotated[int, typer.Option(help="tokens stored per head")] = 8192,
    head_dim: Annotated[int, typer.Option(help="channels of a head")] = 128,
    heads: Annotated[int, typer.Option(help="query heads")] = 32,
    kv_heads: Annotated[int, typer.Option(help="KV heads")] = 8,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "bfloat16",
    budget: Annotated[str, typer.Option(help="what the evicted cache keeps: '10%' or '512 tokens'")] = "10%",
    repeats: Annotated[int, typer.Option(help="rounds; medians are shown")] = 15,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """One decode step of attention: every backend, full and at a budget, against torch's own and this machine's reads."""
    found = decode_bench(context, head_dim, heads, kv_heads, dtype, budget, repeats, seed)
    print(json.dumps(found)) if as_json else show_bench(found)


@app.command()
def methods(as_json: AsJson = False) -> None:
    """The methods and allocators, with their options and papers."""
    listed = {name: {"summary": m.summary, "paper": m.paper, "options": describe(m())["parameters"]} for name, m in METHODS.items()}
    splits = {name: {"summary": a.summary, "options": describe(a())["parameters"]} for name, a in ALLOCATORS.items()}
    if as_json:
        print(json.dumps({"methods": listed, "allocators": splits}))
        return
    for title, entries in (("method", listed), ("allocator", splits)):
        table = Table(title, "what it does", "paper", "options (-O name=value)")
        for name, entry in entries.items():
            table.add_row(name, entry["summary"], entry.get("paper", ""), pairs_of(entry["options"]))
        screen.print(table)


@app.command()
def policies(as_json: AsJson = False) -> None:
    """The eviction policies and their allocators, with their options and papers."""
    known = {name: make_policy(name, "50%", {}) for name in POLICIES}
    listed = {name: {"summary": p.summary, "paper": p.paper, **policy_words(p)} for name, p in known.items()}
    splits = {name: {"summary": a.summary, "options": describe(a())["parameters"]} for name, a in HEAD_ALLOCATORS.items()}
    if as_json:
        print(json.dumps({"policies": listed, "allocators": splits}))
        return
    table = Table("policy", "keeps by", "split", "paper", "options (-O name=value)")
    for name, entry in listed.items():
        table.add_row(name, entry["summary"], entry["allocator"]["name"], entry["paper"], pairs_of(entry["parameters"]))
    screen.print(table)
    table = Table("allocator", "what it does", "options (-O name=value)")
    for name, entry in splits.items():
        table.add_row(name, entry["summary"], pairs_of(entry["options"]))
    screen.print(table)


@app.command()
def inspect(plan: Annotated[Path, typer.Argument(help="a plan folder")], as_json: AsJson = False) -> None:
    """What a plan holds."""
    show_plan(Plan.load(plan), plan, as_json)


@app.command()
def report(
    results: Annotated[list[Path], typer.Argument(help="result files, or folders of them")],
    out: Annotated[Path, typer.Option("--out", "-o", help="the HTML file to write")] = Path("report.html"),
    as_json: AsJson = False,
) -> None:
    """One self-contained HTML page from result files."""
    from lowkey.report import write_report

    place = write_report(results, out)
    print(json.dumps({"report": str(place)})) if as_json else err.print(f"report written to {place}", highlight=False, soft_wrap=True)


def _policies(names: str | None, budgets: str | None, options: list[str] | None) -> list[tuple[str, Policy]]:
    """(name, policy) for each name and budget."""
    if names is None:
        if budgets is not None:
            raise LowkeyError(f"budget {budgets!r}: is for a policy; give --policy too, or a plan for low rank")
        return []
    if budgets is None:
        raise LowkeyError(f"policy {names!r}: needs a budget; give --budget, like 10% or '64 tokens'")
    given = _options(options)
    return [(n, make_policy(n, b, given)) for n in names.split(",") for b in budgets.split(",")]


def _head_scores(paths: list[Path] | None, model: PreTrainedModel) -> HeadImportance:
    """Importance of the KV heads by kind, out of files."""
    found = [HeadScores.load(path, model) for path in paths or []]
    return {scores.kind: scores.per_kv_head().tolist() for scores in found}


def _importance(plan: Plan | None, heads: HeadImportance) -> HeadImportance:
    return {**(plan.heads if plan else {}), **heads}


def _options(pairs: list[str] | None) -> dict[str, str]:
    for pair in pairs or []:
        if "=" not in pair:
            raise LowkeyError(f"option {pair!r}: write it as name=value, like epochs=5")
    return dict(pair.split("=", 1) for pair in pairs or [])


def _layout(name: str) -> Layout:
    for known in LAYOUTS:
        if name == known:
            return known
    raise LowkeyError(f"layout {name!r} is unknown; choose one of {', '.join(LAYOUTS)}")


def _at_least(least: int, **counts: int) -> None:
    for name, count in counts.items():
        if count < least:
            raise LowkeyError(f"{name} {count}: must be at least {least}; leave it out for the default")


def main() -> None:
    """The console entry point: every expected failure becomes one line."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        status = app(prog_name="lowkey", standalone_mode=False)
        sys.stdout.flush()
    except LowkeyError as error:
        _fail(str(error), 2)
    except UsageError as error:
        _fail(_usage(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except BrokenPipeError:
        os._exit(0)
    except OSError as error:
        what = "no space left on the device" if error.errno == errno.ENOSPC else (error.strerror or str(error))
        _fail(f"{error.filename or 'file'}: {what}; free some space or choose another place", 2)
    if status == 130:
        _fail("interrupted; nothing half-written is left, and compress resumes when given again", 130)
    sys.exit(status or 0)


def _usage(error: Exception) -> str:
    """What is wrong with the command line, with the value, which some versions of typer leave out, and where help is."""
    if len(sys.argv) < 2:
        print(error, file=sys.stderr)
        sys.exit(2)
    found: list[dict] = getattr(error.__cause__, "errors", list)()
    value = f" (given {found[0].get('input')!r})" if found else ""
    context = getattr(error, "ctx", None)
    return f"{error.format_message().rstrip('.')}{value}; see {context.command_path if context else 'lowkey'} --help"


def _fail(message: str, status: int) -> None:
    print(f"lowkey: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
