"""The report shows what the results say, whatever they contain, and loads nothing from elsewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from report_pages import FULL, HALF, HOSTILE, PROFILE, Page, result

from lowkey.core.types import LowkeyError
from lowkey.report import load_results, render, write_report
from lowkey.report.plots import (
    error_surface_figure,
    quality_figure,
    quality_panels,
    ranks_figure,
    spectra_figure,
)
from lowkey.report.svg import inline_svg

POOR = HALF | {
    "name": "pca 25%",
    "method": "pca",
    "budget": "25%",
    "perplexity": 31.2,
    "kl": None,
    "bytes_per_token": 512,
    "bytes_held": 2**18,
}


@pytest.fixture(scope="module")
def text() -> str:
    return render([result(POOR, HALF | {"profile": PROFILE}, FULL)])


def test_table_rows_are_ordered_full_cache_first_then_by_bytes(text: str) -> None:
    page = Page(text)
    assert [line[0] for line in page.table] == ["Row", "full", "pca 25%", "stiefattention 50%"]
    expected = {
        "Perplexity": "12.31",
        "KL": "0.0312",
        "Top-1": "94.1%",
        "Kept": "50.0%",
        "Bytes/token": "1 KiB",
        "Bytes held": "512 KiB",
    }
    assert {title: page.cell(3, title) for title in expected} == expected


def test_a_null_is_a_dash_and_empty_columns_are_dropped(text: str) -> None:
    page = Page(text)
    assert page.cell(2, "KL") == "—"
    assert page.cell(1, "KL") == "0"
    assert not {"Step ms", "Exact match", "Perplexity, decode", "Bits", "Run"} & set(page.table[0])
    assert "Step ms" not in text


def test_every_column_is_explained_in_the_guide(text: str) -> None:
    explained = re.findall(r"<dt>(.*?)</dt>", text[text.index('id="guide"') :])
    assert explained == Page(text).table[0]


def test_the_summary_names_the_smallest_row_of_near_perplexity(text: str) -> None:
    lead = re.findall(r'<p class="lead">(.*?)</p>', text)
    assert lead == [
        "The smallest cache within 5% of the full perplexity is stiefattention 50%: "
        "it keeps 1 KiB of 2 KiB per token (50.0%) at perplexity 12.31 against 11.92 (+3.3%)."
    ]


def test_the_summary_prefers_the_smaller_of_two_near_rows() -> None:
    three_quarters = HALF | {"name": "stiefattention 75%", "perplexity": 12.0, "bytes_per_token": 1536}
    assert "perplexity is stiefattention 50%:" in render([result(FULL, three_quarters, HALF)])


def test_the_summary_says_when_no_row_is_near() -> None:
    assert "No row stays within 5% of the full perplexity; the closest is pca 25%" in render(
        [result(FULL, POOR)]
    )


@pytest.mark.parametrize(
    "rows",
    [
        [HALF],
        [FULL],
        [{"name": "x"}],
        [FULL, HALF | {"perplexity": None}],
        [FULL, HALF | {"perplexity": float("nan")}],
    ],
)
def test_it_renders_without_what_was_not_measured(rows: list[dict]) -> None:
    text = render([result(*rows)])
    assert "measured" in re.findall(r'<p class="lead">(.*?)</p>', text)[0]
    assert len(Page(text).table) == len(rows) + 1


def test_held_bytes_that_were_not_predicted_are_pointed_out(text: str) -> None:
    assert "Bytes held differ from bytes predicted in: pca 25%." in text
    assert "differ from bytes predicted" not in render([result(FULL, HALF)])


def test_hostile_names_stay_text_everywhere() -> None:
    row = HALF | {
        "name": HOSTILE,
        "method": HOSTILE,
        "layout": HOSTILE,
        "plan": HOSTILE,
        "budget": HOSTILE,
        "profile": PROFILE,
    }
    bad = result(FULL, row, model=HOSTILE)
    bad["environment"] = {HOSTILE: HOSTILE, "data": {"name": HOSTILE, "sha256": HOSTILE}}
    text = render([bad])
    page = Page(text)
    assert not page.of("script")
    assert HOSTILE in page.table[2]
    assert "</svg><script" not in text
    assert text.count("</title>") == 1
    assert text.count("</svg>") == len(page.of("svg")) == 4
    # In the plot, where ids and colours are rewritten, the name is left as it is (up to the label's length).
    assert "&lt;/title&gt;&lt;/svg&gt;" in re.search(r"<svg.*?</svg>", text, re.DOTALL)[0]  # type: ignore[index]


def test_nothing_is_fetched(text: str) -> None:
    page = Page(text)
    assert "://" not in text
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "base"}
    links = [
        value or ""
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href")
    ]
    assert links
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert "default-src 'none'" in text


def test_ids_are_unique_and_every_reference_has_its_target(text: str) -> None:
    ids = [attributes["id"] for _, attributes in Page(text).tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) <= set(ids)


def test_figures_and_table_are_announced(text: str) -> None:
    page = Page(text)
    labels = [attributes["aria-label"] or "" for attributes in page.of("svg") if attributes["role"] == "img"]
    assert len(labels) == 4
    assert "stiefattention 50%: Bytes/token 1 KiB, Perplexity 12.31" in labels[0]
    assert "Layer 5: keys 12, values 4." in labels[1]
    assert {attributes["scope"] for attributes in page.of("th")} == {"col", "row"}


def test_plots_follow_the_page_colours(text: str) -> None:
    svgs = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert all("var(--ink)" in svg for svg in svgs)
    used = {colour for svg in svgs for colour in re.findall(r"(?:fill|stroke): ?(#[0-9a-f]{6})", svg)}
    lines = {"#4a86e8", "#e0703c"}  # the spectra of the first and the last layer
    # the mark of the chosen pair lies on a heat map in either scheme
    assert used == {"#ffffff", "#000000"} | lines


def test_every_css_variable_is_defined_for_light_and_dark(text: str) -> None:
    for variable in set(re.findall(r"var\((--[a-z0-9-]+)\)", text)):
        assert len(re.findall(rf"{variable}: #", text)) == 2, variable


def test_the_same_results_give_the_same_page(text: str) -> None:
    assert render([result(POOR, HALF | {"profile": PROFILE}, FULL)]) == text


def test_runs_on_one_text_share_a_table_and_others_do_not() -> None:
    same = Page(render([result(FULL, HALF), result(FULL, POOR)]))
    assert len(same.of("table")) == 1
    assert [same.cell(i, "Run") for i in range(1, 5)] == ["1", "2", "2", "1"]
    other = render([result(FULL, HALF), result(FULL, POOR, model="large"), result(FULL, POOR, sha256="bb")])
    assert len(Page(other).of("table")) == 3
    assert "<title>KV cache report: tiny, large</title>" in other
    assert "<h3>Run 3: tiny</h3>" in other


def test_rows_of_several_runs_are_named_by_what_differs() -> None:
    marked = [
        HALF
        | {
            "name": "kq-svd 50%",
            "short": "kq-svd 50%",
            "marks": {"layout": layout, "group": group, "folder": folder},
        }
        for layout, group, folder in (
            ("pre_rope", "group=3", "a"),
            ("pre_rope", "", "a"),
            ("post_rope", "group=3", "b"),
        )
    ]
    page = Page(render([result(FULL, row) for row in (*marked, POOR)]))
    rows = {page.cell(i, "Row") for i in range(1, 9)}
    labels = {"kq-svd 50% pre_rope group=3", "kq-svd 50% pre_rope", "kq-svd 50% post_rope group=3", "pca 25%"}
    assert rows == labels | {f"full (run {n})" for n in range(1, 5)}


def test_a_mark_that_is_no_text_is_left_out() -> None:
    odd = HALF | {"short": 7, "marks": {"layout": [1], "group": "group=3"}}
    assert "stiefattention 50%" in render([result(FULL, odd), result(FULL, HALF | {"marks": "x"})])


def test_intervals_stand_behind_their_numbers() -> None:
    page = Page(render([result(FULL, HALF | {"perplexity_95": 0.71, "kl_95": 0.00412})]))
    assert (page.cell(2, "Perplexity"), page.cell(2, "KL")) == ("12.31 ± 0.71", "0.0312 ± 0.00412")
    assert page.cell(1, "Perplexity") == "11.92"


def test_environment_is_shown_with_nested_values(text: str) -> None:
    assert "<dt>cpu</dt><dd>EPYC</dd>" in text
    assert "<dt>data tokens</dt><dd>40960</dd>" in text


def test_the_surface_marks_the_chosen_pair_on_one_colour_scale(text: str) -> None:
    axes = error_surface_figure(PROFILE).axes[:2]
    marks = [ax.lines[0].get_xydata()[0].tolist() for ax in axes]
    assert marks == [[3, 1], [0, 1.5]]  # (values, keys) in steps of the candidate ranks
    assert [ax.get_title(loc="left") for ax in axes] == ["Layer 3", "Layer 5"]
    assert len({id(ax.images[0].norm) for ax in axes}) == 1
    np.testing.assert_allclose(axes[0].images[0].get_array(), PROFILE["surface"][0])
    assert len(re.findall(r'id="figure\d+-chosen-[01]"', text)) == 2


@pytest.mark.parametrize("change", [{"chosen": None}, {"chosen": [[None, 4], [None, None]]}])
def test_a_surface_without_a_choice_has_no_mark(change: dict) -> None:
    assert not any(ax.lines for ax in error_surface_figure(PROFILE | change).axes[:2])


def test_a_surface_with_zero_and_null_can_be_drawn() -> None:
    surface = np.array(PROFILE["surface"], dtype=object)
    surface[0, 3, 3], surface[1, 0, 0] = 0, None
    svg = inline_svg(error_surface_figure(PROFILE | {"surface": surface.tolist()}), "f", "heat")
    assert svg.count("<image") >= 2


def test_bars_are_the_chosen_ranks() -> None:
    keys, values = ranks_figure(PROFILE).axes[0].containers
    assert [bar.get_height() for bar in keys] == [8, 12]
    assert [bar.get_height() for bar in values] == [32, 4]


def test_spectra_are_shares_of_each_layers_energy() -> None:
    lines = spectra_figure(PROFILE).axes[0].lines
    np.testing.assert_allclose(lines[0].get_ydata(), [4 / 7, 2 / 7, 1 / 7])
    np.testing.assert_allclose(lines[1].get_ydata(), [8 / 9, 1 / 9, np.nan])


def test_quality_has_a_point_and_a_label_for_every_measured_row() -> None:
    rows = [FULL, HALF, POOR]
    first, second = quality_figure(rows).axes
    assert {text.get_text() for text in first.texts} == {"full", "stiefattention 50%", "pca 25%"}
    points = {tuple(point) for line in first.lines[1:] for point in line.get_xydata()}
    assert points == {(2048, 11.92), (1024, 12.314), (512, 31.2)}
    assert set(first.lines[0].get_ydata()) == {11.92}  # the reference line
    assert {text.get_text() for text in second.texts} == {"full", "stiefattention 50%"}


def test_a_name_is_never_read_as_a_formula_and_may_lack_glyphs() -> None:
    svg = inline_svg(quality_figure([FULL, HALF | {"name": "$x_{$ 模型"}]), "f", "quality")
    assert "$x_{$ 模型" in svg


def test_kl_takes_a_panel_only_where_it_was_measured() -> None:
    assert [panel[0] for panel in quality_panels([FULL, HALF])] == ["perplexity", "kl"]
    assert [panel[0] for panel in quality_panels([FULL, POOR])] == ["perplexity"]


def test_a_lossless_row_stays_on_the_plot() -> None:
    lossless = HALF | {"name": "copy", "method": "copy", "kl": 0.0}
    kl = quality_figure([FULL, lossless, HALF, POOR | {"kl": 0.9}]).axes[1]
    assert kl.get_yscale() == "linear"
    assert "copy" in {text.get_text() for text in kl.texts}


def test_labels_do_not_cover_one_another() -> None:
    rows = [
        FULL,
        *(
            HALF | {"name": f"method {i} 50%", "method": str(i), "perplexity": 12.3 + i / 500}
            for i in range(5)
        ),
    ]
    figure = quality_figure(rows)
    FigureCanvasAgg(figure).draw()
    # An annotation's own extent includes its leader line; only the texts must stay apart.
    boxes = [Text.get_window_extent(text) for text in figure.axes[0].texts]
    assert all(not a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_files_and_folders_load_and_the_page_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "b.json").write_text(json.dumps(result(FULL, HALF, model="b")))
    (folder / "a.json").write_text(json.dumps(result(FULL, HALF, model="a")))
    single = tmp_path / "c.json"
    single.write_text(json.dumps(result(FULL, POOR, model="c")))
    assert [r["model"] for r in load_results([single, folder])] == ["c", "a", "b"]
    out = write_report([single, folder], tmp_path / "new" / "r.html")
    page = render(load_results([single, folder]))
    assert (
        out.read_text(encoding="utf-8").startswith(page)
        and out.read_text(encoding="utf-8").count("\n") == page.count("\n") + 1
    )


BROKEN = {
    "not json": "{",
    "a list": "[]",
    "another format": json.dumps(result(FULL) | {"format": 2}),
    "no rows": json.dumps(result()),
    "no environment": json.dumps(result(FULL) | {"environment": None}),
    "no model": json.dumps(result(FULL) | {"model": 3}),
    "row without a name": json.dumps(result({"perplexity": 1.0})),
    "text for a number": json.dumps(result(FULL, HALF | {"perplexity": "12"})),
    "true for a number": json.dumps(result(FULL, HALF | {"kl": True})),
    "an absurd number": json.dumps(result(FULL, HALF | {"bytes_held": 10**400})),
    "ragged surface": json.dumps(
        result(HALF | {"profile": PROFILE | {"surface": [[[1.0], [2.0, 3.0]]] * 2}})
    ),
    "surface of text": json.dumps(result(HALF | {"profile": PROFILE | {"surface": [[["1"] * 4] * 4] * 2}})),
    "chosen for too few layers": json.dumps(result(HALF | {"profile": PROFILE | {"chosen": [[8, 8]]}})),
    "ranks out of order": json.dumps(result(HALF | {"profile": PROFILE | {"ranks": [8, 4, 16, 32]}})),
    "layers of text": json.dumps(result(HALF | {"profile": PROFILE | {"layers": ["$x", "y"]}})),
    "spectra for too few layers": json.dumps(
        result(HALF | {"profile": PROFILE | {"spectra": {"keys": [[1.0]], "values": []}}})
    ),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_a_file_that_is_no_result_is_named_in_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "broken.json").write_text(content)
    with pytest.raises(LowkeyError, match=r"broken\.json") as caught:
        load_results([tmp_path])
    assert "\n" not in str(caught.value)


def test_a_refused_file_names_the_field_and_the_rule(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(BROKEN["text for a number"])
    with pytest.raises(
        LowkeyError,
        match=r"rows\[1\] perplexity must be a number or null; give a file that lowkey eval wrote",
    ):
        load_results([path])


def test_a_broken_file_writes_no_page(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(LowkeyError):
        write_report([tmp_path], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_nothing_to_report_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LowkeyError, match="does not exist"):
        load_results([tmp_path / "missing.json"])
    with pytest.raises(LowkeyError, match=r"holds no \.json file"):
        load_results([tmp_path])
    with pytest.raises(LowkeyError, match="at least one result"):
        render([])
