"""Write documents of chain tasks: `python recipes/chains/text.py OUT.jsonl [--documents N] [--seed N]`.

A document is a table of pairs, filler, and questions with their answers about several chains of the table,
from any of their keys on. Tables and filler are of many lengths, so that a model meets look-ups over short
distances first.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from lowkey.heads.chains import FILLER, ChainTask, answer_of, draw_table, question_of

MOST_PAIRS, MOST_FILLER, MOST_QUESTIONS = 16, 40, 8


def document(rng: random.Random) -> str:
    """One document."""
    pairs = round(2 * (MOST_PAIRS / 2) ** rng.random())
    longest = min(pairs, rng.randint(1, 8))
    table = draw_table(rng, ChainTask(pairs=pairs, shortest=min(longest, rng.randint(1, 6)), longest=longest))
    filler = rng.randint(0, MOST_FILLER) if rng.random() < 0.5 else 0
    words = table.statement + "".join(f" {rng.choice(FILLER)}" for _ in range(filler))
    # (chain, place) of every key; the first chain is the one that a test asks for, from its first key on
    keys = [(chain, i) for chain in table.chains for i in range(len(chain) - 1)]
    asked = rng.sample(keys, min(len(keys), MOST_QUESTIONS))
    if rng.random() < 0.5:
        asked[rng.randrange(len(asked))] = (table.chains[0], 0)
    return words + "".join(question_of(chain[i]) + answer_of(chain[i + 1 :]) for chain, i in asked)


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("out", type=Path)
    args.add_argument("--documents", type=int, default=2_000)
    args.add_argument("--seed", type=int, default=0)
    given = args.parse_args()
    rng = random.Random(f"documents {given.seed}")
    with given.out.open("w") as file:
        for _ in range(given.documents):
            file.write(json.dumps({"text": document(rng)}) + "\n")


if __name__ == "__main__":
    main()
