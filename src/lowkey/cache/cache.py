"""`make_cache` and the object that it returns, for `model.generate(past_key_values=...)`."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowkey.cache import cachefile
from lowkey.cache.companion import CompanionCache, checked_small
from lowkey.cache.refusals import check_combination, check_gates, check_gates_model, check_sink_rule
from lowkey.core.options import shown
from lowkey.core.types import LowkeyError, identity_factors
from lowkey.models import families
from lowkey.models.attention_interface import UNCOMPILED, Incoming, attached
from lowkey.models.fingerprint import FillingModel, check_model
from lowkey.plan.plan import Plan, versions
from lowkey.plan.rows import rows_of_heads, stored_shapes_of_layers
from lowkey.policies import policy_from_dict, policy_to_dict
from lowkey.policies.base import Policy
from lowkey.policies.gates import Gates
from lowkey.storage.base import StockLayer, StockSlidingLayer, StoringLayer
from lowkey.storage.bucketed import bucketed_layer
from lowkey.storage.budgets import check_window
from lowkey.storage.cache_wide_eviction import CacheWideEviction
from lowkey.storage.codec import Codec, LowRank, Plain
from lowkey.storage.coded import CodedLayer
from lowkey.storage.compensating import CompensatingLayer
from lowkey.storage.evicting import EvictingLayer
from lowkey.storage.exact import DEFAULT_WINDOW, NO_EXACT_TOKENS, Exact
from lowkey.storage.guided import GuidedLayer
from lowkey.storage.matching import MatchingLayer
from lowkey.storage.mixed import MixedLayer
from lowkey.storage.observed import Observed, ObservedLayer
from lowkey.storage.offloading import OffloadingLayer
from lowkey.storage.packing import Scheme, scheme_or_none
from lowkey.storage.pooling import PoolingLayer
from lowkey.storage.pruning import PruningLayer
from lowkey.storage.rollback import ForwardPass
from lowkey.storage.value_rows import ValueRowsLayer

NO_POLICY = "none"  # keeps all tokens, where a plan says otherwise
EVICTING_LAYERS: dict[str, type[EvictingLayer]] = {
    "evicting": EvictingLayer,
    "compensating": CompensatingLayer,
    "pruning": PruningLayer,
    "mixed": MixedLayer,
    "guided": GuidedLayer,
    "offloading": OffloadingLayer,
    "value-rows": ValueRowsLayer,
    "matching": MatchingLayer,
    "pooling": PoolingLayer,
}
# attributes of layers that never change, so that copies of a cache share them
SHARED_BY_COPIES = (
    *("policy", "rope", "codec", "codecs", "plan_maps", "gate"),
    *("exact", "sink_points", "packing", "rest_packing", "gates"),
)
CountedLayer = StoringLayer | StockLayer | StockSlidingLayer


@dataclass(frozen=True)
class Origin:
    """What a cache was made of, so that it can be saved and made again.

    Args:
        model: a weak reference to the model.
        plan: as `make_cache` took it.
        policy: as `make_cache` took it.
        bits: as `make_cache` took it.
        exact: as `make_cache` took it.
        gates: as `make_cache` took them.
        small: a weak reference to the small model that reads along, or None.
    """

    model: weakref.ReferenceType[PreTrainedModel]
    plan: Plan | None = None
    policy: Policy | None = None
    bits: int | str | None = None
    exact: Exact | None = None
    gates: Gates | None = None
    small: weakref.ReferenceType[PreTrainedModel] | None = None

    @property
    def policy_in_use(self) -> Policy | None:
        """The policy that was given, else the plan's."""
        if self.policy is None and self.plan is not None and self.plan.policy is not None:
            return policy_from_dict(self.plan.policy)
        return self.policy


class LowkeyCache(CompanionCache):
    """A transformers cache that counts its bytes, evicts, and survives failed calls unchanged.

    Args:
        layers: one for each decoder layer.

    Attributes:
        forward_pass: the forward pass under way, to undo it if it fails.
        origin: what the cache was made of; None unless `make_cache` made it.
        filled_by: the model that fills it; None unless `make_cache` made it.
    """

    layers: list[CountedLayer]  # type: ignore[assignment]  # upstream has a list of its own base class
    origin: Origin | None = None
    filled_by: FillingModel | None = None

    def __init__(self, layers: Sequence[CountedLayer]) -> None:
        super().__init__(layers=list(layers))
        self.forward_pass = ForwardPass()
        for layer in self.layers:
            layer.forward_pass = self.forward_pass

    def __deepcopy__(self, memo: dict[int, Any]) -> LowkeyCache:
        """A copy that is independent in all that it holds.

        Maps, policies and the model's rotary embedding, which never change, are shared.
        """
        self.forward_pass.undo()
        self._make_compact()
        memo[id(self.origin)] = self.origin
        # a copy holds what the cache holds, but takes no recorded token back
        memo[id(self.forward_pass.recording)] = None
        for layer in self.layers:
            memo |= {
                id(part): part
                for name in SHARED_BY_COPIES
                if (part := getattr(layer, name, None)) is not None
            }
            # deepcopy refuses tensors that are part of an autograd graph
            memo |= {id(t): t.clone() for t in layer.tensors().values()}
        # an object without __init__, which would make a new forward pass for layers that are no copies yet
        twin = memo[id(self)] = object.__new__(type(self))
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    @torch.compiler.disable(reason=UNCOMPILED)
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """As transformers' own. A forward pass that fails before its last layer is done changes nothing.

        The first layer's call checks that the model which fills the cache did not change.
        """
        layer, first = self.layers[layer_idx], layer_idx == 0 and self.get_seq_length() == 0
        self.forward_pass.begin_layer(layer_idx, layer, layer_idx == len(self.layers) - 1)
        try:
            if layer_idx == 0 and self.filled_by is not None:
                self.filled_by.observe(key_states.shape[2], first)
            stored = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        except BaseException:  # an interrupt from the keyboard, too
            self.forward_pass.undo()
            raise
        # a stock layer is done now; a layer of ours reports when its attention has succeeded
        if not isinstance(stored[0], Incoming):
            self.forward_pass.record(layer, key_states, value_states, None)
            self.forward_pass.end_layer()
        return stored

    @torch.compiler.disable(reason=UNCOMPILED)
    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of tokens seen. A forward pass that has not ended is undone."""
        return super().get_seq_length(layer_idx)

    @torch.compiler.disable(reason=UNCOMPILED)
    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(number of keys that a mask covers, offset of the first)."""
        return super().get_mask_sizes(query_length, layer_idx)

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Several forward passes of which all count or none.

        If anything fails inside the block, the cache is as it was before.
        """
        self.forward_pass.settle()
        self._make_compact()
        layers = [*self.layers, *(self.small.layers if self.small is not None else ())]
        before = [layer.snapshot() for layer in layers]
        try:
            yield
        except BaseException:
            # the snapshots of the pass under way are newer than ours, and so is what was recorded
            self.forward_pass.snapshots.clear()
            self.forward_pass.settle()
            for layer, snapshot in zip(layers, before, strict=True):
                layer.restore(snapshot)
            raise

    def _make_compact(self) -> None:
        """Let every layer give up the room that it made for steps."""
        for layer in self.layers:
            layer.make_compact()

    def nbytes(self) -> int:
        """The bytes that are really held, over all layers, and to undo a forward pass under way.

        Those of a small model's cache are among them; see `small_nbytes`.
        """
        own = sum(layer.nbytes() for layer in self.layers) + self.forward_pass.nbytes(self.layers)
        return own + self.small_nbytes()

    def predicted_nbytes(self) -> int:
        """The bytes that the formulas of the layers give for the tokens seen.

        What is held to undo a forward pass under way is counted and added.
        """
        own = sum(layer.predicted_nbytes() for layer in self.layers) + self.forward_pass.nbytes(self.layers)
        return own + (0 if self.small is None else self.small.predicted_nbytes())

    def reset(self) -> None:
        """Forget all tokens."""
        self.forward_pass.settle()
        super().reset()
        if self.filled_by is not None and (model := self.filled_by.model()) is not None:
            self.filled_by = FillingModel(model)

    def exact_prefill(self, on: bool) -> None:
        """Choose what chunks of several tokens see of themselves from now on.

        Args:
            on: True for their own exact keys, False for what will be stored.
        """
        self.forward_pass.settle()
        for layer in self.layers:
            if isinstance(layer, StoringLayer):
                layer.exact_prefill = on

    @property
    def evicting(self) -> list[EvictingLayer]:
        """The layers that evict tokens."""
        return [layer for layer in self.layers if isinstance(layer, EvictingLayer)]

    def score_only(self, tokens: int, repeated_span: tuple[int, int] | None = None) -> None:
        """Let the last tokens of each chunk score the others and then be forgotten, from now on.

        So a question can choose what is kept, and be asked again over what was kept.

        Args:
            tokens: how many; 0 to store all tokens as usual.
            repeated_span: for a policy that has its context repeated, the part of the sequence that these
                tokens repeat: (first token, the one behind the last), counted from the sequence's first.
        """
        self.forward_pass.settle()
        for layer in self.layers:
            if isinstance(layer, EvictingLayer | StockSlidingLayer):
                layer.score_only_tokens = tokens
            if isinstance(layer, EvictingLayer):
                layer.repeated_span = repeated_span

    def expect(self, tokens: int) -> None:
        """Let evictions leave room in the budget for so many tokens that will come, from now on.

        These are the tokens of a question that will be asked again.
        """
        self.forward_pass.settle()
        for layer in self.evicting:
            layer.expected_tokens = tokens

    def freeze(self, on: bool = True) -> None:
        """Switch eviction off (`on`) or on again."""
        self.forward_pass.settle()
        for layer in self.evicting:
            layer.frozen = on

    def kept_positions(self, layer: int, batch: int = 0) -> list[Tensor]:
        """The positions that a layer holds, without those that a policy's `rest` holds in fewer bits.

        Args:
            layer: index of the layer.
            batch: index of the sequence.

        Returns:
            For each KV head, the positions, ascending.

        Raises:
            LowkeyError: for a layer that evicts nothing.
        """
        own = self.layers[layer]
        if not isinstance(own, EvictingLayer):
            raise LowkeyError(
                f"layer {layer}: keeps every token; give a layer of a cache that was made with a policy"
            )
        self.forward_pass.undo()
        return own.kept_positions(batch)

    def save(self, path: str | Path, force: bool = False) -> None:
        """Save the cache as a folder, in one step.

        The folder holds cache.json, cache.safetensors and the plan if there is one.

        Args:
            path: the folder.
            force: whether to replace another folder that lowkey wrote.

        Raises:
            LowkeyError: if the model is gone or has changed since it filled the cache, every token has a rank
                of its own, a small model reads along, or the folder cannot be written.
        """
        self.forward_pass.undo()
        self._make_compact()
        origin, filled_by = self.origin, self.filled_by
        if origin is None or filled_by is None:
            raise LowkeyError("cache: was not made by make_cache; save one that was")
        if self.small is not None:
            raise LowkeyError(
                "cache: a small model reads along, whose cache is not saved; read the prompt again, or use "
                "another policy"
            )
        if origin.plan is not None:
            origin.plan.check_fixed_ranks("saving a cache")
        fingerprint, model = filled_by.fingerprint(), origin.model()
        about = {
            "model": model.config._name_or_path if model else "",
            "model_sha256": fingerprint,
            "versions": versions(),
            "bits": origin.bits,
            "policy": origin.policy and policy_to_dict(origin.policy),
        }
        cachefile.write_cache(Path(path), self.layers, about, origin, force)


def load_cache(path: str | Path, model: PreTrainedModel) -> LowkeyCache:
    """Load a cache that `save` wrote, ready to go on with the model that filled it.

    Args:
        path: the folder.
        model: the attached model.

    Raises:
        LowkeyError: for another model, a newer format, or a damaged file.
    """
    folder = Path(path)
    about, tensors, plan, gates = cachefile.read_cache(folder)
    check_model("cache", about.get("model"), about["model_sha256"], model, "make it again")
    exact = cachefile.exact_from(folder, about["exact"], tensors)
    policy = policy_from_dict(about["policy"]) if about["policy"] else None
    cache = make_cache(model, plan, policy, bits=about["bits"], exact=exact, gates=gates)
    cachefile.restore_cache(folder, cache.layers, about, tensors, model)
    cache.filled_by = FillingModel(model, about["model_sha256"])
    return cache


def make_cache(
    model: PreTrainedModel,
    plan: Plan | None = None,
    policy: Policy | Literal["none"] | None = None,
    *,
    bits: int | str | None = None,
    exact: Exact | None = None,
    gates: Gates | None = None,
    small: PreTrainedModel | None = None,
) -> LowkeyCache:
    """Make an empty cache for one batch of sequences.

    Without any option it stores keys and values as transformers does, and counts the bytes.

    Args:
        model: an attached model.
        plan: what is stored of this model's keys and values: low rank, integers, a policy, exact tokens. A
            plan that gives every token a rank of its own takes no other option than the prefill mode.
        policy: which tokens each head keeps, alone or on top of a plan and of integers; None for the plan's
            own, `none` to keep all. Heads that share a latent keep the same tokens. The sinks and recent
            tokens that are held exactly are always kept, and count in its budget.
        bits: packs keys and values, or a plan's latents, in integers: 8, 4, 2 or another name of SCHEMES.
            None means what the plan says, `none` no integers.
        exact: overrides the plan's sinks, recent window and prefill mode, and the 4 sinks and 32 recent
            tokens that integers alone come with. Its rule comes from `lowkey.find_sinks`.
        gates: what the policy has learnt of this model, if it needs that; see `lowkey gates`.
        small: an attached model of the same tokenizer that reads along, if the policy needs one. The cache
            holds the small model's cache, too, and a weak reference to the model. Every call then stands in a
            block `with cache.reading(ids):`; `prefill` does so itself.

    Raises:
        LowkeyError: if the model is not attached, the plan is for another model, bits are unknown, or two
            options do not go together.
    """
    if not attached(model):
        raise LowkeyError("model is not attached: call lowkey.attach(model) before make_cache")
    if plan is not None and not isinstance(plan, Plan):
        raise LowkeyError(f"plan {shown(plan)}: give what lowkey.Plan.load(FOLDER, model) returns")
    if plan is not None:
        plan.check(model)
    if isinstance(policy, str):
        if policy != NO_POLICY:
            raise LowkeyError(
                f"policy {shown(policy)}: give an object of lowkey.policies, or {NO_POLICY!r} to keep all "
                "tokens"
            )
        policy, plan = None, plan and replace(plan, policy=None)
    if exact is not None and exact.rule is not None:
        check_sink_rule(model, exact.rule, exact.sinks)
    if gates is not None:
        check_gates_model(model, gates)
    beside = None if small is None else weakref.ref(small)
    cache = cache_from(model, Origin(weakref.ref(model), plan, policy, bits, exact, gates, beside))
    cache.filled_by = FillingModel(model)
    return cache


def cache_from(model: PreTrainedModel, origin: Origin) -> LowkeyCache:
    """Make a cache for a plan that was checked before.

    As `make_cache`, but the model's weights are not read again, and the cache cannot be saved.
    """
    stock = origin == Origin(origin.model)  # neither plan, policy, bits nor exact tokens
    # attention of lowkey.attention stores what other layers of ours would not understand
    if stock and families.stores_own_form(model.config):
        cache = LowkeyCache(layers=[StockLayer() for _ in families.decoder_layers(model)])
    else:
        small = checked_small(model, origin.policy_in_use, origin.small)
        beside = cache_of(small, lambda i: ObservedLayer(origin.policy_in_use)) if small is not None else None
        cache = cache_of(model, _builder(model, origin, beside))
        cache.small, cache.small_model = beside, origin.small
    cache.origin = origin
    return cache


def _builder(
    model: PreTrainedModel, origin: Origin, small: LowkeyCache | None
) -> Callable[[int], CountedLayer]:
    """A function that makes the layer with a given index, for layers with full attention."""
    plan, policy = origin.plan, origin.policy_in_use
    # what the caller says comes first, then what the plan says, then the defaults
    packed = scheme_or_none(plan.bits if plan and origin.bits is None else origin.bits)
    if packed is None and (plan is None or not (plan.factors or plan.sinks or plan.recent)):
        exact = origin.exact or NO_EXACT_TOKENS
    else:
        sinks, recent = (plan.sinks, plan.recent) if plan else (DEFAULT_WINDOW.sinks, DEFAULT_WINDOW.recent)
        exact = origin.exact or Exact(sinks, max(recent, packed.recent if packed else 0))
    if plan is not None and plan.token_ranks is not None:
        wanted = {"policy": policy, "bits": packed, "exact tokens": exact.sinks or exact.recent}
        for name, given in wanted.items():
            if given:
                plan.check_fixed_ranks(name)
        factors, ranks, layout = plan.factors, plan.token_ranks, plan.layout
        return lambda i: bucketed_layer(
            factors[i],
            ranks.levels,
            ranks.gates[i],
            layout,
            families.rope(model, i),
            exact.prefill == "exact",
        )
    packings = (packed.keys, packed.values) if packed else None
    # in layers without points, the first tokens are the sinks
    points = exact.rule.layers if exact.rule else {}
    if policy is None and origin.gates is not None:
        raise LowkeyError(
            f"gates of {origin.gates.method}: no policy reads them; give one, or leave them out"
        )
    if policy is not None:
        check_combination(model, plan, packed, policy)
        check_window(policy, exact)
        policy = policy.with_head_scores(plan.heads if plan else {})
        check_gates(model, policy, origin.gates)
        full = families.geometry(model).compressible
        shared = CacheWideEviction(
            len(full),
            families.sliding_layers(model),
            rows_of_heads(plan) if plan else None,
            stored_shapes_of_layers(plan) if plan else None,
        )
        kind, gates = EVICTING_LAYERS[policy.storing_layer], origin.gates
        observed = None if small is None else Observed.of(small.layers)

        def evicting(i: int) -> EvictingLayer:
            layer = kind(
                policy,
                families.rope(model, i),
                full.index(i),
                shared,
                _codec(model, i, plan, packed),
                exact,
                packings,
                points.get(i),
            )
            if gates is not None:
                layer.gates = gates.layers[full.index(i)]
            if observed is not None:
                layer.observed = observed
            return layer

        return evicting
    if packed is None and origin.exact is None and (plan is None or exact is NO_EXACT_TOKENS):
        return lambda i: StockLayer()
    return lambda i: CodedLayer(_codec(model, i, plan, packed), exact, packings, points.get(i))


def _codec(model: PreTrainedModel, i: int, plan: Plan | None, packed: Scheme | None) -> Codec:
    """The codec of layer `i`. A Hadamard transform is folded into a plan's maps, where it costs nothing."""
    rotated = packed is not None and packed.hadamard_rotated
    rope = families.rope(model, i)
    if plan is not None and plan.factors:
        factors = plan.factors[i]
        return LowRank(factors.hadamard_rotated() if rotated else factors, plan.layout, rope)
    if not rotated:
        return Plain()
    # without a plan, the transform is a low-rank codec of full rank
    factors = identity_factors(families.geometry(model).head_dim)
    return LowRank(factors.hadamard_rotated(), "post_rope", rope)


def cache_of(model: PreTrainedModel, build: Callable[[int], CountedLayer]) -> LowkeyCache:
    """Make a cache with given layers.

    Args:
        model: the model.
        build: makes the layer with a given index, for every layer with full attention. Sliding layers keep
            transformers' form.
    """
    config = model.config.get_text_config()
    full = set(families.geometry(model).compressible)
    count = len(families.layer_types(config))
    return LowkeyCache(
        layers=[build(i) if i in full else StockSlidingLayer(config.sliding_window) for i in range(count)]
    )
