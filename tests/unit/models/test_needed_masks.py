"""Masks are written out only where queries do not see all tokens up to their own."""

from __future__ import annotations

import pytest
import torch
from pico import attached, prompt, stock
from transformers import DynamicCache, StaticCache
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from lowkey.models.attention_interface import needed_mask


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("parts", [[40, 40], [50, 5, 25], [16, 1, 63]])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_stock_caches_give_stock_logits_chunk_by_chunk(kind, parts, gradients):
    model, ids = attached("llama"), prompt(80, batch=2)
    cache = DynamicCache() if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=100)
    with torch.set_grad_enabled(gradients):
        found = [model(part, past_key_values=cache).logits for part in ids.split(parts, 1)]
        wanted = stock("llama")(ids).logits
    torch.testing.assert_close(torch.cat(found, 1), wanted, atol=2e-5, rtol=1e-5)


def test_later_chunks_without_padding_need_no_mask():
    def mask(q, kv, offset, **options):
        return needed_mask(2, q, kv, offset, 0, **options)

    padded = torch.ones(2, 9).long()
    padded[0, 0] = 0
    assert mask(4, 9, 5) is None and mask(4, 9, 5, attention_mask=torch.ones(2, 9).long()) is None
    assert mask(4, 9, 5, attention_mask=padded.bool()).logical_not().sum() == 4 + 2 * (3 + 2 + 1)
    # a cache of fixed size, a window, and a caller that wants the mask in any case
    assert mask(4, 12, 0).shape == (2, 1, 4, 12)
    assert mask(4, 9, 5, mask_function=sliding_window_causal_mask_function(3)).sum() == 2 * 4 * 3
    assert mask(4, 9, 5, mask_function=causal_mask_function, allow_is_causal_skip=False).shape == (2, 1, 4, 9)
