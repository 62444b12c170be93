"""Tokens of several kinds that the same queries attend to, and attention over them in loops in fp64."""

from __future__ import annotations

from dataclasses import replace

import torch
from stored_rows import draw, ragged

from lowkey.backends.stored import StepSegment

ROWS, WIDTH, LATENT = 3, 64, 32
KINDS = [  # of each segment: packings of keys and values, tokens of rows, whether they are latents, hidden
    [("plain", "plain", (700, 1, 33), False, 0)],
    [("plain", "plain", (40, 40, 40), False, 0), ("token4", "token8", (300, 0, 5), False, 4)],
    [("channel4", "token4", (96, 97, 0), True, 4), ("plain", "plain", (3, 33, 0), False, 0)],
    [
        ("channel2", "token2", (2000, 64, 1), True, 0),
        ("token8", "token8", (70, 70, 70), True, 5),
        ("plain", "plain", (4, 4, 4), False, 0),
        ("plain", "plain", (1, 31, 32), False, 0),
    ],
]


def made(kinds, dtype, widths=(LATENT, WIDTH)):
    """(segments, and of each: keys and values of every row in fp64)."""
    segments, numbers = [], []
    for i, (of_keys, of_values, lengths, latents, hidden) in enumerate(kinds):
        width = widths[not latents]
        sides, rows = [], []
        for name, seed in ((of_keys, 2 * i), (of_values, 2 * i + 1)):
            side, exact = ragged(name, draw(lengths, 1, width, dtype, seed), lengths)
            sides.append(side)
            rows.append(exact[:, 0].split(list(lengths)))
        segments.append(StepSegment(*sides, torch.tensor(lengths), latents, hidden))
        numbers.append(rows)
    return segments, numbers


def moved(segments):
    """The segments, each with a bias for every row, and with keys that meet other columns of queries."""
    return [
        replace(s, column=3 + 7 * i, bias=torch.tensor([0.5 * i, -1.0, 2.0])) for i, s in enumerate(segments)
    ]


def attention_by_hand(kinds, numbers, latent, query, scaling, softcap, bias, segments=None):
    """Sums over latents, sums over the others, share of the latents and log-sum-exp, in fp64.

    With `segments`, their columns and biases count.
    """
    m, widths = query.shape[1], (LATENT, WIDTH) if segments else (latent.shape[2], query.shape[2])
    sums, out = (torch.zeros(ROWS, m, n).double() for n in widths)
    share, lse = torch.zeros(ROWS, m).double(), torch.full((ROWS, m), -torch.inf).double()
    for row in range(ROWS):
        for i in range(m):
            scores, values, is_latent = [], [], []
            for n, ((_, _, _, latents, hidden), (keys, own)) in enumerate(zip(kinds, numbers, strict=True)):
                asked = (latent if latents else query)[row, i].double()
                if segments:
                    asked = asked[segments[n].column :][: keys[row].shape[1]]
                found = keys[row][hidden:] @ asked * scaling
                found = found if softcap is None else softcap * torch.tanh(found / softcap)
                shift = bias[row, i].double() * scaling if latents and bias is not None else 0.0
                scores.append(found + shift + (segments[n].bias[row].double() if segments else 0.0))
                values.append(own[row][hidden:])
                is_latent.append(latents)
            joined = torch.cat(scores)
            if not len(joined):
                continue
            lse[row, i] = joined.logsumexp(0)
            weights = (joined - lse[row, i]).exp().split([len(s) for s in scores])
            for w, v, latents in zip(weights, values, is_latent, strict=True):
                (sums if latents else out)[row, i] += w @ v
                share[row, i] += w.sum() if latents else 0.0
    return sums, out, share, lse
