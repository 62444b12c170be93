"""The oracle: what the right answer attends to, shown by an evaluation alone."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from commands import lowkey
from policy_contexts import SMALL, build
from score_definitions import attention, each

from lowkey.core.types import LowkeyError
from lowkey.policies.oracle import Oracle


@pytest.mark.defines("policies", "oracle")
@pytest.mark.parametrize("shown", [1, 4])
def test_the_largest_weight_of_what_comes_next(shown):
    context = replace(build(pad=2), transient=shown)
    by_hand = each(context, lambda i, j: attention(context, i, j, shown)[0].amax((0, 1)))
    got = Oracle(**SMALL).score(context)
    torch.testing.assert_close(got.double()[context.valid], by_hand[context.valid], rtol=1e-5, atol=1e-7)


def test_nothing_to_look_at_is_refused():
    with pytest.raises(LowkeyError, match="needs the question and the right answer"):
        Oracle(**SMALL).score(build())


def test_an_evaluation_shows_the_answer(tmp_path):
    """It recalls where tokens that were drawn at random do not."""
    given = ("--budget", "12%", "--context", "256", "--cases", "6", "--out", tmp_path / "r.json", "--json")
    ran = lowkey("eval", "tiny", "--policy", "oracle,random", "--task", "recall", *given)
    assert ran.status == 0, ran.err
    rows = {row["name"]: row for row in json.loads(ran.out)["rows"]}
    assert rows["oracle 12%"]["exact_match"] > 0.6 > rows["random 12%"]["exact_match"]
    refused = lowkey("eval", "tiny", "--policy", "oracle", "--budget", "12%", "--task", "recall,perplexity")
    assert refused.status == 2 and "give --task recall alone" in refused.err
