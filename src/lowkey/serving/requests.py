"""What is asked of an engine, and what it must refuse: in one line, before it serves anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from lowkey.core.options import check_names, shown
from lowkey.core.types import LowkeyError
from lowkey.models import families
from lowkey.models.fingerprint import check_fingerprint, checkpoint_fingerprint
from lowkey.plan.plan import Plan
from lowkey.serving.engine import EXACT_CHOICES, KERNEL_CHOICES


@dataclass(frozen=True)
class PlanRequest:
    """What `additional_config["lowkey"]` of an engine says.

    Args:
        plan: the folder of a plan; None to store keys and values as the model makes them.
        kernel: `auto` for each layer whatever takes less memory; `own` for our own attention in all layers.
        exact: `plan`: the exact tokens that the plan asks for; `none`: no token is kept exactly, whatever the
            plan says.
    """

    plan: Path | None = None
    kernel: str = "auto"
    exact: str = "plan"

    @classmethod
    def read(cls, given: object) -> PlanRequest:
        """Read it from what a user wrote as JSON. Raises: LowkeyError for anything else than these fields."""
        if given is None:
            return cls()
        if not isinstance(given, Mapping):
            raise LowkeyError(f"lowkey {shown(given)}: give an object, like {{'plan': 'FOLDER'}}")
        check_names("lowkey", given, ["plan", "kernel", "exact"])
        values: dict[str, Any] = dict(given)
        if not isinstance(values.get("plan", ""), str):
            raise LowkeyError(f"plan {shown(values['plan'])}: give the folder that lowkey compress wrote")
        if values.get("plan"):
            values["plan"] = Path(values["plan"])
        for name, known in (("kernel", KERNEL_CHOICES), ("exact", EXACT_CHOICES)):
            if values.get(name, known[0]) not in known:
                raise LowkeyError(
                    f"{name} {shown(values[name])} is unknown; choose one of {', '.join(known)}"
                )
        return cls(**values)


def check_engine(cache_dtype: str, tensor_parallel: int, speculative: bool) -> None:
    """Refuse settings of an engine under which a plan cannot be served, or could give wrong text.

    Args:
        cache_dtype: of the engine's cache; `auto` for the model's.
        tensor_parallel: over how many devices each layer is spread.
        speculative: whether another model drafts.

    Raises:
        LowkeyError: for such settings.
    """
    if tensor_parallel != 1:
        raise LowkeyError(
            f"tensor parallel size {tensor_parallel}: latents of several heads cannot be spread over "
            "devices; give 1, and use pipeline or data parallelism"
        )
    if speculative:
        raise LowkeyError("speculative decoding with a plan: is not supported; leave it out")
    if cache_dtype not in ("auto", "float16", "bfloat16", "float32") and not cache_dtype.startswith("fp8"):
        raise LowkeyError(
            f"KV cache dtype {shown(cache_dtype)} with a plan: is not supported; give auto or fp8"
        )


def check_own_engine(
    config: PreTrainedConfig, cache_dtype: str, tensor_parallel: int, pipeline_parallel: int
) -> None:
    """Refuse settings of an engine under which one of our own models cannot be served.

    Args:
        config: of the model.
        cache_dtype: of the engine's cache; `auto` for the model's.
        tensor_parallel: over how many devices each layer is spread.
        pipeline_parallel: over how many devices layers are spread.

    Raises:
        LowkeyError: for such settings.
    """
    if tensor_parallel != 1 or pipeline_parallel != 1:
        raise LowkeyError("model of our own: is served on one device; use data parallelism for more")
    if cache_dtype != "auto":
        raise LowkeyError(
            f"KV cache dtype {shown(cache_dtype)}: our own models store in the model's dtype; give auto"
        )
    kind = families.rope_parameters(config).get("rope_type", "default")
    if kind in families.LENGTH_DEPENDENT_ROPE:
        raise LowkeyError(
            f"model with rope_type {kind!r}: its frequencies follow the length, which is not served"
        )


def check_cache_dtype(cache_dtype: str, names: set[str]) -> None:
    """Refuse 8-bit floats in layers that our own attention reads.

    Args:
        cache_dtype: of the engine's cache.
        names: the routes of all layers.

    Raises:
        LowkeyError: for such layers.
    """
    if cache_dtype.startswith("fp8") and (ours := names & {"latent", "windowed"}):
        raise LowkeyError(
            f"KV cache dtype {shown(cache_dtype)}: layers on the {min(ours)} route cannot be read from it; "
            "give auto, and pack the latents in integers instead (lowkey compress --bits int8)"
        )


def served_plan(request: PlanRequest, folder: Path, config: PreTrainedConfig) -> Plan | None:
    """Load the plan of a request and check that it can be served with this model.

    Args:
        request: what was asked.
        folder: of the model's checkpoint.
        config: of the model, as transformers reads it.

    Returns:
        The plan, with the exact tokens that are wanted; None if no plan was asked for.

    Raises:
        LowkeyError: for a plan of another model or of a form that no engine holds yet.
    """
    if request.plan is None:
        return None
    plan = Plan.load(request.plan)
    name = f"plan {str(request.plan)!r}"
    check_model_served(config)
    plan.check_fixed_ranks("serving")
    if plan.policy is not None:
        raise LowkeyError(
            f"{name}: drops tokens by policy {plan.policy['name']!r}, and engines cannot free single tokens "
            "of a page; serve a plan of ranks and bits, or use lowkey generate"
        )
    known = plan.provenance
    check_fingerprint(
        "plan",
        known.get("model", "?"),
        known.get("model_sha256"),
        checkpoint_fingerprint(folder, config),
        "compress this model anew",
    )
    if plan.factors and plan.layout == "pre_rope":
        kind = families.rope_parameters(config).get("rope_type", "default")
        if kind in families.LENGTH_DEPENDENT_ROPE:
            raise LowkeyError(
                f"{name}: stores keys before rotation, and rope_type {kind!r} follows the length"
            )
    return plan if request.exact == "plan" else replace(plan, sinks=0, recent=0)


def check_model_served(config: PreTrainedConfig) -> None:
    """Refuse a model whose layers an engine cannot store by a plan. Raises: LowkeyError."""
    families.family(config)
    inner = config.get_text_config()
    shape = families.configured_geometry(config)
    if len(shape.compressible) < shape.layers:
        raise LowkeyError(
            f"model of family {inner.model_type!r}: has layers with a sliding window, which are not served "
            "with a plan yet; serve it without one"
        )
    if inner.model_type not in families.SERVED and families.plain_architecture(config) is None:
        raise LowkeyError(
            f"model of family {inner.model_type!r}: is not served with a plan yet; families that are: "
            f"{', '.join(families.SERVED)}"
        )
