"""An INT8 network of parts that are called one by one, split up again."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_flatten_with_path, tree_leaves, tree_structure, tree_unflatten

from lq.graph.parts import PARTS
from lq.graph.stand_in import StandIn
from lq.int8.module import Int8Module
from lq.interface.guards import input_name, inputs_of


class Int8Part(StandIn):
    """Replaces one part: is called in the same way, and computes in INT8.

    Args:
        path: of the part.
        network: the INT8 network of that part alone.
    """

    def __init__(self, path: str, network: Int8Module) -> None:
        super().__init__()
        self.path = path
        self.network = network

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = [list(args), kwargs]
        expected = _fixed(self.network.example_inputs[PARTS][self.path])
        if _fixed(call) != expected:
            raise TypeError(
                f"the INT8 network in place of {self.path!r} was made for calls of the form {expected}; got "
                f"{_fixed(call)}"
            )
        return self.network(**{PARTS: {self.path: self._in_dtype_of_example(call)}})

    def _in_dtype_of_example(self, call: Any) -> Any:
        """A region of autocast around the part gives it values in 16 bits."""
        example, given = (tree_leaves(values) for values in (self.network.example_inputs[PARTS][self.path], call))
        leaves = [
            one.to(other.dtype) if isinstance(one, Tensor) and one.is_floating_point() else one
            for one, other in zip(given, example, strict=True)
        ]
        return tree_unflatten(leaves, tree_structure(call))


def _fixed(call: Any) -> str:
    """What conversion fixed of a call: its structure, and everything that is not a tensor."""
    leaves, spec = tree_flatten(call)
    args, kwargs = spec.unflatten(["tensor" if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves])
    return f"({', '.join([*map(str, args), *(f'{name}={value}' for name, value in kwargs.items())])})"


def split(int8: Int8Module) -> dict[str, Int8Part]:
    """The parts of an INT8 network that was prepared as a :class:`~lq.graph.parts.PartsForward`, by path.

    They read the weights of ``int8``, which is left as it is.
    """
    return {path: Int8Part(path, _network(int8, path)) for path in int8.example_inputs[PARTS]}


def _network(int8: Int8Module, path: str) -> Int8Module:
    graph = fx.Graph()
    outputs: Any = graph.graph_copy(int8.graph, {})
    graph.output(outputs[path] if isinstance(outputs, dict) else outputs)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    read = {str(node.target).partition(".")[0] for node in graph.nodes if node.op in ("get_attr", "call_module")}
    root = nn.Module()
    for name, child in int8.named_children():
        if name in read:
            root.add_module(name, child)
    for name, tensor in {**int8._buffers, **int8._parameters, **int8.__dict__}.items():
        if name in read and isinstance(tensor, nn.Parameter):
            root.register_parameter(name, tensor)
        elif name in read and isinstance(tensor, Tensor):
            root.register_buffer(name, tensor)
    network = Int8Module(root, graph, int8.execution)
    network.example_inputs = {PARTS: {path: int8.example_inputs[PARTS][path]}}
    if int8._signature is not None:
        network.fix_call(int8._signature, int8.settings)
    inputs, _ = tree_flatten_with_path(network.example_inputs)
    names = {input_name(way) for way, _ in inputs}
    network.guards = tuple(guard for guard in int8.guards if inputs_of(guard) <= names)
    network.report = int8.report
    return network
