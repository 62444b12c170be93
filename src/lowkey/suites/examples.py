"""A tiny folder of files in the format of each suite: it shows the formats, and the smoke test reads it.

The contents are invented. A number measured on them says nothing about a suite.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_TEXT = (
    "The mill at Hollin stands where two brooks meet. Its wheel was made of oak by Anders Vell in 1841. In "
    "the spring the upper brook floods the lower field, and the miller, Ruth Tarn, moves her three goats to "
    "the barn. The barn is painted green. On market days she sells cheese at a stall beside the well. "
)
_NUMBERS = [4, 17, 9, 17, 2, 31, 8, 17, 5, 12]
_OPTIONS = ["oak", "iron", "ash", "stone"]
_CHINESE = "小河边有一座磨坊。磨坊的主人叫李明。他养了三只羊。"


def _longbench(task_input: str, answers: list[str], context: str = _TEXT, **more: Any) -> list[dict]:
    record = {"input": task_input, "context": context, "answers": answers, "length": len(context.split())}
    return [{**record, "dataset": "", "language": "en", "all_classes": None, "_id": "0", **more}]


def _book(question: str, answer: Any, options: Any = (), context: Any = _TEXT) -> list[dict]:
    return [{"id": 0, "context": context, "input": question, "answer": answer, "options": list(options)}]


_WHEEL, _COLOUR = "Who made the wheel?", "What colour is the barn?"
_SUMMARY = "A mill between two brooks, its miller and her goats."
_LABELS = {"all_classes": ["Number", "Person", "Colour"]}
_SHOTS = "Question: How many goats are there?\nType: Number\nQuestion: Who is the miller?\nType: Person"
_PASSAGES = f"Paragraph 1: {_TEXT}\n\nParagraph 2: The well is deep. Nobody knows who dug it."
_CODE = "def area(width, height):\n    return width * height\n\n\ndef volume(width, height, depth):\n"
_MEMBER = {"input": _WHEEL, "answer": "Anders Vell"}, {"input": _COLOUR, "answer": "green"}

# The records of each file, by the suite and the path in its folder.
EXAMPLES: dict[str, dict[str, Any]] = {
    "ruler": {
        "squad.json": {
            "data": [
                {
                    "title": "Mill",
                    "paragraphs": [
                        {
                            "context": _TEXT,
                            "qas": [
                                {"id": "0", "question": _WHEEL, "answers": [{"text": "Anders Vell"}]},
                                {"id": "1", "question": "Who dug the well?", "answers": []},
                            ],
                        },
                        {"context": "The well is deep.", "qas": []},
                    ],
                }
            ]
        },
        "hotpotqa.json": [
            {
                "_id": "0",
                "question": "What is the barn of the miller painted like?",
                "answer": "green",
                "context": [["Mill", [_TEXT]]],
            },
            {
                "_id": "1",
                "question": "How deep is the well?",
                "answer": "nine metres",
                "context": [["Well", ["The well is deep.", " It has nine metres."]]],
            },
        ],
    },
    "longbench": {
        **{
            f"{task}.jsonl": _longbench(_WHEEL, ["Anders Vell"])
            for task in ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique")
        },
        **{f"{task}.jsonl": _longbench("", [_SUMMARY]) for task in ("gov_report", "multi_news")},
        "qmsum.jsonl": _longbench("What is said of the mill?", [_SUMMARY]),
        "multifieldqa_zh.jsonl": _longbench("磨坊的主人是谁?", ["李明"], _CHINESE),
        "dureader.jsonl": _longbench("磨坊的主人是谁?", ["李明"], _CHINESE),
        "vcsum.jsonl": _longbench("", ["磨坊和羊。"], _CHINESE),
        "trec.jsonl": _longbench("Question: What colour is it?\nType:", ["Colour"], _SHOTS, **_LABELS),
        "lsht.jsonl": _longbench("Question: What colour is it?\nType:", ["Colour"], _SHOTS, **_LABELS),
        "triviaqa.jsonl": _longbench(f"Question: {_WHEEL}\nAnswer:", ["Anders Vell", "Vell"]),
        "samsum.jsonl": _longbench("Dialogue: Ruth: Goats in!\nSummary:", ["Ruth calls the goats."]),
        "passage_count.jsonl": _longbench("", ["2"], _PASSAGES),
        "passage_retrieval_en.jsonl": _longbench("A mill and its miller.", ["Paragraph 1"], _PASSAGES),
        "passage_retrieval_zh.jsonl": _longbench("磨坊的主人。", ["段落1"], f"段落1：{_CHINESE}"),
        "lcc.jsonl": _longbench("", ["    return width * height * depth"], _CODE),
        "repobench-p.jsonl": _longbench(_CODE, ["    return width * height * depth"], "# shapes.py\n"),
    },
    "longbench_v2": {
        "data.json": [
            {
                "_id": str(i),
                "domain": domain,
                "sub_domain": "",
                "difficulty": "easy",
                "length": "short",
                "question": "What is the wheel made of?",
                **{f"choice_{letter}": o for letter, o in zip("ABCD", _OPTIONS, strict=True)},
                "answer": "A",
                "context": _TEXT,
            }
            for i, domain in enumerate(
                (
                    "Single-Document QA",
                    "Multi-Document QA",
                    "Long In-context Learning",
                    "Long-dialogue History Understanding",
                    "Code Repository Understanding",
                    "Long Structured Data Understanding",
                )
            )
        ]
    },
    "babilong": {
        f"qa{i}.jsonl": [
            {"input": f"Mary went to the garden. {_TEXT}", "question": "Where is Mary?", "target": "garden"}
        ]
        for i in range(6, 21)
    },
    "infinitebench": {
        "passkey.jsonl": _book("What is the pass key?", "71432", context=f"{_TEXT} The pass key is 71432."),
        "number_string.jsonl": _book("What is the number?", "1112", context=f"{_TEXT} The number is 1112."),
        "kv_retrieval.jsonl": _book('The value of "mill"?', "brook", context='{"mill": "brook", "a": "b"}'),
        "longbook_sum_eng.jsonl": _book("", [_SUMMARY]),
        "longbook_choice_eng.jsonl": _book("What is the wheel made of?", ["oak"], _OPTIONS),
        "longbook_qa_eng.jsonl": _book(_WHEEL, ["Anders Vell"]),
        "longbook_qa_chn.jsonl": _book("磨坊的主人是谁?", ["李明"], context=_CHINESE),
        "longdialogue_qa_eng.jsonl": _book("", ["RUTH"], context="$$MASK$$: Goats in!\nTOM: Yes, Ruth."),
        "code_debug.jsonl": _book("", ["area", "B"], ["volume", "area", "main", "read"], _CODE),
        "code_run.jsonl": _book("What does area(2, 3) give?", [6], context=_CODE),
        "math_find.jsonl": _book("What is the largest number of the list?", [31], context=_NUMBERS),
        "math_calc.jsonl": _book("", [[6, 10]], context="2 + 4 + 4"),
    },
    "loogle": {
        "shortdep_qa.jsonl": [
            {"input": _TEXT, "title": "Mill", "qa_pairs": [{"Q": _WHEEL, "A": "Anders Vell"}]}
        ],
        "longdep_qa.jsonl": [{"context": _TEXT, "question": _COLOUR, "answer": "green"}],
        "shortdep_cloze.jsonl": [
            {
                "input": _TEXT,
                "qa_pairs": [{"Q": "The wheel was made by <mask-0>.", "A": {"<mask-0>": "Anders Vell"}}],
            }
        ],
        "longdep_summarization.jsonl": [{"input": _TEXT, "qa_pairs": "none", "output": _SUMMARY}],
    },
    "scbench": {
        "scbench_many_shot.jsonl": [
            {"id": 0, "context": _SHOTS, "multi_turns": [{"input": "What colour is it?", "answer": "Colour"}]}
        ],
        "scbench_choice_eng.jsonl": [
            {
                "id": 0,
                "context": _TEXT,
                "multi_turns": [{"input": "The wheel is of", "answer": "oak", "options": _OPTIONS}] * 2,
            }
        ],
        "scbench_qa_eng.jsonl": [{"id": 0, "context": _TEXT, "multi_turns": list(_MEMBER)}],
        "scbench_qa_chn.jsonl": [
            {"id": 0, "context": _CHINESE, "multi_turns": [{"input": "主人是谁?", "answer": "李明"}]}
        ],
        "scbench_summary.jsonl": [
            {"id": 0, "context": _TEXT, "multi_turns": [{"input": "Sum it up.", "answer": _SUMMARY}]}
        ],
    },
    "gsm8k": {
        "test.jsonl": [
            {"question": "Ruth has 3 goats and buys 2. How many are that?", "answer": "3 + 2\n#### 5"}
        ]
    },
    "math": {"math500.jsonl": [{"problem": "What is $1/2 + 1/4$?", "answer": "\\frac{3}{4}", "level": 1}]},
    "aime": {
        f"{task}.jsonl": [{"problem": "What is the remainder of 1007 by 1000?", "answer": "007"}]
        for task in ("aime24", "aime25")
    },
}


def write_examples(folder: Path) -> None:
    """Write the files of all suites, those of each into a folder of its own.

    Args:
        folder: is made if it does not exist; files of the same names are replaced.
    """
    for suite, contents in EXAMPLES.items():
        (folder / suite).mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            if name.endswith(".jsonl"):
                written = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in content)
            else:
                written = json.dumps(content, ensure_ascii=False)
            (folder / suite / name).write_text(written, encoding="utf-8")
