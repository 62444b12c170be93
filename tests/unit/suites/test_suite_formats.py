"""Files of every suite are read, and a damaged one gives one clear line with the file and the line."""

from __future__ import annotations

import gzip
import json
import random
import sys
from types import SimpleNamespace

import pytest

from lowkey.core.errors import LowkeyError
from lowkey.suites import SUITES, Source, load_samples
from lowkey.suites.examples import EXAMPLES
from lowkey.suites.files import read_records

LENGTH = 8192
TASKS = [(name, task) for name, suite in SUITES.items() for task in suite.tasks]
WRONG = (None, True, 7, -1.5, "", [], {}, [None], [[]], {"a": 1}, "x", ["x", 3])
# Where a record is asked for by its task, or by the only file of the suite.
FILES = [(suite, name) for suite, names in EXAMPLES.items() for name in names]


def tasks_of(suite: str, name: str) -> list[str]:
    stem = name.split(".")[0].removeprefix("scbench_")
    if suite == "longbench":
        return [stem]
    own = {"squad": "qa_1", "hotpotqa": "qa_2", "test": "gsm8k", "math500": "math", "data": "single_document"}
    return [own.get(stem, stem)]


@pytest.mark.parametrize(("name", "task"), TASKS)
def test_every_task_has_samples_offline(tokenizer, examples, name, task):
    source = Source(tokenizer, length=LENGTH, cases=1, folder=examples)
    samples = load_samples(name, source, [task])
    assert len(samples) == 1
    (sample,) = samples
    assert (sample.suite, sample.task, sample.number) == (name, task, 0)
    assert sample.question.strip() and all(turn.answers for turn in sample.asked)
    assert all(0 < turn.tokens <= LENGTH // 2 for turn in sample.asked)


def test_a_suite_is_found_in_a_folder_of_its_name_or_alone(tokenizer, examples):
    found = [
        load_samples("gsm8k", Source(tokenizer, folder=folder)) for folder in (examples, examples / "gsm8k")
    ]
    assert found[0] == found[1] != []


@pytest.mark.parametrize(("suite", "name"), FILES)
def test_a_damaged_record_gives_one_line(tokenizer, tmp_path, suite, name):
    """Each field of each record is left out, and replaced by wrong values, at every depth."""
    content = EXAMPLES[suite][name]
    for damaged in changed(content):
        lines = name.endswith(".jsonl")
        written = "\n".join(json.dumps(r) for r in damaged) if lines else json.dumps(damaged)
        (tmp_path / name).write_text(written)
        source = Source(tokenizer, length=1024, cases=1, folder=tmp_path)
        try:
            load_samples(suite, source, tasks_of(suite, name))
        except LowkeyError as error:
            message = str(error)
            assert "\n" not in message and len(message) < 400
            assert name in message or "length" in message, message


def changed(value, most: int = 60):
    """Copies of some JSON, each with one change."""
    every = list(places(value))
    for place in random.Random(0).sample(every, min(most, len(every))):
        for wrong in (..., *WRONG):
            yield put(json.loads(json.dumps(value)), place, wrong)


def places(value, so_far=()):
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, more in inside:
        yield (*so_far, key)
        yield from places(more, (*so_far, key))


def put(value, place, wrong):
    *way, last = place
    inner = value
    for key in way:
        inner = inner[key]
    if wrong is ...:
        del inner[last]
    else:
        inner[last] = wrong
    return value


@pytest.mark.parametrize(
    ("suite", "task", "record", "message"),
    [
        (
            "gsm8k",
            "gsm8k",
            {"question": "?", "answer": "five"},
            "answer does not end with '####' and a number",
        ),
        ("gsm8k", "gsm8k", {"answer": "#### 5"}, "has no field 'question'"),
        ("aime", "aime24", {"problem": "?", "answer": "1000"}, "answer is no whole number from 0 to 999"),
        ("math", "math", {"problem": "?", "solution": "none"}, r"has no answer, and its solution has no"),
        (
            "infinitebench",
            "code_debug",
            {"answer": ["x", "A"], "options": ["a"]},
            "has 1 options instead of 4",
        ),
        ("longbench", "trec", {"input": "", "context": "x", "answers": []}, "all_classes"),
        ("loogle", "longdep_qa", {"input": "x", "qa_pairs": "(("}, "qa_pairs is text that is no list"),
        ("scbench", "kv", {"context": "x", "multi_turns": [{"input": 3}]}, "must have input and answer"),
        ("ruler", "vt", {"input": "no question", "outputs": ["a"]}, "input has no question that RULER asks"),
    ],
)
def test_messages_name_file_line_and_field(tokenizer, tmp_path, suite, task, record, message):
    file = {"gsm8k": "test.jsonl", "math": "math500.jsonl"}.get(suite, f"{task}.jsonl")
    (tmp_path / file).write_text(f"\n\n{json.dumps(record)}\n")
    with pytest.raises(LowkeyError, match=rf"{file}, line 3: .*{message}"):
        load_samples(suite, Source(tokenizer, folder=tmp_path), [task])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no records"),
        (b"[1]\n", "line 1: is .1. and must be an object"),
        (b'{"a": 1}\n{"a": \n', "line 2: is no JSON"),
        (b'{"a": 1, "a": 2}\n', "line 1: is no JSON"),
        (b'{"a": NaN}\n', "line 1: is no JSON"),
        (b'{"a": "\xff"}\n', "line 1: is no UTF-8 text"),
    ],
)
def test_a_file_that_is_no_list_of_records_is_refused(tmp_path, content, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(LowkeyError, match=f"x.jsonl.*{message}"):
        list(read_records(path, "x"))


def test_packed_files_and_lists_are_read_too(tmp_path):
    records = [{"a": 1}, {"a": "ä"}]
    lines = "\n".join(json.dumps(r) for r in records).encode()
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "x.json.gz").write_bytes(gzip.compress(json.dumps(records).encode()))
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(records).encode())
    for name in ("x.jsonl.gz", "x.json.gz", "x.json"):
        assert [r.values for r in read_records(tmp_path / name, "x")] == records


def test_a_packed_file_that_is_cut_is_refused(tmp_path):
    content = gzip.compress(json.dumps([{"a": 1}] * 99).encode())
    for name in ("x.jsonl.gz", "x.json.gz"):
        (tmp_path / name).write_bytes(content[:-20])
        with pytest.raises(LowkeyError, match=f"{name}.*cannot be unpacked"):
            list(read_records(tmp_path / name, "x"))


@pytest.mark.parametrize("template", ["no mark", "{context} {context}", 3])
def test_prompts_of_the_user_must_have_one_context(tokenizer, examples, tmp_path, template):
    content = (examples / "longbench" / "qasper.jsonl").read_text()
    (tmp_path / "qasper.jsonl").write_text(content)
    (tmp_path / "dataset2prompt.json").write_text(json.dumps({"qasper": template}))
    with pytest.raises(LowkeyError, match=r"dataset2prompt\.json: the template of 'qasper'.*one \{context\}"):
        load_samples("longbench", Source(tokenizer, folder=tmp_path), ["qasper"])


def test_prompts_of_the_user_are_taken(tokenizer, examples, tmp_path):
    record = {"input": "{context}?", "context": "A {input} text.", "answers": ["x"]}
    (tmp_path / "qasper.jsonl").write_text(json.dumps(record))
    (tmp_path / "dataset2prompt.json").write_text(json.dumps({"qasper": "Text: {context} Now: {input}!"}))
    (sample,) = load_samples("longbench", Source(tokenizer, folder=tmp_path), ["qasper"])
    assert (sample.context, sample.question) == ("Text: A {input} text.", " Now: {context}?!")


def test_a_long_context_loses_its_middle(tokenizer, tmp_path):
    context = " ".join(f"word{i}" for i in range(2000))
    (tmp_path / "qasper.jsonl").write_text(json.dumps({"input": "?", "context": context, "answers": ["x"]}))
    source = Source(tokenizer, length=1000, folder=tmp_path)
    (sample,) = load_samples("longbench", source, ["qasper"])
    assert 990 <= source.count(sample.context + sample.question) + sample.tokens <= 1000
    assert "word3 " in sample.context and sample.context.endswith("word1999") and sample.meta["cut"] > 1000


# -- the hub


def hub(monkeypatch, load):
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))


def test_without_a_folder_rows_come_from_the_hub(monkeypatch, tokenizer):
    asked = []

    def load(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        return iter(EXAMPLES["gsm8k"]["test.jsonl"])

    hub(monkeypatch, load)
    (sample,) = load_samples("gsm8k", Source(tokenizer))
    assert sample.answers == ("5",) and asked == [("openai/gsm8k", "main", "test", True)]


def test_offline_one_line_names_the_folder(monkeypatch, tokenizer):
    def load(*_, **__):
        raise ConnectionError("no route\nto host")

    hub(monkeypatch, load)
    for name, suite in SUITES.items():
        for task in set(suite.tasks) - set(suite.generated) - {"qa_1", "qa_2"}:
            with pytest.raises(
                LowkeyError, match=r"cannot be fetched.*no route to host.*give --data-dir"
            ) as error:
                load_samples(name, Source(tokenizer), [task])
            assert "\n" not in str(error.value)


def test_a_bad_row_of_the_hub_is_named(monkeypatch, tokenizer):
    hub(monkeypatch, lambda *_, **__: iter([{"question": 5}]))
    with pytest.raises(LowkeyError, match=r"openai/gsm8k \(main\), row 1: "):
        load_samples("gsm8k", Source(tokenizer))


def test_a_folder_without_the_file_is_refused(tokenizer, tmp_path):
    with pytest.raises(LowkeyError, match=r"has no test\.jsonl or gsm8k/test\.jsonl; gsm8k needs it"):
        load_samples("gsm8k", Source(tokenizer, folder=tmp_path))
    with pytest.raises(LowkeyError, match="is no folder; give the folder with the files of gsm8k"):
        load_samples("gsm8k", Source(tokenizer, folder=tmp_path / "missing"))
