"""What a plan says of itself in words: its card, its axes, and the bytes that it keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowkey.core.types import LowkeyError
from lowkey.plan.held_bytes import held_bytes, text_decides

if TYPE_CHECKING:  # that module imports this one
    from lowkey.plan.plan import Plan

LENGTHS = (256, 1024, 4096, 32768)  # tokens of the sequences whose bytes the card lists
BFLOAT16 = 2  # bytes of a number
WHOLE = "all of it"


def axes_kept(plan: Plan) -> dict[str, str]:
    """What a plan keeps on each axis, in words."""
    method, allocator, policy = plan.method, plan.allocator, plan.policy
    rank = WHOLE
    d, own = plan.geometry["head_dim"], plan.token_ranks
    if own is not None:
        *more, least = map(str, own.levels)
        levels = f"{', '.join(more)} or {least}" if more else least
        rank = (
            f"{levels} of {d} coordinates of a token, {own.share:.1%} in the mean over held-out tokens, with "
            f"KL {own.divergence:.4f} per token: method `{method['name']}`, layout `{plan.layout}`"
        )
    elif plan.factors:
        chosen = [(k + v) / (2 * d) for k, v in plan.ranks.values()]
        rank = (
            f"{100 * sum(chosen) / len(chosen):.1f} % of the rank: method `{method['name']}`, allocator "
            f"`{allocator['name']}`, layout `{plan.layout}`"
        )
    tokens = "all of them"
    if policy is not None:
        budget = policy["budget"] or "what its rule says"
        tokens = f"{budget}: policy `{policy['name']}`, allocator `{policy['allocator']['name']}`"
    recent = plan.cache_bytes(BFLOAT16, 1).recent_tokens  # some packings ask for a window of their own
    window = [f"{n} {word}" for n, word in ((plan.sinks, "sinks"), (recent, "recent tokens")) if n]
    return {
        "rank": rank,
        "bits": f"packed as `{plan.bits}`" if plan.bits else "the model's own numbers",
        "tokens": tokens,
        "exact": " and ".join(window) or "none",
    }


def options_kept(plan: Plan) -> list[str]:
    """What a plan says of its policy beside the budget: the options, and the head scores that it holds."""
    lines = []
    if plan.policy is not None:
        told = [("policy", plan.policy), ("allocator", plan.policy["allocator"])]
        options = [f"options of {what} `{part['name']}`: {_words(part['parameters'])}" for what, part in told]
        lines.append("; ".join(options))
    if plan.heads:
        h = plan.geometry["kv_heads"]
        kinds = ", ".join(f"`{kind}`" for kind in plan.heads)
        lines.append(f"head scores: {kinds}, of {len(plan.stored_shapes())} layers of {h} KV heads each")
    return lines


def _words(options: dict) -> str:
    """Options in words; of a list only how long it is, and nothing of an empty one."""
    lists = {k: f"({len(v)} given)" for k, v in options.items() if isinstance(v, list | tuple)}
    given = {k: lists.get(k, v) for k, v in options.items() if k not in lists or len(v)}
    return ", ".join(f"{k}={v}" for k, v in given.items()) or "none"


def bytes_kept(plan: Plan) -> str:
    """Say in words what is kept of a token, and what the whole cache holds, in bfloat16.

    The cache has the length that the budget was counted for.
    """
    g, latents, at = plan.geometry, plan.bytes_per_token(BFLOAT16), plan.profile.get("at")
    full = 2 * BFLOAT16 * g["kv_heads"] * g["head_dim"] * len(plan.stored_shapes())
    what = "latents keep" if plan.factors else "a token keeps"
    size = f"{latents:.0f}" if plan.token_ranks else f"{latents:.12g}"
    told = f"{what} {size} of {full} bytes per token in bfloat16 ({100 * latents / full:.1f} %)"
    if plan.token_ranks is not None:
        return f"{told}, if all tokens are like the held-out ones"
    if type(at) is not int or at < 1:
        return told
    if plan.policy is not None:
        held = _held(plan, at)
        return told if held is None else f"{told}; a cache of {at} tokens holds {_of_full(plan, at, held)}"
    if (whole := plan.cache_bytes(BFLOAT16, at)).is_uniform:
        return told
    return (
        f"{told}; a cache of {at} tokens, with {plan.sinks} sinks and {whole.recent_tokens} recent tokens "
        f"exact, holds {100 * whole.cache_share(latents):.1f} % of the full cache"
    )


def _of_full(plan: Plan, tokens: int, held: int) -> str:
    full = plan.cache_bytes(BFLOAT16, tokens).full_token_bytes * tokens
    return f"{100 * held / full:.1f} % of the full cache"


def _held(plan: Plan, tokens: int) -> int | None:
    """The bytes of one sequence of so many tokens in bfloat16; None if its budget does not say."""
    try:
        return held_bytes(plan, tokens, BFLOAT16)
    except LowkeyError:
        return None


def bytes_by_length(plan: Plan) -> list[tuple[int, int, float]]:
    """What one sequence takes in the compressed layers, in bfloat16, for the lengths of a list.

    Returns:
        (tokens, bytes, share of the full cache) for each length.
    """
    at = plan.profile.get("at")
    lengths = sorted({*LENGTHS, *([at] if type(at) is int and at > 0 else [])})
    held = {n: _held(plan, n) for n in lengths}
    full = plan.cache_bytes(BFLOAT16, 1).full_token_bytes
    return [(n, size, size / (n * full)) for n, size in held.items() if size is not None]


def plan_card(plan: Plan) -> str:
    """The card of a plan, in Markdown."""
    g, known = plan.geometry, plan.provenance
    version = known.get("versions", {}).get("lowkey")
    axes = "\n".join(f"| {axis} | {kept} |" for axis, kept in axes_kept(plan).items())
    lengths = "\n".join(f"| {n} | {size} | {100 * share:.1f} % |" for n, size, share in bytes_by_length(plan))
    shown = {} if plan.token_ranks else plan.ranks
    ranks = "".join(f"| {i} | {k} | {v} |\n" for i, (k, v) in shown.items())
    table = f"\n| layer | key rank | value rank |\n|---|---|---|\n{ranks}" if ranks else ""
    options = "".join(f"\n{line[0].upper()}{line[1:]}.\n" for line in options_kept(plan))
    most = ", at most (the text decides)" if text_decides(plan) else ""
    origin = (
        f"\nCalibrated on {known.get('tokens')} tokens\n"
        f"(sha256 `{str(known.get('data_sha256'))[:16]}`, seed {known.get('seed')}).\n"
        if plan.factors
        else ""
    )
    return f"""# KV-cache plan for {known.get("model")}

Made by lowkey {version}, budget {plan.budget}.
In {len(plan.stored_shapes())} layers of {g["kv_heads"]} KV heads x {g["head_dim"]}, {bytes_kept(plan)}.

| axis | what is kept |
|---|---|
{axes}
{options}
What one sequence takes in these layers after its prompt, in bfloat16{most}:

| tokens | bytes | of the full cache |
|---|---|---|
{lengths}

```python
lowkey.attach(model)
plan = lowkey.Plan.load("THIS FOLDER", model)
model.generate(**inputs, past_key_values=lowkey.make_cache(model, plan=plan))
```
{table}{origin}"""
