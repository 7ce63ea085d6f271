"""Folding batch norm into the quantized weight before it: the integers stay, the scales change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lq.numerics.functional import SCALE_EPS, quantize
from lq.numerics.quantizer import Quantizer


@dataclass(frozen=True)
class FoldedLayer:
    """The weight and bias of a layer with its batch norm folded in.

    Args:
        weight: float weight, shape ``(O, I, ...)``.
        bias: float32, shape ``(O,)``, or None where there is neither a bias nor a batch norm.
        weight_int: the weight as integers, same shape, or None where it is not quantized.
        weight_scale: float32, shape ``(O,)``, or None likewise.
    """

    weight: Tensor
    bias: Tensor | None
    weight_int: Tensor | None = None
    weight_scale: Tensor | None = None


@dataclass(frozen=True)
class BatchNormStatistics:
    """A batch norm in evaluation mode: tensors of shape ``(C,)``, of which ``weight`` and ``bias`` may be None."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    @classmethod
    def of(cls, node: fx.Node, values: Mapping[fx.Node, Any]) -> BatchNormStatistics:
        """What an ``aten.batch_norm`` node reads."""
        weight, bias, mean, var = (values[arg] if isinstance(arg, fx.Node) else arg for arg in node.args[1:5])
        return cls(mean, var, weight, bias, float(node.args[7]))  # type: ignore[arg-type]

    def affine(self) -> tuple[Tensor, Tensor]:
        """Its affine map, ``y = x * factor + shift``, in float64, each of shape ``(C,)``.

        ``factor = gamma / sqrt(var + eps)`` and ``shift = beta - mean * factor`` (Ioffe and Szegedy 2015,
        algorithm 2).
        """
        mean, var = self.mean.double(), self.var.double()
        gamma = self.weight.detach().double() if self.weight is not None else torch.ones_like(mean)
        beta = self.bias.detach().double() if self.bias is not None else torch.zeros_like(mean)
        factor = gamma / torch.sqrt(var + self.eps)
        return factor, beta - mean * factor


@torch.no_grad()
def fold(
    weight: Tensor, bias: Tensor | None, norm: BatchNormStatistics | None, quantizer: Quantizer | None
) -> FoldedLayer:
    """Fold ``norm`` into a layer, and quantize its weight with ``quantizer``'s scales.

    With one symmetric scale for each output channel, folding and quantizing commute: ``w * f`` with the scale
    ``s * |f|`` has the integers of ``w`` with the scale ``s``, up to the sign of ``f``. So the INT8 layer holds the
    very integers that quantization-aware training rounded to.

    Args:
        weight: shape ``(O, I, ...)``.
        bias: shape ``(O,)`` or None.
        norm: the batch norm after the layer, or None.
        quantizer: the weight's quantizer, symmetric and per channel on axis 0, or None to fold in float alone.
    """
    dtype = torch.float32
    factor = torch.ones(weight.shape[0], dtype=torch.float64, device=weight.device)
    folded_bias = bias.detach().double() if bias is not None else None
    if norm is not None:
        factor, shift = norm.affine()
        folded_bias = shift if folded_bias is None else folded_bias * factor + shift
    column = factor.reshape(-1, *[1] * (weight.dim() - 1))
    folded_weight = (weight.detach().double() * column).to(dtype)
    out_bias = None if folded_bias is None else folded_bias.to(dtype)
    if quantizer is None:
        return FoldedLayer(folded_weight, out_bias)
    weight_int = quantize(weight.detach().float(), quantizer.scale, quantizer.zero_point, quantizer.spec)
    weight_int = weight_int * column.sign().to(weight_int.dtype)  # a factor of 0 leaves a channel of zeros
    scale = (quantizer.scale.double() * factor.abs()).to(dtype)
    scale = torch.where(scale > 0, scale, torch.full_like(scale, SCALE_EPS))
    return FoldedLayer(folded_weight, out_bias, weight_int, scale)


def round_bias(bias: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """``bias`` rounded to multiples of ``input_scale * weight_scale``, as the engines that add it to their sums of
    integers do (Jacob et al. 2018, section 2.4): every engine then has the same bias, in float or as int32.

    Args:
        bias: float32, shape ``(O,)``.
        input_scale: shape ``()``.
        weight_scale: shape ``(O,)``.
    """
    step = input_scale.double() * weight_scale.double()
    return (torch.round(bias.double() / step) * step).to(bias.dtype)
