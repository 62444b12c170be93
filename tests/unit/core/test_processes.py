"""Processes share work through a store: here they are threads, with a store in memory."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from lowkey import LowkeyError
from lowkey.core import processes
from lowkey.core.files.measured import Measured
from lowkey.core.processes import ALONE, Processes


def together(count: int, act) -> list:
    """What `act` gives in each of so many processes, or the exception that it raises."""
    store = HashStore()
    every = [Processes(rank, count, rank, store) for rank in range(count)]

    def run(own: Processes):
        try:
            found = act(own)
            own.leave()
        except (Exception, SystemExit) as error:
            return error if own.is_first_to_fail() else SystemExit(2)
        return found

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, every, timeout=60))


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_item_is_taken_once(count):
    shares = [Processes(rank, count).share(range(5)) for rank in range(count)]
    assert sorted(item for share in shares for item in share) == [0, 1, 2, 3, 4]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_values_of_all_arrive_everywhere_in_order(monkeypatch):
    """Also values of several pieces, turn after turn, whichever process is late."""
    monkeypatch.setattr(processes, "PIECE", 7)

    def act(own: Processes) -> list:
        found = []
        for turn in range(4):
            time.sleep(0.01 * ((own.rank + turn) % 3))
            found.append(
                own.exchange({"from": own.rank, "turn": turn, "x": 0.1 + turn / 3, "word": "é" * turn})
            )
        return found

    expected = [
        [{"from": rank, "turn": turn, "x": 0.1 + turn / 3, "word": "é" * turn} for rank in range(3)]
        for turn in range(4)
    ]
    assert together(3, act) == [expected] * 3


def test_the_store_does_not_keep_what_all_have_read():
    store, sizes = HashStore(), []

    def act(own: Processes) -> None:
        own.store = store
        for turn in range(5):
            own.exchange([turn] * 10)
            own.exchange(None)
            sizes.append(store.num_keys())

    together(2, act)
    assert max(sizes[-2:]) <= 5 * 4 + 4 + 4  # names of turns, and values of the last two


def test_a_failure_ends_all_and_one_says_why():
    def act(own: Processes) -> None:
        own.exchange(1)
        if own.rank == 1:
            raise LowkeyError("why")
        own.exchange(2)

    first, second, third = together(3, act)
    assert str(second) == "why"
    assert isinstance(first, SystemExit) and isinstance(third, SystemExit) and first.code == third.code == 2


def test_the_same_failure_everywhere_is_told_once():
    barrier = threading.Barrier(3)

    def act(own: Processes) -> None:
        barrier.wait()
        raise LowkeyError("why")

    found = together(3, act)
    assert sorted(type(x).__name__ for x in found) == ["LowkeyError", "SystemExit", "SystemExit"]


def test_measurements_are_divided_and_known_to_all(tmp_path):
    taken = []

    def act(own: Processes) -> dict:
        measured = Measured(tmp_path if own.main else None, {"job": 1} if own.main else None, own)
        for name in measured.share("abcde"):
            measured.once(name, lambda: taken.append(name) or [ord(name) / 3, float("nan")])  # noqa: B023
        measured.once("of several", lambda: own.rank)
        measured.gather()
        measured.write()
        return measured.known

    first, second = together(2, act)
    assert sorted(taken) == list("abcde")
    assert first == second == {name: [ord(name) / 3, None] for name in "abcde"} | {"of several": 0}


@pytest.mark.parametrize("later", [1, 2, 3])
def test_what_was_saved_counts_for_any_number_of_processes(later, tmp_path):
    """Three processes are stopped before they gather; others go on from all that was saved."""

    def stopped(own: Processes) -> None:
        measured = Measured(tmp_path, {"job": 1}, own)
        for name in measured.share("abcdefg"):
            measured.once(name, lambda: f"first {name}")  # noqa: B023
        measured.write()
        own.exchange(None)

    def again(own: Processes) -> dict:
        measured = Measured(tmp_path, {"job": 1}, own)
        for name in measured.share([x for x in "abcdefghi" if x not in measured]):
            measured.once(name, lambda: f"then {name}")  # noqa: B023
        measured.gather()
        return measured.known

    together(3, stopped)
    expected = {x: f"first {x}" for x in "abcdefg"} | {x: f"then {x}" for x in "hi"}
    assert together(later, again) == [expected] * later


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    names = ("auto", "cuda", "cpu", "cuda:0")
    assert [Processes(3, 4, 1).device(name) for name in names] == ["cuda:1", "cuda:1", "cpu", "cuda:0"]
    assert [ALONE.device(name) for name in ("auto", "balanced")] == ["auto", "balanced"]
    with pytest.raises(LowkeyError, match="2 GPUs for more processes"):
        Processes(2, 3, 2).device("auto")
    with pytest.raises(LowkeyError, match="gives all GPUs to one process"):
        Processes(0, 2).device("balanced")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert Processes(2, 3, 2).device("auto") == "auto"
