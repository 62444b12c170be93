"""Where attention sinks are, before anything attends to them: KVSink (arXiv:2508.04257), read from the values
of a layer.

The paper finds the layer after which a few tokens have extreme values in a few channels of the residual
stream, the same channels in all later layers, and keeps exact, in place of the first n tokens, those whose
hidden state there is extreme. A cache layer sees keys and values, not hidden states. The read-out is
therefore our own: a hidden state with one huge channel is normed to nearly the same vector whatever the token
was (arXiv:2603.05498), so the values of a layer's sinks are nearly one fixed point, and a token is a sink
when its values lie in a ball around it. Not a direction and a threshold: the paper finds the values of sinks
small, and no half-space holds what lies in the middle of the others. Ours, too: each layer decides by itself;
layers before the emergence keep the first n; and slots go to the first sinks that come, not to the most
extreme ones, so that what a query sees does not depend on what comes later.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowkey.core.types import LowkeyError, device_of
from lowkey.models import families
from lowkey.models.attention_interface import attach
from lowkey.models.fingerprint import model_fingerprint
from lowkey.probes.layer_inputs import layer_inputs
from lowkey.storage.exact import SinkPoints, SinkRule


def find_sinks(model: PreTrainedModel, rows: Tensor, ratio: float = 100.0, batch: int = 4) -> SinkRule | None:
    """The rule for `Exact(sinks=n, rule=...)`, learnt from the token ids `rows` (n, t), unpadded, by two
    passes through the model.

    ratio: a channel is an outlier where it is so many times the median of the layer's hidden state
    (arXiv:2508.04257 looks for the extreme; 100 is our choice). Returns None, with a warning that says why,
    when the model has no such channels (small models have none), or when in no layer the values of sinks lie
    apart. Errors: LowkeyError for a ratio that is none.
    """
    if not ratio > 1:
        raise LowkeyError(f"ratio {ratio}: an outlier is larger than the median; leave it out for 100")
    attach(model)
    table = channel_prominence(model, rows, batch)
    emergence, channels = stable_channels(table > ratio)
    layers = _fit(model, rows, batch, channels, ratio) if channels else {}
    if layers:
        return SinkRule(layers, tuple(channels), emergence, model_fingerprint(model))
    why = f"channels {channels} are outliers, but in no layer do the values of such tokens lie apart from those of the others"
    warnings.warn(
        f"no attention sinks to predict: {why if channels else _told(table, ratio)}; use Exact(sinks=n) "
        "without a rule",
        stacklevel=2,
    )
    return None


def locate_sinks(model: PreTrainedModel, rows: Tensor, rule: SinkRule, batch: int = 4) -> dict[int, Tensor]:
    """By layer of the rule, which tokens of the ids `rows` (n, t) it takes for sinks, (n, t); by one pass
    through the model.
    """
    found = {}
    for i, hidden in layer_inputs(model, rows, batch):
        if i in rule.layers:
            values = _values(model, i, hidden).unflatten(0, tuple(rows.shape)).transpose(1, 2)
            found[i] = rule.layers[i].match(values)
    return found


def _told(table: Tensor, ratio: float) -> str:
    layer, channel = divmod(int(table.argmax()), table.shape[1])
    most = f"the largest channel of the residual stream ({channel}, in the input of layer {layer})"
    return f"{most} is {float(table.max()):.1f} times the median, and none is more than {ratio:g} times in most layers"


def channel_prominence(model: PreTrainedModel, rows: Tensor, batch: int = 4) -> Tensor:
    """(layers, D): how many times the median of a layer's inputs the largest of each channel is."""
    largest = []
    for _, hidden in layer_inputs(model, rows, batch):
        size = hidden.abs()
        largest.append(size.amax((0, 1)) / size.median().clamp_min(torch.finfo(size.dtype).tiny))
    return torch.stack(largest)


def stable_channels(outliers: Tensor) -> tuple[int, list[int]]:
    """From outliers (layers, D): the first layer with, and all of, the channels that stay outliers in most
    layers after their first.
    """
    first = outliers.int().argmax(0)  # 0 for channels that never are
    after = len(outliers) - first
    stable = outliers.sum(0) * 2 > after
    channels = stable.nonzero().flatten().tolist()
    return (int(first[stable].min()) if channels else 0), channels


def _fit(
    model: PreTrainedModel, rows: Tensor, batch: int, channels: list[int], ratio: float
) -> dict[int, SinkPoints]:
    """The points of every compressible layer in which sinks show in the values."""
    found = {}
    for i, hidden in layer_inputs(model, rows, batch):
        if i in families.geometry(model).compressible:
            kinds = sink_kinds(hidden.flatten(0, 1), channels, ratio)
            points = fixed_points(_values(model, i, hidden), kinds)
            if points is not None:
                found[i] = points
    return found


def sink_kinds(hidden: Tensor, channels: list[int], ratio: float) -> Tensor:
    """(n): for hidden states (n, D) which of the channels is the largest and with which sign, as 1, 2, ...; 0
    for what is no sink, and -1 for what lies between.

    A sink stands out by more than the ratio, and by more than half the way, by the logarithm, from what is
    usual in this layer to the largest of all; what lies more than half the way from the usual to that lies
    between. In SmolLM2-135M the usual token is at 50 times the median in an outlier channel, a sink at 14,000
    times."""
    own = hidden[:, channels]
    largest, which = own.abs().max(1)
    positive = own.gather(1, which.unsqueeze(1)).squeeze(1) > 0
    times = largest / hidden.abs().median()
    usual = times.median().clamp_min(1.0)
    least = (usual * times.max()).sqrt().clamp_min(ratio)
    return torch.where(times > least, 2 * which + positive + 1, -(times > (usual * least).sqrt()).int())


@torch.no_grad()
def _values(model: PreTrainedModel, layer: int, hidden: Tensor) -> Tensor:
    """(n t, h, d) in fp32 of a layer's inputs (n, t, D)."""
    device = device_of(families.decoder_layers(model)[layer])
    inputs = (
        families.attention_input(model, layer, hidden.to(device, model.dtype)).float().cpu().flatten(0, 1)
    )
    weights = families.projections(model, layer)
    values = torch.einsum("nc,hdc->nhd", inputs, weights.v)
    return values if weights.v_bias is None else values + weights.v_bias


def fixed_points(values: Tensor, kinds: Tensor) -> SinkPoints | None:
    """The mean of the values (n, h, d) of each kind of sink that no other token comes as near to as all of
    its own do; the radius of its ball lies halfway between the farthest of its own and the nearest other."""
    centres, radius = [], []
    others = values[kinds == 0]
    for kind in kinds[kinds > 0].unique() if len(others) else ():
        own = values[kinds == kind]
        centre = own.mean(0)
        spread, nearest = (
            (own - centre).flatten(1).norm(dim=1).max(),
            (others - centre).flatten(1).norm(dim=1).amin(),
        )
        if spread < nearest:
            centres.append(centre)
            radius.append((spread + nearest) / 2)
    return SinkPoints(torch.stack(centres), torch.stack(radius)) if centres else None
