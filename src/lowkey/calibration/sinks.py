"""Attention sinks, predicted from a layer's values (KVSink, arXiv:2508.04257).

The paper finds the layer after which a few tokens have extreme values in a few channels of the residual
stream; the channels are the same in all later layers. In place of the first n tokens, it keeps those exact
whose hidden state is extreme there.

A cache layer sees keys and values, not hidden states, so the read-out here is ours. A hidden state with one
huge channel is normalised to nearly the same vector whatever the token was (arXiv:2603.05498). So the values
of a layer's sinks are nearly one fixed point, and a token is a sink if its values lie in a ball around that
point. A direction with a threshold would not do: the paper finds the values of sinks small, and no half-space
holds what lies in the middle of the others.

Also ours: each layer decides on its own. Layers before the emergence keep the first n tokens. Slots go to the
first sinks that come, not to the most extreme ones, so that what a query sees does not depend on later
tokens.
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
from lowkey.models.projections import projections
from lowkey.probes.layer_inputs import layer_inputs
from lowkey.storage.exact import SinkPoints, SinkRule


def find_sinks(
    model: PreTrainedModel,
    rows: Tensor,
    outlier_factor: float = 100.0,
    batch: int = 4,
    *,
    ratio: float | None = None,
) -> SinkRule | None:
    """Learn the rule for `Exact(sinks=n, rule=...)`, by two passes through the model.

    Args:
        model: the model; it becomes attached.
        rows: token ids (n, t), unpadded.
        outlier_factor: a channel is an outlier if it is this many times the median of the layer's hidden
            state. arXiv:2508.04257 looks for the extreme; 100 is our choice.
        batch: rows per forward pass.
        ratio: deprecated name of `outlier_factor`.

    Returns:
        The rule. None, with a warning that says why, if the model has no such channels (small models have
        none) or if in no layer the values of sinks lie apart.

    Raises:
        LowkeyError: if `outlier_factor` is not above 1.
    """
    if ratio is not None:
        warnings.warn("find_sinks: `ratio` is now `outlier_factor`", DeprecationWarning, stacklevel=2)
        outlier_factor = ratio
    if not outlier_factor > 1:
        raise LowkeyError(
            f"outlier_factor {outlier_factor}: must be above 1, as an outlier exceeds the median; leave it "
            "out for 100"
        )
    attach(model)
    prominence = channel_prominence(model, rows, batch)
    emergence, channels = stable_channels(prominence > outlier_factor)
    layers = _fit(model, rows, batch, channels, outlier_factor) if channels else {}
    if layers:
        return SinkRule(layers, tuple(channels), emergence, model_fingerprint(model))
    if channels:
        why = (
            f"channels {channels} are outliers, but in no layer do the values of such tokens lie apart from "
            "those of the others"
        )
    else:
        layer, channel = divmod(int(prominence.argmax()), prominence.shape[1])
        why = (
            f"the largest channel of the residual stream ({channel}, in the input of layer {layer}) is "
            f"{float(prominence.max()):.1f} times the median, and none is more than {outlier_factor:g} times "
            "in most layers"
        )
    warnings.warn(f"no attention sinks to predict: {why}; use Exact(sinks=n) without a rule", stacklevel=2)
    return None


def locate_sinks(model: PreTrainedModel, rows: Tensor, rule: SinkRule, batch: int = 4) -> dict[int, Tensor]:
    """Return which tokens a rule takes for sinks, by one pass through the model.

    Args:
        model: the model that the rule was learnt from.
        rows: token ids (n, t).
        rule: what `find_sinks` returned.
        batch: rows per forward pass.

    Returns:
        By layer of the rule, (n, t), True for sinks.
    """
    sinks = {}
    for i, hidden in layer_inputs(model, rows, batch):
        if i in rule.layers:
            # (n t, h, d) as a cache layer sees them: (n, h, t, d)
            values = _values(model, i, hidden).unflatten(0, tuple(rows.shape)).transpose(1, 2)
            sinks[i] = rule.layers[i].match(values)
    return sinks


def channel_prominence(model: PreTrainedModel, rows: Tensor, batch: int = 4) -> Tensor:
    """Return (layers, D): each channel's largest absolute value in a layer's inputs, over their median."""
    prominences = []
    for _, hidden in layer_inputs(model, rows, batch):
        size = hidden.abs()
        prominences.append(size.amax((0, 1)) / size.median().clamp_min(torch.finfo(size.dtype).tiny))
    return torch.stack(prominences)


def stable_channels(outliers: Tensor) -> tuple[int, list[int]]:
    """Find the channels that stay outliers in most layers after their first.

    Args:
        outliers: (layers, D), whether a channel is an outlier in a layer's inputs.

    Returns:
        The first layer that has any of them (0 if there are none), and the channels.
    """
    first = outliers.int().argmax(0)  # 0 for channels that never are outliers
    # An outlier in most of the layers from its first one on is stable.
    after = len(outliers) - first
    stable = outliers.sum(0) * 2 > after
    channels = stable.nonzero().flatten().tolist()
    return (int(first[stable].min()) if channels else 0), channels


def _fit(
    model: PreTrainedModel, rows: Tensor, batch: int, channels: list[int], outlier_factor: float
) -> dict[int, SinkPoints]:
    """Return the points of every compressible layer in which sinks can be told by their values."""
    layers = {}
    for i, hidden in layer_inputs(model, rows, batch):
        if i in families.geometry(model).compressible:
            kinds = sink_kinds(hidden.flatten(0, 1), channels, outlier_factor)
            points = fixed_points(_values(model, i, hidden), kinds)
            if points is not None:
                layers[i] = points
    return layers


def sink_kinds(hidden: Tensor, channels: list[int], outlier_factor: float) -> Tensor:
    """Tell for every token whether it is a sink, and of which kind.

    A sink's largest outlier channel exceeds `outlier_factor` times the median of the layer. It also lies more
    than half the way, on a log scale, from what is usual in this layer to the largest of all. A token that is
    more than half the way from the usual to that bound is neither a sink nor an ordinary token. In
    SmolLM2-135M the usual token is at 50 times the median in an outlier channel, and a sink at 14,000 times.

    Args:
        hidden: a layer's inputs (n, D).
        channels: the outlier channels.
        outlier_factor: as in `find_sinks`.

    Returns:
        (n): 1, 2, ... for a sink, by its largest channel and that channel's sign; 0 for an ordinary token; -1
        for one in between.
    """
    outliers = hidden[:, channels]
    # One kind for each channel and sign: the values of other kinds lie at another point.
    largest, which = outliers.abs().max(1)
    positive = outliers.gather(1, which.unsqueeze(1)).squeeze(1) > 0
    times = largest / hidden.abs().median()
    usual = times.median().clamp_min(1.0)
    # The geometric mean is half the way on a log scale.
    bound = (usual * times.max()).sqrt().clamp_min(outlier_factor)
    return torch.where(times > bound, 2 * which + positive + 1, -(times > (usual * bound).sqrt()).int())


@torch.no_grad()
def _values(model: PreTrainedModel, layer: int, hidden: Tensor) -> Tensor:
    """Return the values (n t, h, d) in fp32 of a layer's inputs (n, t, D)."""
    device = device_of(families.decoder_layers(model)[layer])
    inputs = families.attention_input(model, layer, hidden.to(device, model.dtype))
    weights = projections(model, layer)
    values = torch.einsum("nc,hdc->nhd", inputs.float().cpu().flatten(0, 1), weights.v)
    return values if weights.v_bias is None else values + weights.v_bias


def fixed_points(values: Tensor, kinds: Tensor) -> SinkPoints | None:
    """Return the balls in which the values of sinks lie, one for each kind that can be told apart.

    A kind can be told apart if all of its own values are nearer to their mean than any ordinary token's. The
    radius lies halfway between the farthest of its own and the nearest ordinary token.

    Args:
        values: (n, h, d).
        kinds: (n), as `sink_kinds` returns them.

    Returns:
        The points, or None if no kind can be told apart.
    """
    centres, radii = [], []
    ordinary = values[kinds == 0]
    for kind in kinds[kinds > 0].unique() if len(ordinary) else ():
        # Tokens in between (kind -1) take part on neither side.
        own = values[kinds == kind]
        centre = own.mean(0)
        farthest = (own - centre).flatten(1).norm(dim=1).max()
        nearest = (ordinary - centre).flatten(1).norm(dim=1).amin()
        if farthest < nearest:
            centres.append(centre)
            radii.append((farthest + nearest) / 2)
    return SinkPoints(torch.stack(centres), torch.stack(radii)) if centres else None
