"""Other ways to find the heads that need all tokens of a chain: distillation (DuoAttention,
arXiv:2410.10819), and the loss without each head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.core.files.measured import Measured
from lowkey.core.options import option
from lowkey.core.progress import Progress, silent
from lowkey.heads.chains import Chain
from lowkey.heads.scores import HeadScores
from lowkey.heads.writing_chains import CASES_AT_ONCE, NOT_WRITTEN, ChainHeads, ChainJob, GatesInTraining

DISTILLED, ABLATION = "distilled", "ablation"  # kinds of head scores


@dataclass(frozen=True)
class DistilledTraining(ChainHeads):
    """How gates are trained by the distance from full attention.

    Args:
        steps: steps of training.
        prompts: cases of a step.
        lr: learning rate of AdamW, constant.
        beta: weight of the penalty on the mean gate.
    """

    steps: int = option(150, at_least=0, at_most=10**7)
    prompts: int = option(16, at_least=1, at_most=2**16)
    lr: float = option(0.02, above=0, at_most=1000)
    beta: float = option(0.05, at_least=0, at_most=1000)


def train_by_distance(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    cases: int = 100,
    context: int = 96,
    seed: int = 0,
    training: DistilledTraining = DistilledTraining(),
    progress: Progress = silent,
    work: Path | None = None,
) -> HeadScores:
    """Train a gate for every KV head, so that the last hidden states of right answers stay as they are.

    The loss is the squared distance of these states from those of full attention, as a share of their own
    square, plus `beta` times the mean gate.

    Args:
        model: the model, attached; it stays as it is.
        tokenizer: its tokenizer.
        cases: number of cases that are drawn; those that the model solves serve.
        context: tokens of a prompt.
        seed: of everything random.
        training: how to train.
        progress: shows progress over cases and steps.
        work: a folder to save into after every step, and to resume from, to the same gates.

    Returns:
        The gates as head scores of kind `distilled`.

    Raises:
        LowkeyError: too few cases are solved, all gates end at 0, or unfinished work is damaged.

    Source: arXiv:2410.10819, on answers to chains instead of passkeys. The paper's distance is not a share.
    """
    job = ChainJob.of(DISTILLED, model, tokenizer, cases, context, seed, training, progress, work)
    state = GatesInTraining(job.gates(), training.lr, 0.0, 2, job.folder)
    done = len(state.history)
    for step in progress(range(done, training.steps), "training gates", training.steps - done):
        chosen = job.drawn(step, training.prompts)
        gates = state.gates.detach()
        gradient, distance = distance_gradient(job, chosen, gates)
        gradient = gradient + training.beta * gates.sign() / gates.numel()
        state.step(gradient, [distance, float(gates.mean())])
    history = {
        name: [round(x, 6) for x in state.history[:, i].tolist()]
        for i, name in enumerate(("distance", "mean_gate"))
    }
    return job.scores(state.gates.detach(), {"history": history})


def distance_gradient(job: ChainJob, chosen: list[Chain], gates: Tensor) -> tuple[Tensor, float]:
    """The gradient (layers, h) of the distance of right answers from full attention, and the distance."""
    ids, targets = job.right_answers(chosen)
    answers = targets != NOT_WRITTEN

    def states(mixed: Tensor) -> Tensor:
        cache = job.cache(mixed, chosen)
        found = job.model(ids, past_key_values=cache, logits_to_keep=1, output_hidden_states=True)
        return found.hidden_states[-1][answers].float()

    with torch.no_grad():
        full = states(job.gates())
    trained = gates.clone().requires_grad_()
    with torch.enable_grad():
        distance = (states(trained) - full).square().sum() / full.square().sum()
        return torch.autograd.grad(distance, trained)[0].cpu(), float(distance.detach())


@dataclass(frozen=True)
class Ablation(ChainHeads):
    """The chains that are written without one head; there is nothing else to choose."""


@torch.no_grad()
def measure_ablation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    cases: int = 100,
    context: int = 96,
    seed: int = 0,
    training: Ablation = Ablation(),
    progress: Progress = silent,
    work: Path | None = None,
) -> HeadScores:
    """How much worse right answers become if one KV head after the other attends locally.

    Args:
        model: the model, attached.
        tokenizer: its tokenizer.
        cases: number of cases that are drawn; those that the model solves serve.
        context: tokens of a prompt.
        seed: of the cases.
        training: the chains and windows.
        progress: shows progress over cases and heads.
        work: a folder to save into, and to resume from.

    Returns:
        Head scores of kind `ablation`: the rise of the mean loss of an answer's token without the head, moved
        and scaled so that the least is 0 and the most 1.

    Raises:
        LowkeyError: too few cases are solved, or no head matters.
    """
    job = ChainJob.of(ABLATION, model, tokenizer, cases, context, seed, training, progress, work)
    measured, full = Measured(work, job.identity), job.gates()
    found = []
    for head in progress(range(full.numel()), "leaving out heads", full.numel()):
        gates = full.flatten().index_fill(0, torch.tensor([head]), 0.0).view_as(full)
        found.append(measured.tensor(f"head {head}", (), partial(_loss, job, gates)))
    measured.write()
    loss = torch.stack([x for x in found if x is not None])
    spread = loss - loss.min()
    values = (spread / spread.max().clamp_min(1e-300)).view_as(full)
    return job.scores(values, {"loss": [float(loss.min()), float(loss.max())]})


@torch.no_grad()
def _loss(job: ChainJob, gates: Tensor) -> Tensor:
    """The mean loss () of a token of the right answers."""
    total, count = 0.0, 0
    for first in range(0, len(job.chains), CASES_AT_ONCE):
        part = job.chains[first : first + CASES_AT_ONCE]
        ids, targets = job.right_answers(part)
        logits = job.model(ids, past_key_values=job.cache(gates, part)).logits
        own = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        total += float(own) * int((targets != NOT_WRITTEN).sum())
        count += int((targets != NOT_WRITTEN).sum())
    return torch.tensor(total / count, dtype=torch.float64)
