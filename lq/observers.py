"""Observers collect statistics of a tensor; what range follows from them is asked afterwards."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Observer(nn.Module):
    """Base of the observers: running ``min_val`` and ``max_val`` as float32 buffers, ``+inf`` / ``-inf`` before data.

    The statistics live where the module lives, and nothing here waits for the device.

    Args:
        ch_axis: the axis that keeps statistics of its own for each index, or None for one range per tensor.
        num_channels: length of that axis; needed with ``ch_axis`` so that state dicts have one shape always.
    """

    min_val: Tensor
    max_val: Tensor

    def __init__(self, ch_axis: int | None = None, num_channels: int = 1) -> None:
        super().__init__()
        self.ch_axis = ch_axis
        self._shape = () if ch_axis is None else (num_channels,)
        self.register_buffer("min_val", torch.full(self._shape, torch.inf))
        self.register_buffer("max_val", torch.full(self._shape, -torch.inf))

    def reset(self) -> None:
        """Forget everything seen."""
        self.min_val.fill_(torch.inf)
        self.max_val.fill_(-torch.inf)

    def range(self) -> tuple[Tensor, Tensor]:
        """The observed ``(min, max)``, each of shape ``()`` or ``(C,)``."""
        return self.min_val, self.max_val

    @torch.no_grad()
    def forward(self, x: Tensor) -> None:
        """Watch ``x``; an empty tensor tells nothing and changes nothing."""
        if x.numel():
            self._update(*self._min_max(x.detach()))

    def _min_max(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.ch_axis is None:
            low, high = torch.aminmax(x)
        else:
            low, high = torch.aminmax(x.movedim(self.ch_axis, 0).flatten(1), dim=1)
        return low.float(), high.float()

    def _update(self, low: Tensor, high: Tensor) -> None:
        raise NotImplementedError


class MinMaxObserver(Observer):
    """The smallest and the largest value of everything seen.

    Example:
        >>> import torch
        >>> observer = MinMaxObserver()
        >>> observer(torch.tensor([-1.0, 2.0])); observer(torch.tensor([0.0, 3.0]))
        >>> [v.item() for v in observer.range()]
        [-1.0, 3.0]
    """

    def _update(self, low: Tensor, high: Tensor) -> None:
        # minimum/maximum hand a NaN on, so one NaN in calibration is still there when the range is asked for.
        self.min_val.copy_(torch.minimum(self.min_val, low))
        self.max_val.copy_(torch.maximum(self.max_val, high))


class MovingAverageObserver(Observer):
    """Exponential moving average of each batch's min and max (Jacob et al. 2018, section 3.1).

    ``m = m + c * (batch - m)``, starting at the first batch.

    Args:
        averaging_constant: ``c``, the weight of a new batch, in ``(0, 1]``.
        ch_axis: see :class:`Observer`.
        num_channels: see :class:`Observer`.

    Raises:
        ValueError: where ``averaging_constant`` is outside ``(0, 1]``.
    """

    def __init__(self, averaging_constant: float = 0.01, ch_axis: int | None = None, num_channels: int = 1) -> None:
        if not 0.0 < averaging_constant <= 1.0:
            raise ValueError(f"averaging_constant={averaging_constant} must be in (0, 1]")
        super().__init__(ch_axis, num_channels)
        self.averaging_constant = averaging_constant

    def _update(self, low: Tensor, high: Tensor) -> None:
        # `where` and not `if`: asking a tensor on a GPU for its value would wait for the whole queue. Only before the
        # first batch is the minimum above the maximum, so an infinity in the data stays to be found, like a NaN.
        first = self.min_val > self.max_val
        for average, batch in ((self.min_val, low), (self.max_val, high)):
            average.copy_(torch.where(first, batch, average + self.averaging_constant * (batch - average)))
