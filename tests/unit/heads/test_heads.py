"""Head scores: what is watched is what transformers attends to, the scores are the papers', a file is refused
or exact.
"""

from __future__ import annotations

import json
from pathlib import Path

import forging
import pico
import pytest
import torch
from pico import attached, feed, prompt, stock
from transformers import AutoModelForCausalLM, DynamicCache

import lowkey
from lowkey.cache.cache import cache_of
from lowkey.core.files import measured
from lowkey.core.types import LowkeyError
from lowkey.heads import induction, retrieval
from lowkey.heads.induction import estimate_echo
from lowkey.heads.needles import NEEDLE_TASKS, Case, Haystack
from lowkey.heads.retrieval import SCORE_KINDS, estimate_heads, f1
from lowkey.heads.scores import HeadScores, spearman
from lowkey.models import families
from lowkey.models.loading import load
from lowkey.storage.attention_recording import AttentionRecordingLayer

TEXT = "It was a bright cold day in April, and the clocks were striking. " * 40
CASE = Case(
    prompt=[9, 1, 2, 3, 4, 5, 1, 2, 7, 8],
    question=[7, 8],
    answer=[3, 4],
    needle=((2, 5), (6, 7)),
    right=(3, 5),
    wrong=((7, 8),),
)


def recording(model) -> tuple[object, dict[int, AttentionRecordingLayer]]:
    layers = {i: AttentionRecordingLayer() for i in families.geometry(model).compressible}
    return cache_of(model, layers.__getitem__), layers


def scores(values, layers=None, kv_heads=2, **changes) -> HeadScores:
    values = torch.as_tensor(values, dtype=torch.float64)
    given = {
        "kind": "r2",
        "task": "facts",
        "model": "m",
        "model_sha256": "0" * 64,
        "data_sha256": "1" * 64,
        "seed": 0,
        "settings": {},
    }
    given |= {
        "values": values,
        "layers": tuple(layers or range(values.shape[1])),
        "kv_heads": kv_heads,
        "drawn": 100,
    }
    return HeadScores(**given | changes)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def random_scores(cases=12, layers=3, heads=8, kv_heads=4, **changes) -> HeadScores:
    return scores(noise(cases, layers, heads), None, kv_heads, **changes)


# -- echo and induction


@pytest.mark.parametrize("kind", ["echo", "induction"])
def test_repeated_tokens_show_where_heads_look(kind):
    """Against eager attention over the whole repeated sequence."""
    model, tokenizer = pico.attached("llama"), pico.tokenizer()
    found = estimate_echo(model, tokenizer, kind=kind, cases=1, context=41, seed=3)
    block = torch.randint(len(tokenizer), (1, 10), generator=torch.Generator().manual_seed(3))[0]
    ids = torch.cat([torch.tensor([tokenizer.bos_token_id]), block.repeat(4)]).unsqueeze(0)
    with torch.no_grad():
        attentions = pico.stock("llama")(ids, output_attentions=True).attentions
    behind = {"echo": 0, "induction": 1}[kind]
    for layer, seen in enumerate(attentions):
        steps = [
            seen[0, :, 31 + i, [1 + 10 * k + i + behind for k in range(3)]].sum(1) for i in range(10 - behind)
        ]
        assert torch.allclose(found.values[0, layer], torch.stack(steps).mean(0).double(), atol=1e-5)
    assert found.kind == kind and found.per_kv_head().shape == (3, 4)


# -- the layer that records attention weights


@torch.no_grad()
@pytest.mark.parametrize("name", pico.NAMES)
def test_what_is_watched_is_the_eager_attention(name):
    ids, past = prompt(30, batch=1), DynamicCache(config=stock(name).config)
    cache, layers = recording(attached(name))
    stock(name)(ids[:, :24], past_key_values=past)
    feed(attached(name), ids[:, :24], cache)
    for at in range(24, 30):
        wanted = stock(name)(ids[:, at : at + 1], past_key_values=past, output_attentions=True).attentions
        feed(attached(name), ids[:, at : at + 1], cache)
        for i, layer in layers.items():
            assert layer.weights.dtype == torch.float32
            assert torch.allclose(layer.weights.flatten(1, 2), wanted[i][:, :, 0], atol=1e-6, rtol=1e-5)
    assert len(layers) == len(families.geometry(stock(name)).compressible) > 0


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_padding_is_never_attended_to(name):
    pads, ids, past = [7, 0], prompt(25), DynamicCache(config=stock(name).config)
    cache, layers = recording(attached(name))
    feed(attached(name), ids, cache, pads, [24, 1])
    mask, positions = pico.padding(pads, 25)
    stock(name)(
        ids[:, :24], attention_mask=mask[:, :24], position_ids=positions[:, :24], past_key_values=past
    )
    last = {"attention_mask": mask, "position_ids": positions[:, 24:]}
    wanted = stock(name)(ids[:, 24:], **last, past_key_values=past, output_attentions=True).attentions
    for i, layer in layers.items():
        assert torch.allclose(layer.weights.flatten(1, 2), wanted[i][:, :, 0], atol=1e-6, rtol=1e-5)
        assert not layer.weights[0, ..., :7].any()


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "llama-mqa", "gemma2", "gemma3_text"])
def test_recording_weights_changes_no_logits(name):
    ids = prompt(30)
    cache, _ = recording(attached(name))
    ours = feed(attached(name), ids, cache, [7, 0], [20, 1, 8, 1])
    assert torch.allclose(
        pico.real(ours, [7, 0]), pico.real(feed(stock(name), ids, pads=[7, 0]), [7, 0]), atol=1e-4
    )


@torch.no_grad()
def test_only_one_token_steps_are_remembered_and_every_byte_counts():
    cache, layers = recording(attached("llama"))
    assert cache.nbytes() == cache.predicted_nbytes() == 0
    for size, seen, width in ((10, 10, 0), (1, 11, 11), (1, 12, 12), (3, 15, 0), (1, 16, 16)):
        feed(attached("llama"), prompt(size, batch=1), cache)
        assert all(
            layer.weights.shape == (1, 4, 2, width) and layer.keys.shape[2] == seen
            for layer in layers.values()
        )
        assert (
            cache.nbytes()
            == cache.predicted_nbytes()
            == 3 * (2 * 4 * seen * pico.HEAD_DIM * 4 + 8 * width * 4)
        )


def test_recorded_weights_survive_beams():
    ids, (cache, _) = prompt(20), recording(attached("llama"))
    ours = pico.generate(attached("llama"), ids, 8, cache, num_beams=3)
    assert torch.equal(ours, pico.generate(stock("llama"), ids, 8, num_beams=3))


# -- scores of one step, by hand


WEIGHTS = torch.tensor(
    [  # of CASE: needle 2-4 and 6, right answer 3-4; position 10 is a token already written
        [0.0, 0.0, 0.1, 0.6, 0.2, 0.0, 0.0, 0.1, 0.0, 0.0, 0.0],  # both on the answer
        [0.4, 0.0, 0.1, 0.3, 0.2, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],  # the beginning, then half of the answer
        [0.0, 0.5, 0.0, 0.1, 0.0, 0.0, 0.4, 0.0, 0.0, 0.0, 0.0],  # before the needle
        [0.0, 0.0, 0.3, 0.2, 0.1, 0.0, 0.4, 0.0, 0.0, 0.0, 0.0],  # the needle's second sentence
        [0.0, 0.0, 0.0, 0.1, 0.3, 0.0, 0.0, 0.0, 0.0, 0.0, 0.6],  # what it has just written
    ]
)


@pytest.mark.parametrize(
    ("kind", "token", "wanted"),
    [
        ("copy", 3, [1 / 4, 0, 0, 0, 0]),  # only the first head's best position, 3, holds token 3
        ("copy", 1, [0, 0, 0, 1 / 4, 0]),  # position 1 holds it too, but is not in the needle
        ("copy", 9, [0, 0, 0, 0, 0]),
        ("r2", 3, [0.8 / 2, 0.3 / 2, 0, 0, 0.3 / 2]),
        ("r2", 77, [0.8 / 2, 0.3 / 2, 0, 0, 0.3 / 2]),  # what is written does not matter
        ("er", 3, [0.8 / 2, 0.3 / 2, 0, 0, 0.3 / 2]),
        ("mass", 3, [0.8 / 2, 0.5 / 2, 0.1 / 2, 0.3 / 2, 0.4 / 2]),
    ],
)
def test_a_step_has_the_score_that_the_hand_computes(kind, token, wanted):
    found = SCORE_KINDS[kind].score(WEIGHTS, CASE, token)
    assert found.dtype == torch.float64
    assert torch.allclose(found, torch.tensor(wanted, dtype=torch.float64))


# -- the value


def test_kv_heads_have_the_mean_of_their_group_as_a_share():
    found = scores(
        [[[0.1, 0.3, 0.0, 0.0], [0.2, 0.0, 0.4, 0.2]], [[0.3, 0.1, 0.2, 0.0], [0.0, 0.0, 0.2, 0.0]]]
    )
    assert torch.allclose(
        found.per_query_head(), torch.tensor([[0.2, 0.2, 0.1, 0.0], [0.1, 0.0, 0.3, 0.1]]).double()
    )
    assert torch.allclose(found.per_kv_head(), torch.tensor([[0.2, 0.05], [0.05, 0.2]]).double() / 0.5)
    assert found.top(2) == [(0, 0, pytest.approx(0.4)), (1, 1, pytest.approx(0.4))]


def test_top_names_the_models_own_layers():
    assert scores([[[0.1, 0.0], [0.0, 0.3]]], layers=(2, 5)).top() == [
        (5, 1, pytest.approx(0.75)),
        (2, 0, pytest.approx(0.25)),
        (2, 1, 0),
        (5, 0, 0),
    ]


@pytest.mark.parametrize(
    ("a", "b", "wanted"),
    [
        ([1, 2, 3, 4], [10, 20, 25, 90], 1),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1),
        ([1, 2, 3, 4], [1, 3, 2, 4], 0.8),
        ([0, 0, 1, 2], [0, 0, 5, 9], 1),
        ([0, 0, 1, 2], [1, 0, 0, 2], 0.5),  # ranks 1.5 1.5 3 4 and 3 1.5 1.5 4
        ([1, 1, 1, 1], [1, 2, 3, 4], 0),
    ],
)
def test_rank_correlation(a, b, wanted):
    assert spearman(torch.tensor(a), torch.tensor(b)) == pytest.approx(wanted)


def test_halves_that_agree_correlate_and_noise_does_not():
    same = noise(1, 2, 100).expand(20, -1, -1)
    assert scores(same).split_half() == pytest.approx(1)
    assert abs(random_scores(20, 2, 200).split_half()) < 0.1
    assert 0.3 < scores(0.5 * same + 0.5 * noise(20, 2, 100, seed=1)).split_half() < 1


def test_one_case_has_no_halves():
    assert random_scores(1).split_half() == 0


def test_shuffling_deals_whole_groups_to_other_heads():
    found = random_scores(5, 3, 8, 4)
    dealt = found.shuffled(1)
    groups = [s.values.view(5, 12, 2).transpose(0, 1).reshape(12, -1) for s in (found, dealt)]
    assert sorted(map(tuple, groups[0].tolist())) == sorted(map(tuple, groups[1].tolist()))
    assert not torch.equal(*groups)
    assert torch.allclose(*(s.per_kv_head().flatten().sort().values for s in (found, dealt)))
    assert torch.equal(dealt.values, found.shuffled(1).values) and not torch.equal(
        dealt.values, found.shuffled(2).values
    )
    assert (dealt.settings, found.settings) == ({"shuffled": 1}, {})


# -- files


def test_what_is_loaded_is_what_was_saved(tmp_path):
    found = random_scores(12, kind="copy", task="recall", drawn=40, seed=7, settings={"lengths": [1, 2]})
    found.save(tmp_path / "heads.json")
    again = HeadScores.load(tmp_path / "heads.json")
    assert torch.equal(again.values, found.values) and again.values.dtype == torch.float64
    assert again.describe() == found.describe()
    assert (again.kind, again.task, again.accepted, again.drawn, again.seed) == ("copy", "recall", 12, 40, 7)
    assert [p.name for p in tmp_path.iterdir()] == ["heads.json"]


def test_a_file_holds_six_digits(tmp_path):
    scores([[[1 / 3, 2 / 3e9], [0.0, 1.0]]]).save(tmp_path / "heads.json")
    assert json.loads((tmp_path / "heads.json").read_text())["values"] == [
        [[0.333333, 6.66667e-10], [0.0, 1.0]]
    ]
    random_scores(100, 32, 32, 8).save(tmp_path / "heads.json")
    assert (tmp_path / "heads.json").stat().st_size < 100 * 32 * 32 * 13


def test_a_file_tells_how_it_was_made(tmp_path):
    found = random_scores(12, drawn=30)
    found.save(tmp_path / "heads.json")
    meta = json.loads((tmp_path / "heads.json").read_text())
    assert meta["format"] == 1 and meta["accepted"] == 12 and meta["drawn"] == 30 and meta["zero_heads"] == 0
    assert meta["split_half"] == pytest.approx(found.split_half(), abs=1e-4) and len(meta["top"]) == 5


DAMAGE = {
    "newer": ({"format": 2}, "format 2 is newer than 1"),
    "no format": ({"format": "1"}, "format '1', which is not a number"),
    "no kind": ({"kind": None}, "field 'kind' is missing or not of type str"),
    "heads as text": ({"kv_heads": "4"}, "field 'kv_heads' is missing or not of type int"),
    "layers as text": ({"layers": ["a", "b", "c"]}, "field 'layers' holds something other than indices"),
    "other layers": ({"layers": [0, 1]}, "do not fit 2 layers with 4 KV heads"),
    "other heads": ({"kv_heads": 3}, "do not fit 3 layers with 3 KV heads"),
    "no heads": ({"kv_heads": 0}, "do not fit 3 layers with 0 KV heads"),
    "no values": ({"values": None}, "field 'values' is not a table of numbers"),
    "ragged": ({"values": [[[0.1, 0.2]], [[0.1]]]}, "field 'values' is not a table of numbers"),
    "words": ({"values": [[["a"]]]}, "field 'values' is not a table of numbers"),
    "huge": ({"values": [[[10**400]]]}, "a whole number of 401 digits"),
    "flat": ({"values": [0.1, 0.2]}, r"\(2,\) must be \(cases, layers, query heads\)"),
    "empty": ({"values": []}, "must be .cases, layers, query heads., none of them 0"),
    "nan": ({"values": [[[float("nan")] * 8] * 3]}, "NaN is no number of JSON"),
    "infinite": ({"values": [[[float("inf")] * 8] * 3]}, "Infinity is no number of JSON"),
    "negative": ({"values": [[[-0.1] * 8] * 3]}, "must lie between 0 and 1"),
    "too large": ({"values": [[[1.1] * 8] * 3]}, "must lie between 0 and 1"),
    "zeros": ({"values": [[[0.0] * 8] * 3]}, "are all 0"),
    "more than drawn": ({"drawn": 3}, "are of more cases than the 3 drawn"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_refused_in_one_line(name, tmp_path):
    change, match = DAMAGE[name]
    place = tmp_path / "heads.json"
    random_scores(12).save(place)
    forging.edit_json(place, **change)
    refused(lambda: HeadScores.load(place), str(place), match)


@pytest.mark.parametrize(
    "content", ["", "hello", "[1, 2]", None, "\0\1"], ids=["empty", "text", "list", "truncated", "binary"]
)
def test_what_is_no_object_is_refused(content, tmp_path):
    place = tmp_path / "heads.json"
    random_scores(12).save(place)
    place.write_text(place.read_text()[:500] if content is None else content)
    refused(lambda: HeadScores.load(place), str(place), "damaged or not one of ours")


def test_a_missing_file_is_refused(tmp_path):
    refused(
        lambda: HeadScores.load(tmp_path / "none.json"),
        "none.json",
        "run `lowkey heads MODEL --kind r2 --out .*none.json`",
    )
    refused(lambda: HeadScores.load(tmp_path), str(tmp_path), "no such file")


def refused(call, *parts: str) -> None:
    with pytest.raises(LowkeyError, match=parts[-1]) as refusal:
        call()
    assert len(str(refusal.value).splitlines()) == 1 and all(
        part in str(refusal.value) for part in parts[:-1]
    )


def test_another_models_scores_are_refused(tmp_path, accepting):
    found = small(attached("llama"))
    found.save(tmp_path / "heads.json")
    assert torch.equal(HeadScores.load(tmp_path / "heads.json", attached("llama")).values, found.values)
    refused(
        lambda: HeadScores.load(tmp_path / "heads.json", pico.build("llama", initializer_range=0.1)),
        "this one is",
        "run `lowkey heads .*--kind r2` and pass its file",
    )


@pytest.mark.parametrize("change", [{"layers": [0, 2, 1]}, {"kv_heads": 2}])
def test_scores_that_do_not_cover_the_model_are_refused(change, tmp_path, accepting):
    small(attached("llama")).save(tmp_path / "heads.json")
    forging.edit_json(tmp_path / "heads.json", **change)
    refused(
        lambda: HeadScores.load(tmp_path / "heads.json", attached("llama")),
        "do not cover the layers and heads",
    )


# -- estimation


@pytest.fixture(scope="module")
def tiny():
    return load("tiny", "float32", "cpu")


@pytest.fixture
def accepting(monkeypatch):
    """Random models know nothing, so here every answer counts as right."""
    monkeypatch.setattr(retrieval._Job, "_is_right", lambda self, written, case: True)
    monkeypatch.setattr(retrieval._Job, "_is_over", lambda self, written, case: False)


def small(model, kind="r2", **changes) -> HeadScores:
    given = {"task": "facts", "haystack": TEXT, "cases": 10, "lengths": (200, 230), "depths": 3}
    return estimate_heads(model, pico.tokenizer(), kind=kind, **given | changes)


@torch.no_grad()
def by_hand(model, kind: str, case: Case, layers: tuple[int, ...]) -> list[list[float]]:
    """Scores (layers, H) of one case in plain loops, from the eager attention of the whole sequence at once."""
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
def test_so_are_those_of_a_model_that_answers(kind, tiny):
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
