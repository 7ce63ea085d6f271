"""What this machine's CPU can do for INT8."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import torch


@cache
def has_onednn_int8() -> bool:
    """Whether torch's oneDNN INT8 convolutions and linear layers are there: an x86 CPU, and a build with oneDNN."""
    return (
        platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.onednn, "qconv2d_pointwise")
    )


@cache
def cpu_name() -> str:
    """The CPU as a person would call it, with the number of cores that this process may use."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    instructions = "VNNI" if has_vnni() else "no VNNI"
    return f"{name}, {cores} cores, {instructions}"


@cache
def has_vnni() -> bool:
    """Whether INT8 products are summed in 32 bits (AVX512-VNNI, AVX-VNNI, AMX).

    Without it oneDNN sums pairs of products in 16 bits with saturation: an 8-bit activation times an 8-bit weight,
    twice, does not fit there, and large sums come out wrong (oneDNN guide, "Nuances of int8 computations").
    """
    get_capabilities = getattr(torch.cpu, "get_capabilities", None)
    if get_capabilities is not None:
        capabilities = get_capabilities()
        return any(capabilities.get(name, False) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))
    return bool(torch.cpu._is_avx512_vnni_supported() if hasattr(torch.cpu, "_is_avx512_vnni_supported") else False)


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Let torch use so many threads, and as many as before afterwards; None changes nothing."""
    if threads is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
