"""Tasks of lm-eval over files that a test writes, of every kind of request; stock lm-eval as the oracle."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lowkey.core import text
from lowkey.heads.needles import draw_facts
from lowkey.models import loading

GENERATE = "generation_kwargs: {until: [%s], do_sample: false, max_gen_toks: %d}\n"
KINDS = ("sums", "letters", "endings", "lastword", "texts", "recall")
FIVE = KINDS[:5]


def write_tasks(folder: Path, documents: int = 6) -> dict[str, str]:
    """Write tasks of every kind of request.

    Args:
        folder: where.
        documents: of each task.

    Returns:
        The yaml file of each task, by its short name. The task itself is named `local_NAME`.
    """
    rng, words = random.Random(0), text.embedded_text("evaluation").split()

    def some(count: int) -> str:
        start = rng.randrange(len(words) - count)
        return " ".join(words[start : start + count])

    def sums() -> dict:
        a, b = rng.randrange(50), rng.randrange(50)
        return {"question": f"What is {a} and {b}? {some(3 + rng.randrange(6))}", "answer": str(a + b)}

    def letters() -> dict:
        choices = [some(1 + rng.randrange(4)) for _ in range(4)]
        return {"question": some(8 + rng.randrange(20)), "choices": choices, "answer": rng.randrange(4)}

    def endings() -> dict:
        return {"query": some(20), "choices": [some(2 + i * 2) for i in range(4)], "gold": rng.randrange(4)}

    def recall() -> dict:
        facts = draw_facts(rng, 6)
        asked = rng.choice(facts)
        parts = [" ".join(words[k * 12 : k * 12 + 12]) + fact.statement for k, fact in enumerate(facts)]
        return {"context": "".join(parts), "question": asked.question, "answer": asked.value}

    made: dict[str, tuple[str, Any]] = {
        "sums": (
            'output_type: generate_until\ndoc_to_text: "Question: {{question}}\\nAnswer:"\n'
            'doc_to_target: "{{answer}}"\nfewshot_split: test\nnum_fewshot: 2\n'
            + GENERATE % ('"\\n\\n"', 12)
            + "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n",
            sums,
        ),
        "letters": (
            "output_type: multiple_choice\nfewshot_split: test\nnum_fewshot: 2\n"
            'doc_to_text: "{{question}}\\nA. {{choices[0]}}\\nB. {{choices[1]}}\\nC. {{choices[2]}}\\n'
            'D. {{choices[3]}}\\nAnswer:"\n'
            'doc_to_choice: ["A", "B", "C", "D"]\ndoc_to_target: answer\n'
            "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n",
            letters,
        ),
        "endings": (
            'output_type: multiple_choice\ndoc_to_text: "{{query}}"\ndoc_to_choice: choices\n'
            "doc_to_target: gold\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n",
            endings,
        ),
        "lastword": (
            "output_type: loglikelihood\ndoc_to_text: \"{{text.split(' ')[:-1]|join(' ')}}\"\n"
            "doc_to_target: \"{{' '+text.split(' ')[-1]}}\"\n"
            "metric_list: [{metric: perplexity}, {metric: acc}]\n",
            lambda: {"text": some(12 + rng.randrange(30))},
        ),
        "texts": (
            'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{page}}"\n'
            "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n",
            lambda: {"page": some(90 + rng.randrange(90))},
        ),
        "recall": (
            'output_type: generate_until\ndoc_to_text: "{{context}}{{question}}"\n'
            'doc_to_target: "{{answer}}"\n'
            + GENERATE
            % ('"."', 6)
            + "filter_list: [{name: number, filter: [{function: regex, regex_pattern: '([0-9]+)'}, "
            "{function: take_first}]}]\n"
            "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n",
            recall,
        ),
    }
    for name, (lines, draw) in made.items():
        rows = "".join(json.dumps(draw()) + "\n" for _ in range(documents))
        (folder / f"{name}.jsonl").write_text(rows, encoding="utf-8")
        data = f"{{data_files: {{test: {folder / name}.jsonl}}, cache_dir: {folder / 'cache'}}}"
        (folder / f"{name}.yaml").write_text(
            f"task: local_{name}\ndataset_path: json\ntest_split: test\ndataset_kwargs: {data}\n{lines}",
            encoding="utf-8",
        )
    return {name: str(folder / f"{name}.yaml") for name in made}


def stock(
    name: str,
    files: list[str],
    batch: int,
    dtype: torch.dtype | None = None,
    max_length: int | None = None,
    limit: int | None = None,
    seed: int = 1234,
) -> dict[str, Any]:
    """What stock lm-eval finds: its Hugging Face model over transformers' own cache.

    It is what `lm_eval.simple_evaluate` does, without a survey of the machine, which takes seconds.

    Args:
        name: of the model.
        files: of the tasks.
        batch: batch size.
        dtype: of the weights; None as saved.
        max_length: tokens that it reads at most.
        limit: documents of each task at most.
        seed: of the examples.
    """
    model, tokenizer = loading.load(name)
    model = model.to(dtype) if dtype else model
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, max_length=max_length)
    tasks = TaskManager(include_defaults=False).load(list(files))
    for task in tasks["tasks"].values():
        task.set_config(key="num_fewshot", value=task.get_config("num_fewshot") or 0)
        task.set_fewshot_seed(seed=seed)
    found: Any = evaluate(lm, tasks, limit=limit, bootstrap_iters=0)
    return found
