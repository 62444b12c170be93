"""`lowkey report` and `lowkey profile`: the page, the error surface and the plots."""

from __future__ import annotations

import json

import pico
from commands import done, printed


def test_report_writes_a_page(scored, here):
    told = printed("report", scored[0], "-o", "page.html")
    assert told == {"report": "page.html"}
    assert "pca 50%" in (here / "page.html").read_text()


def test_report_without_json(scored, here):
    ran = done("report", scored[0])
    assert ran.out == "" and "report written to report.html" in ran.err


def test_profile_writes_the_surface_and_two_plots(here):
    short = pico.save(here / "short", max_position_embeddings=32)  # and so are its windows
    words = ("profile", short, "--method", "pca", "--windows", 4, "-o", "profile")
    told = printed(*words)
    assert told.items() <= json.loads((here / "profile" / "profile.json").read_text()).items()
    assert told["layers"] == [0, 1, 2] and len(told["surface"]) == 3
    for name in ("surface.png", "spectra.png"):
        assert (here / "profile" / name).read_bytes().startswith(b"\x89PNG")
