"""Cross-layer equalisation: channels of similar ranges, in float the same network."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lq.analysis.rounding import Rounding
from lq.analysis.samples import model_inputs
from lq.analysis.simulation import Simulator, Values
from lq.graph.analysis import GraphAnalysis
from lq.graph.folding import BatchNormStatistics
from lq.graph.ops import clamp_bounds
from lq.graph.placement import Chain
from lq.numerics.equalization import equalizing_scale, input_ranges, scale_inputs, sum_inputs
from lq.tuning.bias_correction import bias_of
from lq.tuning.paired import called_once, channel_axis, linear_end, parameter_of
from lq.util.modes import evaluating
from lq.workflow.prepare import prepared_forward, unprepared

M = TypeVar("M", bound=nn.Module)

#: How often all pairs are gone through; what changes little by then ends it before.
_ROUNDS, _CHANGE = 20, 1e-3

#: No channel is scaled by more, in all: beyond that, float arithmetic itself suffers.
_MOST = 1e4

#: What a channel before a ReLU6 may grow to on data that were not seen, against those that were.
_HEADROOM = 1.2

#: Samples that the channels before a ReLU6 are watched on.
_NUM_SAMPLES = 64


@dataclass
class _Pair:
    """Two layers with nothing between them but an activation: a channel's scale can move from one to the other.

    Args:
        first, second: the layers.
        first_weight, second_weight: their weights.
        first_scaled: what scales the first one's output with its weight: its batch norm's or its own parameters,
            of shape ``(C, ...)``.
        high: where the activation cuts off above, or None.
    """

    first: Chain
    second: Chain
    first_weight: Tensor
    second_weight: Tensor
    first_scaled: list[Tensor]
    high: float | None


def equalize(
    model: M,
    batches: Iterable[Any],
    *,
    absorb_bias: bool = True,
    forward: Callable[[Any], Any] | None = None,
) -> M:
    """Give the channels between layers similar ranges, which one grid for all of them then serves better.

    Where a layer is read by one other layer alone, with nothing or a ReLU between them, ``relu(x / s) * s = relu(x)``
    for any ``s > 0``: each channel is divided by ``s`` in the first layer and multiplied by it in the second, with
    ``s = sqrt(r1 * r2) / r2`` of the ranges of the weights that make it (batch norm folded) and that read it, until
    they are equal through the whole chain of layers (Nagel et al. 2019, "Data-free quantization through weight
    equalization and bias correction", section 4.1). With ``absorb_bias``, what a channel before a ReLU nearly always
    exceeds, ``c = max(0, beta - 3 * |gamma|)`` of its batch norm, is taken out of it and put into the next layer's
    bias (likewise, section 4.1.3), where that layer pads nothing. In networks with depthwise convolutions, whose
    channels differ most, it matters most.

    A ReLU6 cuts off at 6 whatever the channel's scale. There, a channel is scaled only if it stays below 6 on the data,
    and so that it still does, with a fifth to spare: the network is the same on such data, and nearly so on others.

    Args:
        model: prepared. Its weights and biases are changed in place; ranges that it has are no longer right, so
            calibrate it afterwards.
        batches: see :func:`lq.calibrate`; 64 samples of them are looked at, where there is a ReLU6.
        absorb_bias: whether to do that as well.
        forward: see :func:`lq.calibrate`.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: where ``model`` is not prepared, or ``batches`` has no samples.

    Example:
        >>> import lq, torch, torchvision
        >>> images = torch.randn(8, 3, 32, 32)
        >>> model = lq.prepare(torchvision.models.mobilenet_v2(), images)
        >>> model = lq.calibrate(lq.equalize(model, [images]), [images])
    """
    analysis = prepared_forward(model).analyze()
    pairs = _pairs(model, analysis)
    highest = _highest(model, analysis, pairs, batches, forward)
    with torch.no_grad():
        for _ in range(_ROUNDS):
            changes = [_equalize_pair(pair, analysis, highest.get(id(pair))) for pair in pairs]
            if max(changes, default=0.0) < _CHANGE:
                break
        if absorb_bias:
            for pair in pairs:
                _absorb(model, pair, analysis, highest.get(id(pair)))
    return model


def can_equalize(model: nn.Module) -> bool:
    """Whether a prepared ``model`` has layers whose channels can be equalised."""
    return bool(_pairs(model, prepared_forward(model).analyze()))


def _pairs(model: nn.Module, analysis: GraphAnalysis) -> list[_Pair]:
    chains = called_once(analysis)
    reader_of = {chain.op.input: chain for chain in chains}
    pairs = []
    for first in chains:
        second = reader_of.get(first.end)
        if second is None or first.add is not None or len(first.end.users) != 1:
            continue
        bounds = (0.0, None) if first.clamp is None else clamp_bounds(first.clamp)
        if bounds is None or bounds[0] != 0 or (bounds[1] is not None and bounds[1] <= 0):
            continue
        first_weight = parameter_of(model, first.op.weight, set(first.nodes))
        second_weight = parameter_of(model, second.op.weight, set(second.nodes))
        scaled = _scaled(model, first)
        if first_weight is None or second_weight is None or scaled is None:
            continue
        if second_weight.shape[1] * second.op.groups != first_weight.shape[0]:
            continue  # a linear layer along another axis
        pairs.append(_Pair(first, second, first_weight, second_weight, scaled, bounds[1]))
    return pairs


def _scaled(model: nn.Module, chain: Chain) -> list[Tensor] | None:
    """The parameters that a layer's output is proportional to, taken together; None where they are not its own."""
    nodes = set(chain.nodes)
    wanted = [chain.op.weight, chain.op.bias] if chain.batch_norm is None else list(chain.batch_norm.args[1:3])
    if wanted[0] is None:
        return None
    found = [parameter_of(model, node, nodes) for node in wanted if node is not None]
    return None if any(parameter is None for parameter in found) else [p for p in found if p is not None]


def _norm(pair: _Pair, analysis: GraphAnalysis) -> BatchNormStatistics | None:
    norm = pair.first.batch_norm
    return None if norm is None else BatchNormStatistics.of(norm, analysis.values)


def _equalize_pair(pair: _Pair, analysis: GraphAnalysis, highest: Tensor | None) -> float:
    """Scale a pair; by how much the scales differ from 1."""
    weight = pair.first_weight.flatten(1)
    norm = _norm(pair, analysis)
    factor = torch.ones(len(weight), dtype=torch.float64, device=weight.device) if norm is None else norm.affine()[0]
    first = weight.abs().amax(1).double() * factor.abs()
    second = input_ranges(pair.second_weight, pair.second.op.groups).double()
    scale = equalizing_scale(first, second).clamp(1 / _MOST, _MOST)
    if pair.high is not None:
        assert highest is not None
        free = highest < pair.high
        scale = torch.where(free, torch.maximum(scale, (highest * _HEADROOM / pair.high)), torch.ones_like(scale))
        highest /= scale
    for parameter in pair.first_scaled:
        parameter.div_(scale.to(parameter.dtype).reshape(-1, *[1] * (parameter.dim() - 1)))
    pair.second_weight.copy_(scale_inputs(pair.second_weight, scale.to(weight.dtype), pair.second.op.groups))
    return float((scale - 1).abs().max())


def _absorb(model: nn.Module, pair: _Pair, analysis: GraphAnalysis, highest: Tensor | None) -> None:
    norm = _norm(pair, analysis)
    padding, bias = pair.second.op.padding, bias_of(model, pair.second)
    if norm is None or norm.weight is None or norm.bias is None or pair.first.clamp is None or bias is None:
        return
    if padding not in ("valid", ()) and any(padding):
        return  # at the borders, the next layer sees zeros, and not what is absorbed
    absorbed = (norm.bias.detach() - 3 * norm.weight.detach().abs()).clamp(min=0)
    if pair.high is not None:
        assert highest is not None
        absorbed = torch.where(highest < pair.high, absorbed, torch.zeros_like(absorbed))
    out = sum_inputs(pair.second_weight.double(), absorbed.double(), pair.second.op.groups)
    if pair.second.batch_norm is not None:
        out = out * BatchNormStatistics.of(pair.second.batch_norm, analysis.values).affine()[0]
    pair.first_scaled[-1].sub_(absorbed)
    bias.add_(out.to(bias.dtype))


def _highest(
    model: nn.Module,
    analysis: GraphAnalysis,
    pairs: list[_Pair],
    batches: Iterable[Any],
    forward: Callable[[Any], Any] | None,
) -> dict[int, Tensor]:
    """The largest value of each channel before the activations that cut off above, float64."""
    cut = {linear_end(pair.first): pair for pair in pairs if pair.high is not None}
    if not cut:
        return {}
    highest: dict[int, Tensor] = {}

    def watching(pair: _Pair) -> Callable[[Any], None]:
        def watch(value: Tensor) -> None:
            channels = value.detach().movedim(channel_axis(pair.first), 0).flatten(1).amax(1).double()
            before = highest.get(id(pair))
            highest[id(pair)] = channels if before is None else torch.maximum(before, channels)

        return watch

    chunks = model_inputs(model, batches, _NUM_SAMPLES, forward)
    placeholders = [node for node in analysis.graph.nodes if node.op == "placeholder"]
    with unprepared(model), evaluating(model), torch.no_grad():
        simulator = Simulator(model, analysis.captured)
        plan = simulator.plan(Rounding())
        for chunk in chunks:
            given = Values(made=dict(zip(placeholders, chunk.values(), strict=True)))
            simulator.run(plan, given, watch={node: watching(pair) for node, pair in cut.items()})
    return highest
