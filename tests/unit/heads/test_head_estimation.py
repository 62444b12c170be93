"""Estimation of head scores against a slow computation; resumed, and refused where it cannot be done."""

from __future__ import annotations

from pathlib import Path

import pico
import pytest
import torch
from head_recording import TEXT, refused, small
from pico import attached, stock
from transformers import AutoModelForCausalLM

import lowkey
from lowkey.core.files import measured
from lowkey.heads import induction, retrieval
from lowkey.heads.induction import estimate_echo
from lowkey.heads.needles import NEEDLE_TASKS, Case, Haystack
from lowkey.heads.retrieval import SCORE_KINDS, estimate_heads, f1
from lowkey.heads.scores import HeadScores
from lowkey.models import families
from lowkey.models.loading import load

# -- estimation


@pytest.fixture(scope="module")
def tiny():
    return load("tiny", "float32", "cpu")


@torch.no_grad()
def by_hand(model, kind: str, case: Case, layers: tuple[int, ...]) -> list[list[float]]:
    """Scores (layers, H) of one case in loops, from the eager attention of the whole sequence at once."""
    written, total = [], None
    for _ in case.answer:
        out = model(torch.tensor([case.prompt + written]), output_attentions=True)
        written.append(int(out.logits[0, -1].argmax()))
        step = [
            [looked(kind, weights.tolist(), case, written[-1]) for weights in out.attentions[i][0, :, -1]]
            for i in layers
        ]
        total = (
            step
            if total is None
            else [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(total, step, strict=True)]
        )
    return total


def looked(kind: str, weights: list[float], case: Case, token: int) -> float:
    ranked = sorted(range(len(weights)), key=weights.__getitem__, reverse=True)
    needle, right = [i for a, b in case.needle for i in range(a, b)], range(*case.right)
    if kind == "copy":
        return (ranked[0] in needle and case.prompt[ranked[0]] == token) / len(needle)
    return sum(weights[i] for i in (ranked[: len(right)] if kind == "r2" else right) if i in right) / len(
        right
    )


def cases_of(tokenizer, task: str, haystack: str, count: int, lengths: tuple[int, ...]) -> list[Case]:
    return retrieval._cases(task, Haystack(tokenizer, haystack), count, lengths, 3, 0)


def agree(found: HeadScores, model, kind: str, drawn: list[Case]) -> None:
    shape = families.geometry(model)
    assert found.layers == shape.compressible and found.values.shape == (
        len(drawn),
        len(found.layers),
        shape.heads,
    )
    for number in (0, 4, 9):
        wanted = by_hand(model, kind, drawn[number], shape.compressible)
        for ours, row in zip(found.values[number].tolist(), wanted, strict=True):
            assert ours == pytest.approx(row, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("kind", ["r2", "mass"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2"])
def test_estimated_values_are_those_of_a_slow_computation(name, kind, accepting):
    agree(
        small(attached(name), kind),
        stock(name),
        kind,
        cases_of(pico.tokenizer(), "facts", TEXT, 10, (200, 230)),
    )


@pytest.mark.parametrize("kind", ["copy", "r2"])
def test_estimated_values_of_a_model_that_answers(kind, tiny):
    model, tokenizer = tiny
    place = Path(lowkey.__file__).parent / "data" / "tiny"
    eager = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, attn_implementation="eager")
    drawn = cases_of(tokenizer, "recall", TEXT, 10, (60, 90))
    found = estimate_heads(
        model, tokenizer, kind=kind, task="recall", haystack=TEXT, cases=10, lengths=(60, 90), depths=3
    )
    assert len({float(x) for x in found.values.flatten()}) > 3
    agree(found, eager, kind, drawn)


def test_sliding_layers_have_no_scores(accepting):
    found = small(attached("gemma2"))
    assert (
        found.layers == (1, 2)
        and found.per_kv_head().shape == (2, 4)
        and found.per_query_head().shape == (2, 8)
    )
    assert float(found.per_kv_head().sum()) == pytest.approx(1)


def test_cases_cover_the_grid_evenly():
    drawn = retrieval._cases("comparison", Haystack(pico.tokenizer(), TEXT), 24, (400, 300), 4, 0)
    sizes = [len(c.prompt) + len(c.answer) for c in drawn]
    assert sizes == [300] * 12 + [400] * 12
    words = ["older" in pico.tokenizer().decode(c.question) for c in drawn]
    assert words.count(True) == 12 and words[:4] != words[4:8]
    assert len({c.needle[0][0] for c in drawn[:12]}) > 2


def test_fewer_cases_than_places_still_reach_every_length():
    drawn = retrieval._cases("recall", Haystack(pico.tokenizer(), TEXT), 10, (100, 150, 200, 250, 300), 10, 0)
    assert sorted({len(c.prompt) + len(c.answer) for c in drawn}) == [100, 150, 200, 250, 300]


def test_a_seed_gives_the_same_scores_and_another_does_not(accepting):
    first, again, other = (small(attached("llama"), seed=s) for s in (0, 0, 1))
    assert torch.equal(first.values, again.values) and not torch.equal(first.values, other.values)
    assert (first.seed, other.seed) == (0, 1) and first.data_sha256 == other.data_sha256
    assert small(attached("llama"), haystack="Another day. " * 60).data_sha256 != first.data_sha256


class Stopping:
    """A progress that is interrupted before item `at`."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __call__(self, items, *_):
        for number, item in enumerate(items):
            if number == self.at:
                raise KeyboardInterrupt
            yield item


def estimate(kind: str, **given) -> HeadScores:
    if kind == "echo":
        return estimate_echo(attached("llama"), pico.tokenizer(), kind="echo", cases=10, context=41, **given)
    return small(attached("llama"), **given)


@pytest.mark.parametrize("seed, again", [(0, 5), (1, 10)], ids=["the same", "another"])
@pytest.mark.parametrize(
    "kind, looks", [("echo", (induction, "_values")), ("r2", (retrieval._Job, "values"))]
)
def test_a_stopped_estimate_goes_on_and_another_begins_anew(
    tmp_path, monkeypatch, accepting, kind, looks, seed, again
):
    straight, seen, look = estimate(kind, seed=seed), [], getattr(*looks)
    monkeypatch.setattr(measured, "SECONDS_BETWEEN_WRITES", 0.0)
    monkeypatch.setattr(*looks, lambda *given: seen.append(1) or look(*given))
    with pytest.raises(KeyboardInterrupt):
        estimate(kind, work=tmp_path, progress=Stopping(5))
    assert len(seen) == 5
    assert (
        torch.equal(estimate(kind, work=tmp_path, seed=seed).values, straight.values)
        and len(seen) == 5 + again
    )


@pytest.mark.parametrize("bad", [[[0.5]], "no table"])
def test_unfinished_scores_that_are_damaged_are_refused(tmp_path, bad):
    saved = measured.Measured(tmp_path, {"job": 1})
    saved.once("case 1", lambda: bad)
    refused(lambda: saved.tensor("case 1", (2, 3), lambda: None), "'case 1' is no table of shape")


def test_numbers_that_are_not_finite_are_told_at_once():
    refused(
        lambda: measured.Measured().tensor("case 1", (1,), lambda: torch.tensor([float("nan")])),
        "case 1: the model's numbers are not",
    )


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"kind": "r3"}, "kind 'r3' is unknown; choose one of copy, r2, er, mass"),
        ({"task": "riddle"}, "task 'riddle' is unknown; choose one of recall, facts"),
        ({"accept": "rouge"}, "accept 'rouge' is unknown; choose one of exact, f1"),
        ({"cases": 9}, "cases 9, depths 3: scores need 10 cases"),
        ({"depths": 0}, "depths 0: scores need"),
        ({"lengths": ()}, "one length at least"),
        ({"lengths": (200, 513)}, "context 513: the model reads 512 tokens at most"),
        (
            {"lengths": (20, 200)},
            "task 'facts', lengths 20, 200: context 20: the needle and its question alone take",
        ),
        ({"haystack": "Too short."}, "data: 10 tokens cannot fill a context of 200"),
        (
            {},
            r"task 'facts': 0 of 10 cases answered right, scores need 10; give another task \(recall, facts",
        ),
    ],
)
def test_what_cannot_be_estimated_is_refused_in_one_line(changes, match):
    refused(lambda: small(attached("llama"), **changes), match)


def test_a_model_that_is_not_attached_is_refused():
    refused(lambda: small(pico.build("llama")), "call lowkey.attach")


def test_a_hopeless_task_is_given_up_early():
    asked = []

    def counting(items, label, total=None):
        for item in items:
            asked.append(label)
            yield item

    refused(lambda: small(attached("llama"), cases=100, progress=counting), "0 of 100 cases")
    assert len(asked) <= 21


@pytest.mark.parametrize(
    ("said", "wanted", "score"),
    [
        ("the Old lamp.", " old lamp", 1),
        (" old", " old lamp", 2 / 3),
        (" new chair", " old lamp", 0),
        ("a a", "a", 0),
        ("x y y", "y x x", 2 / 3),
    ],
)
def test_f1_of_words(said, wanted, score):
    assert f1(said, wanted) == pytest.approx(score)


@pytest.mark.parametrize(("accept", "right"), [("exact", False), ("f1", True)])
def test_what_counts_as_right(accept, right):
    encode = lambda text: pico.tokenizer()(text).input_ids  # noqa: E731
    job = retrieval._Job(attached("llama"), pico.tokenizer(), retrieval.top_mass, accept, (0, 1, 2))
    case = Case(encode(" Question"), [], encode(" old lamp"), ((0, 1),), (0, 1), ())
    assert job._is_right(encode(" old lam."), case) is job._is_right(encode(" old lamp")[:-1], case) is False
    assert job._is_right(encode(" old lamp"), case) and job._is_right(encode(" Old lamp"), case) is right
    assert job._is_over(encode(" x"), case) is not right and not job._is_over(encode(" ol"), case)
    assert job._is_over(encode(" old\n"), case)


# -- the embedded model


@pytest.mark.parametrize(
    ("kind", "task"), [("copy", "recall"), ("r2", "facts"), ("er", "recall"), ("mass", "facts")]
)
def test_the_embedded_model_has_heads_that_find(tiny, kind, task):
    found = estimate_heads(*tiny, kind=kind, cases=15, context=450)
    assert (found.task, found.layers, found.drawn) == (task, (0, 1, 2, 3), 15) and found.accepted >= 12
    shares = found.per_kv_head()
    assert shares.shape == (4, 6) and float(shares.sum()) == pytest.approx(1)
    assert {(i, j) for i, j, _ in found.top(3)} == {(1, 0), (1, 1), (1, 2)}, (
        "the heads that its recipe made to match"
    )
    assert float(shares.flatten().sort().values[-3:].sum()) > 0.5


def test_what_the_embedded_model_cannot_do_is_told(tiny):
    refused(
        lambda: estimate_heads(*tiny, task="comparison", cases=20, context=450),
        "task 'comparison': 0 of 20 cases answered right",
    )
    assert set(NEEDLE_TASKS) >= {name for kind in SCORE_KINDS.values() for name in kind.tasks}
