"""Signal, noise and likeness of tensors, as sums that add up over batches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lq.results.analysis import SQNR_LIMIT_DB


def is_float_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def sqnr_db(signal: float, noise: float) -> float:
    """``10 * log10(signal / noise)`` of two sums of squares, within ± :data:`SQNR_LIMIT_DB`.

    Noise that is not a number, or infinite, is worse than any.
    """
    if noise == 0:
        return SQNR_LIMIT_DB
    if signal == 0 or not math.isfinite(noise):
        return -SQNR_LIMIT_DB
    # A difference of logarithms: the ratio itself may leave the floats.
    return min(max(10 * (math.log10(signal) - math.log10(noise)), -SQNR_LIMIT_DB), SQNR_LIMIT_DB)


@dataclass
class Likeness:
    """How like a tensor ``x`` another one ``y`` is, over all batches seen.

    Args:
        signal: sum of ``x**2``.
        noise: sum of ``(x - y)**2``.
        other: sum of ``y**2``.
        product: sum of ``x * y``.
    """

    signal: float = 0.0
    noise: float = 0.0
    other: float = 0.0
    product: float = 0.0
    seen: bool = False

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add a batch of both, of one shape."""
        # A reshape and not a flatten of views: channels may lie last in one of them.
        x, y = x.detach().float(), y.detach().float()
        sums = torch.stack([x.square().sum(), (x - y).square().sum(), y.square().sum(), (x * y).sum()])
        signal, noise, other, product = sums.tolist()
        self.signal += signal
        self.noise += noise
        self.other += other
        self.product += product
        self.seen = True

    @property
    def sqnr_db(self) -> float | None:
        """None where nothing was seen, or ``x`` holds an infinity (a mask, say)."""
        return sqnr_db(self.signal, self.noise) if self.seen and math.isfinite(self.signal) else None

    @property
    def cosine(self) -> float | None:
        """``sum x*y / sqrt(sum x**2 * sum y**2)``; 1 for two tensors of zeros, 0 where one of them is."""
        if not (self.seen and math.isfinite(self.signal) and math.isfinite(self.other)):
            return None
        if self.signal == 0 or self.other == 0:
            return float(self.signal == self.other)
        cosine = self.product / math.sqrt(self.signal) / math.sqrt(self.other)
        return min(max(cosine, -1.0), 1.0)


def float_leaves(outputs: Any) -> list[Tensor]:
    """The floating-point tensors among a model's outputs, in float64 on the CPU."""
    return [leaf.detach().cpu().double() for leaf in tree_leaves(outputs) if is_float_tensor(leaf)]


def energy(leaves: list[Tensor]) -> float:
    """Sum of squares."""
    return sum(float(leaf.square().sum()) for leaf in leaves)


def error_energy(leaves: list[Tensor], others: list[Tensor]) -> float:
    """Sum of squared differences."""
    return sum(float((x - y).square().sum()) for x, y in zip(leaves, others, strict=True))
