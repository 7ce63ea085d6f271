"""What observers and calibrators have to give, once more: in numpy and plain loops, on the values themselves."""

from __future__ import annotations

import math

import numpy as np
import torch

from lq.numerics.observers import HistogramObserver
from lq.numerics.spec import QuantSpec

AFFINE = QuantSpec(torch.uint8, 0, 255, symmetric=False)
SYMMETRIC = QuantSpec(torch.int8, -127, 127, symmetric=True)
SEVEN_BITS = QuantSpec(torch.int8, -64, 64, symmetric=True)
SPECS = (AFFINE, SYMMETRIC, SEVEN_BITS)


def distributions(n: int = 1500) -> dict[str, np.ndarray]:
    """Values as networks have them, float32 of shape ``(n,)`` or a little more."""
    rng = np.random.default_rng(0)
    normal = rng.normal(size=n)
    drawn = {
        "normal": normal,
        "relu": np.maximum(normal, 0),
        "silu": 3 * normal / (1 + np.exp(-3 * normal)),
        "laplace": rng.laplace(size=n),
        "heavy tails": rng.standard_t(3, size=n),
        "two modes": np.r_[rng.normal(-1, 0.1, n // 2), rng.normal(6, 0.5, n // 2)],
        "outlier": np.r_[normal, 100.0],
        "outlier behind a relu": np.r_[np.maximum(normal, 0), 100.0],
        "far above zero": rng.uniform(5, 6, size=n),
        "far below zero": rng.uniform(-30, -20, size=n),
        "four values": rng.choice([-1.0, 0.0, 0.3, 7.0], size=n),
    }
    return {name: values.astype(np.float32) for name, values in drawn.items()}


def observed(*batches: np.ndarray | torch.Tensor, max_samples: int | None = None) -> HistogramObserver:
    observer = HistogramObserver(max_samples)
    for batch in batches:
        observer(torch.as_tensor(batch))
    return observer


def finest_exponent(values: np.ndarray) -> int:
    """Of the narrowest bins, a power of two wide, of which 2048 on either side reach beyond all values."""
    largest = np.abs(values.astype(np.float64)).max(initial=0.0)
    return next(e for e in range(-40, 118) if 2048 * 2.0**e > largest)


def bin_counts(values: np.ndarray, exponent: int) -> dict[int, int]:
    """How many values each bin has: bin ``i`` is ``((i - 1) * w, i * w]``."""
    edges = np.arange(-2047, 2049) * 2.0**exponent
    index = np.searchsorted(edges, values.astype(np.float64), side="left") - 2047
    return {int(i): int(n) for i, n in zip(*np.unique(index, return_counts=True), strict=True)}


def observed_counts(observer: HistogramObserver) -> dict[int, int]:
    """The bins that are not empty."""
    return {i: n for i in range(-2047, 2049) if (n := int(observer.counts[i]))}


def squared_error(values: np.ndarray, low: np.ndarray, high: np.ndarray, spec: QuantSpec) -> np.ndarray:
    """``sum (x - q(x))**2`` over the values, for each range of ``low`` and ``high``, both of shape ``(K,)``."""
    x = values.astype(np.float64)
    low, high = np.minimum(low, 0.0)[:, None].astype(np.float64), np.maximum(high, 0.0)[:, None].astype(np.float64)
    smallest = np.finfo(np.float32).eps
    if spec.symmetric:
        scale = np.maximum(np.maximum(-low, high) / min(-spec.quant_min, spec.quant_max), smallest)
        zero_point = np.zeros_like(scale)
    else:
        scale = np.maximum((high - low) / (spec.quant_max - spec.quant_min), smallest)
        zero_point = spec.quant_min - np.rint(low / scale)
    errors = []
    for s, z in zip(scale, zero_point, strict=True):  # one at a time, not to need K times the memory
        q = np.clip(np.rint(x / s) + z, spec.quant_min, spec.quant_max)
        errors.append((((q - z) * s - x) ** 2).sum())
    return np.array(errors)


def least_squared_error(values: np.ndarray, spec: QuantSpec, steps: int = 75) -> float:
    """The best of all ranges on a grid; of a symmetric one, which has one end to try, on a fine grid."""
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    if spec.symmetric:
        reach = max(-low, high) * np.linspace(0, 1, 10 * steps + 1)[1:]
        return float(squared_error(values, -reach, reach, spec).min())
    shares = np.linspace(0, 1, steps + 1)[1:]
    lows, highs = np.meshgrid(np.unique(low * shares), np.unique(high * shares))
    return float(squared_error(values, lows.ravel(), highs.ravel(), spec).min())


def kl_divergences(values: np.ndarray, spec: QuantSpec, steps: int) -> list[float]:
    """The divergence of each threshold, by the docstring of ``Entropy``; infinite where no bin is inside."""
    exponent = finest_exponent(values)
    width = 2.0**exponent
    counts = bin_counts(values, exponent)
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    centres, numbers = [], []
    for i in range(min(counts), max(counts) + 1):
        exact_zeros = i == 0 and values.min() >= 0
        centres.append(0.0 if exact_zeros else (i - 0.5) * width)
        numbers.append(0 if exact_zeros else counts.get(i, 0))
    divergences = []
    for step in range(1, steps + 1):
        threshold = step / steps * max(-low, high)
        levels = _levels(centres, max(low, -threshold), min(high, threshold), spec)
        divergences.append(_kl_divergence(numbers, levels, spec))
    return divergences


def _levels(centres: list[float], low: float, high: float, spec: QuantSpec) -> list[int]:
    """The integer that each centre rounds to, before it is clipped to the grid."""
    if spec.symmetric:
        scale, zero_point = np.float32(max(-low, high)) / np.float32(min(-spec.quant_min, spec.quant_max)), 0
    else:
        steps = np.float32(spec.quant_max - spec.quant_min)
        scale = np.float32(high) / steps - np.float32(low) / steps
        zero_point = spec.quant_min - round(float(np.float32(low) / scale))
    return [round(float(np.float32(x) / scale)) + zero_point for x in centres]


def _kl_divergence(numbers: list[int], levels: list[int], spec: QuantSpec) -> float:
    inside = [i for i, level in enumerate(levels) if spec.quant_min <= level <= spec.quant_max]
    if not inside:
        return math.inf
    p = {i: float(numbers[i]) for i in inside}
    p[inside[0]] += sum(numbers[: inside[0]])
    p[inside[-1]] += sum(numbers[inside[-1] + 1 :])
    q = dict.fromkeys(inside, 0.0)
    for level in {levels[i] for i in inside}:
        together = [i for i in inside if levels[i] == level]
        sharing = [i for i in together if p[i] > 0]
        for i in sharing:
            q[i] = sum(numbers[j] for j in together) / len(sharing)
    sum_p, sum_q = sum(p.values()), sum(q.values())
    divergence = 0.0
    for i in inside:
        if p[i] > 0:
            share = q[i] / sum_q if sum_q else 0.0
            divergence += p[i] / sum_p * math.log(p[i] / sum_p / (share + 1e-9))
    return divergence
