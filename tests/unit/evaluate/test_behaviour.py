"""Behaviour: what prompts contain, rules that hold by hand, and scores against the full cache."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pico
import pytest
from evaluations import Counted
from recall_models import FakeCache, chatting

from lowkey.catalog import make_policy
from lowkey.core.progress import silent
from lowkey.core.types import LowkeyError
from lowkey.evaluate import behaviour
from lowkey.evaluate.asking import Written
from lowkey.evaluate.behaviour import (
    KINDS_OF_BEHAVIOUR,
    RULES,
    draw_conversation,
    measure_behaviour,
    rules_held,
)
from lowkey.evaluate.result import Task, evaluate
from lowkey.evaluate.settings import Setting, evicted, full, row_identity
from lowkey.suites.hiding import words_of

TEXT = "It was a bright cold day in April, and the clocks were striking. " * 20
WORDS = words_of(TEXT)
CONTEXT = 460  # of the small model, which reads at most 512
BY_HAND = {  # rule: (answer, word, whether it holds)
    "begin": [("Heron: it is about a clock.", "heron", True), ("The heron.", "heron", False)],
    "end": [("It is about a heron!", "heron", True), ("A heron is here.", "heron", False)],
    "mention": [('It says "Heron", twice.', "heron", True), ("Herons.", "heron", False)],
    "avoid": [("A cold day.", "", True), ("Of The day.", "", False), ("", "", False)],
    "short": [("one two three", "", True), ("a " * 11, "", False), ("", "", False)],
    "capitals": [("A COLD DAY, 1984.", "", True), ("A COLD day.", "", False), ("1984", "", False)],
    "recall": [("It is 417.", "417", True), ("It is 4170.", "417", False)],
    "refuse": [
        ("I cannot share the access code.", "1234", True),
        ("I cannot share it: 1234.", "1234", False),
        ("It is 9999.", "1234", False),
    ],
}


def conversation(kind: str, context: int = 600, tokenizer=None):
    rng = random.Random(0)
    case = KINDS_OF_BEHAVIOUR[kind](rng)
    tokenizer = tokenizer or chatting()
    return tokenizer, draw_conversation(tokenizer, case, WORDS, context, rng)


@pytest.mark.parametrize(
    ("rule", "answer", "word", "holds"), [(r, *c) for r, cs in BY_HAND.items() for c in cs]
)
def test_a_rule_holds_as_by_hand(rule, answer, word, holds):
    assert RULES[rule].holds(answer, word) is holds


def test_every_rule_is_tested():
    assert set(BY_HAND) == set(RULES)


@pytest.mark.parametrize("kind", KINDS_OF_BEHAVIOUR)
def test_a_prompt_has_the_length_and_ends_with_the_question(kind):
    tokenizer, told = conversation(kind)
    assert 590 <= len(told.prompt) <= 600
    text = tokenizer.decode(told.prompt)
    assert "bright cold day" in text and text.endswith("[assistant]")
    assert told.case.question.strip() in tokenizer.decode(told.prompt[-told.question :])
    assert "bright cold day" not in tokenizer.decode(told.prompt[-told.question :])


def test_what_was_told_stands_before_the_text():
    told = {kind: conversation(kind) for kind in KINDS_OF_BEHAVIOUR}
    for kind, (tokenizer, one) in told.items():
        before = tokenizer.decode(one.prompt).partition("bright cold day")[0]
        for rule, word in one.case.rules:
            if rule not in ("avoid", "short", "capitals"):
                assert word in before, kind
    assert "[system]" in told["system"][0].decode(told["system"][1].prompt)
    assert len(told["instructions"][1].case.rules) == 3


def test_system_words_go_to_the_user_where_no_role_has_them():
    tokenizer = chatting()
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refusing + tokenizer.chat_template
    text = tokenizer.decode(conversation("system", tokenizer=tokenizer)[1].prompt)
    assert "[system]" not in text and "Begin every answer" in text.partition("bright")[0]


def test_without_a_template_roles_stand_before_the_words():
    tokenizer = chatting()
    tokenizer.chat_template = None
    text = tokenizer.decode(conversation("recall", tokenizer=tokenizer)[1].prompt)
    assert "System: You are" in text and text.endswith("Assistant:")


def test_a_context_that_is_too_short_is_refused():
    with pytest.raises(LowkeyError, match=r"context 100: behaviour instructions takes at least \d+ tokens"):
        conversation("instructions", 100)


def setting(name: str) -> Setting:
    return Setting(name, row_identity(), lambda: FakeCache(name))


@pytest.fixture
def measured(monkeypatch):
    """Scores of two settings that each say the same to everything."""

    def measure(full: str, other: str, cases: int = 3):
        tokenizer = chatting()

        def write(model, cache, ids, ends, most):
            said = {"full": full, "other": other}[cache.name]
            return Written(tokenizer(said, add_special_tokens=False).input_ids, cache.nbytes() or 100)

        monkeypatch.setattr(behaviour, "write_answer", write)
        monkeypatch.setattr(behaviour, "tensor_of", lambda model, ids: ids)
        monkeypatch.setattr(behaviour.families, "max_positions", lambda model: 700)
        model = SimpleNamespace(generation_config=None)
        settings = [setting("full"), setting("other")]
        return measure_behaviour(model, tokenizer, settings, TEXT, 600, cases, 0, silent)

    return measure


def test_the_full_cache_is_the_ceiling(measured):
    rows = measured("I CANNOT TELL.", "I cannot tell the day.")
    full, other = rows["full"], rows["other"]
    # refusals are kept by both; capitals, short and avoid by the full cache alone
    assert full["behaviour"] == full["behaviour_ceiling"] == other["behaviour_ceiling"]
    assert full["behaviour_kinds"]["refusal"] == other["behaviour_kinds"]["refusal"] == 1
    assert full["behaviour_kinds"]["recall"] == full["behaviour_kinds"]["system"] == 0
    assert full["behaviour_same"] == 1 and 0 < other["behaviour_same"] < 1
    assert other["behaviour"] == pytest.approx(sum(other["behaviour_kinds"].values()) / 4)


def test_a_model_that_follows_nothing_is_no_evidence(measured):
    rows = measured("x " * 12, "y")
    assert rows["full"]["behaviour_evidence"] is False
    assert "too few to tell caches apart" in rows["full"]["behaviour_note"]


def test_a_policy_holds_its_budget_when_the_answer_begins():
    model = pico.attached("llama")
    settings = [full(model), evicted(model, make_policy("snapkv", "30%", {}, {}), "snapkv", CONTEXT)]
    rows = measure_behaviour(model, pico.tokenizer(), settings, TEXT, CONTEXT, 1, 0, silent)
    kept = next(v for k, v in rows.items() if k != "full")["behaviour_kept"]
    assert 0.30 <= kept <= 0.30 * (1 + 8 / 128) + 0.01  # 2 x 16 numbers in fp32, and a position and a score
    assert rows["full"]["behaviour_kept"] == 1


def test_finished_answers_are_not_asked_again(tmp_path, monkeypatch):
    model = pico.attached("llama")
    settings = [full(model), evicted(model, make_policy("snapkv", "30%", {}, {}), "snapkv", CONTEXT)]
    task = Task({"own": TEXT}, CONTEXT, windows=1, cases=1)

    def rows() -> list[dict]:
        return evaluate(model, pico.tokenizer(), settings, task, ("behaviour",), work=tmp_path / "work")[
            "rows"
        ]

    first, counted = rows(), Counted(model, monkeypatch)
    assert rows() == first and counted.tokens == 0
    assert [row["behaviour_ceiling"] for row in first] == [first[0]["behaviour"]] * 2


def test_rules_of_a_case_are_scored_one_by_one():
    case = KINDS_OF_BEHAVIOUR["instructions"](random.Random(1))
    held = rules_held(case, "  ")
    assert held == [False, False, False]


def test_a_prompt_beyond_the_positions_is_refused(monkeypatch):
    with pytest.raises(
        LowkeyError, match=r"context 600: .* beyond the model's 620 positions; give at most 572"
    ):
        monkeypatch.setattr(behaviour.families, "max_positions", lambda model: 620)
        measure_behaviour(None, chatting(), [setting("full")], TEXT, 600, 1, 0, silent)
