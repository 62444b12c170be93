"""What `lowkey plan` compared, in a report."""

from __future__ import annotations

import pytest
from report_pages import ENVIRONMENT, FULL

from lowkey.report.frontier import frontier_figure, frontier_summary, is_candidate
from lowkey.report.page import render
from lowkey.report.results import RESULTS_FORMAT

DECODED = FULL | {"perplexity": None, "kl": None, "kl_decode": 0.0, "exact_match": 1.0}


def candidate(name: str, axes: list, kl: float, recall: float | None, size: float) -> dict:
    return DECODED | {
        "name": name,
        "axes": axes,
        "kl_decode": kl,
        "exact_match": recall,
        "bytes_planned": size,
        "bytes_per_token": size,
    }


ROWS = [
    DECODED,
    candidate("1: int2", ["bits"], 0.4, 0.5, 250.0),
    candidate("2: snapkv 12%", ["tokens"], 0.2, 1.0, 240.0),
    candidate("3: fisher-svd kivi4", ["rank", "bits"], 0.05, None, 256.0),
]


def test_single_axes_stand_beside_combinations():
    figure = frontier_figure(ROWS)
    points = [line for line in figure.axes[0].lines if line.get_marker() not in ("", "None")]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in points] == [
        (250.0, 0.4),
        (240.0, 0.2),
        (256.0, 0.05),
    ]
    hollow = [line.get_markerfacecolor() != line.get_markeredgecolor() for line in points]
    assert hollow == [True, True, False]
    assert len(figure.axes[1].lines) == 2, "recall was measured of two of them"


def test_the_summary_names_the_best_of_each_kind():
    said = frontier_summary(ROWS)
    assert said.index("3: fisher-svd kivi4 (rank + bits, 256 B per token), loses 0.05 nats") < said.index(
        "2: snapkv 12% (tokens, 240 B per token), loses 0.2 nats and recalls 100.0%"
    )
    assert frontier_summary(ROWS[:3]) is None


def test_the_page_has_the_figure_and_columns():
    page = render([{"format": RESULTS_FORMAT, "model": "m", "environment": ENVIRONMENT, "rows": ROWS}])
    assert "What lowkey plan compared" in page and "Planned bytes/token" in page and "KL, decode" in page


@pytest.mark.parametrize("axes", [None, "bits", [1], [], {"a": 1}], ids=str)
def test_rows_with_garbled_axes_are_no_candidates(axes):
    assert not is_candidate(ROWS[1] | {"axes": axes})
    assert "1: int2" in render(
        [{"format": 1, "model": "m", "environment": ENVIRONMENT, "rows": [DECODED, ROWS[1] | {"axes": axes}]}]
    )
