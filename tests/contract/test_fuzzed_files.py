"""Files of every kind, damaged at random: each is refused in one line, or means what was written."""

from __future__ import annotations

import random
import time
from collections import Counter

import pytest
from artefacts import build
from fuzzing import mutate

from lowkey.core.types import LowkeyError

UNSEALED = ("recipe", "log")  # what people write by hand, and what grows by lines


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory):
    return build(tmp_path_factory.mktemp("fuzz"))


def run(artefacts, count, seed, only=None):
    """What went wrong, and how often files were refused, loaded as they were, or loaded with other contents
    and fitting checksums.
    """
    names = only or sorted(artefacts)
    before = {name: artefacts[name].load(artefacts[name].folder) for name in names}
    wrong, ended = [], Counter()
    for n in range(count):
        name, start = names[n % len(names)], time.perf_counter()
        artefact = artefacts[name]
        back, vouched, what = mutate(artefact, random.Random(f"{seed} {n}"))
        label = f"{seed} {n}: {name}, {what}"
        try:
            found = artefact.load(artefact.folder)
            ended["forged" if vouched else "loaded"] += 1
            if not vouched and name not in UNSEALED and found != before[name]:
                wrong.append(f"{label}: loaded with another meaning")
            if artefact.use is not None:
                artefact.use(artefact.folder)
        except LowkeyError as error:
            ended["refused"] += 1
            if "\n" in str(error):
                wrong.append(f"{label}: more than a line: {error}")
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            wrong.append(f"{label}: {type(error).__name__}: {str(error)[:200]}")
        finally:
            back()
        if time.perf_counter() - start > 5:
            wrong.append(f"{label}: took {time.perf_counter() - start:.0f} s")
    assert {name: artefacts[name].load(artefacts[name].folder) for name in names} == before
    return wrong, ended


def test_damaged_files_are_refused_or_mean_what_they_did(artefacts):
    wrong, ended = run(artefacts, 2000, 0)
    assert not wrong, "\n".join(wrong[:20])
    assert ended["refused"] > 1200 and ended["loaded"] > 20


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_many_more_damaged_files(artefacts, part):
    wrong, _ = run(artefacts, 2000, part + 1)
    assert not wrong, "\n".join(wrong[:20])
