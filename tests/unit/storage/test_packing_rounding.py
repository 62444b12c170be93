"""How close packed numbers are to what was stored."""

from __future__ import annotations

import pico
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_by_hand import BLOCK, LENGTH, PADS, D, close, group_size, packed
from pico import attached, feed, prompt, real, stock

import lowkey
from lowkey.cache.cache import cache_of
from lowkey.core.types import LowkeyError, identity_factors
from lowkey.models import families
from lowkey.storage.codec import LowRank
from lowkey.storage.coded import CodedLayer
from lowkey.storage.packing import SCHEMES, PerChannel, PerToken, Unpacked, joined_parts

# -- rounding


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([packing(bits) for packing in (PerToken, PerChannel) for bits in (2, 4, 8)]),
    st.sampled_from([1, 5, 10, 33, 48, 80]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 99),
)
def test_what_comes_back_is_within_half_a_step(packing, width, dtype, seed):
    """And within the rounding of what comes back."""
    generator = torch.Generator().manual_seed(seed)
    x = (
        torch.randn(2, 1, 64, width, generator=generator) * 10 + torch.randn(width, generator=generator) * 30
    ).to(dtype)
    parts = packing.pack(x)
    back, scale = packing.unpack(parts, width), parts[1].float()
    assert back.shape == x.shape and back.dtype == dtype
    if isinstance(packing, PerChannel):
        step = scale.repeat_interleave(BLOCK, 3).mT
    else:
        step = scale.repeat_interleave(group_size(width, packing.bits), 3)[..., :width]
    away, own = (back.float() - x.float()).abs(), (x.float().abs() + step) * torch.finfo(dtype).eps / 2
    assert (away <= step / 2 * 1.001 + own).all()


@pytest.mark.parametrize(
    "packing",
    [PerToken(2), PerToken(4), PerToken(8), PerChannel(2), PerChannel(4), PerChannel(8), Unpacked()],
    ids=str,
)
@pytest.mark.parametrize("width", [5, 33, 48])
def test_what_is_joined_is_what_is_packed_at_once(packing, width):
    x = torch.randn(2, 3, 96, width, generator=torch.Generator().manual_seed(0))
    parts = packing.pack(x[:, :, :0])
    for piece in x.split([32, 64], 2):
        parts = joined_parts(parts, packing.pack(piece), packing.axis)
    assert all(torch.equal(a, b) for a, b in zip(parts, packing.pack(x), strict=True))
    assert torch.equal(packing.unpack(parts, width), packing.unpack(packing.pack(x), width))
    assert packing.unpack(packing.pack(x[:, :, :0]), width).shape == (2, 3, 0, width)


# -- quality


def error(model, reference, name):
    ids = prompt(LENGTH)
    return float((feed(model, ids, packed(model, name)) - reference).norm() / reference.norm())


def test_error_grows_as_bits_fall_from_eight_to_two():
    reference = feed(stock("llama"), prompt(LENGTH))
    found = {name: error(attached("llama"), reference, name) for name in SCHEMES}
    assert all(found[n] < 0.02 for n in found if n.endswith("8")), found
    assert all(0.02 < found[n] < 0.3 for n in found if n.endswith("4")), found
    assert all(0.1 < found[n] < 1.0 for n in found if n.endswith("2")), found


@pytest.mark.parametrize("head_dim", [16, 48])
def test_hadamard_without_rounding_is_exact(head_dim):
    """48: blocks of 32 and 16."""
    model = lowkey.attach(pico.build("llama", head_dim=head_dim))
    ids, reference = prompt(LENGTH), feed(model, prompt(LENGTH))
    codec = {
        i: LowRank(identity_factors(head_dim).hadamard_rotated(), "post_rope", families.rope(model, i))
        for i in range(3)
    }
    close(feed(model, ids, cache_of(model, lambda i: CodedLayer(codec[i]))), reference, 1e-5)
    assert 1e-4 < error(model, reference, "hadamard8") < 0.02


def with_outliers(size):
    """The same function: one pair of key channels of each head `size` times larger, and the query's as much
    smaller.
    """
    model = pico.build("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            for linear, factor in ((layer.self_attn.k_proj, size), (layer.self_attn.q_proj, 1 / size)):
                # a pair that rotates together
                linear.weight.view(-1, D, pico.HIDDEN)[:, [3, 3 + D // 2]] *= factor
    return model


def test_outlier_channels_spoil_only_packing_per_token():
    """Why KIVI packs keys per channel (arXiv:2402.02750) and Palu rotates them (arXiv:2407.21118)."""
    reference = feed(stock("llama"), prompt(LENGTH))
    model = lowkey.attach(with_outliers(30.0))
    close(feed(model, prompt(LENGTH), lowkey.make_cache(model)), reference, 1e-4)
    found = {name: error(model, reference, name) for name in ("int4", "kivi4", "hadamard4")}
    plain = {name: error(attached("llama"), reference, name) for name in found}
    assert found["kivi4"] < 1.2 * plain["kivi4"] < found["int4"] / 2, (found, plain)
    assert found["hadamard4"] < 0.8 * found["int4"], (found, plain)


@pytest.mark.parametrize("form", ["plain", "pre"])
def test_bf16_adds_its_own_rounding_and_no_more(name, form):
    ids, reference = prompt(LENGTH), feed(stock("llama"), prompt(LENGTH), pads=PADS)
    half = lowkey.attach(pico.build("llama").bfloat16())
    cache = packed(half, name, form)
    ours = feed(half, ids, cache, PADS, [60, 1, 39])
    assert cache.nbytes() == cache.predicted_nbytes()
    whole, own = (
        feed(attached("llama"), ids, packed(attached("llama"), name, form), PADS),
        feed(half, ids, pads=PADS),
    )
    off = [real(x.float() - reference, PADS).norm() for x in (ours, whole, own)]
    assert off[0] < 1.3 * (off[1] + off[2])


def test_an_unknown_scheme_is_refused():
    with pytest.raises(LowkeyError, match=r"bits 'kivi3'.*int8"):
        packed(attached("llama"), "kivi3")
