"""What a plan says of itself in words: its card, and the bytes that it keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # that module imports this one
    from lowkey.plan.plan import Plan


def bytes_kept(plan: Plan) -> str:
    """Say in words what the latents keep, and what the whole cache holds, in bfloat16.

    The cache has the length that the budget was counted for.
    """
    g, latents, at = plan.geometry, plan.bytes_per_token(2), plan.profile.get("at")
    full = 4 * g["kv_heads"] * g["head_dim"] * len(plan.factors)
    told = f"latents keep {latents:.12g} of {full} bytes per token in bfloat16 ({100 * latents / full:.1f} %)"
    if type(at) is not int or at < 1 or (whole := plan.cache_bytes(2, at)).is_uniform:
        return told
    return (
        f"{told}; a cache of {at} tokens, with {plan.sinks} sinks and {whole.recent_tokens} recent tokens "
        f"exact, holds {100 * whole.cache_share(latents):.1f} % of the full cache"
    )


def plan_card(plan: Plan) -> str:
    """The card of a plan, in Markdown."""
    g, known = plan.geometry, plan.provenance
    rows = "\n".join(f"| {i} | {k} | {v} |" for i, (k, v) in plan.ranks.items())
    version = known.get("versions", {}).get("lowkey")
    return f"""# KV-cache plan for {known.get("model")}

Made by lowkey {version}: method `{plan.method["name"]}`, allocator `{plan.allocator["name"]}`,
layout `{plan.layout}`, latents in {plan.bits or "the model's own numbers"}, budget {plan.budget}.
In {len(plan.factors)} layers of {g["kv_heads"]} KV heads x {g["head_dim"]} its {bytes_kept(plan)}.

```python
lowkey.attach(model)
plan = lowkey.Plan.load("THIS FOLDER", model)
model.generate(**inputs, past_key_values=lowkey.make_cache(model, plan=plan))
```

| layer | key rank | value rank |
|---|---|---|
{rows}

Calibrated on {known.get("tokens")} tokens
(sha256 `{str(known.get("data_sha256"))[:16]}`, seed {known.get("seed")}).
"""
