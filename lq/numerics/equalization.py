"""Cross-layer equalisation on tensors: how to share a channel's range between the two layers that it connects."""

from __future__ import annotations

import torch
from torch import Tensor


def input_ranges(weight: Tensor, groups: int) -> Tensor:
    """The largest magnitude that multiplies each input channel, shape ``(I,)``.

    Args:
        weight: shape ``(O, I / groups, ...)``.
        groups: of the convolution; 1 for a linear layer.
    """
    by_group = weight.detach().abs().reshape(groups, -1, weight.shape[1], weight[0, 0].numel())
    return by_group.amax((1, 3)).flatten()


def scale_inputs(weight: Tensor, factor: Tensor, groups: int) -> Tensor:
    """``weight`` with what multiplies the input channel ``i`` multiplied by ``factor[i]``; shapes as in
    :func:`input_ranges`."""
    by_group = weight.reshape(groups, -1, weight.shape[1], weight[0, 0].numel())
    return (by_group * factor.reshape(groups, 1, -1, 1)).reshape(weight.shape)


def sum_inputs(weight: Tensor, values: Tensor, groups: int) -> Tensor:
    """The output of a convolution for an input that is ``values[i]`` everywhere in channel ``i``, shape ``(O,)``."""
    by_group = weight.reshape(groups, -1, weight.shape[1], weight[0, 0].numel()).sum(3)
    return (by_group * values.reshape(groups, 1, -1)).sum(2).flatten()


def equalizing_scale(first: Tensor, second: Tensor) -> Tensor:
    """``s = sqrt(r1 * r2) / r2`` for each channel (Nagel et al. 2019, eq. 11): both ranges become ``sqrt(r1 * r2)``
    where the layer that makes the channel is divided by it, and the one that reads it multiplied.

    A channel that either layer has no weights for keeps its scale.

    Args:
        first: ranges ``r1`` of the weights that make each channel, shape ``(C,)``.
        second: ranges ``r2`` of those that read it, likewise.
    """
    scale = torch.sqrt(first * second) / second
    return torch.where((first > 0) & (second > 0), scale, torch.ones_like(scale))
