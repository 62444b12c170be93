"""Eviction policies: which tokens each head keeps. One score per file.

`SCORES` has every score's class by name. `POLICIES` has what users choose from: a score with the allocator
that its paper uses. May import `core`, `ops` and `backends`; policies do not import one another, except that
ThinK extends SnapKV.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields
from functools import partial
from typing import Any

from lowkey.core.errors import LowkeyError
from lowkey.policies.allocators import TOKEN_ALLOCATORS, FullHeads, HeadKV
from lowkey.policies.attention_matching import AttentionMatching
from lowkey.policies.base import Policy
from lowkey.policies.chunks import ChunkGate, ChunkMean
from lowkey.policies.curdkv import CurDKV
from lowkey.policies.dropkv import DropKV
from lowkey.policies.expected import ExpectedAttention
from lowkey.policies.fast_kvzip import FastKVzip
from lowkey.policies.fastgen import FastGen
from lowkey.policies.h2o import H2O
from lowkey.policies.keydiff import KeyDiff
from lowkey.policies.knorm import Knorm
from lowkey.policies.kvcompress import KVCompress
from lowkey.policies.kvzip import KVzip
from lowkey.policies.oracle import Oracle
from lowkey.policies.random import Random
from lowkey.policies.razor import Razor
from lowkey.policies.rkv import RKV
from lowkey.policies.smallkv import SmallKV, SmallKVTokens
from lowkey.policies.snapkv import SnapKV
from lowkey.policies.streaming import StreamingLLM
from lowkey.policies.think import ThinK
from lowkey.policies.tova import TOVA
from lowkey.policies.triattention import TriAttention
from lowkey.policies.zipvl import ZipVL

SCORES: dict[str, type[Policy]] = {
    "streamingllm": StreamingLLM,
    "tova": TOVA,
    "h2o": H2O,
    "snapkv": SnapKV,
    "expected-attention": ExpectedAttention,
    "curdkv": CurDKV,
    "knorm": Knorm,
    "keydiff": KeyDiff,
    "r-kv": RKV,
    "kv-compress": KVCompress,
    "fastgen": FastGen,
    "think": ThinK,
    "razor": Razor,
    "kvzip": KVzip,
    "fast-kvzip": FastKVzip,
    "dropkv": DropKV,
    "triattention": TriAttention,
    "zipvl": ZipVL,
    "smallkv": SmallKV,
    "smallkv-tokens": SmallKVTokens,
    "attention-matching": AttentionMatching,
    "chunk-gate": ChunkGate,
    "chunk-mean": ChunkMean,
    "random": Random,
    "oracle": Oracle,
}

POLICIES: dict[str, Callable[..., Policy]] = {
    **SCORES,
    "pyramidkv": partial(SnapKV, allocator="pyramid"),
    "ada-kv": partial(SnapKV, allocator="ada"),
    "headkv-r": partial(SnapKV, allocator=HeadKV("copy")),
    "headkv-r2": partial(SnapKV, allocator=HeadKV("r2")),
    "expected-attention": partial(ExpectedAttention, allocator="ada"),
    "ada-curdkv": partial(CurDKV, allocator="ada"),
    "kv-compress": partial(KVCompress, allocator="blocks"),
    "kvzip": partial(KVzip, allocator="global"),
    "fast-kvzip": partial(FastKVzip, allocator="global"),
    "attention-matching": partial(AttentionMatching, allocator="global"),
    "razor": partial(Razor, allocator="classes"),
    "rlkv": partial(StreamingLLM, allocator=FullHeads("reward")),
    "duoattention": partial(StreamingLLM, allocator=FullHeads("distilled")),
}

PLANNED = "snapkv"  # the policy that the planner tries: no second pass, and no head scores

__all__ = [
    "H2O",
    "POLICIES",
    "RKV",
    "SCORES",
    "TOVA",
    "AttentionMatching",
    "ChunkGate",
    "ChunkMean",
    "CurDKV",
    "DropKV",
    "ExpectedAttention",
    "FastGen",
    "FastKVzip",
    "FullHeads",
    "HeadKV",
    "KVCompress",
    "KVzip",
    "KeyDiff",
    "Knorm",
    "Oracle",
    "Policy",
    "Random",
    "Razor",
    "SmallKV",
    "SmallKVTokens",
    "SnapKV",
    "StreamingLLM",
    "ThinK",
    "TriAttention",
    "ZipVL",
    "TOKEN_ALLOCATORS",
    "policy_from_dict",
    "policy_name",
    "policy_to_dict",
]


def policy_name(policy: Policy) -> str:
    """The name of a policy's score in `SCORES`, or the path of its class if it is not one of ours."""
    return _name(policy, SCORES)


def policy_to_dict(policy: Policy) -> dict:
    """A policy as JSON has it.

    Returns:
        The names of its score and of its allocator (a class's path if it is not one of ours), the budget as
        text or None, and the parameters of both.
    """
    allocator: Any = policy.resolved_allocator()  # a dataclass, as all of them are
    parameters = {
        f.name: getattr(policy, f.name) for f in fields(policy) if f.name not in ("budget", "allocator")
    }
    return {
        "name": policy_name(policy),
        "budget": policy.budget and str(policy.budget),
        "parameters": parameters,
        "allocator": {"name": _name(allocator, TOKEN_ALLOCATORS), "parameters": asdict(allocator)},
    }


def policy_from_dict(written: dict) -> Policy:
    """The policy that `policy_to_dict` described.

    Raises:
        LowkeyError: a name or a parameter is not known here.
    """
    try:
        allocator = written["allocator"]
        _check_keys(written, ("name", "budget", "parameters", "allocator"))
        _check_keys(allocator, ("name", "parameters"))
        split = TOKEN_ALLOCATORS[allocator["name"]](**_tuples(allocator["parameters"]))
        return SCORES[written["name"]](written["budget"], allocator=split, **_tuples(written["parameters"]))
    except LowkeyError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise LowkeyError(
            f"policy {str(written)[:80]!r} is not known here ({error}); it is of a newer lowkey or an "
            "outside class"
        ) from None


def _check_keys(written: dict, known: tuple[str, ...]) -> None:
    """Refuse what `policy_to_dict` does not write. Raises: ValueError."""
    if extra := set(written) - set(known):
        raise ValueError(f"{min(extra)!r:.40} is no part of one")


def _name(thing: object, table: dict[str, Any]) -> str:
    """The name of an object's class in `table`, or the class's path if it is not one of ours."""
    known = (name for name, kind in table.items() if type(thing) is kind)
    return next(known, f"{type(thing).__module__}:{type(thing).__qualname__}")


def _tuples(parameters: dict) -> dict:
    """Parameters with tuples in the place of the lists that JSON makes of them."""
    return {name: _tuple(value) for name, value in parameters.items()}


def _tuple(value: object) -> object:
    """A value with tuples in the place of lists, at every depth."""
    return tuple(_tuple(v) for v in value) if isinstance(value, list) else value
