"""Users per GiB, tokens per second and time to the first token: the full cache beside plans.

    python serving/vllm/benchmarks/throughput.py smollm2 OUT.json --plan half --plan eighth --requests 1,8

Every setting runs in a process of its own, with the same random prompts; a second round runs
them in the other order. Figures are medians over rounds, and shares of the full cache's.
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


def measured(setting: dict[str, Any]) -> dict[str, Any]:
    """Run one setting in this process.

    Args:
        setting: `model`, `plan` or None, `requests`, `prompt` and `new` tokens, `memory` in bytes, `dtype`.
    """
    from vllm import LLM, SamplingParams

    config = (
        {"plan": setting["plan"], "kernel": setting["kernel"], "exact": "none"} if setting["plan"] else None
    )
    llm = LLM(
        model=setting["model"],
        dtype=setting["dtype"],
        max_model_len=setting["prompt"] + setting["new"] + 16,
        kv_cache_memory_bytes=setting["memory"],
        enable_prefix_caching=False,
        enforce_eager=setting["eager"],
        additional_config={"lowkey": config} if config else {},
    )
    engine, chance = llm.llm_engine, random.Random(0)
    how = SamplingParams(temperature=0, max_tokens=setting["new"], ignore_eos=True)
    warm = {"prompt_token_ids": list(range(100, 180))}
    llm.generate([warm, warm], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), use_tqdm=False)
    found = []
    for count in setting["requests"]:
        prompts = [[chance.randrange(100, 1900) for _ in range(setting["prompt"])] for _ in range(count)]
        start = time.perf_counter()
        for i, ids in enumerate(prompts):
            engine.add_request(f"{count}-{i}", {"prompt_token_ids": ids}, how)
        first: dict[str, float] = {}
        last_first = start
        while engine.has_unfinished_requests():
            for answer in engine.step():
                if answer.request_id not in first and answer.outputs[0].token_ids:
                    first[answer.request_id] = time.perf_counter() - start
                    last_first = time.perf_counter()
        end = time.perf_counter()
        total = count * setting["new"]
        found.append(
            {
                "requests": count,
                "tokens_per_s": total / (end - start),
                # when all prompts have been read, tokens come from steps of decoding alone
                "decode_tokens_per_s": (total - count) / max(end - last_first, 1e-9) if count == 1 else None,
                "first_token_s": statistics.median(first.values()),
            }
        )
    blocks = engine.vllm_config.cache_config.num_gpu_blocks
    size = engine.vllm_config.cache_config.block_size
    return {"blocks": blocks, "tokens": blocks * size, "runs": found}


def main() -> None:
    """Measure all settings and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--plan", action="append", default=[])
    parser.add_argument("--requests", default="1,8")
    parser.add_argument("--prompt", type=int, default=1000)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--memory", type=int, default=2**30)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--kernel", default="auto")
    parser.add_argument("--compiled", action="store_true")
    given = parser.parse_args()
    from lowkey.models.loading import local_folder

    base = {
        "model": str(local_folder(given.model)),
        "requests": [int(n) for n in given.requests.split(",")],
        "prompt": given.prompt,
        "new": given.new,
        "memory": given.memory,
        "dtype": given.dtype,
        "kernel": given.kernel,
        "eager": not given.compiled,
    }
    names = ["full", *given.plan]
    rounds: dict[str, list[dict]] = {name: [] for name in names}
    for turn in range(given.rounds):
        for name in names if turn % 2 == 0 else names[::-1]:
            setting = {**base, "plan": None if name == "full" else str(Path(name).absolute())}
            words = [sys.executable, __file__, "--one", json.dumps(setting)]
            ran = subprocess.run(words, capture_output=True, text=True, env=os.environ | QUIET)
            if ran.returncode:
                sys.exit(ran.stderr[-3000:])
            rounds[name].append(json.loads(ran.stdout.splitlines()[-1]))
            print(name, rounds[name][-1], file=sys.stderr, flush=True)
            given.out.write_text(json.dumps({**base, "plans": given.plan, "rounds": rounds}, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        result = measured(json.loads(sys.argv[2]))
        print("\n" + json.dumps(result), flush=True)
        os._exit(0)
    main()
