"""Statistics and probes that methods are fitted on, made as calibration makes them."""

from __future__ import annotations

import string

from pico import attached, prompt
from statistics_by_hand import activations

from lowkey.calibration.statistics import gather_statistics
from lowkey.probes.layer_inputs import layer_inputs
from lowkey.probes.layer_probe import LayerProbe

RANKS = [4, 8, 16]
WINDOWS, HELD, LENGTH = 8, 2, 20
TEXT = "".join(string.printable[(i * i + 7 * i) % 95] for i in range(1000))
ROWS = prompt(LENGTH, batch=WINDOWS)  # longer than the window of the sliding layers


def prepared(name, layout, layer):
    """(statistics, probe) of one layer, as calibration makes them."""
    model = attached(name)
    inputs = dict(layer_inputs(model, ROWS, 4))[layer]
    return gather_statistics(model, ROWS[:-HELD].split(4))[layer], LayerProbe.of(
        model, layer, layout, inputs, HELD
    )


def stored_keys(layout):
    """Keys of layer 1 as this layout stores them, on the windows that are not held out."""
    return activations("llama", 1, ROWS[:-HELD])["keys_pre" if layout == "pre_rope" else "keys_post"]
