"""Presses as kvpress has them, written here: they score for an attention module and its hidden states.

`kept_by_press` is the oracle: a press in hooks of a stock model, which sees the real module and hidden
states.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad
from transformers import DynamicCache

from lowkey.cache.cache import make_cache
from lowkey.models.attention_interface import attach
from lowkey.policies.press import press_policy


@dataclass
class ScorerPress:
    """What presses extend."""

    compression_ratio: float = 0.0

    def __post_init__(self):
        assert 0 <= self.compression_ratio < 1, "compression_ratio lies in [0, 1)"

    def post_init_from_model(self, model):
        pass

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        raise NotImplementedError

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        raise NotImplementedError

    def forward_hook(self, module, input, kwargs, output):
        raise NotImplementedError


def projected(module, name, hidden_states):
    """Queries or keys (b, H, w, d) before their rotation, as kvpress gets them."""
    flat = getattr(module, f"{name}_proj")(hidden_states)
    heads = flat.view(*hidden_states.shape[:2], -1, module.head_dim).transpose(1, 2)
    norm = getattr(module, f"{name}_norm", None)
    return norm(heads) if norm else heads


def turned(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos.unsqueeze(1) + torch.cat([-b, a], -1) * sin.unsqueeze(1)


@dataclass
class WindowPress(ScorerPress):
    """Mean attention of the last queries, whose own tokens stay."""

    window: int = 4

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        assert attentions is None and hidden_states.shape[1] > self.window, "more tokens than the window"
        cos, sin = (x[:, -self.window :] for x in kwargs["position_embeddings"])
        queries = turned(projected(module, "q", hidden_states[:, -self.window :]), cos, sin)
        groups = module.config.num_attention_heads // module.config.num_key_value_heads
        logits = queries @ keys.repeat_interleave(groups, 1).mT * module.scaling
        hidden = torch.ones_like(logits, dtype=torch.bool).triu(keys.shape[2] - self.window + 1)
        weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)[..., : -self.window].mean(2)
        scores = weights.unflatten(1, (-1, groups)).mean(2)
        return pad(scores, (0, self.window), value=scores.max().item() + 1)


@dataclass
class FuturePress(ScorerPress):
    """Product with the mean query, turned as the mean coming one."""

    coming: int = 8
    use_values: bool = True

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        mean = projected(module, "q", hidden_states[:, 2:]).mean(2, keepdim=True)
        ahead = torch.arange(self.coming).unsqueeze(0) + hidden_states.shape[1]
        cos, sin = (x.mean(1, keepdim=True) for x in module.rotary_emb(mean, ahead))
        mean = turned(mean, cos, sin).unflatten(1, (keys.shape[1], -1)).mean(2)
        scores = (mean @ keys.mT).squeeze(2)
        return scores.exp() * values.norm(dim=-1) if self.use_values else scores


@dataclass
class SharePress(ScorerPress):
    """The first two tokens and the newest, by the share that is dropped."""

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        scores = torch.ones_like(keys[..., 0])
        kept = int(keys.shape[2] * (1 - self.compression_ratio))
        scores[:, :, 2 : 2 + keys.shape[2] - kept] = 0
        return scores


class PlainKeysPress(ScorerPress):
    """Norms of keys along one channel, before their rotation."""

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        return projected(module, "k", hidden_states)[..., 0]


class OutputPress(ScorerPress):
    """Asks for the output projection."""

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        return (values @ module.o_proj.weight).norm(dim=-1)


class HiddenPress(ScorerPress):
    """Asks for hidden states themselves."""

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        return hidden_states.norm(dim=-1)


class ShapePress(ScorerPress):
    """Gives one score for all heads."""

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        return keys.norm(dim=(1, 3))


class BudgetPress(WindowPress):
    """Keeps in a way of its own."""

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        return keys, values


class ModelPress(WindowPress):
    """Wants to see the model."""

    def post_init_from_model(self, model):
        self.model = model


@dataclass
class MaskPress:
    """Has no score."""

    press: ScorerPress
    compression_ratio: float = 0.0

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        return keys, values


@torch.no_grad()
def kept_by_press(model, press, ids, count):
    """Positions that the best scores of a press in hooks keep, as nested lists by layer and head.

    Args:
        model: a stock model.
        press: the press.
        ids: (1, t).
        count: tokens that a head keeps.
    """
    cache, kept, hooks = DynamicCache(), [], []

    def hook(module, arguments, kwargs, output):
        layer = cache.layers[module.layer_idx]
        scores = press.score(module, kwargs["hidden_states"], layer.keys, layer.values, None, kwargs)
        kept.append(scores[0].topk(count).indices.sort().values.tolist())

    for layer in model.model.layers:
        layer.self_attn.rotary_emb = model.model.rotary_emb  # as kvpress does it
        hooks.append(layer.self_attn.register_forward_hook(hook, with_kwargs=True))
    model(ids, past_key_values=cache)
    for handle in hooks:
        handle.remove()
    return kept


@torch.no_grad()
def cache_of_press(model, press, ids, budget, **options):
    """A cache that has read ids (b, t), by the policy of a press."""
    cache = make_cache(attach(model), policy=press_policy(press)(budget, **options))
    model(ids, past_key_values=cache)
    return cache


def kept_by_policy(cache, row=0):
    """Positions that a cache holds, as nested lists by layer and head."""
    layers = range(len(cache.layers))
    return [[sorted(head.tolist()) for head in cache.kept_positions(layer, row)] for layer in layers]
