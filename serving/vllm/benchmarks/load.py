"""A server under load: no wrong text, no page that stays in use, clear errors.

    python serving/vllm/benchmarks/load.py smollm2 OUT.json --plan PLAN

Starts `lowkey serve`, asks each of some prompts alone, and then asks many times at once. Some clients read a
few pieces and leave, some break the connection at once, and some prompts are too long. Ends with 1 if an
answer differs from the one that was given alone, if an error is not the one that is due, or if a page stays
in use.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SENTENCE = "the rabbit took a watch out of its pocket and looked at it then hurried on down the long hall"
# what clients do, and how often
KINDS = {"whole": 12, "streamed": 3, "leaves": 4, "breaks": 3, "too long": 2}
SETTLES_WITHIN = 60  # seconds until nothing runs, after the last client has left
STARTS_WITHIN = 900


class Server:
    """A running server.

    Args:
        port: it listens on.
        model: name that it serves.
    """

    def __init__(self, port: int, model: str) -> None:
        self.port, self.model = port, model

    def opened(self, prompt: str, tokens: int, stream: bool = False) -> Any:
        """Ask, and return the answer that can be read. Raises: HTTPError, if it is refused."""
        asked = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": stream,
        }
        body, kind = json.dumps(asked).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/v1/completions", body, kind)
        return urllib.request.urlopen(request, timeout=1200)

    def text(self, prompt: str, tokens: int) -> str:
        """The whole answer."""
        with self.opened(prompt, tokens) as answer:
            return json.load(answer)["choices"][0]["text"]

    def streamed(self, prompt: str, tokens: int, pieces: int | None = None) -> str:
        """The answer piece by piece, or its first pieces: then the client leaves."""
        text, count = "", 0
        with self.opened(prompt, tokens, stream=True) as answer:
            for line in answer:
                told = line.decode().strip().removeprefix("data: ")
                if told and told != "[DONE]":
                    text, count = text + json.loads(told)["choices"][0]["text"], count + 1
                if count == pieces:
                    break
        return text

    def broken(self, prompt: str, tokens: int) -> None:
        """Ask, and vanish without a word, as a client that is killed."""
        body = json.dumps({"model": self.model, "prompt": prompt, "max_tokens": tokens, "stream": True})
        head = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
        head += [f"Content-Length: {len(body)}", "", body]
        with socket.create_connection(("127.0.0.1", self.port)) as line:
            line.sendall("\r\n".join(head).encode())
            time.sleep(random.random())
            # a reset in the place of an orderly end
            line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def metric(self, name: str) -> float:
        """A number that the server tells of itself."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(x.rsplit(" ", 1)[1]) for x in lines if x.startswith(f"vllm:{name}{{"))

    def is_healthy(self) -> bool:
        """Whether it answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False


def client(server: Server, kind: str, prompt: str, alone: str, tokens: int) -> str:
    """What one client met: `right`, or what was wrong."""
    try:
        if kind == "breaks":
            server.broken(prompt, tokens)
        elif kind == "leaves":
            pieces = min(3, tokens - 1)
            if not alone.startswith(server.streamed(prompt, tokens, pieces)):
                return "wrong text"
        elif kind == "too long":
            server.text("a rabbit " * 20000, tokens)
            return "was not refused"
        elif alone != (server.text if kind == "whole" else server.streamed)(prompt, tokens):
            return "wrong text"
    except urllib.error.HTTPError as error:
        told = error.read().decode()
        is_due = kind == "too long" and error.code == 400 and "maximum context length" in told
        return "right" if is_due else f"{error.code}: {told[:200]}"
    return "right"


def measured(server: Server, requests: int, at_once: int, seed: int) -> dict[str, Any]:
    """Ask alone, ask at once, and count what was wrong."""
    chance = random.Random(seed)
    asked = [
        (" ".join(chance.choices(SENTENCE.split(), k=chance.randint(2, 400))), chance.randint(4, 48))
        for _ in range(20)
    ]
    alone = [server.text(*one) for one in asked]
    kinds = chance.choices(list(KINDS), list(KINDS.values()), k=requests)
    which = chance.choices(range(len(asked)), k=requests)
    start = time.monotonic()
    with ThreadPoolExecutor(at_once) as pool:
        met = list(
            pool.map(
                lambda one: client(server, one[0], asked[one[1]][0], alone[one[1]], asked[one[1]][1]),
                zip(kinds, which, strict=True),
            )
        )
    seconds = time.monotonic() - start
    until = time.monotonic() + SETTLES_WITHIN
    while server.metric("kv_cache_usage_perc") and time.monotonic() < until:
        time.sleep(0.5)
    return {
        "requests": requests,
        "at_once": at_once,
        "kinds": dict(Counter(kinds)),
        "met": dict(Counter(met)),
        "seconds": round(seconds, 1),
        "share_of_pages_in_use_afterwards": server.metric("kv_cache_usage_perc"),
        "running_afterwards": server.metric("num_requests_running") + server.metric("num_requests_waiting"),
        "preemptions": server.metric("num_preemptions_total"),
        "wrong_afterwards": sum(server.text(*one) != text for one, text in zip(asked, alone, strict=True)),
    }


def main() -> int:
    """Start a server, load it, and write what was found. Returns: the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--plan")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--memory", default="256MiB")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("lowkey")), "serve", given.model, "--port", str(port)]
    command += ["--dtype", "float32", "--memory", given.memory, "-E", f"max-num-seqs={given.at_once}"]
    command += ["-E", "enforce-eager=true", *(["--plan", given.plan] if given.plan else [])]
    server = Server(port, given.model)
    log = given.out.with_suffix(".log")
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ)
    try:
        until = time.monotonic() + STARTS_WITHIN
        while not server.is_healthy():
            if process.poll() is not None or time.monotonic() > until:
                print(f"the server did not start: {log}", file=sys.stderr)
                return 1
            time.sleep(1)
        found = measured(server, given.requests, given.at_once, given.seed)
    finally:
        process.terminate()
        process.wait(60)
    given.out.write_text(json.dumps({"model": given.model, "plan": given.plan, **found}, indent=1) + "\n")
    print(json.dumps(found))
    leaks = found["share_of_pages_in_use_afterwards"] or found["running_afterwards"]
    return int(bool(leaks or found["wrong_afterwards"] or set(found["met"]) != {"right"}))


if __name__ == "__main__":
    sys.exit(main())
