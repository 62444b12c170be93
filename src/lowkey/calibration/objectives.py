"""What `recover` trains a model on: the model as it runs through its compressed cache, and its losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from lowkey.cache.cache import cache_of
from lowkey.calibration.trainable import TrainableModel
from lowkey.core.types import Factors
from lowkey.models import families
from lowkey.plan.plan import Plan
from lowkey.probes import model_probe
from lowkey.probes.layer_probe import LowRankReconstruction, OneLayerCache
from lowkey.storage.codec import LowRank
from lowkey.storage.coded import CodedLayer
from lowkey.storage.exact import Exact
from lowkey.storage.reconstruction import ReconstructionLayer


@dataclass
class Student:
    """A model in training, as it runs through its compressed cache and as it was before.

    Args:
        trainable: the copy of the model, with what is trained of it.
        plan: how the cache is compressed.
        factors: the plan's maps by layer, on the devices of the layers, trained or not.
        temperature: logits are divided by it in the objective `kl`.
    """

    trainable: TrainableModel
    plan: Plan
    factors: dict[int, Factors]
    temperature: float = 1.0

    @property
    def model(self) -> PreTrainedModel:
        """The copy of the model."""
        return self.trainable.model

    def layer(self, i: int) -> ReconstructionLayer | CodedLayer:
        """Return a new differentiable cache layer for decoder layer i, with the plan's exact tokens."""
        factors, layout, rope = self.factors[i], self.plan.layout, families.rope(self.model, i)
        exact = Exact(self.plan.sinks, self.plan.recent)
        if not factors.rebuilds_keys:
            # Keys that rotate at frequencies of their own cannot be given back, only attended to.
            return CodedLayer(LowRank(factors, layout, rope), exact)
        return ReconstructionLayer(LowRankReconstruction(factors, layout, rope), exact)

    def logits(self, ids: Tensor) -> Tensor:
        """Return logits (b, t, V) in fp32 of ids (b, t), every layer compressed."""
        cache = cache_of(self.model, self.layer)
        return self.model(ids, past_key_values=cache, use_cache=True).logits.float()


def distillation_loss(student: Student, ids: Tensor) -> Iterator[Tensor]:
    """Yield, for every compressed layer, ||f~(x) - f(x)||^2 / ||f(x)||^2 over the number of layers.

    f is the original layer, f~ the compressed one, and x the original model's input of the layer.

    Source: arXiv:2507.11273, Eq. 7, stage I.

    Args:
        student: the model in training.
        ids: token ids (b, t).
    """
    layers = families.decoder_layers(student.model)
    last = len(layers) - 1
    with student.trainable.original() as model:
        states = model(ids, use_cache=False, output_hidden_states=True, logits_to_keep=1).hidden_states
        # The last hidden state that a model returns is normalised, so the last layer runs once more.
        end = families.run_layer(model, last, layers[last], states[last], None)
    outputs = [*states[1 : last + 1], end]
    for i in student.factors:
        cache = OneLayerCache(student.layer(i))
        compressed = families.run_layer(student.model, i, layers[i], states[i], cache)
        target = outputs[i].float()
        error = (compressed.float() - target).square().sum() / target.square().sum()
        yield error / len(student.factors)


def cross_entropy_loss(student: Student, ids: Tensor) -> Iterator[Tensor]:
    """Yield the next-token cross-entropy in nats of ids (b, t), every layer compressed."""
    yield model_probe.next_token_loss(student.logits(ids), ids)


def divergence_loss(student: Student, ids: Tensor) -> Iterator[Tensor]:
    """Yield KL(original || compressed) per token of ids (b, t), in nats, at the student's temperature."""
    with student.trainable.original() as model:
        target = model(ids, use_cache=False).logits
    yield model_probe.kl_divergence(student.logits(ids), target, student.temperature)


# An objective yields the parts of a loss, whose sum is the loss. Each part is differentiated before the next
# one is formed, so that only one layer's activations are in memory.
OBJECTIVES: dict[str, Callable[[Student, Tensor], Iterator[Tensor]]] = {
    "distill": distillation_loss,
    "ce": cross_entropy_loss,
    "kl": divergence_loss,
}
