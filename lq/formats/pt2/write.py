"""An INT8 network as a `torch.export` program with its quantize/dequantize pairs."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map

from lq.errors import GuardError
from lq.graph.capture.exporter import any_size, has_channels
from lq.graph.qdq import constant_qparams
from lq.int8.module import Int8Module
from lq.interface.guards import compile_guard, fixes_the_batch, input_name
from lq.interface.metadata import KEY, Metadata
from lq.interface.treespecs import without_names
from lq.util.causes import first_line
from lq.util.files import write_archive
from lq.util.quiet import quiet

aten = torch.ops.aten


def examples(model: Int8Module, *, own_batch: bool = False) -> dict[str, Any]:
    """Zeros of the example inputs' shapes: a file keeps its example inputs, and a training image may be private.

    Args:
        model: the INT8 network.
        own_batch: whether their batch is as large as that of the example inputs.
    """

    own_batch = own_batch or any(map(fixes_the_batch, model.guards))

    def zeros(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if own_batch:
            return torch.zeros_like(value)
        # An export with a batch of one would fix the batch size to one.
        return value.new_zeros((2, *value.shape[1:]) if value.dim() else ())

    return {name: tree_map(zeros, value) for name, value in model.example_inputs.items()}


#: These loggers warn of every size that turned out to be fixed, which is up to the network.
_TALKATIVE = ("torch.export", "torch._export", "torch.fx.experimental")


def _without_circular_padding(graph: fx.Graph) -> fx.Graph:
    """Circular padding in ``graph`` as concatenated slices, which every engine supports."""
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in (F.pad, aten.pad.default):
            continue
        given: dict[str, Any] = dict(zip(("input", "pad", "mode"), node.args, strict=False)) | dict(node.kwargs)
        if given.get("mode") != "circular":
            continue
        value = given["input"]
        with graph.inserting_before(node):
            for index, (before, after) in enumerate(zip(given["pad"][::2], given["pad"][1::2], strict=True)):
                axis = -1 - index  # F.pad counts from the last
                parts = [value]
                if before:
                    parts.insert(0, graph.call_function(aten.slice.Tensor, (value, axis, -before)))
                if after:
                    parts.append(graph.call_function(aten.slice.Tensor, (value, axis, 0, after)))
                value = graph.call_function(aten.cat.default, (parts, axis)) if len(parts) > 1 else value
        node.replace_all_uses_with(value)
        graph.erase_node(node)
    return graph


@dataclass(frozen=True)
class Program:
    """A network as a ``torch.export`` program, and the input sizes it is for.

    Args:
        exported: the program.
        shapes: of each tensor, None where a size is free.
        guards: what has to hold for the sizes that are free, see :mod:`lq.interface.guards`.
        notes: why sizes are fixed that should have been free.
    """

    exported: ExportedProgram
    shapes: tuple[tuple[int | None, ...], ...]
    guards: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def export_program(model: Int8Module, *, free_sizes: bool) -> Program:
    """The network as a program, with a free batch size where the network allows that.

    Where a network cannot be exported with free sizes, such as one whose linear layer fits one image size, they are
    fixed to those of the example inputs, and a note says so.

    Args:
        model: the INT8 network.
        free_sizes: whether the sizes of the other axes, but for the channels, are free as well. Engines that compile
            ahead of time make better kernels for known sizes.

    Raises:
        ValueError: where the network cannot be exported (a submodule with control flow that depends on data stays
            Python code); the message has torch's reason.
    """
    graph = _without_circular_padding(constant_qparams(model.graph, model))
    output = graph.output_node()
    output.args = (without_names(output.args[0]),)
    module = fx.GraphModule(model, graph)

    fixed_batch = any(map(fixes_the_batch, model.guards))

    def free_axes(value: Any, free: str) -> Any:
        if not isinstance(value, Tensor):
            return None
        axes = {"sizes": range(value.dim()), "batch": range(min(value.dim(), 1)), "none": ()}[free]
        return dict.fromkeys((axis for axis in axes if not has_channels(axis, value)), Dim.AUTO)

    def dynamic_axes(value: Any, free: str) -> Any:
        axes = free_axes(value, free)
        return {axis: Dim.STATIC if axis == 0 else dim for axis, dim in axes.items()} if axes and fixed_batch else axes

    def export(free: str) -> Program:
        inputs = examples(model, own_batch=free == "none")
        with torch.no_grad(), quiet(*_TALKATIVE), any_size():
            exported = torch.export.export(
                module,
                tuple(inputs.values()),
                dynamic_shapes=tuple(tree_map(partial(dynamic_axes, free=free), value) for value in inputs.values()),
                strict=False,
            )
        for node in exported.graph.nodes:
            if node.op == "call_function" and getattr(node.target, "__module__", "") == "builtins":
                raise ValueError(f"{node.target.__name__}() of a size cannot be written to a program")
        shapes, guards = _sizes(exported, inputs)
        if not any(node.op == "call_module" for node in module.graph.nodes):
            # What operators ask of sizes (which memory format, how to broadcast) they ask again when they run, and
            # only modules that are called as they are decide by it; what else the forward asked, the network knows.
            # Sizes that have to be equal are worth a message of their own.
            guards = tuple(guard for guard in guards if " == " in guard)
        return Program(exported, shapes, guards, _fixed_by_the_network(inputs, shapes, partial(free_axes, free=free)))

    choices = {"sizes": "", "batch": "the image size is fixed", "none": "all sizes are fixed, that of the batch too"}
    errors: list[Exception] = []
    for free in list(choices)[0 if free_sizes else 1 :]:
        try:
            program = export(free)
        except Exception as error:
            errors.append(error)
            continue
        if not errors:
            return program
        reason = f"{choices[free]}, because the network cannot be exported with free ones: {first_line(errors[0])}"
        return replace(program, notes=(reason, *program.notes))
    raise ValueError(f"the network cannot be exported: {first_line(errors[-1])}") from errors[-1]


def _sizes(
    exported: ExportedProgram, inputs: dict[str, Any]
) -> tuple[tuple[tuple[int | None, ...], ...], tuple[str, ...]]:
    """The shapes of the program's inputs and the guards of those that are free.

    Raises:
        GuardError: where a guard is of anything but sizes.
    """
    paths, _ = tree_flatten_with_path(inputs)
    names = set(exported.graph_signature.user_inputs)
    values = [node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder" and node.name in names]
    shapes: list[tuple[int | None, ...]] = []
    guards: list[str] = []
    symbols: dict[str, str] = {}
    for (path, _), value in zip(paths, values, strict=True):
        shape: list[int | None] = []
        for axis, size in enumerate(value.shape):
            shape.append(size if isinstance(size, int) else None)
            if isinstance(size, int):
                continue
            text, here = str(size.node.expr), f"size({input_name(path)!r}, {axis})"
            if text not in symbols:
                symbols[text] = here
                limits = exported.range_constraints.get(size.node.expr)
                guards += [] if limits is None else _limits(here, limits)
            else:  # the size of another input
                guards.append(f"{here} == {symbols[text]}")
        shapes.append(tuple(shape))
    sources = {f"L{keystr(path)}": input_name(path) for path, _ in paths}
    for code in getattr(exported, "_guards_code", None) or ():
        guards.append(_rewritten(code, sources))
    for guard in guards:
        compile_guard(guard)
    return tuple(shapes), tuple(guards)


def _limits(size: str, limits: Any) -> list[str]:
    # An open end is torch's own infinity, which is not a number.
    low, high = (int(end) if getattr(end, "is_Integer", False) else None for end in (limits.lower, limits.upper))
    guards = [f"{size} >= {low}"] if low is not None and low > 1 else []
    return guards + ([f"{size} <= {high}"] if high is not None else [])


def _fixed_by_the_network(
    inputs: dict[str, Any], shapes: tuple[tuple[int | None, ...], ...], free_axes: Callable[[Any], Any]
) -> tuple[str, ...]:
    """Which sizes should be free and are not, because the network can be computed with one value only."""
    paths, _ = tree_flatten_with_path(inputs)
    return tuple(
        f"{'the batch size' if axis == 0 else f'size {axis}'} of the input {input_name(path)!r} is fixed at "
        f"{shape[axis]}, because the network cannot be computed with any other"
        for (path, value), shape in zip(paths, shapes, strict=True)
        for axis in free_axes(value) or ()
        # That features have a number goes without saying.
        if shape[axis] is not None and (axis, len(shape)) != (1, 2)
    )


class _SizesByName(ast.NodeTransformer):
    """Torch's ``L['x'].size()[0]`` as ``size('x', 0)``, and its functions as Python's."""

    def __init__(self, sources: dict[str, str]) -> None:
        self.sources = sources

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        source = node.value
        if isinstance(source, ast.Call) and isinstance(source.func, ast.Attribute) and source.func.attr == "size":
            name = self.sources.get(ast.unparse(source.func.value))
            if name is not None:
                return ast.Call(ast.Name("size"), [ast.Constant(name), node.slice], [])
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        names = {"torch.sym_max": "max", "torch.sym_min": "min"}
        return ast.Name(names[ast.unparse(node)]) if ast.unparse(node) in names else node


def _rewritten(code: str, sources: dict[str, str]) -> str:
    try:
        return ast.unparse(_SizesByName(sources).visit(ast.parse(code, mode="eval")))
    except SyntaxError as error:
        raise GuardError(f"{code!r} is not a guard of sizes") from error


def write_program(program: ExportedProgram, metadata: Metadata, path: Path) -> None:
    """Write a ``.pt2`` file that loads without lq and without the training code."""
    extra_files = {KEY: metadata.to_json()}
    # torch mistakes a float layer's weight in another memory format for part of a larger tensor, and warns.
    weights = program.state_dict
    for name, weight in weights.items():
        if isinstance(weight, Tensor) and not weight.is_contiguous():
            contiguous = weight.detach().contiguous()
            weights[name] = nn.Parameter(contiguous, False) if isinstance(weight, nn.Parameter) else contiguous
    write_archive(path, lambda buffer: torch.export.save(program, buffer, extra_files=extra_files))
