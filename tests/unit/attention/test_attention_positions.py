"""Every attention kind at any positions: a cache gives what one pass over the whole text gives."""

from __future__ import annotations

import pico
import pytest
import torch
from torch import Tensor
from transformers import Cache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import QuantizedLayer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from variants import SHAPE, VARIANTS, build, config, empty_cache, ids

from lowkey.attention import LowkeyForCausalLM

each = pytest.mark.parametrize("name", VARIANTS)
caches = pytest.mark.parametrize("cache", ["dynamic", "static"])
EXACT, ROUNDED = 1e-10, 1e-4
LENGTH = 14
SPLITS = ([1] * LENGTH, [5, 3, 1, 1, 4])


def masked(*gaps: tuple[int, int]) -> Tensor:
    """(2, LENGTH), each row without the tokens of its gap."""
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    for row, (start, stop) in zip(mask, gaps, strict=True):
        row[start:stop] = 0
    return mask


def told(*rows: list[int]) -> Tensor:
    """Positions that begin with these and go on one by one."""
    return torch.tensor([[*row, *range(row[-1] + 1, row[-1] + 1 + LENGTH - len(row))] for row in rows])


EVERY, ROW = masked((0, 0), (0, 0)), torch.arange(LENGTH)[None]
PLACES: dict[str, tuple[Tensor, Tensor]] = {
    "left padding, counted": (masked((0, 4), (0, 1)), ROW.expand(2, -1)),
    "right padding, then more": (masked((6, 9), (8, 9)), ROW.expand(2, -1)),
    "a gap, counted": (masked((0, 0), (7, 11)), ROW.expand(2, -1)),
    "a gap, not counted": (masked((0, 0), (7, 11)), masked((0, 0), (7, 11)).cumsum(1) - 1),
    "jumps": (EVERY, told([0, 1, 2, 9, 10, 40], [3, 4, 20, 21, 22, 23, 50])),
    "back and forth": (EVERY, told([8, 3, 3, 5, 0, 2], [0, 1, 0, 1, 2, 0])),
    "starts late": (EVERY, told([1000], [17])),
    "starts behind 16 bits": (EVERY, told([70_000], [255])),
    "one row of positions for all": (EVERY, told([5, 6, 30])),
}


@torch.no_grad()
def read(
    model: LowkeyForCausalLM,
    place: tuple[Tensor, Tensor],
    splits: list[int] | None = None,
    past: object = None,
) -> Tensor:
    """Logits (2, LENGTH, V), at once or in pieces through a cache."""
    (mask, positions), out, start = place, [], 0
    for size in splits or [LENGTH]:
        stop = start + size
        where = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
        out.append(
            model(
                ids(LENGTH)[:, start:stop], **where, past_key_values=past, use_cache=past is not None
            ).logits
        )
        start = stop
    return torch.cat(out, 1)


def apart(a: Tensor, b: Tensor, mask: Tensor = EVERY) -> float:
    return float((a - b)[mask == 1].abs().max())


@caches
@each
def test_a_cache_knows_where_its_tokens_stand(name, cache):
    model = build(name)
    for place, at in PLACES.items():
        whole = read(model, at)
        for splits in SPLITS:
            assert apart(read(model, at, splits, empty_cache(cache, model)), whole, at[0]) < EXACT, (
                place,
                splits,
            )


@caches
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_numbers_hold_positions_too(dtype, cache):
    """Steps through a cache are no farther from the whole text than when nothing jumps, in the numbers that
    models are served in.
    """
    model = build("lrkv-full").to(dtype)
    plain, far = (EVERY, ROW.expand(2, -1)), (EVERY, told([0, 1, 300, 301], [5, 70_001, 70_002]))
    noise, found = (
        apart(read(model, p, SPLITS[0], empty_cache(cache, model)).float(), read(model, p).float())
        for p in (plain, far)
    )
    assert found < 3 * noise + 1e-3


# -- rotations that are scaled, past the length that they were made for

LIMIT = 4
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": LIMIT}
LLAMA = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
LLAMA |= {"original_max_position_embeddings": LIMIT}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 8.0}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": LIMIT}


def one_width(name: str) -> bool:
    """Whether all rotated parts are of the same width: longrope has one list of factors."""
    kinds = [found for found in (config(name), config(name).others) if found is not None]
    return (
        not any(found.narrow_rope_width for found in kinds)
        and len({found.rope_width for found in kinds} | {0}) == 2
    )


WIDE = [name for name in VARIANTS if one_width(name)]


def scaled(name: str, rope: dict, **overrides: object) -> LowkeyForCausalLM:
    pairs = config(name).rope_width // 2
    factors = {"short_factor": [1.0] * pairs, "long_factor": [5.0] * pairs} if rope is LONG else {}
    return build(
        name,
        rope_parameters=rope | factors,
        max_position_embeddings=LIMIT if rope is DYNAMIC else 128,
        **overrides,
    )


@pytest.mark.parametrize("rope", [LINEAR, YARN, LLAMA], ids=lambda rope: rope["rope_type"])
@each
def test_fixed_frequencies_decode_as_they_read(name, rope):
    model, at = scaled(name, rope), PLACES["a gap, counted"]
    assert apart(read(model, at, SPLITS[1], empty_cache("dynamic", model)), read(model, at), at[0]) < EXACT


# past the limit from the first piece on: below it transformers goes back to the first frequencies
LATER = [6, 1, 1, 2, 4]


@caches
@pytest.mark.parametrize("name", WIDE)
def test_a_long_text_is_decoded_with_the_long_factors(name, cache):
    model, at = scaled(name, LONG), PLACES["a gap, counted"]
    assert apart(read(model, at, LATER, empty_cache(cache, model)), read(model, at), at[0]) < EXACT


@caches
@each
def test_frequencies_after_a_longer_text_are_those_of_all_layers(name, cache):
    """Dynamic NTK keeps the frequencies of the longest text that it has read, as in stock models: all that
    turns must know of it.
    """
    model, at = scaled(name, DYNAMIC), PLACES["jumps"]
    model(ids(80), use_cache=False)
    whole = read(model, at)
    assert apart(read(model, at, LATER, empty_cache(cache, model)), whole, at[0]) < EXACT


@pytest.mark.parametrize("rope", [DYNAMIC, LONG], ids=lambda rope: rope["rope_type"])
@each
def test_generation_after_a_longer_text_ignores_the_cache(name, rope):
    if rope is LONG and name not in WIDE:
        return
    model = scaled(name, rope)
    model(ids(60), use_cache=False)
    cached, read_again = (pico.generate(model, ids(8), 6, use_cache=use) for use in (True, False))
    assert torch.equal(cached, read_again)


def llama(model: LowkeyForCausalLM) -> LlamaForCausalLM:
    """transformers' own model of the same weights."""
    given = {**SHAPE, "num_key_value_heads": 2, "rope_parameters": model.config.rope_parameters}
    found = (
        LlamaForCausalLM(
            LlamaConfig(**given | {"max_position_embeddings": model.config.max_position_embeddings})
        )
        .double()
        .eval()
    )
    found.load_state_dict(model.state_dict())
    return found


@pytest.mark.parametrize("rope", [DYNAMIC, LONG, YARN], ids=lambda rope: rope["rope_type"])
@pytest.mark.parametrize("name", ["gqa", "lrkv-nothing", "mea-grouped"])
def test_growing_past_the_limit_is_what_a_stock_model_does(name, rope):
    """Keys that are stored rotated keep the frequencies of their time, in transformers and here."""
    model = scaled(name, rope, qk_norm=False, head_norm="none", num_key_value_heads=2)
    stock = llama(scaled("gqa", rope) if name != "gqa" else model)
    own = model.state_dict()
    model.load_state_dict(
        own | {k: v for k, v in stock.state_dict().items() if k in own and own[k].shape == v.shape}
    )
    for layer in model.model.layers:
        for mix in ("k_mix", "v_mix") if name.startswith("mea") else ():
            getattr(layer.self_attn, mix).data.copy_(torch.eye(2))
    at = PLACES["a gap, counted"]
    for splits in ([2, 1, 1, 1, 1, 4, 4], [14]):
        found, wanted = (read(m, at, splits, empty_cache("dynamic", m)) for m in (model, stock))
        assert apart(found, wanted, at[0]) < ROUNDED  # stock norms run in fp32


@caches
@pytest.mark.parametrize("rope", [DYNAMIC, LONG], ids=lambda rope: rope["rope_type"])
def test_rebuilt_keys_have_the_frequencies_of_the_newest_token(rope, cache):
    """One layer, of which nothing but the keys depends on earlier frequencies: the newest token sees what it
    would without a cache.
    """
    model, at = scaled("lrkv-full-2-norm", rope, num_hidden_layers=1), PLACES["a gap, counted"]
    grown = read(model, at, [2, 1, 1, 1, 1, 4, 4], empty_cache(cache, model))
    assert apart(grown[:, -4:], read(model, at)[:, -4:], EVERY[:, -4:]) < EXACT


@each
def test_attention_holds_no_rotation_and_nothing_of_a_text(name):
    model = scaled(name, DYNAMIC)
    layers = [layer.self_attn for layer in model.model.layers]
    assert not [m for layer in layers for m in layer.modules() if isinstance(m, LlamaRotaryEmbedding)]
    before = [(dict(vars(m)), list(m.buffers())) for layer in layers for m in layer.modules()]
    read(model, PLACES["jumps"], SPLITS[1], empty_cache("dynamic", model))
    model(ids(60), use_cache=False)
    assert [(dict(vars(m)), list(m.buffers())) for layer in layers for m in layer.modules()] == before


@torch.no_grad()
@each
def test_plain_cos_and_sin_turn_a_layer_too(name):
    """As stock layers take them; what else a kind needs, it makes of its configuration."""
    model, x = (
        build(name),
        torch.randn(
            2, 6, SHAPE["hidden_size"], generator=torch.Generator().manual_seed(1), dtype=torch.float64
        ),
    )
    for layer in model.model.layers:
        rope = model.model.rotary_emb(x, ROW[:, :6])
        mine = rope if layer.self_attn.whole is None else rope.other
        found, want = (
            layer.self_attn(x, given, position_ids=ROW[:, :6])[0] for given in ((mine.cos, mine.sin), rope)
        )
        assert apart(found, want, EVERY[:, :6]) == 0


class Rounding(QuantizedLayer):
    """Stands for one of transformers' quantised layers, which need packages of their own."""

    def _quantize(self, tensor, axis):
        return (tensor * 4).round()

    def _dequantize(self, q_tensor):
        return q_tensor / 4


@each
def test_a_quantised_cache_is_refused_for_stored_positions(name):
    model = build(name)
    past = Cache(layers=[Rounding() for _ in model.model.layers])
    kinds = [layer.self_attn for layer in model.model.layers]
    if not any(layer.stores_positions for layer in kinds):
        model(ids(6), past_key_values=past)
        return
    with pytest.raises(ValueError, match=r"^cache 'quantized': .* positions.*; use 'dynamic'$"):
        model(ids(6), past_key_values=past)
