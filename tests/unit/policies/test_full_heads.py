"""RLKV's and DuoAttention's heads: whole ones first, by hand; and what a budget makes of the rest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pico import attached, prompt

from lowkey.cache.cache import make_cache
from lowkey.catalog import make_policy
from lowkey.core.errors import LowkeyError
from lowkey.policies.allocators import FullHeads
from lowkey.policies.sharing import KnownBefore

GATES = [[0.2, 0.9, 0.0, 0.4], [0.9, 0.1, 0.3, 0.3], [0.0, 1.0, 0.0, 0.5]]
ORDER = [(2, 1), (0, 1), (1, 0), (2, 3), (0, 3), (1, 2), (1, 3), (0, 0), (1, 1), (0, 2), (2, 0), (2, 2)]


@pytest.mark.defines("policies", "rlkv", "duoattention")
@pytest.mark.parametrize(("name", "kind"), [("rlkv", "reward"), ("duoattention", "distilled")])
@pytest.mark.parametrize(("share", "whole"), [("100%", 12), ("50%", 5), ("25%", 1), ("7%", 0)])
def test_heads_of_the_highest_gates_keep_all(name, kind, share, whole):
    n, sinks, recent = 60, 3, 4
    policy = make_policy(name, share, {"sinks": str(sinks), "recent": str(recent)})
    cache = make_cache(attached("llama"), policy=policy.with_head_scores({kind: GATES}))
    with torch.no_grad():
        attached("llama")(prompt(n, batch=1), past_key_values=cache)
    kept = [[head.tolist() for head in cache.kept_positions(i)] for i in range(3)]
    for i, j in ORDER[:whole]:
        assert kept[i][j] == list(range(n))
    for i, j in ORDER[whole + 1 :]:
        assert kept[i][j] == [0, 1, 2, 56, 57, 58, 59]
    if whole < 12:
        i, j = ORDER[whole]
        own = kept[i][j]
        total = sum(len(head) for layer in kept for head in layer)
        assert own == [0, 1, 2, *range(n - len(own) + 3, n)]
        assert total == max(round(float(share[:-1]) / 100 * n * 12), 12 * 7)


@pytest.mark.defines("token allocators", "full-heads")
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=6, max_size=6),
    st.integers(1, 50),
    st.floats(0.5, 60),
    st.integers(0, 12),
)
def test_whole_heads_are_filled_one_after_the_other(gates, tokens, mean, protected):
    split = FullHeads(importance=(tuple(gates[:3]), tuple(gates[3:])))
    counts = split.planned(KnownBefore(mean, tokens, protected, 2, 3)).flatten().tolist()
    least = min(protected, tokens)
    left = max(0, round(min(mean, tokens) * 6) - least * 6)
    # by hand: the best head that is left, and of equal ones the first
    expected, todo = [least] * 6, list(range(6))
    while todo:
        best = max(todo, key=lambda i: (gates[i], -i))
        todo.remove(best)
        given_now = min(left, tokens - least)
        expected[best] += given_now
        left -= given_now
    assert counts == expected


def test_any_kind_of_scores_serves():
    split = FullHeads("ablation")
    assert split.with_head_scores({"ablation": GATES}).importance == tuple(map(tuple, GATES))
    with pytest.raises(LowkeyError, match="lowkey heads MODEL --kind ablation"):
        split.with_head_scores({"reward": GATES})
