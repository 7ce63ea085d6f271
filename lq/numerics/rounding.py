"""Roundings by name: how a number of steps becomes a whole one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: Takes values in steps of the scale, gives whole numbers of the same shape.
Rounding = Callable[[Tensor], Tensor]

#: The nearest whole number, ties to the even one: what integer kernels do.
NEAREST = "nearest"

_ROUNDINGS: dict[str, Rounding] = {NEAREST: torch.round}


def register_rounding(name: str, rounding: Rounding) -> None:
    """Give a way of rounding weights a name, for ``LayerSpec(weight_rounding=name)``.

    A layer whose weights are rounded so trains with them in QAT (gradients go straight through), runs on INT8 kernels
    and is written to every format, for its weights are whole numbers of steps like all others. Checkpoints have the
    name: register the function before one is loaded.

    Args:
        name: a new name, or one that was registered before, which is replaced.
        rounding: called with the weight divided by its scale, per output channel, so that its largest absolute value
            is the largest integer of the grid (127, or 7 with 4 bits); float32, the weight's shape; gives whole
            numbers of the same shape, which are then clamped to the grid. Gradients are not needed.

    Raises:
        ValueError: where the name is empty, or that of the default.
        TypeError: where ``rounding`` cannot be called.

    Example:
        >>> import lq, torch
        >>> def powers_of_two(steps):  # 0, 1, 2, 4, ... 64, and their negatives
        ...     size = 2.0 ** steps.abs().clamp(min=1.0).log2().round()
        ...     return torch.where(steps.abs() < 0.5, 0.0, steps.sign() * size)
        >>> lq.register_rounding("powers_of_two", powers_of_two)
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
        >>> images = torch.randn(4, 3, 8, 8)
        >>> model = lq.prepare(model, images, overrides={"0": lq.LayerSpec(weight_rounding="powers_of_two")})
        >>> int8 = lq.convert(lq.calibrate(model, [images]))
        >>> "powers_of_two" in int8.report.layers[0].weight
        True
    """
    if not name or name == NEAREST:
        raise ValueError(f"name={name!r} must be a name of your own, and not empty")
    if not callable(rounding):
        raise TypeError(f"rounding={rounding!r} must be a function of a tensor")
    _ROUNDINGS[name] = rounding


def get_rounding(name: str) -> Rounding:
    """The rounding called ``name``.

    Raises:
        ValueError: where none is registered under it.
    """
    if name not in _ROUNDINGS:
        raise ValueError(
            f"weight_rounding={name!r} is unknown; choose one of {', '.join(map(repr, _ROUNDINGS))}, or register it: "
            f"lq.register_rounding({name!r}, function)"
        )
    return _ROUNDINGS[name]


def to_whole(steps: Tensor, name: str) -> Tensor:
    """``steps`` rounded by the rounding called ``name``.

    Raises:
        ValueError: where no rounding has that name, or what it gives are not whole numbers of the same shape.
    """
    if name == NEAREST:
        return torch.round(steps)
    whole = get_rounding(name)(steps)
    if whole.shape != steps.shape or not torch.equal(whole, torch.round(whole)):
        raise ValueError(
            f"weight_rounding={name!r}: its function must give whole numbers of the shape {tuple(steps.shape)} that it "
            f"is given; got {tuple(whole.shape)} with {whole.flatten()[:3].tolist()} ..."
        )
    return whole
