"""A module's forward, replaced by its graph with quantizers in it; the module stays the same object."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx, nn
from torch.nn import functional as F

from lq.graph.codegen import compile_graph
from lq.graph.eager import never_compiled
from lq.graph.placement import site
from lq.graph.signature import CallSignature
from lq.graph.tracing import TracedGraph, trace
from lq.quantizer import Quantizer, WeightQuantizer

#: The one child that a prepared module has and the float module has not.
QUANTIZERS = "lq_quantizers"


class QuantizerTree(nn.Module):
    """The quantizers of a module, under the names of what they sit on: ``layer1.0.conv1.weight``, ``input``.

    A quantizer called ``a.b`` is reached as ``tree.a.b.quantizer``, so that one called ``a`` has its place too. The
    children are called as the tensors are (``add``, ``items``), so the tree has no methods that have names like theirs.
    """

    def __setitem__(self, key: str, quantizer: Quantizer) -> None:
        node: nn.Module = self
        for atom in key.split("."):
            if atom not in node._modules:
                node.add_module(atom, nn.Module())
            node = node.get_submodule(atom)
        node.add_module("quantizer", quantizer)

    def __iter__(self) -> Iterator[str]:
        return (path.removesuffix(".quantizer") for path, m in self.named_modules() if isinstance(m, Quantizer))

    def __getitem__(self, key: str) -> Quantizer:
        quantizer = self.get_submodule(f"{key}.quantizer")
        assert isinstance(quantizer, Quantizer)
        return quantizer

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # The state of the float model says nothing of quantizers: they stay as they are, and nothing is missing.
        if not any(key.startswith(prefix) for key in state_dict):
            state_dict.update(self.state_dict(prefix=prefix))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class CapturedForward:
    """Stands in for the forward of a prepared module: runs the graph, with quantizers, of the mode it is in.

    Python code that asks ``self.training`` gives another graph in training than in evaluation, so there is one graph
    for each combination of the traced modules' flags (and of the call's settings), traced when it is first needed.
    The graphs are derived from the module alone: copies and pickles of it do without them and trace again.

    Args:
        module: the module whose class has the forward.
        traced: a first trace of it, for the names of the traced modules.
        sites: the quantizer of each tensor of the graph that has one, both by name.
    """

    def __init__(self, module: nn.Module, traced: TracedGraph, sites: Mapping[str, str]) -> None:
        self.module = module
        self.sites = dict(sites)
        self._entered = list(traced.entered)
        self._signature: CallSignature | None = None
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self._run = never_compiled(self._forward)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": {}, "_signature": None, "_run": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._run = never_compiled(self._forward)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """``(inputs, settings)`` of a call (see :meth:`CallSignature.bind`)."""
        if self._signature is None:
            self._signature = CallSignature(type(self.module).forward)
        return self._signature.bind(args, kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        inputs, settings = self.bind(args, kwargs)
        mode = tuple(self.module.get_submodule(path).training for path in self._entered)
        key = (mode, tuple(inputs), tuple(settings.items()))
        forward = self._compiled.get(key)
        if forward is None:
            forward = self._compiled[key] = self._compile(tuple(inputs), settings)
        return forward(self.module, *inputs.values())

    def _compile(self, inputs: tuple[str, ...], settings: Mapping[str, Any]) -> Callable[..., Any]:
        with without_quantizers(self.module):
            traced = trace(self.module, inputs, settings)
        self._entered.extend(path for path in traced.entered if path not in self._entered)
        insert_quantizers(traced.graph, self.sites)
        return compile_graph(traced.graph, f"prepared {type(self.module).__name__}")


class WeightQuantizedForward:
    """Stands in for the forward of a ``torch.nn`` conv or linear layer: the same, with the weight fake-quantized.

    The layer is still called as a module, so that hooks on it (summaries, pruning) run as before.
    """

    def __init__(self, layer: nn.Module, quantizer: WeightQuantizer) -> None:
        self.layer = layer
        self.quantizer = quantizer

    def __call__(self, input: Tensor) -> Tensor:
        layer: Any = self.layer
        weight = self.quantizer(layer.weight)
        if isinstance(layer, nn.Linear):
            return F.linear(input, weight, layer.bias)
        return layer._conv_forward(input, weight, layer.bias)  # type: ignore[no-any-return]


def insert_quantizers(graph: fx.Graph, sites: Mapping[str, str]) -> None:
    """Put a call of its quantizer behind each node that has one, for all its readers."""
    for node in list(graph.nodes):
        if site(node) in sites:
            readers = list(node.users)
            with graph.inserting_after(node):
                call = graph.call_module(f"{QUANTIZERS}.{sites[site(node)]}.quantizer", (node,))
            for reader in readers:
                reader.replace_input_with(node, call)


@contextmanager
def without_quantizers(module: nn.Module) -> Iterator[None]:
    """The module without its quantizers' child, for code that goes through its children."""
    tree = module._modules.pop(QUANTIZERS, None)
    try:
        yield
    finally:
        if tree is not None:
            module._modules[QUANTIZERS] = tree
