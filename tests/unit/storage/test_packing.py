"""Packed storage: every scheme on every form of keys and values, against whole matrices rounded by loops."""

from __future__ import annotations

import math
from dataclasses import asdict

import dense
import numpy as np
import pico
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pico import attached, feed, generate, prompt, real, stock
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

import lowkey
from lowkey import Exact
from lowkey.cache.cache import cache_of
from lowkey.core.types import LowkeyError, identity_factors
from lowkey.models import families
from lowkey.models.attention_interface import Call
from lowkey.models.fingerprint import model_fingerprint
from lowkey.plan.plan import Plan
from lowkey.storage.codec import LowRank, Plain
from lowkey.storage.coded import CodedLayer
from lowkey.storage.packing import SCHEMES, PerChannel, PerToken, Unpacked, joined_parts, scheme

BLOCK, D, HEADS = 32, pico.HEAD_DIM, 4
RECENT = {"kivi2": BLOCK, "kivi4": BLOCK, "kivi8": BLOCK}
# under kivi two blocks of the longer row have left the window, and one of the shorter, cut elsewhere
LENGTH, PADS = 100, [41, 0]
# a number between two steps may go to the other after a sum in another order
TOLERANCE = {2: 0.1, 4: 2e-2, 8: 2e-3}


def merged(t_k, t_v):
    return lambda m: {
        i: pico.merged_factors(HEADS, 5, 9, t_k, t_v, seed=i) for i in families.geometry(m).compressible
    }


FORMS = {  # (layout, factors of the layers)
    "plain": ("post_rope", None),
    "post": ("post_rope", lambda m: pico.layer_factors(m, 10, 5)),
    "pre": ("pre_rope", lambda m: pico.layer_factors(m, 5, 10, shared=True)),
    "merged": ("post_rope", merged(2, 4)),
    "merged-pre": ("pre_rope", merged(4, 2)),
}


def plan(model, form):
    layout, factors = FORMS[form]
    if factors is None:
        return None
    about = {"name": "pca", "parameters": {}}
    known = {"model": "pico", "model_sha256": model_fingerprint(model)}
    return Plan(
        factors(model),
        layout,
        about,
        about,
        "50%",
        asdict(families.geometry(model)),
        known,
        orthonormal=False,
    )


def packed(model, name, form="plain", exact=None):
    """exact: the scheme's own when None, and no sinks, so that most of these short texts is packed."""
    return lowkey.make_cache(model, plan(model, form), bits=name, exact=effective(name, exact))


def close(a, b, tolerance):
    """Nowhere further than a code that went the other way takes it, and mostly much closer."""
    error, size = (a - b).abs(), max(1.0, float(b.abs().max()))
    assert a.shape == b.shape
    assert error.max() <= tolerance * size and error.mean() <= tolerance * size / 20


@pytest.fixture(params=SCHEMES)
def name(request):
    return request.param


@pytest.fixture(params=FORMS)
def form(request):
    return request.param


def tolerance(name):
    return TOLERANCE[int(name[-1])]


def effective(name, exact):
    return exact or Exact(recent=RECENT.get(name, 0))


# -- the oracle: whole matrices, loops


def group_size(width, bits):
    """Channels that share a scale: at most 32, as even as can be, whole bytes."""
    size = math.ceil(width / math.ceil(width / 32))
    return size + -size % (8 // bits)


def rounded_group(x, bits):
    low, high = min(x), max(x)
    step = max(np.float32((high - low) / np.float32(2**bits - 1)), np.float32(1e-8))
    return [np.rint((value - low) / step) * step + low for value in x]


def rounded(latent, per_channel, bits):
    """(s, w), one row's real tokens; tokens that fill no block stay as they are, and no query sees them
    rounded.
    """
    x = latent.numpy().copy()
    tokens, width = x.shape
    if per_channel:
        for start in range(0, tokens - BLOCK + 1, BLOCK):
            for c in range(width):
                x[start : start + BLOCK, c] = rounded_group(x[start : start + BLOCK, c], bits)
        return torch.from_numpy(x)
    size = group_size(width, bits)
    for token in range(tokens):
        for c in range(0, width, size):
            x[token, c : c + size] = rounded_group(x[token, c : c + size], bits)
    return torch.from_numpy(x)


def hadamard(n):
    """Of blocks of powers of two: the sign is the parity of the common bits of row and column."""
    out, start = torch.zeros(n, n), 0
    for size in (1 << i for i in reversed(range(n.bit_length())) if n >> i & 1):
        for i in range(size):
            for j in range(size):
                out[start + i, start + j] = (-1) ** (i & j).bit_count() / math.sqrt(size)
        start += size
    return out


def through(x, down, up, mean, order, how):
    """(h, s, d) of one row, head by head into the latents of its group, rounded, and back."""
    h, _, d = x.shape
    t, order = down.shape[1] // d, range(h) if order is None else order.tolist()
    out = torch.empty_like(x)
    turn = hadamard(down.shape[2]) if how["turned"] else torch.eye(down.shape[2])
    for g in range(h // t):
        members = order[g * t : g * t + t]
        means = [mean[g * t + a] if mean is not None else 0.0 for a in range(t)]
        joint = torch.cat([x[j] - m for j, m in zip(members, means, strict=True)], 1)
        latent = rounded(joint @ down[g % len(down)] @ turn, how["per_channel"], how["bits"]) @ turn
        for a, j in enumerate(members):
            out[j] = latent @ up[(g * t + a) % len(up)] + means[a]
    return out


def exact_pairs(length, pads, exact, splits, block, sinks=None):
    """(b, t, s): as `dense.exact_pairs`, but tokens leave the window in whole blocks, counted from each row's
    first real token.
    sinks: indices of each row, in the place of its first real tokens."""
    sinks = sinks or [range(p, p + exact.sinks) for p in pads]
    piece = [i for i, n in enumerate(splits) for _ in range(n)]
    out = torch.zeros(len(pads), length, length, dtype=torch.bool)
    for row, pad in enumerate(pads):
        for i in range(pad, length):
            left = max(0, i + 1 - pad - exact.recent) // block * block
            for j in range(pad, i + 1):
                together = exact.prefill == "exact" and piece[i] == piece[j] and splits[piece[i]] > 1
                out[row, i, j] = j - pad >= left or j in sinks[row] or together
    return out


@torch.no_grad()
def oracle(ids, name, form, exact, pads, splits, model=None, sinks=None):
    """One forward of the whole text; `model` is the caller's own, its attention is replaced."""
    model = model or pico.build("llama")
    (layout, factors), bits, length = FORMS[form], int(name[-1]), ids.shape[1]
    maps = factors(model) if factors else {i: identity_factors(D) for i in range(pico.LAYERS)}
    mask, positions = pico.padding(pads, length)
    is_exact = exact_pairs(length, pads, exact, splits, BLOCK if name.startswith("kivi") else 1, sinks)

    def attention(module, q, k, v, attention_mask, *, scaling=None, softcap=None, **kwargs):
        f, near_k, near_v = maps[module.layer_idx], k.clone(), v.clone()
        turn = dense.rotations(model, module.layer_idx, positions, D) if layout == "pre_rope" else None
        how = {"bits": bits, "turned": name.startswith("hadamard")}
        for row, pad in enumerate(pads):
            keys = k[row, :, pad:]
            if turn is not None:
                keys = (keys.unsqueeze(-2) @ torch.linalg.inv(turn[row, pad:])).squeeze(-2)
            keys = through(
                keys, f.k_down, f.k_up, f.k_mean, f.order, {**how, "per_channel": name.startswith("kivi")}
            )
            near_k[row, :, pad:] = (
                keys if turn is None else (keys.unsqueeze(-2) @ turn[row, pad:]).squeeze(-2)
            )
            near_v[row, :, pad:] = through(
                v[row, :, pad:], f.v_down, f.v_up, f.v_mean, f.order, {**how, "per_channel": False}
            )
        return dense._attend(
            q,
            (k, near_k),
            (v, near_v),
            is_exact,
            dense._allowed(pads, length),
            scaling=scaling,
            softcap=softcap,
        )

    AttentionInterface.register("dense-packed", attention)
    AttentionMaskInterface.register("dense-packed", sdpa_mask)
    model.set_attn_implementation("dense-packed")
    return model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits


@pytest.mark.defines(
    "packings", "int8", "int4", "int2", "kivi8", "kivi4", "kivi2", "hadamard8", "hadamard4", "hadamard2"
)
@pytest.mark.parametrize("pads", [[0], PADS], ids=str)
def test_packed_storage_is_the_dense_definition(name, form, pads):
    model, ids = attached("llama"), prompt(LENGTH, batch=len(pads))
    expected = oracle(ids, name, form, effective(name, None), pads, [LENGTH])
    close(
        real(feed(model, ids, packed(model, name, form), pads), pads), real(expected, pads), tolerance(name)
    )


EXACTS = {"sinks": Exact(sinks=3), "both": Exact(3, 7), "prefill-exact": Exact(3, 7, "exact")}
SPLITS = [[LENGTH], [30, 20, 50], [45, 40] + [1] * 15]


@pytest.mark.parametrize("splits", SPLITS, ids=["one-shot", "chunks", "decoding"])
@pytest.mark.parametrize("exact", EXACTS.values(), ids=EXACTS)
@pytest.mark.parametrize(
    ("name", "form"), [("int4", "plain"), ("kivi4", "plain"), ("kivi4", "merged-pre"), ("hadamard4", "post")]
)
def test_exact_tokens_together_with_packing_are_the_dense_definition(name, form, exact, splits):
    model, ids = attached("llama"), prompt(LENGTH)
    expected = oracle(ids, name, form, exact, PADS, splits)
    close(
        real(feed(model, ids, packed(model, name, form, exact), PADS, splits), PADS),
        real(expected, PADS),
        tolerance(name),
    )


def test_every_scheme_and_form_differs_from_stock_by_more_than_the_tolerance(name, form):
    """Guards the tests above and below."""
    ids = prompt(LENGTH)
    error = feed(attached("llama"), ids, packed(attached("llama"), name, form)) - feed(stock("llama"), ids)
    assert error.abs().mean() > tolerance(name) / 20


# -- how tokens arrive does not matter


@pytest.mark.parametrize("splits", [[60, 40], [20, 20, 60]], ids=["chunks", "chunk-in-the-padding"])
def test_chunks_of_padded_rows_give_the_logits_of_one_shot(name, form, splits):
    model, ids = attached("llama"), prompt(LENGTH)
    ours, whole = (feed(model, ids, packed(model, name, form), PADS, pieces) for pieces in (splits, None))
    close(real(ours, PADS), real(whole, PADS), tolerance(name))


@pytest.mark.parametrize(
    ("name", "form"), [("int4", "plain"), ("kivi4", "plain"), ("kivi8", "merged-pre"), ("hadamard8", "post")]
)
def test_one_by_one_gives_the_logits_of_one_shot(name, form):
    model, ids = attached("llama"), prompt(LENGTH)
    ours, whole = (
        feed(model, ids, packed(model, name, form), PADS, pieces) for pieces in ([1] * LENGTH, None)
    )
    close(real(ours, PADS), real(whole, PADS), tolerance(name))


def test_a_padded_row_is_the_row_alone(name, form):
    """Blocks of tokens, too, begin at the row's first real token."""
    model, ids = attached("llama"), prompt(LENGTH)
    both = feed(model, ids, packed(model, name, form), PADS, [LENGTH - 2, 1, 1])
    for row, pad in enumerate(PADS):
        alone = feed(
            model, ids[row : row + 1, pad:], packed(model, name, form), splits=[LENGTH - pad - 2, 1, 1]
        )
        close(both[row, pad:], alone[0], tolerance(name))


@st.composite
def arrivals(draw):
    """(pads, splits, exact) of two rows."""
    length = draw(st.integers(1, 120))
    cuts = sorted(draw(st.sets(st.integers(1, max(1, length - 1)), max_size=4)) - {length})
    splits = [b - a for a, b in zip([0, *cuts], [*cuts, length], strict=True)]
    pads = [draw(st.integers(0, length - 1)), 0]
    return (
        pads,
        splits,
        Exact(
            draw(st.integers(0, 4)), draw(st.integers(0, 40)), draw(st.sampled_from(["compressed", "exact"]))
        ),
    )


def run(packing, states, pads, splits, exact):
    """Outputs (b, 2, 1, t, 8) of one layer for queries, keys and values (3, b, 2, t, 8), and the layer."""
    layer, out, start = CodedLayer(Plain(), exact, packing), [], 0
    mask, positions = pico.padding(pads, states.shape[3])
    for size in splits:
        stop = start + size
        q, k, v = states[:, :, :, start:stop]
        seen = torch.ones(size, stop, dtype=torch.bool).tril(start) & mask[:, None, :stop].bool()
        layer.update(k, v)
        out.append(layer.attend(k, v, Call(q.unsqueeze(2), seen, positions[:, start:stop], 0.3, None)))
        assert layer.nbytes() == layer.predicted_nbytes()
        start = stop
    return torch.cat(out, 3), layer


@settings(max_examples=80, deadline=None)
# what was stored before the row began is not taken back
@example(([40, 0], [38, 3, 50], Exact(recent=2)), (PerChannel(4), PerToken(4)))
@given(
    arrivals(),
    st.sampled_from([(PerChannel(4), PerToken(4)), (PerToken(8), PerChannel(8)), (PerToken(4), Unpacked())]),
)
def test_padding_and_company_change_nothing_whatever_arrives(arrival, packing):
    """One layer on its own: the same numbers go in, so that no code can go another way. With one token in a
    piece, both rows have one.
    """
    (pads, splits, exact), generator = arrival, torch.Generator().manual_seed(0)
    states = torch.randn(3, 2, 2, sum(splits), 8, generator=generator)
    together, layer = run(packing, states, pads, splits, exact)
    for row, pad in enumerate(pads):
        own, left = [], pad
        for size in splits:
            own.append(max(0, size - left))
            left = max(0, left - size)
        if exact.prefill == "exact" and any(a == 1 < b for a, b in zip(own, splits, strict=True)):
            continue  # a piece of several tokens of which the row has one: alone it is no chunk
        alone, _ = run(packing, states[:, row : row + 1, :, pad:], [0], [n for n in own if n], exact)
        assert torch.allclose(together[row, :, :, pad:], alone[0], atol=1e-5)
    layer.batch_select_indices(torch.tensor([1]))
    assert layer.nbytes() == layer.predicted_nbytes()


def test_what_a_query_may_not_see_is_no_padding():
    """A mask that hides a row's first tokens from some queries moves neither its blocks nor its sinks."""
    states, outs = torch.randn(3, 1, 2, 100, 8, generator=torch.Generator().manual_seed(0)), []
    for hidden in (0, 37):
        layer, start = CodedLayer(Plain(), Exact(sinks=2, recent=3), (PerChannel(4), PerToken(4))), 0
        for size in (60, 39, 1):
            q, k, v = states[:, :, :, start : start + size]
            start += size
            seen = torch.ones(1, size, start, dtype=torch.bool).tril(start - size)
            seen[..., : hidden * (start == 99)] = False
            layer.update(k, v)
            out = layer.attend(k, v, Call(q.unsqueeze(2), seen, None, 0.3, None))
        outs.append(out)
    assert torch.equal(*outs)


@pytest.mark.parametrize("form", ["plain", "merged-pre"])
def test_decoding_is_one_forward_of_the_decoded_text(name, form):
    model, ids = attached("llama"), prompt(50)
    new = generate(model, ids, 16, packed(model, name, form))
    whole = feed(model, torch.cat([ids, new], 1), packed(model, name, form))
    chosen = whole[:, 49:-1].gather(2, new.unsqueeze(2)).squeeze(2)
    assert (whole[:, 49:-1].amax(2) - chosen <= tolerance(name) * whole.abs().max()).all()


def test_generate_continues_a_cache_that_holds_an_earlier_turn(name):
    model, ids = attached("llama"), prompt(LENGTH, batch=1)
    cache = packed(model, name, exact=Exact(2, 4))
    feed(model, ids[:, :70], cache)
    ours = generate(model, ids, 10, cache)
    whole = feed(model, torch.cat([ids, ours], 1), packed(model, name, exact=Exact(2, 4)))
    chosen = whole[:, LENGTH - 1 : -1].gather(2, ours.unsqueeze(2)).squeeze(2)
    assert (whole[:, LENGTH - 1 : -1].amax(2) - chosen <= tolerance(name) * whole.abs().max()).all()


def test_exact_prefill_gives_stock_logits(name, form):
    model, ids = attached("llama"), prompt(LENGTH)
    cache = packed(model, name, form)
    cache.exact_prefill(True)
    reference = feed(stock("llama"), ids, pads=PADS)
    close(real(feed(model, ids, cache, PADS), PADS), real(reference, PADS), 1e-4)
    assert cache.nbytes() == cache.predicted_nbytes()


# -- rows, beams, copies on disk


def test_two_live_caches_do_not_disturb_each_other(name):
    model, first, second = attached("llama"), prompt(LENGTH), prompt(LENGTH, seed=1)
    a, b = packed(model, name), packed(model, name)
    mixed = [
        (feed(model, x, a, PADS), feed(model, y, b))
        for x, y in zip(first.split(25, 1), second.split(25, 1), strict=True)
    ]
    assert torch.equal(
        torch.cat([x for x, _ in mixed], 1), feed(model, first, packed(model, name), PADS, [25] * 4)
    )
    assert torch.equal(
        torch.cat([y for _, y in mixed], 1), feed(model, second, packed(model, name), None, [25] * 4)
    )


@pytest.mark.parametrize("form", ["plain", "merged-pre"])
@pytest.mark.parametrize("rows", [[1, 0], [1, 1]], ids=str)
def test_reordering_moves_everything_a_row_holds(name, form, rows):
    """Also when the row for which the other waited goes."""
    model, ids, more = attached("llama"), prompt(LENGTH), prompt(6, seed=1)
    cache, pads = packed(model, name, form), [PADS[r] for r in rows]
    feed(model, ids, cache, PADS)
    cache.reorder_cache(torch.tensor(rows))
    assert cache.nbytes() == cache.predicted_nbytes()
    straight = packed(model, name, form)
    feed(model, ids[rows], straight, pads)
    close(feed(model, more, cache, pads), feed(model, more, straight, pads), tolerance(name))
    assert cache.nbytes() == straight.nbytes()


def test_beams_are_scored_by_the_packed_cache(name):
    """The score of the best beam is that of its text, read once more from the beginning."""
    model, ids = attached("llama"), prompt(40)
    mask, _ = pico.padding([7, 0], 40)
    options = {
        "num_beams": 3,
        "max_new_tokens": 30,
        "min_new_tokens": 30,
        "do_sample": False,
        "length_penalty": 0.0,
    }
    out = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=packed(model, name),
        **options,
        return_dict_in_generate=True,
        output_scores=True,
    )
    logs = feed(model, out.sequences, packed(model, name), [7, 0])[:, 39:-1].log_softmax(-1)
    scores = logs.gather(2, out.sequences[:, 40:].unsqueeze(2)).sum((1, 2))
    assert torch.allclose(out.sequences_scores, scores, atol=0.1)


@pytest.mark.parametrize("form", ["plain", "merged-pre"])
def test_a_saved_cache_continues_with_identical_logits(tmp_path, name, form):
    model, more = attached("llama"), prompt(40, seed=4)
    cache = packed(model, name, form, Exact(2, 5, "exact"))
    feed(model, prompt(LENGTH), cache, PADS, [LENGTH - 3, 1, 1, 1])
    cache.save(tmp_path / "c")
    again = lowkey.load_cache(tmp_path / "c", model)
    assert again.nbytes() == cache.nbytes() == again.predicted_nbytes()
    expected = feed(model, more, cache, PADS, [1] * 10 + [30])
    assert torch.equal(feed(model, more, again, PADS, [1] * 10 + [30]), expected)


# -- bytes


def hand_bytes(name, side, heads, width, tokens, itemsize=4):
    """Of `tokens` stored tokens of `heads` latents of `width` numbers."""
    bits = int(name[-1])
    if side == "keys" and name.startswith("kivi"):
        return heads * width * (tokens // BLOCK) * (BLOCK * bits // 8 + 2 * itemsize)
    size = group_size(width, bits)
    return heads * tokens * math.ceil(width / 32) * (size * bits // 8 + 2 * itemsize)


SHAPES = {  # (heads, width) of keys and of values
    "plain": ((4, 16), (4, 16)),
    "post": ((4, 10), (4, 5)),
    "pre": ((4, 5), (4, 10)),
    "merged": ((2, 10), (1, 36)),
    "merged-pre": ((1, 20), (2, 18)),
}


@pytest.mark.parametrize("pads", [[0, 0], PADS], ids=str)
@pytest.mark.parametrize("exact", [None, Exact(3, 7)], ids=["default", "both"])
def test_held_bytes_are_the_predicted_bytes_and_those_by_hand(name, form, exact, pads):
    model, ids, seen = attached("llama"), prompt(LENGTH), 0
    cache = lowkey.make_cache(model, plan(model, form), bits=name, exact=exact)
    setting = Exact(4, 32) if exact is None and form == "plain" else effective(name, exact)
    for size in [2, 40, 1, 1, 56]:
        seen += size
        feed(model, ids[:, seen - size : seen], cache, pads)
        stored = max(0, seen - setting.recent)
        # the last row to have a block ready decides; one that has not begun may be the last
        if name.startswith("kivi"):
            stored = min(
                max(0, seen - (p % BLOCK if p < seen else BLOCK - 1) - setting.recent) // BLOCK * BLOCK
                for p in pads
            )
        row = sum(
            hand_bytes(name, side, *SHAPES[form][i], stored) for i, side in enumerate(("keys", "values"))
        )
        row += HEADS * (seen - stored + setting.sinks) * 2 * D * 4 + setting.sinks * 4
        # where a row begins, its position, and where counting ends
        row += 8 * (3 if setting.recent or name.startswith("kivi") else 2)
        assert cache.nbytes() == cache.predicted_nbytes() == 3 * 2 * row


def test_kivi_bytes_in_numbers():
    """One row of 100 tokens, 36 exact and 4 sinks: 4 heads of 16 key channels in 2 blocks of 16 + 8 bytes, 64
    tokens of 8 + 8; 3 places and those of the sinks."""
    cache = lowkey.make_cache(attached("llama"), bits="kivi4")
    feed(attached("llama"), prompt(100, batch=1), cache)
    assert cache.nbytes() == 3 * (
        4 * 16 * 2 * (16 + 8) + 4 * 64 * (8 + 8) + 4 * (36 + 4) * 2 * 16 * 4 + 24 + 4 * 4
    )


@pytest.mark.parametrize("width", [1, 5, 10, 16, 32, 33, 48, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_packed_takes_the_bytes_it_says(width, dtype):
    for name in SCHEMES:
        for packing in (scheme(name).keys, scheme(name).values, Unpacked()):
            held = packing.pack(torch.randn(2, 3, 64, width).to(dtype))
            assert sum(t.nbytes for t in held) == 2 * 3 * packing.nbytes(64, width, dtype.itemsize)


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


def test_eight_bits_are_close_to_stock_and_four_are_not_far_and_two_are_no_noise():
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


def test_channels_that_are_much_larger_spoil_tokens_but_not_channels_nor_what_is_turned():
    """KIVI's reason to pack keys per channel (arXiv:2402.02750), and Palu's to turn them (arXiv:2407.21118)."""
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
