"""`lowkey methods` and `lowkey policies`: everything that can be chosen is listed."""

from __future__ import annotations

from commands import done, printed

from lowkey.allocation.allocators import RANK_ALLOCATORS
from lowkey.methods import METHODS, StiefAttention

# -- the others


def test_methods_lists_everything():
    told = printed("methods")
    assert list(told["methods"]) == list(METHODS) and list(told["allocators"]) == list(RANK_ALLOCATORS)
    assert told["methods"]["stiefattention"]["options"]["epochs"] == StiefAttention().epochs
    assert told["dynamic"]["dynakv"]["paper"] == "arXiv:2603.04411" and "dynakv" not in told["methods"]


def test_methods_without_json():
    out = done("methods").out
    assert [
        name for name in (*METHODS, *RANK_ALLOCATORS, "dynakv", "lowkey dynamic") if name not in out
    ] == []


def test_methods_prints_defaults_and_what_an_error_budget_bounds():
    told = printed("methods")
    assert {told["methods"]["stiefattention"][name] for name in ("allocator", "layout", "ranks")} == {
        *("weighted-pareto", "pre_rope", "50%,60%,70%,80%,90%")
    }
    assert (
        "weight" in told["allocators"]["weighted-pareto"]["bounds"]
        and "tail" in told["allocators"]["tail"]["bounds"]
    )
    assert "largest error of a layer" in " ".join(done("methods").out.split())


# -- heads and policies


def test_policies_are_listed(here):
    told = printed("policies")
    assert {"snapkv", "pyramidkv", "ada-kv", "headkv-r2", "h2o", "kvzip"} <= set(told["policies"])
    assert told["policies"]["ada-kv"]["allocator"]["name"] == "ada" and "headkv" in told["allocators"]
    assert "arXiv:2404.14469" in done("policies").out
