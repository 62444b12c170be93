"""Recall: what the cases contain, and that only a model that knows the answer scores."""

from __future__ import annotations

import random
import re
from types import SimpleNamespace

import pico
import pytest
import torch
from recall_models import END, FakeCache, chatting

import lowkey
from lowkey.catalog import make_policy
from lowkey.core.progress import silent
from lowkey.core.types import LowkeyError
from lowkey.evaluate import recall
from lowkey.evaluate.asking import Frame, write_answer
from lowkey.evaluate.recall import FORMS, KEYS, Fact, draw_episode, draw_facts, weave
from lowkey.evaluate.settings import Setting, evicted, full, row_identity
from lowkey.heads.needles import sentence_ends

TOKENIZER = pico.tokenizer()
HAYSTACK = TOKENIZER("It was a bright cold day in April, and the clocks were striking. " * 20).input_ids
SEEDS = pytest.mark.parametrize("seed", range(5))


def encode(text: str) -> list[int]:
    return TOKENIZER(text).input_ids


def episode(seed: int = 0, context: int = 300, facts: int = 8) -> recall.Episode:
    return draw_episode(random.Random(seed), encode, HAYSTACK, context, facts)


# -- weave


@SEEDS
@pytest.mark.parametrize("length", [9, 10, 50, 509])
def test_weaving_gives_exactly_the_length(seed, length):
    assert len(weave(random.Random(seed), range(500), [[-1] * 4, [-2] * 5], length)) == length


@SEEDS
def test_inserts_stay_whole_and_in_order(seed):
    inserts = [[-1, -2], [-3], [-4, -5, -6]]
    out = weave(random.Random(seed), range(500), inserts, 60)
    assert [x for x in out if x < 0] == [-1, -2, -3, -4, -5, -6]
    assert out.index(-2) == out.index(-1) + 1 and out.index(-6) == out.index(-4) + 2


@SEEDS
def test_what_is_around_them_is_one_stretch_of_the_text(seed):
    rest = [x for x in weave(random.Random(seed), range(500), [[-1], [-2]], 60) if x >= 0]
    assert rest == list(range(rest[0], rest[0] + 58))


def test_places_differ_from_case_to_case():
    places = {weave(random.Random(seed), range(500), [[-1]], 60).index(-1) for seed in range(20)}
    assert len(places) > 10 and min(places) < 20 and max(places) > 40


@pytest.mark.parametrize("haystack, length", [(500, 4), (10, 60)], ids=["facts do not fit", "text too short"])
def test_what_cannot_be_woven_is_refused_in_one_line(haystack, length):
    with pytest.raises(LowkeyError) as refusal:
        weave(random.Random(0), range(haystack), [[-1] * 5], length)
    assert len(str(refusal.value).splitlines()) == 1 and str(length) in str(refusal.value)


# -- facts and cases


@SEEDS
def test_facts_have_keys_of_their_own_and_three_digits(seed):
    facts = draw_facts(random.Random(seed), 40)
    assert len({f.key for f in facts}) == 40 and {f.key for f in facts} <= set(KEYS)
    assert all(re.fullmatch(r"\d{3}", f.value) for f in facts)


def test_the_keys_are_distinct_words():
    assert len(set(KEYS)) == len(KEYS) and all(re.fullmatch("[a-z]+", key) for key in KEYS)


def test_the_sentences_of_a_fact():
    fact = Fact("oak", "048")
    assert (fact.statement, fact.question, fact.answer) == (" Remember oak 048.", " Recall oak", " 048")


@SEEDS
def test_a_prompt_is_context_and_question(seed):
    case = episode(seed)
    assert len(case.prompt) == 300 + len(case.question)
    assert case.prompt[300:] == case.question


@SEEDS
def test_the_asked_fact_is_in_the_prompt_once(seed):
    case = episode(seed)
    text, key = TOKENIZER.decode(case.prompt), TOKENIZER.decode(case.question).removeprefix(" Recall ")
    assert (
        text.count(f" Remember {key}{TOKENIZER.decode(case.answer)}.") == text.count(f" Remember {key} ") == 1
    )
    assert text.count(" Remember ") == 8


def test_a_seed_gives_the_same_case():
    assert episode(3) == episode(3) != episode(4)


def test_a_context_too_small_for_the_facts_is_refused():
    with pytest.raises(LowkeyError, match="context 16: 8 facts"):
        episode(context=16)


def test_facts_and_text_meet_between_sentences():
    """Sentences of ten tokens: the text begins with one, and no fact stands within one."""
    ends = range(0, 500, 10)
    out = weave(random.Random(0), range(500), [[-1], [-2, -3]], 63, ends)
    assert [out[i - 1] % 10 for i, x in enumerate(out) if x in (-1, -2) and i and out[i - 1] >= 0] in (
        [9, 9],
        [9],
    )
    assert next(x for x in out if x >= 0) % 10 == 0 and len(out) == 63


def test_sentence_ends_are_found_behind_quotes_and_brackets():
    ids = encode('"Go!" he said. (So it was.) Then 3.5 of')
    assert [TOKENIZER.decode(ids[:at]) for at in sentence_ends(TOKENIZER, ids)][:2] == [
        '"Go!',
        '"Go!" he said.',
    ]


# -- through a chat template


@pytest.mark.parametrize("name", [name for name in FORMS if name != "plain"])
def test_a_chat_case_is_a_message_as_long_as_the_context(name):
    tokenizer = chatting()
    (case,) = recall.draw_episodes(tokenizer, HAYSTACK, 500, 1, 0, name)
    text, form = tokenizer.decode(case.prompt), FORMS[name]
    assert (
        len(case.prompt) == 500
        and text.startswith("[user]")
        and case.prompt[-len(case.question) :] == case.question
    )
    key = next((k for k in KEYS if form.statement.format(key=k, value=case.value) in text), "")
    assert text.count(form.statement.format(key=key, value=case.value)) == 1
    assert text.endswith(f"{form.question.format(key=key)}~[assistant]{form.opening.format(key=key)}")


def test_the_plain_form_has_no_template():
    (case,) = recall.draw_episodes(chatting(), HAYSTACK, 300, 1, 0, "plain")
    (same,) = recall.draw_episodes(TOKENIZER, HAYSTACK, 300, 1, 0, "plain")
    assert case == same and same.prompt == [TOKENIZER.bos_token_id, *episode().prompt]


def test_without_a_template_an_answer_begins_on_a_new_line():
    asked, bare = (Frame.of(TOKENIZER).question("Who?", opening) for opening in ("It was", ""))
    assert TOKENIZER.decode(asked) == "Who?\nIt was" and TOKENIZER.decode(bare) == "Who?"


def test_the_form_is_chosen_by_the_template():
    assert recall.usual_form(TOKENIZER) == "plain" and recall.usual_form(chatting()) == "lines"


@pytest.mark.parametrize("told", [None, 5, [5, 6]])
def test_an_answer_ends_with_any_end_of_turn_that_is_known(told):
    """The generation config may tell one, several or none; the template's own is found where none is told."""
    model, tokenizer = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=told)), chatting()
    mark = tokenizer.convert_tokens_to_ids("~")
    assert Frame.of(tokenizer).ends(model) == {
        mark,
        *([] if told is None else [told] if isinstance(told, int) else told),
    }
    assert mark not in Frame.of(chatting(None)).ends(model)  # a plain letter ends nothing


@pytest.mark.parametrize(
    "said, right",
    [
        ("482", True),
        (" 482", True),
        ("482.", True),
        ('482"', True),
        ("4821", False),
        ("48", False),
        ("\n482", False),
        ("0482", False),
    ],
)
def test_the_number_and_no_further_digit_is_right(said, right):
    assert recall.is_right_value(said, "482") is right


# -- scoring


class Fake(torch.nn.Module):
    """A model that writes `answer(prompt)` and then its end."""

    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=4096))
    generation_config = SimpleNamespace(eos_token_id=END)

    def __init__(self, answer) -> None:
        super().__init__()
        self.answer, self.asked, self.script = answer, [], []
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, ids, *, past_key_values, logits_to_keep):
        if past_key_values.seen == 0:
            text = TOKENIZER.decode(ids[0, 1:])
            self.asked.append((text, past_key_values.name))
            self.script = [*encode(self.answer(text)), END]
        past_key_values.seen += ids.shape[1]
        logits = torch.zeros(1, 1, 97)
        logits[0, 0, self.script.pop(0)] = 1.0
        return SimpleNamespace(logits=logits)


def knows(prompt: str) -> str:
    found = re.search(rf" Remember {prompt.rsplit(' ', 1)[1]} (\d+)\.", prompt)
    return " " + found[1] if found else " no"


def score(answer, cases=6, seed=0, names=("full",), context=300):
    model = Fake(answer)
    settings = [Setting(name, row_identity(), lambda name=name: FakeCache(name)) for name in names]
    return recall.measure_recall(
        model, TOKENIZER, settings, HAYSTACK, context, cases, seed, silent
    ), model.asked


@pytest.mark.parametrize(
    "answer, expected",
    [
        (knows, 1.0),
        (lambda prompt: knows(prompt) + " and more", 1.0),
        (lambda prompt: knows(prompt) + "0", 0.0),
        (lambda prompt: " 9x9", 0.0),
        (lambda prompt: knows(prompt)[:-1], 0.0),
        (lambda prompt: "\n" + knows(prompt), 0.0),
        (lambda prompt: "", 0.0),
    ],
    ids=["knows", "goes on", "goes on counting", "does not", "stops early", "begins late", "says nothing"],
)
def test_only_the_exact_answer_scores(answer, expected):
    assert score(answer)[0]["full"]["exact_match"] == expected


def test_half_of_the_answers_give_half_the_score_and_no_evidence():
    turns = iter(range(100))
    found = score(lambda prompt: knows(prompt) if next(turns) % 2 else " no", names=("full", "int8"))[0]
    assert found["full"]["exact_match"] == found["int8"]["exact_match"] == 0.5
    assert not found["full"]["recall_evidence"] and not found["int8"]["recall_evidence"]
    assert (
        "0.50 in form 'plain' at context 300, so this recall is no evidence; no other form"
        in found["full"]["recall_note"]
    )


def test_the_note_names_a_form_that_the_full_cache_solves():
    """This model knows what stands behind a key on a line of its own, and nothing else."""

    def reads_lines(prompt: str) -> str:
        asked = re.search(r'says "(\w+):$', prompt)
        return " " + re.search(rf"\n{asked[1]}: (\d+)", prompt)[1] if asked else " no"

    assert score(reads_lines)[0]["full"]["recall_note"].endswith("give --recall-form lines, which it solves")


def test_the_note_names_a_shorter_context_that_is_solved():
    found = score(lambda prompt: knows(prompt) if len(prompt) < 400 else " no", context=600)[0]
    assert found["full"]["recall_note"].endswith("give --context 300, which it solves")


def test_there_is_no_note_when_the_full_cache_solves_the_task():
    found = score(knows, names=("full", "int8"))[0]
    assert found["int8"]["recall_evidence"] and "recall_note" not in found["full"]


def test_bytes_are_those_that_the_answer_was_written_from():
    """Prompt and question, no token of the answer: 10 bytes a token for the full cache, 5 for the other."""
    found = score(knows, names=("full", "int8"))[0]
    assert (found["full"]["recall_kept"], found["int8"]["recall_kept"]) == (1.0, 0.5)


def test_every_setting_is_asked_the_same_over_its_own_cache():
    found, asked = score(knows, cases=3, names=("full", "int8"))
    assert list(found) == ["full", "int8"]
    assert [cache for _, cache in asked] == ["full"] * 3 + ["int8"] * 3
    assert [text for text, _ in asked[:3]] == [text for text, _ in asked[3:]]


def test_another_seed_asks_other_questions():
    first, again, other = ([text for text, _ in score(knows, seed=seed)[1]] for seed in (0, 0, 1))
    assert first == again != other


# -- over real caches


def test_writing_is_what_generate_writes():
    model, ids = pico.attached("llama"), pico.prompt(30, 1)
    stock = (
        pico.build("llama")
        .generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)[0, 30:]
        .tolist()
    )
    cache = lowkey.make_cache(model)
    assert write_answer(model, cache, ids, set(), 8).ids == stock
    short = write_answer(model, lowkey.make_cache(model), ids, {stock[3]}, 8)
    assert short.ids == stock[: stock.index(stock[3])]
    held = lowkey.make_cache(model)
    model(ids, past_key_values=held)
    assert short.held == held.nbytes()


@pytest.mark.parametrize("name", ["snapkv", "kvzip"])
def test_a_policy_holds_its_budget_when_the_answer_begins(name):
    model = pico.attached("llama")
    settings = [full(model), evicted(model, make_policy(name, "30%", {"recent": "4"}, {}), name, 300)]
    found = recall.measure_recall(model, TOKENIZER, settings, HAYSTACK, 300, 2, 0, silent)
    kept = next(v for k, v in found.items() if k != "full")["recall_kept"]
    assert 0.30 <= kept <= 0.30 * (1 + 8 / 128) + 0.005  # 2 x 16 numbers in fp32, and a position and a score


def test_a_budget_smaller_than_the_question_is_refused_at_once():
    model, read = pico.attached("llama"), []
    settings = [full(model), evicted(model, make_policy("snapkv", "6%", {}, {}), "snapkv", 300)]

    def progress(items, label, total=None):
        read.append(label)
        return iter(items)

    with pytest.raises(LowkeyError, match=r"budget 6%: .* do not hold a question of"):
        recall.measure_recall(model, TOKENIZER, settings, HAYSTACK, 300, 2, 0, progress)
    assert not read
