"""How a module is called: which arguments of its forward carry tensors and which are settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map


def _carries_tensor(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value))


def _with_tensors(value: Any) -> Any:
    """``value`` with each numpy array in it turned into a tensor."""
    if isinstance(value, torch.Tensor):
        return value
    return tree_map(lambda leaf: torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf, value)


def signature_of(module: nn.Module, own: Callable[..., Any] | None) -> CallSignature:
    """How ``module`` is called.

    Args:
        module: the module.
        own: a forward that was set on the object, which runs in place of the class's.
    """
    return CallSignature(type(module).forward) if own is None else CallSignature(own, takes_self=False)


class CallSignature:
    """Splits the arguments of a call into tensors, which a graph takes as inputs, and settings, which it bakes in.

    An argument that is a tensor, or a list, tuple or dict with a tensor in it, is an input; what a forward takes as
    ``*args`` or ``**kwargs`` is one tuple or dict. Numpy arrays
    become tensors. Every other argument (a flag, a size, None) is a setting: it changes the graph.

    Args:
        forward: the forward as the module's class has it, with ``self`` as its first parameter.
        takes_self: False for a forward that was set on the module itself.
    """

    def __init__(self, forward: Callable[..., Any], *, takes_self: bool = True) -> None:
        signature = inspect.signature(forward)
        parameters = list(signature.parameters.values())
        parameters = parameters[1:] if takes_self else parameters
        self._signature = signature.replace(parameters=parameters)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """``(inputs, settings)`` by parameter name, in the order of the forward; defaults are filled in.

        Raises:
            TypeError: where the arguments do not fit the forward.
        """
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        inputs: dict[str, Any] = {}
        settings: dict[str, Any] = {}
        for name, given in bound.arguments.items():
            value = _with_tensors(given)
            (inputs if _carries_tensor(value) else settings)[name] = value
        return inputs, settings

    def arguments(self, values: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``(args, kwargs)`` of a call from the values of its parameters by name: the inverse of :meth:`bind`."""
        bound = inspect.BoundArguments(
            self._signature,
            {  # type: ignore[arg-type]
                name: values[name] for name in self._signature.parameters if name in values
            },
        )
        return bound.args, bound.kwargs
