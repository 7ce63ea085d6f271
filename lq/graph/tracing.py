"""From a module to an `fx.Graph`: symbolic tracing that goes around what it cannot trace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import fx, nn

from lq.graph.ops import WEIGHTED_MODULES, OpKind, argument, classify, is_inplace
from lq.graph.registry import registered_forward


class CaptureError(RuntimeError):
    """The model cannot be captured as a graph; the message names the module and the reason."""


@dataclass
class TracedGraph:
    """A traced forward.

    Args:
        graph: the graph; a node's ``meta["site"]`` names the tensor it makes, after where in the module that happens.
        entered: paths of the modules whose Python code was traced (and whose ``training`` flag may be baked in).
        float_leaves: paths of the modules that could not be traced and are called as they are, with the reason.
        registered: classes of the layers whose registered function was traced in the place of their forward.
    """

    graph: fx.Graph
    entered: tuple[str, ...]
    float_leaves: dict[str, str] = field(default_factory=dict)
    registered: frozenset[str] = frozenset()


class _UntraceableModuleError(Exception):
    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


def is_custom_layer(module: nn.Module) -> bool:
    """Whether a module is a Conv or Linear by inheritance, with a forward of its own to be traced into."""
    for base in WEIGHTED_MODULES:
        if isinstance(module, base):
            return type(module).forward is not base.forward
    return False


class _Tracer(fx.Tracer):
    """Keeps `torch.nn` layers whole, traces into everything else, and remembers where each node comes from."""

    def __init__(self, inputs: Sequence[str], settings: Mapping[str, Any], float_leaves: Collection[str]) -> None:
        super().__init__()
        self._inputs = inputs
        self._settings = settings
        self._float_leaves = float_leaves
        self._scopes: list[str] = [""]
        self.entered: list[str] = [""]
        self.registered: set[str] = set()

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        # fx's own way needs every setting spelled out as a "concrete argument" and leaves checks on it in the graph.
        proxies = {name: self.create_proxy("placeholder", name, (), {}) for name in self._inputs}
        return lambda: root_fn(self.root, **proxies, **self._settings), []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self._float_leaves:
            return True
        if registered_forward(m) is not None:
            return False
        if is_custom_layer(m):
            return False
        # torch.ao's QuantStub and FloatFunctional live outside torch.nn and hold nothing: traced into, they vanish.
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        path = self.path_of_module(m)
        registered = registered_forward(m)
        if registered is not None:
            forward = partial(registered, m)
            self.registered.add(type(m).__name__)
        if not self.is_leaf_module(m, path) and path not in self.entered:
            self.entered.append(path)
        self._scopes.append(path)
        try:
            return super().call_module(m, forward, args, kwargs)
        except _UntraceableModuleError:
            raise
        except Exception as error:  # whatever Python does with a proxy that it could have done with a tensor
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise _UntraceableModuleError(path, reason) from error
        finally:
            self._scopes.pop()

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, target, *args, **kwargs)
        node.meta["scope"] = self._scopes[-1]
        return node


def trace(module: nn.Module, inputs: Sequence[str], settings: Mapping[str, Any]) -> TracedGraph:
    """Trace the forward of ``module``'s class, in the training mode its submodules are in now.

    A submodule that cannot be traced (control flow that depends on data, for example) becomes a leaf that is called
    as it is; the innermost one is taken, so that as much as possible of the model stays visible.

    Args:
        module: the module.
        inputs: names of the forward's arguments that carry tensors (see :class:`~lq.graph.signature.CallSignature`).
        settings: its other arguments, with their values.

    Raises:
        CaptureError: where the module's own forward cannot be traced.
    """
    float_leaves: dict[str, str] = {}
    while True:
        tracer = _Tracer(inputs, settings, float_leaves)
        try:
            graph = tracer.trace(module)
            break
        except _UntraceableModuleError as error:
            float_leaves[error.path] = error.reason
        except Exception as error:
            raise CaptureError(
                f"the forward of {type(module).__name__} cannot be captured as a graph: {error}. "
                f"Move the part that depends on data into a submodule of its own (that one then stays in float), or "
                f"quantize only a part of the model by naming it"
            ) from error
    _put_input_first(graph, module)
    _functionalize(graph, module)
    _name_sites(graph)
    return TracedGraph(graph, tuple(tracer.entered), float_leaves, frozenset(tracer.registered))


def _put_input_first(graph: fx.Graph, root: nn.Module) -> None:
    """``F.relu(input=x)`` as ``F.relu(x)``: everything that reads the graph looks for ``x`` in one place."""
    for node in graph.nodes:
        if not node.args and "input" in node.kwargs and classify(node, root) is not OpKind.OTHER:
            kwargs = dict(node.kwargs)
            node.args = (kwargs.pop("input"),)
            node.kwargs = kwargs


def _functionalize(graph: fx.Graph, root: nn.Module) -> None:
    """Let what reads a tensor after an in-place operator read that operator's output: same values, no aliases.

    Without this, a quantizer on the output would not be seen by readers that still hold the input's name.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        mutated = argument(node, 0, "input")
        if isinstance(mutated, fx.Node) and is_inplace(node, root):
            mutated.replace_all_uses_with(node, delete_user_cb=partial(_is_after, order, node))


def _is_after(order: dict[fx.Node, int], node: fx.Node, other: fx.Node) -> bool:
    return order[other] > order[node]


def _name_sites(graph: fx.Graph) -> None:
    """Give each node a name that depends on where in the module it was made, not on its place in the whole graph.

    The graphs of training and of evaluation mode differ; what they share must have the same name in both.
    """
    bases = {node: _site_base(node) for node in graph.nodes}
    taken = set(bases.values())
    seen: Counter[str] = Counter()
    for node, base in bases.items():
        name = base
        if seen[base]:
            name = f"{base}_{seen[base]}"
            while name in taken:  # the module has a `relu_1`, and calls its `relu` twice
                seen[base] += 1
                name = f"{base}_{seen[base]}"
        seen[base] += 1
        taken.add(name)
        node.meta["site"] = name


def _site_base(node: fx.Node) -> str:
    if node.op in ("call_module", "get_attr"):
        return str(node.target)
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "op")
    name = target.strip("_")
    if hasattr(nn.Module, name):  # `x.float()`: a module of quantizers cannot have a child called like its method
        name = f"{name}_op"
    scope = node.meta["scope"]
    return f"{scope}.{name}" if scope else name
