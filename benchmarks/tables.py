"""Tables of the documentation, made from the result files in docs/results.

    python benchmarks/tables.py          # fill every table again
    python benchmarks/tables.py --check  # exit status 1 if a table is not what its result file gives

A page holds a pair of markers, and what stands between them is replaced:

    <!-- table: smollm2/bits -->
    <!-- /table -->

The name is a key of TABLES, or `FOLDER/PART` for any file that `benchmarks/evidence.py` writes, like
`smollm2/ranks`. Every page under docs/ and README.md may hold tables. A number that is in no result file
stands in a table without markers, and its page says so.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import chain_heads
import decode
import equal_bytes
import evidence
import head_budgets
import packed_rows
import pretraining_report
import recovery
import side_by_side
import typer

from lowkey.core.intervals import Z

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
MARKED = re.compile(r"(<!-- table: (?P<name>\S+) -->\n).*?(<!-- /table -->)", re.DOTALL)
EVIDENCE = "smollm2/"
HEADLINE = {  # label of a row: the file it is in, and what README calls it
    "full": ("bits", "full cache"),
    "int8": ("bits", "INT8"),
    "default 50%": ("default", "`compress --budget 50%`"),
    "kivi4": ("bits", "KIVI, 4 bits"),
    "int4": ("bits", "INT4"),
    "default 25%": ("default", "`compress --budget 25%`"),
    "kivi2": ("bits", "KIVI, 2 bits"),
    "default 12.5%": ("default", "`compress --budget 12.5%`"),
}
MODELS = {"smollm2": "SmolLM2-135M", "tiny": "`tiny`", "stories260K": "`stories260K`"}  # folder: shown as
COMPARED_DEFAULTS = {  # label of a row: the file it is in, and what the page calls it
    "int8": ("bits", "INT8"),
    "default 50%": ("default", "default, 50 %"),
    "kivi4": ("bits", "KIVI, 4 bits"),
    "int4": ("bits", "INT4"),
    "default 25%": ("default", "default, 25 %"),
    "kivi2": ("bits", "KIVI, 2 bits"),
    "default 18.75%": ("default", "default, 18.75 %"),
    "default 12.5%": ("default", "default, 12.5 %"),
    "default 8%": ("default", "default, 8 %"),
}
WINDOWED = (  # rows of tiny-window.json that the page shows: label, budget
    ("int8", None),
    ("lorc (whitened)", "50%"),
    ("kq-svd (joint, pre-RoPE)", "50%"),
    ("palu", "50%"),
    ("pca (pre-RoPE)", "50%"),
    ("pca", "50%"),
    ("int4", None),
    ("kq-svd (joint, pre-RoPE)", "25%"),
    ("lorc (whitened)", "25%"),
    ("palu", "25%"),
    ("pca", "25%"),
    ("kivi2", None),
    ("hadamard2", None),
    ("int2", None),
)


def rows_of(name: str, key: str = "rows") -> list[dict]:
    found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found if isinstance(found, list) else found[key]


def table(head: list[str], lines: list[list[Any]]) -> list[str]:
    """A Markdown table."""
    return ["| " + " | ".join(map(str, cells)) + " |" for cells in (head, ["---"] * len(head), *lines)]


def kept(row: dict) -> float:
    """Bytes held, in per cent of the full cache's."""
    return 100 * row["bytes_held"] / row["bytes_full"]


def evidence_table(name: str) -> list[str]:
    return evidence.table(rows_of(name)).split("\n")


def headline_table() -> list[str]:
    """The rows of README: bytes, perplexity and KL in the mean over draws."""
    lines = []
    for label, (part, shown) in HEADLINE.items():
        group = [row for row in rows_of(f"{EVIDENCE}{part}") if row["label"] == label]
        share, perplexity, kl = (
            statistics.mean(of(row) for row in group)
            for of in (kept, lambda row: row["perplexity"], lambda row: row["kl"])
        )
        lines.append([shown, f"{share:.3g} %", f"{perplexity:.2f}", f"{kl:.4f}"])
    return table(["cache", "bytes", "perplexity", "KL, nats per token"], lines)


def labelled(model: str, part: str, label: str) -> list[dict]:
    """All draws of one row of a model's evidence; none where the budget was refused."""
    return [row for row in rows_of(f"{model}/{part}") if row["label"] == label]


def kl_and_bytes(group: list[dict]) -> list[str]:
    """KL in the mean over draws, and the bytes that were held; dashes for a row that was not measured."""
    if not group:
        return ["-", "-"]
    kl, share = statistics.mean(row["kl"] for row in group), statistics.mean(map(kept, group))
    return [f"{kl:.4f}" if kl >= 1e-4 else f"{kl:.5f}", f"{share:.1f} %"]


def default_table() -> list[str]:
    """The default and plain integers on three models: KL, and the bytes held."""
    lines = [
        [shown, *(cell for model in MODELS for cell in kl_and_bytes(labelled(model, part, label)))]
        for label, (part, shown) in COMPARED_DEFAULTS.items()
    ]
    return table(["cache", *(cell for name in MODELS.values() for cell in (name, "bytes"))], lines)


def split_table() -> list[str]:
    """`fisher-svd` in the model's own numbers on three models: ranks by `spectrum`, and even ones."""
    lines = []
    for model, shown in MODELS.items():
        for budget in evidence.BUDGETS:
            pair = [labelled(model, "ranks", f"fisher-svd{split} {budget}") for split in ("", ", uniform")]
            if any(pair):
                lines.append([shown, budget, *(cell for group in pair for cell in kl_and_bytes(group))])
    return table(["model", "budget", "KL, `spectrum`", "bytes", "KL, `uniform`", "bytes"], lines)


def questions_table() -> list[str]:
    """Policies on the real model, best first: the share of questions that are still answered."""
    lines = []
    for row in sorted(rows_of(f"{EVIDENCE}policies"), key=lambda row: -row["questions"]):
        right, of = row["questions_right"], row["questions_of"]
        interval = "" if row["name"] == "full" else "{:.2f} to {:.2f}".format(*wilson(right, of))
        lines.append([row["name"].split()[0], f"{kept(row):.1f} %", f"{right} of {of}", interval])
    return table(["policy", "bytes", "questions", "95 % interval"], lines)


def wilson(right: int, of: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share: `right` of `of`."""
    share, weight = right / of, Z**2 / of
    middle, half = share + weight / 2, Z * math.sqrt(share * (1 - share) / of + weight / (4 * of))
    return (middle - half) / (1 + weight), (middle + half) / (1 + weight)


def behaviour_table() -> list[str]:
    """Shares of instructions that are followed on the real model, by kind and beside the full cache."""
    rows = rows_of(f"{EVIDENCE}behaviour")
    kinds = list(rows[0]["behaviour_kinds"])
    lines = [
        [
            row["name"],
            f"{100 * row['behaviour_kept']:.1f} %",
            *(f"{row['behaviour_kinds'][kind]:.2f}" for kind in kinds),
            f"{row['behaviour']:.2f}",
            f"{row['behaviour_same']:.2f}",
        ]
        for row in rows
    ]
    return table(["cache", "bytes", *(f"`{kind}`" for kind in kinds), "all", "as full"], lines)


def planner_table(name: str) -> list[str]:
    """For each budget and draw: the full cache, the planner's choice, and the best choice on one axis."""
    lines, rows = [], rows_of(name)
    for keep, draw in sorted(
        {(row["keep"], row["draw"]) for row in rows}, key=lambda x: (-float(x[0][:-1]), x[1])
    ):
        own = [row for row in rows if (row["keep"], row["draw"]) == (keep, draw)]
        (chosen,) = [row for row in own if row.get("chosen")]
        single = min((row for row in own if len(row["axes"]) == 1), key=lambda row: row["kl"])
        for row, shown in ((chosen, "the choice"), (single, "one axis")):
            lines.append([keep, draw, shown, *_on_each_axis(row), *_kl_and_recall(row)])
    return table(["budget", "draw", "", "rank", "bits", "tokens", "bytes", "KL", "recall"], lines)


def steps_table(machine: str) -> list[str]:
    """Time of a decode step over transformers' own in the same run, by contexts and threads."""
    rows = rows_of(f"bench/{machine}", "models")["smollm2"]["rows"]
    places = sorted({(row["context"], row["threads"]) for row in rows})
    lines = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        own = {(row["context"], row["threads"]): row for row in rows if row["setting"] == setting}
        quotients = [f"{own[place]['ratio_to_stock']:.2f}" for place in places]
        reads = max(row["value_reads"] for row in own.values())
        lines.append([setting, *quotients, f"{own[places[0]]['operations']:,}", reads])
    heads = [f"{n:,} tokens, {t} thread{'s' * (t > 1)}" for n, t in places]
    return table(["cache", *heads, "operations", "value reads"], lines)


def prefill_table() -> list[str]:
    """Time of a prompt over transformers' own in the same run, by contexts and dtypes."""
    rows = rows_of("prefill")
    places = sorted({(row["context"], row["dtype"]) for row in rows})
    lines = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        own = {(row["context"], row["dtype"]): row for row in rows if row["setting"] == setting}
        lines.append([setting, *(quotient(own[place]) if place in own else "-" for place in places)])
    return table(["cache", *(f"{n:,} tokens, {dtype}" for n, dtype in places)], lines)


def quotient(row: dict) -> str:
    """A time over transformers' own, with the least and the most of the rounds where they were kept."""
    spread = f" ({row['least']:.2f} to {row['most']:.2f})" if "least" in row else ""
    return f"{row['ratio_to_stock']:.2f}{spread}"


def prefill_memory_table() -> list[str]:
    """How far a process grew while it read a prompt chunk by chunk."""
    head = ["cache", "held, MiB", "peak, MiB", "peak of the first chunk, MiB", "full cache, MiB"]
    figures = ("held_mib", "peak_mib", "one_chunk_mib", "full_mib")
    return table(
        head, [[row["setting"], *(f"{row[x]:.0f}" for x in figures)] for row in rows_of("prefill-memory")]
    )


def small_model_table() -> list[str]:
    """Policies of a small model's attention beside those of the model's own; bytes in three columns."""
    head = ["budget", "tokens chosen by", "recall", "nats of the answer", "KL", "rows, MB", "small cache, MB"]
    lines = []
    for row in rows_of("small-model"):
        figures = [f"{row[x]:.2f} ± {row[f'{x}_95']:.2f}" for x in ("right", "nats", "kl")]
        sizes = [f"{row[x] / 1e6:.2f}" for x in ("large", "small_cache")]
        weights = f"{row['small_weights'] / 1e6:.0f}" if row["small_weights"] else "0"
        lines.append([row["budget"], row["row"], *figures, *sizes, weights])
    return table([*head, "small weights, MB"], lines)


def mixed_bits_table() -> list[str]:
    """ZipVL's two widths beside other choices of tokens at the same share, and at the same bytes."""
    lines = []
    for row in rows_of(f"{EVIDENCE}mixed-bits"):
        over, (least, most) = row["over"], row["over_95"] or (None, None)
        against = "-" if over is None else f"{over:+.4f} ({least:+.4f} to {most:+.4f})"
        kept = "all" if row["kept"] is None else f"{100 * row['kept']:.0f} %"
        kl = f"{row['kl']:.4f} ± {row['kl_95']:.4f}"
        lines.append([row["row"], f"{100 * row['bytes']:.1f} %", kept, kl, against])
    return table(["cache", "bytes", "tokens kept", "KL", "KL over the first row of its group"], lines)


def controls_table(protocol: str, budget: str) -> list[str]:
    """Policies at one budget beside the controls and the rows without a budget, the best recall first."""
    head = ["cache", "bytes", "recall", "recall over `random`", "nats of the answer", "KL"]
    rows = [row for row in rows_of(f"{EVIDENCE}controls") if row["protocol"] == protocol]
    lines = []
    for row in sorted(rows, key=lambda row: (-row["right"], row["nats"])):
        if row["budget"] not in (None, budget):
            continue
        over, (least, most) = row["right_over_random"], row["right_over_random_95"] or (None, None)
        against = "-" if over is None else f"{over:+.2f} ({least:+.2f} to {most:+.2f})"
        figures = [f"{row[x]:.2f} ± {row[f'{x}_95']:.2f}" for x in ("right", "nats", "kl")]
        lines.append([row["row"], f"{100 * row['bytes']:.1f} %", figures[0], against, *figures[1:]])
    return table(head, lines)


def gate_recall_table(model: str) -> list[str]:
    """Fast KVzip, its gates trained on texts with facts and without, beside its teacher and controls."""
    rows = [row for row in rows_of(f"{model}/gates-facts") if row["row"] != "full"]
    named = [(f"{row['row']}, facts" if row["row"] == "fast-kvzip" else row["row"], row) for row in rows]
    others = [row for row in rows_of(f"{model}/gates-novel") if row["row"] == "fast-kvzip"]
    named += [("fast-kvzip, the novel alone", row) for row in others]
    lines = [
        [row["budget"], name, f"{100 * row['bytes']:.1f} %", f"{row['right']:.3f}", f"{row['nats']:.2f}"]
        for name, row in sorted(named, key=lambda pair: (-float(pair[1]["budget"][:-1]), -pair[1]["right"]))
    ]
    return table(["kept", "policy", "bytes", "recall", "nats of the answer"], lines)


def gate_ranks_table(model: str) -> list[str]:
    """How well each score orders tokens as KVzip does, and how much of an asked value it keeps."""
    rows = rows_of(f"{model}/gates")
    values = {row["of"]: f"{100 * row['kept']:.0f} %" for row in rows if row["part"] == "kept"}
    lines = [["kvzip", "1", "1", values["kvzip"]]]
    lines += [
        [row["of"], f"{row['per_head']:.2f}", f"{row['all_heads']:.2f}", values.get(row["of"], "")]
        for row in rows
        if row["part"] == "rank"
    ]
    return table(["score", "rank within a head", "rank over all heads", "of a value, kept at 30 %"], lines)


def decoding_table() -> list[str]:
    """Policies while a text is written, by budget, the least divergence first."""
    head = [
        "policy",
        "tokens kept",
        "KL",
        "KL over `random`",
        "KL, last quarter",
        "tokens as with the full cache",
    ]
    lines = []
    for row in sorted(rows_of(f"{EVIDENCE}decoding"), key=lambda row: (-row["budget"], row["kl"])):
        over, (least, most) = row.get("kl_over_random"), row.get("kl_over_random_95", (None, None))
        against = "-" if over is None else f"{over:+.3f} ({least:+.3f} to {most:+.3f})"
        figures = [
            "{:.3f} ({:.3f} to {:.3f})".format(row[x], *row[f"{x}_95"]) for x in ("kl", "kl_last_quarter")
        ]
        cells = [
            f"{row['agreed']:.0f}",
            f"{row['length']:.0f}",
            f"{row['over']:.2f}",
            f"{row['repeated']:.2f}",
        ]
        kept = str(row["budget"] or "all")
        lines.append([row["policy"], kept, figures[0], against, figures[1], *cells])
    return table([*head, "length", "did not end", "repeated"], lines)


def frontier_table(name: str, keep: str) -> list[str]:
    """All rows of the first draw at one budget, the best KL first."""
    rows = [row for row in rows_of(name) if (row["keep"], row["draw"]) == (keep, 0)]
    lines = [
        [" x ".join(row["axes"]) or "full cache", *_on_each_axis(row), *_kl_and_recall(row)]
        for row in sorted(rows, key=lambda row: row["kl"])
    ]
    return table(["smaller in", "rank", "bits", "tokens", "bytes", "KL", "recall"], lines)


def _on_each_axis(row: dict) -> list[str]:
    shares = [f"{100 * row.get(axis, 1.0):.0f} %" for axis in ("rank", "tokens")]
    bits = row.get("bits", "none")
    return [shares[0], "-" if bits == "none" else bits, shares[1], f"{kept(row):.2f} %"]


def _kl_and_recall(row: dict) -> list[str]:
    recall = "-" if row["recall"] is None else f"{round(row['recall'] * row['cases'])} of {row['cases']}"
    return [f"{row['kl']:.4f} ± {row['kl_95']:.4f}", recall]


def equal_bytes_table(name: str) -> list[str]:
    return equal_bytes.table(rows_of(name)).split("\n")


def window_table() -> list[str]:
    """Rows with the last 48 tokens exact beside the same without them, in the mean over draws."""
    with_window, without = rows_of("tiny-window"), rows_of("tiny")
    lines = []
    for label, budget in WINDOWED:
        # settings without a plan carry the window in their label
        own = [r for r in with_window if r["label"].removesuffix(" + 48 recent") == label]
        (row,) = [r for r in own if r["budget"] == budget and (budget is None or r["bits"] is None)]
        others = [
            r
            for r in without
            if (r["label"], r["budget"]) == (label, budget) and (budget is None or r["bits"] is None)
        ]
        others = [] if label.startswith("kivi") else others  # these have a window of their own there

        def mean(column: str, others: list[dict] = others) -> str:
            return f"{statistics.mean(r[column] for r in others):.2f}" if others else "-"

        shown = [f"{row['perplexity']:.2f}", mean("perplexity"), f"{row['kl']:.4f}"]
        shown += [f"{row['exact_match']:.2f}", mean("exact_match")]
        lines.append([f"{kept(row):.1f} %", f"{label} {budget or ''}".strip(), *shown])
    head = ["kept", "setting", "perplexity", "without the window", "KL", "recall", "without the window"]
    return table(head, lines)


def policies_table() -> list[str]:
    """Every policy at 6 % and 25 %; a row that was measured again stands for the older one."""
    rows = {row["name"]: row for row in (*rows_of("tiny-policies"), *rows_of("tiny-policies-again"))}
    names = [name.removesuffix(" 6%") for name in rows if name.endswith(" 6%")]
    pairs = {name: (rows[f"{name} 6%"], rows[f"{name} 25%"]) for name in names}

    def recalled(name: str) -> float:
        return sum(row["exact_match"] for row in pairs[name])

    lines = []
    for name in sorted(pairs, key=lambda name: (-recalled(name), name)):
        cells = [
            _number(row[column], digits)
            for column, digits in (("exact_match", 2), ("kl", 3), ("perplexity_decode", 2))
            for row in pairs[name]
        ]
        lines.append([name, *cells, ", ".join(f"{kept(row):.1f}" for row in pairs[name])])
    for name in ("full", "int8", "int4"):
        row = rows[name]
        values = (row["exact_match"], row["kl"], row["perplexity_decode"])
        cells = [x for v, digits in zip(values, (2, 3, 2), strict=True) for x in (_number(v, digits), "")]
        lines.append([f"*{name}*", *cells, f"{kept(row):.1f}"])
    head = ["policy", "recall 6 %", "25 %", "KL 6 %", "25 %", "perplexity after 6 %", "25 %"]
    return table([*head, "kept, % of bytes"], lines)


def heads_table(name: str) -> list[str]:
    return head_budgets.table(rows_of(name, "answers")).split("\n")


def chain_heads_table(budget: str) -> list[str]:
    return chain_heads.table(rows_of("chain-heads"), budget).split("\n")


def decode_table() -> list[str]:
    measured = [(run, name, row) for run in rows_of("decode") for name, row in run["backends"].items()]
    return table(list(decode.COLUMNS), [decode.cells(*one) for one in measured])


def recovery_table() -> list[str]:
    return recovery.table(rows_of("recovery")).split("\n")


def packed_rows_table() -> list[str]:
    """Attention over stored rows, from memory and from the processor's cache."""
    return table(list(packed_rows.COLUMNS), [packed_rows.cells(row) for row in rows_of("packed-rows")])


def pretraining_table(make: Callable[[list[dict], str], list[str]], stage: str, tokens: int) -> list[str]:
    """A table of the comparison; the result file keeps thinned curves, so that columns which need every loss
    are left out.
    """
    rows = [row for row in rows_of("pretraining") if row["tokens"] == tokens]
    for row in rows:
        row["result"]["losses"] = row["result"]["curve"]
    return [_without(line, "steps to MHA's loss") for line in _columns(make(rows, stage))]


def _columns(lines: list[str]) -> Iterator[dict[str, str]]:
    """The lines of a table as cells by column."""
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return (dict(zip(split[0], cells, strict=True)) for cells in split)


def _without(cells: dict[str, str], column: str) -> str:
    return "| " + " | ".join(text for name, text in cells.items() if name != column) + " |"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


SWEEP, COMPARED = pretraining_report.sweep_table, pretraining_report.comparison_table
CONVERTED = pretraining_report.recovery_table


def scale_table(shape: str) -> list[str]:
    """Settings of one large shape, by arithmetic."""
    found = rows_of("scale", "shapes")[shape]
    head = ["setting", "GiB a sequence", "of full", "sequences that fit", "floor of a step with one, ms"]
    head += ["floor with as many as fit, ms", "tokens per second at that"]
    return table(head, [scale_cells(row) for row in found["rows"]])


def scale_kinds_table() -> list[str]:
    """Attention kinds of lowkey in the shape of Llama-3.1-8B, by arithmetic."""
    head = ["attention", "parameters, 10^9", "GiB a sequence", "of mha", "sequences that fit"]
    head += ["floor of a step with one, ms", "floor with as many as fit, ms", "tokens per second at that"]
    lines = [
        [cells[0], f"{row['parameters'] / 1e9:.2f}", *cells[1:]]
        for row in rows_of("scale", "kinds")
        for cells in [scale_cells(row)]
    ]
    return table(head, lines)


def scale_cells(row: dict) -> list[str]:
    """A row of `benchmarks/scale.py`."""
    cells = [
        f"`{row['setting']}`",
        f"{row['sequence_bytes'] / 2**30:.2f}",
        f"{100 * row['share_of_first']:.1f} %",
    ]
    cells += [f"{row['sequences_that_fit']:,}", f"{row['step_ms']:.2f}"]
    if not row["sequences_that_fit"]:
        return [*cells, "-", "-"]
    return [*cells, f"{row['full_step_ms']:.1f}", f"{row['full_tokens_per_second']:,.0f}"]


def chunks_table(name: str) -> list[str]:
    """Rows of `benchmarks/chunk_gate.py`: means over seeds, and their spread."""
    rows, lines = rows_of(name), []
    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    actions = [kind for kind in ("turn", "stop", "report", "straight") if "actions" in rows[0]]
    for budget in budgets:
        of_budget = [row for row in rows if row["budget"] == budget]
        lines_of_budget = []
        for label in dict.fromkeys(row["setting"] for row in of_budget):
            own = [row for row in of_budget if row["setting"] == label]
            means = [statistics.mean(row["kl"]) for row in own]
            cells = [f"{statistics.mean(means):.4f}", _spread(means)]
            if actions:
                cells += [_share([row["actions"][kind] for row in own]) for kind in actions]
            else:
                cells.append(_share([[sum(row["right"]), len(row["right"])] for row in own]))
            kept_rows = statistics.mean(row["kept"] for row in own)
            lines_of_budget.append((statistics.mean(means), [budget, label, f"{kept_rows:.1f}", *cells]))
        lines += [cells for _, cells in sorted(lines_of_budget)]
    head = ["budget", "setting", "rows held", "KL", "between seeds"]
    return table([*head, *(actions or ["recall"])], lines)


def _spread(means: list[float]) -> str:
    """The smallest and the largest of several means."""
    return f"{min(means):.4f} to {max(means):.4f}" if len(means) > 1 else "-"


def _share(counts: list[list[int]]) -> str:
    """The share of what is right, over all seeds."""
    right, of = (sum(x) for x in zip(*counts, strict=True))
    return f"{right / of:.2f}" if of else "-"


SERVED_CACHES = {"full": "full", "half": "50 %", "eighth": "12.5 %", "default-eighth": "default, 12.5 %"}


def serving_table(name: str) -> list[str]:
    """Rows of serving/vllm/benchmarks/throughput.py; in brackets the share of the full cache's figure."""
    lines = []
    for row in rows_of(name):
        speed = []
        for key, digits in (("tokens_per_s", 1), ("step_tokens_per_s", 0), ("first_token_s", 2)):
            share = "" if row["cache"] == "full" else f" ({row['of_full'][key]:.2f})"
            speed.append(f"{row[key]:,.{digits}f}{share}")
        quality = [_number(row["quality"].get(key), digits) for key, digits in (("kl", 3), ("recall", 2))]
        known = [SERVED_CACHES[row["cache"]], row["requests"], f"{row['users']:,}", row["at_once"]]
        lines.append([*known, *speed, *quality])
    head = [
        "cache",
        "requests",
        "users that fit",
        "at once",
        "tokens/s",
        "tokens/s of a step",
        "first token, s",
    ]
    return table([*head, "KL, nats", "recall"], lines)


TABLES: dict[str, Callable[[], list[str]]] = {
    "serving": partial(serving_table, "serving"),
    "serving-tight": partial(serving_table, "serving-tight"),
    "headline": headline_table,
    "default-three-models": default_table,
    "splits-three-models": split_table,
    "smollm2-policies": questions_table,
    "smollm2-behaviour": behaviour_table,
    "smollm2-controls-25": partial(controls_table, "after", "25%"),
    "smollm2-controls-10": partial(controls_table, "after", "10%"),
    "smollm2-controls-with-10": partial(controls_table, "with", "10%"),
    "smollm2-small-model": small_model_table,
    "smollm2-mixed-bits": mixed_bits_table,
    "smollm2-decoding": decoding_table,
    "smollm2-plan": partial(planner_table, "smollm2/plan"),
    "smollm2-plan-frontier": partial(frontier_table, "smollm2/plan", "12.5%"),
    "smollm2-steps": partial(steps_table, "amd-epyc-2-cores"),
    "smollm2-prefill": prefill_table,
    "prefill-memory": prefill_memory_table,
    "tiny-plan": partial(planner_table, "tiny/plan"),
    "tiny": partial(equal_bytes_table, "tiny"),
    "stories260K": partial(equal_bytes_table, "stories260K"),
    "tiny-window": window_table,
    "recovery": recovery_table,
    "tiny-policies": policies_table,
    "tiny-heads": partial(heads_table, "tiny-heads"),
    "tiny-heads-norefeed": partial(heads_table, "tiny-heads-norefeed"),
    "chain-heads-40": partial(chain_heads_table, "40%"),
    "chain-heads-25": partial(chain_heads_table, "25%"),
    "decode": decode_table,
    "packed-rows": packed_rows_table,
    "gates-recall-tiny": partial(gate_recall_table, "tiny"),
    "gates-ranks-tiny": partial(gate_ranks_table, "tiny"),
    "gates-ranks-smollm2": partial(gate_ranks_table, "smollm2"),
    "scale-Llama-3.1-8B": partial(scale_table, "Llama-3.1-8B"),
    "scale-Qwen3-32B": partial(scale_table, "Qwen3-32B"),
    "scale-DeepSeek-V3": partial(scale_table, "DeepSeek-V3"),
    "scale-kinds": scale_kinds_table,
    "chunks-tiny": partial(chunks_table, "chunks-tiny"),
    "chunks-smollm2": partial(chunks_table, "chunks-smollm2"),
    "chunks-patrol": partial(chunks_table, "chunks-patrol"),
    "kvpress-agreement": side_by_side.agreement_table,
    "kvpress-costs": side_by_side.cost_table,
    "pretraining-rates": partial(pretraining_table, SWEEP, "za", 2_048_000),
    "pretraining-1000-steps": partial(pretraining_table, COMPARED, "zb", 2_048_000),
    "pretraining-2000-steps": partial(pretraining_table, COMPARED, "zb", 4_096_000),
    "pretraining-converted": partial(pretraining_table, CONVERTED, "zd", 200_000),
}


def made(name: str) -> str:
    """The table of this name. Raises KeyError for a name that is not known."""
    known = TABLES.get(name)
    if known is None and "/" in name:
        known = partial(evidence_table, name)
    return "\n".join((known or TABLES[name])()) + "\n"


def filled(page: str) -> str:
    """A page with every table as its result file gives it."""
    return MARKED.sub(lambda found: found[1] + made(found["name"]) + found[3], page)


def pages() -> list[Path]:
    """The pages that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main(
    check: Annotated[bool, typer.Option(help="write nothing; fail if a table is stale")] = False,
) -> None:
    """Fill the tables of README.md and of every page under docs/."""
    stale = []
    for path in pages():
        page = path.read_text(encoding="utf-8")
        if (new := filled(page)) != page:
            stale.append(str(path.relative_to(ROOT)))
            if not check:
                path.write_text(new, encoding="utf-8")
    print("\n".join(stale) or "every table is up to date")
    raise typer.Exit(1 if check and stale else 0)


if __name__ == "__main__":
    typer.run(main)
