"""GPUs by name, with their memory and the bandwidth of that memory.

Imports no torch: the command line checks names before it loads torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowkey.core.errors import LowkeyError
from lowkey.core.options import nearest_name, shown


@dataclass(frozen=True)
class Gpu:
    """What the memory of one or of several like GPUs holds and how fast it is read.

    Args:
        name: for people.
        gib: memory in GiB, as the data sheet has it. What a driver shows is a few per cent less.
        gbs: the largest bandwidth of that memory in GB/s (10^9 bytes).
        count: number of GPUs, over which weights and caches are spread evenly.
    """

    name: str
    gib: float
    gbs: float
    count: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of memory of all of them together."""
        return int(self.count * self.gib * 2**30)

    def seconds(self, nbytes: float) -> float:
        """How long so many bytes take to read at the largest bandwidth of all of them together."""
        return nbytes / (self.count * self.gbs * 1e9)


# Memory (called GB there) and bandwidth, from NVIDIA's data sheets.
GPUS: dict[str, Gpu] = {
    # "NVIDIA H100 Tensor Core GPU", H100 SXM: 80GB, 3.35TB/s
    "h100": Gpu("h100", 80, 3350),
    # "NVIDIA H200 Tensor Core GPU", H200 SXM: 141GB, 4.8TB/s
    "h200": Gpu("h200", 141, 4800),
    # "NVIDIA DGX B200": 1,440GB total, 64TB/s HBM3e bandwidth, over eight GPUs
    "b200": Gpu("b200", 180, 8000),
    # "NVIDIA A100 Tensor Core GPU", A100 80GB SXM: 80GB HBM2e, 2,039GB/s
    "a100-80": Gpu("a100-80", 80, 2039),
    # "NVIDIA A100 Tensor Core GPU" of 2020 and its whitepaper, A100 40GB: 40GB HBM2, 1,555GB/s
    "a100-40": Gpu("a100-40", 40, 1555),
    # "NVIDIA L40S": 48GB GDDR6 with ECC, 864GB/s
    "l40s": Gpu("l40s", 48, 864),
    # "NVIDIA L4 Tensor Core GPU": 24GB, 300GB/s
    "l4": Gpu("l4", 24, 300),
    # "GeForce RTX 4090" and the whitepaper "NVIDIA Ada GPU Architecture": 24GB GDDR6X, 1008 GB/sec
    "rtx4090": Gpu("rtx4090", 24, 1008),
}


def find_gpu(name: str) -> Gpu:
    """The GPU of this name, whatever its case. Raises: LowkeyError for a name that is not in the table."""
    if name.lower() not in GPUS:
        remedy = nearest_name(name.lower(), GPUS, " or --memory with --bandwidth")
        raise LowkeyError(f"gpu {shown(name)} is unknown; {remedy}")
    return GPUS[name.lower()]
