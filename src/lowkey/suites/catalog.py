"""The suites by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lowkey.core.errors import LowkeyError
from lowkey.core.options import nearest_name
from lowkey.suites.babilong import BABILONG
from lowkey.suites.infinitebench import INFINITEBENCH
from lowkey.suites.longbench import LONGBENCH
from lowkey.suites.longbench_v2 import LONGBENCH_V2
from lowkey.suites.loogle import LOOGLE
from lowkey.suites.maths import AIME, GSM8K, MATH
from lowkey.suites.ruler import RULER
from lowkey.suites.sample import Source, Suite, SuiteSample
from lowkey.suites.scbench import SCBENCH

SUITES: dict[str, Suite] = {
    "ruler": RULER,
    "longbench": LONGBENCH,
    "longbench_v2": LONGBENCH_V2,
    "babilong": BABILONG,
    "infinitebench": INFINITEBENCH,
    "loogle": LOOGLE,
    "scbench": SCBENCH,
    "gsm8k": GSM8K,
    "math": MATH,
    "aime": AIME,
}


def load_samples(name: str, source: Source, tasks: Sequence[str] = ()) -> list[SuiteSample]:
    """The samples of a suite.

    Args:
        name: a name of `SUITES`.
        source: what samples are made of. A folder inside its folder that has the suite's name is taken in
            its place, so that one folder may hold several suites.
        tasks: names of tasks of the suite; all if none is named.

    Returns:
        The samples, task by task. No prompt is longer than the source allows: see `shortened_sample`.

    Raises:
        LowkeyError: a suite or task is not known, or a file is missing or damaged.
    """
    if name not in SUITES:
        raise LowkeyError(f"suite {name!r} is unknown; {nearest_name(name, SUITES)}")
    suite = SUITES[name]
    if source.folder is not None and (source.folder / name).is_dir():
        source = replace(source, folder=source.folder / name)
    for task in tasks:
        if task not in suite.tasks:
            raise LowkeyError(f"task {task!r} is not one of {name}; {nearest_name(task, suite.tasks)}")
    return [
        shortened_sample(sample, source)
        for task in dict.fromkeys(tasks or suite.tasks)
        for sample in suite.samples(task, source)
    ]


def shortened_sample(sample: SuiteSample, source: Source) -> SuiteSample:
    """A sample whose prompt and answers fit.

    The middle of a context that is too long is cut out, as LongBench and InfiniteBench do it
    (arXiv:2308.14508, section 4.1). Answers may take half of the length at most.

    Args:
        sample: a sample.
        source: says how long a prompt may be.

    Returns:
        The sample itself if it fits; otherwise one with the first and last tokens of its context and, in
        `meta`, `cut`, the number of tokens that were left out. Where answers had to be shorter, `answer` is
        the number of tokens that the suite allows.

    Raises:
        LowkeyError: the questions alone are longer than that.
    """
    most = max(1, source.length // 2 // len(sample.asked))
    if any(turn.tokens > most for turn in sample.asked):
        meta = {**sample.meta, "answer": sample.tokens}
        turns = tuple(replace(turn, tokens=min(turn.tokens, most)) for turn in sample.turns)
        sample = replace(sample, tokens=min(sample.tokens, most), turns=turns, meta=meta)
    around = "".join(turn.question for turn in sample.asked) + sample.opening
    answers = sum(turn.tokens for turn in sample.asked)
    room = source.length - source.reserved - answers - source.count(around)
    ids = source.tokenizer(sample.context, add_special_tokens=False, verbose=False).input_ids
    if len(ids) <= room:
        return sample
    if room < 2:
        raise LowkeyError(
            f"length {source.length}: the questions and answers of {sample.suite} {sample.task} "
            f"{sample.number} take {source.length - room} tokens; give more"
        )
    front = room // 2
    for back in range(room - front, 0, -1):  # joined anew, the halves may take a token or two more
        cut = "".join(
            str(source.tokenizer.decode(part, skip_special_tokens=True))
            for part in (ids[:front], ids[-back:])
        )
        if source.count(cut) <= room:
            break
    meta = {**sample.meta, "cut": len(ids) - front - back}
    return replace(sample, context=cut, meta=meta)
