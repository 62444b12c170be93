"""Tables and the picture of the documentation are what their result files give."""

from __future__ import annotations

import json
import re

import pytest
from pages import ROOT, name_of, written

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import tables

    return tables


@pytest.mark.parametrize("page", [p for p in written() if "<!-- table:" in p.read_text()], ids=name_of)
def test_tables_are_up_to_date(tables, page):
    text = page.read_text(encoding="utf-8")
    assert tables.filled(text) == text, "run python benchmarks/tables.py"


def test_every_table_is_on_a_page(tables):
    shown = set(re.findall(r"<!-- table: (\S+) -->", "\n".join(p.read_text() for p in written())))
    assert set(tables.TABLES) <= shown


def test_the_shapes_at_128k_are_what_lowkey_cost_says(tables):
    import scale

    assert json.loads(scale.OUT.read_text(encoding="utf-8")) == scale.counted(), "run benchmarks/scale.py"


# in billions, as model cards have them; DeepSeek-V3's is without the layer that predicts a second token
@pytest.mark.parametrize(
    ("shape", "total"), [("Llama-3.1-8B", 8.03), ("Qwen3-32B", 32.8), ("DeepSeek-V3", 671)]
)
def test_large_shapes_have_the_published_parameters(tables, shape, total):
    row = tables.rows_of("scale", "shapes")[shape]["rows"][0]
    assert float(f"{row['parameters'] / 1e9:.3g}") == total


def test_a_page_is_filled_from_a_result_file(tables, tmp_path, monkeypatch):
    (tmp_path / "smollm2").mkdir()
    row = {"label": "full", "bytes_held": 50, "bytes_full": 200, "perplexity": 12.345, "kl": 0.00214}
    result = {"rows": [row | {"perplexity_95": 0.5, "fit_seconds": 3}]}
    (tmp_path / "smollm2" / "new.json").write_text(json.dumps(result), encoding="utf-8")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    page = "before\n<!-- table: smollm2/new -->\nold\n<!-- /table -->\nafter\n"
    assert tables.filled(page) == (
        "before\n<!-- table: smollm2/new -->\n"
        "| cache | bytes | perplexity | kl | fit, s |\n|---|---|---|---|---|\n"
        "| full | 25.0 % | 12.35 ± 0.50 | 0.0021 | 3 |\n"
        "<!-- /table -->\nafter\n"
    )


def test_a_table_that_is_not_known_is_refused(tables):
    with pytest.raises(KeyError, match="no-such-table"):
        tables.filled("<!-- table: no-such-table -->\n<!-- /table -->\n")


def test_the_picture_shows_the_result_files(tables, monkeypatch):
    import picture

    said = re.search(r"points [0-9a-f]{16}", picture.PLACE.read_text(encoding="utf-8"))
    assert said and said[0] == picture.description(picture.points()), "run python benchmarks/picture.py"
    (half, *_), *_ = [line for name, line in picture.points().items() if name == picture.DEFAULT]
    assert half[0] == pytest.approx(50, abs=0.1)
