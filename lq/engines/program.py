"""Reading a `.pt2` program back, to run in process."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from lq.formats.pt2.read import read_program
from lq.int8.module import Int8Module
from lq.interface.metadata import Metadata
from lq.results.report import QuantizationReport
from lq.util.quiet import quiet


def load_program(path: Path) -> Int8Module:
    """Read an INT8 network that was exported as a ``.pt2`` program; see :mod:`lq.formats.pt2.read`.

    Raises:
        ValueError: where lq did not write the file, or it is damaged.
    """
    try:
        archive, text = read_program(path)
        metadata = Metadata.from_json(text)
        with quiet():  # torch 2.10 warns of its own buffers
            program = torch.export.load(archive)
        inputs = dict(zip(metadata.inputs, program.example_inputs[0], strict=True))
    except Exception as error:
        raise ValueError(f"path={str(path)!r} is not an INT8 network written by lq, or is damaged: {error}") from error
    module = program.module(check_guards=False)  # its code would be generated from the file
    int8 = Int8Module(module, _plain_graph(module.graph, inputs, program.call_spec.out_spec))
    int8.example_inputs = inputs
    int8.metadata = metadata
    if metadata.report is not None:
        int8.report = QuantizationReport.from_dict(dict(metadata.report))
    return int8


def _plain_graph(graph: fx.Graph, examples: dict[str, Any], out_spec: Any) -> fx.Graph:
    """The exported graph without its checks of the inputs' sizes, with inputs and outputs as in the float model."""
    plain = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    arguments = [(plain.placeholder(name), value) for name, value in examples.items()]
    # torch.export takes and returns flat tuples: dicts and lists are flattened on the way in, and restored afterwards.
    inputs = (
        _entry(plain, argument, path)
        for argument, value in arguments
        for path, _ in pytree.tree_flatten_with_path(value)[0]
    )
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = next(inputs)
        else:
            values[node] = plain.node_copy(node, values.__getitem__)
            values[node].meta = {}
    output = next(node for node in plain.nodes if node.op == "output")
    output.args = (pytree.tree_unflatten(list(output.args[0]), out_spec),)
    plain.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    plain.lint()
    return plain


def _entry(graph: fx.Graph, argument: fx.Node, path: tuple[Any, ...]) -> fx.Node:
    """The entry of a dict, list or tuple that a key path leads to."""
    for key in path:
        argument = graph.call_function(operator.getitem, (argument, key.key if hasattr(key, "key") else key.idx))
    return argument
