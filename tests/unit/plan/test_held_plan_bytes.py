"""The bytes that a plan says it holds after a prompt, against caches that read one."""

from __future__ import annotations

from dataclasses import replace

import pico
import pytest
from packing_by_hand import FORMS, plan
from pico import attached, feed, prompt

import lowkey
from lowkey.catalog import make_policy
from lowkey.plan.held_bytes import held_bytes
from lowkey.policies import policy_to_dict

POLICIES = {"none": None, "25%": "snapkv", "40 tokens": "h2o", "100%": "snapkv"}


def made(model, form, bits, policy, sinks=0, recent=0):
    """A plan on all axes; one without factors has the form `plain`."""
    own = plan(model, form)
    fields = {} if own else {"factors": {}, "method": {"name": "none", "parameters": {}}}
    base = own or pico.plan(model)
    written = None
    if POLICIES[policy]:
        written = policy_to_dict(make_policy(POLICIES[policy], policy, {}))
    return replace(base, **fields, bits=bits, policy=written, sinks=sinks, recent=recent)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", [None, "int4", "kivi2", "hadamard8"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("sinks", "recent"), [(0, 0), (3, 5)])
def test_a_plan_says_what_its_cache_holds(form, bits, policy, sinks, recent):
    model = attached("llama")
    own = made(model, form, bits, policy, sinks, recent)
    for tokens in (90, 161):
        cache = lowkey.make_cache(model, own)
        feed(model, prompt(tokens, batch=1), cache)
        said = held_bytes(own, tokens, 4)
        if bits == "kivi2" and policy in ("25%", "40 tokens"):
            assert cache.nbytes() <= said, "rows end in blocks that are not full"
        else:
            # the shares of layers and heads are rounded to whole tokens
            assert abs(cache.nbytes() - said) <= 3
