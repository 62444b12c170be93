"""vLLM in a process of its own for each case, beside lowkey's own cache.

Importing vLLM takes half a minute, so it is imported once and every case is a fork of this process.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import lowkey
import torch
from lowkey.cache.cache import make_cache
from lowkey.core.head_groups import per_head_maps
from lowkey.core.types import Factors
from lowkey.models import families, loading
from lowkey.models.fingerprint import model_fingerprint
from lowkey.plan.plan import Plan, versions
from lowkey.storage.exact import Exact
from torch import Tensor

NEW = 24  # tokens of each answer
MEMORY = 16 * 2**20  # for pages, unless a case says otherwise
SAME = 1e-4  # by so much may the logarithm of a probability differ, in fp32


class Answers(NamedTuple):
    """What an engine answered, one for each prompt, and what it told of itself."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    blocks: int
    cached: list[int]
    preemptions: int


def forked(function: Callable[[], Any]) -> Any:
    """What a function returns in a fork of this process, through JSON. Raises: what it raised, as text."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        try:
            result = {"result": function()}
        except BaseException as error:
            result = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        with os.fdopen(write, "w") as out:
            json.dump(result, out)
        sys.stdout.flush()
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    told = json.loads(text or '{"error": "the process died"}')
    if "error" in told:
        raise RuntimeError(told["error"] + "\n" + told.get("trace", "")[-4000:])
    return told["result"]


@cache
def imported() -> Any:
    """vLLM, imported once, with what its engines import."""
    import vllm
    import vllm.model_executor.models.llama
    import vllm.model_executor.models.qwen3
    import vllm.v1.engine.llm_engine
    import vllm.v1.worker.cpu_worker

    import lowkey_vllm.equip
    import lowkey_vllm.own
    import lowkey_vllm.windowed  # noqa: F401

    return vllm


def engine(model: Path, lowkey_config: dict | None = None, **settings: Any) -> Any:
    """An engine in this process."""
    config = {} if lowkey_config is None else {"additional_config": {"lowkey": lowkey_config}}
    usual = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 1024,
        "kv_cache_memory_bytes": MEMORY,
        "disable_log_stats": False,
        "seed": 0,
    }
    return imported().LLM(model=str(model), **{**usual, **config, **settings})


def asked(llm: Any, prompts: list[list[int]], new: int = NEW) -> Answers:
    """Greedy answers to prompts of token ids."""
    how = imported().SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, logprobs=1)
    found = llm.generate([{"prompt_token_ids": ids} for ids in prompts], how, use_tqdm=False)
    outs = [answer.outputs[0] for answer in found]
    logprobs = [
        [step[token].logprob for token, step in zip(out.token_ids, out.logprobs, strict=True)] for out in outs
    ]
    counted = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    return Answers(
        [list(out.token_ids) for out in outs],
        logprobs,
        llm.llm_engine.vllm_config.cache_config.num_gpu_blocks,
        [answer.num_cached_tokens or 0 for answer in found],
        int(counted.get("vllm:num_preemptions", 0)),
    )


def served(
    model: Path, prompts: list[list[int]], lowkey_config: dict | None = None, **settings: Any
) -> Answers:
    """Greedy answers of an engine in a process of its own."""
    imported()
    return Answers(*forked(lambda: asked(engine(model, lowkey_config, **settings), prompts)))


def of_our_cache(
    model: Path, prompts: list[list[int]], plan: Path | None = None, new: int = NEW
) -> tuple[list[list[int]], list[list[float]]]:
    """(greedy tokens, their logarithms of probabilities) over lowkey's own cache, one prompt at a time."""

    def run() -> tuple[list[list[int]], list[list[float]]]:
        own, _ = loading.load(str(model), "float32")
        maps = None if plan is None else Plan.load(plan, own)
        tokens, logprobs = [], []
        for ids in prompts:
            with torch.no_grad():
                cache = make_cache(own, maps, exact=None if maps is None else Exact(maps.sinks, maps.recent))
                stored = cache if maps is not None else None
                inputs, found = torch.tensor([ids]), []
                for _ in range(new):
                    out = own(inputs, past_key_values=stored, use_cache=True)
                    stored = out.past_key_values
                    best = out.logits[0, -1].log_softmax(-1).max(-1)
                    found.append((int(best.indices), float(best.values)))
                    inputs = best.indices.view(1, 1)
            tokens.append([token for token, _ in found])
            logprobs.append([value for _, value in found])
        return tokens, logprobs

    tokens, logprobs = forked(run)
    return tokens, logprobs


def check_same(answers: Answers, expected: tuple[list[list[int]], list[list[float]]]) -> None:
    """Check that an engine answered as lowkey's own cache does."""
    tokens, logprobs = expected
    assert answers.tokens == tokens
    worst = max(
        abs(a - b)
        for row, other in zip(answers.logprobs, logprobs, strict=True)
        for a, b in zip(row, other, strict=True)
    )
    assert worst < SAME, worst


def check_near(answers: Answers, expected: tuple[list[list[int]], list[list[float]]], within: float) -> None:
    """As `check_same`, where a number may be rounded the other way.

    Two tokens that are as likely as one another may then change places; what follows is another text.
    """
    for *ours, theirs, known in zip(answers.tokens, answers.logprobs, *expected, strict=True):
        tokens, logprobs = ours
        same = next((i for i, pair in enumerate(zip(tokens, theirs, strict=True)) if len(set(pair)) > 1), NEW)
        assert same >= NEW // 2, (tokens, theirs)
        pairs = list(zip(logprobs, known, strict=True))[: same + 1]
        assert max(abs(a - b) for a, b in pairs) < within


# -- models and plans


def prompts(*lengths: int, vocab: int = 2048, seed: int = 0) -> list[list[int]]:
    """Random token ids of these lengths, without the first two."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, vocab, (n,), generator=generator).tolist() for n in lengths]


def saved_model(folder: Path, kind: str, **shape: Any) -> Path:
    """A random model of a family with heads of 32, and tiny's tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    usual = {
        "vocab_size": 2048,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "initializer_range": 0.08,
        "sliding_window": None,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**usual, **shape}))
    model.save_pretrained(folder)
    loading.load_tokenizer("tiny").save_pretrained(folder)
    return folder


def maps(
    heads: int, width: int, merge: int, latent: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random orthonormal maps of groups of heads into latents, and back."""
    n = merge * width
    square = torch.randn(heads // merge, n, n, generator=generator)
    down = torch.linalg.qr(square).Q[..., :latent].contiguous()
    return down, per_head_maps(down.mT, merge).contiguous()


def saved_plan(
    folder: Path,
    model: Path,
    keys: list[tuple[int, int]],
    values: list[tuple[int, int]],
    means: bool = False,
    order: bool = False,
    **fields: Any,
) -> Path:
    """A plan of random maps.

    Args:
        folder: to save it in.
        model: folder of the model.
        keys: for each layer in turn, (heads that share a latent, width of the latent).
        values: the same.
        means: whether means are taken off.
        order: whether heads are grouped in another order.
        fields: of the plan, as `layout` and `bits`.
    """
    loaded, _ = loading.load(str(model), "float32")
    shape, generator = families.geometry(loaded), torch.Generator().manual_seed(1)
    h, d = shape.kv_heads, shape.head_dim
    factors = {}
    for i in shape.compressible:
        k, v = keys[i % len(keys)], values[i % len(values)]
        found = Factors(*maps(h, d, *k, generator), *maps(h, d, *v, generator))
        if means:
            mean_k, mean_v = (torch.randn(h, d, generator=generator) / 8 for _ in range(2))
            found = replace(found, k_mean=mean_k, v_mean=mean_v)
        if order:
            found = replace(found, order=torch.randperm(h, generator=generator))
        factors[i] = found
    Plan(
        factors,
        fields.pop("layout", "post_rope"),
        {"name": "pca", "parameters": {}},
        {"name": "uniform", "parameters": {}},
        "50%",
        vars(shape) | {"compressible": list(shape.compressible)},
        {"model": str(model), "model_sha256": model_fingerprint(loaded), "versions": versions()},
        **fields,
    ).save(folder)
    return folder


assert lowkey.__file__
