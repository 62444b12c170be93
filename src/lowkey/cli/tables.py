"""Plans, result rows and head scores as tables on the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowkey.allocation.allocators import RANK_ALLOCATORS
from lowkey.cli.console import say
from lowkey.core.options import defaults_of, ranges, shown
from lowkey.core.printable import printable

if TYPE_CHECKING:
    from lowkey.heads.scores import HeadScores
    from lowkey.plan.plan import Plan


class Screen(Console):
    """A console that writes names and paths as they are, except for what a terminal would obey."""

    # what rich makes of every string: of cells, titles and printed lines
    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(printable(text), **how)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would end the program with status 1


def wide() -> int | None:
    """The width of tables: None for the terminal's own, or 160 columns in a file."""
    return None if sys.stdout is not None and sys.stdout.isatty() else 160


screen = Screen(width=wide(), markup=False, emoji=False)


def show_plan(plan: Plan, place: Path, as_json: bool) -> None:
    """What a plan keeps on each axis, its ranks, options and bytes."""
    from lowkey.methods import METHODS
    from lowkey.plan.card import axes_kept, bytes_by_length, bytes_kept

    if as_json:
        about = {"plan": str(place), **plan.describe()}
        if plan.token_ranks is not None:
            ranks = about.pop("token_ranks")
            about |= {"method": plan.method["name"], "layers": sorted(plan.factors), **ranks}
        print(json.dumps(about))
        return
    d = plan.geometry["head_dim"]
    title = f"{plan.method['name']} · {plan.allocator['name']} · {plan.layout} · {plan.budget}"
    if plan.token_ranks is not None:
        say(title)
    elif plan.factors:
        table = Table("layer", "key rank", "value rank", title=title)
        for i, (k, v) in plan.ranks.items():
            table.add_row(str(i), f"{k} of {d}", f"{v} of {d}")
        screen.print(table)
    for axis, kept in axes_kept(plan).items():
        say(f"{axis}: {kept.replace('`', '')}")
    for what, told, table_of in (
        ("method", plan.method, METHODS),
        ("allocator", plan.allocator, RANK_ALLOCATORS),
        ("policy", plan.policy or {}, {}),
    ):
        if told.get("parameters"):
            kind = table_of.get(told["name"])
            say(
                f"options of {what} {told['name']}: "
                f"{options_of(kind, told['parameters'], '; ') if kind else told['parameters']}"
            )
    say(f"{place}: {bytes_kept(plan)}")
    sizes = (f"{n:,} tokens {size:,} bytes ({share:.1%})" for n, size, share in bytes_by_length(plan))
    say(f"one sequence takes, in bfloat16: {', '.join(sizes)}")


def show_frontier(told: dict) -> None:
    """What `lowkey plan` compared, and what its choice holds."""
    table = Table("axes", "rank", "bits", "tokens", "B/token", "KL decode", "recall", "")
    for row in told["frontier"]:
        table.add_row(
            ", ".join(row["axes"]) or "none",
            f"{100 * row['rank']:.1f}%",
            row["bits"],
            f"{100 * row['tokens']:.4g}%",
            f"{row['bytes_per_token']:,.1f}",
            f"{row['kl']:.4g}",
            "-" if row["recall"] is None else f"{row['recall']:.2f}",
            "choice" if row == told["choice"] else "",
        )
    screen.print(table)
    share = told["cache_bytes"] / told["full_cache_bytes"]
    say(f"weights: {told['weights_bytes']:,} bytes")
    say(
        f"cache of {told['sequences']} x {told['context']:,} tokens: {told['cache_bytes']:,} bytes, "
        f"{100 * share:.1f}% of {told['full_cache_bytes']:,}"
    )
    if told["memory_bytes"] is not None:
        say(f"so many sequences fit into {told['memory_bytes']:,} bytes: {told['sequences_that_fit']:,}")


def show_tasks(result: dict) -> None:
    """The scores of tasks of lm-eval, a line for each row and metric."""
    from lowkey.report.harness import task_scores, write_difference, write_value

    table = Table("task", "row", "metric", "value", "difference from full", "bytes/token", "protocol")
    for score in task_scores(result["rows"]):
        held = score.took.get("kept_bytes_per_token")
        table.add_row(
            score.task,
            score.row,
            score.metric,
            write_value(score.value),
            write_difference(score),
            "-" if held is None else f"{held:,.1f}",
            str(score.took.get("protocol", "-")),
        )
    screen.print(table)
    for task, share in {s.task: s.took.get("over_length") for s in task_scores(result["rows"])}.items():
        if share:
            screen.print(f"{task}: {share:.0%} of the requests did not fit and lost their first tokens")


def show_cost(told: dict) -> None:
    """What `lowkey cost` counted, a row for each setting."""
    from lowkey.planner.memory import in_words

    card, gib = told["gpu"], 2**30
    title = f"{told['model']}, {told['dtype']}: {told['batch']:,} x {told['context']:,} tokens"
    times = ("floor ms", "tokens/s", "fit") if card else ()
    table = Table("setting", "a sequence", "of first", "in all", "read in a step", *times, title=title)
    for row in told["rows"]:
        share = row["share_of_first"]
        cells = [
            row["setting"],
            in_words(row["sequence_bytes"]),
            "-" if share is None else f"{100 * share:.1f}%",
            in_words(row["cache_bytes"]),
            in_words(row["read_bytes"]),
        ]
        if card:
            cells += [f"{row['step_ms']:,.2f}", f"{row['tokens_per_second']:,.0f}"]
            cells += [f"{row['sequences_that_fit']:,}"]
        table.add_row(*cells)
    screen.print(table)
    say(
        f"weights: {told['parameters']:,} parameters of {told['weight_bits']:g} bits, "
        f"{in_words(told['weights_bytes'])}, of which a step reads {in_words(told['weights_read_bytes'])}"
    )
    if card:
        say(
            f"{card['count']} x {card['name']}: {card['memory_bytes'] / gib:,.0f} GiB, "
            f"{card['count'] * card['gbs']:,.0f} GB/s; arithmetic on the config, not a measurement"
        )


COLUMNS = {  # key of a row: (heading, format)
    "perplexity": ("ppl", ".3f"),
    "perplexity_decode": ("ppl decode", ".3f"),
    "kl": ("KL", ".4f"),
    "kl_decode": ("KL decode", ".4f"),
    "top1_agreement": ("top-1", ".3f"),
    "layer_error": ("layer error", ".4f"),
    "exact_match": ("recall", ".2f"),
    "recall_kept": ("recall kept", ".1%"),
    "questions": ("questions", ".2f"),
    "questions_kept": ("questions kept", ".1%"),
    "behaviour": ("behaviour", ".2f"),
    "behaviour_same": ("as full", ".2f"),
    "behaviour_kept": ("behaviour kept", ".1%"),
    "bytes_per_token": ("B/token", ".0f"),
    "bytes_held": ("bytes held", ",d"),
    "step_ms": ("step ms", ".2f"),
}


def show_rows(result: dict) -> None:
    """The rows as a table, without the columns that nobody measured."""
    shown = [c for c in COLUMNS if any(row[c] is not None for row in result["rows"])]
    table = Table(
        "setting",
        *[COLUMNS[c][0] for c in shown],
        "kept",
        title=f"{result['model']}, {result['environment']['dtype']}",
    )
    for row in result["rows"]:
        cells = [_cell(row, c) for c in shown]
        table.add_row(row["name"], *cells, f"{100 * row['bytes_held'] / row['bytes_full']:.1f}%")
    screen.print(table)


NOTED = ("recall", "questions", "behaviour")  # tasks that say where they are no evidence


def notes(result: dict) -> list[str]:
    """A line for each task whose result is no evidence for this model."""
    found = [row.get(f"{task}_note") for row in result["rows"] for task in NOTED]
    return [note for note in found if note]


def _cell(row: dict, name: str) -> str:
    """A number, with half of its 95% interval if there is one; in brackets if it is no evidence."""
    if name == "questions" and row[name] is not None:
        return _weak(f"{row['questions_right']} of {row['questions_of']}", row["questions_evidence"])
    if name == "exact_match" and row[name] is not None:
        return _weak(format(row[name], COLUMNS[name][1]), row["recall_evidence"])
    if name == "behaviour" and row[name] is not None:
        ceiling = f"{row[name]:{COLUMNS[name][1]}} of {row['behaviour_ceiling']:{COLUMNS[name][1]}}"
        return _weak(ceiling, row["behaviour_evidence"])
    value, off, how = row[name], row.get(f"{name}_95"), COLUMNS[name][1]
    return "-" if value is None else format(value, how) + ("" if off is None else f" ± {off:{how}}")


def _weak(shown: str, evidence: bool | None) -> str:
    return f"({shown})" if evidence is False else shown


def show_heads(found: HeadScores, place: Path, asked: int) -> None:
    """The heads with the highest scores, and how reliable the scores are."""
    told = found.describe()
    table = Table(
        "layer", "KV head", "share", title=f"{found.kind} on {found.task}: the heads with most weight"
    )
    for layer, head, share in found.top():
        table.add_row(str(layer), str(head), f"{100 * share:.1f}%")
    screen.print(table)
    solved = found.settings.get("cases", found.accepted)  # what is learnt has one value for all cases
    halves = f", split-half correlation {told['split_half']:.2f}" if found.accepted > 1 else ""
    say(f"{place}: {solved} of {asked} cases right{halves}, {told['zero_heads']:.0%} zero")


def show_sinks(found: dict) -> None:
    """Sinks by layer, and the tokens that are sinks in most layers."""
    if not found["layers"]:
        say(found["why"])
        return
    table = Table(
        "layer",
        "first token",
        "later tokens",
        title=f"sinks in {found['windows']} windows of {found['context']} tokens",
    )
    for i, where in found["layers"].items():
        table.add_row(str(i), f"{where['first']} of {found['windows']}", str(where["later"]))
    screen.print(table)
    table = Table("window", "position", "token", "sink in layers")
    for token in found["tokens"][:20]:
        table.add_row(
            str(token["window"]),
            str(token["position"]),
            repr(token["token"]),
            f"{len(token['layers'])} of {len(found['layers'])}",
        )
    screen.print(table)
    say(
        f"channels {', '.join(map(str, found['channels']))} of the residual stream are outliers, from layer "
        f"{found['emergence']} on"
    )


def show_conversion(record: dict[str, Any]) -> None:
    """A converted model beside its source."""
    loss, cache, size = record["loss"], record["cache_bytes_per_token"], record["parameters"]
    table = Table(
        "model",
        "loss (nats/token)",
        "B/token",
        "kept",
        "parameters",
        title=f"{record['source']}, {record['dtype']}",
    )
    for name, which in (("source", "source"), (record["attention"], "converted")):
        nats = "not finite" if loss[which] is None else f"{loss[which]:.4f}"
        kept = f"{100 * cache[which] / cache['source']:.1f}%"
        table.add_row(name, nats, f"{cache[which]:,}", kept, f"{size[which]:,}")
    screen.print(table)


def show_bench(found: dict) -> None:
    """Times of a decode step, a row for each backend."""
    heads = f"{found['heads']}/{found['kv_heads']} heads of {found['head_dim']}"
    title = f"{found['context']} tokens, {heads}, {found['dtype']}"
    table = Table(
        "backend",
        "ms",
        "GB/s",
        "of reads",
        "sdpa full / this",
        f"ms at {found['budget']}",
        "of full",
        title=title,
    )
    for name, row in found["backends"].items():
        kept = (
            [f"{row['budget_ms']:.3f}", f"{row['budget_to_full']:.3f}"]
            if row["budget_ms"] is not None
            else ["-", "-"]
        )
        cells = (
            f"{row['ms']:.3f}",
            f"{row['gbs']:.1f}",
            f"{100 * row['share_of_read_bandwidth']:.0f}%",
            f"{row['ratio_to_sdpa_full']:.2f}",
        )
        table.add_row(name, *cells, *kept)
    screen.print(table)
    say(f"plain reads: {found['read_bandwidth_gbs']:.1f} GB/s with {found['environment']['threads']} threads")


def show_steps(found: dict) -> None:
    """Times of a model's decode step, a row for each setting, context and number of threads."""
    where = found["environment"]
    table = Table(
        "cache",
        "context",
        "threads",
        "ms per step",
        "over stock",
        "quartiles",
        "bytes",
        "operations",
        "value reads",
        title=f"{where['model']}, {where['dtype']}, {where['processor']}",
    )
    for row in found["rows"]:
        first, third = row["spread"]
        table.add_row(
            row["setting"],
            str(row["context"]),
            str(row["threads"]),
            f"{row['step_ms']:.2f}",
            f"{row['ratio_to_stock']:.2f}",
            f"{first:.2f} - {third:.2f}",
            f"{row['bytes_held']:,}",
            f"{row['operations']:,}",
            str(row["value_reads"]),
        )
    screen.print(table)
    say(f"medians of {where['rounds']} rounds; compare times within one run only")


DIVERSITY = {  # number of a layer: heading
    "qk_uncentred": "QK / H",
    "qk_centred": "QK centred / (H-1)",
    "vo_uncentred": "VO / H",
    "vo_centred": "VO centred / (H-1)",
    "js": "JS bits",
}


def show_diversity(found: dict) -> None:
    """A row for each layer. In brackets: the mean over models with random weights."""
    split = any(layer["residual"] for layer in found["layers"])
    more = ["shared/residual K, V", "cosine K, V"] if split else []
    table = Table(
        "layer", *DIVERSITY.values(), *more, title=f"{found['model']}: {found['heads']} heads, (at random)"
    )
    for layer in found["layers"]:
        numbers = {
            f"{kind}_{name}": value for kind in ("qk", "vo") for name, value in layer[kind].items()
        } | {"js": layer["js"]}
        random = {name: band and band["mean"] for name, band in (layer["init"] or {}).items()}
        cells = [_beside(numbers[name], random.get(name)) for name in DIVERSITY]
        table.add_row(str(layer["layer"]), *cells, *(_split(layer["residual"]) if split else []))
    table.add_section()
    mean = found["mean"]
    table.add_row("mean", *[_beside(mean[name], (mean["init"] or {}).get(name)) for name in DIVERSITY])
    screen.print(table)


def _split(residual: dict | None) -> list[str]:
    if residual is None:
        return ["-", "-"]
    sides = [residual["keys"], residual["values"]]
    return [
        ", ".join(_number(side[name], digits) for side in sides)
        for name, digits in (("shared_over_residual", 2), ("cosine", 3))
    ]


def _beside(value: float | None, random: float | None) -> str:
    return _number(value) + ("" if random is None else f" ({_number(random)})")


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def options_of(kind: Any, values: Mapping[str, Any], between: str = "\n") -> str:
    """Options of a class as text: for each its value and, in brackets, its default if that differs, and its
    range.
    """
    known, defaults = ranges(kind), defaults_of(kind)
    return between.join(
        f"{name}={_shown_word(value)}{_remarks(value, defaults.get(name, value), known.get(name, ''))}"
        for name, value in values.items()
    )


def _remarks(value: object, default: object, known: str) -> str:
    words = [f"default {_shown_word(default)}"] if value != default else []
    words += [known] if known else []
    return f" ({', '.join(words)})" if words else ""


def _shown_word(value: object) -> object:
    return shown(value) if isinstance(value, str) and not value.isprintable() else value
