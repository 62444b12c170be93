"""Episodes of a patrol, with a state observed and an action taken at every step, for any tokenizer.

An agent walks along a line of places. A plan names the sites that it visits in turn, over and over:

    plan oak pond gate go elm calm left oak gust high pond ...

Each step is three words: the place, the weather, and the action. The agent walks towards its next site. There
it reports whether most of its steps so far were gusty (`high`) or not (`low`), and then heads for the next
one. Three kinds of action need memory of different kinds: a `turn` (the first step from a site, which way the
next one lies), a `stop` (the action at a site, rather than walking on) and a `report` (which of the two
words, an average over everything seen). All others go `straight` on.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lowkey.core.options import Checked, option
from lowkey.heads.needles import Encode

# fmt: off
PLACES = (
    "oak", "elm", "pond", "gate", "barn", "mill", "well", "ford", "hill", "cave", "dock", "shed", "tree",
    "rock", "lane", "yard",
)
# fmt: on
CALM, GUST = "calm", "gust"
LEFT, RIGHT, MOSTLY_GUSTY, MOSTLY_CALM = "left", "right", "high", "low"
ACTION_KINDS = ("turn", "straight", "stop")  # kinds of action; a stop is also a report
WORDS_OF_STEP = 3


@dataclass(frozen=True)
class Patrol(Checked):
    """How episodes are drawn.

    Args:
        sites: of the plan; each is another place.
        steps: of an episode.
    """

    sites: int = option(6, at_least=2, at_most=len(PLACES))
    steps: int = option(120, at_least=1, at_most=2**20)

    @property
    def words(self) -> int:
        """Words of an episode."""
        return self.sites + 2 + WORDS_OF_STEP * self.steps


@dataclass(frozen=True)
class PatrolEpisode:
    """One episode.

    Args:
        words: the plan, and three words of every step.
        kinds: of the action of each step, a word of `ACTION_KINDS`.
    """

    words: tuple[str, ...]
    kinds: tuple[str, ...]

    @property
    def text(self) -> str:
        """The episode as running text."""
        return "".join(f" {word}" for word in self.words)

    def actions(self) -> range:
        """The indices of the words that are actions."""
        return range(len(self.words) - WORDS_OF_STEP * len(self.kinds) + 2, len(self.words), WORDS_OF_STEP)


def draw_patrol(rng: random.Random, task: Patrol = Patrol()) -> PatrolEpisode:
    """Draw one episode."""
    sites = rng.sample(range(len(PLACES)), task.sites)
    words, kinds = ["plan", *(PLACES[i] for i in sites), "go"], []
    at, target, gusts = rng.randrange(len(PLACES)), 0, 0
    often = rng.uniform(0.25, 0.75)
    arrived = True  # the first action is a turn, too
    for step in range(1, task.steps + 1):
        gust = rng.random() < often
        gusts += gust
        goal = sites[target]
        if at == goal:
            action, kind, move = MOSTLY_GUSTY if 2 * gusts >= step else MOSTLY_CALM, "stop", 0
            target = (target + 1) % len(sites)
        else:
            move = 1 if goal > at else -1
            action, kind = RIGHT if move > 0 else LEFT, "turn" if arrived else "straight"
        words += [PLACES[at], GUST if gust else CALM, action]
        kinds.append(kind)
        at, arrived = at + move, kind == "stop"
    return PatrolEpisode(tuple(words), tuple(kinds))


def draw_patrols(count: int, seed: int, task: Patrol = Patrol()) -> list[PatrolEpisode]:
    """Draw episodes, the same for the same seed."""
    rng = random.Random(seed)
    return [draw_patrol(rng, task) for _ in range(count)]


def encoded(episode: PatrolEpisode, encode: Encode, start: Sequence[int] = ()) -> tuple[list[int], list[int]]:
    """An episode as token ids.

    Args:
        episode: the episode.
        encode: ids of a text, without special tokens.
        start: ids that come first, like the beginning-of-text token.

    Returns:
        (all ids, of each action the index of its first token).
    """
    ids, first, actions = list(start), [], set(episode.actions())
    for i, word in enumerate(episode.words):
        if i in actions:
            first.append(len(ids))
        ids += encode(f" {word}")
    return ids, first


def rights(
    logits: Tensor,
    ids: Tensor,
    first: Sequence[int],
    kinds: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, list[bool]]:
    """Which actions a model takes as the expert does.

    Args:
        logits: (t, V), of all tokens of an episode or of its last ones.
        ids: (t'), of the whole episode.
        first: the index of each action's first token; those whose predecessor has no logits are left out.
        kinds: of each action.
        tokenizer: the model's.

    Returns:
        For each of `ACTION_KINDS`, whether the most likely token is the action's. A `stop` counts if the
        agent reports at all; `report` says whether the report is right.
    """
    found: dict[str, list[bool]] = {kind: [] for kind in (*ACTION_KINDS, "report")}
    report = {
        tokenizer.encode(f" {word}", add_special_tokens=False)[0] for word in (MOSTLY_GUSTY, MOSTLY_CALM)
    }
    best = torch.full((len(ids),), -1)
    best[len(ids) - len(logits) :] = logits.argmax(-1).cpu()
    for at, kind in zip(first, kinds, strict=True):
        if at < 1 or (said := int(best[at - 1])) < 0:
            continue
        right = said == int(ids[at])
        found[kind].append(said in report if kind == "stop" else right)
        if kind == "stop":
            found["report"].append(right)
    return found
