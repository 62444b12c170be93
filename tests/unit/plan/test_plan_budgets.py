"""Budgets as users write them: shares, bytes, tokens and errors."""

from __future__ import annotations

import pytest

from lowkey.core.types import Budget, LowkeyError


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("50%", 50, "%"),
        (" 12.5 % ", 12.5, "%"),
        ("100%", 100, "%"),
        ("64 KiB/token", 65536, "bytes/token"),
        ("100 B/token", 100, "bytes/token"),
        ("512 tokens", 512, "tokens"),
        ("1 token", 1, "tokens"),
        ("1.5 GiB", 1.5 * 2**30, "bytes"),
        ("2MiB", 2**21, "bytes"),
    ],
)
def test_budgets_are_read(text, amount, unit):
    assert Budget.parse(text) == Budget(amount, unit)


@pytest.mark.parametrize(
    "text",
    [
        "150%",
        "0%",
        "-5%",
        "100.01%",
        "banana",
        "",
        "50",
        0.5,
        50,
        "0.5",
        "50%%",
        "5 kB",
        "1 KB",
        "nan%",
        "inf%",
        "1e3 B",
        "50 %/token",
    ],
    ids=str,
)
def test_other_budgets_are_refused(text):
    with pytest.raises(LowkeyError) as refusal:
        Budget.parse(text)
    assert str(text) in str(refusal.value) and len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize("text", ["0 tokens", "0 B/token", "0 GiB", "0.0%"])
def test_a_budget_of_nothing_is_refused(text):
    with pytest.raises(LowkeyError):
        Budget.parse(text)


@pytest.mark.parametrize(
    "text", ["50%", "12.5%", "512 tokens", "64 KiB/token", "100 B/token", "1.5 GiB", "3 MiB/token"]
)
def test_a_budget_is_written_as_it_can_be_read(text):
    assert Budget.parse(str(Budget.parse(text))) == Budget.parse(text)


def test_shares_and_bytes_per_token():
    assert Budget.parse("25%").bytes_per_token(400) == 100
    assert Budget.parse("1 KiB/token").bytes_per_token(400) == 1024


@pytest.mark.parametrize("text", ["512 tokens", "1 GiB"])
def test_ranks_cannot_be_bought_with_tokens_or_bytes(text):
    with pytest.raises(LowkeyError, match="token"):
        Budget.parse(text).bytes_per_token(400)
