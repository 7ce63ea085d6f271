"""A forward as ``torch.export`` sees it, with the origin of each node."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from itertools import islice
from typing import Any

import torch
from sympy import Eq, preorder_traversal  # type: ignore[import-untyped]
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx import traceback
from torch.fx.experimental import _config as _fx_config
from torch.fx.experimental import proxy_tensor
from torch.nn import functional

from lq.graph.capture import leaves
from lq.graph.capture.calls import UNKNOWN, CallTracker, FollowedForward
from lq.graph.capture.running import Arguments, Recorder
from lq.util.causes import first_line
from lq.util.quiet import quiet

#: `torch.export`'s loggers that warn of sizes that turn out to be fixed, which is up to the network.
TALKATIVE = ("torch.export", "torch._export", "torch.fx.experimental", "torch._subclasses", "torch._dynamo")

#: The longest expression of a free size, in terms. torch.export simplifies each size in each operator: padding that is
#: computed from the image size before each strided convolution takes it minutes, with expressions of thousands of
#: terms, where ordinary networks need up to 50.
_MAX_TERMS = 100


class _UnwieldySizeError(Exception):
    """A free size has become too long an expression to go on with."""


def _fixes_a_size(guard: Any) -> bool:
    """Whether a condition says that a size is a number, as where a function takes it as a plain integer (the kernel of
    a pooling), or returns as many tensors (``unbind``)."""
    return isinstance(guard, Eq) and any(side.is_Integer and side > 1 for side in guard.args)


def _check_size(size: Any) -> None:
    if isinstance(size, torch.SymInt):
        terms = preorder_traversal(size.node._expr)
        if next(islice(terms, _MAX_TERMS, None), None) is not None:
            raise _UnwieldySizeError(f"a size is an expression of more than {_MAX_TERMS} terms")


#: ``tensor.data``, which torch.export does not follow.
_DATA = Tensor.data.__get__  # type: ignore[attr-defined]


class Exporter(CallTracker):
    """Marks the nodes that ``torch.export`` writes with their origin, and calls leaves as one operator."""

    def __init__(self, root: nn.Module, reference: Recorder, float_leaves: dict[str, str]) -> None:
        super().__init__(root, reference.positions, adds=False, start=(UNKNOWN, ""))
        self.reference = reference
        self.float_leaves = float_leaves
        self.failed: dict[str, str] = {}
        self.calls: dict[int, leaves.LeafCall] = {}
        self.shape_env: Any = None
        #: The sizes of the inputs, by torch.export's symbols: number of the tensor, and axis.
        self.symbols: dict[str, tuple[int, int]] = {}
        self.examples: tuple[Tensor, ...] = ()
        self._asked_by_functions: set[int] = set()

    def learn_symbols(self, tensors: tuple[Tensor, ...]) -> None:
        """Note the inputs' sizes, before anything depends on them."""
        for number, tensor in enumerate(tensors):
            for axis, size in enumerate(tensor.shape):
                if isinstance(size, torch.SymInt):
                    self.shape_env = size.node.shape_env
                    self.symbols[str(size.node._expr)] = (number, axis)

    def _number_of_guards(self) -> int:
        return 0 if self.shape_env is None else len(self.shape_env.guards)

    def own_guards(self) -> list[Any]:
        """The conditions on sizes that decide what the graph computes: those that the forward itself tested, and those
        of torch's functions that fix a size, which may be a constant in the graph from there on."""
        guards = [] if self.shape_env is None else [guard.expr for guard in self.shape_env.guards]
        return [g for index, g in enumerate(guards) if index not in self._asked_by_functions or _fixes_a_size(g)]

    def on_module(self, followed: FollowedForward, position: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        shapes = self.reference.calls.get(position)
        if followed.path in self.float_leaves and shapes is not None:
            return self._call_leaf(followed.path, position, shapes, args, kwargs)
        try:
            return followed.run(*args, **kwargs)
        except _UnwieldySizeError:
            raise
        except Exception as error:
            # It ran with real tensors; the innermost module that fails with fake ones becomes a leaf.
            if shapes is None or not followed.path:
                raise
            self.failed[followed.path] = reason(error)
            return self._call_leaf(followed.path, position, shapes, args, kwargs)

    def _call_leaf(
        self, path: str, position: int, shapes: leaves.Shapes, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        call, result, number = leaves.call(path, shapes, args, kwargs)
        call.position = position
        self.calls[number] = call
        return result

    def watches(self, name: str) -> bool:
        return True

    def on_function(
        self, function: Callable[..., Any], position: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if function == _DATA:
            return args[0].detach()  # the same tensor without its history, which torch.export can follow
        if _pools_all(function, args, kwargs):
            # The kernel would be a constant: a pooling of everything, such as GeM's, takes any size so.
            function, args, kwargs = functional.adaptive_avg_pool2d, (args[0], 1), {}
        before = self._number_of_guards()
        with traceback.annotate({"lq_path": self.path, "lq_module": self.module_position}):
            result = function(*args, **kwargs)
        self._asked_by_functions.update(range(before, self._number_of_guards()))
        if isinstance(result, Tensor):
            for size in result.shape:
                _check_size(size)
            node = None if position == UNKNOWN else _node_of(result)
            if node is not None:
                # A call that returns the tensor it takes (`contiguous`) made no node: this one is the call before it.
                node.meta.setdefault("custom", {}).setdefault("lq_position", position)
        return result


def _pools_all(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call is an average pooling of the whole image, whose size varies."""
    if function is not functional.avg_pool2d or not args or not isinstance(args[0], Tensor):
        return False
    given = dict(zip(("kernel_size", "stride"), args[1:], strict=False)) | kwargs
    kernel, stride = given.get("kernel_size"), given.get("stride")
    if len(args) > 3 or not set(given) <= {"kernel_size", "stride"} or not isinstance(kernel, (tuple, list)):
        return False
    sizes: list[Any] = list(args[0].shape[-2:])
    if len(kernel) != 2 or not all(isinstance(size, torch.SymInt) for size in (*kernel, *sizes)):
        return False
    same = [a.node.expr == b.node.expr for a, b in zip(kernel, sizes, strict=True)]
    return all(same) and stride is None


def _node_of(value: Tensor) -> fx.Node | None:
    """The node that makes a tensor in the graph that is being written."""
    mode = proxy_tensor.get_proxy_mode()
    slot = None if mode is None else proxy_tensor.get_proxy_slot(value, mode.tracer, None)
    return None if slot is None else slot.proxy.node  # type: ignore[no-any-return]


def reason(error: Exception) -> str:
    if "data-dependent" in str(error):
        return "its control flow depends on data"
    return first_line(error)


class Call(nn.Module):
    """A call of ``module`` with its tensors as arguments and everything else fixed, for ``torch.export``."""

    def __init__(self, module: nn.Module, arguments: Arguments, exporter: Exporter) -> None:
        super().__init__()
        self.module = module
        self._arguments = arguments
        self._exporter = exporter

    def forward(self, *tensors: Tensor) -> Any:
        self._exporter.learn_symbols(tensors)
        args, kwargs = self._arguments.call(tensors)
        return self.module(*args, **kwargs)


def any_size() -> AbstractContextManager[Any]:
    """Let torch.export treat 0 and 1 like any other size, where it would exclude them from the program."""
    if not hasattr(_fx_config, "backed_size_oblivious"):
        return nullcontext()
    settings: AbstractContextManager[Any] = _fx_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    return settings


def has_channels(axis: int, value: Tensor) -> bool:
    """Whether ``axis`` is that of an image's channels, whose number is no size that varies. Of fewer axes it may be a
    sequence's length, of more the number of views or frames."""
    return axis == 1 and value.dim() == 4


@contextmanager
def _without_the_graph_so_far() -> Iterator[None]:
    """Pass on what is written to stderr, but for the graph that torch prints where it meets a condition on data, which
    is handled."""
    written, graph = io.StringIO(), None
    try:
        with redirect_stderr(written):
            yield
    except Exception as error:
        graph = getattr(error, "partial_fx_graph", None)
        raise
    finally:
        text = written.getvalue()
        sys.stderr.write(text if graph is None else text.replace(f"{graph}\n", ""))


def export(call: Call, tensors: tuple[Tensor, ...], exporter: Exporter) -> ExportedProgram:
    """``call`` as a program, with sizes as free as the network allows."""

    def axes(value: Tensor, free_sizes: bool) -> dict[int, Any]:
        free = range(value.dim()) if free_sizes else range(min(value.dim(), 1))
        # torch.export treats a size of one specially: an example of that size would fix it.
        return {axis: Dim.AUTO for axis in free if not has_channels(axis, value) and value.shape[axis] > 1}

    attempts = (True, False)
    for free_sizes in attempts:
        exporter.calls.clear()
        exporter.failed.clear()
        exporter._stack[:] = exporter._stack[:1]
        dynamic = (tuple(axes(value, free_sizes) for value in tensors),)
        try:
            with quiet(*TALKATIVE), _without_the_graph_so_far(), any_size(), traceback.preserve_node_meta(), exporter:
                return torch.export.export(call, tensors, dynamic_shapes=dynamic, strict=False)
        except Exception:
            if free_sizes is attempts[-1]:
                raise
    raise AssertionError
