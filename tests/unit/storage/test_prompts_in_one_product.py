"""A prompt over compressed tokens beside exact ones is answered by torch's fused attention."""

from __future__ import annotations

import pytest
import torch
from pico import attached, plan, prompt

import lowkey
from lowkey.backends import fused
from lowkey.storage.exact import Exact


@pytest.mark.parametrize("layout", ["post_rope", "pre_rope"])
@pytest.mark.parametrize("bits", [None, "kivi4"])
def test_rebuilt_keys_join_the_exact_ones(layout, bits, monkeypatch):
    """Otherwise the prompt takes three times as long as over the full cache, and forms all scores."""
    model, answered, attend = attached("llama"), [], fused.attend
    monkeypatch.setattr(fused, "attend", lambda *args: answered.append(1) or attend(*args))
    cache = lowkey.make_cache(model, plan(model, layout=layout), bits=bits, exact=Exact(3, 20))
    with torch.no_grad():
        model(prompt(64, batch=1), past_key_values=cache)
    assert len(answered) == len(cache.layers)
