"""An INT8 network as an ExecuTorch program, its INT8 operators in subgraphs that XNNPACK runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import SymInt, Tensor, fx
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.value_ranges import ValueRanges

from lq.errors import MissingRuntimeError
from lq.formats.executorch.read import CHECKSUM, NO_CHECKSUM, with_checksum
from lq.graph.ops import MOVES, OpKind, argument, clamp_bounds, classify, per_axis
from lq.graph.qdq import DEQUANTIZE, QUANTIZE
from lq.interface.metadata import KEY, Metadata
from lq.util.distribution import install
from lq.util.quiet import quiet

aten = torch.ops.aten

#: Largest batch of a file with a free batch size. What the network takes and returns has its place in memory planned
#: for the largest, also on a device that runs one image at a time: 10 MB for 16 images of 224 x 224.
MAX_BATCH = 16

#: These loggers warn of what their own packages do.
_TALKATIVE = ("torch.utils._pytree", "torch.export", "root", "executorch")

#: The bounds at which XNNPACK saturates.
_INT8 = (-128, 127)

_RESHAPES = (aten.view.default, aten.reshape.default, aten.flatten.using_ints)


def import_exir() -> tuple[Any, Any]:
    """ExecuTorch's compiler, and what makes a partitioner for XNNPACK.

    Raises:
        MissingRuntimeError: where the package is not installed.
    """
    handlers = list(logging.root.handlers)
    try:
        with quiet(*_TALKATIVE):
            from executorch import exir
            from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
            from executorch.backends.xnnpack.partition.config.generic_node_configs import MaxPool2dConfig
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    except ImportError as error:
        raise MissingRuntimeError(
            f"writing .pte files needs executorch, which is not installed; install it with: {install('executorch')}"
        ) from error
    finally:
        logging.root.handlers[:] = handlers  # it configures the whole process's logging as it is imported

    class AnyBatch(MaxPool2dConfig):  # type: ignore[misc]
        """Max pools with ``ceil_mode`` for a free batch: what XNNPACK pads is known where the image's size is.

        Without it they stay outside of the subgraphs, where they are 100 times slower.
        """

        def check_constraints(self, node: fx.Node, ep: ExportedProgram) -> bool:
            if super().check_constraints(node, ep):
                return True
            image: Any = node.all_input_nodes[0].meta["val"].shape[2:]
            kernel = per_axis(node.args[1], 2)
            stride = per_axis(argument(node, 2, "stride") or kernel, 2)
            return (
                self.check_common_constraints(node, ep)
                and all(isinstance(size, int) for size in image)
                and all(step <= size for step, size in zip(stride, kernel, strict=True))
            )

    configs = [AnyBatch if config is MaxPool2dConfig else config for config in ALL_PARTITIONER_CONFIGS]
    return exir, lambda: XnnpackPartitioner(configs=configs)


def lower(program: ExportedProgram, texts: Mapping[str, str]) -> Any:
    """The program in the form of ExecuTorch's compiler, with XNNPACK's subgraphs.

    Args:
        program: of an INT8 network for the target ``"xnnpack"``; it is adjusted in place to what XNNPACK takes.
        texts: what further methods of the program return, by their names.

    Returns:
        ExecuTorch's ``EdgeProgramManager``.

    Raises:
        ValueError: where ExecuTorch does not take the network, or an INT8 operator stays outside of the subgraphs.
    """
    exir, partitioner = import_exir()
    for adjust in (
        _infer_free_sizes,
        _spell_out_hard_sigmoids,
        _put_operands_on_one_grid,
        _clamp_to_narrow_grids,
        _limit_batch,
    ):
        adjust(program)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    try:
        with quiet(*_TALKATIVE), _sizes_left_free():
            edge = exir.to_edge_transform_and_lower(
                program,
                partitioner=[partitioner()],
                constant_methods=dict(texts),
                # The checks take as long as the rest; what has no kernel is refused when the file is written.
                compile_config=exir.EdgeCompileConfig(_check_ir_validity=False),
            )
    except Exception as error:
        raise ValueError(f"ExecuTorch does not take the network: {error}") from error
    _check_delegated(edge.exported_program())
    return edge


def _check_delegated(program: ExportedProgram) -> None:
    """Refuse a network that has INT8 operators outside of XNNPACK's subgraphs."""
    outside = [node for node in program.graph.nodes if "quantized_decomposed" in str(node.target)]
    if not outside:
        return
    buffers = program.graph_signature.inputs_to_buffers
    read = (source.name for node in outside for source in node.all_input_nodes)
    names = dict.fromkeys(buffers[name] for name in read if buffers.get(name, "").endswith("weight"))
    raise ValueError(
        f"XNNPACK does not take {len(outside)} of the network's INT8 operators, of the weights "
        f"{', '.join(map(repr, names)) or 'of none'}: it computes 1-d and 2-d convolutions and linear layers, from "
        f"int8 to int8. Export the prepared model, from before lq.convert, placed for target='xnnpack'; a "
        f"layer of another kind can stay in float: lq.prepare(model, inputs, overrides={{'layer': None}})"
    )


def write_pte(program: ExportedProgram, metadata: Metadata, path: Path) -> None:
    """Write a ``.pte`` file.

    Raises:
        MissingRuntimeError: where ExecuTorch is not installed.
        ValueError: where the network cannot be expressed in the format; see :func:`lower`.
    """
    edge = lower(program, {KEY: metadata.to_json(), CHECKSUM: NO_CHECKSUM})
    exir, _ = import_exir()
    from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass

    try:
        with quiet(*_TALKATIVE), _sizes_left_free():
            compiled = edge.to_executorch(
                exir.ExecutorchBackendConfig(sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass())
            )
    except Exception as error:
        raise ValueError(f"ExecuTorch has no kernel for a part of the network: {error}") from error
    path.write_bytes(with_checksum(bytes(compiled.buffer)))


def _functions(program: ExportedProgram, *targets: Callable[..., Any]) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.op == "call_function" and node.target in targets]


def _infer_free_sizes(program: ExportedProgram) -> None:
    """Reshapes with the free size as -1: XNNPACK takes no symbols."""
    for node in _functions(program, *_RESHAPES):
        shape = node.meta["val"].shape
        if sum(isinstance(size, SymInt) for size in shape) == 1:
            node.target = aten.view.default
            node.args = (node.args[0], [-1 if isinstance(size, SymInt) else size for size in shape])
            node.kwargs = {}


def _spell_out_hard_sigmoids(program: ExportedProgram) -> None:
    """Hard sigmoids as a sum, a clamp and a quotient: ExecuTorch would do so with integers for constants, and convert
    them outside of the subgraphs at every call."""
    for node in _functions(program, aten.hardsigmoid.default):
        with program.graph.inserting_before(node):
            value: Any = node.args[0]
            for target, arguments in (
                (aten.add.Tensor, (3.0,)),
                (aten.hardtanh.default, (0.0, 6.0)),
                (aten.div.Tensor, (6.0,)),
            ):
                value = program.graph.call_function(target, (value, *arguments))
                value.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(value)
        program.graph.erase_node(node)


def _put_operands_on_one_grid(program: ExportedProgram) -> None:
    """Round what is joined to the grid of the concatenation: XNNPACK copies integers."""
    for node in _functions(program, aten.cat.default):
        quantize = next((user for user in node.users if user.target is QUANTIZE), None)
        if quantize is None or len(node.users) > 1:
            continue
        grid = quantize.args[1:]
        operands: list[Any] = list(node.args[0])  # type: ignore[arg-type]
        for index, operand in enumerate(operands):
            if operand.target is DEQUANTIZE and operand.args[1:] == grid:
                continue
            with program.graph.inserting_before(node):
                integers = program.graph.call_function(QUANTIZE, (operand, *grid))
                operands[index] = program.graph.call_function(DEQUANTIZE, (integers, *grid))
            value = operand.meta["val"]
            integers.meta["val"], operands[index].meta["val"] = value.to(quantize.meta["val"].dtype), value
        node.args = (operands, *node.args[1:])


def _clamp_to_narrow_grids(program: ExportedProgram) -> None:
    """Clamp what is rounded to fewer than 8 bits, within the kernel: XNNPACK saturates at the bounds of int8."""
    for node in _functions(program, QUANTIZE, DEQUANTIZE):
        arguments: Any = node.args
        source, scale, zero_point, *bounds, dtype = arguments
        if dtype is not torch.int8 or tuple(bounds) == _INT8:
            continue
        # What moves or selects integers stays within their bounds.
        if node.target is QUANTIZE and classify(source) not in MOVES:
            low, high = ((bound - zero_point) * scale for bound in bounds)
            clamp = clamp_bounds(source) if classify(source) is OpKind.CLAMP and len(source.users) == 1 else None
            if clamp is not None:
                low, high = max(low, clamp[0]), high if clamp[1] is None else min(high, clamp[1])
                source = source.args[0]
            with program.graph.inserting_before(node):
                clamped = program.graph.call_function(aten.hardtanh.default, (source, low, high))
            clamped.meta["val"] = source.meta["val"]
            source = clamped
        node.args = (source, scale, zero_point, *_INT8, dtype)


def _sizes_left_free() -> AbstractContextManager[None]:
    """A context in which tracing finds no new bounds.

    ExecuTorch traces the program several times, where torch asks for sizes that choose its own kernel for a convolution
    (a batch of 16 or more, for one) and takes the answer for a bound.
    """
    return ShapeEnv().suppress_guards()  # of this thread: of every environment


def _environments(program: ExportedProgram) -> set[ShapeEnv]:
    """Where the bounds of the program's free sizes are kept."""
    values = (node.meta.get("val") for node in program.graph.find_nodes(op="placeholder"))
    sizes: Iterable[Any] = (size for value in values if isinstance(value, Tensor) for size in value.shape)
    environments = (size.node.shape_env for size in sizes if isinstance(size, SymInt))
    return {environment for environment in environments if environment is not None}


def _limit_batch(program: ExportedProgram) -> None:
    environments = _environments(program)
    for symbol, bounds in program.range_constraints.items():
        limited = ValueRanges(bounds.lower, min(bounds.upper, MAX_BATCH))
        program.range_constraints[symbol] = limited
        # ExecuTorch asks the environment, and plans for the example batch where that knows no bound.
        for environment in environments:
            environment.var_to_range[symbol] = limited
