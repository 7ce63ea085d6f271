"""Pure numerics of quantization on tensors: no state, no modules."""

from __future__ import annotations

import torch
from torch import Tensor

from lq.numerics.rounding import NEAREST, to_whole
from lq.numerics.spec import QuantSpec

#: Smallest scale: a tensor that is all zeros still needs one that can be divided by.
SCALE_EPS = torch.finfo(torch.float32).eps


def choose_qparams(min_val: Tensor, max_val: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point that map the range ``[min_val, max_val]`` to the grid of ``spec``.

    The range is first widened to contain zero, so that zero (padding, ReLU's floor) is represented exactly.

    * affine: ``scale = (max - min) / (quant_max - quant_min)``, ``zero_point = quant_min - round(min / scale)``
      (Jacob et al. 2018, section 3);
    * symmetric: ``scale = max(|min|, |max|) / min(|quant_min|, quant_max)``, ``zero_point = 0``
      (Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient inference", section 2.3).

    Args:
        min_val: smallest value, shape ``()`` or ``(C,)``, any floating dtype.
        max_val: largest value, same shape.
        spec: the grid.

    Returns:
        ``scale`` (float32) and ``zero_point`` (int32), of the shape of ``min_val``.
    """
    low = min_val.float().clamp(max=0.0)
    high = max_val.float().clamp(min=0.0)
    if spec.symmetric:
        steps = min(-spec.quant_min, spec.quant_max)
        scale = torch.maximum(-low, high).div(steps).clamp(min=SCALE_EPS)
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    # Divided before they are subtracted: the span of two finite floats need not be finite.
    steps = spec.quant_max - spec.quant_min
    scale = (high / steps - low / steps).clamp(min=SCALE_EPS)
    zero_point = spec.quant_min - torch.round(low / scale)
    return scale, zero_point.clamp(spec.quant_min, spec.quant_max).to(torch.int32)


def _per_axis(qparam: Tensor, x: Tensor, spec: QuantSpec) -> Tensor:
    """``qparam`` shaped so that it broadcasts along ``spec.ch_axis`` of ``x``."""
    if spec.ch_axis is None:
        return qparam
    shape = [1] * x.dim()
    shape[spec.ch_axis] = -1
    return qparam.reshape(shape)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """``clamp(round(x / scale) + zero_point)`` as integers of ``spec.dtype``; ties go to the even neighbour, where
    ``spec`` has no rounding of its own.

    ``x / scale`` is taken as ``x * (1 / scale)``, as torch's and oneDNN's own kernels do: the bits must be theirs.
    """
    inverse = 1.0 / _per_axis(scale, x, spec)
    q = to_whole(x * inverse, spec.rounding) + _per_axis(zero_point, x, spec)
    return q.clamp(spec.quant_min, spec.quant_max).to(spec.dtype)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """``(q - zero_point) * scale`` as float32."""
    return (q.float() - _per_axis(zero_point, q, spec)) * _per_axis(scale, q, spec)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Round ``x`` to the grid and back, in ``x``'s dtype, with the straight-through gradient inside the range.

    The rounding itself is done in float32, also under autocast: a bfloat16 has fewer steps than an INT8 range.
    """
    values = x.float()
    if spec.rounding != NEAREST:
        out = _straight_through(values, scale, zero_point, spec)
    elif spec.ch_axis is None:
        out = torch.fake_quantize_per_tensor_affine(values, scale, zero_point, spec.quant_min, spec.quant_max)
    else:
        out = torch.fake_quantize_per_channel_affine(
            values, scale, zero_point, spec.ch_axis, spec.quant_min, spec.quant_max
        )
    return out.to(x.dtype)


def _straight_through(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    with torch.no_grad():
        q = to_whole(x * (1.0 / _per_axis(scale, x, spec)), spec.rounding) + _per_axis(zero_point, x, spec)
        inside = (q >= spec.quant_min) & (q <= spec.quant_max)
        rounded = dequantize(q.clamp(spec.quant_min, spec.quant_max), scale, zero_point, spec)
    # In this order, for the values are to be those of ``rounded`` to the last bit.
    return torch.where(inside, rounded + (x - x.detach()), rounded)
