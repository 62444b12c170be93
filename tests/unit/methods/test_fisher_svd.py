"""FisherSVD: maps in the metric of the model's loss, against gradients of the stock model."""

from __future__ import annotations

from functools import cache
from itertools import chain, product

import pico
import pytest
import torch
from fitted_methods import prepared
from pico import HEAD_DIM, LAYERS, VOCAB
from statistics_by_hand import activations
from torch.nn.functional import cross_entropy

import lowkey
from lowkey.allocation.allocators import Spectrum
from lowkey.allocation.profile import Profile
from lowkey.core import files
from lowkey.core.types import LowkeyError
from lowkey.methods import KQSVD, CalibrationContext, FisherSVD
from lowkey.models import families
from lowkey.probes import gradients, model_probe
from lowkey.storage.codec import LowRank
from lowkey.storage.coded import CodedLayer
from lowkey.storage.exact import NO_EXACT_TOKENS, Exact

ROWS, HELD, KV_HEADS = pico.prompt(20, batch=6), 2, 4


def context(name="llama", layout="pre_rope", **kwargs):
    return CalibrationContext(pico.attached(name), ROWS, HELD, layout, [4, 8, 16], 0, **kwargs)


@cache
def moments(layout="pre_rope", exact=NO_EXACT_TOKENS):
    return gathered(layout=layout, exact=exact)


def gathered(layout="pre_rope", exact=NO_EXACT_TOKENS, **kwargs):
    return gradients.gather_gradient_moments(pico.attached("llama"), ROWS[:-HELD], layout, exact, 0, **kwargs)


# -- exact tokens while training


@pytest.mark.parametrize("layout", ["pre_rope", "post_rope"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3-partial"])
@pytest.mark.parametrize("exact", [Exact(3, 5), Exact(0, 5), Exact(2, 0), Exact()])
def test_training_sees_exact_tokens_as_a_cache_does(name, exact, layout):
    """The cache layer itself is the oracle, which stores and selects tokens in its own way."""
    model = pico.attached(name)
    shape = families.geometry(model)
    maps = {i: pico.factors(shape.kv_heads, 5, 7) for i in shape.compressible}
    past = lowkey.make_cache(model)
    for i, f in maps.items():
        past.layers[i] = CodedLayer(LowRank(f, layout, families.rope(model, i)), exact)
    with torch.no_grad():
        found = model_probe.logits(model, ROWS, model_probe.reconstructions(model, maps, layout), exact)
        reference = model(ROWS, past_key_values=past).logits
    assert torch.allclose(found, reference, atol=2e-4)
    if exact.sinks or exact.recent:
        with torch.no_grad():
            plain = model_probe.logits(model, ROWS, model_probe.reconstructions(model, maps, layout))
        assert (
            torch.allclose(found[:, :3], pico.feed(pico.stock(name), ROWS)[:, :3], atol=2e-4)
            or not exact.recent
        )
        assert not torch.allclose(found, plain, atol=1e-3)


# -- the moments


def test_the_gradients_are_the_stock_models():
    """Of what k_proj and v_proj put out, for labels drawn again."""
    model, found = pico.stock("llama"), moments()
    sums = {(i, side): torch.zeros(64, 64, dtype=torch.float64) for i in range(LAYERS) for side in ("k", "v")}
    kept = {}

    def keeping(key):
        return lambda module, given, out: kept.update({key: out}) or out.retain_grad()

    hooks = [
        getattr(layer.self_attn, f"{side}_proj").register_forward_hook(keeping((i, side)))
        for i, layer in enumerate(model.model.layers)
        for side in ("k", "v")
    ]
    for n, row in enumerate(ROWS[:-HELD]):
        logits = model(row.unsqueeze(0), use_cache=False).logits[0]
        labels = torch.multinomial(
            logits.detach().softmax(-1), 1, generator=torch.Generator().manual_seed(n)
        )[:, 0]
        cross_entropy(logits, labels, reduction="sum").backward()
        for key, out in kept.items():
            sums[key] += (out.grad[0].mT @ out.grad[0]).double()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    for (i, side), expected in sums.items():
        got = found[i]["key_gradients" if side == "k" else "value_gradients"]
        assert torch.allclose(got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_the_moments_are_those_of_what_is_stored():
    for name, of in (("keys", "keys_pre"), ("values", "values")):
        rows = activations("llama", 1, ROWS[:-HELD])[of].flatten(1).double()
        assert torch.allclose(moments()[1][name], rows.mT @ rows, rtol=1e-4, atol=1e-4)


def test_tokens_that_stay_exact_have_no_part():
    """No gradient reaches them, and they are left out of the moments; a window that they nearly fill counts
    whole.
    """
    exact = Exact(2, 4)
    found = gradients.window_gradients(pico.attached("llama"), ROWS[:1], "pre_rope", exact, 0)
    for layer in found.values():
        for gradient in layer[2:]:
            sizes = gradient.norm(dim=(1, 3))[0]
            assert not sizes[:2].any() and not sizes[-4:].any() and bool((sizes[2:-4] > 0).all())
    rows = (
        torch.cat([x[0].transpose(1, 2)[:, 2:16].flatten(2) for x in by_window(exact, 0)])
        .flatten(0, 1)
        .double()
    )
    assert torch.allclose(moments(exact=exact)[0]["keys"], rows.mT @ rows, rtol=1e-4, atol=1e-4)
    wide = moments(exact=Exact(4, 8))[1]
    assert all(torch.equal(wide[name], moments()[1][name]) for name in wide)


def by_window(exact, layer):
    return [
        gradients.window_gradients(pico.attached("llama"), row[None], "pre_rope", exact, n)[layer]
        for n, row in enumerate(ROWS[:-HELD])
    ]


def test_the_pass_leaves_the_model_alone():
    model = pico.attached("llama")
    before = torch.random.get_rng_state()
    gathered()
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_interrupted_pass_goes_on_to_the_same_moments(tmp_path, monkeypatch):
    monkeypatch.setattr(gradients, "WINDOWS_BETWEEN_SAVES", 1)
    seen = []

    def stopping(rows, text, total=None):
        for n, row in enumerate(rows):
            seen.append(n)
            if len(seen) == 3:
                raise KeyboardInterrupt
            yield row

    with pytest.raises(KeyboardInterrupt):
        gathered(work=tmp_path, progress=stopping)
    assert int(files.read_work(tmp_path, "gradients")["done"]) == 2
    seen.clear()
    found = gathered(work=tmp_path, progress=lambda rows, text, total=None: seen.append(total) or rows)
    assert seen == [2]
    assert all(
        torch.equal(found[i][name], moments()[i][name]) for i, name in product(range(LAYERS), moments()[0])
    )


def test_damaged_moments_are_refused(tmp_path):
    gathered(work=tmp_path)
    tensors = files.read_work(tmp_path, "gradients")
    files.write_work(tmp_path, "gradients", tensors | {"1.keys": torch.zeros(3, 3, dtype=torch.float64)})
    with pytest.raises(LowkeyError, match=r"'1\.keys'.*damaged"):
        gathered(work=tmp_path)
    files.write_work(tmp_path, "gradients", tensors | {"done": torch.tensor(9)})
    with pytest.raises(LowkeyError, match="9 of 4 windows"):
        gathered(work=tmp_path)


# -- the maps


def lost(down, up, moment, fisher):
    """tr(F E C E^T), E = I - P for row vectors k P."""
    error = torch.eye(len(moment), dtype=torch.float64) - down.double() @ up.double()
    return float((error @ fisher @ error.mT @ moment).trace())


def maps(basis, rank):
    down, up = basis.at(rank)
    t = basis.merge
    return down[0], torch.cat(list(up[:t]), -1)


@pytest.mark.defines("methods", "fisher-svd")
@pytest.mark.parametrize("rank", [1, 4, 12])
def test_no_maps_of_this_rank_lose_less(rank):
    """Neither KQ-SVD's nor any near the optimum; and what is lost is the sum of the energies beyond."""
    found, generator = FisherSVD().tune({}, context())[1], torch.Generator().manual_seed(0)
    for basis, of, by in ((found.keys, "keys", "key_gradients"), (found.values, "values", "value_gradients")):
        c, f = moments()[1][of], moments()[1][by]
        down, up = maps(basis, rank)
        least = lost(down, up, c, f)
        tail = float(basis.spectrum[0, rank:].sum())
        assert least == pytest.approx(tail, rel=2e-3, abs=1e-6 * float((f @ c).trace()))
        for _ in range(5):
            noise = [1e-2 * x.abs().mean() * torch.randn(x.shape, generator=generator) for x in (down, up)]
            assert lost(down + noise[0], up + noise[1], c, f) > least
        other = getattr(
            KQSVD(group=KV_HEADS).fit(*prepared("llama", "pre_rope", 1), [4], 0),
            "keys" if of == "keys" else "values",
        )
        assert lost(*maps(other, rank), c, f) > 1.01 * least


@pytest.mark.parametrize("group", [0, 1, 2, 4])
def test_heads_in_groups(group):
    found = FisherSVD(group=group).tune({}, context())[0]
    assert found.keys.merge == found.values.merge == (group or KV_HEADS)
    assert found.keys.spectrum.shape == (KV_HEADS // (group or KV_HEADS), HEAD_DIM)
    with pytest.raises(LowkeyError, match="group 3"):
        FisherSVD(group=3).candidates(KV_HEADS, HEAD_DIM, [4])


def test_a_plan_from_text_repeats_and_has_its_exact_tokens(tmp_path):
    text = "".join(chr(32 + (i * i + 7 * i) % 95) for i in range(1000))

    def plan(**kwargs):
        options = {
            "method": FisherSVD(),
            "budget": "40%",
            "sample": lowkey.Sample(windows=8, length=24),
            **kwargs,
        }
        return lowkey.calibrate(pico.attached("llama"), pico.tokenizer(), text, **options)

    first, again, exact = plan(), plan(work=tmp_path), plan(sinks=2, recent=4, work=tmp_path)
    assert first.allocator["name"] == "spectrum" and first.layout == "pre_rope"
    assert first.bytes_per_token(4) <= 0.4 * 2 * HEAD_DIM * KV_HEADS * 4 * LAYERS
    assert all(
        torch.equal(a.k_down, b.k_down) and torch.equal(a.v_up, b.v_up) for a, b in pairs(first, again)
    )
    assert not all(torch.equal(a.v_down, b.v_down) for a, b in pairs(first, exact))


def pairs(one, other):
    return zip(one.factors.values(), other.factors.values(), strict=True)


@pytest.mark.parametrize("name", ["gemma3_text", "qwen3", "phi3-partial"])
def test_sliding_layers_norms_and_partial_rotation(name):
    found = FisherSVD().tune({}, context(name))
    model = pico.attached(name)
    assert list(found) == list(families.geometry(model).compressible)
    full = {i: b.at(HEAD_DIM, HEAD_DIM) for i, b in found.items()}
    with torch.no_grad():
        out = model_probe.logits(model, ROWS, model_probe.reconstructions(model, full, "pre_rope"))
    assert out.shape[-1] == VOCAB and torch.allclose(out, pico.feed(pico.stock(name), ROWS), atol=2e-3)


# -- ranks by energies


def profile(spectra, choices=(1, 2, 3, 4)):
    return Profile((4,), [[]] * len(spectra), 2, 4, spectra, choices=choices)


SPECTRA = [
    ([[9.0, 5, 1, 0.1], [4.0, 1, 1, 0]], [[2.0, 1, 0.5, 0.25], [1.0, 0.5, 0, 0]]),
    ([[0.3, 0.2, 0.1, 0]] * 2, [[8.0, 7, 6, 5]] * 2),
]


def beyond(ranks):
    sides = [side for layer in SPECTRA for side in layer]
    return sum(sum(head[r:]) for side, r in zip(sides, chain(*ranks), strict=True) for head in side) / sum(
        map(sum, chain(*sides))
    )


@pytest.mark.defines("rank allocators", "spectrum")
@pytest.mark.parametrize("choices", [(1, 2, 3, 4), (2, 4)])
@pytest.mark.parametrize("room", [8, 9, 10, 12, 15, 16])
def test_the_least_energy_is_left_out_within_the_budget(room, choices):
    """Against every choice there is."""
    p, unit = profile(SPECTRA, choices), 2 * 4
    found = Spectrum().under_bytes(p, room * unit)
    every = [((a, b), (c, d)) for a, b, c, d in product(choices, repeat=4) if a + b + c + d <= room]
    assert p.bytes_per_token(found) <= room * unit and Spectrum().bounded_value(p, found) == pytest.approx(
        beyond(found)
    )
    assert beyond(found) == pytest.approx(min(map(beyond, every)))


@pytest.mark.parametrize("error", [0.0, 0.01, 0.05, 0.3, 1.0])
def test_the_fewest_ranks_within_an_error(error):
    found = Spectrum().under_error(profile(SPECTRA), error)
    every = [
        ((a, b), (c, d))
        for a, b, c, d in product((1, 2, 3, 4), repeat=4)
        if beyond(((a, b), (c, d))) <= error + 1e-9
    ]
    assert beyond(found) <= error + 1e-9 and sum(map(sum, found)) == min(
        sum(map(sum, ranks)) for ranks in every
    )


def test_bases_without_energies_are_refused():
    with pytest.raises(LowkeyError, match=r"'spectrum'.*no energy spectrum"):
        Spectrum().under_bytes(profile([([[]], [[]])]), 100)
