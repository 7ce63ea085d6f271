"""Learned rounding on tensors: which weights to round up, and which down, so that what is made of them errs least."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lq.numerics.functional import fake_quantize
from lq.numerics.spec import QuantSpec

#: How far the sigmoid is stretched beyond 0 and 1, so that it gets there (Louizos et al. 2018).
_LOW, _HIGH = -0.1, 1.1

#: The regulariser's exponent goes from the first to the second; before that, for a share of the steps, it is left out.
_BETAS, _WARM_UP = (20.0, 2.0), 0.2

#: Weight of the regulariser against the error, which is 1 for the nearest rounding.
_LAMBDA = 3.0

#: Three times as large as is usual, for a tenth of the usual steps.
_LEARNING_RATE = 3e-2


class Weight(NamedTuple):
    """A weight and the grid that it is rounded to.

    Args:
        value: shape ``(O, ...)``.
        scale: shape ``(O,)``, of a symmetric grid.
        spec: the grid.
    """

    value: Tensor
    scale: Tensor
    spec: QuantSpec

    @property
    def nearest(self) -> Tensor:
        """The value on the grid, each element rounded to its nearest neighbour."""
        return fake_quantize(self.value, self.scale, torch.zeros_like(self.scale, dtype=torch.int32), self.spec)


def round_learned(
    weights: Sequence[Weight], error: Callable[[list[Tensor]], Tensor], iterations: int, seconds: float
) -> list[Tensor]:
    """``weights`` on their grids, each element rounded to one of its two neighbours.

    AdaRound (Nagel et al. 2020, "Up or down? Adaptive rounding for post-training quantization", eq. 21 to 25):
    ``w~ = s * clamp(floor(w / s) + h(V))`` with ``h(V) = clamp(1.2 * sigmoid(V) - 0.1, 0, 1)``, which starts as the
    weight itself, minimises ``error(w~) / error(nearest) + lambda * mean(1 - |2 * h(V) - 1| ** beta)``, with ``beta``
    falling from 20 to 2, by Adam; in the end ``h(V)`` is rounded. Elements at the end of the grid stay
    there: they make the scale.

    Args:
        weights: of one layer, or of several whose roundings are chosen together.
        error: of the outputs with such weights, on some of the data; can be differentiated.
        iterations: steps.
        seconds: the steps end sooner if they would take longer.
    """
    rounded = [_Rounded(weight) for weight in weights]
    elements = sum(one.v.numel() for one in rounded)
    with torch.enable_grad():
        variables = [one.v.requires_grad_() for one in rounded]
        optimizer = torch.optim.Adam(variables, lr=_LEARNING_RATE)
        unit = float(error([weight.nearest for weight in weights]).detach())
        if unit <= 0:
            return [weight.nearest for weight in weights]
        for progress in _steps(iterations, seconds):
            ups = [one.up() for one in rounded]
            loss = error([one.on_grid(up) for one, up in zip(rounded, ups, strict=True)]) / unit
            if progress > _WARM_UP:
                along = (progress - _WARM_UP) / (1 - _WARM_UP)
                beta = _BETAS[0] + (_BETAS[1] - _BETAS[0]) * along
                loss = loss + _LAMBDA / elements * sum((1 - (2 * up - 1).abs().pow(beta)).sum() for up in ups)
            optimizer.zero_grad()
            loss.backward(inputs=variables)  # ``error`` may depend on parameters, whose gradients are the user's
            optimizer.step()
    return [one.on_grid((one.v.detach() >= 0).to(one.v.dtype)) for one in rounded]


class _Rounded:
    """A weight between its neighbours, by a variable ``v`` for each element."""

    def __init__(self, weight: Weight) -> None:
        value, spec = weight.value.detach(), weight.spec
        self._scale = weight.scale.reshape(-1, *[1] * (value.dim() - 1))
        ratio = (value / self._scale).clamp(spec.quant_min, spec.quant_max)
        self._floor = ratio.floor()
        self._fixed = weight.nearest.detach() / self._scale
        self._free = self._fixed.abs().round() < min(-spec.quant_min, spec.quant_max)
        share = ((ratio - self._floor).clamp(0.01, 0.99) - _LOW) / (_HIGH - _LOW)
        self.v = torch.logit(share)

    def up(self) -> Tensor:
        """How far up each element is, in [0, 1]."""
        return (torch.sigmoid(self.v) * (_HIGH - _LOW) + _LOW).clamp(0, 1)

    def on_grid(self, up: Tensor) -> Tensor:
        return torch.where(self._free, self._floor + up, self._fixed) * self._scale


def _steps(iterations: int, seconds: float) -> Iterator[float]:
    """How far each step is, in [0, 1): by number or by time, whichever is farther."""
    begun = time.perf_counter()
    for step in range(iterations):
        elapsed = time.perf_counter() - begun
        if elapsed >= seconds:
            return
        yield max(step / iterations, elapsed / seconds)
