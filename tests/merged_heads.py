"""Statistics and random maps for methods that store fewer KV heads."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from pico import HEAD_DIM, prompt
from statistics_by_hand import activations

from lowkey.calibration.statistics import gather_statistics
from lowkey.methods import MEA, KVHeadSVD
from lowkey.ops.bases import orthonormal
from lowkey.probes.layer_inputs import layer_inputs
from lowkey.probes.layer_probe import LayerProbe

RANKS = [4, 8, 12, 16]
WINDOWS, HELD, LENGTH = 8, 2, 20
ROWS = prompt(LENGTH, batch=WINDOWS)
LAYER = 1
WHOLE = {
    "layer": KVHeadSVD(),
    "grouped": KVHeadSVD(keys="grouped"),
    "commuting": KVHeadSVD(keys="commuting"),
    "four": KVHeadSVD(group=4, keys="commuting"),
    "similar": KVHeadSVD(keys="commuting", heads="similar"),
    "similar-layer": KVHeadSVD(heads="similar"),
    "weights": KVHeadSVD(keys="grouped", basis="weights"),
    "mean": KVHeadSVD(basis="mean"),
    "mea": MEA("activations"),
    "mea-weights": MEA(),
    "mea-aligned": MEA("aligned"),
}


def data(model, layout="post_rope"):
    """(statistics, probe) of one layer, as calibration makes them."""
    inputs = dict(layer_inputs(model, ROWS, 4))[LAYER]
    return gather_statistics(model, ROWS[:-HELD].split(4))[LAYER], LayerProbe.of(
        model, LAYER, layout, inputs, HELD
    )


def seen(name="llama"):
    """Activations (n, h, d) that the bases are fitted on."""
    return activations(name, LAYER, ROWS[:-HELD])


def random(*shape, seed=0):
    """Standard normal numbers in double precision."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_commuting(t, d, rotary, seed):
    """(t d, t d), orthonormal and commuting, written out channel by channel."""
    generator = np.random.default_rng(seed)
    out, q = torch.zeros(t * d, t * d, dtype=torch.float64), rotary // 2
    for f in range(q):
        unitary, _ = np.linalg.qr(generator.normal(size=(t, t)) + 1j * generator.normal(size=(t, t)))
        for g, j in itertools.product(range(t), repeat=2):
            (a, b), (i, k) = (g * d + f, g * d + f + q), (j * d + f, j * d + f + q)
            out[a, i] = out[b, k] = unitary[g, j].real
            out[a, k], out[b, i] = unitary[g, j].imag, -unitary[g, j].imag
    rest = [g * d + f for g in range(t) for f in range(rotary, d)]
    own, _ = np.linalg.qr(generator.normal(size=(len(rest), len(rest))))
    for (i, a), (j, b) in itertools.product(enumerate(rest), repeat=2):
        out[a, b] = float(own[i, j])
    return out


def kept(moment, columns):
    """Energy that orthonormal columns keep of a second moment."""
    return float((columns.double().mT @ moment.double() @ columns.double()).diagonal(dim1=-2, dim2=-1).sum())


def left(x, down):
    """Energy of `x` that the projection on `down` loses."""
    return float((x - x @ down.double() @ down.double().mT).square().sum())


def random_turn(seed):
    """A random orthogonal matrix."""
    return orthonormal(random(HEAD_DIM, HEAD_DIM, seed=seed)).double()
