"""The comparison of settings: who is better on the same samples, and what the page says about it."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from report_pages import ENVIRONMENT, FULL, HALF, HOSTILE, Page

from lowkey.core.intervals import bootstrap_means, paired_bootstrap, percentiles
from lowkey.core.types import LowkeyError
from lowkey.report import load_results, render_comparison, write_comparison
from lowkey.report.measures import duels, format_points, frontier, measures
from lowkey.report.scatter import comparison_figure

RNG = random.Random(0)
TOKENS = [10, 20, 10, 20, 10, 20]
BASE = [RNG.uniform(20, 60) for _ in TOKENS]


def row(name: str, worse: float, held: int, right: list[int], **more: object) -> dict:
    """A row whose loss on every window is `worse` above that of the full cache, in nats per token."""
    nll = [x + worse * n for x, n in zip(BASE, TOKENS, strict=True)]
    sums = {"nll": nll, "kl": [worse * n for n in TOKENS], "agree": [5] * 6, "tokens": TOKENS}
    own = {"name": name, "perplexity": 12.0 + worse, "perplexity_95": 0.5, "kl": worse, "per_window": sums}
    recall = {"exact_match": sum(right) / len(right), "recall_kept": held / 1000, "recall_evidence": True}
    return FULL | own | recall | {"per_case": right, "bytes_held": held, "bytes_full": 1000} | more


WHOLE = row("full", 0.0, 1000, [1] * 8)
NEAR = row("snapkv 50%", 0.01, 500, [1, 1, 1, 1, 1, 1, 1, 0], policy={"name": "snapkv"}, budget="50%")
FAR = row("snapkv 10%", 0.5, 100, [1, 0, 0, 0, 0, 0, 0, 0], policy={"name": "snapkv"}, budget="10%")
BAD = row("random 50%", 0.6, 510, [0] * 8, policy={"name": "random"}, budget="50%")


def result(*rows: dict, model: str = "tiny", **data: object) -> dict:
    about = {"name": "alice", "sha256": "aa", "context": 512, **data}
    return {"format": 1, "model": model, "environment": {**ENVIRONMENT, "data": about}, "rows": list(rows)}


def labelled(*rows: dict) -> list[dict]:
    return [{**r, "label": r["name"], "run": 1} for r in rows]


def tables(text: str) -> list[list[list[str]]]:
    """Every table of the page as lines of cells."""
    return [Page(part).table for part in re.findall(r"<table>.*?</table>", text, re.DOTALL)]


@pytest.fixture(scope="module")
def text() -> str:
    return render_comparison([result(WHOLE, FAR), result(WHOLE, NEAR, BAD)], ["../a%20b.json", "b.json"])


# -- who is better


def test_intervals_of_pairs_are_those_of_the_paired_bootstrap():
    values = np.array([[RNG.gauss(0, 1) for _ in range(3)] for _ in range(40)])
    means = bootstrap_means(values)
    for i, j in ((0, 1), (1, 2), (2, 0)):
        mean, *ends = paired_bootstrap(values[:, i].tolist(), values[:, j].tolist())
        assert percentiles((means[:, i] - means[:, j]).tolist()) == pytest.approx(ends, abs=1e-12)
        assert (values[:, i] - values[:, j]).mean() == pytest.approx(mean)


def test_wins_and_losses_are_counted_by_hand():
    *_, recall = measures(labelled(WHOLE, NEAR, FAR, BAD))
    assert recall.title == "Recall, share of right answers" and recall.full == "full"
    found = duels(recall)
    near, far = found["snapkv 50%", "full"], found["snapkv 10%", "full"]
    assert (near.wins, near.losses, near.mean, near.verdict) == (0, 1, -1 / 8, 0)
    assert (far.wins, far.losses, far.mean, far.verdict) == (0, 7, -7 / 8, -1)
    assert far.low < far.mean < far.high < 0
    assert found["full", "snapkv 10%"] == far._replace(
        mean=7 / 8, low=-far.high, high=-far.low, wins=7, losses=0, verdict=1
    )
    assert found["random 50%", "snapkv 10%"].verdict == 0  # one case of eight tells nothing


def test_a_smaller_loss_is_better():
    perplexity, kl, _ = measures(labelled(WHOLE, NEAR, FAR))
    assert duels(perplexity)["snapkv 50%", "snapkv 10%"].verdict == 1
    duel = duels(kl)["snapkv 10%", "full"]
    assert (duel.wins, duel.losses, duel.verdict) == (0, 6, -1)
    assert duel.mean == pytest.approx(0.5) and duel.low == pytest.approx(0.5)


def test_rows_of_other_samples_are_not_paired():
    other = NEAR | {"per_case": [1, 0], "name": "other"}
    found = duels(measures(labelled(WHOLE, other, FAR))[-1])
    assert ("full", "snapkv 10%") in found and not any("other" in pair for pair in found)


def test_missing_outcomes_are_not_made_up():
    gap = FAR | {"per_window": {**FAR["per_window"], "nll": [None, *FAR["per_window"]["nll"][1:]]}}
    perplexity, kl, _ = measures(labelled(WHOLE, NEAR, gap))
    assert perplexity.scores["snapkv 10%"].samples is None and kl.scores["snapkv 10%"].samples is not None


def test_the_frontier_has_what_nothing_else_beats():
    perplexity, _, recall = measures(labelled(WHOLE, NEAR, FAR, BAD))
    assert frontier(perplexity) == frontier(recall) == ["snapkv 10%", "snapkv 50%", "full"]
    same = NEAR | {"name": "larger", "recall_kept": 0.6}
    assert frontier(measures(labelled(WHOLE, NEAR, same))[-1]) == ["snapkv 50%", "full"]


def test_tasks_of_a_harness_are_compared_document_by_document():
    def of(name: str, values: list[float], held: float, better: bool) -> dict:
        score = {
            "value": sum(values) / len(values),
            "half_95": 0.1,
            "values": values,
            "higher_is_better": better,
        }
        return (
            FULL
            | {"name": name, "perplexity": None, "kl": None}
            | {"harness": {"gsm8k": {"metrics": {"acc": score}, "kept_bytes": held}}}
        )

    rows = labelled(of("full", [1.0, 1, 1, 0], 400.0, True), of("snapkv 25%", [0.0, 1, 0, 0], 100.0, True))
    (found,) = measures(rows)
    assert (found.title, found.higher, found.write(0.25)) == ("gsm8k, acc", True, "25.0%")
    assert found.scores["snapkv 25%"].kept == 0.25 and found.scores["snapkv 25%"].half == 0.1
    assert duels(found)["snapkv 25%", "full"].losses == 2
    lower = labelled(of("full", [1.0, 3, 1, 2], 400.0, False), of("snapkv 25%", [0.0, 1, 0, 0], 100.0, False))
    assert duels(measures(lower)[0])["snapkv 25%", "full"].verdict == 1
    assert "gsm8k, acc" in render_comparison([result(*rows, tasks=["gsm8k"])], ["r.json"])


def test_other_documents_under_one_name_are_another_task():
    def of(name: str, documents: str, value: float) -> dict:
        task = {"metrics": {"acc": {"value": value, "values": [value] * 3}}, "documents_sha256": documents}
        return FULL | {"name": name, "perplexity": None, "kl": None, "harness": {"facts": task}}

    rows = labelled(
        of("full", "a", 1.0), of("snapkv 25%", "a", 0.5), of("again", "b", 0.0), of("lost", "b", 0.5)
    )
    first, second = measures(rows)
    assert (first.title, list(first.scores)) == ("facts (documents 1 of 2), acc", ["full", "snapkv 25%"])
    assert (second.title, list(second.scores)) == ("facts (documents 2 of 2), acc", ["again", "lost"])
    assert [m.title for m in measures(rows[:2])] == ["facts, acc"]


@pytest.mark.parametrize(
    "value, told", [(0.0, "0"), (-0.0, "0"), (-1e-5, "0"), (-0.031, "\N{MINUS SIGN}3.1"), (0.5, "+50.0")]
)
def test_a_difference_of_shares_is_told_in_points(value, told):
    assert format_points(value) == told


# -- the page


def test_every_setting_has_a_line_with_its_difference(text):
    scores, pairs, *_ = tables(text)
    assert scores[0][:6] == ["Setting", "Kept", "Score", "±", "Against full, nats", "95 % interval"]
    assert [line[0] for line in scores[1:]] == ["full ★", "snapkv 10% ★", "snapkv 50% ★", "random 50%"]
    near = scores[3]
    assert near[1:5] == ["50.0%", "12.01", "0.50", "▼ +0.01"] and near[6:9] == ["0", "6", "6"]
    assert scores[1][4] == "—"
    assert pairs[0] == ["Setting", "full", "snapkv 10%", "snapkv 50%", "random 50%"]
    assert pairs[2][1:] == ["▼ 0:6", "—", "▼ 0:6", "▲ 6:0"]


def test_each_measure_names_the_smallest_cache_that_is_not_worse(text):
    assert "On these 6 samples every other setting is worse than the full cache." in text
    assert "not measurably worse than the full one on these 8 samples: snapkv 50%, with 50.0% of the" in text


def test_files_are_linked_and_what_they_share_is_shown_once(text):
    links = {tag["href"] for tag in Page(text).of("a")}
    assert links == {"../a%20b.json", "b.json"}
    assert [line[0] for line in tables(text)[0]].count("full ★") == 1
    assert 'role="note"' not in text


def test_rows_that_differ_between_files_stay_apart():
    again = row("snapkv 10%", 0.4, 100, [1, 1, 0, 0, 0, 0, 0, 0])
    page = render_comparison([result(WHOLE, FAR), result(WHOLE, again)], ["a.json", "b.json"])
    names = [line[0].removesuffix(" ★") for line in tables(page)[0][1:]]
    assert names == ["full", "snapkv 10% (run 1)", "snapkv 10% (run 2)"]


@pytest.mark.parametrize(
    "change, told",
    [
        ({"context": 1024}, "tiny on alice (context 512); tiny on alice (context 1024)"),
        ({"model": "large"}, "tiny on alice; large on alice"),
        ({"name": "bob", "sha256": "bb"}, "tiny on alice; tiny on bob"),
    ],
)
def test_what_was_measured_otherwise_has_a_section_of_its_own(change, told):
    page = render_comparison([result(WHOLE, FAR), result(WHOLE, NEAR, **change)], ["a.json", "b.json"])
    assert f"numbers are compared within a section only: {told}." in page
    assert [len(table) for table in tables(page)] == [3] * 12


def test_harness_files_of_other_tasks_share_a_section():
    one, two = (result(WHOLE, FAR, tasks=[t], sha256=t) for t in ("gsm8k", "mmlu"))
    assert 'role="note"' not in render_comparison([one, two], ["a.json", "b.json"])


def test_nothing_to_compare_is_an_error():
    with pytest.raises(LowkeyError, match="no two settings that were measured on the same"):
        render_comparison([result(WHOLE), result(WHOLE, model="large")], ["a.json", "b.json"])
    with pytest.raises(LowkeyError, match="at least one"):
        render_comparison([], [])


def test_the_only_script_is_the_one_that_the_page_allows(text):
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'\"" in text and "default-src 'none'" in text
    assert "http" not in text.replace("http-equiv", "")


def test_names_from_files_are_escaped():
    bad = FAR | {"name": HOSTILE}
    page = render_comparison([result(WHOLE, bad, name=HOSTILE, model=HOSTILE)], ["a.json"])
    assert page.count("<script") == 1 and HOSTILE.replace('"$x_{$"', "") not in page
    assert any(HOSTILE in line[0] for line in tables(page)[0])


def test_cells_are_sorted_by_exact_numbers(text):
    kept = [tag.get("data-value") for tag in Page(text).of("td")][:4]
    assert kept == ["1.0", "12.0", "0.5", ""]


def test_the_figure_has_every_setting_and_the_frontier():
    rows = labelled(WHOLE, NEAR, FAR, BAD)
    perplexity, kl, recall = comparison_figure(rows, measures(rows)).axes
    assert {t.get_text() for t in recall.texts} == {"full", "snapkv 50%", "snapkv 10%", "random 50%"}
    line = next(line for line in recall.lines if line.get_linewidth() == 6)
    assert line.get_xydata().tolist() == [[0.1, 1 / 8], [0.5, 7 / 8], [1.0, 1.0]]
    assert kl.get_yscale() == "log" and perplexity.get_yscale() == "linear"
    colours = {
        p.get_color() for p in recall.lines if p.get_xydata().tolist() in ([[0.1, 1 / 8]], [[0.5, 7 / 8]])
    }
    assert len(colours) == 1  # they differ in their budget only


def test_the_page_is_written_with_links_that_lead_to_the_files(tmp_path: Path):
    folder = tmp_path / "my results"
    folder.mkdir()
    for name, own in (("a", FAR), ("b", NEAR)):
        (folder / f"{name}.json").write_text(json.dumps(result(WHOLE, own)))
    out = write_comparison([folder], tmp_path / "pages" / "c.html")
    links = {tag["href"] for tag in Page(out.read_text(encoding="utf-8")).of("a")}
    assert links == {"../my%20results/a.json", "../my%20results/b.json"}


BROKEN = {
    "per_window of two lengths": ({"per_window": {"nll": [1.0], "kl": [1.0, 2.0]}}, "per_window must be"),
    "per_window is a list": ({"per_window": [1.0]}, "per_window must be"),
    "text per case": ({"per_case": ["yes"]}, "per_case must be null or a list"),
    "harness without metrics": ({"harness": {"gsm8k": {}}}, "harness must be"),
    "true for a score": ({"harness": {"gsm8k": {"metrics": {"acc": {"value": True}}}}}, "harness must be"),
    "harness of text": ({"harness": {"gsm8k": {"metrics": {"acc": {"value": "1"}}}}}, "harness must be"),
}


@pytest.mark.parametrize("change, told", BROKEN.values(), ids=BROKEN.keys())
def test_outcomes_that_are_no_numbers_are_refused(tmp_path: Path, change: dict, told: str):
    (tmp_path / "r.json").write_text(json.dumps(result(WHOLE, HALF | change)))
    with pytest.raises(LowkeyError, match=rf"rows\[1\] {told}"):
        load_results([tmp_path])
