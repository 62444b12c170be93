"""Settings as text, and the names of GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowkey.core.budget import Budget
from lowkey.core.errors import LowkeyError
from lowkey.core.gpus import GPUS, find_gpu
from lowkey.core.stored_setting import StoredSetting, parse_settings


def parsed(text, also=()):
    return parse_settings(text, ["int8", "int4", "kivi2"], ["snapkv", "h2o"], also)


def test_what_settings_mean():
    full, packed, rank, kept, plan, all_axes = parsed(
        "full, int4,rank:25%,h2o:64 tokens,plan:a/b,rank:50%+kivi2+snapkv:10%"
    )
    assert full == StoredSetting("full") and full.is_full
    assert packed == StoredSetting("int4", bits="int4") and not packed.is_full
    assert rank == StoredSetting("rank:25%", rank=0.25)
    assert kept == StoredSetting("h2o:64 tokens", policy="h2o", budget=Budget(64, "tokens"))
    assert plan == StoredSetting("plan:a/b", plan=Path("a/b"))
    axes = (all_axes.rank, all_axes.bits, all_axes.policy, all_axes.budget)
    assert axes == (0.5, "kivi2", "snapkv", Budget(10, "%"))


def test_words_for_other_whole_caches():
    assert parsed("full,expanded", ("expanded",))[1] == StoredSetting("expanded")
    with pytest.raises(LowkeyError, match="unknown"):
        parsed("expanded")


def test_a_policy_may_need_no_budget():
    names = (["int4"], ["snapkv", "h2o"], (), ["h2o"])
    alone, bounded = parse_settings("h2o,h2o:10%", *names)
    assert (alone.policy, alone.budget, bounded.budget) == ("h2o", None, Budget(10, "%"))
    for text in ("h2o:", "snapkv"):
        with pytest.raises(LowkeyError, match="says not what is kept"):
            parse_settings(text, *names)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "setting '' is unknown; choose one of full"),
        ("int5", "did you mean 'int"),
        ("snapkw:10%", "did you mean 'snapkv:10%'"),
        ("snapkv", "write it as 'snapkv:10%'"),
        ("snapkv:", "write it as 'snapkv:10%'"),
        ("snapkv:10", "budget '10'"),
        ("rank", "unknown"),
        ("rank:2 KiB", "rank:50%"),
        ("rank:0%", "budget '0%'"),
        ("rank:101%", "budget '101%'"),
        ("int4+int8", "gives bits twice"),
        ("snapkv:10%+h2o:10%", "twice"),
        ("full+int4", "whole cache"),
        ("int4:3", "no budget"),
        ("plan:", "unknown"),
        ("plan:a+rank:50%", "ranks of its own"),
        ("int4,full,int4", "'int4': is given twice"),
    ],
)
def test_settings_that_mean_nothing(text, says):
    with pytest.raises(LowkeyError, match=says.replace("+", r"\+")):
        parsed(text)


def test_gpus_by_name():
    assert find_gpu("H200") is GPUS["h200"]
    with pytest.raises(LowkeyError, match="did you mean 'h200'"):
        find_gpu("h20")
    with pytest.raises(LowkeyError, match=r"choose one of h100.* or --memory with --bandwidth"):
        find_gpu("abacus")
