"""How a module is called: which arguments of its forward carry tensors and which are settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map


def _carries_tensor(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value))


def _with_tensors(value: Any) -> Any:
    """``value`` with a tensor for each numpy array in it."""
    if isinstance(value, torch.Tensor):
        return value
    return tree_map(lambda leaf: torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf, value)


def settings_key(settings: Mapping[str, Any]) -> tuple[Any, ...]:
    """A key for a cache by the settings of a call: lists and dicts among them by what is in them."""
    leaves, spec = tree_flatten(dict(settings))
    return (str(spec), *(leaf if _is_hashable(leaf) else repr(leaf) for leaf in leaves))


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


class CallSignature:
    """Splits the arguments of a call into tensors, which a graph takes as inputs, and settings, which it bakes in.

    An argument that is a tensor, or a list, tuple or dict with a tensor in it, is an input; numpy arrays become
    tensors. Every other one (a flag, a size, None) changes which graph there is.

    Args:
        forward: the forward as the module's class has it, with ``self`` as its first parameter.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        signature = inspect.signature(forward)
        self._signature = signature.replace(parameters=list(signature.parameters.values())[1:])

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """``(inputs, settings)`` by parameter name, in the order of the forward; defaults are filled in.

        Raises:
            TypeError: where the arguments do not fit the forward, or it takes tensors through ``*args``.
        """
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        inputs: dict[str, Any] = {}
        settings: dict[str, Any] = {}
        for name, given in bound.arguments.items():
            value = _with_tensors(given)
            variadic = self._signature.parameters[name].kind in (
                inspect.Parameter.VAR_POSITIONAL,
                inspect.Parameter.VAR_KEYWORD,
            )
            if variadic and value:
                raise TypeError(
                    f"the forward takes {name!r} as *args or **kwargs, which cannot be captured as a graph; "
                    f"give its inputs names"
                )
            if variadic:
                continue
            (inputs if _carries_tensor(value) else settings)[name] = value
        return inputs, settings
