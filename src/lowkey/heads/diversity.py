"""How different the heads of a layer are: by their weights, and by where they attend.

Head i matches tokens by A_i = W_Q^i (W_K^i)^T and moves what it finds by W_V^i W_O^i. Both are D x D
operators of rank d at most. The paper (arXiv:2601.11471, head-diversity analysis) takes cosines of the A_i
under the Frobenius inner product, and counts heads by the effective rank of their Gram matrix and of the
centred Gram matrix, each divided by H.

Where we differ:

- V-O operators are measured too.
- The centred number is divided by H - 1, the highest rank that a centred Gram matrix of H heads can have.
  Divided by H, as in the paper, it cannot pass 83 % for 6 heads; that number is given too.
- Every number is given for random initialisations of the same configuration. Random heads come close to the
  ceiling, those of multi-query attention too, so a number says little without them.
- The Jensen-Shannon divergence of attention maps is measured, which depends on inputs where weights do not.

The numbers do not change under W_Q R, W_K R^-T for any invertible R, and neither does a layer without rotary
embeddings and QK-norm. With rotary embeddings only rotations and scalings within each pair of rotated
dimensions leave a layer unchanged; with QK-norm only orthogonal R do. Such a layer is measured at distance 0
and without the division of the norm: layers of different function may have equal numbers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from lowkey.attention import register
from lowkey.attention.base import HeadMaps
from lowkey.core import text
from lowkey.core.options import Checked, option
from lowkey.core.progress import Progress, silent
from lowkey.core.types import device_of
from lowkey.models import families
from lowkey.models.projections import head_maps

DIVERSITY_FORMAT = 1
LEAST_VARIANCE = 1e-10  # variance per head below which heads are the same: fp64 leaves 1e-15
MEASURES = (("qk", "uncentred"), ("qk", "centred"), ("vo", "uncentred"), ("vo", "centred"))


# -- from weights


def operator_cosines(left: Tensor, right: Tensor) -> Tensor:
    """Cosines of operators under the Frobenius inner product.

    Args:
        left: (H, d, D).
        right: (H, d, D). Operator i is left[i]^T right[i], which is D x D.

    Returns:
        Cosines (H, H) in fp64. An operator that is zero has cosine 0, with itself too.
    """
    left, right = left.double(), right.double()
    # <A_i, A_j> = tr(A_i^T A_j) is the sum over the elementwise product of left_i left_j^T and
    # right_i right_j^T, both (d, d), so that no D x D matrix is formed.
    inner = torch.stack(
        [torch.einsum("hab,hab->h", a @ left.mT, b @ right.mT) for a, b in zip(left, right, strict=True)]
    )
    norms = inner.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(norms > 0, 1 / norms, 0.0)
    return inner * inverse.outer(inverse)


def centred(gram: Tensor) -> Tensor:
    """The Gram matrix of operators less their mean: J G J with J = I - 1/H."""
    return gram - gram.mean(0, keepdim=True) - gram.mean(1, keepdim=True) + gram.mean()


def effective_rank(gram: Tensor) -> float:
    """Effective rank of a Gram matrix: exp of the entropy of its eigenvalues, normalised to sum 1.

    Returns:
        A number from 1 to H; 1 if all eigenvalues are zero up to rounding, as those of the variance of equal
        heads.
    """
    energies = torch.linalg.eigvalsh(gram.double()).clamp(min=0)
    # What rounding leaves has a spectrum too, and it is a flat one.
    if float(energies.sum()) <= LEAST_VARIANCE * len(gram):
        return 1.0
    return float(torch.special.entr(energies / energies.sum()).sum().exp())


def circuit(left: Tensor, right: Tensor) -> dict:
    """The diversity of one kind of operator in a layer.

    Args:
        left: (H, d, D).
        right: (H, d, D).

    Returns:
        `uncentred`: effective rank / H. `centred`: effective rank of the centred Gram matrix / (H - 1).
        `centred_of_heads`: the same / H, as in the paper. `mean_cosine`: mean over pairs. `cosines`: (H, H).
        All but the cosines lie in [0, 1]. None stands for what has no meaning: centred numbers of one head,
        and numbers of zero operators (output projections that start at zero).
    """
    gram = operator_cosines(left, right)
    heads = len(gram)
    measures: dict = {
        "uncentred": None,
        "centred": None,
        "centred_of_heads": None,
        "mean_cosine": None,
        "cosines": gram.tolist(),
    }
    if not gram.any():
        return measures
    measures["uncentred"] = effective_rank(gram) / heads
    if heads > 1:
        centred_rank = effective_rank(centred(gram))
        measures |= {
            "centred": centred_rank / (heads - 1),
            "centred_of_heads": centred_rank / heads,
            "mean_cosine": float(gram.sum() - gram.diagonal().sum()) / (heads * (heads - 1)),
        }
    return measures


def shared_and_residual(maps: Tensor, residual: Tensor) -> dict:
    """Compare the two parts of maps that are a shared part plus a residual.

    The decomposition is not unique: what moves between the parts changes these numbers, but not the model.

    Args:
        maps: (H, d, D), the sum of both parts.
        residual: (H, d, D).

    Returns:
        Means over heads: Frobenius norms of both parts, their quotient (None if a residual is zero), and the
        cosine between them.
    """
    shared, residual = (maps - residual).double().flatten(1), residual.double().flatten(1)
    own, low = shared.norm(dim=1), residual.norm(dim=1)
    cosine = torch.nn.functional.cosine_similarity(shared, residual, dim=1)
    over = float((own / low).mean()) if bool((low > 0).all()) else None
    return {
        "shared_norm": float(own.mean()),
        "residual_norm": float(low.mean()),
        "shared_over_residual": over,
        "cosine": float(cosine.mean()),
        "cosines": cosine.tolist(),
    }


@torch.no_grad()
def of_maps(maps: HeadMaps) -> dict:
    """The diversity of one layer, by its weights.

    Args:
        maps: the layer's weights per head.

    Returns:
        `qk` and `vo` as `circuit` gives them; `key_slice`: the same for the part of the queries that meets a
        key slice shared by all heads, or None; `residual`: what `shared_and_residual` gives for keys and for
        values, or None.
    """
    width = maps.k.shape[1]
    measures: dict = {
        "qk": circuit(maps.q[:, :width], maps.k),
        "vo": circuit(maps.v, maps.o.mT),
        "key_slice": None,
        "residual": None,
    }
    if maps.key_slice is not None:
        shared = maps.key_slice.expand(len(maps.q), -1, -1)
        measures["key_slice"] = circuit(maps.q[:, -shared.shape[1] :], shared)
    if maps.k_residual is not None and maps.v_residual is not None:
        keys, values = (
            shared_and_residual(maps.k, maps.k_residual),
            shared_and_residual(maps.v, maps.v_residual),
        )
        measures["residual"] = {"keys": keys, "values": values}
    return measures


@torch.no_grad()
def weight_diversity(model: PreTrainedModel, progress: Progress = silent, label: str = "heads") -> list[dict]:
    """The diversity of every layer by its weights, computed in fp64 on the model's device.

    Time per layer: 4 H^2 d^2 D multiply-adds, for QK and V-O together.

    Args:
        model: the model.
        progress: shows progress over layers.
        label: what progress is called.

    Returns:
        For each layer, what `of_maps` gives.
    """
    count = len(families.decoder_layers(model))
    return [
        of_maps(_moved(head_maps(model, i), device_of(model))) for i in progress(range(count), label, count)
    ]


def _moved(maps: HeadMaps, device: torch.device) -> HeadMaps:
    moved: dict[str, Any] = {name: m if m is None else m.to(device) for name, m in maps._asdict().items()}
    return HeadMaps(**moved)


# -- from attention


def js_divergence(weights: Tensor) -> Tensor:
    """Jensen-Shannon divergence of the attention weights of heads, mean over pairs of heads.

    Args:
        weights: attention weights (b, H, t, s), H >= 2. They are normalised again in fp32, since weights in
            bfloat16 do not sum to 1.

    Returns:
        Divergence (b, t) in bits, in [0, 1].
    """
    shares = weights.float() / weights.float().sum(-1, keepdim=True)
    entropy = torch.special.entr(shares).sum(-1)
    heads = weights.shape[1]
    total = torch.zeros_like(entropy[:, 0])
    # JS(p, q) = H((p + q) / 2) - (H(p) + H(q)) / 2; head i with all heads after it at once
    for i in range(heads - 1):
        middle = torch.special.entr((shares[:, i : i + 1] + shares[:, i + 1 :]) / 2).sum(-1)
        total += (middle - (entropy[:, i : i + 1] + entropy[:, i + 1 :]) / 2).sum(1)
    return (total / (heads * (heads - 1) / 2 * math.log(2))).clamp(0, 1)


@torch.no_grad()
def attention_divergence(
    model: PreTrainedModel, rows: Tensor, progress: Progress = silent, label: str = "attention"
) -> list[float | None]:
    """The divergence of the attention maps of every layer's heads.

    The model attends eagerly and without dropout meanwhile; both settings are restored.

    Args:
        model: the model.
        rows: token ids (n, t). The first query of a row is left out, since it sees one token only.
        progress: shows progress over rows.
        label: what progress is called.

    Returns:
        For each layer the mean of `js_divergence`, or None for a layer of one head.
    """
    totals: list[float | None] = [0.0] * len(families.decoder_layers(model))
    with _eager(model):
        for row in progress(rows.to(device_of(model)).split(1), label, len(rows)):
            attentions = model(row, output_attentions=True, use_cache=False).attentions
            divergences = [
                float(js_divergence(w[:, :, 1:]).mean()) if w.shape[1] > 1 else None for w in attentions
            ]
            totals = [
                None if new is None or old is None else old + new / len(rows)
                for old, new in zip(totals, divergences, strict=True)
            ]
    return totals


@contextmanager
def _eager(model: PreTrainedModel) -> Iterator[None]:
    """Let the model attend eagerly and in evaluation mode within the context."""
    decoder, training = model.get_decoder(), model.training
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")
    model.eval()
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)
        model.train(training)


# -- both, and at random


@dataclass(frozen=True)
class Compared(Checked):
    """What a diversity measurement reads and compares with.

    Args:
        windows: number of windows of text for attention maps.
        context: tokens of a window.
        inits: number of random initialisations to compare with.
        seed: seed of the first initialisation; the others follow.
    """

    windows: int = option(8, at_least=1, at_most=2**20)
    context: int = option(128, at_least=2, at_most=2**24)
    inits: int = option(3, at_least=0, at_most=1000)
    seed: int = option(0, at_least=0)


def diversity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: str | None = None,
    *,
    windows: int = 8,
    context: int = 128,
    inits: int = 3,
    seed: int = 0,
    progress: Progress = silent,
) -> dict:
    """How different the heads of every layer are, and how different they are in random initialisations.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        corpus: text for attention maps; None for the embedded evaluation text.
        windows: number of windows of the text that are read.
        context: tokens of a window.
        inits: how many times the configuration is initialised anew, with seeds from `seed` on; 0 for never.
            Each takes the memory of a model.
        seed: seed of the first initialisation.
        progress: shows progress.

    Returns:
        One JSON object. `layers` has for each layer what `of_maps` gives; `js` (see `attention_divergence`);
        and `init`: mean, low and high over initialisations of each of the four effective ranks and of js, or
        None. `mean` has means over layers.

    Raises:
        LowkeyError: a text that is too short, a family that is not supported, or an option out of its range.
    """
    Compared(windows, context, inits, seed)
    ids = text.encode(tokenizer, text.embedded_text("evaluation") if corpus is None else corpus, model)
    rows = text.windows(ids, tokenizer, context, "data", least=windows)[:windows]
    layers = _measured(model, rows, progress, "")
    at_random = [
        _measured(_initialised(model, seed + i), rows, progress, f"at random {i + 1}: ") for i in range(inits)
    ]
    for place, layer in enumerate(layers):
        layer |= {"layer": place, "init": _band([one[place] for one in at_random])}
    config = model.config.get_text_config()
    settings = {"windows": windows, "context": context, "inits": inits, "seed": seed}
    about = {
        "model": str(config._name_or_path),
        "family": config.model_type,
        "heads": config.num_attention_heads,
    }
    return {"format": DIVERSITY_FORMAT, **about, **settings, "layers": layers, "mean": _mean(layers)}


def _measured(model: PreTrainedModel, rows: Tensor, progress: Progress, label: str) -> list[dict]:
    """Both measurements of a model, one dict per layer."""
    by_weights = weight_diversity(model, progress, f"{label}heads")
    divergence = attention_divergence(model, rows, progress, f"{label}attention")
    return [layer | {"js": js} for layer, js in zip(by_weights, divergence, strict=True)]


def _initialised(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A model of the same configuration with random weights. The caller's random state does not change."""
    register()
    # weights are drawn on the CPU, so the random state of GPUs need not be saved
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        twin = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), attn_implementation="eager")
    return twin.to(device_of(model)).eval()


def _numbers(layer: dict) -> dict[str, float | None]:
    """The numbers of a layer that are compared with random initialisations."""
    return {f"{kind}_{measure}": layer[kind][measure] for kind, measure in MEASURES} | {"js": layer["js"]}


def _band(layers: Sequence[dict]) -> dict | None:
    """Mean, low and high of every number over layers; None for what was not measured."""
    if not layers:
        return None
    rows = [_numbers(layer) for layer in layers]
    return {name: _spread([row[name] for row in rows if row[name] is not None]) for name in rows[0]}


def _spread(values: list) -> dict | None:
    """Mean, low and high of values; None if there are none."""
    return {"mean": sum(values) / len(values), "low": min(values), "high": max(values)} if values else None


def _mean(layers: Sequence[dict]) -> dict:
    """Means over layers, of every number and of its mean over initialisations."""
    means = {name: band and band["mean"] for name, band in (_band(layers) or {}).items()}
    inits = [layer["init"] for layer in layers if layer["init"]]
    bands = {
        name: _spread([init[name]["mean"] for init in inits if init[name]])
        for name in (inits[0] if inits else {})
    }
    return means | {"init": {name: band and band["mean"] for name, band in bands.items()} or None}
