"""Bias correction: what rounding shifts in a layer's output on average goes into its bias."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from lq.graph.placement import Chain
from lq.tuning.paired import Chunks, PairedRun, called_once, channel_axis, linear_end, parameter_of

M = TypeVar("M", bound=nn.Module)

#: By default: a convolution's mean is over every position of every sample, so it needs few of them.
NUM_SAMPLES = 128


def correct_bias(
    model: M,
    batches: Iterable[Any],
    *,
    num_samples: int = NUM_SAMPLES,
    forward: Callable[[Any], Any] | None = None,
) -> M:
    """Take out of every layer in INT8 the mean error that rounding makes in its output, channel by channel.

    ``b' = b + E[y] - E[y_int8]`` over the samples (and positions), with ``y`` the output before any residual add and
    activation: the empirical bias correction of Nagel et al. 2019 ("Data-free quantization through weight equalization
    and bias correction", section 4.2 and appendix D). The layers are corrected in order, so each is given what those
    before it make once they are corrected, in one run of the float graph beside the INT8 one. It costs nothing at run
    time. Weights and ranges stay as they are; a layer in float stays as it is, and so does one that has no bias
    and no batch norm with one, or that is called several times.

    Args:
        model: prepared and calibrated; its biases, or those of the batch norms after its layers, are changed in
            place. Once is enough: corrected again, it is corrected for what is left.
        batches: see :func:`lq.calibrate`.
        num_samples: how many samples at most; fewer where their values would take more than 2 GiB.
        forward: see :func:`lq.calibrate`.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: where ``model`` is not prepared or has no ranges, or ``batches`` has no samples.

    Example:
        >>> import lq, torch, torchvision
        >>> images = torch.randn(8, 3, 32, 32)
        >>> model = lq.prepare(torchvision.models.resnet18(), images)
        >>> model = lq.correct_bias(lq.calibrate(model, [images]), [images])
        >>> int8 = lq.convert(model)
    """
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples} must be at least 1")
    paired = PairedRun(model, batches, num_samples, forward, "lq.correct_bias(model, batches)")
    shifts: list[tuple[Tensor, Tensor]] = []

    def correct(bias: Tensor, axis: int) -> Callable[[Chunks, Chunks], Chunks]:
        def shifted(floats: Chunks, int8: Chunks) -> Chunks:
            shift = mean_difference(floats, int8, axis)
            shifts.append((bias, shift))
            shape = [1] * floats[0].dim()
            shape[axis] = -1
            return [x + shift.to(x.dtype).reshape(shape) for x in int8]

        return shifted

    after: dict[fx.Node, Callable[[Chunks, Chunks], Chunks]] = {}
    for chain in called_once(paired.analysis):
        bias = bias_of(model, chain)
        if bias is not None:
            after[linear_end(chain)] = correct(bias, channel_axis(chain))
    paired.run(after=after)
    with torch.no_grad():
        for bias, shift in shifts:
            bias.add_(shift.to(bias.dtype))
    return model


def bias_of(model: nn.Module, chain: Chain) -> Tensor | None:
    """What is added last in the linear part of a layer: its batch norm's bias or its own; None where there is none."""
    nodes = set(chain.nodes)
    node = chain.op.bias if chain.batch_norm is None else chain.batch_norm.args[2]
    return parameter_of(model, node, nodes)


def mean_difference(floats: Chunks, int8: Chunks, axis: int) -> Tensor:
    """The mean of ``y - y_int8`` over all axes but one, float64, shape ``(C,)``.

    Args:
        floats: tensors ``y``, of one chunk of samples each.
        int8: tensors ``y_int8`` of the same shapes.
        axis: the channels'.
    """
    total, count = torch.zeros((), dtype=torch.float64), 0
    for y, y_int8 in zip(floats, int8, strict=True):
        difference = (y - y_int8).double().movedim(axis, 0).flatten(1)
        total = total.to(difference.device) + difference.sum(1)
        count += difference.shape[1]
    return total / max(1, count)
