"""Metrics of suites against scores that are computed by hand."""

from __future__ import annotations

import sys

import pytest

from lowkey.core.errors import LowkeyError
from lowkey.suites import METRICS, SuiteSample, Turn, scored

A_D = ("A", "B", "C", "D")
# metric, what was said, the answers, the choices, the score by hand
BY_HAND = [
    ("string_match_all", "It is 12 and 34.", ("12", "34", "56"), (), 2 / 3),
    ("string_match_all", "OAK", ("oak",), (), 1),
    ("string_match_part", "maybe Paris", ("London", "paris"), (), 1),
    ("string_match_part", "Rome", ("London", "paris"), (), 0),
    # said "green tall barn" after articles and marks; 2 of 3 words common with 2 words: 2 * 2 / (3 + 2)
    ("qa_f1", "The green, tall barn.", ("a green barn", "x"), (), 0.8),
    ("qa_f1", "no", ("yes",), (), 0),
    # a word that stands twice counts twice: common 2 of 3 and 2
    ("qa_f1", "ha ha ho", ("ha ha",), (), 0.8),
    ("qa_f1_line", "\n\ngreen barn\nQuestion: more", ("green barn",), (), 1),
    # characters 李 明 的 against 李 明: 2 * 2 / (3 + 2)
    ("qa_f1_characters", "李明的。", ("李明",), (), 0.8),
    # the longest common subsequence "the cat sat" has 3 of 3 and 3 of 6 words: F1 2/3
    ("rouge_l", "the cat sat", ("the cat sat on the mat",), (), 2 / 3),
    ("rouge_l_line", "\nthe cat sat\non the mat", ("the cat sat on the mat",), (), 2 / 3),
    ("rouge_l", "x", ("y", "x"), (), 1),
    # line by line: both lines of the answer are found, though in another order: 4 of 4 and 4 of 4
    ("rouge_lsum", "b c\nd e", ("d e\nb c",), (), 1),
    ("classification_line", "Number or Person", ("Person",), ("Number", "Person", "City"), 1 / 2),
    ("classification_line", "City\nPerson", ("Person",), ("Number", "Person", "City"), 0),
    # "Person" is named only as a part of the right class
    ("classification_line", "Person group", ("Person group",), ("Person", "Person group"), 1),
    ("count", "There are 4, or 5, or 4", ("4",), (), 2 / 3),
    ("count", "none", ("4",), (), 0),
    ("retrieval", "Paragraph 3", ("Paragraph 3",), (), 1),
    ("retrieval", "Paragraph 3 or Paragraph 13", ("Paragraph 3",), (), 1 / 2),
    ("retrieval_zh", "段落12", ("段落12",), (), 1),
    # the first line that is code; "return x" against "return y": 7 of 8 characters: 2 * 7 / 16
    ("code_sim", "\n# a comment\nreturn x\nmore", ("return y",), (), 0.875),
    ("letter", "The correct answer is (B).", ("B",), A_D, 1),
    ("letter", "**The correct answer is B**", ("B",), A_D, 1),
    ("letter", "B", ("B",), A_D, 0),
    ("first_letter", " C. stone", ("C",), A_D, 1),
    ("first_letter", "I think the answer is: D", ("D",), A_D, 1),
    ("first_letter", "it may be C", ("C",), A_D, 1),
    ("first_letter", "nothing", ("A",), A_D, 0),
    ("word", 'The value is "ab12".', ("ab12",), (), 1),
    ("word", "ab123", ("ab12",), (), 0),
    ("contains", "it was ruth tarn", ("RUTH",), (), 1),
    ("contains", "tom", ("RUTH",), (), 0),
    ("prefix", " Colour, of course", ("Colour",), (), 1),
    ("prefix", "The Colour", ("Colour",), (), 0),
    ("label", "In the kitchen. Not the garden.", ("kitchen",), ("kitchen", "garden"), 1),
    ("label", "kitchen or garden", ("kitchen",), ("kitchen", "garden"), 0),
    # "office" is named in the question, so the answer may repeat it
    ("label", "the kitchen, before the office", ("kitchen",), ("kitchen", "office"), 1),
    ("label", "kitchenette", ("kitchen",), ("kitchen",), 0),
    ("masks", "<mask-0>: Ruth\n<mask-1>: Tom", ("<mask-0>: Ruth", "<mask-1>: Anders"), (), 1 / 2),
    ("first_integer", "it is 71432, not 5", ("71432",), (), 1),
    ("first_integer", "5, not 71432", ("71432",), (), 0),
    ("last_integer", "first 3, then 6.", ("6",), (), 1),
    ("last_integer", "6 goats", ("6",), (), 0),
    ("first_number", "about 31.0", ("31",), (), 1),
    ("first_number", "3 or 31", ("31",), (), 0),
    ("number_prefix", "6, 11, 14", ("6", "10", "14"), (), 1 / 3),
    ("number_prefix", "6 10 14 20", ("6", "10", "14"), (), 1),
    ("number", "3 + 2 = 5\n#### 1,205.00", ("1205",), (), 1),
    ("number", "so 7 goats, then 5 goats.", ("5",), (), 1),
    ("number", "so $\\boxed{012}$, not 13", ("12",), (), 1),
    ("number", "no idea", ("5",), (), 0),
    ("number", "it costs $18", ("18",), (), 1),
    ("math", "so \\boxed{\\dfrac{3}{4}}", ("\\frac34",), (), 1),
    ("math", "so \\boxed{3/4}", ("\\frac{3}{4}",), (), 1),
    ("math", "\\boxed{1} then \\boxed{x^{2}}", ("x^{2}",), (), 1),
    ("math", "The answer is 0.50.", ("0.5",), (), 1),
    ("math", "\\boxed{2}", ("3",), (), 0),
]
CHINESE = {"qa_f1_words_zh", "rouge_l_zh"}  # need a library that divides words; tested with a stand-in


def sample(metric: str, answers: tuple[str, ...], choices: tuple[str, ...] = (), **more) -> SuiteSample:
    question = "Where was it before the office?"
    return SuiteSample("suite", "task", 0, "", question, answers, metric, 8, choices=choices, **more)


@pytest.mark.parametrize(("metric", "said", "answers", "choices", "by_hand"), BY_HAND)
def test_a_metric_is_what_it_is_by_hand(metric, said, answers, choices, by_hand):
    assert scored(sample(metric, answers, choices), said) == pytest.approx(by_hand)


def test_every_metric_is_computed_by_hand():
    assert {metric for metric, *_ in BY_HAND} | CHINESE == set(METRICS)


class Words:
    """Stands in for the library that divides Chinese words: each two characters are a word."""

    @staticmethod
    def cut(text: str, cut_all: bool = False) -> list[str]:
        return [text[i : i + 2] for i in range(0, len(text), 2)]


def test_chinese_words_are_compared(monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", Words)
    # words 李明 养羊 against 李明 养牛: one of two and one of two
    assert scored(sample("qa_f1_words_zh", ("李明养牛",)), "李明养羊") == pytest.approx(0.5)
    # the longest common subsequence is the first word of two
    assert scored(sample("rouge_l_zh", ("李明养牛",)), "李明养羊") == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("metric", "library"),
    [("qa_f1_words_zh", "jieba"), ("rouge_l", "rouge_score"), ("code_sim", "rapidfuzz")],
)
def test_a_library_that_is_missing_is_named(monkeypatch, metric, library):
    for name in (library, f"{library}.rouge_scorer", f"{library}.fuzz"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(LowkeyError, match=f"needs the library {library}; .*pip install"):
        scored(sample(metric, ("x",)), "x")


def test_an_answer_ends_at_a_stop_and_turns_have_their_own():
    turns = (Turn("And then?", ("iron",), 8),)
    asked = sample("word", ("oak",), stop=("\n",), turns=turns)
    assert scored(asked, "ash\noak") == 0
    assert [scored(asked, "iron", turn) for turn in (0, 1)] == [0, 1]
