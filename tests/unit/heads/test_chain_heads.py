"""Gates of heads: mixed attention by hand, gradients against differences, and training that resumes."""

from __future__ import annotations

import math

import pytest
import torch
from head_recording import refused
from pico import attached, stock

from lowkey.cache.cache import cache_of, make_cache
from lowkey.core.errors import LowkeyError
from lowkey.heads import CHAIN_KINDS, CHAIN_TRAININGS, rlkv, writing_chains
from lowkey.heads.chains import draw_chains
from lowkey.heads.rivals import Ablation, DistilledTraining, distance_gradient
from lowkey.heads.rlkv import RewardTraining, advantages, penalty
from lowkey.heads.scores import HeadScores
from lowkey.heads.writing_chains import ChainHeads, ChainJob
from lowkey.models import families
from lowkey.models.loading import load, load_tokenizer
from lowkey.policies import POLICIES
from lowkey.storage.mixing import MixedAttentionLayer

SMALL = {"sinks": 2, "recent": 3, "pairs": 4, "shortest": 2, "longest": 3}
TRAININGS = {
    "reward": RewardTraining(steps=4, prompts=3, samples=3, micro=4, beta=0.1, tau=0.2, **SMALL),
    "distilled": DistilledTraining(steps=4, prompts=3, **SMALL),
    "ablation": Ablation(**SMALL),
}


@pytest.fixture(scope="module")
def tiny():
    return load("tiny", "float32", "cpu")


def run(kind, tiny, work=None, training=None, seed=0, progress=None):
    more = {} if progress is None else {"progress": progress}
    return CHAIN_KINDS[kind](
        *tiny, cases=12, context=40, seed=seed, training=training or TRAININGS[kind], work=work, **more
    )


# -- mixed attention


def mixed(model, gates, sinks, recent, full_before=0):
    layers = families.geometry(model).compressible
    return cache_of(model, lambda i: MixedAttentionLayer(gates[layers.index(i)], sinks, recent, full_before))


@pytest.mark.parametrize("full_before", [0, 9])
def test_mixed_attention_is_two_softmaxes(full_before):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 12, 4, generator=generator).double() for h in (6, 3, 3))
    gates = torch.tensor([0.0, 0.3, 1.0]).double()
    layer = MixedAttentionLayer(gates, 2, 3, full_before)
    call = type("Call", (), {})()
    call.query, call.mask, call.scaling, call.softcap = q.unflatten(1, (3, 2)), None, 0.5, None
    call.full_mask = lambda seen: torch.ones(12, seen, dtype=torch.bool).tril().unsqueeze(0)
    layer.lazy_initialization(k, v)
    layer.seen = 12
    out = layer.attend(k, v, call)
    for b, h, g, t in [(b, h, g, t) for b in range(2) for h in range(3) for g in range(2) for t in range(12)]:

        def over(seen, b=b, h=h, g=g, t=t):
            weights = [math.exp(0.5 * float(q[b, 2 * h + g, t] @ k[b, h, j])) for j in seen]
            return sum(w * v[b, h, j] for w, j in zip(weights, seen, strict=True)) / sum(weights)

        full = list(range(t + 1))
        local = [j for j in full if j < 2 or t - j <= 3 or t < full_before]
        expected = gates[h] * over(full) + (1 - gates[h]) * over(local)
        torch.testing.assert_close(out[b, h, g, t], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_open_gates_are_full_attention(family):
    ids = torch.randint(0, 60, (2, 20), generator=torch.Generator().manual_seed(1))
    model, own = attached(family), stock(family)
    shape = families.geometry(model)
    ones = torch.ones(len(shape.compressible), shape.kv_heads)
    cache = mixed(model, ones, 1, 2)
    with torch.no_grad():
        first = model(ids[:, :15], past_key_values=cache).logits
        steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(15, 20)]
        expected = own(ids).logits
    torch.testing.assert_close(torch.cat([first, *steps], 1), expected, rtol=1e-4, atol=1e-4)
    assert cache.nbytes() == cache.predicted_nbytes()


@pytest.mark.parametrize(("gate", "budget"), [(0.0, "5 tokens"), (1.0, "100%")])
def test_a_cache_of_such_heads_answers_as_the_gates(gate, budget):
    """What gates are trained for is what a cache does: context, then one token after the other."""
    ids = torch.randint(0, 60, (2, 24), generator=torch.Generator().manual_seed(2))
    model, context, sinks, recent = attached("llama"), 16, 2, 3
    shape = families.geometry(model)
    gates = torch.full((len(shape.compressible), shape.kv_heads), gate)
    policy = POLICIES["rlkv"](budget, sinks=sinks, recent=recent, every=1)
    policy = policy.with_head_scores({"reward": gates.tolist()})
    caches = mixed(model, gates, sinks, recent, full_before=context), make_cache(model, policy=policy)
    with torch.no_grad():
        expected, out = (
            torch.cat(
                [
                    model(ids[:, :context], past_key_values=cache).logits,
                    *(model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(context, 24)),
                ],
                1,
            )
            for cache in caches
        )
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


# -- gradients and the objective


def job_of(tiny, own):
    return ChainJob.of("reward", *tiny, 12, 40, 0, own, writing_chains_progress, None)


def writing_chains_progress(items, *args):
    return items


def test_the_policy_gradient_is_that_of_its_definition(tiny, willing):
    training = TRAININGS["reward"]
    job, gates = job_of(tiny, training), torch.full((4, 6), 0.6)
    chosen = job.chains[:3]
    answers = job.write(chosen, gates, 3, 1.0, 7)
    advantage = torch.linspace(-1, 1, 9)
    found = rlkv._policy_gradient(job, chosen, gates, answers, advantage, training)

    @torch.no_grad()
    def loss(at):
        total, count = 0.0, int(answers.lengths.sum())
        for row in range(9):
            prompt, own = chosen[row // 3].prompt, answers.ids[row, : answers.lengths[row]].tolist()
            logits = tiny[0](torch.tensor([prompt + own]), past_key_values=job.cache(at, chosen)).logits[0]
            logs = logits.double().log_softmax(-1)
            written = sum(float(logs[len(prompt) - 1 + i, token]) for i, token in enumerate(own))
            total -= float(advantage[row]) * written / count
        return total

    for at in ((0, 1), (1, 3), (2, 0), (3, 5)):
        up, down = gates.clone(), gates.clone()
        up[at] += 0.02
        down[at] -= 0.02
        assert float(found[at]) == pytest.approx((loss(up) - loss(down)) / 0.04, rel=0.05, abs=2e-5)
    assert all(p.grad is None for p in tiny[0].parameters())


def test_advantages_are_standardised_over_the_batch_or_the_group():
    rewards = torch.tensor([1.0, 0, 1, 1, 0, 0, 0, 0])
    batch = advantages(rewards, RewardTraining(samples=4))
    torch.testing.assert_close(batch, (rewards - 0.375) / (0.375 * 0.625) ** 0.5)
    group = advantages(rewards, RewardTraining(samples=4, baseline="group"))
    torch.testing.assert_close(group[:4], (rewards[:4] - 0.75) / (0.75 * 0.25) ** 0.5, rtol=1e-4, atol=1e-4)
    assert not group[4:].any()


def test_the_penalty_needs_a_reward_above_tau():
    right, half = torch.ones(8), torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0])
    assert penalty(right, RewardTraining(beta=0.5)) == pytest.approx(0.5 * (math.e - 1))
    assert penalty(half, RewardTraining(beta=0.5, tau=0.5)) == 0
    assert penalty(half, RewardTraining(beta=0.5, tau=0.4)) == pytest.approx(0.5 * (math.exp(0.5) - 1))
    micro = RewardTraining(beta=0.5, tau=0.5, gate_scope="micro", micro=4)
    assert penalty(half, micro) == pytest.approx(0.25 * (math.e - 1))


def test_gates_stay_between_0_and_1_after_every_step(tiny, willing):
    job = job_of(tiny, TRAININGS["reward"])
    state = writing_chains.GatesInTraining(job.gates(), 0.3, 0.0, 1, None)
    state.step(-torch.ones(4, 6), [0.0])
    assert bool((state.gates == 1).all())
    for _ in range(20):
        state.step(torch.ones(4, 6), [0.0])
    assert bool((state.gates == 0).all())


def test_distance_gradient_is_zero_at_full_attention(tiny, willing):
    job = job_of(tiny, TRAININGS["distilled"])
    gradient, distance = distance_gradient(job, job.chains[:2], job.gates())
    assert distance == pytest.approx(0, abs=1e-9) and float(gradient.abs().max()) < 1e-4
    lower = torch.full((4, 6), 0.5)
    gradient, distance = distance_gradient(job, job.chains[:2], lower)
    step = distance_gradient(job, job.chains[:2], lower - 0.01 * gradient / gradient.norm())[1]
    assert distance > step > 0


# -- whole estimations


@pytest.mark.parametrize("kind", CHAIN_KINDS)
def test_head_scores_are_saved_and_belong_to_their_model(kind, tiny, willing, tmp_path):
    found = run(kind, tiny)
    assert found.kind == kind and found.values.shape == (1, 4, 6) and found.task == "chains"
    found.save(tmp_path / "heads.json")
    again = HeadScores.load(tmp_path / "heads.json", tiny[0])
    assert torch.equal(again.values, found.values) and again.settings == found.settings
    refused(lambda: HeadScores.load(tmp_path / "heads.json", attached("llama")), "made for")


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("kind", CHAIN_KINDS)
@pytest.mark.parametrize("after", [0, 2])
def test_stopped_training_ends_with_the_same_gates(kind, after, tiny, willing, tmp_path, monkeypatch):
    monkeypatch.setattr("lowkey.core.files.measured.SECONDS_BETWEEN_WRITES", 0.0)

    def stopping(items, text, *args):
        for number, item in enumerate(items):
            if number == after and text != "cases that the model solves":
                raise StoppedError
            yield item

    whole = run(kind, tiny)
    with pytest.raises(StoppedError):
        run(kind, tiny, tmp_path / "work", progress=stopping)
    monkeypatch.setattr(ChainJob, "_solved", lambda *args: pytest.fail("solved again"))
    begun = []

    def counting(items, *args):
        for item in items:
            begun.append(item)
            yield item

    again = run(kind, tiny, tmp_path / "work", progress=counting)
    assert torch.equal(again.values, whole.values) and again.settings == whole.settings
    if kind != "ablation":
        assert len(begun) == 4 - after


def test_another_seed_or_option_is_another_job(tiny, willing, tmp_path):
    work = tmp_path / "work"
    first = run("reward", tiny, work)
    other = run("reward", tiny, work, seed=1)
    assert not torch.equal(first.values, other.values)
    assert torch.equal(run("reward", tiny, seed=1).values, other.values)


def test_a_model_that_solves_nothing_is_refused(tiny, tmp_path):
    refused(lambda: run("reward", tiny, tmp_path / "work"), "of 12 cases were answered right")
    assert not (tmp_path / "work").exists()


def test_damaged_work_is_refused(tiny, willing, tmp_path):
    from lowkey.core import files

    run("reward", tiny, tmp_path / "work")
    (folder,) = (tmp_path / "work").iterdir()
    files.write_work(folder, "training", {"gates": torch.zeros(2, 2)})
    refused(lambda: run("reward", tiny, tmp_path / "work"), "damaged")


@pytest.mark.parametrize("kind", CHAIN_KINDS)
def test_what_cannot_be_is_refused(kind, tiny):
    refused(lambda: CHAIN_KINDS[kind](*tiny, cases=12, context=1270), "give at most")
    refused(lambda: CHAIN_KINDS[kind](*tiny, cases=12, context=20), "longer context or fewer pairs")
    with pytest.raises(LowkeyError, match="shorter chains"):
        CHAIN_KINDS[kind](*tiny, training=CHAIN_TRAININGS[kind](shortest=5, longest=4))
    refused(lambda: CHAIN_KINDS[kind](stock("llama"), tiny[1]), "not attached")


def test_right_answers_are_the_only_targets(tiny, willing):
    job = job_of(tiny, ChainHeads(**SMALL))
    ids, targets = job.right_answers(job.chains[:5])
    for row, chain in enumerate(job.chains[:5]):
        assert targets[row][targets[row] >= 0].tolist() == chain.answer
        assert ids[row, : len(chain.prompt)].tolist() == chain.prompt


def test_the_cache_reads_the_context_in_full_or_not(tiny, willing):
    full = job_of(tiny, ChainHeads(**SMALL))
    local = job_of(tiny, ChainHeads(prompt="local", **SMALL))
    chains = draw_chains(load_tokenizer("tiny"), 2, task=full.own.task, length=40)
    closed, question = torch.zeros(4, 6), min(chain.question for chain in chains)
    assert full.cache(closed, chains).layers[0].full_before == 40 - question
    assert local.cache(closed, chains).layers[0].full_before == 0
