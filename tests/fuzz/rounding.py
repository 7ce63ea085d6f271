"""How far two right implementations of one quantized network may be apart.

Two implementations sum in different orders, and fold or round a bias differently, so a value that lies between two
integers becomes the one here and the other there; layers that follow make any size of difference of that. No fixed
tolerance on the outputs tells this from a fault: one that lets the first pass is blind to the second. So two things are
measured. :func:`amplification` is what the network itself makes of roundings: its outputs where a small share of them,
at every quantizer, went the other way. A :class:`Guide` takes roundings out of the comparison: each tensor of integers
that an implementation computes is compared with the one expected there, and then replaced by it, so that every layer
reads what it would have read and is judged alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lq

#: Noise in front of each quantizer, in steps of its grid to either side: it turns a twentieth of the roundings over,
#: a hundred times as many as two implementations do.
NOISE = 0.05

#: Draws of the noise; the largest of their differences is the bound, times the factors below.
DRAWS = 8

#: Noise on sums, as a share of the largest: a bias is rounded to the grid of the sum that it is added to.
BIAS_NOISE = 2e-4

_SUMS = {f"aten::{name}" for name in ("convolution", "addmm", "mm", "bmm", "linear")}

#: Least number of steps, in the mean, by which integers differ that are not meant to be the same.
_OTHER = 0.5


def activation_quantizers(model: nn.Module) -> list[Any]:
    """Those of the tensors that flow, without those of weights, which have a range for each channel."""
    return [quantizer for quantizer in lq.quantizers(model).values() if quantizer.spec.ch_axis is None]


@contextmanager
def noisy(model: nn.Module, seed: int, noise: float = NOISE) -> Iterator[None]:
    """Inside, roundings of the prepared model go the other way here and there."""
    generator = torch.Generator().manual_seed(seed)

    def shake(quantizer: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        shaken = x + (torch.rand(x.shape, generator=generator) * 2 - 1) * noise * quantizer.scale
        # Zeros are zeros to every implementation: what padding and ReLU make is no rounding.
        return (torch.where(x == 0, x, shaken), *inputs[1:])

    with ExitStack() as stack:
        for quantizer in activation_quantizers(model):
            stack.callback(quantizer.register_forward_pre_hook(shake).remove)
        yield


def grids(model: nn.Module) -> set[tuple[float, int]]:
    """Scales and zero points of a calibrated model's activations."""
    return {(float(q.scale), int(q.zero_point)) for q in activation_quantizers(model)}


def outputs_of(model: Any, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad():
        return [value.clone() for value in tree_leaves(model(*(x.clone() for x in inputs)))]


def amplification(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[tuple[float, float]]:
    """For each output of a calibrated model, the root mean square and the largest difference that roundings make."""
    return _largest(model, inputs, lambda draw: noisy(model, draw), outputs_of(model, inputs))


def float_amplification(
    int8: nn.Module, inputs: tuple[Tensor, ...], integers: list[Tensor]
) -> list[tuple[float, float]]:
    """The same of the float operators of an INT8 network's simulation alone, all integers being those expected."""
    with Guide(integers):
        calm = outputs_of(int8, inputs)
    return _largest(int8, inputs, lambda draw: Guide(integers, shaken=draw), calm)


def share_turned(int8: nn.Module, inputs: tuple[Tensor, ...], integers: list[Tensor]) -> tuple[float, int]:
    """The largest share of a tensor's integers that rounding of biases turns over, and the largest distance."""
    with Guide(integers) as calm:
        outputs_of(int8, inputs)
    worst = (0.0, 0)
    for draw in range(DRAWS):
        with Guide(integers, shaken=draw) as shaken:
            outputs_of(int8, inputs)
        for one, other in zip(shaken.computed, calm.computed, strict=True):
            steps = (one - other).abs()
            worst = (max(worst[0], float((steps > 0).float().mean())), max(worst[1], int(steps.max())))
    return worst


def _largest(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    disturb: Callable[[int], AbstractContextManager[Any]],
    calm: list[Tensor],
) -> list[tuple[float, float]]:
    worst = [(0.0, 0.0)] * len(calm)
    for draw in range(DRAWS):
        with disturb(draw):
            shaken = outputs_of(model, inputs)
        errors = [distance(one, other) for one, other in zip(shaken, calm, strict=True)]
        worst = [(max(a, c), max(b, d)) for (a, b), (c, d) in zip(worst, errors, strict=True)]
    return worst


def distance(one: Tensor, other: Tensor) -> tuple[float, float]:
    """Root mean square and largest difference."""
    error = torch.nan_to_num((one.double() - other.double()).abs(), nan=float("inf"))
    return float(error.square().mean().sqrt()), float(error.max())


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, a calibrated model leaves the integers of its tensors in the list, as its quantizers round them."""
    integers: list[Tensor] = []

    def keep(quantizer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if quantizer.rounds:
            integers.append((output / quantizer.scale).round().int() + quantizer.zero_point)

    with ExitStack() as stack:
        for quantizer in activation_quantizers(model):
            stack.callback(quantizer.register_forward_hook(keep).remove)
        yield integers


def _lies_on_grid(x: Tensor, scale: float) -> bool:
    steps = x / scale
    return bool((steps - steps.round()).abs().max() < 1e-3)


class Guide(TorchDispatchMode):
    """Replaces the integers that an INT8 network computes by those expected, wherever it knows which these are.

    Args:
        expected: integers of the network's tensors, in any order: the nearest of the same shape is taken, if it is
            near. Kernels that take unsigned integers alone have those of signed ones shifted by 128.
        shaken: seed of noise on the sums of convolutions and linear layers, or None: what rounding of their biases
            does, and what becomes of that in float operators up to the next integers or the output.

    Attributes:
        computed: the integers that the network computes, in the order in which it does.
        found: those that it goes on with.
        worst: of a replaced tensor, the largest share of integers that were others, how many those were, and the
            largest distance in steps.
        lost: tensors of a shape that some are expected of, and near to none of them; but for those that are joined to
            one that is expected.
        grids: scales and zero points of the quantize operators, where there are such.
    """

    def __init__(self, expected: list[Tensor], shaken: int | None = None) -> None:
        super().__init__()
        self.generator = None if shaken is None else torch.Generator().manual_seed(shaken)
        self.expected = expected
        self.computed: list[Tensor] = []
        self.found: list[Tensor] = []
        self.worst: tuple[float, int, int] = (0.0, 0, 0)
        self.replaced = 0
        self._lost: list[Tensor] = []
        self.grids: set[tuple[float, int]] = set()

    @property
    def lost(self) -> int:
        return len(self._lost)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.generator is not None and isinstance(result, Tensor) and func.name() in _SUMS:
            # One number for each channel: over many pixels a rounded bias does not average out.
            channels = 1 if func.name() == "aten::convolution" else result.dim() - 1
            shape = [size if axis == channels else 1 for axis, size in enumerate(result.shape)]
            noise = torch.rand(shape, generator=self.generator) * 2 - 1
            return result + noise * BIAS_NOISE * result.abs().max()
        if not isinstance(result, Tensor) or result.dtype not in (torch.uint8, torch.int8):
            return result
        made = str(func)
        if result.layout is not torch.strided or "prepack" in made:
            return result  # a weight in a kernel's own layout
        if made.startswith("aten.cat"):  # kernels write the parts of a concatenation on its grid
            parts = [lost for lost in self._lost if any(lost is part for part in args[0])]
            if parts:
                self._lost = [lost for lost in self._lost if not any(lost is part for part in parts)]
                self._replace(result)
            return result
        if not ("quantize_per_tensor" in made or "_to_copy" in made or made.startswith("onednn")):
            return result  # a view, a pool: integers that are there already
        self.computed.append(result.int().clone())
        moved = False
        if "quantize_per_tensor" in made:
            self.grids.add((float(args[1]), int(args[2])))
            moved = _lies_on_grid(args[0], float(args[1]))
        if not moved:  # integers that were only moved, such as by a transpose, need not be among those expected
            self._replace(result)
        self.found.append(result.int().clone())
        return result

    def _replace(self, result: Tensor) -> None:
        signed = self._nearest(result)
        if signed is None:
            return
        steps = (result.int() - signed).abs()
        if float(steps.float().mean()) > _OTHER:
            self._lost.append(result)
            return
        self.replaced += 1
        others = int((steps > 0).sum())
        self.worst = max(self.worst, (others / steps.numel(), others, int(steps.max())))
        result.copy_(signed.to(result.dtype))

    def _nearest(self, result: Tensor) -> Tensor | None:
        same = [wanted for wanted in self.expected if wanted.shape == result.shape]
        shifts = (0, 128) if result.dtype is torch.uint8 else (0,)
        near = [wanted + shift for wanted in same for shift in shifts]
        return min(near, key=lambda wanted: float((result.int() - wanted).abs().float().mean()), default=None)
