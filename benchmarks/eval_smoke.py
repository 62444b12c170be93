"""A small slice of every suite, and of tasks of lm-eval, through the adapter: `make eval-smoke`.

    python benchmarks/eval_smoke.py [MODEL] [FOLDER]

It is offline. RULER and other generated tasks are made with the model's tokenizer; of the others a tiny
folder in their format is written, whose contents are invented. It says whether everything runs, and no number
of it says anything about a suite. The result file goes to FOLDER, by default a temporary one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from lowkey.suites import SUITES
from lowkey.suites.examples import write_examples

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
TASKS = 2  # of each suite
CONTEXT = "1280"  # tokens: all that the embedded model has; five turns of SCBench need most of them
POLICY = ("--policy", "snapkv", "--budget", "50%", "--limit", "1", "--batch-size", "4")
TASK = """task: smoke_{name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
{lines}
"""
# tasks of lm-eval's own kinds: (document, further lines of the yaml file)
OWN_TASKS = {
    "choices": (
        {
            "question": "The mill stands where two brooks meet. What turns its wheel?",
            "choices": ["water", "sand"],
        },
        'output_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_choice: choices\ndoc_to_target: 0',
    ),
    "text": (
        {"page": "The mill stands where two brooks meet. In the spring the upper brook floods the field."},
        'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{page}}"',
    ),
}


def write_tasks(folder: Path) -> list[str]:
    """The yaml files of small tasks."""
    made = []
    for name, (document, lines) in OWN_TASKS.items():
        data, place = folder / f"{name}.jsonl", folder / f"{name}.yaml"
        data.write_text(json.dumps(document) + "\n", encoding="utf-8")
        place.write_text(
            TASK.format(name=name, data=data, cache=folder / "cache", lines=lines), encoding="utf-8"
        )
        made.append(str(place))
    return made


def main(model: str = "tiny", out: str = "") -> None:
    """Measure a slice of each suite over the full cache and a policy."""
    with tempfile.TemporaryDirectory() as place:
        folder, file = Path(place), Path(out or place) / "eval-smoke.json"
        write_examples(folder / "suites")
        some = [f"suite:{name}/{task}" for name, suite in SUITES.items() for task in suite.tasks[:TASKS]]
        tasks = ",".join([*some, *write_tasks(folder)])
        words = ["eval", model, "--harness", tasks, *POLICY, "--data-dir", str(folder / "suites")]
        words += ["--context", CONTEXT, "--out", str(file)]
        start = [sys.executable, "-c", "from lowkey_start import main; main()", *words]
        subprocess.run(start, check=True, env=os.environ | OFFLINE, stdout=subprocess.DEVNULL)
        whole, kept = (row["harness"] for row in json.loads(file.read_text(encoding="utf-8"))["rows"])
    by_suite: dict[str, list[str]] = {}
    for task in whole:
        by_suite.setdefault(task.partition("/")[0], []).append(task)
    for suite, names in by_suite.items():
        held, full = (sum(row[name]["kept_bytes"] for name in names) for row in (kept, whole))
        protocols = {whole[name]["protocol"] for name in names}
        print(f"{suite}: {len(names)} tasks, {', '.join(sorted(protocols))}, {held / full:.0%} of the bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
