"""Learned rounding: each weight up or down, whichever the outputs on real data err least with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, fx, nn

from lq.analysis.rounding import rounded
from lq.graph.placement import Chain
from lq.numerics.learned_rounding import Weight, round_learned
from lq.numerics.quantizer import Quantizer
from lq.numerics.rounding import NEAREST
from lq.tuning.blocks import Block, residual_blocks, single_layers
from lq.tuning.paired import PairedRun, called_once, parameter_of
from lq.util.progress import progress_bar

M = TypeVar("M", bound=nn.Module)

#: The layers whose roundings are chosen together, see :func:`learn_rounding`.
Together = Literal["layers", "blocks"]

#: Chunks of samples in each step.
_BATCH = 4


def learn_rounding(
    model: M,
    batches: Iterable[Any],
    *,
    iterations: int = 1000,
    seconds: float = 120.0,
    num_samples: int = 256,
    together: Together = "layers",
    forward: Callable[[Any], Any] | None = None,
    progress: bool = True,
) -> M:
    """Round each weight up or down by what the outputs gain, and not to the nearest.

    AdaRound (Nagel et al. 2020, "Up or down? Adaptive rounding for post-training quantization", section 3, see
    :func:`lq.numerics.learned_rounding.round_learned`): in the order of the network the error of an output,
    ``|f(W, x) - f(W~, x_int8)|^2``, is minimised over the two neighbours of each weight on its grid, with ``x_int8`` as
    what comes before makes it, rounded already. Outputs are those of a layer after batch norm and activation, or
    those of a residual block, all of whose weights are then learned together, its own activations rounded (Li et al.
    2021, "BRECQ: Pushing the limit of post-training quantization by block reconstruction", section 3.2, without the
    weighting by gradients). Where the error on all samples is no smaller than with the nearest values, these are kept.
    It pays off with few bits; with 8, mostly in depthwise networks. A layer with a rounding of the user's own (see
    :func:`lq.register_rounding`) keeps that.

    Args:
        model: prepared and calibrated; the weights are replaced in place by the values on their grids, from which
            conversion takes the same integers. Ranges stay as they are.
        batches: see :func:`lq.calibrate`.
        iterations: steps of a layer or block.
        seconds: about how long all of it may take; each gets a share by its multiplications.
        num_samples: how many samples at most; fewer where their values would take more than 2 GiB.
        together: ``"layers"``, each for itself; ``"blocks"``, those between two tensors that everything passes through,
            up to 8 of them.
        forward: see :func:`lq.calibrate`.
        progress: whether to show a progress bar.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: where ``model`` is not prepared or has no ranges, ``batches`` has no samples, or a number is out of
            its range.

    Example:
        >>> import lq, torch, torchvision
        >>> images = torch.randn(8, 3, 32, 32)
        >>> model = lq.prepare(torchvision.models.resnet18(), images, overrides={"layer1": {"weight_bits": 4}})
        >>> model = lq.calibrate(model, [images])
        >>> model = lq.learn_rounding(model, [images], iterations=2, progress=False)
        >>> int8 = lq.convert(model)
    """
    for name, number in (("iterations", iterations), ("num_samples", num_samples)):
        if number < 1:
            raise ValueError(f"{name}={number} must be at least 1")
    if together not in get_args(Together):
        raise ValueError(f"together={together!r} must be 'layers' or 'blocks'")
    if not seconds > 0:
        raise ValueError(f"seconds={seconds} must be above 0")
    paired = PairedRun(model, batches, num_samples, forward, "lq.learn_rounding(model, batches)")
    learnt: list[tuple[Tensor, Tensor]] = []
    quantizers = paired.roundings.weight_quantizers
    once = called_once(paired.analysis)
    layers = [c for c in once if _weight(model, c) is not None and quantizers[c.weight_key].spec.rounding == NEAREST]
    if together == "blocks":
        blocks = residual_blocks(paired.analysis, layers, paired.roundings.whole.tensors)
    else:
        blocks = single_layers(layers)
    left = sum(_multiplications(paired, block) for block in blocks)
    until = time.perf_counter() + seconds
    bar = progress_bar(blocks, len(blocks), enabled=progress, label="Learning to round")

    def learn(block: Block) -> None:
        nonlocal left
        own = _multiplications(paired, block)
        share = max(0.0, until - time.perf_counter()) * own / max(1, left)
        left -= own
        next(bar, None)
        values = _Learning(paired, block).learn(iterations, share) if share else None
        for layer, value in zip(block.layers, values or (), strict=values is not None):
            parameter = _weight(model, layer)
            assert parameter is not None
            learnt.append((parameter, value))
            paired.round_weight(layer.op.weight, value)

    paired.run(before={block.nodes[0]: partial(learn, block) for block in blocks})
    bar.close()  # type: ignore[attr-defined]
    with torch.no_grad():
        for parameter, value in learnt:
            parameter.copy_(value)
    return model


def _weight(model: nn.Module, chain: Chain) -> Tensor | None:
    return parameter_of(model, chain.op.weight, {chain.op.node})


def _multiplications(paired: PairedRun, block: Block) -> int:
    """Of one sample."""
    values = paired.analysis.values
    return sum(int(values[c.op.node][:1].numel() * values[c.op.weight][0].numel()) for c in block.layers)


class _Learning:
    """The weights of a block, by the error of its output against what the float block makes of the float inputs.

    It is made when both graphs have come to the block.
    """

    def __init__(self, paired: PairedRun, block: Block) -> None:
        self._paired = paired
        self._block = block
        self._targets = [self._run(paired.float_value, {}, {}, index) for index in range(paired.chunks)]
        self._generator = torch.Generator().manual_seed(0)

    def learn(self, iterations: int, seconds: float) -> list[Tensor] | None:
        """The rounded weights of the block's layers; None where nothing is gained."""
        weights = []
        for layer in self._block.layers:
            quantizer = self._paired.roundings.weight_quantizers[layer.weight_key]
            value: Tensor = self._paired.float_value(layer.op.weight, 0)
            weights.append(Weight(value.detach(), quantizer.scale, quantizer.spec))
        rounded = round_learned(weights, self._error_of_some, iterations, seconds)
        before, after = (self._error(w, range(len(self._targets))) for w in ([w.nearest for w in weights], rounded))
        return rounded if float(after) < float(before) else None

    def _error_of_some(self, weights: list[Tensor]) -> Tensor:
        return self._error(weights, torch.randperm(len(self._targets), generator=self._generator)[:_BATCH].tolist())

    def _error(self, weights: list[Tensor], chunks: Sequence[int]) -> Tensor:
        """Mean square, of the output before it is rounded itself."""
        paired, given = self._paired, {c.op.weight: w for c, w in zip(self._block.layers, weights, strict=True)}
        tensors = paired.roundings.whole.tensors
        errors = [
            (self._run(paired.int8_value, given, tensors, index) - self._targets[index]).square().sum()
            for index in chunks
        ]
        return torch.stack(errors).sum() / sum(self._targets[index].numel() for index in chunks)

    def _run(
        self,
        outside: Callable[[fx.Node, int], Any],
        weights: Mapping[fx.Node, Tensor],
        tensors: Mapping[fx.Node, Quantizer],
        index: int,
    ) -> Tensor:
        """The block's output.

        Args:
            outside: gives what the block reads of nodes before it, or of parameters.
            weights: instead of those.
            tensors: the grids that what its nodes make is rounded to.
            index: of the chunk.
        """
        values: dict[fx.Node, Any] = dict(weights)
        for node in self._block.nodes:
            value = self._paired.evaluate(node, lambda read: values[read] if read in values else outside(read, index))
            rounds = node in tensors and node is not self._block.output
            values[node] = rounded(value, tensors[node]) if rounds else value
        output: Tensor = values[self._block.output]
        return output
