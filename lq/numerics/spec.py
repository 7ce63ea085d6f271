"""A quantizer's integer grid: a frozen value, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lq.numerics.rounding import NEAREST


@dataclass(frozen=True)
class QuantSpec:
    """The integer grid a tensor is rounded to.

    A real value ``x`` and its integer ``q`` are tied by ``x = (q - zero_point) * scale`` with
    ``quant_min <= q <= quant_max`` (Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", eq. 1).

    Worked shapes, for the weight ``(64, 3, 7, 7)`` of a convolution:

    * ``ch_axis=None`` (per tensor): ``scale`` and ``zero_point`` have shape ``()``;
    * ``ch_axis=0`` (per output channel): ``scale`` and ``zero_point`` have shape ``(64,)``.

    Args:
        dtype: the integer type the values are stored in, ``torch.uint8`` or ``torch.int8``.
        quant_min: smallest integer that is used.
        quant_max: largest integer that is used.
        symmetric: the zero point is 0 and the real range is ``[-a, a]``; otherwise the range is affine.
        ch_axis: the axis with a separate scale for each index, or None for one scale per tensor.
        rounding: name of what makes numbers of steps whole, see :func:`lq.register_rounding`.

    Raises:
        ValueError: where the dtype, the bounds or the symmetry do not fit each other.
    """

    dtype: torch.dtype
    quant_min: int
    quant_max: int
    symmetric: bool
    ch_axis: int | None = None
    rounding: str = NEAREST

    def __post_init__(self) -> None:
        if self.dtype not in (torch.uint8, torch.int8):
            raise ValueError(f"dtype={self.dtype} is not an 8-bit integer type; choose torch.uint8 or torch.int8")
        info = torch.iinfo(self.dtype)
        if not info.min <= self.quant_min < self.quant_max <= info.max:
            raise ValueError(
                f"quant_min={self.quant_min}, quant_max={self.quant_max} must be ascending and within "
                f"[{info.min}, {info.max}], the bounds of {self.dtype}"
            )
        if self.symmetric and not self.quant_min < 0 < self.quant_max:
            raise ValueError(
                f"symmetric=True needs quant_min < 0 < quant_max (the zero point is 0), got "
                f"[{self.quant_min}, {self.quant_max}]"
            )

    @property
    def per_channel(self) -> bool:
        return self.ch_axis is not None

    def __str__(self) -> str:
        scheme = "symmetric" if self.symmetric else "affine"
        granularity = f"per channel (axis {self.ch_axis})" if self.per_channel else "per tensor"
        dtype = str(self.dtype).removeprefix("torch.")
        rounding = "" if self.rounding == NEAREST else f", {self.rounding}"
        return f"{dtype} [{self.quant_min}, {self.quant_max}] {scheme} {granularity}{rounding}"
