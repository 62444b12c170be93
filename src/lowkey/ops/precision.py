"""Which numbers matrix products are formed in."""

from __future__ import annotations

from torch import Tensor


def for_products(x: Tensor) -> Tensor:
    """In fp32 on a CPU, where products of bf16, above all small and strided ones, take longer than the copy;
    elsewhere as it is.
    """
    return x.float() if x.device.type == "cpu" else x
