"""The dtype in which matrix products are formed."""

from __future__ import annotations

from torch import Tensor


def for_products(x: Tensor) -> Tensor:
    """x in fp32 on a CPU; elsewhere as it is.

    On CPUs, products of bf16 numbers take longer than the copy, above all small and strided products.
    """
    return x.float() if x.device.type == "cpu" else x
