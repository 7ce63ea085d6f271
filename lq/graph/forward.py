"""The forward of a prepared module: the user's own, with quantizers on the tensors that its calls take and return."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from lq.graph.capture.calls import UNKNOWN, WHOLE, CallTracker, FollowedForward, Positions, original_forward
from lq.graph.capture.signature import CallSignature, signature_of
from lq.graph.eager import never_compiled
from lq.graph.ops import MOVES, classify
from lq.graph.parts import PartsForward
from lq.numerics.quantizer import Quantizer, WeightQuantizer

#: The one child that a prepared module has and the float module does not.
QUANTIZERS = "lq_quantizers"


class QuantizerTree(nn.Module):
    """The quantizers of a module, under the names of what they sit on: ``layer1.0.conv1.weight``, ``input``.

    A quantizer called ``a.b`` is reached as ``tree.a.b.quantizer``, so that one called ``a`` has its place too. The
    children are called as the tensors are (``add``, ``items``), so the tree has no methods that have names like theirs.
    """

    def forward(self, x: Any) -> Any:
        """Return ``x``: for code that calls a model's children in turn, this one does nothing."""
        return x

    def __setitem__(self, key: str, quantizer: Quantizer) -> None:
        node: nn.Module = self
        for atom in key.split("."):
            if atom not in node._modules:
                node.add_module(atom, nn.Module())
            node = node.get_submodule(atom)
        node.add_module("quantizer", quantizer)

    def keys(self) -> Iterator[str]:
        """Names of the quantizers. Not iterable itself: what is in a Sequential may be looked through for modules."""
        return (path.removesuffix(".quantizer") for path, m in self.named_modules() if isinstance(m, Quantizer))

    def __getitem__(self, key: str) -> Quantizer:
        quantizer = self.get_submodule(f"{key}.quantizer")
        assert isinstance(quantizer, Quantizer)
        return quantizer

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # The float model's state has no quantizers: they stay as they are, and no key is missing.
        if not any(key.startswith(prefix) for key in state_dict):
            state_dict.update(self.state_dict(prefix=prefix))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


@dataclass
class CallQuantizers:
    """The quantizers of one call.

    Args:
        weight: of a convolution's or linear layer's weight.
        arguments: of its other arguments, by position and name.
        output: of what it returns.
    """

    weight: WeightQuantizer | None = None
    arguments: dict[tuple[int, str], Quantizer] = field(default_factory=dict)
    output: Quantizer | None = None


class _Quantizing(CallTracker):
    """Runs the calls of a forward, with their quantizers."""

    def __init__(self, forward: QuantizedForward, start: tuple[int, str], *, observes: bool = True) -> None:
        super().__init__(forward.module, forward.positions, adds=False, start=start)
        self._calls = forward.calls
        self._names = forward.function_names
        self._observes = observes

    def watches(self, name: str) -> bool:
        return name in self._names

    def on_module(self, followed: FollowedForward, position: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = followed.run(*args, **kwargs)
        quantizers = self._calls.get(position)
        if quantizers is None or quantizers.output is None or not isinstance(result, Tensor):
            return result
        with torch._C.DisableTorchFunction():  # calls inside a quantizer are not the user's
            return self._quantize(quantizers.output, result)

    def on_function(
        self, function: Callable[..., Any], position: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        quantizers = self._calls.get(position)
        if quantizers is None:
            return function(*args, **kwargs)
        if quantizers.weight is not None:
            args, kwargs = self._replaced(args, kwargs, 1, "weight", quantizers.weight)
        for (index, name), quantizer in quantizers.arguments.items():
            args, kwargs = self._replaced(args, kwargs, index, name, quantizer)
        result = function(*args, **kwargs)
        if quantizers.output is None or not isinstance(result, Tensor):
            return result
        rounded = self._quantize(quantizers.output, result)
        if rounded is not result and args and result is args[0] and not rounded.requires_grad:
            return result.copy_(rounded)  # written in place: aliases of the tensor see it rounded, too
        return rounded

    def _replaced(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], index: int, name: str, quantizer: Quantizer
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if len(args) > index:
            return (*args[:index], self._quantize(quantizer, args[index]), *args[index + 1 :]), kwargs
        if name in kwargs:
            return args, {**kwargs, name: self._quantize(quantizer, kwargs[name])}
        return args, kwargs

    def _quantize(self, quantizer: Quantizer, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return quantizer(value) if self._observes else quantizer.round(value)


class QuantizedForward:
    """Replaces the forward of a prepared module: runs the user's own, with quantizers.

    Args:
        module: the module.
        positions: of the calls in its forward.
    """

    def __init__(self, module: nn.Module, positions: Positions) -> None:
        self.module = module
        #: A forward that the user set on the object, which runs in place of the class's.
        self.own: Callable[..., Any] | None = module.__dict__.get("forward")
        self.positions = positions
        self.calls: dict[int, CallQuantizers] = {}
        self.function_names: frozenset[str] = frozenset()
        self._inputs: dict[tuple[Any, ...], Quantizer] = {}
        self._has_compiled_parts = any(hasattr(part, "_orig_mod") for part in module.modules())
        self._signature: CallSignature | None = None
        self._run = never_compiled(self._forward)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_signature": None, "_run": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._run = never_compiled(self._forward)

    @property
    def signature(self) -> CallSignature:
        if self._signature is None:
            self._signature = signature_of(self.module, self.own)
        return self._signature

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """``(inputs, settings)`` of a call (see :meth:`CallSignature.bind`)."""
        return self.signature.bind(args, kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.own, PartsForward) and not self.own.is_of_parts(args, kwargs):
            return self.own(*args, **kwargs)  # the user's own call: the followed submodules inside handle themselves
        if self._inputs:
            inputs, settings = self.bind(args, kwargs)
            for keys, quantizer in self._inputs.items():
                inputs = _with_item(inputs, keys, quantizer)
            args, kwargs = self.signature.arguments({**inputs, **settings})
        # A forward that iterates over its children, as a Sequential's does, must not see the quantizers.
        with without_quantizers(self.module), self._stance(), _Quantizing(self, (WHOLE, "")):
            return original_forward(self.module, self.own)(*args, **kwargs)

    def _stance(self) -> AbstractContextManager[Any]:
        # A part that the user compiled runs as it is: compiled code cannot be followed.
        return torch.compiler.set_stance("force_eager") if self._has_compiled_parts else nullcontext()

    def run_part(self, followed: FollowedForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a submodule that is called on its own, with the quantizers of its first call in the whole forward."""
        start = (self.positions.of_module(followed.path), followed.path)
        if start[0] == UNKNOWN:
            return followed.run(*args, **kwargs)  # not a call of the root, but its calls may be inside
        # A checkpointed part runs again in the backward pass, on data that its quantizers have seen.
        again = torch._C._current_graph_task_id() != -1
        with _Quantizing(self, start, observes=not again):
            return followed.run(*args, **kwargs)

    def quantize_weight(self, op: fx.Node, quantizer: WeightQuantizer) -> None:
        """Let the call that makes ``op`` round its weight."""
        self._call(op).weight = quantizer

    def quantize_tensor(self, node: fx.Node, quantizer: Quantizer) -> None:
        """Put a quantizer on the tensor that ``node`` makes: on the call that returns it, or on those that take it."""
        keys = _input_keys(node)
        if keys is not None and not self.module._forward_pre_hooks and not isinstance(self.own, PartsForward):
            self._inputs[keys] = quantizer
        elif "position" in node.meta:
            self._call(node).output = quantizer
        else:
            for reader, index, name in _readers(node):
                self._call(reader).arguments[index, name] = quantizer

    def _call(self, node: fx.Node) -> CallQuantizers:
        position = node.meta["position"]
        self.function_names |= {self.positions.name(position)}
        return self.calls.setdefault(position, CallQuantizers())


def _input_keys(node: fx.Node) -> tuple[Any, ...] | None:
    """For an input of the graph, or an item of one, the argument's name and the keys to the item within it."""
    keys: list[Any] = []
    while node.op == "call_function" and node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        keys.append(node.args[1])
        node = node.args[0]
    return (str(node.target), *reversed(keys)) if node.op == "placeholder" else None


def _with_item(container: Any, keys: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    """``container`` with the item that ``keys`` lead to changed."""
    if not keys:
        return change(container) if isinstance(container, Tensor) else container
    key, *rest = keys
    if isinstance(container, Mapping):
        if key not in container:
            return container
        return type(container)({**container, key: _with_item(container[key], tuple(rest), change)})  # type: ignore[call-arg]
    items = [_with_item(item, tuple(rest), change) if index == key else item for index, item in enumerate(container)]
    return type(container)(*items) if hasattr(container, "_fields") else type(container)(items)


#: Names of an operator's first two arguments where the torch function has them too, as its first two.
_FIRST, _SECOND = ("self", "input"), ("other",)


def _arguments(user: fx.Node) -> Iterator[tuple[int, str]]:
    """The tensors that an operator takes at the same place as the torch function that calls it: positions and names."""
    schema = getattr(user.target, "_schema", None)
    names = [] if schema is None else [argument.name for argument in schema.arguments[:2]]
    if names and names[0] in _FIRST:
        yield 0, "input"
        if len(names) > 1 and names[1] in _SECOND:
            yield 1, "other"


def _readers(node: fx.Node) -> Iterator[tuple[fx.Node, int, str]]:
    """The calls that read a tensor, each with the argument it is passed as."""
    for user in node.users:
        kind = classify(user)
        if "position" not in user.meta:
            if kind in MOVES:
                yield from _readers(user)
        elif kind in MOVES and user.args[0] is node:
            yield user, 0, "input"
        else:
            yield from ((user, index, name) for index, name in _arguments(user) if user.args[index] is node)


@contextmanager
def without_quantizers(module: nn.Module) -> Iterator[None]:
    """The module without its child of quantizers, for code that iterates over children."""
    tree = module._modules.pop(QUANTIZERS, None)
    try:
        yield
    finally:
        if tree is not None:
            module._modules[QUANTIZERS] = tree
