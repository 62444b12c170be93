"""How requests are put into batches."""

from __future__ import annotations

from types import SimpleNamespace

from lowkey.harness.requests import Request, batches, request_summary

EVICTS, KEEPS = SimpleNamespace(evicts=True), SimpleNamespace(evicts=False)


def request(number, context, tail, protocol="ask-after", **more):
    return Request(f"k{number}", number, "task", tuple(context), tuple(tail), protocol, **more)


def test_a_context_is_read_once_for_all_its_questions():
    made = [request(i, [1, 2, 3], [4 + i]) for i in range(5)] + [request(9, [7], [8])]
    (batch,) = batches(made, 4, KEEPS, True)
    assert [context for context, _ in batch.contexts] == [(1, 2, 3), (7,)]
    assert sorted(r.number for _, r in batch.requests) == [0, 1, 2, 3, 4, 9]
    assert all(batch.contexts[place][0] == r.context for place, r in batch.requests)


def test_tails_of_a_part_are_equally_long():
    made = [request(i, [1], range(1 + i % 3)) for i in range(9)]
    (batch,) = batches(made, 9, KEEPS, True)
    parts = list(batch.parts(2))
    assert all(len({len(r.tail) for _, r in part}) == 1 for part in parts)
    assert sorted(r.number for part in parts for _, r in part) == list(range(9))


def test_requests_that_read_the_same_share_a_row():
    made = [request(i, [1], [2, 3], scored=(i,)) for i in range(4)]
    (batch,) = batches(made, 1, KEEPS, True)
    assert [len(part) for part in batch.parts(1)] == [4]


def test_only_ask_with_shows_a_policy_the_last_token():
    for setting, protocol, seen in (
        (EVICTS, "ask-with", (5,)),
        (KEEPS, "ask-with", ()),
        (EVICTS, "ask-after", ()),
    ):
        (batch,) = batches([request(0, [1], [5, 6], protocol)], 1, setting, True)
        assert batch.contexts == [((1,), seen)]


def test_without_padding_contexts_of_a_batch_are_equally_long():
    made = [request(i, range(1 + i % 2), [9]) for i in range(4)]
    found = list(batches(made, 8, KEEPS, False))
    assert [{len(context) for context, _ in b.contexts} for b in found] in ([{1}, {2}], [{2}, {1}])


def test_a_summary_has_means_and_shares():
    made = [request(i, range(10 * (i + 1)), [1, 2], scored=(1,), over_length=i == 0) for i in range(2)]
    found = request_summary([r.record(None, 100.0 * (i + 1), 1) for i, r in enumerate(made)])
    assert found["context_tokens"] == 15
    assert found["kept_bytes"] == 150
    assert found["kept_bytes_per_token"] == 10
    assert found["over_length"] == 0.5
    assert (found["protocol"], found["requests"], found["question_tokens"]) == ("ask-after", 2, 2)
