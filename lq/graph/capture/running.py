"""A module's forward, hooks included, run under a tracker of its calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

from lq.graph.capture import leaves
from lq.graph.capture.calls import UNKNOWN, CallTracker, FollowedForward, Positions, followed
from lq.graph.capture.registry import registered_forward
from lq.graph.capture.signature import signature_of
from lq.interface.guards import input_name


class Recorder(CallTracker):
    """Runs a forward as it is, and keeps what its calls return.

    Args:
        root: see :class:`CallTracker`.
        positions: likewise.
        values: whether to keep the values of functions, too, by position.
    """

    def __init__(self, root: nn.Module, positions: Positions, *, values: bool = False) -> None:
        super().__init__(root, positions, adds=True, start=(UNKNOWN, ""))
        self.calls: dict[int, leaves.Shapes] = {}
        self.values: dict[int, Tensor] | None = {} if values else None
        self.registered: set[str] = set()

    def on_module(self, followed: FollowedForward, position: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if registered_forward(followed.module) is not None:
            self.registered.add(type(followed.module).__name__)
        inputs = leaves.shapes((args, kwargs))  # before the forward can write to them
        result = followed.run(*args, **kwargs)
        self.calls[position] = leaves.Shapes(inputs, *leaves.flatten_shapes(result))
        return result

    def on_function(
        self, function: Callable[..., Any], position: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        result = function(*args, **kwargs)
        if self.values is not None and position != UNKNOWN and isinstance(result, Tensor):
            self.values[position] = result.detach().clone()
        return result


class Arguments:
    """The arguments of a call, split into tensors and the rest."""

    def __init__(self, module: nn.Module, inputs: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        own = module.__dict__.get("forward")
        own = getattr(own, "own", own)
        self._signature = signature_of(module, own)
        self._settings = settings
        paths, self._spec = pytree.tree_flatten_with_path(dict(inputs))
        self._values = [value for _, value in paths]
        #: For each tensor the argument's name and the keys within.
        self.paths = [leaves.keys_of(path) for path, value in paths if isinstance(value, Tensor)]
        self.names = [input_name(path) for path, value in paths if isinstance(value, Tensor)]
        self.tensors = tuple(value for value in self._values if isinstance(value, Tensor))

    def call(self, tensors: Iterable[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = iter(tensors)
        values = [next(given) if isinstance(value, Tensor) else value for value in self._values]
        return self._signature.arguments({**pytree.tree_unflatten(values, self._spec), **self._settings})


def call_arguments(
    module: nn.Module, inputs: Mapping[str, Any], settings: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``(args, kwargs)`` of a call of ``module`` with these values of its forward's parameters."""
    arguments = Arguments(module, inputs, settings)
    return arguments.call(arguments.tensors)


class Shell(nn.Module):
    """Replaces a TorchScript module, whose forward cannot be changed and which torch.export does not enter."""

    def __init__(self, scripted: nn.Module) -> None:
        super().__init__()
        self.scripted: Callable[..., Any]
        self.__dict__["scripted"] = scripted  # not a child: its parameters stay hidden

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(leaf, FakeTensor) for leaf in pytree.tree_leaves((args, kwargs))):
            raise NotImplementedError("it is compiled by TorchScript")
        return self.scripted(*args, **kwargs)


@contextmanager
def _scripted_in_shells(module: nn.Module) -> Iterator[None]:
    held = [
        (parent, name, child)
        for parent in list(module.modules())
        if not isinstance(parent, torch.jit.ScriptModule)
        for name, child in parent._modules.items()
        if isinstance(child, torch.jit.ScriptModule)
    ]
    try:
        for parent, name, child in held:
            parent._modules[name] = Shell(child)
        yield
    finally:
        for parent, name, child in held:
            parent._modules[name] = child


@contextmanager
def followed_whole(module: nn.Module) -> Iterator[None]:
    """Inside the context, a :class:`CallTracker` sees the forward of ``module`` and those of its submodules."""
    replaced = module.__dict__.get("forward")
    with _scripted_in_shells(module), followed(module):
        whole = FollowedForward(module, module, "")
        whole.own = getattr(replaced, "own", replaced)
        module.forward = whole
        try:
            yield
        finally:
            del module.forward
            if replaced is not None:
                module.forward = replaced


def run_followed(
    module: nn.Module, tracker: CallTracker, inputs: Mapping[str, Any], settings: Mapping[str, Any]
) -> Any:
    """Call ``module``, hooks and all, under ``tracker``."""
    with followed_whole(module):
        args, kwargs = call_arguments(module, inputs, settings)
        with tracker:
            return module(*args, **kwargs)
