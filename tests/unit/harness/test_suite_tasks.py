"""Suites as tasks of lm-eval: prompts, splits, turns and scores."""

from __future__ import annotations

import pytest
from recall_models import chatting

from lowkey.core.errors import LowkeyError
from lowkey.evaluate.settings import full
from lowkey.harness.run import measure_tasks
from lowkey.harness.setting import setting_of
from lowkey.harness.splitting import context_length
from lowkey.harness.suite_tasks import SuiteTask, suite_tasks
from lowkey.harness.task_settings import TaskMeasuring
from lowkey.harness.tasks import load_tasks
from lowkey.models import loading
from lowkey.suites import Source, SuiteSample, Turn

TURNS = (Turn("\nWho sells?", ("Ruth", "R"), 3),)


def sample(number=0, context="The mill is old.", question="\nHow old?", **more):
    fields = {"answers": ("very",), "metric": "contains", "tokens": 4, "opening": "It is"}
    return SuiteSample("told", "mill", number, context, question, **(fields | more))


def prompt(task, number, **more):
    return task.fewshot_context(task.test_docs()[number], num_fewshot=0, **more)


def test_a_prompt_is_split_exactly_behind_the_context():
    task = SuiteTask([sample()])
    words = prompt(task, 0)
    assert words == "The mill is old.\nHow old?\nIt is"
    place = context_length("suite:told/mill", task.test_docs()[0], words, False)
    assert words[:place] == "The mill is old."


def test_a_chat_template_goes_around_context_and_question():
    task, tokenizer = SuiteTask([sample()]), chatting()
    words = prompt(
        task,
        0,
        apply_chat_template=True,
        chat_template=lambda messages: tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        ),
    )
    assert words == "[user]The mill is old.\nHow old?~[assistant]It is"
    place = context_length("suite:told/mill", task.test_docs()[0], words, False)
    assert words[:place] == "[user]The mill is old."


def test_a_further_question_comes_behind_right_answers():
    task = SuiteTask([sample(turns=TURNS, opening="")])
    assert len(task.test_docs()) == 2
    words = prompt(task, 1)
    assert words == "The mill is old.\nHow old?\nvery\n\nWho sells?\n"
    request = task.construct_requests(task.test_docs()[1], words, metadata=("x", 1, 1))
    assert request.args[1]["max_gen_toks"] == 3
    assert task.process_results(task.test_docs()[1], ["It is Ruth."]) == {"score": 1.0}
    assert task.process_results(task.test_docs()[0], ["It is Ruth."]) == {"score": 0.0}


def test_unknown_suites_and_tasks_name_the_nearest():
    tokenizer = loading.load_tokenizer("tiny")
    with pytest.raises(LowkeyError, match="ruler"):
        suite_tasks(["suite:rulr"], Source(tokenizer))
    with pytest.raises(LowkeyError, match="niah_single_1"):
        suite_tasks(["suite:ruler/niah_single1"], Source(tokenizer))


def test_ruler_is_measured_offline_over_a_policy():
    model, tokenizer = loading.load("tiny")
    source = Source(tokenizer, length=300, cases=2)
    tasks = load_tasks([], suite_tasks(["suite:ruler/niah_single_1", "suite:ruler/vt"], source))
    settings = [full(model), setting_of(model, policy="snapkv", budget="50%")]
    whole, half = measure_tasks(model, tokenizer, settings, tasks, TaskMeasuring(batch_size=2))["rows"]
    assert set(whole["harness"]) == {"suite:ruler/niah_single_1", "suite:ruler/vt"}
    for name, task in whole["harness"].items():
        assert task["protocol"] == "ask-after"
        assert 100 < task["context_tokens"] < 300
        assert len(task["metrics"]["score"]["values"]) == 2
        assert half["harness"][name]["kept_bytes"] < 0.7 * task["kept_bytes"]


def test_a_problem_without_context_is_decoded_over_the_policy():
    model, tokenizer = loading.load("tiny")
    task = SuiteTask([sample(context="", question="What is four and five?", tokens=12)])
    settings = [setting_of(model, policy="streamingllm", budget="16 tokens")]
    for protocol in ("ask-after", "ask-with"):
        row = measure_tasks(
            model, tokenizer, settings, load_tasks([], [task]), TaskMeasuring(protocol=protocol)
        )
        assert row["rows"][0]["harness"]["suite:told/mill"]["protocol"] == "decoding"
