"""Users per GiB, tokens per second and time to the first token: the full cache beside plans.

    python serving/vllm/benchmarks/throughput.py smollm2 OUT.json --plan half=PLAN --plan eighth=PLAN \\
        --requests 1,8,32
    python serving/vllm/benchmarks/throughput.py smollm2 OUT.json --plan half=PLAN --requests 16 \\
        --prompt 800 --room-for 8    # memory for 8 of 16 users

Every engine lives in a process of its own. They take turns with the same random prompts: figures are medians
over rounds, and shares are those of the full cache in the same run. --quality takes what `lowkey eval` wrote.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

QUIET = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
GIB, MARK = 2**30, "@"


class Worker:
    """An engine in a process of its own, which answers when it is asked.

    Args:
        setting: `model`, `plan` or None, `kernel`, `dtype`, the `longest` sequence, `memory` in bytes,
            `eager`, and `most` requests at once.
    """

    def __init__(self, setting: dict[str, Any]) -> None:
        words = [sys.executable, __file__, "--worker", json.dumps(setting)]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | QUIET
        )

    def told(self) -> Any:
        """The next answer."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        sys.exit(f"an engine ended with status {self.process.wait()}")

    def ask(self, question: Any) -> Any:
        """The answer to a question; see `serve`."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self.told()


def serve(setting: dict[str, Any]) -> None:
    """Be a worker: read [prompts, new tokens] from each line, and write what `run` returns of it."""
    from vllm import LLM

    config = {"lowkey": {"plan": setting["plan"], "kernel": setting["kernel"]}} if setting["plan"] else {}
    engine = LLM(
        model=setting["model"],
        dtype=setting["dtype"],
        max_model_len=setting["longest"],
        kv_cache_memory_bytes=setting["memory"],
        enable_prefix_caching=False,
        enforce_eager=setting["eager"],
        additional_config=config,
        max_num_seqs=setting["most"],
    ).llm_engine
    short = min(80, setting["longest"] - 8)
    run(engine, [list(range(100, 100 + short))] * 2, 4)  # what is made for the first user
    cache = engine.vllm_config.cache_config
    # the engine's own count, at worst; `lowkey serve --dry-run` says how many fit once prompts are read
    answer: Any = int(cache.kv_cache_max_concurrency or 0)
    print(f"\n{MARK}{json.dumps(answer)}", flush=True)
    for line in sys.stdin:
        answer = run(engine, *json.loads(line))
        print(f"\n{MARK}{json.dumps(answer)}", flush=True)
    os._exit(0)


def run(engine: Any, prompts: list[list[int]], new: int) -> dict[str, float]:
    """Answer prompts of token ids at once.

    Returns:
        `tokens_per_s`, new tokens by all time; `step_tokens_per_s`, by the median step in which all users
        that are served at once get a token; `first_token_s`, the median; `at_once`, users of such a step.
    """
    from vllm import SamplingParams

    how = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    start = time.perf_counter()
    for i, ids in enumerate(prompts):
        engine.add_request(str(i), {"prompt_token_ids": ids}, how)
    first: dict[str, float] = {}
    steps: list[tuple[int, float]] = []
    while engine.has_unfinished_requests():
        begin, known = time.perf_counter(), len(first)
        answers = engine.step()
        end = time.perf_counter()
        for answer in answers:
            if answer.request_id not in first and answer.outputs[0].token_ids:
                first[answer.request_id] = end - start
        if len(first) == known and answers:  # no prompt was read
            steps.append((len(answers), end - begin))
    total = time.perf_counter() - start
    most = max(count for count, _ in steps)
    return {
        "tokens_per_s": len(prompts) * new / total,
        "step_tokens_per_s": most / statistics.median(took for count, took in steps if count == most),
        "first_token_s": statistics.median(first.values()),
        "at_once": most,
    }


def medians(rounds: list[dict[str, float]], of: list[dict[str, float]]) -> dict[str, Any]:
    """Medians of rounds, and of their ratios to the full cache's in the same round."""
    found: dict[str, Any] = {key: statistics.median(x[key] for x in rounds) for key in rounds[0]}
    shares = {
        key: statistics.median(x[key] / y[key] for x, y in zip(rounds, of, strict=True)) for key in rounds[0]
    }
    return found | {"of_full": shares}


def quality(path: Path | None) -> dict[str, dict[str, float]]:
    """What `lowkey eval` measured of each plan, by the plan's folder."""
    found = {}
    for row in json.loads(path.read_text())["rows"] if path else []:
        name = "full" if row["label"] == "full" else Path(row.get("plan") or row["label"]).name
        found[name] = {
            key: row[key] for key in ("kl", "recall", "cases", "perplexity") if row.get(key) is not None
        }
    return found


def main() -> None:
    """Measure all settings and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--plan", action="append", default=[], help="NAME=FOLDER; repeat for several")
    parser.add_argument("--requests", default="1,8,32")
    parser.add_argument("--prompt", type=int, default=1000)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--memory", type=int, default=GIB)
    parser.add_argument("--room-for", type=int, help="memory for so many users with a full cache")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--kernel", default="auto")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--quality", type=Path)
    given = parser.parse_args()
    given.counts = [int(n) for n in given.requests.split(",")]
    import torch
    from lowkey.models.families import configured_geometry
    from lowkey.models.loading import local_folder
    from transformers import AutoConfig

    model = str(local_folder(given.model))
    shape = configured_geometry(AutoConfig.from_pretrained(model))
    size = 128  # tokens of a page
    token_bytes = 2 * shape.layers * shape.kv_heads * shape.head_dim * getattr(torch, given.dtype).itemsize
    pages = -(-(given.prompt + given.new) // size)
    memory = given.memory if given.room_for is None else (given.room_for * pages + 1) * size * token_bytes
    plans = {"full": None} | {
        name: folder for name, _, folder in (word.partition("=") for word in given.plan)
    }
    setting = {
        "model": model,
        "kernel": given.kernel,
        "dtype": given.dtype,
        "longest": given.prompt + given.new + 16,
        "memory": memory,
        "eager": not given.compiled,
        "most": max(given.counts),
    }
    engines, users = {}, {}
    for name, plan in plans.items():
        engines[name] = Worker({**setting, "plan": plan})
        users[name] = engines[name].told()
    settings = {
        **vars(given),
        "out": None,
        "quality": None,
        "memory": memory,
        "threads": torch.get_num_threads(),
    }
    result: dict[str, Any] = {"settings": settings, "rows": []}
    known, chance = quality(given.quality), random.Random(0)
    print("measuring", file=sys.stderr, flush=True)
    for count in given.counts:
        prompts = [[chance.randrange(100, 1900) for _ in range(given.prompt)] for _ in range(count)]
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
        for turn in range(given.rounds):
            for name in list(engines) if turn % 2 == 0 else list(engines)[::-1]:
                rounds[name].append(engines[name].ask([prompts, given.new]))
                print(count, name, rounds[name][-1], file=sys.stderr, flush=True)
        for name in engines:
            result["rows"].append(
                {
                    "cache": name,
                    "requests": count,
                    "users": users[name],
                    **medians(rounds[name], rounds["full"]),
                    "rounds": rounds[name],
                    "quality": known.get(name, {}),
                }
            )
        given.out.write_text(json.dumps(result, indent=1) + "\n")
    for worker in engines.values():
        worker.process.kill()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        serve(json.loads(sys.argv[2]))
    main()
