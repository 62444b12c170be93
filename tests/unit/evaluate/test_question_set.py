"""The question task: its set, its texts, and that only what the full cache answers is asked of others."""

from __future__ import annotations

from importlib.resources import files
from types import SimpleNamespace

import pico
import pytest
import torch
from recall_models import END, FakeCache, chatting

from lowkey.catalog import make_policy
from lowkey.core.files.measured import Measured
from lowkey.core.progress import silent
from lowkey.core.types import LowkeyError
from lowkey.evaluate import questions
from lowkey.evaluate.asking import Frame
from lowkey.evaluate.questions import (
    Item,
    Paragraph,
    draw_texts,
    embedded_paragraphs,
    is_right_answer,
    normalised_words,
)
from lowkey.evaluate.settings import Setting, evicted, full, packed, row_identity

TOKENIZER = pico.tokenizer()
NAMES = ["oak", "elm", "ash", "fir", "yew", "box", "bay", "fig"]


def paragraphs(count: int = 8) -> list[Paragraph]:
    """`the oak has 100 leaves and is 200 years old.`, with two questions about each."""
    return [
        Paragraph(
            f"the {name} has {100 + i} leaves and is {200 + i} years old.",
            (
                Item(2 * i, f"leaves of the {name}?", (str(100 + i),)),
                Item(2 * i + 1, f"age of the {name}?", (str(200 + i), "old")),
            ),
        )
        for i, name in enumerate(NAMES[:count])
    ]


# -- the set


def test_each_answer_stands_in_its_own_paragraph():
    for paragraph in embedded_paragraphs():
        for item in paragraph.items:
            assert is_right_answer(paragraph.text, item.answers), item


def test_the_set_is_as_large_as_promised_and_small_on_disk():
    items = [item for p in embedded_paragraphs() for item in p.items]
    assert (
        len(embedded_paragraphs()) >= 60
        and len(items) >= 200
        and all(3 <= len(p.items) <= 4 for p in embedded_paragraphs())
    )
    assert [item.number for item in items] == list(range(len(items)))
    assert len({item.question for item in items}) == len(items)
    assert len((files("lowkey") / "data" / "questions.json").read_bytes()) < 150_000


def test_no_answer_stands_in_its_question():
    assert not [
        item
        for p in embedded_paragraphs()
        for item in p.items
        if is_right_answer(item.question, item.answers)
    ]


# -- right and wrong


@pytest.mark.parametrize(
    "said, right",
    [
        ("It was the Grey Petrel.", True),
        ("grey petrel", True),
        ("Grey-Petrel", False),
        ("the petrel", False),
        ("greypetrel", False),
        ("seven, I think", True),
        ("seventeen", False),
        ("17", False),
        ("7", True),
        ("", False),
    ],
)
def test_an_answer_is_compared_by_whole_words(said, right):
    assert is_right_answer(said, ("The Grey Petrel", "seven", "7")) is right


def test_case_punctuation_and_articles_do_not_count():
    assert normalised_words("The  Miller's Ghost, a play!") == ["millers", "ghost", "play"]


# -- texts


@pytest.mark.parametrize("seed", range(5))
def test_every_paragraph_is_asked_once_and_no_text_is_too_long(seed):
    for frame in (Frame.of(TOKENIZER), Frame.of(chatting())):
        texts = draw_texts(frame, paragraphs(), seed, 200)
        assert sorted(item.number for text in texts for item in text.items) == list(range(16))
        assert all(100 < len(text.ids) <= 200 for text in texts) and len(texts) > 1
        for text in texts:
            words = frame.tokenizer.decode(text.ids)
            assert all(words.count(item.question.split()[-1].rstrip("?")) == 1 for item in text.items)


def test_the_paragraph_with_the_answer_stands_anywhere():
    places = set()
    for seed in range(12):
        (text,) = draw_texts(Frame.of(TOKENIZER), paragraphs(), seed, 1000)
        places.add(TOKENIZER.decode(text.ids).index("the oak") // 50)
    assert len(places) >= 5


def test_a_paragraph_that_does_not_fit_is_refused():
    with pytest.raises(LowkeyError, match="does not hold the longest paragraph"):
        draw_texts(Frame.of(TOKENIZER), paragraphs(), 0, 40)


# -- asking


class Fake(torch.nn.Module):
    """Knows the leaves; over a cache that is not the full one, only those of even numbers. What it reads is
    collected in the cache.
    """

    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=4096))
    generation_config = SimpleNamespace(eos_token_id=END)

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.tokens, self.asks, self.later = torch.nn.Parameter(torch.zeros(1)), 0, 0, False

    def forward(self, ids, *, past_key_values, logits_to_keep):
        cache = past_key_values
        cache.seen, self.tokens = cache.seen + ids.shape[1], self.tokens + ids.shape[1]
        if ids.shape[1] > 1:
            cache.text = getattr(cache, "text", "") + TOKENIZER.decode(ids[0])
            name = cache.text.rsplit("of the ", 1)[-1].rstrip("?")
            i = NAMES.index(name) if name in NAMES else 0
            knows = "leaves of" in cache.text and (cache.name == "full" or i % 2 == 0)
            self.asks += " of the " in cache.text
            if self.later and self.asks > 16 and "age of" in cache.text:
                i, knows = i + 100, True
            cache.script = [*TOKENIZER(f"{100 + i}" if knows else "who knows").input_ids, END]
        logits = torch.zeros(1, 1, 97)
        logits[0, 0, cache.script.pop(0)] = 1.0
        return SimpleNamespace(logits=logits)


def ask(wanted: int, names=("full", "int8"), measured=None, later=False):
    model = Fake()
    model.later = later
    settings = [Setting(name, row_identity(), lambda name=name: FakeCache(name)) for name in names]
    return questions.measure_questions(
        model, TOKENIZER, settings, wanted, 0, silent, paragraphs=paragraphs(), measured=measured
    ), model


def test_a_setting_is_asked_what_the_full_cache_answers():
    found, _ = ask(100)
    assert (
        found["full"]["questions_right"],
        found["full"]["questions_of"],
        found["full"]["questions_asked"],
    ) == (8, 8, 16 + 8)
    assert (found["int8"]["questions_right"], found["int8"]["questions_of"], found["int8"]["questions"]) == (
        4,
        8,
        0.5,
    )
    assert sorted(found["full"]["questions_items"]) == list(range(0, 16, 2))
    assert found["int8"]["questions_kept"] == 0.5


def test_screening_ends_when_there_are_enough():
    found, _ = ask(3)
    assert (
        found["full"]["questions_of"] == found["int8"]["questions_of"] == 3
        and found["full"]["questions_asked"] < 16
    )


def test_what_was_not_answered_is_asked_again_in_another_text():
    found, _ = ask(100, later=True)
    assert (found["full"]["questions_of"], found["full"]["questions_asked"]) == (16, 16 + 8)
    assert sorted(found["full"]["questions_items"]) == list(range(16))


def test_few_questions_are_no_evidence_and_say_so():
    found, _ = ask(100)
    assert not found["full"]["questions_evidence"] and not found["int8"]["questions_evidence"]
    assert found["full"]["questions_note"].endswith("use a model that answers more")
    assert ask(3)[0]["full"]["questions_note"].endswith("give --questions 20 or more")
    assert found["full"]["questions_note"].startswith(
        "questions: the full cache answers 8 of 24 askings, too few"
    )


def test_a_text_is_read_once_for_all_its_questions():
    """And each answer is written over a cache that has seen no other question."""
    _, model = ask(100, names=("full",))
    # what is not answered, in another text again
    texts = 2 * draw_texts(Frame.of(TOKENIZER), paragraphs(), 0, questions.TEXT_LENGTH)
    asked = [
        len(questions._question(Frame.of(TOKENIZER), item)) + questions.ANSWER_LENGTH
        for text in texts
        for item in text.items
    ]
    assert model.tokens <= sum(len(text.ids) for text in texts) + sum(asked)


def test_what_is_known_is_not_asked_again():
    measured = Measured()
    first, _ = ask(100, measured=measured)
    again, model = ask(100, measured=measured)
    assert first == again and model.tokens == 0


def test_copied_caches_give_the_same_answers():
    """The full cache and packed integers answer over copies as `generate` does over the whole prompt."""
    model = pico.attached("llama")
    frame, item = Frame.of(TOKENIZER), paragraphs()[0].items[0]
    (text,) = draw_texts(frame, paragraphs(3), 0, 400)
    ids = torch.tensor([text.ids + questions._question(frame, item)])
    how = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": questions.ANSWER_LENGTH,
        "do_sample": False,
        "eos_token_id": None,
    }
    stock = pico.build("llama").generate(ids, **how)[0, ids.shape[1] :]
    asker = questions._Asker(model, TOKENIZER, frame, full(model), True)
    for _ in range(2):
        assert asker.ask(text, item)["said"] == TOKENIZER.decode(stock)


def test_policies_and_integers_are_measured_with_their_bytes():
    model = pico.attached("llama")
    settings = [
        full(model),
        packed(model, 8),
        evicted(model, make_policy("snapkv", "60%", {"recent": "4"}, {}), "snapkv", 300),
    ]
    found = questions.measure_questions(model, TOKENIZER, settings, 5, 0, silent, paragraphs=paragraphs(3))
    assert [row["questions_of"] for row in found.values()] == [0, 0, 0] and found["full"]["questions"] is None
