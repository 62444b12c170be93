"""Models, plans and results that the tests of the command line share."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pico
import pytest
from commands import EVERYTHING, SCORE, SMALL, done, printed

from lowkey.catalog import make_policy
from lowkey.plan.plan import Plan
from lowkey.policies import policy_to_dict


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A saved pico model."""
    return pico.save(tmp_path_factory.mktemp("model") / "pico", pad_token_id=None)


@pytest.fixture(scope="session")
def other(tmp_path_factory):
    """A saved model of the same shape with other weights."""
    return pico.save(tmp_path_factory.mktemp("other") / "pico", initializer_range=0.1)


@pytest.fixture(scope="session")
def made(model, tmp_path_factory):
    """(plan folder, what `compress --json` printed)."""
    out = tmp_path_factory.mktemp("plans") / "pca"
    return out, printed("compress", model, out, *SMALL)


@pytest.fixture(scope="session")
def full_plan(made, tmp_path_factory):
    """The folder of a plan with ranks, integers and a policy."""
    out = tmp_path_factory.mktemp("plans") / "all"
    policy = policy_to_dict(make_policy("snapkv", "50%", {}))
    replace(Plan.load(made[0]), bits="kivi4", policy=policy, recent=32).save(out)
    return out


@pytest.fixture(scope="session")
def scored(model, made, tmp_path_factory):
    """(result file, what `eval --json` did)."""
    out = tmp_path_factory.mktemp("results") / "pico.json"
    return out, done("eval", model, "--plan", made[0], *SCORE, *EVERYTHING, "--out", out, "--json")


@pytest.fixture
def plan(made, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(made[0], tmp_path / "plan"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An own working folder, with a file of the user's."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    monkeypatch.chdir(folder)
    return folder
