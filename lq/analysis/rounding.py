"""Which tensors and weights are rounded: in the INT8 model, and with only some of its layers in INT8."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx, nn

from lq.graph.analysis import GraphAnalysis
from lq.graph.placement import Chain, Operator, Placement, place, site, source_of
from lq.numerics.functional import fake_quantize
from lq.numerics.quantizer import Quantizer, WeightQuantizer, weight_quantizer
from lq.schemes.overrides import Overrides, Scheme
from lq.workflow.convert import on_grid
from lq.workflow.prepare import prepared_forward, quantizers


@dataclass(frozen=True)
class Rounding:
    """What is rounded, in one variant of a model.

    Args:
        tensors: the grid of what a node of the float graph makes, for all that read it.
        weights: the rounded weight of a layer, by the node that reads or computes the float one.
    """

    tensors: dict[fx.Node, Quantizer] = field(default_factory=dict)
    weights: dict[fx.Node, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _InFloat(Overrides):
    """Overrides that keep more layers in float: a set of them, because a lookup is faster than matching names."""

    names: frozenset[str] = frozenset()

    def in_float(self, name: str) -> bool:
        return name in self.names or super().in_float(name)


class Roundings:
    """The variants of a prepared model.

    A variant is what :func:`lq.prepare` makes of the model with other ``overrides``: its placement is worked out anew,
    because a layer in float may leave its residual add to another one. Quantizers are only read, never run.

    Args:
        model: prepared, with ranges.
        analysis: its float graph.

    Raises:
        CalibrationError: where a quantizer's range is not finite.
    """

    def __init__(self, model: nn.Module, analysis: GraphAnalysis) -> None:
        self._model = model
        self._analysis = analysis
        self._scheme = prepared_forward(model).scheme()
        self._quantizers = quantizers(model)
        self._regridded: dict[Any, Quantizer] = {}
        base = analysis.placement
        self._kernels = {kernel.name: kernel for kernel in base.kernels}
        self.weight_quantizers = {
            c.weight_key: _up_to_date(self._quantizers[c.weight_key], self.weight(c)) for c in base.chains
        }
        self._weights = {
            chain.op.weight: rounded(self.weight(chain), self.weight_quantizers[chain.weight_key])
            for chain in base.chains
        }
        self.whole = self._rounding(base, self._scheme, base)

    def weight(self, chain: Chain) -> Tensor:
        """The float weight of a layer, as it is before a batch norm is folded in."""
        weight: Tensor = self._analysis.values[chain.op.weight]
        return weight.detach()

    def of(self, node: fx.Node) -> Quantizer | None:
        """The quantizer of the tensor whose grid ``node`` lies on, where it has one."""
        return self._quantizers.get(site(source_of(node)))

    def only(self, name: str) -> Rounding:
        """As if ``overrides`` kept all layers in float but ``name``.

        An operator that is a kernel of its own is one between convolutions in INT8 alone, so that no ``overrides``
        leave nothing but it: its own tensors, operands and result, are then rounded.
        """
        kernel = self._kernels[name]
        base = self._analysis.placement
        if isinstance(kernel, Operator):
            nodes = [*map(source_of, kernel.reads), kernel.end]
            return Rounding({node: self._quantizers[site(node)] for node in nodes if site(node) in self._quantizers})
        others = frozenset(self._kernels) - {name}
        placement = self._place(replace(self._scheme, overrides=_InFloat(self._scheme.overrides.specs, others)))
        # On the grids of the model as it is: fewer bits that a tensor's maker asks for are part of what is measured.
        return self._rounding(placement, self._scheme, base)

    def all_but(self, name: str) -> Rounding | None:
        """With ``overrides={name: None}``; None where that needs the range of a tensor that has no statistics."""
        specs = [(pattern, spec) for pattern, spec in self._scheme.overrides.specs if pattern != name]
        scheme = replace(self._scheme, overrides=Overrides((*specs, (name, None))))
        placement = self._place(scheme)
        try:
            return self._rounding(placement, scheme, placement)
        except ValueError:
            return None

    def _place(self, scheme: Scheme) -> Placement:
        return place(self._analysis.captured, self._analysis.values, scheme)

    def _rounding(self, placement: Placement, scheme: Scheme, named_by: Placement) -> Rounding:
        tensors = {node: self._on_grid(scheme, site(node), named_by.names_of(node)) for node in placement.activations}
        return Rounding(tensors, {chain.op.weight: self._weights[chain.op.weight] for chain in placement.chains})

    def _on_grid(self, scheme: Scheme, name: str, names: tuple[str, ...]) -> Quantizer:
        grid = scheme.activation(*names)
        key = (name, grid)
        if key not in self._regridded:  # variants are compared by identity: one object for each grid
            self._regridded[key] = on_grid(grid, self._quantizers[name], name, scheme.target)
        return self._regridded[key]


def _up_to_date(quantizer: Quantizer, weight: Tensor) -> Quantizer:
    """With the range that the next forward would give it; the quantizer itself is left as it is."""
    assert isinstance(quantizer, WeightQuantizer)
    fresh = weight_quantizer(quantizer.spec, weight, quantizer.range)
    fresh.calibrator = quantizer.calibrator
    fresh.state = quantizer.state
    fresh.scale, fresh.zero_point = quantizer.scale.clone(), quantizer.zero_point.clone()
    fresh.calibrated = quantizer.calibrated
    fresh.refresh(weight)
    return fresh


def rounded(x: Tensor, quantizer: Quantizer) -> Tensor:
    """``x`` on the grid of ``quantizer``, whatever its state; its observer does not see ``x``."""
    return fake_quantize(x, quantizer.scale, quantizer.zero_point, quantizer.spec)
