"""`make_cache`: the cache object that one passes to `model.generate(past_key_values=...)`."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from lowkey import families
from lowkey.layers.base import StockLayer, StockSlidingLayer, StoringLayer
from lowkey.layers.lowrank import Exact, LowRankLayer
from lowkey.layers.quantized import QuantizedLayer
from lowkey.plan import Plan
from lowkey.seam import attached
from lowkey.types import LowkeyError

CountedLayer = StoringLayer | StockLayer | StockSlidingLayer


class LowkeyCache(Cache):
    """A transformers cache whose layers know what they hold."""

    layers: list[CountedLayer]  # type: ignore[assignment]

    def nbytes(self) -> int:
        """Bytes of the storages really held, over all layers."""
        return sum(layer.nbytes() for layer in self.layers)

    def predicted_nbytes(self) -> int:
        """Bytes that the formula of each layer gives for the tokens seen."""
        return sum(layer.predicted_nbytes() for layer in self.layers)

    def exact_prefill(self, on: bool) -> None:
        """From now on, let chunks of several tokens see their own keys exactly (`on`) or as they will be stored."""
        for layer in self.layers:
            if isinstance(layer, StoringLayer):
                layer.exact_prefill = on


def make_cache(model: PreTrainedModel, plan: Plan | None = None, *, bits: int | None = None, exact: Exact | None = None) -> LowkeyCache:
    """A fresh cache for one batch of sequences.

    plan: low rank as calibrated. bits: 4 or 8, every key and value in packed integers (not together with a plan yet).
    exact: overrides the plan's sinks, recent window and prefill mode. All None: transformers' own storage, counted.
    Errors: LowkeyError when the model is not attached, the plan is another model's, or bits are not 4 or 8.
    """
    if not attached(model):
        raise LowkeyError("model is not attached: call lowkey.attach(model) before make_cache")
    if plan is not None and bits is not None:
        raise LowkeyError(f"bits={bits} together with a plan is not supported yet; give one of them")
    if bits not in (None, 4, 8):
        raise LowkeyError(f"bits={bits}: packed storage has 4 or 8 bits")
    if plan is not None:
        plan.check(model)
        return planned_cache(model, plan, exact)
    return cache_of(model, lambda i: StockLayer() if bits is None else QuantizedLayer(bits))


def planned_cache(model: PreTrainedModel, plan: Plan, exact: Exact | None = None) -> LowkeyCache:
    """As `make_cache` with a plan that was checked before: the model's weights are not looked at again."""
    keep = exact or Exact(plan.sinks, plan.recent)
    return cache_of(model, lambda i: LowRankLayer(plan.factors[i], plan.layout, families.rope(model, i), keep))


def cache_of(model: PreTrainedModel, build: Callable[[int], CountedLayer]) -> LowkeyCache:
    """`build(i)` for every layer with full attention; sliding layers keep their stock form."""
    config = model.config.get_text_config()
    full = set(families.geometry(model).compressible)
    count = len(families.layer_types(config))
    return LowkeyCache(layers=[build(i) if i in full else StockSlidingLayer(config.sliding_window) for i in range(count)])
