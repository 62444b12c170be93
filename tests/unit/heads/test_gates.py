"""What policies learn of a model: measured, saved, and used only with that model."""

from __future__ import annotations

import dataclasses

import pico
import pytest
import torch
from pico import attached, prompt, stock

import lowkey
from lowkey.catalog import make_policy
from lowkey.core import files
from lowkey.core.types import LowkeyError
from lowkey.evaluate.settings import evicted
from lowkey.heads import GATES
from lowkey.heads.query_centres import estimate_query_centres
from lowkey.policies.gates import Gates

CORPUS = " ".join(f"word{i % 83}" for i in range(4000))


def measured(model, **options):
    given = {"corpus": CORPUS, "windows": 3, "context": 40} | options
    return estimate_query_centres(model, pico.tokenizer(), **given)


def centres_by_hand(model, rows):
    """From projections of transformers' own model: means over all but the first four tokens of a window."""
    taken = {}
    handles = [
        block.self_attn.q_proj.register_forward_hook(
            lambda m, x, out, i=i: taken.setdefault(i, []).append(out)
        )
        for i, block in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        for row in rows:
            model(row.unsqueeze(0))
    for handle in handles:
        handle.remove()
    heads, d = model.config.num_attention_heads, pico.HEAD_DIM
    for parts in taken.values():
        q = torch.cat([part[0, 4:] for part in parts]).double().view(-1, heads, d)
        pairs = (q[..., : d // 2].square() + q[..., d // 2 :].square()).sqrt()
        yield q.mean(0), pairs.mean(0)


def test_centres_are_means_of_queries_before_their_rotation():
    seen = []
    model = attached("llama")
    handle = model.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    found = measured(model)
    handle.remove()
    by_hand = centres_by_hand(stock("llama"), torch.cat(seen))
    for own, (centre, norms) in zip(found.layers, by_hand, strict=True):
        assert torch.allclose(own["centre"].flatten(0, 1).double(), centre, atol=1e-5)
        assert torch.allclose(own["norms"].flatten(0, 1).double(), norms, atol=1e-5)
    assert len(seen) == found.settings["windows"] == 3


def test_a_stopped_measurement_goes_on_to_the_same_numbers(tmp_path):
    model, read = attached("llama"), []

    def stop(items, label, total=None):
        for item in items:
            if len(read) == 2:
                raise KeyboardInterrupt
            read.append(item)
            yield item

    with pytest.raises(KeyboardInterrupt):
        measured(model, work=tmp_path / "work", progress=stop)
    again = measured(model, work=tmp_path / "work")
    whole = measured(model)
    assert all(
        torch.equal(a[name], b[name]) for a, b in zip(again.layers, whole.layers, strict=True) for name in a
    )
    (job,) = (tmp_path / "work").iterdir()
    sums = files.read_work(job, "gates")
    files.write_work(job, "gates", sums | {"done": torch.tensor(99)})
    with pytest.raises(LowkeyError, match="sums of 99 windows of"):
        measured(model, work=tmp_path / "work")


@pytest.mark.parametrize("method", GATES)
def test_a_saved_cache_holds_its_gates(method, tmp_path):
    model, ids = attached("llama"), prompt(60, batch=1)
    gates = GATES[method](model, pico.tokenizer(), corpus=CORPUS, windows=2, context=40)
    gates.save(tmp_path / "gates")
    loaded = Gates.load(tmp_path / "gates")
    policy = make_policy(method, "50%", {"every": "2", "protect_prompt": "true"})
    cache = lowkey.make_cache(model, policy=policy, gates=loaded)
    pico.feed(model, ids[:, :50], cache, splits=[40] + [1] * 10)
    cache.save(tmp_path / "cache")
    again = lowkey.load_cache(tmp_path / "cache", model)
    kept = []
    for each in (cache, again):
        pico.feed(model, ids[:, 50:], each, splits=[1] * 10)
        kept.append([at.tolist() for layer in range(3) for at in each.kept_positions(layer)])
        assert each.nbytes() == each.predicted_nbytes()
    assert kept[0] == kept[1] and sum(map(len, kept[0])) == 50 * len(kept[0])


def test_gates_that_do_not_fit_are_refused(tmp_path):
    model = attached("llama")
    gates, policy = measured(model), make_policy("triattention", "50%", {})
    other = dataclasses.replace(gates, model_sha256="2:0")
    narrow = dataclasses.replace(gates, layers=gates.layers[:2])
    refused = {
        "needs what it learns of a model: run `lowkey gates": {"policy": policy},
        "policy 'snapkv' reads none": {"policy": make_policy("snapkv", "50%", {}), "gates": gates},
        "no policy reads them": {"gates": gates},
        "made for model": {"policy": policy, "gates": other},
        "layer 2 of 3 does not hold centre": {"policy": policy, "gates": narrow},
    }
    for said, given in refused.items():
        with pytest.raises(LowkeyError, match=said):
            lowkey.make_cache(model, **given)
    with pytest.raises(LowkeyError, match="made for model"):
        evicted(model, policy, "triattention", 64, gates={"triattention": other})
    with pytest.raises(LowkeyError, match="does not exist; run `lowkey gates MODEL OUT`"):
        Gates.load(tmp_path)


def test_damaged_gates_are_refused(tmp_path):
    gates = measured(attached("llama"))
    lacking = dataclasses.replace(gates, layers=(gates.layers[0], {}, gates.layers[2]))
    lacking.save(tmp_path / "a")
    with pytest.raises(LowkeyError, match="layer 1 of 3 does not hold"):
        lowkey.make_cache(
            attached("llama"), policy=make_policy("triattention", "50%", {}), gates=Gates.load(tmp_path / "a")
        )
    gates.save(tmp_path / "b")
    (tmp_path / "b" / "gates.safetensors").write_bytes(
        (tmp_path / "b" / "gates.safetensors").read_bytes()[:-4] + b"abcd"
    )
    with pytest.raises(LowkeyError, match="gates"):
        Gates.load(tmp_path / "b")
