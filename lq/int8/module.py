"""The INT8 network: what conversion makes of a prepared module."""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _IncompatibleKeys
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_map, tree_structure, tree_unflatten

from lq.graph.capture.signature import CallSignature
from lq.graph.codegen import compile_graph
from lq.graph.eager import never_compiled
from lq.graph.forward import QUANTIZERS
from lq.graph.qdq import constant_qparams
from lq.graph.stand_in import StandIn, original_of
from lq.int8.graph_state import graph_from_state, graph_state
from lq.int8.onednn import LoweredGraph, Packed, lower
from lq.int8.plans import Plans, sizes
from lq.interface.guards import check_guards, input_name
from lq.interface.metadata import Metadata, TensorSpec, dtype_name
from lq.results.report import QuantizationReport
from lq.util.cpu import has_onednn_int8, torch_threads

Execution = Literal["auto", "kernels", "simulation"]


#: Attributes of an Int8Module: a submodule of the same name is renamed.
_ATTRIBUTES = ("graph", "guards", "report", "example_inputs", "settings", "metadata", "threads")

#: How many sizes of inputs are remembered as checked.
_MOST_BOUND = 64


def _as_tensor(value: Any) -> Any:
    """numpy arrays as tensors, every floating-point value in float32."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _renamed(graph: fx.Graph, name: str, taken: Container[str]) -> str:
    """A new name for a submodule called like an attribute of Int8Module, which ``graph`` reads from now on."""
    new = f"{name}_"
    while new in taken:
        new += "_"
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module") and str(node.target).partition(".")[0] == name:
            node.target = new + str(node.target)[len(name) :]
    return new


class Int8Module(StandIn):
    """An INT8 network as a module for inference.

    Its state dict holds the integer weights, their scales, the biases, and the scale and zero point of each quantized
    activation, under the float model's names. On an x86 CPU the forward runs INT8 kernels; on any other device, or with
    ``execution="simulation"``, the same network in float arithmetic on the same grids.

    Made by :func:`lq.convert` and :func:`lq.load`, not by hand.

    Args:
        root: the module that the graph reads from.
        graph: the quantize/dequantize graph.
        execution: ``"auto"``, ``"kernels"`` (an error where there are none) or ``"simulation"``.

    Attributes:
        report: what runs in INT8, and what does not and why.
        example_inputs: inputs by name, as :func:`lq.prepare` was given them; zeros where it was loaded from a file.
        metadata: of the file it was loaded from, else None.
        threads: how many CPU threads the forward uses, or None for torch's setting.
        runtime: ``"torch"``, unlike the other engines of :func:`lq.load`.
    """

    runtime = "torch"

    def __init__(self, root: nn.Module, graph: fx.Graph, execution: Execution = "auto") -> None:
        super().__init__()
        for name, child in root.named_children():
            if hasattr(type(self), name) or name in _ATTRIBUTES:
                name = _renamed(graph, name, taken=root._modules)
            self.add_module(name, child)
        for name, buffer in root.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        for name, parameter in root.named_parameters(recurse=False):
            self.register_parameter(name, nn.Parameter(parameter.detach(), requires_grad=False))
        for name, value in root.__dict__.items():
            if isinstance(value, Tensor):  # a constant that the float model kept as a plain attribute
                setattr(self, name, value)
        self.graph = graph
        self.report: QuantizationReport | None = None
        self.metadata: Metadata | None = None
        self.threads: int | None = None
        self.example_inputs: dict[str, Any] = {}
        self._input_names = tuple(str(node.target) for node in graph.nodes if node.op == "placeholder")
        self._signature: CallSignature | None = None
        self.settings: dict[str, Any] = {}
        #: The conditions on the sizes of the inputs, see :mod:`lq.interface.guards`.
        self.guards: tuple[str, ...] = ()
        self._compiled: dict[str, Callable[..., Any]] = {}
        self._bound: set[tuple[Any, ...]] = set()  # sizes of positional tensors that are inputs as they are
        self.execution = execution
        self.eval()

    @property
    def execution(self) -> Execution:
        """How the forward computes; see the class."""
        return self._execution

    @execution.setter
    def execution(self, value: Execution) -> None:
        if value not in get_args(Execution):
            raise ValueError(
                f"execution={value!r} is unknown; choose one of {', '.join(map(repr, get_args(Execution)))}"
            )
        if value == "kernels" and not has_onednn_int8():
            raise ValueError(
                "execution='kernels': this machine has no oneDNN INT8 kernels (an x86 CPU and a torch build with "
                "oneDNN are needed); choose 'auto' or 'simulation'"
            )
        self._execution: Execution = value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return never_compiled(self._forward)(*args, **kwargs)
        return self._forward(*args, **kwargs)  # without the guard against compilers, which takes 0.1 ms

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        inputs = self._inputs(args, kwargs)
        # Autocast would take float convolutions of the simulation to 16 bits, below the steps of the INT8 grids.
        device = next((leaf.device.type for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)), "cpu")
        has_autocast = torch.is_autocast_enabled(device)
        float32 = torch.autocast(device, enabled=False) if has_autocast else nullcontext()
        with torch.no_grad(), float32, torch_threads(self.threads):
            try:
                return self._function(inputs)(*inputs)
            except (RuntimeError, IndexError):
                self._check_shapes(inputs)  # gives the better error, if the inputs are at fault
                raise

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[Any]:
        """:meth:`bind`, which takes as long as a small kernel, once for tensors of the same sizes."""
        key = None if kwargs or not all(isinstance(value, Tensor) for value in args) else sizes(args)
        if key in self._bound:
            return args
        inputs = self.bind(args, kwargs)
        unchanged = len(inputs) == len(args) and all(map(operator.is_, inputs, args))
        if key is not None and unchanged and len(self._bound) < _MOST_BOUND:
            self._bound.add(key)
        return inputs

    def _check_shapes(self, inputs: Sequence[Any]) -> None:
        for name, value, example in zip(self._input_names, inputs, self.example_inputs.values(), strict=False):
            if isinstance(value, Tensor) and isinstance(example, Tensor):
                shape = tuple(size if axis == 1 else None for axis, size in enumerate(example.shape))
                TensorSpec(name, shape, dtype_name(value.dtype)).check(value)

    def _check_dtypes(self, inputs: list[Any]) -> None:
        # An image of bytes would be accepted, 255 times larger than what the ranges are for.
        for name, value, example in zip(self._input_names, inputs, self.example_inputs.values(), strict=False):
            both = isinstance(value, Tensor) and isinstance(example, Tensor)
            if both and example.is_floating_point() and not value.is_floating_point():
                raise TypeError(f"input {name!r} must be float32, got {dtype_name(value.dtype)}")

    def fix_call(self, signature: CallSignature, settings: dict[str, Any]) -> None:
        """Take calls in the form of the float model's forward, whose ``settings`` were fixed at conversion."""
        self._signature = signature
        self.settings = dict(settings)

    def arguments(self, inputs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``(args, kwargs)`` of a call of the float model's forward with these inputs, by name, and the fixed settings.

        By position where the forward allows it, for which the hooks of a user may have been written.
        """
        if self._signature is None:
            return (), dict(inputs)
        return self._signature.arguments({**self.settings, **inputs})

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The inputs of a call of the float model's forward, in order, checked.

        Raises:
            TypeError: where they are not those this network was made for.
            ValueError: where a size is not.
        """
        names = self._input_names
        args, kwargs = tree_map(_as_tensor, (args, dict(kwargs)))  # arrays would be mistaken for settings
        if self._signature is not None:
            inputs, settings = self._signature.bind(args, kwargs)
            other = {name: value for name, value in settings.items() if value != self.settings.get(name)}
            for name in other:
                if name in names:
                    raise TypeError(f"input {name!r} must be a tensor or an array, got {type(other[name]).__name__}")
            if other or tuple(inputs) != names:
                fixed = ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
                raise TypeError(
                    f"this INT8 module was converted for the inputs {', '.join(names)}"
                    f"{' with ' + fixed if fixed else ''}; got {', '.join(inputs)}"
                    f"{' with ' + ', '.join(f'{name}={value!r}' for name, value in other.items()) if other else ''}"
                    f"{'. For calls of another kind load the float weights into a new module' if other else ''}"
                )
            values = list(inputs.values())
        else:
            values = self._as_examples(args, kwargs)
        self._check_dtypes(values)
        self._check_sizes(values)
        return values

    def _as_examples(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The inputs in the form of the example inputs, where the float model's forward is not known. What that took as
        ``*args`` is one tuple, whose tensors may be given one by one."""
        names = self._input_names
        fits = len(args) + len(kwargs) == len(names) and set(kwargs) == set(names[len(args) :])
        values = [*args, *(kwargs[name] for name in names[len(args) :])] if fits else []
        examples = list(self.example_inputs.values())
        if not kwargs and all(isinstance(value, Tensor) for value in args) and args:
            form = tree_structure(examples)
            if len(args) == form.num_leaves and not all(isinstance(example, Tensor) for example in examples):
                return list(tree_unflatten(args, form))
        if fits:
            return values
        raise TypeError(
            f"this INT8 module takes the inputs {', '.join(names)}; got {len(args)} positional arguments"
            f"{' and ' + ', '.join(kwargs) if kwargs else ''}"
        )

    def _check_sizes(self, inputs: list[Any]) -> None:
        """The graph holds only for some input sizes."""
        paths, _ = tree_flatten_with_path(dict(zip(self._input_names, inputs, strict=True)))
        tensors = {input_name(path): leaf for path, leaf in paths if isinstance(leaf, Tensor)}
        check_guards(self.guards, {name: tensor.shape for name, tensor in tensors.items()})
        if self.metadata is None:
            return
        if len(tensors) != len(self.metadata.tensors):
            raise TypeError(
                f"this network takes the tensors {', '.join(spec.name for spec in self.metadata.tensors)}; got "
                f"{len(tensors)}"
            )
        self.metadata.check(list(tensors.values()))

    def _function(self, inputs: Sequence[Any]) -> Callable[..., Any]:
        on_cpu = all(leaf.device.type == "cpu" for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))
        kernels = self.execution == "kernels" or (self.execution == "auto" and on_cpu and has_onednn_int8())
        # TorchScript's tracer, which loggers draw a model's graph with, does not take the arguments of the kernels.
        kernels = kernels and torch._C._get_tracing_state() is None
        key = "kernels" if kernels else "simulation"
        if key not in self._compiled:
            # Concurrent threads get the same one.
            self._compiled.setdefault(key, Plans(partial(self._plan, Packed())) if kernels else self._simulation())
        return self._compiled[key]

    def _plan(self, packed: Packed, inputs: tuple[Any, ...]) -> tuple[Callable[..., Any], Any]:
        lowered = lower(constant_qparams(self.graph, self), self, inputs, packed=packed)
        if self.report is not None and lowered.unfused:
            self.report = self.report.as_it_ran(lowered.unfused)
        return lowered.compile(self), lowered.outputs

    def _simulation(self) -> Callable[..., Any]:
        forward = compile_graph(constant_qparams(self.graph, self), "INT8 simulation")
        return lambda *inputs: forward(self, *inputs)

    def kernels(self, *inputs: Any) -> LoweredGraph:
        """The graph that runs on the CPU, with its oneDNN operators, for inspection.

        Args:
            *inputs: inputs of the sizes it is for; by default the example inputs.
        """
        values = inputs or tuple(self.example_inputs.values())
        if not values:
            raise ValueError("this INT8 module has no example inputs: give kernels(...) the inputs of a call")
        return lower(constant_qparams(self.graph, self), self, [tree_map(_as_tensor, value) for value in values])

    def train(self, mode: bool = True) -> Int8Module:
        """Nothing here trains: float modules stay in evaluation mode."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Module:
        self._compiled.clear()
        super()._apply(fn, recurse)
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As any module's. Where it stands in a float module's place, that one's own weights change nothing: a callback
        puts the average that INT8 was made of in place once more.

        Raises:
            RuntimeError: where they are other float weights, which no ranges are known for, or keys are missing.
        """
        original = original_of(self)
        if original is not None and not set(self.state_dict()) <= set(state_dict):
            held = {name: v for name, v in original.state_dict().items() if not name.startswith(f"{QUANTIZERS}.")}
            if set(held) == set(state_dict):
                if all(torch.equal(v.cpu(), state_dict[name].cpu()) for name, v in held.items()):
                    return _IncompatibleKeys([], [])
                raise RuntimeError(
                    f"these are float weights of the {type(original).__name__} that this INT8 network stands in for, "
                    f"and other ones than it was made of: it has ranges for those alone. Convert these with "
                    f"lq.quantize_checkpoint, or remove the callback that loads them after fit"
                )
        self._compiled.clear()
        return super().load_state_dict(state_dict, *args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Also called when a parent module loads; packed weights made from the old tensors must go.
        self._compiled.clear()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        own = {f"{prefix}{name}" for name in super().state_dict()}
        if not own <= state_dict.keys() and any(name.startswith(prefix) for name in state_dict):
            *_, error_messages = args
            error_messages.append(
                f"{prefix.removesuffix('.') or 'this module'!r} is an INT8 network by now, and these are weights of "
                f"another one, as of the float module in a checkpoint: load them into a new module, or have the "
                f"Trainer do it, as in trainer.test(ckpt_path=...)"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_compiled": {}, "graph": graph_state(self.graph)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "graph": graph_from_state(state["graph"])})

    def extra_repr(self) -> str:
        return f"inputs=({', '.join(self._input_names)}), execution={self.execution!r}"
