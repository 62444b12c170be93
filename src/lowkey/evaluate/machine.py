"""The machine that times were taken on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lowkey.plan.plan import versions


def machine(device: str) -> dict[str, Any]:
    """Versions and hardware on which times depend.

    Args:
        device: what was timed on, like `cpu` or `cuda:0`.

    Returns:
        The versions of lowkey, Python, torch, transformers, numba and triton (None where a package is not
        installed), the platform, the processor or GPU, the CPU cores that this process may use, the memory in
        GiB, and how many processes were running or waiting for a core in the last minute (None where the
        system does not say).
    """
    on_gpu = device.startswith("cuda")
    memory = (
        torch.cuda.get_device_properties(device).total_memory
        if on_gpu
        else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    )
    return {
        **versions(),
        **{name: _version(name) for name in ("numba", "triton")},
        "platform": platform.platform(),
        "processor": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def _version(package: str) -> str | None:
    """Version of a package, or None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
