"""What this machine's CPU can do for INT8."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch


def architecture() -> str:
    """What the CPU's instruction set is called here: ``"x86_64"``, ``"aarch64"``, ..."""
    return platform.machine().lower()


def is_x86() -> bool:
    """Whether this is a 64-bit x86 CPU."""
    return architecture() in ("x86_64", "amd64")


def is_arm() -> bool:
    """Whether this is an ARM CPU."""
    return architecture().startswith(("arm", "aarch64"))


@cache
def has_onednn_int8() -> bool:
    """Whether torch's oneDNN INT8 convolutions and linear layers are there: an x86 CPU, and a build with oneDNN."""
    return is_x86() and torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qconv2d_pointwise")


@cache
def cpu_name() -> str:
    """The CPU's model name, with the number of cores that this process may use."""
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
    """Whether the INT8 kernels sum products in 32 bits (AVX512-VNNI, AVX-VNNI, AMX).

    Otherwise oneDNN sums pairs of products in 16 bits with saturation: two products of an 8-bit activation and an 8-bit
    weight do not fit, and large sums come out wrong (oneDNN guide, "Nuances of int8 computations"). The kernels may
    use less than the CPU has (``ONEDNN_MAX_CPU_ISA`` in the environment limits it), so they are tried, where there are
    any.
    """
    if has_onednn_int8():
        return _sums_in_32_bits()
    get_capabilities = getattr(torch.cpu, "get_capabilities", None)
    if get_capabilities is not None:
        capabilities = get_capabilities()
        return any(capabilities.get(name, False) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))
    return bool(torch.cpu._is_avx512_vnni_supported() if hasattr(torch.cpu, "_is_avx512_vnni_supported") else False)


def _sums_in_32_bits() -> bool:
    """Whether a convolution and a linear layer of the largest integers give the right sums."""
    channels, onednn = 64, torch.ops.onednn
    q, weight = torch.full((1, channels), 255, dtype=torch.uint8), torch.full((16, channels), 127, dtype=torch.int8)
    scales, zeros = torch.ones(16), torch.zeros(16, dtype=torch.int32)
    geometry: tuple[Any, ...] = ([1, 1], [0, 0], [1, 1], 1)
    out: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")
    packed = onednn.qlinear_prepack(weight, [1, channels])
    linear = onednn.qlinear_pointwise(q, 1.0, 0, packed, scales, zeros, None, *out)
    image = q.reshape(1, channels, 1, 1).expand(1, channels, 4, 4).contiguous(memory_format=torch.channels_last)
    packed = onednn.qconv_prepack(weight[:, :, None, None], scales, 1.0, 0, *geometry, list(image.shape))
    convolution = onednn.qconv2d_pointwise(image, 1.0, 0, packed, scales, zeros, None, *geometry, *out)
    return all(bool((sums == 255 * 127 * channels).all()) for sums in (linear, convolution))


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Let torch use so many threads, and restore the number afterwards; None changes nothing."""
    if threads is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
