"""LongBench (arXiv:2308.14508): 21 tasks in English, Chinese and code.

The published files are `TASK.jsonl` with `context`, `input`, `answers` and `all_classes`. The prompts here
are in our own words. The published ones are used where the folder has the authors' `dataset2prompt.json`.
"""

from __future__ import annotations

from collections.abc import Iterator

from lowkey.suites.fetching import Published, published_records
from lowkey.suites.prompts import PROMPTS, PromptedTask, filled, templates
from lowkey.suites.sample import Source, Suite, SuiteSample

_ONE_TEXT = "Read the text.\n\n{context}\n\nAnswer the question in a few words.\n\nQuestion: {input}\nAnswer:"
_PASSAGES = (
    "Read the passages.\n\n{context}\n\nAnswer the question with the answer alone.\n\nQuestion: {input}\n"
    "Answer:"
)
_QASPER = (
    "Read the article.\n\n{context}\n\nAnswer the question briefly. If the article does not say it, write "
    '"unanswerable"; if it is a yes or no question, write "yes", "no" or "unanswerable".\n\n'
    "Question: {input}\nAnswer:"
)
_STORY = "Read the story.\n\n{context}\n\nAnswer the question in a phrase.\n\nQuestion: {input}\nAnswer:"
_SUMMARY = "Read the text.\n\n{context}\n\nWrite a summary of it on one page.\n\nSummary:"
_MEETING = (
    "Read the transcript of a meeting.\n\n{context}\n\nAnswer in one or more sentences.\n\n"
    "Query: {input}\nAnswer:"
)
_EXAMPLES = "Go on as in the examples.\n\n{context}\n{input}"
_CHINESE = "阅读以下文字。\n\n{context}\n\n请简短回答问题。\n\n问题：{input}\n回答："
_CHINESE_SUMMARY = "阅读以下会议记录。\n\n{context}\n\n请写一段总结。\n\n总结："
_COUNT = (
    "Some of these paragraphs stand here more than once.\n\n{context}\n\nHow many different paragraphs are "
    "there? Answer with the number alone.\n\nAnswer:"
)
_RETRIEVAL = (
    "Here are numbered paragraphs.\n\n{context}\n\nOne of them has this abstract:\n\n{input}\n\nName it like "
    '"Paragraph 1".\n\nAnswer:'
)
_CHINESE_RETRIEVAL = (
    '以下是编号的段落。\n\n{context}\n\n摘要：{input}\n\n摘要出自哪一段？请回答如"段落1"。\n\n回答：'
)
_CODE = "Write the next line of the code.\n{context}{input}Next line:\n"


_TASKS = {
    "narrativeqa": PromptedTask(_STORY, "qa_f1", 128),
    "qasper": PromptedTask(_QASPER, "qa_f1", 128),
    "multifieldqa_en": PromptedTask(_ONE_TEXT, "qa_f1", 64),
    "multifieldqa_zh": PromptedTask(_CHINESE, "qa_f1_words_zh", 64),
    "hotpotqa": PromptedTask(_PASSAGES, "qa_f1", 32),
    "2wikimqa": PromptedTask(_PASSAGES, "qa_f1", 32),
    "musique": PromptedTask(_PASSAGES, "qa_f1", 32),
    "dureader": PromptedTask(_CHINESE, "rouge_l_zh", 128),
    "gov_report": PromptedTask(_SUMMARY, "rouge_l", 512),
    "qmsum": PromptedTask(_MEETING, "rouge_l", 512),
    "multi_news": PromptedTask(_SUMMARY, "rouge_l", 512),
    "vcsum": PromptedTask(_CHINESE_SUMMARY, "rouge_l_zh", 512),
    "trec": PromptedTask(_EXAMPLES, "classification_line", 64),
    "triviaqa": PromptedTask(_EXAMPLES, "qa_f1_line", 32),
    "samsum": PromptedTask(_EXAMPLES, "rouge_l_line", 128),
    "lsht": PromptedTask(_EXAMPLES, "classification_line", 64),
    "passage_count": PromptedTask(_COUNT, "count", 32),
    "passage_retrieval_en": PromptedTask(_RETRIEVAL, "retrieval", 32),
    "passage_retrieval_zh": PromptedTask(_CHINESE_RETRIEVAL, "retrieval_zh", 32),
    "lcc": PromptedTask(_CODE, "code_sim", 64),
    "repobench-p": PromptedTask(_CODE, "code_sim", 64),
}


def _samples(task: str, source: Source) -> Iterator[SuiteSample]:
    kind = _TASKS[task]
    own = templates(source.folder, PROMPTS, "dataset2prompt.json", "config/dataset2prompt.json")
    place = Published((f"{task}.jsonl", f"data/{task}.jsonl"), "THUDM/LongBench", task)
    for number, record in enumerate(published_records(f"longbench {task}", place, source)):
        fields = {"context": record.text("context"), "input": record.text("input", empty=True)}
        context, question = filled(own.get(task, kind.prompt), fields)
        classes = record.texts("all_classes") if kind.metric == "classification_line" else ()
        length = record.values.get("length")
        yield SuiteSample(
            suite="longbench",
            task=task,
            number=number,
            context=context,
            question=question,
            answers=record.texts("answers"),
            metric=kind.metric,
            tokens=kind.tokens,
            choices=classes,
            stop=("\n",) if kind.metric.endswith("_line") and task == "samsum" else (),
            meta={"length": length} if isinstance(length, int) else {},
        )


LONGBENCH = Suite(
    "21 tasks on long texts in English, Chinese and code",
    "2308.14508",
    tuple(_TASKS),
    _samples,
    (),
    "`TASK.jsonl` with `context`, `input`, `answers`, `all_classes`; the authors' `dataset2prompt.json` for "
    "their prompts",
)
