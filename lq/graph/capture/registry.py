"""The user's own layers, expressed in operators that can be traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    return _frozen_batch_norm if registered is None and _is_frozen_batch_norm(module) else registered


def _is_frozen_batch_norm(module: nn.Module) -> bool:
    """Whether it is the batch norm of detectors, which writes out what a batch norm with fixed statistics computes: of
    torchvision, detectron2, DETR, and all that took it from there."""
    return type(module).__name__ == "FrozenBatchNorm2d" and module._buffers.keys() == _STATISTICS


_STATISTICS = {"weight", "bias", "running_mean", "running_var"}


def _frozen_batch_norm(layer: Any, x: Tensor) -> Tensor:
    eps = getattr(layer, "eps", 1e-5)
    return batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=eps)
