"""Recorded attention is what transformers computes; the scores of heads are those of the papers."""

from __future__ import annotations

import pico
import pytest
import torch
from head_recording import noise, random_scores, scores
from pico import attached, feed, prompt, stock
from transformers import DynamicCache

from lowkey.cache.cache import cache_of
from lowkey.heads.induction import estimate_echo
from lowkey.heads.needles import Case
from lowkey.heads.retrieval import SCORE_KINDS
from lowkey.heads.scores import spearman
from lowkey.models import families
from lowkey.storage.attention_recording import AttentionRecordingLayer

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
def test_recorded_weights_are_those_of_eager_attention(name):
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
def test_only_single_token_steps_are_recorded_and_counted():
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
