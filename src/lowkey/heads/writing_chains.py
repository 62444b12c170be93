"""Lets a model write chains over full and local attention, which is mixed by a gate for every KV head.

What `reward` (RLKV), `distilled` (DuoAttention) and `ablation` share: the windows, the cases that the model
solves, the answers it writes, and the state of training.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.cache.cache import LowkeyCache, cache_of
from lowkey.core import files
from lowkey.core.optimizer_state import fill_state, tensors_of
from lowkey.core.options import Checked, option
from lowkey.core.progress import Progress
from lowkey.core.seeds import seed_of
from lowkey.core.types import LowkeyError, device_of
from lowkey.heads.chains import Chain, ChainTask, draw_chains, stopping_tokens
from lowkey.heads.scores import HeadScores
from lowkey.models import families
from lowkey.models.attention_interface import attached
from lowkey.models.fingerprint import data_fingerprint, model_fingerprint
from lowkey.storage.mixing import MixedAttentionLayer

LEAST_SOLVED = 10  # cases; fewer say nothing about heads
TRIES = 4  # samples of a case; it counts as solved if one of them is right
CASES_AT_ONCE = 16
NOT_WRITTEN = -100  # what torch's cross-entropy leaves out


@dataclass(frozen=True)
class ChainHeads(Checked):
    """The chains that heads are judged by, and what a head that does not keep everything still sees.

    Args:
        sinks: first tokens that local attention sees. Use the same for the cache.
        recent: newest tokens before its own that a query sees locally. Use the same for the cache.
        prompt: `full` lets the context be read in full, as it is before a cache evicts; the question and the
            answer are not. With `local` every query of the prompt mixes, as in the published training.
        pairs: pairs of a table.
        shortest: fewest look-ups of a chain.
        longest: most look-ups of a chain.
    """

    sinks: int = option(4, at_least=0, at_most=2**20)
    recent: int = option(8, at_least=0, at_most=2**20)
    prompt: Literal["full", "local"] = "full"
    pairs: int = option(16, at_least=1, at_most=48)
    shortest: int = option(3, at_least=1, at_most=48)
    longest: int = option(6, at_least=1, at_most=48)

    @property
    def task(self) -> ChainTask:
        """The task, whose filler is what a context needs."""
        return ChainTask(self.pairs, self.shortest, self.longest)

    @property
    def most(self) -> int:
        """Most tokens of an answer: twice what the longest right one takes if every word is a token."""
        return 2 * (self.longest + 3)


@dataclass(frozen=True)
class Answers:
    """What a model wrote to several prompts, several times each.

    Args:
        ids: (rows, t), filled up with the last token behind the end; rows of a prompt are side by side.
        lengths: (rows), tokens written, the one that ends an answer included.
        ended: (rows), whether the answer ended by itself.
    """

    ids: Tensor
    lengths: Tensor
    ended: Tensor

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """The words of each row."""
        own = [ids[:length].tolist() for ids, length in zip(self.ids, self.lengths, strict=True)]
        return [str(words) for words in tokenizer.batch_decode(own)]


@torch.no_grad()
def sample_answers(
    model: PreTrainedModel,
    cache: LowkeyCache,
    logits: Tensor,
    most: int,
    temperature: float,
    seed: int,
    stops: Tensor,
) -> Answers:
    """Write answers behind prompts that a cache has read.

    Args:
        model: the model, attached.
        cache: has read the prompts, and holds a row for each answer.
        logits: (rows, vocabulary), of the first token.
        most: most tokens of an answer.
        temperature: of sampling; 0 takes the likeliest token.
        seed: of sampling.
        stops: (vocabulary), the tokens that end an answer.
    """
    generator = torch.Generator().manual_seed(seed)
    stops = stops.to(logits.device)
    live = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    written: list[Tensor] = []
    lengths = torch.zeros_like(live, dtype=torch.long)
    while True:
        if temperature:
            shares = (logits.float() / temperature).softmax(-1).cpu()
            token = torch.multinomial(shares, 1, generator=generator)[:, 0].to(logits.device)
        else:
            token = logits.argmax(-1)
        written.append(torch.where(live, token, written[-1] if written else token))
        lengths += live
        live = live & ~stops[token]
        if len(written) == most or not bool(live.any()):
            return Answers(torch.stack(written, 1).cpu(), lengths.cpu(), ~live.cpu())
        logits = model(written[-1][:, None], past_key_values=cache).logits[:, -1]


@dataclass(frozen=True)
class ChainJob:
    """Cases that a model solves, and the folder of this job.

    Args:
        model: the model, attached.
        tokenizer: its tokenizer.
        own: the chains and windows.
        chains: the cases that count.
        stops: (vocabulary), the tokens that end an answer.
        identity: fields of `HeadScores` that decide what the job computes.
        folder: for unfinished work, or None.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    own: ChainHeads
    chains: list[Chain]
    stops: Tensor
    identity: dict[str, Any]
    folder: Path | None

    @classmethod
    def of(
        cls,
        kind: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        cases: int,
        context: int,
        seed: int,
        own: ChainHeads,
        progress: Progress,
        work: Path | None,
    ) -> ChainJob:
        """Draw cases, and keep those that the model solves at least once in four samples.

        Args:
            kind: the kind of head scores.
            model: the model, attached; it stays as it is.
            tokenizer: its tokenizer.
            cases: number of cases that are drawn.
            context: tokens of every prompt.
            seed: of everything random.
            own: the chains and windows.
            progress: shows progress over cases.
            work: a folder to save into and to resume from, or None.

        Raises:
            LowkeyError: too few cases are solved, or the context does not fit the model or the table.
        """
        if not attached(model):
            raise LowkeyError(
                "model is not attached: call lowkey.attach(model) before its heads are measured"
            )
        longest = families.max_positions(model)
        if longest is not None and context + own.most > longest:
            raise LowkeyError(
                f"context {context}: with an answer of up to {own.most} tokens it is beyond the model's "
                f"{longest} positions; give at most {longest - own.most}"
            )
        chains = draw_chains(tokenizer, cases, seed, own.task, context)
        prompts = torch.tensor([chain.prompt for chain in chains])
        settings = {"context": context, **asdict(own)}
        known: dict[str, Any] = {"kind": kind, "drawn": cases, "seed": seed, "settings": settings}
        known |= {"model_sha256": model_fingerprint(model), "data_sha256": data_fingerprint(prompts)}
        folder = files.job_folder(work, known)
        stops = stopping_tokens(tokenizer, model.config.get_text_config().vocab_size)
        job = cls(model, tokenizer, own, chains, stops, known, folder)
        solved = (files.read_work(folder, "solved") or {}).get("solved")
        if solved is None or len(solved) != cases:
            solved = job._solved(progress)
            if folder is not None:
                files.write_work(folder, "solved", {"solved": solved})
        kept = [chain for chain, right in zip(chains, solved.tolist(), strict=True) if right]
        if len(kept) < LEAST_SOLVED:
            if work is not None:
                files.remove_work(work)
            raise LowkeyError(
                f"chains: {len(kept)} of {cases} cases were answered right in {TRIES} samples, and scores "
                f"need {LEAST_SOLVED}; give shorter chains (-O longest=2), more cases, or a model that "
                "follows chains"
            )
        return cls(model, tokenizer, own, kept, stops, known, folder)

    def _solved(self, progress: Progress) -> Tensor:
        """Which cases (n) the model solves at least once with full attention."""
        parts = range(0, len(self.chains), CASES_AT_ONCE)
        solved = []
        for first in progress(parts, "cases that the model solves", len(parts)):
            part = self.chains[first : first + CASES_AT_ONCE]
            answers = self.write(
                part, self.gates(), TRIES, 1.0, seed_of(self.identity["seed"], "solve", first)
            )
            solved.append(self.rewards(part, answers).view(-1, TRIES).amax(1) > 0)
        return torch.cat(solved)

    def gates(self) -> Tensor:
        """Gates (layers, h) of full attention."""
        shape = families.geometry(self.model)
        return torch.ones(len(shape.compressible), shape.kv_heads)

    def cache(self, gates: Tensor, chains: list[Chain]) -> LowkeyCache:
        """An empty cache that mixes by gates (layers, h), for prompts of these cases."""
        layers = families.geometry(self.model).compressible
        gates = gates.to(device_of(self.model))
        # questions may differ in length; reading a token of one in full does no harm
        question = min(chain.question for chain in chains)
        full_before = len(chains[0].prompt) - question if self.own.prompt == "full" else 0

        def build(i: int) -> MixedAttentionLayer:
            gate = gates[layers.index(i)]
            return MixedAttentionLayer(gate, self.own.sinks, self.own.recent, full_before)

        return cache_of(self.model, build)

    @torch.no_grad()
    def write(
        self, chains: list[Chain], gates: Tensor, samples: int, temperature: float, seed: int
    ) -> Answers:
        """Let the model write answers by gates (layers, h), `samples` for each case."""
        cache = self.cache(gates, chains)
        ids = torch.tensor([chain.prompt for chain in chains], device=device_of(self.model))
        logits = self.model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        cache.batch_repeat_interleave(samples)
        logits = logits.repeat_interleave(samples, 0)
        return sample_answers(self.model, cache, logits, self.own.most, temperature, seed, self.stops)

    def drawn(self, step: int, most: int) -> list[Chain]:
        """The cases of a step of training, at most so many; they depend on the seed and the step alone."""
        rng = random.Random(seed_of(self.identity["seed"], "cases", step))
        return rng.sample(self.chains, min(most, len(self.chains)))

    def rewards(self, chains: list[Chain], answers: Answers) -> Tensor:
        """1 for every right answer (rows), 0 for the others."""
        samples = len(answers.ids) // len(chains)
        written = answers.texts(self.tokenizer)
        return torch.tensor([float(chains[i // samples].right(said)) for i, said in enumerate(written)])

    def right_answers(self, chains: list[Chain]) -> tuple[Tensor, Tensor]:
        """Prompts with their right answers, filled up behind.

        Returns:
            Ids (n, t), and targets (n, t), the next tokens; `NOT_WRITTEN` but where the answer is written.
        """
        longest = max(len(chain.answer) for chain in chains)
        rows = [[*c.prompt, *c.answer, *[c.answer[-1]] * (longest - len(c.answer))] for c in chains]
        ids = torch.tensor(rows, device=device_of(self.model))
        targets = torch.full_like(ids, NOT_WRITTEN)
        for row, chain in enumerate(chains):
            first = len(chain.prompt) - 1
            span = slice(first, first + len(chain.answer))
            targets[row, span] = ids[row, first + 1 : first + 1 + len(chain.answer)]
        return ids, targets

    def scores(self, values: Tensor, measured: Mapping[str, Any]) -> HeadScores:
        """The head scores of values (layers, h) in [0, 1]; a query head has its KV head's value.

        Args:
            values: for every KV head.
            measured: what is told beside the settings.
        """
        shape = families.geometry(self.model)
        groups = shape.heads // shape.kv_heads
        settings = {**self.identity["settings"], "cases": len(self.chains), **measured}
        known = {**self.identity, "settings": settings, "model": self.model.config._name_or_path}
        return HeadScores(
            task="chains",
            values=values.repeat_interleave(groups, 1).unsqueeze(0),
            layers=shape.compressible,
            kv_heads=shape.kv_heads,
            **known,
        )


class GatesInTraining:
    """Gates in training, with Adam's state, which survive a kill.

    Args:
        gates: (layers, h), where training begins.
        lr: learning rate.
        weight_decay: of AdamW.
        measured: numbers that are kept of every step.
        folder: for unfinished work, or None.

    Attributes:
        gates: as they are now, always in [0, 1].
        history: (steps, measured).
    """

    def __init__(
        self, gates: Tensor, lr: float, weight_decay: float, measured: int, folder: Path | None
    ) -> None:
        self.gates, self.folder = gates.clone().requires_grad_(), folder
        self.history = torch.zeros(0, measured, dtype=torch.float64)
        self.optimizer = torch.optim.AdamW([self.gates], lr=lr, weight_decay=weight_decay)
        saved = files.read_work(folder, "training")
        if saved is not None and folder is not None:
            found = files.checked_tensor(saved, "gates", gates, folder)
            history = saved.get("history", torch.zeros(0))
            self.history = files.checked_tensor(saved, "history", (len(history), measured), folder)
            fill_state(self.optimizer, saved, str(folder))
            self.gates.data.copy_(found)

    def step(self, gradient: Tensor, measured: list[float]) -> None:
        """Take a step and clamp the gates to [0, 1], which the published code does only before the next."""
        self.gates.grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_([self.gates], 1.0)
        self.optimizer.step()
        self.gates.data.clamp_(0, 1)
        row = torch.tensor([measured], dtype=torch.float64)
        self.history = torch.cat([self.history, row])
        if self.folder is not None:
            tensors = {"gates": self.gates.detach(), "history": self.history, **tensors_of(self.optimizer)}
            files.write_work(self.folder, "training", tensors)
