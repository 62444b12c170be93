"""`lowkey serve`, asked by a real OpenAI client: same text as `lowkey generate`, clear errors, no leak."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from openai import BadRequestError, OpenAI

LOWKEY = str(Path(sys.executable).with_name("lowkey"))
PROMPT = "Alice was beginning to get very tired"
STARTS_WITHIN = 600  # seconds, on a busy machine; 40 on an idle one


def command(*words: object) -> str:
    """What a command of lowkey prints."""
    run = subprocess.run([LOWKEY, *map(str, words)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server") / "plan"
    command("compress", "tiny", folder, "--budget", "25%", "--windows", 4, "--context", 64)
    return folder


@pytest.fixture(scope="module")
def server(plan, tmp_path_factory):
    """(address, what was told at start)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "log"
    options = ("-E", "enforce-eager=true", "-E", "max-num-seqs=16")
    words = (
        "serve",
        "tiny",
        "--plan",
        plan,
        "--dtype",
        "float32",
        "--port",
        port,
        "--memory",
        "64MiB",
        *options,
    )
    # a server has processes of its own
    plain = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    with log.open("w") as out:
        process = subprocess.Popen(
            [LOWKEY, *map(str, words)], stdout=out, stderr=subprocess.STDOUT, env=plain
        )
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + STARTS_WITHIN
        while not healthy(address):
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-4000:]
            time.sleep(1)
        yield address, log.read_text()
    finally:
        process.terminate()
        process.wait(60)


def healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def used_blocks(address: str) -> float:
    """The share of pages that requests hold."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return next(float(x.rsplit(" ", 1)[1]) for x in lines if x.startswith("vllm:kv_cache_usage_perc{"))


def client(address: str) -> OpenAI:
    return OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=300)


def completed(address: str, prompt: str, tokens: int = 30) -> str:
    answer = client(address).completions.create(model="tiny", prompt=prompt, max_tokens=tokens, temperature=0)
    return answer.choices[0].text


@pytest.mark.timeout(1500)
def test_it_told_routes_and_users_at_start(server):
    _, told = server
    assert "windowed, " in told and "users of 1,280 tokens (full: " in told


@pytest.mark.timeout(900)
def test_the_text_is_that_of_generate(server, plan):
    words = ("--plan", plan, "--prompt", PROMPT, "--tokens", 30, "--dtype", "float32", "--json")
    expected = json.loads(command("generate", "tiny", *words))["text"]
    assert completed(server[0], PROMPT) == expected


@pytest.mark.timeout(900)
def test_text_comes_piece_by_piece(server):
    stream = client(server[0]).completions.create(
        model="tiny", prompt=PROMPT, max_tokens=30, temperature=0, stream=True
    )
    pieces = [piece.choices[0].text for piece in stream]
    assert len(pieces) > 5 and "".join(pieces) == completed(server[0], PROMPT)


@pytest.mark.timeout(900)
def test_a_prompt_that_is_too_long_is_refused(server):
    with pytest.raises(BadRequestError, match="1280"):
        completed(server[0], "Alice was " * 2000)
    assert completed(server[0], PROMPT)


@pytest.mark.timeout(900)
def test_many_at_once_some_of_which_leave(server):
    """Answers are the same as alone, and no page stays in use."""
    address, chance = server[0], random.Random(0)
    words = ["the", "rabbit", "took", "a", "watch", "out", "of", "its", "pocket", "and", "hurried", "on"]
    texts = [" ".join(chance.choices(words, k=chance.randint(3, 150))) for _ in range(12)]
    alone = [completed(address, text, 12) for text in texts]

    def ask(i: int) -> bool:
        text = texts[i % len(texts)]
        if i % 5 == 0:  # this one reads a little and leaves
            stream = client(address).completions.create(
                model="tiny", prompt=text, max_tokens=200, temperature=0, stream=True
            )
            next(iter(stream))
            stream.close()
            return True
        return completed(address, text, 12) == alone[i % len(texts)]

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(60)))
    until = time.monotonic() + 60
    while used_blocks(address) and time.monotonic() < until:
        time.sleep(0.5)
    assert used_blocks(address) == 0
