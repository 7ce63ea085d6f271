"""From a module to a graph of ATen operators, by ``torch.export``; what cannot be exported becomes a leaf."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import traceback
from torch.utils._sympy.printers import PythonPrinter

from lq.errors import CaptureError, GuardError
from lq.graph.capture import leaves
from lq.graph.capture.assembly import Assembly, UnsupportedNodeError
from lq.graph.capture.calls import Positions
from lq.graph.capture.captured import CapturedGraph
from lq.graph.capture.exporter import TALKATIVE, Call, Exporter, export, reason
from lq.graph.capture.preserve import preserved
from lq.graph.capture.running import Arguments, Recorder, followed_whole, run_followed
from lq.graph.capture.writes import (
    WriteThroughViewError,
    is_write,
    with_regions_inlined,
    without_writes,
    writes_to_view,
)
from lq.graph.ops import OpKind, classify
from lq.interface.guards import compile_guard
from lq.util.quiet import quiet


def capture(
    module: nn.Module,
    inputs: Mapping[str, Any],
    settings: Mapping[str, Any],
    float_leaves: Mapping[str, str] | None = None,
    *,
    batch: int | None = None,
) -> CapturedGraph:
    """Capture what ``module`` computes, in the mode (training or evaluation) its submodules are in now.

    A submodule that cannot be exported (control flow that depends on data, for example) becomes a leaf that is called
    as it is; the innermost one is taken, so that as much as possible of the model stays visible.

    Args:
        module: the module.
        inputs: example inputs by the names of the forward's arguments (see :class:`CallSignature`).
        settings: its other arguments, with their values.
        float_leaves: modules to treat as leaves, by path, with the reason.
        batch: for a forward that reads its batch size as a number (``len(x)``): a batch of that size is captured, and
            multiples of that number are taken as multiples of the batch size. The caller has to check this at two
            sizes; an uncommon prime avoids coincidences.

    Raises:
        CaptureError: where the module's own forward cannot be exported.
    """
    leaves_by_path = dict(float_leaves or {})
    with preserved(module), torch.no_grad():
        reference = Recorder(module, Positions())
        with preserved(module):  # what a forward keeps for the next call with such sizes is not there for the export
            run_followed(module, reference, inputs, settings)
        with followed_whole(module):
            arguments = Arguments(module, inputs, settings)
            example = arguments.tensors if batch is None else _batches_of(batch, arguments.tensors)
            while True:
                exporter = Exporter(module, reference, leaves_by_path)
                exporter.examples = example
                try:
                    program = export(Call(module, arguments, exporter), example, exporter)
                    if not exporter.failed:
                        guards = _guards(program, exporter, arguments.names)
                        program, graph, precision = _functional_graph(program)
                        captured = Assembly(module, program, graph, exporter, arguments, batch).build()
                        break
                except UnsupportedNodeError as error:
                    if not error.path or error.path in leaves_by_path:
                        raise _refusal(module, error) from error
                    leaves_by_path[error.path] = error.reason
                except Exception as error:
                    if not exporter.failed:
                        raise _refusal(module, error) from error
                finally:
                    leaves.forget(exporter.calls)
                # A failed attempt may have left nodes in the graph, so it is captured again without the attempt.
                leaves_by_path.update(exporter.failed)
    captured.registered = frozenset(reference.registered)
    captured.guards = guards
    captured.precision = precision
    return captured


def _batches_of(size: int, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor[:1].expand(size, *tensor.shape[1:]) for tensor in tensors)


def _refusal(module: nn.Module, error: Exception) -> CaptureError:
    if "not a known type" in str(error):
        return CaptureError(
            f"the forward of {type(module).__name__} takes or returns an object that torch.export does not look into: "
            f"{reason(error)}. Register its class, a dataclass with torch.export.register_dataclass(cls), or use a "
            f"tuple or a dict; or quantize only a part of the model by naming it"
        )
    return CaptureError(
        f"the forward of {type(module).__name__} cannot be captured as a graph: {reason(error)}. "
        f"Move the part that depends on data into a submodule of its own (that one then stays in float), or "
        f"quantize only a part of the model by naming it"
    )


def _functional_graph(program: ExportedProgram) -> tuple[ExportedProgram, fx.Graph, torch.dtype | None]:
    """The program, its graph without regions and writes, and the lowest precision that a region requests."""
    graph, precision = with_regions_inlined(program.graph_module)
    try:
        return program, without_writes(graph), precision
    except WriteThroughViewError:
        pass
    for node in program.graph.nodes:
        if is_write(node) and "custom" in node.meta and writes_to_view(node):
            # What it becomes ends in the tensor that is written to, of which the call returned a part.
            node.meta["custom"] = {k: v for k, v in node.meta["custom"].items() if k != "lq_position"}
    with quiet(*TALKATIVE), traceback.preserve_node_meta():
        decomposed = program.run_decompositions({})
    graph, precision = with_regions_inlined(decomposed.graph_module)
    return decomposed, graph, precision


def _guards(program: ExportedProgram, exporter: Exporter, names: Sequence[str]) -> tuple[str, ...]:
    """The conditions on sizes under which the program holds, see :mod:`lq.interface.guards`.

    Conditions of torch's own functions (can these sizes be broadcast, is this one 1, so that its stride is irrelevant)
    are tested again when they run; what the forward tests decides what it computes.
    """
    inputs = [node for node in program.graph.nodes if node.op == "placeholder"]
    specs = program.graph_signature.input_specs
    tensors = [node for node, spec in zip(inputs, specs, strict=True) if spec.kind is InputKind.USER_INPUT]
    guards = []
    for name, node in zip(names, tensors, strict=True):
        shape = node.meta["val"].shape
        # Channels are not free to vary: what reads their number has it as a constant. A convolution refuses others.
        checked = 1 if any(_is_convolved(node, user) for user in node.users) else None
        fixed = [axis for axis, size in enumerate(shape) if axis != checked and _is_fixed(size)]
        guards += [f"size({name!r}, {axis}) == {int(shape[axis])}" for axis in fixed]
    for expression in exporter.own_guards():
        text = PythonPrinter().doprint(expression)
        asked = {symbol: at for symbol, at in exporter.symbols.items() if re.search(rf"\b{symbol}\b", text)}
        for symbol, (number, axis) in asked.items():
            text = re.sub(rf"\b{symbol}\b", f"size({names[number]!r}, {axis})", text)
        text = text.replace("torch.sym_max", "max").replace("torch.sym_min", "min")
        try:
            compile_guard(text)
            guards.append(text)
        except GuardError:  # about something other than integers: it holds for these sizes
            sizes = ((names[number], axis, exporter.examples[number].shape[axis]) for number, axis in asked.values())
            guards += [f"size({name!r}, {axis}) == {size}" for name, axis, size in sizes]
    return tuple(dict.fromkeys(guard for guard in guards if guard != "True"))


def _is_convolved(node: fx.Node, user: fx.Node) -> bool:
    return classify(user) is OpKind.CONV and user.args[0] is node


def _is_fixed(size: Any) -> bool:
    return isinstance(size, int) or bool(size.node.expr.is_number)
