"""Suites as tasks of lm-eval, whose prompts are split exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import Task, TaskConfig

from lowkey.core.options import nearest_name
from lowkey.core.types import LowkeyError
from lowkey.harness.task_settings import SUITE
from lowkey.suites import SUITES, Source, SuiteSample, load_samples, scored

SUITE_SCORE = "score"  # name of the metric


class SuiteTask(Task):
    """The samples of one task of a suite. Each question of a sample is a document.

    A further question about a context comes behind the questions before it and their right answers, as
    SCBench (arXiv:2412.10319) asks it, so that a wrong answer does not spoil the next one.

    Args:
        samples: the samples, of one suite and task.
    """

    VERSION = 1
    OUTPUT_TYPE = "generate_until"

    def __init__(self, samples: Sequence[SuiteSample]) -> None:
        self.samples = samples
        self.documents = [
            {
                "suite": sample.suite,
                "task": sample.task,
                "number": i,
                "turn": turn,
                "context": sample.context,
                "question": asked.question,
                "answers": list(asked.answers),
                "metric": sample.metric,
            }
            for i, sample in enumerate(samples)
            for turn, asked in enumerate(sample.asked)
        ]
        super().__init__()
        name = suite_task_name(samples[0].suite, samples[0].task)
        self._config = TaskConfig(task=name, output_type=self.OUTPUT_TYPE, num_fewshot=0)

    def download(self, data_dir: Any = None, cache_dir: Any = None, download_mode: Any = None) -> None:
        """Nothing: the samples are there."""

    def has_training_docs(self) -> bool:
        """Suites have no examples for training."""
        return False

    def has_validation_docs(self) -> bool:
        """Suites have no examples for validation."""
        return False

    def has_test_docs(self) -> bool:
        """All documents are for testing."""
        return True

    def test_docs(self) -> list[dict]:
        """The documents, one for each question."""
        return self.documents

    def doc_to_text(self, doc: Mapping[str, Any]) -> str:
        """The prompt without a chat template and without an opening."""
        return doc["context"] + self._turns(doc)[-1][1]

    def doc_to_target(self, doc: Mapping[str, Any]) -> str:
        """A right answer."""
        return doc["answers"][0]

    def _turns(self, doc: Mapping[str, Any]) -> list[tuple[str, str]]:
        """(role, words) of all turns behind the context, of which the last asks."""
        asked = self.samples[doc["number"]].asked[: doc["turn"] + 1]
        told = [
            turn
            for a in asked[:-1]
            for turn in (("user", a.question), ("assistant", " ".join(a.answers[:1])))
        ]
        return [*told, ("user", asked[-1].question)]

    def fewshot_context(
        self,
        doc: Mapping[str, Any],
        num_fewshot: int = 0,
        rnd: Any = None,
        description: str | None = None,
        system_instruction: str | None = None,
        apply_chat_template: bool = False,
        chat_template: Callable[..., str] | None = None,
        **unused: Any,
    ) -> str:
        """The prompt of a document: context, question and opening, in a chat template if one is wanted."""
        turns, opening = self._turns(doc), self.samples[doc["number"]].opening
        if apply_chat_template and chat_template is not None:
            messages = [{"role": role, "content": words} for role, words in turns]
            messages[0]["content"] = doc["context"] + messages[0]["content"]
            if system_instruction:
                messages.insert(0, {"role": "system", "content": system_instruction})
            return chat_template(messages) + opening
        said = "\n".join(words for _, words in turns) + ("\n" + opening if opening else "\n")
        return (f"{system_instruction}\n\n" if system_instruction else "") + doc["context"] + said

    def construct_requests(self, doc: Mapping[str, Any], ctx: str, **more: Any) -> Instance:
        """The request for the answer to a document."""
        sample = self.samples[doc["number"]]
        given = {
            "until": list(sample.stop),
            "max_gen_toks": sample.asked[doc["turn"]].tokens,
            "do_sample": False,
            "temperature": 0.0,
        }
        known = {name: more[name] for name in ("metadata",) if name in more}
        return Instance("generate_until", dict(doc), (ctx, given), 0, **known)

    def process_results(self, doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
        """The score of an answer by the suite's own metric."""
        return {SUITE_SCORE: scored(self.samples[doc["number"]], str(results[0]), doc["turn"])}

    def aggregation(self) -> dict[str, Callable]:
        """Scores are averaged."""
        return {SUITE_SCORE: mean}

    def higher_is_better(self) -> dict[str, bool]:
        """A higher score is better."""
        return {SUITE_SCORE: True}


def suite_task_name(suite: str, task: str) -> str:
    """The name of a suite's task beside lm-eval's own."""
    return f"{SUITE}{suite}" if task == suite else f"{SUITE}{suite}/{task}"


def suite_tasks(names: Sequence[str], source: Source) -> list[SuiteTask]:
    """The tasks of suites by name.

    Args:
        names: like `suite:ruler` for all tasks of a suite, or `suite:ruler/niah_single_1` for one.
        source: what samples are made of.

    Raises:
        LowkeyError: for an unknown suite or task, or files that are missing or damaged.
    """
    wanted: dict[str, list[str]] = {}
    for name in names:
        suite, _, task = name.removeprefix(SUITE).partition("/")
        if suite not in SUITES:
            raise LowkeyError(f"suite {suite!r} is unknown; {nearest_name(suite, SUITES)}")
        wanted.setdefault(suite, []).extend([task] if task else SUITES[suite].tasks)
    made = []
    for suite, tasks in wanted.items():
        by_task: dict[str, list[SuiteSample]] = {}
        for sample in load_samples(suite, source, tasks):
            by_task.setdefault(sample.task, []).append(sample)
        made += [SuiteTask(samples) for samples in by_task.values()]
    return made
