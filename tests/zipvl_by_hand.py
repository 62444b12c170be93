"""ZipVL's choice of important tokens, written out from the attention of one layer."""

from __future__ import annotations

from score_definitions import mixed_bits


def probes_of(positions, newest, drawn):
    """The newest queries, and others by the hash of their position."""
    last = max(1, round(len(positions) * newest))
    others = sorted(positions[:-last], key=mixed_bits)
    return sorted({*positions[-last:], *others[: round(len(positions) * drawn)]})


def important(paid, probes, stays, tau):
    """By equations 6 to 9: {position}, from the attention (heads, probes, positions) of one layer.

    What stays in any case is kept besides, and its mass does not count.
    """
    c = {j: float(paid[:, :, j].sum()) for j in range(paid.shape[2]) if j not in stays}
    whole, held, p = sum(c.values()), 0.0, 0
    for weight in sorted(c.values(), reverse=True):
        p, held = p + 1, held + weight
        if held >= tau * whole:
            break
    normalised = {j: c[j] / sum(q >= j for q in probes) for j in c}
    return set(stays) | set(sorted(normalised, key=lambda j: -normalised[j])[:p])
