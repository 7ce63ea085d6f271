"""The user's own layers, expressed in operators that can be traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

#: What a layer of that class computes, as a function of the layer and of its inputs.
_REGISTERED: dict[type[nn.Module], Callable[..., Any]] = {}


def register_layer(cls: type[nn.Module], forward: Callable[..., Any]) -> None:
    """Express what a layer computes in operators that can be traced, so that it is quantized.

    For a layer whose own forward cannot be captured as a graph: its own C++ code, control flow that depends on
    data, a hand-fused kernel. Without this it stays in float. The function replaces the forward
    wherever a model with such a layer is prepared, in training as well, and :func:`lq.prepare` checks that the model
    computes the same.

    Args:
        cls: class of the layer; subclasses are registered on their own.
        forward: ``forward(layer, *inputs)``, with the parameters of ``layer`` and operators of ``torch.nn.functional``.

    Raises:
        TypeError: where ``cls`` is not a subclass of ``nn.Module``, or ``forward`` cannot be called.

    Example:
        >>> import lq, torch
        >>> from torch import nn
        >>> class Standardized(nn.Conv2d):
        ...     def forward(self, x):
        ...         if x.sum() > 1e9:  # depends on data: not to be traced
        ...             raise ValueError("too bright")
        ...         return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)
        >>> def compute(layer, x):
        ...     return nn.functional.conv2d(x, layer.weight - layer.weight.mean(), layer.bias)
        >>> lq.register_layer(Standardized, compute)
        >>> model = lq.prepare(nn.Sequential(Standardized(3, 8, 3)), torch.randn(2, 3, 8, 8))
        >>> [layer.precision for layer in lq.report(model).layers if "conv" in layer.kind]
        ['int8']
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"cls={cls!r} must be a subclass of nn.Module")
    if not callable(forward):
        raise TypeError(f"forward={forward!r} must be a function of the layer and its inputs")
    _REGISTERED[cls] = forward


def registered_forward(module: nn.Module) -> Callable[..., Any] | None:
    """What was registered for the class of ``module``, or None."""
    return _REGISTERED.get(type(module))
