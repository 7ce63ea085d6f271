"""The user's own layers, expressed in operators that can be traced."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

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
    registered = _REGISTERED.get(type(module))
    return _frozen_batch_norm if registered is None and _epsilon_of(module) is not None else registered


_STATISTICS = {"weight", "bias", "running_mean", "running_var"}

#: What is added to the variance by those that were looked at; None for one that computes something else.
_EPSILONS: WeakKeyDictionary[nn.Module, float | None] = WeakKeyDictionary()


def _epsilon_of(module: nn.Module) -> float | None:
    """The epsilon of a batch norm of detectors, which writes out what one with fixed statistics computes; None of any
    other module.

    torchvision and detectron2 have it as an attribute, DETR as a number in its forward, and maskrcnn-benchmark none.
    """
    if type(module).__name__ != "FrozenBatchNorm2d" or module._buffers.keys() != _STATISTICS:
        return None
    if module not in _EPSILONS:
        _EPSILONS[module] = _fitting_epsilon(module)
    return _EPSILONS[module]


def _fitting_epsilon(module: Any) -> float | None:
    x = torch.ones(1, len(module.weight), 1, 1, dtype=module.weight.dtype, device=module.weight.device)
    with torch.no_grad(), suppress(Exception):
        expected = type(module).forward(module, x)
        for eps in (getattr(module, "eps", 1e-5), 0.0):
            if torch.allclose(_batch_norm(module, x, eps), expected, rtol=1e-4, atol=1e-4):
                return float(eps)
    return None


def _batch_norm(layer: Any, x: Tensor, eps: float) -> Tensor:
    return batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=eps)


def _frozen_batch_norm(layer: Any, x: Tensor) -> Tensor:
    return _batch_norm(layer, x, _EPSILONS[layer] or 0.0)
