"""1-hop recall: facts hidden in running text, one of which is asked for at the end.

Key and value stand side by side in the text, and the key stands again where the answer is to begin. So any
model that copies in context can answer, and the score measures the cache and not knowledge. Models differ in
the wording that they can follow: `FORMS` has several, and the row of the full cache says whether a form is
evidence for a model. Everything works on token ids, with any tokenizer and any text.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.core.files.measured import Measured
from lowkey.core.progress import Progress
from lowkey.core.types import LowkeyError
from lowkey.evaluate.asking import Frame, check_budgets, read_context, tensor_of, write_answer
from lowkey.evaluate.settings import Setting
from lowkey.heads.needles import KEYS, Encode, draw_facts, sentence_ends, weave
from lowkey.heads.needles import Fact as Fact
from lowkey.models import families

SOLVED = 0.9  # if the full cache recalls less than this, recall says nothing about other caches
USUAL_FORM = "usual"  # stands for the form that suits the tokenizer
TRIAL_CASES = 5  # another form or context is recommended if it solves all of so many cases


@dataclass(frozen=True)
class RecallForm:
    """How facts are told and asked. Texts have the fields {key} and {value}.

    Args:
        summary: one line for the command line.
        statement: the sentence that states a fact.
        question: the question.
        opening: words that the model's answer begins with.
        chat: whether the tokenizer's chat template is used, if it has one.
        facts: number of facts.
        digits: digits of a value.
    """

    summary: str
    statement: str
    question: str
    opening: str = ""
    chat: bool = True
    facts: int = 8
    digits: int = 3


PLAIN = RecallForm(
    "what the embedded model was trained on, without a template",
    " Remember {key} {value}.",
    " Recall {key}",
    chat=False,
)
FORMS: dict[str, RecallForm] = {
    "plain": PLAIN,
    "lines": RecallForm(
        "four facts on lines of their own",
        "\n{key}: {value}\n",
        '\n\nWhat number stands after "{key}:" in the text?',
        'In the text it says "{key}:',
        facts=4,
    ),
    "prose": RecallForm(
        "four facts in sentences",
        " The code of the {key} is {value}.",
        "\n\nWhat is the code of the {key}?",
        "The code of the {key} is",
        facts=4,
    ),
    "passkey": RecallForm(
        "one fact, a number of five digits",
        " The pass key is {value}. Remember it.",
        "\n\nWhat is the pass key that the text names?",
        'In the text it says "The pass key is',
        facts=1,
        digits=5,
    ),
}


def usual_form(tokenizer: PreTrainedTokenizerBase) -> str:
    """The form that suits a tokenizer: `lines` with a chat template, else `plain`."""
    return "lines" if Frame.of(tokenizer).chat else "plain"


def frame_of(tokenizer: PreTrainedTokenizerBase, form: RecallForm) -> Frame:
    """The chat template of a tokenizer if the form uses one, else an empty frame."""
    return Frame.of(tokenizer) if form.chat else Frame(tokenizer, False)


@dataclass(frozen=True)
class Episode:
    """One case.

    Args:
        prompt: ids, which end with `question`.
        question: ids of the question.
        answer: ids that a model which answers right writes next.
        value: the text of the answer.
    """

    prompt: list[int]
    question: list[int]
    answer: list[int]
    value: str


def draw_episode(
    rng: random.Random,
    encode: Encode,
    haystack: Sequence[int],
    context: int,
    facts: int | None = None,
    keys: Sequence[str] = KEYS,
    form: RecallForm = PLAIN,
    frame: Frame | None = None,
    ends: Sequence[int] = (),
) -> Episode:
    """Draw one case.

    Args:
        rng: source of random numbers.
        encode: ids of a text, without special tokens.
        haystack: ids of running text.
        context: number of ids. In a chat they include the template and the question; otherwise the question
            and the beginning-of-text token come on top.
        facts: number of facts; None for the form's number.
        keys: words to choose keys from.
        form: how facts are told and asked.
        frame: the chat template; None for a prompt without a beginning-of-text token.
        ends: places in the haystack at which sentences end; see `needles.weave`.
    """
    drawn = draw_facts(rng, form.facts if facts is None else facts, keys, form.digits)
    asked = rng.choice(drawn)
    start = frame.start if frame else []
    words, opening = form.question.format(key=asked.key), form.opening.format(key=asked.key)
    question = frame.question(words, opening) if frame else encode(words)
    # In a chat the context is a whole prompt; plain text has its length without the question, as in training.
    room = context - (len(start) + len(question) if frame and frame.chat else 0)
    body = weave(
        rng, haystack, [encode(form.statement.format(key=f.key, value=f.value)) for f in drawn], room, ends
    )
    return Episode(start + body + question, question, encode(asked.answer), asked.value)


def measure_recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Sequence[Setting],
    haystack: Sequence[int],
    context: int,
    cases: int,
    seed: int,
    progress: Progress,
    refeed: bool = True,
    form: str = USUAL_FORM,
    measured: Measured | None = None,
) -> dict[str, dict]:
    """Share of cases in which greedy writing gives exactly the asked value.

    Args:
        model: the model, attached.
        tokenizer: its tokenizer.
        settings: what is compared; the first should be the full cache.
        haystack: ids of running text.
        context: number of ids of a case.
        cases: number of cases.
        seed: seed of the cases.
        progress: shows progress.
        refeed: a setting that evicts always chooses with the question in view. With `refeed` the question is
            then asked again over what was kept, so that every token of the answer depends on it. Without, the
            question saw the whole context and the first token of the answer costs nothing: the protocol of
            the papers of this field.
        form: a name of `FORMS`, or `usual` for the one that suits the tokenizer.
        measured: earlier measurements of the same job.

    Returns:
        By setting: `exact_match`, the share; `recall_form`; `recall_kept`, bytes held with the question when
        an answer began, as a share of the first setting's; `per_case`, 1 for each right case and 0 for each
        wrong one; and `recall_evidence`, whether the first setting reaches `SOLVED`. If it does not, its row
        has `recall_note` with a form or a context that it solves.
    """
    name = usual_form(tokenizer) if form == USUAL_FORM else form
    episodes = draw_episodes(tokenizer, haystack, context, cases, seed, name)
    for episode in episodes:
        check_budgets(settings, refeed, len(episode.prompt), len(episode.question))
    measured = measured or Measured()
    todo = [(s, i) for s in settings for i in range(cases) if f"recall {i} {s.name}" not in measured]
    for setting, i in progress(measured.share(todo), lambda unit: f"recall, {unit[0].name}"):
        measure = partial(answered, model, tokenizer, setting, episodes[i], name, refeed)
        measured.once(f"recall {i} {setting.name}", measure)
    measured.gather()
    answers = {s.name: [measured[f"recall {i} {s.name}"] for i in range(cases)] for s in settings}
    full = statistics.fmean(case["held"] for case in answers[settings[0].name])
    share = {s: statistics.fmean(case["right"] for case in cases) for s, cases in answers.items()}
    evidence = share[settings[0].name] >= SOLVED
    rows: dict[str, dict] = {
        s: {
            "exact_match": share[s],
            "recall_form": name,
            "recall_evidence": evidence,
            "recall_kept": statistics.fmean(case["held"] for case in cases) / full,
            "per_case": [int(case["right"]) for case in cases],
        }
        for s, cases in answers.items()
    }
    if not evidence:
        control, recalled = settings[0], share[settings[0].name]
        find = partial(_note, model, tokenizer, control, haystack, context, seed, name, recalled)
        rows[control.name]["recall_note"] = measured.once("recall note", find)
    return rows


def draw_episodes(
    tokenizer: PreTrainedTokenizerBase,
    haystack: Sequence[int],
    context: int,
    cases: int,
    seed: int,
    form: str,
) -> list[Episode]:
    """Draw cases; those of a chat have facts between sentences.

    Args:
        tokenizer: the tokenizer.
        haystack: ids of running text.
        context: number of ids of a case.
        cases: number of cases.
        seed: seed of the cases.
        form: a name of `FORMS`.
    """
    rng, wording = random.Random(seed), FORMS[form]
    frame = frame_of(tokenizer, wording)
    # Plain text has its facts anywhere, as the embedded model was trained; chat models expect whole
    # sentences.
    ends = sentence_ends(tokenizer, haystack) if wording.chat else ()
    return [
        draw_episode(rng, frame.encode, haystack, context, form=wording, frame=frame, ends=ends)
        for _ in range(cases)
    ]


def answered(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    setting: Setting,
    episode: Episode,
    form: str,
    refeed: bool,
) -> dict:
    """Let a setting answer one case.

    Args:
        model: the model, attached.
        tokenizer: its tokenizer.
        setting: what is measured.
        episode: the case: a prompt, its question and the right answer.
        form: how cases are worded, a name of `FORMS`.
        refeed: whether the question is asked again over what was kept, see `measure_recall`.

    Returns:
        `right`: whether the value was written; `held`: bytes held when the answer began.
    """
    ids = tensor_of(model, episode.prompt)
    cache = read_context(model, tokenizer, setting, ids, len(episode.question), refeed, episode.answer)
    # One token more than the answer has shows whether the number ends there.
    ends, most = frame_of(tokenizer, FORMS[form]).ends(model), len(episode.answer) + 1
    written = write_answer(model, cache, ids, ends, most)
    right = is_right_value(str(tokenizer.decode(written.ids)), episode.value)
    return {"right": right, "held": written.held}


def is_right_value(said: str, value: str) -> bool:
    """Whether the answer is the value, and no further digit follows."""
    said = said.lstrip(" ")
    return said.startswith(value) and not said[len(value) : len(value) + 1].isdigit()


def _note(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    control: Setting,
    haystack: Sequence[int],
    context: int,
    seed: int,
    form: str,
    share: float,
) -> str:
    """Why recall is no evidence here, and what would be: the first other form, or shorter context, that the
    control solves.

    Args:
        model: the model, attached.
        tokenizer: its tokenizer.
        control: the setting of the full cache.
        haystack: ids of running text.
        context: number of ids of a case.
        seed: seed of the cases.
        form: the form that was measured.
        share: the control's recall.
    """

    def solves(name: str, length: int) -> bool:
        try:
            check_positions(model, tokenizer, length, name)
            episodes = draw_episodes(tokenizer, haystack, length, TRIAL_CASES, seed, name)
        except LowkeyError:  # the facts do not fit
            return False
        return all(answered(model, tokenizer, control, e, name, False)["right"] for e in episodes)

    others = [(name, context) for name in FORMS if name != form]
    shorter = [(form, length) for length in (context // 2, context // 4) if length >= 128]
    works = next((pair for pair in others + shorter if solves(*pair)), None)
    if works is None:
        remedy = "no other form nor a shorter context was solved either"
    elif works[0] != form:
        remedy = f"give --recall-form {works[0]}, which it solves"
    else:
        remedy = f"give --context {works[1]}, which it solves"
    return (
        f"recall: the full cache itself has {share:.2f} in form {form!r} at context {context}, so this "
        f"recall is no evidence; {remedy}"
    )


def question_room(tokenizer: PreTrainedTokenizerBase, form: str = USUAL_FORM) -> int:
    """The positions that a question and its answer take beside the context of a case.

    Args:
        tokenizer: the model's.
        form: a name of `FORMS`, or `usual`.
    """
    wording = FORMS[usual_form(tokenizer) if form == USUAL_FORM else form]
    frame, fact = frame_of(tokenizer, wording), draw_facts(random.Random(0), 1, digits=wording.digits)[0]
    question = frame.question(wording.question.format(key=fact.key), wording.opening.format(key=fact.key))
    # In a chat the context includes the question. Otherwise it comes on top, twice where it is asked again.
    return len(frame.encode(fact.answer)) + 1 + (0 if frame.chat else 2 * len(question))


def check_positions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: int, form: str = USUAL_FORM
) -> None:
    """Check that a case, its question and its answer fit into the model's positions.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        context: number of ids of a case.
        form: a name of `FORMS`, or `usual`.

    Raises:
        LowkeyError: they do not fit.
    """
    longest, room = families.max_positions(model), question_room(tokenizer, form)
    if longest is not None and context + room > longest:
        raise LowkeyError(
            f"context {context}: a question and its answer take {room} tokens more, beyond the model's "
            f"{longest} positions; give at most {longest - room}, or another task than recall"
        )
