"""The check that a captured graph computes what the module does."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_map

from lq.errors import CaptureError
from lq.graph.capture.capture import capture
from lq.graph.capture.captured import CapturedGraph
from lq.graph.capture.preserve import preserved
from lq.graph.capture.running import Recorder, call_arguments, followed_whole, run_followed
from lq.graph.interpret import node_values, output_of
from lq.interface.guards import compile_guard, fixes_the_batch, input_name

#: Largest RMS difference of what the same operators compute, in units of the dtype's epsilon times the
#: root mean square of the values.
_OUTPUTS, _GRADIENTS = 100, 1000


def difference(expected: Any, actual: Any, tolerance: float = _OUTPUTS) -> str | None:
    """How two values in any nesting differ by more than rounding, or None.

    Args:
        expected: what the module computes.
        actual: what is compared with it.
        tolerance: of the root mean square of the differences, in units of the dtype's epsilon.
    """
    wanted, given = tree_leaves(expected), tree_leaves(actual)
    if len(wanted) != len(given):
        return f"{len(given)} outputs instead of {len(wanted)}"
    for one, other in zip(wanted, given, strict=True):
        if isinstance(one, Tensor) != isinstance(other, Tensor):
            return f"a {type(other).__name__} instead of a {type(one).__name__}"
        if isinstance(one, Tensor):
            mismatch = _tensor_difference(one.detach(), other.detach(), tolerance)
        else:
            mismatch = None if _same(one, other) else f"{other!r} instead of {one!r}"
        if mismatch is not None:
            return mismatch
    return None


def _same(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except Exception:  # outputs that cannot be compared are ignored
        return True


def _tensor_difference(expected: Tensor, actual: Tensor, tolerance: float) -> str | None:
    if expected.shape != actual.shape:
        return f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    if expected.dtype != actual.dtype:
        return f"{actual.dtype} instead of {expected.dtype}"
    if not (expected.is_floating_point() or expected.is_complex()):
        return None if torch.equal(expected, actual) else "different integers"
    if torch.equal(expected, actual):
        return None
    if not torch.equal(torch.isfinite(expected), torch.isfinite(actual)):
        return "non-finite values in different places"
    finite = torch.isfinite(expected)
    size = torch.where(finite, expected, torch.zeros_like(expected)).abs().double()
    error = torch.where(finite, expected - actual, torch.zeros_like(expected)).abs().double()
    if expected.numel() == 0 or not error.any():
        return None
    scale = float(size.square().mean().sqrt())
    rms = float(error.square().mean().sqrt())
    if rms <= tolerance * torch.finfo(expected.dtype).eps * scale:
        return None
    return f"RMS difference {rms / scale if scale else rms:.2g} of the values'"


def seed_all(seed: int = 0) -> None:
    """Seed the random number generators that a forward may draw from."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def own_outputs(
    module: nn.Module, inputs: Mapping[str, Any], settings: Mapping[str, Any], *, as_registered: bool = False
) -> Any:
    """What ``module`` computes by its own forward, hooks and all; with the functions registered for its layers, or
    without."""
    seed_all()
    args, kwargs = call_arguments(module, _clones(inputs), settings)
    with torch.no_grad(), followed_whole(module) if as_registered else nullcontext():
        return module(*args, **kwargs)


def _clones(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A forward may write to its inputs."""
    return {name: tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, v) for name, v in inputs.items()}


def graph_values(
    captured: CapturedGraph, module: nn.Module, inputs: Mapping[str, Any], into: dict[Any, Any] | None = None
) -> dict[Any, Any]:
    """The values of all nodes of a captured graph."""
    seed_all()
    return node_values(captured.graph, module, _clones(inputs), lambda target: captured.read(module, target), into)


def first_sample(inputs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The inputs' first sample as a batch of one; None if they are one already, or have no common batch axis."""
    tensors = [leaf for leaf in tree_leaves(dict(inputs)) if isinstance(leaf, Tensor)]
    sizes = {len(tensor) if tensor.dim() else 0 for tensor in tensors}
    if len(sizes) != 1 or sizes <= {0, 1}:
        return None
    return {name: tree_map(lambda v: v[:1] if isinstance(v, Tensor) else v, v) for name, v in inputs.items()}


def capture_faithfully(
    module: nn.Module,
    inputs: Mapping[str, Any],
    settings: Mapping[str, Any],
    leaves: Mapping[str, str] | None = None,
) -> CapturedGraph:
    """Capture ``module`` in evaluation mode, and compare the graph with it, on a batch and on its first sample.

    Where they differ, the smallest submodule that differs becomes a leaf that runs the user's own code.

    Args:
        module: the module.
        inputs: see :func:`~lq.graph.capture.capture.capture`.
        settings: likewise.
        leaves: modules that are leaves from the start, by path, with the reason.

    Raises:
        CaptureError: where the forward cannot be captured, or differs in the module's own code.
    """
    inputs = _two_samples(module, inputs, settings)
    captured = _capture_faithfully(module, inputs, settings, leaves or {}, batch=None)
    if not any(map(fixes_the_batch, captured.guards)):
        return captured
    # The forward reads the batch size as a number, which torch.export fixes.
    tensors = [leaf for leaf in tree_leaves(dict(inputs)) if isinstance(leaf, Tensor)]
    if all(tensor.dim() and len(tensor) == len(tensors[0]) for tensor in tensors):
        try:
            free = _capture_faithfully(module, inputs, settings, leaves or {}, batch=_UNCOMMON)
        except CaptureError:
            return captured
        free.guards = tuple(guard for guard in free.guards if not fixes_the_batch(guard))
        if set(free.float_leaves) <= set(captured.float_leaves) and not any(map(_refuses_one, free.guards)):
            return free
    return captured


def _refuses_one(guard: str) -> bool:
    return guard.endswith(", 0) >= 2")


def _names(inputs: Mapping[str, Any]) -> list[str]:
    paths, _ = tree_flatten_with_path(dict(inputs))
    return [input_name(path) for path, value in paths if isinstance(value, Tensor)]


#: A batch size that divides no layer's size, small enough that a loop over the batch can be unrolled.
_UNCOMMON = 97


def _two_samples(module: nn.Module, inputs: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs, or a single sample repeated: torch.export treats a size of one as fixed.

    Not where the forward takes a single one alone, such as a bag of images that it takes out of the batch.
    """
    tensors = [leaf for leaf in tree_leaves(dict(inputs)) if isinstance(leaf, Tensor)]
    if not all(tensor.dim() > 1 and len(tensor) == 1 for tensor in tensors):
        return dict(inputs)
    two = {name: tree_map(lambda v: torch.cat([v, v]) if isinstance(v, Tensor) else v, v) for name, v in inputs.items()}
    try:
        with preserved(module), torch.no_grad():
            args, kwargs = call_arguments(module, _clones(two), settings)
            module(*args, **kwargs)
    except Exception:
        return dict(inputs)
    return two


def _capture_faithfully(
    module: nn.Module,
    inputs: Mapping[str, Any],
    settings: Mapping[str, Any],
    leaves: Mapping[str, str],
    batch: int | None,
) -> CapturedGraph:
    float_leaves = dict(leaves)
    while True:
        captured = capture(module, inputs, settings, float_leaves, batch=batch)
        known = {**float_leaves, **captured.float_leaves}
        sample = first_sample(inputs)
        fixed = batch is None and any(map(fixes_the_batch, captured.guards))
        for one in (inputs, None if fixed else sample):
            if one is None:
                continue
            mismatch = disagreement(captured, module, one, settings)
            if mismatch is None:
                continue
            path = _smallest(captured, module, one, settings, known)
            if path:
                float_leaves = {**known, path: f"its captured graph computes something else ({mismatch})"}
                break
            if one is sample:
                captured.guards = (*captured.guards, *(f"size({name!r}, 0) >= 2" for name in _names(inputs)))
                continue
            raise CaptureError(
                f"the graph captured from {type(module).__name__} does not compute what its forward does: {mismatch}. "
                f"Move the code that differs into a submodule of its own (that one then stays in float), or quantize "
                f"only a part of the model by naming it"
            )
        else:
            again = partial(capture, module, inputs, settings, dict(float_leaves), batch=batch)
            captured.guards = tuple(
                guard
                for guard in captured.guards
                if not _is_of_a_cache(guard, captured, module, inputs, settings, again)
            )
            return captured


#: A size in a condition.
_SIZE = re.compile(r"size\('(?P<name>[^']*)', (?P<axis>\d+)\)")

#: Sizes up to which those that a condition excludes are looked for, and how many of them are tried.
_LARGEST, _TRIED = 1024, 2


def _is_of_a_cache(
    guard: str,
    captured: CapturedGraph,
    module: nn.Module,
    inputs: Mapping[str, Any],
    settings: Mapping[str, Any],
    again: Callable[[], CapturedGraph],
) -> bool:
    """Whether a condition only says for which sizes the forward has kept what it computed in an earlier call, as
    detectors keep their grids: it is gone when the forward was used with other sizes in between, and the graph is right
    for the sizes that it excludes, too.

    Args:
        guard: of ``captured``.
        captured: the graph.
        module: see :func:`capture_faithfully`.
        inputs: likewise.
        settings: likewise.
        again: captures once more, as ``captured`` was.
    """
    asked = {(match["name"], int(match["axis"])) for match in _SIZE.finditer(guard)}
    if " != " not in guard or len(asked) != 1:
        return False
    (name, axis), holds = asked.pop(), compile_guard(guard)
    excluded = [size for size in range(1, _LARGEST) if not holds({name: [size] * (axis + 1)})]
    tried = [_taken(module, _candidates(inputs, name, axis, size), settings) for size in excluded[:_TRIED]]
    if not tried or not all(tried):
        return False
    present = next(value for value in tree_leaves(dict(inputs)) if isinstance(value, Tensor)).shape
    now = present[axis] if axis < len(present) else 1
    for size in (size for size in (2 * now, 3 * now, 5) if size not in excluded):
        for others in _taken(module, _candidates(inputs, name, axis, size), settings):
            with suppress(Exception), preserved(module):
                own_outputs(module, others, settings, as_registered=True)
                if guard in again().guards:
                    return False
                return all(disagreement(captured, module, each, settings) is None for given in tried for each in given)
    return False


def _candidates(inputs: Mapping[str, Any], name: str, axis: int, size: int) -> list[dict[str, Any]]:
    """Inputs with a size along an axis, and images that have it in height and width."""
    return [_resized(inputs, name, axis, size), *([_resized(inputs, name, None, size)] if axis > 1 else [])]


def _taken(module: nn.Module, candidates: list[dict[str, Any]], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Those of the inputs that a forward does not refuse."""
    taken = []
    for inputs in candidates:
        with suppress(Exception), preserved(module):
            own_outputs(module, inputs, settings, as_registered=True)
            taken.append(inputs)
    return taken


def _resized(inputs: Mapping[str, Any], name: str, axis: int | None, size: int) -> dict[str, Any]:
    """The inputs with one of another size along an axis, or in height and width. All have the same batch size."""
    names = iter(_names(inputs))

    def resized(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        is_meant = next(names) == name or axis == 0
        for each in range(2, value.dim()) if axis is None else [axis] if axis < value.dim() else []:
            if is_meant and value.shape[each] != 0:
                value = value.index_select(each, torch.arange(size, device=value.device) % value.shape[each])
        return value

    return {key: tree_map(resized, value) for key, value in inputs.items()}


def disagreement(
    captured: CapturedGraph,
    module: nn.Module,
    inputs: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    tolerance: float = _OUTPUTS,
    as_registered: bool = True,
) -> str | None:
    """How the outputs of a captured graph differ from those of the module's own forward, or None.

    Args:
        captured: the graph.
        module: the module, in the mode it was captured in.
        inputs: by name.
        settings: the forward's other arguments.
        tolerance: see :func:`difference`.
        as_registered: whether the forward that is compared with has the functions registered for its layers.
    """
    with preserved(module):
        try:
            expected = own_outputs(module, inputs, settings, as_registered=as_registered and bool(captured.registered))
        except Exception:  # the module does not take this batch: nothing to compare
            return None
    with preserved(module):
        try:
            actual = graph_values(captured, module, inputs)[output_of(captured.graph)]
        except Exception as error:
            return f"{type(error).__name__}: {error}".splitlines()[0]
    if captured.precision is not None:  # autocast computes in fewer bits than the graph
        tolerance *= torch.finfo(captured.precision).eps / torch.finfo(torch.float32).eps
    return difference(expected, actual, tolerance)


def _smallest(
    captured: CapturedGraph,
    module: nn.Module,
    inputs: Mapping[str, Any],
    settings: Mapping[str, Any],
    known: Mapping[str, str],
) -> str:
    """Path of the smallest submodule, not a leaf yet, in which graph and forward first differ."""
    with preserved(module), torch.no_grad():
        recorder = Recorder(module, copy.deepcopy(captured.positions), values=True)
        seed_all()
        run_followed(module, recorder, _clones(inputs), settings)
    nodes = {node.meta["position"]: node for node in captured.graph.nodes if "position" in node.meta}
    with preserved(module):
        values: dict[Any, Any] = {}
        with suppress(Exception):  # the values before the error show where it is
            graph_values(captured, module, inputs, into=values)
    path = ""
    assert recorder.values is not None
    for position, expected in recorder.values.items():
        node = nodes.get(position)
        if node is not None and (node not in values or difference(expected, values[node]) is not None):
            path = captured.positions.paths[position]
            break
    while path in known:
        path = path.rpartition(".")[0]
    return path


def training_differences(
    module: nn.Module, twin: Any, inputs: Mapping[str, Any], settings: Mapping[str, Any]
) -> str | None:
    """How two training steps of a prepared module differ from those of the float module, or None.

    Both start from the same state: outputs, gradients of parameters and inputs, and buffers afterwards are compared.

    Args:
        module: the module, prepared, with its quantizers off.
        twin: a context manager in which it is the float module.
        inputs: example inputs by name.
        settings: the forward's other arguments.
    """
    with preserved(module), twin():
        try:
            expected = _training_steps(module, inputs, settings)
        except Exception:  # if the float model fails there is nothing to compare
            return None
    with preserved(module):
        try:
            actual = _training_steps(module, inputs, settings)
        except Exception as error:
            return f"a training step fails with {type(error).__name__}: {error}".splitlines()[0]
    for (what, one), (_, other) in zip(expected, actual, strict=True):
        mismatch = difference(one, other, _OUTPUTS if what == "outputs" else _GRADIENTS)
        if mismatch is not None:
            return f"{what} of a training step: {mismatch}"
    return None


def _training_steps(module: nn.Module, inputs: Mapping[str, Any], settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    module.train()
    seed_all()
    seen: list[tuple[str, Any]] = []
    for _ in range(2):
        given = _clones(inputs)
        leaves = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        with torch.enable_grad():
            for leaf in leaves:
                leaf.requires_grad_()
            # A forward may write to its inputs, which autograd does not allow for leaves.
            passed = {
                name: tree_map(lambda v: v.view_as(v) if isinstance(v, Tensor) else v, v) for name, v in given.items()
            }
            args, kwargs = call_arguments(module, passed, settings)
            outputs = module(*args, **kwargs)
            floats = [o for o in tree_leaves(outputs) if isinstance(o, Tensor) and o.requires_grad]
            seen.append(("outputs", tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, outputs)))
            if floats:
                loss = torch.stack([o.float().square().mean() for o in floats]).sum()
                gradients = torch.autograd.grad(loss, [*parameters, *leaves], allow_unused=True)
                seen.append(("gradients", list(gradients)))
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers() if not name.startswith("lq_")}
    seen.append(("buffers", buffers))
    return seen
