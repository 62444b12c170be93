"""Predicted attention sinks, in models with planted massive activations."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import forging
import pico
import pytest
import torch
from commands import done, printed
from packing_by_hand import close, oracle, plan
from pico import feed, prompt, real

import lowkey
from lowkey import Exact
from lowkey.calibration.sinks import (
    channel_prominence,
    find_sinks,
    fixed_points,
    locate_sinks,
    sink_kinds,
    stable_channels,
)
from lowkey.core.types import LowkeyError
from lowkey.models import families
from lowkey.models.loading import load
from lowkey.models.projections import projection_parts
from lowkey.storage.stored_tokens import EMPTY

# a channel of the residual stream, and the tokens that are huge in it
CHANNEL, MASSIVE = 7, torch.tensor([5, 11])
LENGTH, PADS = 60, [23, 0]
AT = [[30, 41, 58], [20, 33]]  # where the tokens are, row by row


def plant(model):
    """Keys follow the channel, too, so that queries depend on such a token, and on how it is stored."""
    with torch.no_grad():
        model.get_input_embeddings().weight[MASSIVE, CHANNEL] = 300.0
        for i in range(pico.LAYERS):
            part = projection_parts(model, i)[1]
            part.linear.weight[part.rows, CHANNEL] *= 5
    return model


@cache
def planted(name="llama"):
    return lowkey.attach(plant(pico.build(name)))


def text(at, length=LENGTH, seed=0):
    """Ordinary tokens, and the massive ones in turn where they are wanted."""
    ids = prompt(length, batch=len(at), seed=seed)
    ids[torch.isin(ids, MASSIVE)] = 1
    for row, places in enumerate(at):
        for n, place in enumerate(places):
            ids[row, place] = MASSIVE[(row + n) % 2]
    return ids


CALIBRATION = text([[3], [10, 12], [17], [24], [31, 50], [38]], seed=3)


@cache
def rule(name="llama"):
    return find_sinks(planted(name), CALIBRATION)


def made(sinks, name="llama", **kwargs):
    bits, recent = kwargs.pop("bits", 4), kwargs.pop("recent", 0)
    return lowkey.make_cache(planted(name), bits=bits, exact=Exact(sinks, recent, rule=rule(name)), **kwargs)


def slots(layer, row):
    return [i for i in layer.sink_index[row].tolist() if i < EMPTY]


# -- what is found


@pytest.mark.parametrize("name", pico.NAMES)
def test_the_planted_channel_and_layer_are_found_in_every_family(name):
    found = rule(name)
    assert found.channels == (CHANNEL,) and found.emergence == 0
    assert tuple(found.layers) == families.geometry(planted(name)).compressible


@pytest.mark.parametrize("name", pico.NAMES)
def test_the_sinks_are_the_planted_tokens_and_no_others(name):
    """In another text, mid-sequence, in padded rows, in every layer."""
    cache = made(4, name)
    feed(planted(name), text(AT), cache, PADS)
    for i in rule(name).layers:
        assert [slots(cache.layers[i], row) for row in range(2)] == AT


def test_located_are_the_planted_tokens_in_every_layer():
    rows = text(AT)
    found = locate_sinks(planted(), rows, rule(), batch=1)
    assert found.keys() == rule().layers.keys()
    assert all(torch.equal(x, torch.isin(rows, MASSIVE)) for x in found.values())


def test_the_command_tells_sinks_that_are_not_the_first_token(tmp_path):
    """Tokens 5 and 11 are the characters # and ) of the tokenizer."""
    model, tokenizer = plant(pico.build("llama", pad_token_id=None)), pico.tokenizer()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    signs = "".join(tokenizer.decode([int(i)]) for i in MASSIVE)
    (tmp_path / "text").write_text("".join(f"the cat sat on the mat{signs[n % 2]} and " for n in range(60)))
    words = ("sinks", tmp_path / "model", "--data", tmp_path / "text", "--context", 48, "--windows", 4)
    told = printed(*words)
    assert told["channels"] == [CHANNEL] and told["layers"] and told["tokens"]
    assert {t["token"] for t in told["tokens"]} == set(signs) and all(
        t["position"] > 0 for t in told["tokens"]
    )
    assert all(w["first"] == 0 and w["later"] == len(told["tokens"]) for w in told["layers"].values())
    assert signs[0] in done(*words).out


def test_the_command_says_why_there_are_none(tmp_path):
    told = printed("sinks", pico.save(tmp_path / "model", pad_token_id=None), "--context", 32)
    assert told["layers"] == {} and "no attention sinks to predict" in told["why"]


def test_sinks_that_emerge_in_later_layers_are_found_there():
    """A neuron of the first layer's MLP that only the planted tokens wake writes the channel."""
    model = pico.build("llama")
    with torch.no_grad():
        first, embedded = model.model.layers[0], model.get_input_embeddings().weight
        embedded[:, 9] = 0.0
        first.self_attn.o_proj.weight[9] = 0.0
        embedded[MASSIVE, 9] = 2.0
        for linear in (first.mlp.gate_proj, first.mlp.up_proj):
            linear.weight[0] = 0.0
            linear.weight[0, 9] = 1.0
        first.mlp.down_proj.weight[:, 0] = 0.0
        first.mlp.down_proj.weight[CHANNEL, 0] = -60.0
    lowkey.attach(model)
    found = find_sinks(model, CALIBRATION)
    assert found.channels == (CHANNEL,) and found.emergence == 1 and list(found.layers) == [1, 2]
    cache = lowkey.make_cache(model, bits=4, exact=Exact(3, rule=found))
    feed(model, text(AT), cache, PADS)
    assert [slots(cache.layers[1], row) for row in range(2)] == AT
    assert cache.layers[0].sink_index.tolist() == [[23, 24, 25], [0, 1, 2]], (
        "before the emergence: the first tokens"
    )


@pytest.mark.parametrize(
    "make",
    [lambda: (pico.attached("llama"), CALIBRATION), lambda: (load("tiny", "float32", "cpu")[0], CALIBRATION)],
)
def test_a_model_without_massive_activations_has_no_sink_rule(make):
    model, rows = make()
    with pytest.warns(
        UserWarning, match=r"times the median, and none is more than 100 times.*Exact\(sinks=n\)"
    ):
        assert find_sinks(model, rows) is None


def test_tokens_without_a_place_of_their_own_give_no_rule():
    """Where values say nothing, they do not say which tokens are sinks."""
    model = plant(pico.build("llama"))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.zero_()
    with pytest.warns(UserWarning, match=r"channels \[7\] are outliers, but"):
        assert find_sinks(lowkey.attach(model), CALIBRATION) is None


def test_prominence_is_the_largest_over_the_median():
    model = planted()
    with torch.no_grad():
        hidden = model(CALIBRATION, output_hidden_states=True).hidden_states[:3]
    expected = torch.stack([h.abs().amax((0, 1)) / h.abs().median() for h in hidden])
    assert torch.allclose(channel_prominence(model, CALIBRATION), expected, rtol=1e-3)


def test_a_stable_channel_stays_an_outlier():
    outliers = torch.zeros(6, 4, dtype=torch.bool)
    outliers[2:, 0] = True
    outliers[1, 1] = True  # once, and never again
    outliers[3:5, 2] = True  # gone in the last layer, as massive activations often are
    assert stable_channels(outliers) == (2, [0, 2])
    assert stable_channels(outliers[:, 3:]) == (0, [])


def test_kinds_of_sinks_are_told_by_channel_and_sign():
    hidden = torch.ones(20, 64)
    hidden[0, 3], hidden[1, 3], hidden[2, 8], hidden[3, 5], hidden[4, 3] = 500.0, -500.0, 500.0, 500.0, 50.0
    kinds = sink_kinds(hidden, [3, 8], 100.0).tolist()
    assert len(set(kinds[:3])) == 3 and min(kinds[:3]) > 0 and kinds[3:] == [0, -1, *[0] * 15]


def test_an_outlier_channel_does_not_hide_the_sinks():
    """As in SmolLM2-135M from layer 12 on: 50 times the median everywhere, 14,000 times in the sinks, a stray
    110.
    """
    hidden = torch.randn(100, 64, generator=torch.Generator().manual_seed(0)).sign()
    hidden[:, 3] = torch.linspace(40, 60, 100)
    hidden[7, 3], hidden[50, 3], hidden[51, 3] = 14_000.0, 13_000.0, 110.0
    kinds = sink_kinds(hidden, [3], 100.0)
    assert (kinds > 0).nonzero().flatten().tolist() == [7, 50] and int((kinds == 0).sum()) == 98


def test_points_lie_where_no_others_do_also_in_their_midst():
    """Sinks near zero, amid values of large norm: no half-space separates them, but a ball does."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(200, 2, 8, generator=generator)
    kinds = torch.zeros(200, dtype=torch.long)
    kinds[:20] = 1
    values[:20] *= 0.02
    points = fixed_points(values, kinds)
    assert torch.equal(points.match(values.permute(1, 0, 2).unsqueeze(0))[0], kinds > 0)
    own = values[:20] - points.centres[0]
    assert (
        own.flatten(1).norm(dim=1).max()
        < points.radius[0]
        < (values[20:] - points.centres[0]).flatten(1).norm(dim=1).min()
    )
    assert fixed_points(torch.randn(200, 2, 8, generator=generator), kinds) is None
    assert fixed_points(values, torch.ones_like(kinds)) is None, "nothing to tell them from"


def test_two_kinds_of_sinks_have_a_point_each():
    model = plant(pico.build("llama"))
    with torch.no_grad():
        model.get_input_embeddings().weight[MASSIVE[1], CHANNEL] *= -1
    lowkey.attach(model)
    found = find_sinks(model, CALIBRATION)
    assert all(len(points.radius) == 2 for points in found.layers.values())
    cache = lowkey.make_cache(model, bits=4, exact=Exact(4, rule=found))
    feed(model, text(AT), cache, PADS)
    assert [slots(cache.layers[2], row) for row in range(2)] == AT


# -- what is kept


@pytest.mark.parametrize(
    "splits",
    [[60], [25, 15, 20], [10, 10, 40], [35] + [1] * 25],
    ids=["one-shot", "chunks", "in-the-padding", "by-one"],
)
def test_how_tokens_arrive_does_not_matter(splits):
    cache, whole = made(2, recent=3), made(2, recent=3)
    ours = feed(planted(), text(AT), cache, PADS, splits)
    close(real(ours, PADS), real(feed(planted(), text(AT), whole, PADS), PADS), 2e-2)
    assert [slots(cache.layers[0], row) for row in range(2)] == [at[:2] for at in AT], "the first two"
    for one, other in zip(cache.layers, whole.layers, strict=True):
        assert torch.equal(one.sink_index, other.sink_index) and torch.allclose(
            one.sink_k, other.sink_k, atol=1e-2
        )


@pytest.mark.parametrize("form", ["plain", "pre", "merged-pre"])
@pytest.mark.parametrize(("bits", "recent"), [("int4", 0), ("int4", 5), ("kivi4", 3), ("hadamard8", 4)])
def test_a_predicted_sink_is_seen_exactly_and_the_rest_as_stored(bits, recent, form):
    """Against whole matrices rounded by loops; in every layout, whatever order the heads are in."""
    exact = Exact(2, recent, rule=rule())
    cache = lowkey.make_cache(planted(), plan(planted(), form), bits=bits, exact=exact)
    expected = oracle(
        text(AT), bits, form, exact, PADS, [LENGTH], plant(pico.build("llama")), [at[:2] for at in AT]
    )
    close(
        real(feed(planted(), text(AT), cache, PADS), PADS),
        real(expected, PADS),
        2e-2 if bits.endswith("4") else 2e-3,
    )


def test_the_rule_is_better_than_first_tokens_for_a_middle_sink():
    """What KVSink is for; at the same bytes."""
    ids, model = text([[20], [13], [30], [17]], seed=5), plant(pico.build("llama"))
    reference, error = feed(model, ids), {}
    for name, exact in (("first", Exact(2)), ("predicted", Exact(2, rule=rule()))):
        cache = lowkey.make_cache(planted(), bits=4, exact=exact)
        error[name] = float(
            (feed(planted(), ids, cache) - reference)[:, 31:].norm() / reference[:, 31:].norm()
        )
    assert error["predicted"] < 0.8 * error["first"], error


def test_when_the_sinks_come_first_the_rule_is_the_first_tokens():
    ids = text([[0, 1], [0, 1]])
    first = lowkey.make_cache(planted(), bits=4, exact=Exact(2))
    # masks and no masks sum in another order
    torch.testing.assert_close(
        feed(planted(), ids, made(2)), feed(planted(), ids, first), atol=1e-4, rtol=1e-4
    )


def test_bf16_finds_the_same_tokens():
    model = lowkey.attach(plant(pico.build("llama")).bfloat16())
    found = find_sinks(model, CALIBRATION)
    cache = lowkey.make_cache(model, bits=4, exact=Exact(4, rule=found))
    feed(model, text(AT), cache, PADS, [40, 1, 19])
    assert all([slots(layer, row) for row in range(2)] == AT for layer in cache.layers)
    assert cache.nbytes() == cache.predicted_nbytes()


def test_held_bytes_by_hand():
    """What the first tokens would take."""
    cache, first = made(3), lowkey.make_cache(planted(), bits=4, exact=Exact(3))
    for piece in text(AT).split([20, 39, 1], 1):
        feed(planted(), piece, cache)
        feed(planted(), piece, first)
        assert cache.nbytes() == cache.predicted_nbytes() == first.nbytes()


def test_reordering_takes_the_sinks_along():
    cache, straight, more = made(3), made(3), text([[2], [3]], 8, seed=9)
    feed(planted(), text(AT), cache, PADS)
    cache.reorder_cache(torch.tensor([1, 0]))
    feed(planted(), text(AT).flip(0), straight, PADS[::-1])
    close(feed(planted(), more, cache, PADS[::-1]), feed(planted(), more, straight, PADS[::-1]), 2e-2)
    assert [slots(cache.layers[0], row) for row in range(2)] == [[20, 33, LENGTH + 2], [30, 41, 58]]


# -- on disk, and refusals


def test_the_rule_travels_with_a_saved_cache(tmp_path):
    cache, more = made(3, recent=2), text([[2], [3]], 8, seed=9)
    feed(planted(), text(AT), cache, PADS, [40, 20])
    cache.save(tmp_path / "c")
    again = lowkey.load_cache(tmp_path / "c", planted())
    kept = again.origin.exact.rule
    assert (kept.channels, kept.emergence) == (rule().channels, rule().emergence)
    assert all(
        torch.equal(kept.layers[i].centres, p.centres) and torch.equal(kept.layers[i].radius, p.radius)
        for i, p in rule().layers.items()
    )
    assert torch.equal(feed(planted(), more, again, PADS), feed(planted(), more, cache, PADS))
    assert [slots(again.layers[1], row) for row in range(2)] == [[30, 41, 58], [20, 33, LENGTH + 3]]
    again.save(tmp_path / "d")


def test_a_rule_whose_layers_share_their_points_travels_too(tmp_path):
    points = next(iter(rule().layers.values()))
    shared = replace(rule(), layers=dict.fromkeys(rule().layers, points))
    cache = lowkey.make_cache(planted(), bits=8, exact=Exact(sinks=3, rule=shared))
    feed(planted(), text(AT), cache)
    cache.save(tmp_path / "c")
    kept = lowkey.load_cache(tmp_path / "c", planted()).origin.exact.rule.layers
    assert all(
        torch.equal(p.centres, points.centres) and torch.equal(p.radius, points.radius) for p in kept.values()
    )


def test_a_damaged_rule_is_refused(tmp_path):
    cache = made(3)
    feed(planted(), text(AT), cache, PADS)
    cache.save(tmp_path / "c")
    file = tmp_path / "c" / "cache.json"
    forging.edit_json(
        file, lambda about: about["exact"]["rule"].update(emergency=about["exact"]["rule"].pop("emergence"))
    )
    with pytest.raises(LowkeyError, match="damaged"):
        lowkey.load_cache(tmp_path / "c", planted())


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda: made(0), "sinks=0 keeps nothing"),
        (
            lambda: lowkey.make_cache(pico.attached("llama"), bits=4, exact=Exact(4, rule=rule())),
            "sink rule was made for model",
        ),
        (lambda: find_sinks(planted(), CALIBRATION, outlier_factor=1.0), r"outlier_factor 1\.0"),
    ],
)
def test_bad_input_is_one_clear_line(act, says):
    with pytest.raises(LowkeyError, match=says) as refused:
        act()
    assert "\n" not in str(refused.value)


def test_the_old_name_of_the_outlier_factor_warns():
    with pytest.warns(DeprecationWarning, match="outlier_factor"), pytest.raises(LowkeyError, match="0\\.5"):
        find_sinks(planted(), CALIBRATION, ratio=0.5)
