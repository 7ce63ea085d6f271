"""Learned rounding on tensors: which weights of a layer to round up, and which down, so that its outputs err least."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

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


def round_learned(
    weight: Tensor,
    scale: Tensor,
    spec: QuantSpec,
    error: Callable[[Tensor], Tensor],
    iterations: int,
    seconds: float,
) -> Tensor:
    """``weight`` on its grid, each element rounded to one of its two neighbours.

    AdaRound (Nagel et al. 2020, "Up or down? Adaptive rounding for post-training quantization", eq. 21 to 25):
    ``w~ = s * clamp(floor(w / s) + h(V))`` with ``h(V) = clamp(1.2 * sigmoid(V) - 0.1, 0, 1)``, which starts as the
    weight itself, minimises ``error(w~) / error(nearest) + lambda * mean(1 - |2 * h(V) - 1| ** beta)``, with ``beta``
    falling from 20 to 2, by Adam; in the end ``h(V)`` is rounded. Elements at the end of the grid stay
    there: they make the scale.

    Args:
        weight: shape ``(O, ...)``.
        scale: shape ``(O,)``, of a symmetric grid.
        spec: the grid.
        error: of the layer's outputs with a weight, on some of the data; can be differentiated.
        iterations: steps.
        seconds: the steps end sooner if they would take longer.
    """
    column = scale.reshape(-1, *[1] * (weight.dim() - 1))
    ratio = (weight.detach() / column).clamp(spec.quant_min, spec.quant_max)
    floor = ratio.floor()
    nearest = fake_quantize(weight.detach(), scale, torch.zeros_like(scale, dtype=torch.int32), spec)
    fixed = nearest / column
    free = fixed.abs().round() < min(-spec.quant_min, spec.quant_max)
    share = ((ratio - floor).clamp(0.01, 0.99) - _LOW) / (_HIGH - _LOW)

    def grid(up: Tensor) -> Tensor:
        return torch.where(free, floor + up, fixed) * column

    with torch.enable_grad():
        v = torch.logit(share).requires_grad_()
        optimizer = torch.optim.Adam([v], lr=_LEARNING_RATE)
        unit = float(error(nearest).detach())
        if unit <= 0:
            return nearest
        for progress in _steps(iterations, seconds):
            up = (torch.sigmoid(v) * (_HIGH - _LOW) + _LOW).clamp(0, 1)
            loss = error(grid(up)) / unit
            if progress > _WARM_UP:
                along = (progress - _WARM_UP) / (1 - _WARM_UP)
                beta = _BETAS[0] + (_BETAS[1] - _BETAS[0]) * along
                loss = loss + _LAMBDA * (1 - (2 * up - 1).abs().pow(beta)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return grid((v.detach() >= 0).to(weight.dtype))


def _steps(iterations: int, seconds: float) -> Iterator[float]:
    """How far each step is, in [0, 1): by number or by time, whichever is farther."""
    begun = time.perf_counter()
    for step in range(iterations):
        elapsed = time.perf_counter() - begun
        if elapsed >= seconds:
            return
        yield max(step / iterations, elapsed / seconds)
