"""Eviction policies in the report: curves over what they hold, maps of their heads, their parameters."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from report_pages import ENVIRONMENT, FULL, HALF, HOSTILE, PROFILE, Page, result

from lowkey.core.types import LowkeyError
from lowkey.policies import policy_to_dict
from lowkey.policies.allocators import HeadKV
from lowkey.policies.snapkv import SnapKV
from lowkey.report import load_results, render
from lowkey.report.curves import _line_styles, curve_qualities, curves_figure
from lowkey.report.drawing import INK
from lowkey.report.heads import heads_figure
from lowkey.report.policies import (
    allocator_words,
    by_budget,
    heads_words,
    kept_heads,
    policy_lines,
    references,
    score_words,
    share,
    without_budget,
)
from lowkey.report.svg import inline_svg

TOKENS = 512
WHOLE = FULL | {"exact_match": 1.0, "label": "full"}
INT4 = HALF | {
    "name": "int4",
    "label": "int4",
    "method": None,
    "budget": None,
    "bits": 4,
    "exact_match": 0.9,
    "bytes_held": 2**18,
}
SNAP = policy_to_dict(SnapKV("6%"))


def evicted(
    percent: float, name: str = "snapkv", heads: list | None = None, on: str = "", **changed: object
) -> dict:
    """A row as `lowkey eval` writes it; `on` is the plan that the policy stands on."""
    held = FULL["bytes_full"] * percent / 100
    known = {
        "name": f"{name} {percent}%" + (f" on {on}" if on else ""),
        "policy": SNAP | {"budget": f"{percent}%"},
        "budget": f"{percent}%",
        "plan": on or None,
        "exact_match": percent / 100,
        "perplexity": 20 - percent / 10,
        "kl": 1 / percent,
        "bytes_held": held,
        "bytes_predicted": held,
        "bytes_per_token": held / TOKENS,
        "kept_per_head": [[8, 24], [16, 16], [30, 2]] if heads is None else heads,
    }
    row = FULL | known | changed
    return row | {"label": row["name"]}


def panels(rows: list[dict]) -> dict[str, object]:
    return {ax.get_title(loc="left").split(",")[0].split("\n")[0]: ax for ax in curves_figure(rows).axes}


@pytest.fixture(scope="module")
def text() -> str:
    rows = [evicted(b, n) for b in (3, 12) for n in ("snapkv", "ada-kv")]
    return render([result(FULL | {"exact_match": 1.0}, INT4, *rows)])


@pytest.mark.parametrize(
    ("name", "budget", "label"),
    [
        ("snapkv 6%", "6%", "snapkv"),
        ("snapkv 6% (2)", "6%", "snapkv (2)"),
        ("snapkv 50% on pca 50%", "50%", "snapkv on pca 50%"),
        ("snapkv 64 tokens", "64 tokens", "snapkv"),
        ("snapkv 16%", "6%", "snapkv 16%"),
        ("snapkv 6%", None, "snapkv 6%"),
        ("snapkv 6%x", "6%", "snapkv 6%x"),
        (" 6%", "6%", " 6%"),
        ("mine", ["6%"], "mine"),
    ],
)
def test_a_line_is_named_after_its_policy_without_the_budget(name: str, budget: object, label: str) -> None:
    assert without_budget({"name": name, "budget": budget}) == label


def test_a_policy_is_one_line_over_the_shares_that_it_holds() -> None:
    rows = [WHOLE, evicted(12), evicted(12, "ada-kv"), evicted(3), evicted(6), evicted(3, "ada-kv")]
    assert [(line.label, [share(row) for row in line.rows]) for line in policy_lines(rows)] == [
        ("ada-kv", [0.03, 0.12]),
        ("snapkv", [0.03, 0.06, 0.12]),
    ]
    exact = panels(rows)["Recall"]
    # the first is the dashed line of the full cache
    drawn = [line.get_xydata().tolist() for line in exact.lines[1:]]
    assert drawn == [[[0.03, 0.03], [0.12, 0.12]], [[0.03, 0.03], [0.06, 0.06], [0.12, 0.12]], [[1.0, 1.0]]]
    assert set(exact.lines[0].get_ydata()) == {1.0}
    assert [text.get_text() for text in exact.figure.legends[0].get_texts()] == ["ada-kv", "snapkv"]


def test_wide_shares_have_a_log_scale_common_to_all_panels() -> None:
    wide, narrow = [WHOLE, evicted(3), evicted(50)], [WHOLE, evicted(20), evicted(50)]
    assert {ax.get_xscale() for ax in curves_figure(wide).axes} == {"log"}
    assert {ax.get_xscale() for ax in curves_figure(narrow).axes} == {"linear"}
    assert len({ax.get_xlim() for ax in curves_figure(wide).axes}) == 1


def test_each_measured_quality_has_a_panel_and_no_other() -> None:
    rows = [evicted(3), evicted(6)]
    assert list(panels(rows)) == ["Recall", "Perplexity", "KL divergence (nats)"]
    assert list(panels([row | {"perplexity": None, "kl": math.nan} for row in rows])) == ["Recall"]
    assert curve_qualities([WHOLE, INT4, *(row | {"bytes_full": None} for row in rows)]) == []


def test_references_of_policies_are_labelled_points() -> None:
    plan = HALF | {"name": "pca 50%", "label": "pca 50%", "plan": "plans/p", "exact_match": 0.97}
    other = plan | {"name": "pca 75%", "label": "pca 75%", "plan": "plans/q"}
    rows = [WHOLE, INT4, plan, other, evicted(3), evicted(6, plan="plans/p")]
    assert [row["name"] for row in references(rows)] == ["full", "int4", "pca 50%"]
    exact = panels(rows)["Recall"]
    assert {text.get_text() for text in exact.texts} == {"full", "int4", "pca 50%"}
    assert {tuple(line.get_xydata()[0]) for line in exact.lines[-3:]} == {
        (1.0, 1.0),
        (0.25, 0.9),
        (0.5, 0.97),
    }


def test_what_several_runs_measured_alike_is_drawn_once() -> None:
    again, other = INT4 | {"label": "int4 (run 2)"}, INT4 | {"label": "int4 (run 3)", "exact_match": 0.7}
    exact = panels([WHOLE, INT4, again, other, evicted(3), evicted(6)])["Recall"]
    assert {text.get_text() for text in exact.texts} == {"full", "int4", "int4 (run 3)"}


def test_a_divergence_of_zero_is_left_out_of_log_scales_only() -> None:
    far, near = [WHOLE, evicted(3), evicted(12)], [WHOLE, evicted(11), evicted(12)]
    for rows, scale, labels in ((far, "log", set()), (near, "linear", {"full"})):
        ax = panels(rows)["KL divergence (nats)"]
        assert (ax.get_yscale(), {text.get_text() for text in ax.texts}) == (scale, labels)


def test_recall_is_always_drawn_from_nothing_to_all() -> None:
    for rows in ([WHOLE, evicted(3), evicted(6)], [WHOLE, evicted(3)]):
        ax = panels(rows)["Recall"]
        low, high = ax.get_ylim() if len(rows) == 3 else ax.get_xlim()
        assert low < 0 < 1 < high < 1.1


def test_policies_of_one_budget_are_dots_with_the_best_on_top() -> None:
    rows = [
        WHOLE,
        INT4,
        evicted(6, exact_match=0.5),
        evicted(6, "ada-kv", exact_match=0.8),
        evicted(6, "h2o", exact_match=None),
    ]
    first, *others = (axes := curves_figure(rows).axes)
    names = [text.get_text() for text in first.texts]
    assert names == [
        "ada-kv 6% (6.0% held)",
        "snapkv 6% (6.0% held)",
        "h2o 6% (6.0% held)",
        "full (100.0% held)",
        "int4 (25.0% held)",
    ]
    assert [tuple(line.get_xydata()[0]) for line in first.lines[1:]] == [
        (0.8, 0),
        (0.5, 1),
        (1.0, 3),
        (0.9, 4),
    ]
    assert set(first.lines[0].get_xdata()) == {1.0}
    assert len(axes) == 3
    assert not any(ax.texts for ax in others)


def test_thirty_six_policies_have_different_markers() -> None:
    looks = [(look["color"], look["marker"]) for look in _line_styles(36)]
    assert len(set(looks)) == 36
    assert all(
        a[0] != b[0] and a[1] != b[1]
        for place in range(0, 36, 6)
        for a, b in pairwise(looks[place : place + 6])
    )


def test_the_quality_figure_leaves_policies_out() -> None:
    rows = [WHOLE, INT4, evicted(3), evicted(6)]
    alone = render([result(*rows)])
    assert "Quality against cache bytes per token" not in alone
    both = re.findall(
        r'<svg role="img" aria-label="(Quality against cache bytes per token\. .*?)"',
        render([result(*rows, HALF)]),
    )
    assert len(both) == 1
    assert "stiefattention 50%" in both[0]
    assert "snapkv" not in both[0]


def test_maps_of_one_budget_share_a_colour_scale() -> None:
    rows = [evicted(6), evicted(6, "ada-kv", [[1, 60], [2, 3], [4, 5]]), evicted(12, heads=[[7, 90]])]
    groups = by_budget(rows)
    assert {budget: [without_budget(row) for row in group] for budget, group in groups.items()} == {
        "6%": ["ada-kv", "snapkv"],
        "12%": ["snapkv"],
    }
    ada, snap = (ax.images[0] for ax in heads_figure(groups["6%"]).axes[:2])
    assert ada.norm is snap.norm
    assert (ada.norm.vmin, ada.norm.vmax) == (0, 60)
    # heads upwards, layers to the right
    np.testing.assert_array_equal(ada.get_array(), [[1, 2, 4], [60, 3, 5]])
    assert heads_figure(groups["12%"]).axes[0].images[0].norm.vmax == 90


def test_every_map_says_its_mean_and_max() -> None:
    (ax, *_) = heads_figure([evicted(6)]).axes
    assert [text.get_text() for text in ax.texts] == ["snapkv", "mean 16, max 30 of 512 tokens"]
    assert heads_words(evicted(6, bytes_per_token=None)) == "mean 16, max 30 tokens"
    # more than the bytes say that there were
    assert heads_words(evicted(6, heads=[[600]])) == "mean 600, max 600 tokens"
    assert heads_words(evicted(6, heads=[])) == "not counted"


@pytest.mark.parametrize(
    "heads", [[[1, 2], [3]], [[1], [], [2, 3]], [[None, 2], [math.nan, math.inf]], [[0, 0]], [[1e99]], [[-1]]]
)
def test_ragged_layers_and_missing_counts_are_blank(heads: list) -> None:
    row = evicted(6, heads=heads)
    found = kept_heads(row)
    assert found is not None
    assert found.shape == (len(heads), max(map(len, heads)))
    finite = [count for layer in heads for count in layer if count is not None and math.isfinite(count)]
    assert found[~np.isnan(found)].tolist() == finite
    assert "Tokens kept per head at 6%" in render([result(FULL, row)])


@pytest.mark.parametrize(
    "heads",
    [None, [], [[]], [[], []], [[None]], [[math.nan], [math.inf]], "text", 5, {}, [5], [[1], "x"], [[[1]]]],
)
def test_without_counts_there_is_no_map(heads: object) -> None:
    row = evicted(6) | {"kept_per_head": heads}
    assert kept_heads(row) is None
    assert "Tokens kept per head" not in render([result(FULL, row)])


def test_rows_without_counts_or_policy_have_no_map() -> None:
    bare = {key: value for key, value in evicted(6).items() if key != "kept_per_head"}
    assert by_budget([bare, HALF | {"kept_per_head": [[1]]}]) == {}


def test_maps_are_folded_by_budget_and_only_the_first_is_open(text: str) -> None:
    details = [attributes for tag, attributes in Page(text).tags if tag == "details"]
    assert [("open" in attributes) for attributes in details] == [True, False]
    assert re.findall(r"<summary>(.*?)</summary>", text) == [
        "Tokens kept per head at 3%",
        "Tokens kept per head at 12%",
    ]
    spoken = [attributes["aria-label"] or "" for attributes in Page(text).of("svg")]
    assert spoken[1] == (
        "Tokens kept per head at 3%. ada-kv: mean 16, max 30 of 512 tokens. snapkv: mean 16, max 30 of 512 "
        "tokens."
    )
    assert "snapkv 3%: Kept 3.0%, Perplexity 19.70, KL 0.333, Exact match 3.0%" in spoken[0]


def test_many_rows_stay_in_few_figures() -> None:
    rows = [evicted(b, f"policy-{i}") for i in range(20) for b in (3, 6)]
    text = render([result(FULL, *rows)])
    assert len(Page(text).of("svg")) == 3  # curves, and the maps of two budgets
    assert len(text) < 1_500_000


def test_the_table_tells_parameters_and_allocator() -> None:
    row = evicted(
        6,
        policy=policy_to_dict(
            SnapKV("6%", allocator=HeadKV("copy", importance=((0.123456,) * 8,) * 4), window=16)
        ),
    )
    page = Page(render([result(FULL, row)]))
    assert (
        page.cell(2, "Policy")
        == "snapkv (sinks=4, recent=8, every=0, head_pooling=mean, protect_prompt=False, rest=drop, "
        "window=16, kernel=7, pooling=max, aggregation=mean)"
    )
    assert page.cell(2, "Allocator") == "headkv (kind=copy, beta=1.2, floor=0.0, importance=[4 lists])"
    assert (page.cell(1, "Policy"), page.cell(1, "Allocator")) == ("—", "—")


@pytest.mark.parametrize(
    ("policy", "score", "allocator"),
    [
        (None, None, None),
        ("mine", "mine", None),
        ({}, "None", None),
        ({"name": "a", "parameters": {}, "allocator": "ada"}, "a", "ada"),
        ({"name": "a", "parameters": [1, 2], "allocator": {"name": "b"}}, "a ([1, 2])", "b"),
        (
            {"name": "a", "parameters": {"prompt": "\n\nSay  it.\n", "x": None, "y": ""}},
            "a (prompt=Say it., x=None, y='')",
            None,
        ),
        ({"name": "n" * 99, "parameters": {"p": list(range(40))}}, "n" * 59 + "… (p=[40 values])", None),
    ],
)
def test_unusual_policies_are_described(policy: object, score: str | None, allocator: str | None) -> None:
    row = evicted(6) | {"policy": policy}
    assert (score_words(row), allocator_words(row)) == (score, allocator)


def test_the_environment_says_what_refeed_means() -> None:
    for value, said in ((True, "again over what a policy kept"), (False, "once, in the prompt")):
        data = ENVIRONMENT["data"] | {"refeed": value}  # type: ignore[operator]
        shown = re.findall(
            r"<dt>data refeed</dt><dd>(.*?)</dd>",
            render([result(FULL) | {"environment": ENVIRONMENT | {"data": data}}]),
        )
        assert len(shown) == 1
        assert shown[0].startswith(f"{value}: ")
        assert said in shown[0]
    for value in (1, "<b>", None, [True]):
        data = ENVIRONMENT["data"] | {"refeed": value}  # type: ignore[operator]
        assert "recall asks" not in render([result(FULL) | {"environment": ENVIRONMENT | {"data": data}}])
    assert "refeed" not in render([result(FULL)])


def test_the_summary_tells_the_recall_that_perplexity_hides() -> None:
    poor = evicted(3, perplexity=12.0, exact_match=0.05)
    lead = re.findall(r'<p class="lead">(.*?)</p>', render([result(FULL | {"exact_match": 1.0}, poor)]))
    assert lead[0].endswith("at perplexity 12.00 against 11.92 (+0.7%) and recall 5.0% against 100.0%.")


@pytest.mark.parametrize(
    ("matches", "said"),
    [
        (
            (0.96, 1.0),
            "The smallest cache within 5 points of the full recall is snapkv 3%: it keeps 61.44 B of 2 KiB "
            "per token (3.0%) at",
        ),
        ((0.5, 0.96), "The smallest cache within 5 points of the full recall is snapkv 6%:"),
        ((0.5, 0.5), "No row stays within 5 points of the full recall; the closest is snapkv 3%:"),
        ((None, None), "3 rows measured; no compressed row has both its recall and its bytes."),
    ],
)
def test_without_a_perplexity_the_summary_goes_by_recall(matches: tuple, said: str) -> None:
    rows = [evicted(b, exact_match=m, perplexity=None) for b, m in zip((3, 6), matches, strict=True)]
    full = FULL | {"perplexity": None, "exact_match": 1.0}
    assert re.findall(r'<p class="lead">(.*?)</p>', render([result(full, *rows)]))[0].startswith(said)


def test_ids_are_unique_colours_defined_and_nothing_is_fetched(text: str) -> None:
    ids = [attributes["id"] for _, attributes in Page(text).tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) <= set(ids)
    assert "://" not in text
    svgs = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert not {colour for svg in svgs for colour in re.findall(r"(?:fill|stroke): ?(#[0-9a-f]{6})", svg)} - {
        "#ffffff"
    }
    assert all(INK not in svg for svg in svgs)


@pytest.mark.parametrize("budgets", [(6,), (3, 6)])
def test_hostile_policies_stay_text_everywhere(budgets: tuple) -> None:
    policy = {
        "name": HOSTILE,
        "parameters": {HOSTILE: HOSTILE},
        "allocator": {"name": HOSTILE, "parameters": {HOSTILE: [HOSTILE]}},
    }
    rows = [evicted(b, HOSTILE, policy=policy, profile=PROFILE) for b in budgets]
    text = render([result(FULL, *(row | {"budget": f"{HOSTILE}{row['budget']}"} for row in rows))])
    page = Page(text)
    assert not page.of("script")
    assert "</svg><script" not in text
    assert text.count("</svg>") == len(page.of("svg"))
    assert page.cell(2, "Policy") == f"{HOSTILE} ({HOSTILE}={HOSTILE})"
    assert "&lt;/title&gt;&lt;/svg&gt;" in re.search(r"<svg.*?</svg>", text, re.DOTALL)[0]  # type: ignore[index]


@pytest.mark.parametrize("name", ["$x_{$", "_hidden", "模型", "\\frac{", "%", "a" * 500, "", "line\nbreak"])
def test_a_name_is_written_as_it_is_and_never_read_as_a_formula(name: str) -> None:
    rows = [WHOLE, evicted(3, name), evicted(6, name), evicted(6, "other")]
    for figure in (curves_figure(rows), curves_figure([WHOLE, rows[1]]), heads_figure(rows[1:])):
        assert name.strip().split("\n")[0][:20] in inline_svg(figure, "f", "x")


ODD = [None, math.nan, math.inf, 0, -1, 1e99, 1e-310, 5e-324]


@pytest.mark.parametrize(
    "key", ["perplexity", "kl", "exact_match", "bytes_held", "bytes_full", "bytes_per_token", "bits"]
)
def test_odd_numbers_do_not_break_the_page(key: str) -> None:
    # their heat maps, slow to draw, have nothing odd in them
    even = [evicted(percent, heads=[]) for percent in (3, 6)]
    for value in ODD:
        render([result(FULL, *even, evicted(12) | {key: value})])
        render([result(FULL | {key: value}, INT4 | {key: value}, evicted(6) | {key: value})])


def test_shares_outside_every_scale_are_left_out_of_curves() -> None:
    odd = [
        evicted(3) | {"bytes_held": 1e99, "bytes_full": 1e-99},
        evicted(6) | {"bytes_held": 1e-99, "bytes_full": 1e99},
    ]
    assert [share(row) for row in odd] == [None, None]
    assert len(Page(render([result(FULL, *odd, evicted(3), evicted(6))])).table) == 6


def test_the_full_cache_is_never_a_policy() -> None:
    assert policy_lines([WHOLE | {"policy": SNAP}]) == []


@pytest.mark.parametrize("key", ["budget", "policy", "plan", "method"])
def test_odd_identities_do_not_break_the_page(key: str) -> None:
    for value in (None, "", [], {}, 3, True, [HOSTILE], {"a": {"b": None}}):
        assert len(Page(render([result(FULL, evicted(3), evicted(6) | {key: value})])).table) == 4


BAD_HEADS = {
    "text": "x",
    "a number": 5,
    "a flat list": [1, 2],
    "words": [["1"]],
    "truth": [[True]],
    "deep": [[[1]]],
    "huge": [[0] * 999] * 999,
}


@pytest.mark.parametrize("heads", BAD_HEADS.values(), ids=BAD_HEADS.keys())
def test_a_file_with_counts_that_are_none_is_refused(tmp_path: Path, heads: object) -> None:
    (tmp_path / "r.json").write_text(json.dumps(result(FULL, evicted(6) | {"kept_per_head": heads})))
    with pytest.raises(
        LowkeyError, match=r"rows\[1\] kept_per_head must be null or a list of lists of numbers"
    ):
        load_results([tmp_path])


def test_ragged_counts_nulls_and_half_a_surrogate_pair_are_read(tmp_path: Path) -> None:
    rows = [evicted(6, heads=[[1], [2, None, math.nan], []]), evicted(12, "half \ud800 pair")]
    (tmp_path / "r.json").write_text(json.dumps(result(FULL, *rows)))
    text = render(load_results([tmp_path]))
    assert "mean 1.5, max 2 of 512 tokens" in text
    assert "half ? pair 12%" in text
    assert text.encode()
