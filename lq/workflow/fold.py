"""Batch norm folded into the layer before it, and the check that nothing else has changed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from lq.errors import FoldError
from lq.graph.analysis import GraphAnalysis
from lq.graph.emission import EmittedGraph, emit
from lq.graph.forward import without_quantizers
from lq.graph.interpret import node_values
from lq.util.modes import evaluating
from lq.workflow.prepare import PreparedForward, prepare, prepared_forward, quantizers_off

#: Largest difference that folding batch norm may make, relative to the layer's largest output.
FOLD_TOLERANCE = 1e-3


def fold_batch_norm(
    model: nn.Module, example_inputs: Any, *, example_kwargs: Mapping[str, Any] | None = None
) -> fx.GraphModule:
    """A float network for inference that computes what ``model`` does in evaluation mode, without its batch norms.

    :func:`lq.convert` folds by itself. This shows what folding alone gains: a fair baseline for INT8.

    Args:
        model: a float module, which is left as it is.
        example_inputs: see :func:`lq.prepare`.
        example_kwargs: likewise.

    Returns:
        The network; its attribute ``fold_difference`` is the largest difference that folding made in the output of a
        layer on the example inputs, relative to that output's largest value.

    Raises:
        FoldError: where that is more than 1e-3.
        CaptureError: where the forward of ``model`` cannot be captured as a graph.

    Example:
        >>> import lq, torch, torchvision
        >>> x = torch.randn(2, 3, 32, 32)
        >>> folded = lq.fold_batch_norm(torchvision.models.resnet18(), x)
        >>> folded.fold_difference < 1e-3, [m for m in folded.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        (True, [])
    """
    return folded_float(prepare(copy.deepcopy(model), example_inputs, example_kwargs=example_kwargs))


def folded_float(prepared: nn.Module) -> fx.GraphModule:
    """The float network of a prepared module without its batch norms, see :func:`fold_batch_norm`.

    What is not folded is shared with ``prepared``. It takes the forward's inputs by position, and no settings.

    Raises:
        FoldError: where folding changes an output by more than 1e-3.
    """
    forward = prepared_forward(prepared)
    analysis = forward.analyze()
    with quantizers_off(prepared), without_quantizers(prepared), evaluating(prepared):
        difference, emitted = check_fold(prepared, forward, analysis)
    folded = fx.GraphModule(emitted.root, emitted.graph)
    folded.fold_difference = difference  # type: ignore[assignment]
    return folded.eval()


def check_fold(model: nn.Module, forward: PreparedForward, analysis: GraphAnalysis) -> tuple[float, EmittedGraph]:
    """Fold, and compare with the float model on the example inputs, at the end of each layer.

    Each layer is given what it is given in the float model: a deep network may amplify what was rounded in the first
    ones.

    Args:
        model: prepared, with its quantizers off.
        forward: its forward.
        analysis: of its graph.

    Returns:
        The largest relative difference, and the folded graph in float.

    Raises:
        FoldError: where it is too large.
    """
    folded: EmittedGraph = emit(model, analysis, None)
    placeholders = [node for node in analysis.graph.nodes if node.op == "placeholder"]
    inputs = {str(node.target): analysis.values[node] for node in placeholders}
    instead = {after: analysis.values[before] for before, after in folded.ends.values()}
    values = node_values(folded.graph, folded.root, inputs, instead=instead)
    largest = 0.0
    pairs = [(name, analysis.values[before], values[after]) for name, (before, after) in folded.ends.items()]
    output = next(node for node in reversed(analysis.graph.nodes) if node.op == "output")
    folded_output = next(node for node in reversed(folded.graph.nodes) if node.op == "output")
    outputs = zip(tree_leaves(analysis.values[output]), tree_leaves(values[folded_output]), strict=True)
    pairs += [("the output", before, after) for before, after in outputs if isinstance(before, Tensor)]
    for name, before, after in pairs:
        if not before.is_floating_point() or before.numel() == 0:
            continue
        scale = before.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        difference = float((before - after).abs().max() / scale)
        if not difference <= FOLD_TOLERANCE:  # written so that a NaN is refused too
            raise FoldError(
                f"{name}: folding batch norm changes its output by {difference:.2g} of the largest value (at most "
                f"{FOLD_TOLERANCE:g} is accepted). A forward hook that changes what flows between convolution, batch "
                f"norm and activation, a NaN in the weights, or extreme running statistics do that; remove the cause"
            )
        largest = max(largest, difference)
    return largest, folded
