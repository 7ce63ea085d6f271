"""Convert: a prepared, calibrated or trained module becomes an INT8 network."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lq.errors import CalibrationError
from lq.graph.analysis import GraphAnalysis
from lq.graph.emission import emit
from lq.graph.forward import without_quantizers
from lq.graph.placement import site
from lq.int8.module import Int8Module
from lq.numerics.quantizer import Quantizer, WeightQuantizer, weight_quantizer
from lq.numerics.spec import QuantSpec
from lq.schemes.overrides import Scheme
from lq.schemes.targets import Target, get_target
from lq.util.modes import evaluating
from lq.workflow.fold import check_fold
from lq.workflow.prepare import prepared_forward, quantizers, quantizers_off
from lq.workflow.reporting import make_report


def convert(model: nn.Module, target: str | Target | None = None) -> Int8Module:
    """The INT8 network of a prepared ``model``, which itself is left as it is.

    Batch norm is folded, and the fold is checked: the float model and the folded float model must agree on the
    example inputs, layer by layer.

    Args:
        model: prepared by :func:`lq.prepare`, and calibrated or trained.
        target: the engine family to convert for; by default the one the model was prepared for. Any other gets its
            own placement, with ranges from the same statistics: the same scales wherever both have the same grid.

    Returns:
        A module for inference. Its attribute ``report`` says what runs in INT8, and what does not and why.

    Raises:
        ValueError: where ``model`` is not prepared or not in float32, or a quantizer has no range yet.
        CalibrationError: where a quantizer's range is not finite.
        FoldError: where folding batch norm changes a layer's output by more than 1e-3 of its largest value.
    """
    forward = prepared_forward(model)
    resolved = forward.target if target is None else get_target(target)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype is not torch.float32:
            raise ValueError(f"parameter {name!r} is {parameter.dtype}; call model.float() before lq.convert(model)")
    check_calibrated(model, "lq.convert(model)")
    analysis = forward.analyze(resolved)
    chosen = _quantizers_for(forward.scheme(resolved), model, analysis)
    with quantizers_off(model), without_quantizers(model), evaluating(model):
        difference, _ = check_fold(model, forward, analysis)
        emitted = emit(model, analysis, chosen)
    int8 = Int8Module(emitted.root, emitted.graph)
    int8.stand_in_for(model)
    int8.fix_call(forward.signature, forward.settings)
    int8.guards = analysis.captured.guards
    int8.report = make_report(model, analysis, chosen, resolved, difference)
    int8.example_inputs = tree_map(lambda v: v.detach().cpu() if isinstance(v, Tensor) else v, forward.inputs)
    return int8


def check_calibrated(model: nn.Module, before: str) -> None:
    """Refuse a prepared ``model`` that has a quantizer without a range.

    Args:
        model: prepared by :func:`lq.prepare`.
        before: the call that needs the ranges, for the message.
    """
    by_name = quantizers(model)
    missing = [n for n, q in by_name.items() if q.rounds and not q.calibrated and not isinstance(q, WeightQuantizer)]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(by_name)} quantizers have no range yet ({missing[0]!r} is the first): call "
            f"lq.calibrate(model, batches), or train the model, before {before}"
        )


def _quantizers_for(scheme: Scheme, model: nn.Module, analysis: GraphAnalysis) -> dict[str, Quantizer]:
    """The quantizers of ``model`` that the scheme's target needs, on its grids."""
    by_name = quantizers(model)
    chosen: dict[str, Quantizer] = {}
    for node in analysis.placement.activations:
        name = site(node)
        grid = scheme.activation(*analysis.placement.names_of(node))
        chosen[name] = on_grid(grid, by_name[name], name, scheme.target)
    for chain in analysis.placement.chains:
        quantizer = by_name[chain.weight_key]
        assert isinstance(quantizer, WeightQuantizer)
        weight: Tensor = analysis.values[chain.op.weight]
        grid = scheme.weight(chain.name)
        if quantizer.spec != grid:
            quantizer = weight_quantizer(grid, weight, scheme.weight_range(chain.name))
        quantizer.refresh(weight)
        chosen[chain.weight_key] = quantizer
    return chosen


def on_grid(grid: QuantSpec, quantizer: Quantizer, name: str, target: Target) -> Quantizer:
    """``quantizer`` itself where it has that ``grid`` and a range, else a new one from the same statistics.

    Raises:
        ValueError: where there are no statistics.
        CalibrationError: where the range is not finite.
    """
    if quantizer.spec == grid and quantizer.calibrated:
        return _finite(quantizer, name)
    low, high = quantizer.observer.range()
    if low > high:
        raise ValueError(
            f"target={target.name!r} needs the range of {name!r}, whose quantizer holds no statistics: calibrate or "
            f"train the model, or load its statistics (lq.load_statistics), before it is converted for another target"
        )
    # A new one: the prepared model keeps the grid of its own target.
    retargeted = Quantizer(grid, quantizer.observer, quantizer.calibrator)
    retargeted.update_qparams()
    return _finite(retargeted, name)


def _finite(quantizer: Quantizer, name: str) -> Quantizer:
    if not torch.isfinite(quantizer.scale).all():
        raise CalibrationError(
            f"the range of {name!r} is not finite (scale {quantizer.scale:g}): training met a NaN or an infinity "
            f"there, or before it. Go back to a checkpoint from before that"
        )
    return quantizer
