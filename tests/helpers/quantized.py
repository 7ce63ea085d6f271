"""A network from float to INT8 in one call, and images to do that with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import lq
from lq.numerics.calibrators import Calibrator
from lq.schemes.targets import Target

# 7-bit weights: exact on every x86 CPU, with VNNI and without; `x86` warns where there is none.
TARGET = "x86_avx2"


def noise(samples: int, size: int = 16, seed: int = 0) -> Tensor:
    """Images ``(samples, 3, size, size)`` of standard normal values."""
    return torch.randn(samples, 3, size, size, generator=torch.Generator().manual_seed(seed))


def calibrated(
    model: nn.Module,
    *batches: Any,
    example: Any = None,
    target: str | Target = TARGET,
    calibrator: str | Calibrator | None = None,
    **settings: Any,
) -> nn.Module:
    """``model`` in evaluation mode, prepared, and calibrated on ``batches``.

    Args:
        model: a float network; prepared in place.
        batches: what it is calibrated on.
        example: what it is prepared with; by default the first batch.
        target: what it is prepared for.
        calibrator: what makes ranges of the statistics.
        settings: more arguments of ``lq.prepare``.
    """
    lq.prepare(model.eval(), batches[0] if example is None else example, target=target, **settings)
    return lq.calibrate(model, list(batches), calibrator=calibrator)


def quantized(model: nn.Module, *batches: Any, **settings: Any) -> lq.Int8Module:
    """:func:`calibrated`, then in INT8; ``model`` stays the prepared one."""
    return lq.convert(calibrated(model, *batches, **settings))
