"""Which modules a piece of the user's code calls, by whatever spelling, and with what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lq.graph.ops import WEIGHTED_MODULES

#: The user's own steps that a batch is for.
Step = Literal["training_step", "validation_step"]

#: The module that ``torch.compile(module)`` wraps, as a child of the wrapper.
COMPILED = "_orig_mod"

#: A tensor, and how often it had been written to.
_Seen = tuple[Tensor, int]

#: What makes the same values of a tensor, where it keeps the type.
_MOVES = frozenset({Tensor.clone, Tensor.contiguous, Tensor.cpu, Tensor.cuda, Tensor.detach, Tensor.float, Tensor.to})

#: The values of calls are kept down to this depth: that of a LightningModule's forward and of what it calls.
_VALUES_DEPTH = 2


def has_weighted_layers(module: nn.Module) -> bool:
    return any(isinstance(submodule, WEIGHTED_MODULES) for submodule in module.modules())


class Listener(Protocol):
    """Hears of calls."""

    def begin(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call begins; before the hooks of the user's own, which are part of the module."""

    def end(self, path: str, output: Any) -> None:
        """It has ended."""


class _Watched:
    """Stands in for a module's forward: a hook would not hear of ``module.forward(x)``.

    Args:
        module: the module.
        path: its path.
        listener: who is told.
    """

    def __init__(self, module: nn.Module, path: str, listener: Listener) -> None:
        self._forward = module.forward
        self._path = path
        self._listener = listener
        self._told = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._forward, name)  # a prepared module's forward is asked for more than to run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._told:
            self._told = False
            return self._forward(*args, **kwargs)
        self._listener.begin(self._path, args, kwargs)
        output = self._forward(*args, **kwargs)
        self._listener.end(self._path, output)
        return output

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._listener.begin(self._path, args, kwargs)
        self._told = True

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._listener.end(self._path, output)


@contextmanager
def watched(modules: Mapping[str, nn.Module], listener: Listener) -> Iterator[None]:
    """Inside, ``listener`` hears of the calls of ``modules``, which are given by path."""
    with ExitStack() as stack:
        # Compiled code was made for the modules as they were, and does not know of hooks.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for path, module in modules.items():
            if isinstance(module, torch.jit.ScriptModule) or COMPILED in module._modules:
                continue  # the first takes no other forward; of the second the module inside is what is called
            stack.enter_context(_watching(module, path, listener))
        yield


@contextmanager
def _watching(module: nn.Module, path: str, listener: Listener) -> Iterator[None]:
    before = module.__dict__.get("forward")
    stand_in = _Watched(module, path, listener)
    hooks = (
        module.register_forward_pre_hook(stand_in.before, prepend=True, with_kwargs=True),
        module.register_forward_hook(stand_in.after, with_kwargs=True),
    )
    module.forward = stand_in
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
        for hook in hooks:
            hook.remove()


@dataclass
class Call:
    """A call of a module that holds convolutions or linear layers, and the calls of such within it.

    Args:
        path: of the module.
        inner: the calls within it.
        values: the tensors that it takes and that it returns, each with how often it had been written to by then.
        takes_text: whether there is text within the lists and dicts that it takes, such as the names of files.
    """

    path: str
    inner: list[Call] = field(default_factory=list)
    values: tuple[list[_Seen], list[_Seen]] = field(default_factory=lambda: ([], []))
    takes_text: bool = False

    def paths(self) -> Iterator[str]:
        """Its own and those of all calls within."""
        yield self.path
        for call in self.inner:
            yield from call.paths()

    def only_passes_on(self) -> bool:
        """Whether there is one call within it, which takes nothing but what this one takes, and returns nothing that
        this one does not return as it is: whatever lies around it is no part of the network, a loss say.

        By the tensors themselves: a mean of zero or a temperature of one may be another after training.
        """
        if len(self.inner) != 1:
            return False
        pairs = zip(self.values, self.inner[0].values, strict=True)
        return all(any(a is b and at == then for b, then in own) for own, inner in pairs for a, at in inner)

    def is_like(self, other: Call) -> bool:
        """Whether it takes and returns as many tensors."""
        pairs = zip(self.values, other.values, strict=True)
        return all(own and len(own) == len(others) for own, others in pairs)


def merge(calls: list[Call], others: Sequence[Call]) -> None:
    """Add to ``calls`` what is called in ``others`` alone: layers are left out at random in training, say."""
    for other in others:
        same = next((call for call in calls if call.path == other.path), None)
        if same is None:
            calls.append(other)
        else:
            merge(same.inner, other.inner)


class CallTree(TorchFunctionMode):
    """Keeps which calls are made within which, and the values of the outermost and of those within them.

    A tensor that was only laid out otherwise or moved to another device, while this mode is on, counts as the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._running: list[Call] = []
        self._moved: dict[int, tuple[_Seen, _Seen]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        first = self._seen(args[0]) if func in _MOVES and isinstance(args[0], Tensor) else None
        output = func(*args, **(kwargs or {}))
        if first is not None and output is not args[0] and output.dtype == args[0].dtype:
            self._moved[id(output)] = (output, _version(output)), first
        return output

    def begin_again(self) -> None:
        """Forget what was seen: the step is run once more."""
        self.calls.clear()
        self._running.clear()
        self._moved.clear()

    def begin(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        containers = [value for value in (*args, *kwargs.values()) if not isinstance(value, str)]
        call = Call(path, takes_text=any(isinstance(leaf, str) for leaf in tree_leaves(containers)))
        (self._running[-1].inner if self._running else self.calls).append(call)
        if len(self._running) < _VALUES_DEPTH:
            call.values[0].extend(self._tensors((args, kwargs)))
        self._running.append(call)

    def end(self, path: str, output: Any) -> None:
        while self._running:
            call = self._running.pop()  # what was left by an exception comes first
            if call.path == path:
                if len(self._running) < _VALUES_DEPTH:
                    call.values[1].extend(self._tensors(output))
                return

    def _tensors(self, values: Any) -> list[_Seen]:
        return [self._seen(leaf) for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]

    def _seen(self, tensor: Tensor) -> _Seen:
        moved, original = self._moved.get(id(tensor), (None, None))
        if original is not None and moved is not None and moved[0] is tensor and moved[1] == _version(tensor):
            return original
        return tensor, _version(tensor)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
