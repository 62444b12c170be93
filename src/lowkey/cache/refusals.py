"""What no cache can be made of."""

from __future__ import annotations

from transformers import PreTrainedModel

from lowkey.core.types import LowkeyError
from lowkey.models import families
from lowkey.models.attention_interface import attached
from lowkey.models.fingerprint import check_model
from lowkey.plan.plan import Plan
from lowkey.policies import policy_name
from lowkey.policies.base import Policy
from lowkey.policies.gates import Gates
from lowkey.storage.exact import SinkRule
from lowkey.storage.packing import Scheme, scheme


def check_combination(
    model: PreTrainedModel, plan: Plan | None, packed: Scheme | None, policy: Policy
) -> None:
    """Refuse what a policy cannot work with.

    Args:
        model: the model.
        plan: what is stored of it, or None.
        packed: the packing in integers, or None.
        policy: the policy.

    Raises:
        LowkeyError: for a plan, integers or a model that the policy cannot work with.
    """
    name = policy_name(policy)
    if policy.needs_whole_keys and (packed or (plan and plan.factors)):
        what = "packing in integers" if packed else f"plan of method {plan and plan.method['name']!r}"
        raise LowkeyError(
            f"policy {name!r} {policy.needs_whole_keys}, and a {what} stores keys in another form; use it "
            "alone, or another policy"
        )
    if policy.rest != "drop" and packed is not None and scheme(policy.rest).bits >= packed.bits:
        raise LowkeyError(
            f"rest {policy.rest!r} of policy {name!r}: kept tokens are packed in {packed.bits} bits, and the "
            "others must take fewer; give more bits, or another rest"
        )
    if plan and not all(f.rebuilds_keys for f in plan.factors.values()):
        raise LowkeyError(
            f"plan of method {plan.method['name']!r} rotates keys by frequencies of its own, from which the "
            f"keys that policy {name!r} scores cannot be rebuilt; use another plan, or no policy"
        )
    if plan and len({f.merge for f in plan.factors.values()}) > 1:
        raise LowkeyError(
            f"plan of method {plan.method['name']!r} merges different numbers of heads in different layers, "
            "between which a policy cannot share a budget; use another plan, or no policy"
        )
    if policy.uses_rotations and (kind := families.length_dependent_rope(model)):
        raise LowkeyError(
            f"policy {type(policy).__name__}: rope_type {kind!r} changes its frequencies with the length; "
            "use another policy"
        )


def check_sink_rule(model: PreTrainedModel, rule: SinkRule, sinks: int) -> None:
    """Refuse a sink rule that was not learnt from this model, or that finds room for no sink.

    Args:
        model: the model.
        rule: the rule.
        sinks: slots for sinks.

    Raises:
        LowkeyError: for such a rule.
    """
    if sinks < 1:
        raise LowkeyError(
            f"exact: a sink rule with sinks={sinks} keeps nothing; give Exact(sinks=4, rule=...)"
        )
    check_model(
        "exact: the sink rule",
        "?",
        rule.model_sha256,
        model,
        "call lowkey.calibration.sinks.find_sinks with this one",
    )
    shape = families.geometry(model)
    if not all(
        p.centres.shape == (len(p.radius), shape.kv_heads, shape.head_dim) for p in rule.layers.values()
    ):
        raise LowkeyError(
            "exact: the points of the sink rule do not fit the heads of this model; call "
            "lowkey.calibration.sinks.find_sinks again"
        )


def check_gates(model: PreTrainedModel, policy: Policy, gates: Gates | None) -> None:
    """Refuse gates that are missing, of another policy, or of another shape than the model's layers.

    Args:
        model: the model.
        policy: the policy.
        gates: what it has learnt, or None.

    Raises:
        LowkeyError: for such gates.
    """
    name = policy_name(policy)
    if gates is None:
        if policy.learns:
            raise LowkeyError(
                f"policy {name!r} needs what it learns of a model: run `lowkey gates "
                f"{model.config._name_or_path or 'MODEL'} OUT --method {policy.learns}` and give it as gates "
                "(--gates OUT)"
            )
        return
    if gates.method != policy.learns:
        reads = f"those of {policy.learns!r}" if policy.learns else "none"
        raise LowkeyError(f"gates of {gates.method!r}: policy {name!r} reads {reads}; give these, or none")
    wanted = policy.gate_shapes(*families.head_sizes(model))
    gates.check_shapes(wanted, len(families.geometry(model).compressible))


def check_gates_model(model: PreTrainedModel, gates: Gates) -> None:
    """Refuse gates of another model. Raises: LowkeyError."""
    again = f"run `lowkey gates {model.config._name_or_path or 'MODEL'} OUT --method {gates.method}`"
    check_model("folder of gates", gates.model, gates.model_sha256, model, again)


def check_small(model: PreTrainedModel, policy: Policy | None, small: PreTrainedModel | None) -> None:
    """Refuse a small model that is missing, that nobody reads, or that cannot read what the model reads.

    Args:
        model: the model.
        policy: the policy, or None.
        small: the small model, or None.

    Raises:
        LowkeyError: for such a model.
    """
    needed = policy is not None and policy.reads_along
    if small is None:
        if policy is not None and needed:
            raise LowkeyError(
                f"policy {policy_name(policy)!r} needs a small model of the same tokenizer that reads along: "
                "give make_cache(small=MODEL) (--small-model MODEL)"
            )
        return
    name = small.config._name_or_path or type(small).__name__
    if not needed:
        raise LowkeyError(
            f"small {name!r}: no policy lets it read along; give one that does, or leave it out"
        )
    if not attached(small):
        raise LowkeyError(f"small {name!r} is not attached: call lowkey.attach(small) before make_cache")
    if families.stores_own_form(small.config):
        raise LowkeyError(f"small {name!r}: its attention cannot be read along; give a plain decoder")
    own, other = (m.config.get_text_config().vocab_size for m in (model, small))
    if own != other:
        raise LowkeyError(
            f"small {name!r}: has {other} tokens and the model {own}, so their tokenizers differ; give a "
            "model of the same tokenizer"
        )
