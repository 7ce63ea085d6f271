"""The quantizer: the one module that is put on a tensor of the graph."""

from __future__ import annotations

import enum
from collections.abc import Callable
from contextlib import suppress
from typing import Literal

import torch
from torch import Tensor, nn

from lq.numerics.calibrators import Calibrator, MinMax, default_calibrator, get_calibrator
from lq.numerics.functional import choose_qparams, fake_quantize
from lq.numerics.observers import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageObserver,
    Observer,
    SmallestErrorObserver,
)
from lq.numerics.spec import QuantSpec

#: How the range of a weight is found, see :func:`weight_quantizer`.
WeightRange = Literal["minmax", "mse"]


class QuantizerState(enum.IntFlag):
    """What a quantizer does to the tensor that passes through it."""

    OFF = 0
    OBSERVE = 1
    FAKE_QUANTIZE = 2


class Quantizer(nn.Module):
    """Watches a tensor and, once it has a range, rounds it to the grid of ``spec``.

    It holds buffers only, no parameters, so that optimizers and gradient synchronisation do not see it. What it is
    doing (its :class:`QuantizerState`, whether it has a range, and from which calibrator) travels in the state dict as
    a small tensor.

    Args:
        spec: the integer grid.
        observer: collects the statistics the range is computed from.
        calibrator: computes the range from them; by default the one that goes with the observer.
        rounds: False for a tensor that only targets other than the model's own quantize: it is watched, so that the
            model can be converted for them too, but never rounded.
        own_calibrator: used whatever the other quantizers are calibrated with.

    Raises:
        ValueError: where the observer does not collect what ``own_calibrator`` needs.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        spec: QuantSpec,
        observer: Observer,
        calibrator: Calibrator | None = None,
        rounds: bool = True,
        own_calibrator: Calibrator | None = None,
    ) -> None:
        super().__init__()
        if own_calibrator is not None:
            own_calibrator.check(observer)
        self.spec = spec
        self.rounds = rounds
        self.observer = observer
        self.own_calibrator = own_calibrator
        self.calibrator = own_calibrator or calibrator or default_calibrator(observer)
        self.state = QuantizerState.OFF
        self.calibrated = False
        low, _ = observer.range()
        # 0, which no range gives, marks that there is none yet: averages of models (EMA) copy buffers but not flags.
        self.register_buffer("scale", torch.zeros_like(low))
        self.register_buffer("zero_point", torch.zeros_like(low, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        if self._observes(x):
            self.observer(x)
            if self.state & QuantizerState.FAKE_QUANTIZE and self.rounds:
                self.update_qparams()
        return self.round(x)

    def round(self, x: Tensor) -> Tensor:
        """``x`` on the grid, if this quantizer rounds now; its range is not changed."""
        if self.state & QuantizerState.FAKE_QUANTIZE and self.calibrated and self.rounds:
            return fake_quantize(x, self.scale, self.zero_point, self.spec)
        return x

    def _observes(self, x: Tensor) -> bool:
        # While it rounds, it learns only from training batches: validation data must not move the ranges.
        if not self.state & QuantizerState.OBSERVE or x.numel() == 0:
            return False
        return self.training or not self.state & QuantizerState.FAKE_QUANTIZE

    @torch.no_grad()
    def update_qparams(self) -> None:
        """Recompute scale and zero point from the observer's statistics.

        Raises:
            ValueError: where the observer does not hold what the calibrator needs.
        """
        self.set_range(*self.calibrator(self.observer, self.spec))

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Let the grid cover ``[low, high]``, each of shape ``()`` or ``(C,)``."""
        scale, zero_point = choose_qparams(low, high, self.spec)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        self.calibrated = True

    def quantized_range(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest real value on the grid, each of shape ``()`` or ``(C,)``."""
        low = (self.spec.quant_min - self.zero_point) * self.scale
        high = (self.spec.quant_max - self.zero_point) * self.scale
        return low, high

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        # A model in 16 bits (``.half()``, "true" half precision) still has ranges in float32.
        def without_cast(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(without_cast, recurse)
        return self

    def get_extra_state(self) -> Tensor:
        return torch.tensor([int(self.state), int(self.calibrated), *str(self.calibrator).encode()], dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        flags, calibrated, *name = state.tolist()
        self.state = QuantizerState(flags)
        self.calibrated = bool(calibrated) or bool((self.scale > 0).any())
        if bytes(name).decode() != str(self.calibrator):  # otherwise it may have parameters that its name does not show
            with suppress(ValueError):  # the user's own calibrator cannot be looked up by name: the present one stays
                self.calibrator = get_calibrator(bytes(name).decode())

    def extra_repr(self) -> str:
        watched = "" if self.rounds else ", watched for other targets"
        return f"{self.spec}, calibrator={self.calibrator}, state={self.state.name}{watched}"


class WeightQuantizer(Quantizer):
    """A quantizer whose tensor is always available: it recomputes the range each time it sees the weight.

    An optimizer step or a loaded checkpoint changes the weight, so an earlier range would be stale; only a
    frozen one (state without ``OBSERVE``) is kept.
    """

    def _observes(self, x: Tensor) -> bool:
        return bool(self.state & QuantizerState.OBSERVE)

    def forward(self, x: Tensor) -> Tensor:
        if self._observes(x):
            self.observer.reset()
        return super().forward(x)

    @property
    def range(self) -> WeightRange:
        """See :func:`weight_quantizer`."""
        return "mse" if isinstance(self.observer, SmallestErrorObserver) else "minmax"

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> None:
        """Bring scale and zero point up to date with ``weight``, unless they are frozen."""
        if self._observes(weight) or not self.calibrated:
            self.observer.reset()
            self.observer(weight)
            self.update_qparams()


def activation_quantizer(
    spec: QuantSpec, observer: str, rounds: bool = True, own_calibrator: Calibrator | None = None
) -> Quantizer:
    """A per-tensor quantizer with the observer called ``observer``, one of :data:`ACTIVATION_OBSERVERS`."""
    return Quantizer(spec, ACTIVATION_OBSERVERS[observer](), rounds=rounds, own_calibrator=own_calibrator)


def weight_quantizer(spec: QuantSpec, weight: Tensor, range: WeightRange = "minmax") -> WeightQuantizer:
    """A quantizer for ``weight``, on the weight's device.

    Args:
        spec: the grid.
        weight: the tensor.
        range: what the grid covers: ``"minmax"``, all values; ``"mse"``, those with which the rounded weight is
            nearest.
    """
    channels = 1 if spec.ch_axis is None else weight.shape[spec.ch_axis]
    observer = MinMaxObserver(spec.ch_axis, channels) if range == "minmax" else SmallestErrorObserver(spec, channels)
    return WeightQuantizer(spec, observer, MinMax()).to(weight.device)


ACTIVATION_OBSERVERS: dict[str, Callable[[], Observer]] = {
    "minmax": MinMaxObserver,
    "moving_average": MovingAverageObserver,
    "histogram": HistogramObserver,
}
