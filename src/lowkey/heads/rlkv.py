"""Trains gates of KV heads by the rewards of chains that a model writes (RLKV, arXiv:2510.08525)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.core.options import option
from lowkey.core.progress import Progress, silent
from lowkey.core.seeds import seed_of
from lowkey.core.types import device_of
from lowkey.heads.chains import Chain
from lowkey.heads.scores import HeadScores
from lowkey.heads.writing_chains import Answers, ChainHeads, ChainJob, GatesInTraining

REWARD = "reward"  # the kind of head scores
MEASURED = ("reward", "tokens", "over_length", "mean_gate")  # of every step


@dataclass(frozen=True)
class RewardTraining(ChainHeads):
    """How gates are trained by rewards.

    Args:
        steps: steps of training.
        prompts: cases of a step.
        samples: answers to each case.
        temperature: of sampling.
        lr: learning rate of AdamW, constant.
        beta: weight of the penalty on the mean gate.
        tau: the penalty acts only if the mean reward is above this.
        gate_scope: whether that is the mean of the `batch`, or of each `micro`-batch as in published code.
        micro: answers of a micro-batch.
        baseline: `batch` standardises rewards over the batch, as the published code; `group` over the answers
            to one case (GRPO).
        weight_decay: of AdamW; the published code has 0.017, a second pull to 0.
    """

    steps: int = option(150, at_least=0, at_most=10**7)
    prompts: int = option(8, at_least=1, at_most=2**16)
    samples: int = option(4, at_least=1, at_most=2**16)
    temperature: float = option(1.0, above=0, at_most=100)
    lr: float = option(0.01, above=0, at_most=1000)
    beta: float = option(0.001, at_least=0, at_most=1000)
    tau: float = option(0.5, at_least=0, at_most=1)
    gate_scope: Literal["batch", "micro"] = "batch"
    micro: int = option(32, at_least=1, at_most=2**16)
    baseline: Literal["batch", "group"] = "batch"
    weight_decay: float = option(0.0, at_least=0, at_most=1000)


def train_by_reward(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    cases: int = 100,
    context: int = 96,
    seed: int = 0,
    training: RewardTraining = RewardTraining(),
    progress: Progress = silent,
    work: Path | None = None,
) -> HeadScores:
    """Train a gate for every KV head, from full attention on, with the model frozen.

    In each step the model writes answers by mixed attention, and the gates alone follow the gradient of

        - mean(advantage * log p(token)) + beta * 1[r > tau] * (exp(r) - 1) * mean|gate| ,

    where r is the mean reward. A batch serves one step, so there is nothing for PPO to clip.

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
        The gates as head scores of kind `reward`.

    Raises:
        LowkeyError: too few cases are solved, all gates end at 0, or unfinished work is damaged.
    """
    job = ChainJob.of(REWARD, model, tokenizer, cases, context, seed, training, progress, work)
    state = GatesInTraining(job.gates(), training.lr, training.weight_decay, len(MEASURED), job.folder)
    done = len(state.history)
    for step in progress(range(done, training.steps), "training gates", training.steps - done):
        chosen = job.drawn(step, training.prompts)
        gates = state.gates.detach()
        drawn = seed_of(seed, "answers", step)
        answers = job.write(chosen, gates, training.samples, training.temperature, drawn)
        rewards = job.rewards(chosen, answers)
        gradient = _policy_gradient(job, chosen, gates, answers, advantages(rewards, training), training)
        gradient = gradient + penalty(rewards, training) * gates.sign() / gates.numel()
        over = float((~answers.ended).double().mean())
        measured = [float(rewards.mean()), float(answers.lengths.double().mean()), over, float(gates.mean())]
        state.step(gradient, measured)
    history = {name: [round(x, 4) for x in state.history[:, i].tolist()] for i, name in enumerate(MEASURED)}
    return job.scores(state.gates.detach(), {"history": history})


def advantages(rewards: Tensor, training: RewardTraining) -> Tensor:
    """Standardised rewards (rows), over the batch or over the answers to each case.

    Args:
        rewards: (rows), answers to a case side by side.
        training: `baseline` and `samples`.
    """
    groups = rewards.view(-1, training.samples) if training.baseline == "group" else rewards.view(1, -1)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (centred.square().mean(1, keepdim=True).sqrt() + 1e-6)).flatten()


def penalty(rewards: Tensor, training: RewardTraining) -> float:
    """What the mean gate is weighted with in the loss.

    Args:
        rewards: (rows), of a step.
        training: `beta`, `tau`, `gate_scope` and `micro`.
    """
    parts = rewards.split(training.micro) if training.gate_scope == "micro" else (rewards,)
    means = [float(part.mean()) for part in parts]
    factors = [math.expm1(mean) if mean > training.tau else 0.0 for mean in means]
    return training.beta * sum(factors) / len(factors)


def _policy_gradient(
    job: ChainJob,
    chosen: list[Chain],
    gates: Tensor,
    answers: Answers,
    advantage: Tensor,
    training: RewardTraining,
) -> Tensor:
    """The gradient (layers, h) of - mean(advantage * log p) over all tokens that were written."""
    total = torch.zeros_like(gates)
    if not bool(advantage.any()):  # all rewards are alike
        return total
    samples, device = len(answers.ids) // len(chosen), device_of(job.model)
    prompts = torch.tensor([chain.prompt for chain in chosen]).repeat_interleave(samples, 0)
    for rows in torch.arange(len(prompts)).split(training.micro):
        written = answers.ids[rows].to(device)
        ids = torch.cat([prompts[rows].to(device), written[:, :-1]], 1)
        trained = gates.clone().requires_grad_()
        with torch.enable_grad():
            cache = job.cache(trained, chosen)
            logits = job.model(ids, past_key_values=cache, logits_to_keep=written.shape[1]).logits
            logs = (logits.float() / training.temperature).log_softmax(-1)
            own = logs.gather(2, written[:, :, None])[:, :, 0]
            counts = torch.arange(written.shape[1]) < answers.lengths[rows, None]
            weights = (advantage[rows, None] * counts / answers.lengths.sum()).to(own)
            total += torch.autograd.grad(-(own * weights).sum(), trained)[0].cpu()
    return total
