"""Learned rounding: each weight up or down, whichever its layer's outputs on real data err least with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from lq.graph.interpret import run_node
from lq.graph.placement import Chain
from lq.numerics.learned_rounding import round_learned
from lq.numerics.rounding import NEAREST
from lq.tuning.paired import Chunks, PairedRun, called_once, parameter_of
from lq.util.progress import progress_bar

M = TypeVar("M", bound=nn.Module)

#: Chunks of samples in each step.
_BATCH = 4


def learn_rounding(
    model: M,
    batches: Iterable[Any],
    *,
    iterations: int = 1000,
    seconds: float = 120.0,
    num_samples: int = 256,
    forward: Callable[[Any], Any] | None = None,
    progress: bool = True,
) -> M:
    """Round each weight up or down by what the outputs of its layer gain, and not to the nearest.

    AdaRound (Nagel et al. 2020, "Up or down? Adaptive rounding for post-training quantization", section 3, see
    :func:`lq.numerics.learned_rounding.round_learned`): layer by layer in order, the error of the output after batch
    norm and activation, ``|f(W x) - f(W~ x_int8)|^2``, is minimised over the two neighbours of each weight on its grid,
    with ``x_int8`` as the layers before it, rounded already, make it. A layer whose error on all samples is no smaller
    than with the nearest values keeps these. It pays off with few bits; with 8, mostly in depthwise networks. A layer
    with a rounding of the user's own (see :func:`lq.register_rounding`) keeps that.

    Args:
        model: prepared and calibrated; the weights are replaced in place by the values on their grids, from which
            conversion takes the same integers. Ranges stay as they are.
        batches: see :func:`lq.calibrate`.
        iterations: steps of a layer.
        seconds: about how long all of it may take; each layer gets a share by its multiplications.
        num_samples: how many samples at most; fewer where their values would take more than 2 GiB.
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
    if not seconds > 0:
        raise ValueError(f"seconds={seconds} must be above 0")
    paired = PairedRun(model, batches, num_samples, forward, "lq.learn_rounding(model, batches)")
    learnt: list[tuple[Tensor, Tensor]] = []
    quantizers = paired.roundings.weight_quantizers
    once = called_once(paired.analysis)
    chains = [c for c in once if _weight(model, c) is not None and quantizers[c.weight_key].spec.rounding == NEAREST]
    left = sum(_multiplications(paired, chain) for chain in chains)
    until = time.perf_counter() + seconds
    bar = progress_bar(chains, len(chains), enabled=progress, label="Learning to round")

    def learn(chain: Chain) -> None:
        nonlocal left
        own = _multiplications(paired, chain)
        share = max(0.0, until - time.perf_counter()) * own / max(1, left)
        left -= own
        next(bar, None)
        rounded = _learn(paired, chain, iterations, share) if share else None
        if rounded is not None:
            parameter = _weight(model, chain)
            assert parameter is not None
            learnt.append((parameter, rounded))
            paired.int8_values[chain.op.weight] = [rounded] * len(paired.int8_values[chain.op.weight])

    paired.run(before={chain.op.node: partial(learn, chain) for chain in chains})
    bar.close()  # type: ignore[attr-defined]
    with torch.no_grad():
        for parameter, rounded in learnt:
            parameter.copy_(rounded)
    return model


def _weight(model: nn.Module, chain: Chain) -> Tensor | None:
    return parameter_of(model, chain.op.weight, {chain.op.node})


def _multiplications(paired: PairedRun, chain: Chain) -> int:
    """Of one sample."""
    weight, out = paired.analysis.values[chain.op.weight], paired.analysis.values[chain.op.node]
    return int(out[:1].numel() * weight[0].numel())


def _learn(paired: PairedRun, chain: Chain, iterations: int, seconds: float) -> Tensor | None:
    """The rounded weight, or None where nothing is gained."""
    quantizer = paired.roundings.weight_quantizers[chain.weight_key]
    weight: Tensor = paired.float_values[chain.op.weight][0].detach()
    nearest: Tensor = paired.int8_values[chain.op.weight][0]
    inputs: Chunks = [x.detach() for x in paired.int8_values[chain.op.input]]
    tail = [node for node in (chain.batch_norm, None if chain.add else chain.clamp) if node is not None]

    def after_the_layer(y: Tensor, node: fx.Node) -> Tensor:
        for step in tail:
            y = _run(paired, step, {node: y})
            node = step
        return y

    targets = [after_the_layer(y, chain.op.node) for y in paired.float_values[chain.op.node]]

    def error(candidate: Tensor, chunks: list[int]) -> Tensor:
        x = torch.cat([inputs[index] for index in chunks])
        y = _run(paired, chain.op.node, {chain.op.input: x, chain.op.weight: candidate})
        return (after_the_layer(y, chain.op.node) - torch.cat([targets[index] for index in chunks])).square().mean()

    generator = torch.Generator().manual_seed(0)

    def some(candidate: Tensor) -> Tensor:
        return error(candidate, torch.randperm(len(inputs), generator=generator)[:_BATCH].tolist())

    def whole(candidate: Tensor) -> float:
        sizes = [target.numel() for target in targets]
        return sum(float(error(candidate, [index])) * size for index, size in enumerate(sizes))

    rounded = round_learned(weight, quantizer.scale, quantizer.spec, some, iterations, seconds)
    return rounded if whole(rounded) < whole(nearest) else None


def _run(paired: PairedRun, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """What a node makes of ``values``, and for the rest of what INT8 has there."""

    def read(argument: fx.Node) -> Any:
        if argument in values:
            return values[argument]
        if argument in paired.int8_values:
            return paired.int8_values[argument][0]
        return paired.compute(argument, {}, 0)  # a parameter that the graph reads later

    return run_node(node, read, paired.model, lambda target: paired.analysis.captured.read(paired.model, target))
