"""Which calibrator suits a model best."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils._pytree import tree_leaves

from lq.errors import CalibrationError
from lq.numerics.calibrators import CALIBRATORS, Calibrator, get_calibrator
from lq.util.display import as_text
from lq.util.distributed import agreed, world_size
from lq.util.modes import evaluating
from lq.workflow.prepare import activation_quantizers, quantizers, quantizers_off, simulate
from lq.workflow.recalibrate import recalibrate

#: Signal-to-quantization-noise ratio of the outputs, in decibels.
SQNR = "output_sqnr_db"


@dataclass(frozen=True)
class CalibratorComparison:
    """A model's metrics with each calibrator; ``str(comparison)`` is a table.

    Args:
        scores: metrics by name, by calibrator.
        float_metrics: the same metrics of the float model; empty where they make no sense for it.
    """

    scores: dict[str, dict[str, float]]
    float_metrics: dict[str, float]

    def best(self, metric: str | None = None, *, smallest: bool = False) -> str:
        """The calibrator with the largest ``metric`` (by default the first one there is), or with the smallest.

        Raises:
            ValueError: where there is no such metric.
        """
        names = list(next(iter(self.scores.values())))
        metric = names[0] if metric is None else metric
        if metric not in names:
            raise ValueError(f"metric={metric!r} was not measured; choose one of {', '.join(map(repr, names))}")
        sign = -1.0 if smallest else 1.0
        # A NaN is worse than any number: a broken model must not win.
        return max(self.scores, key=lambda name: (not math.isnan(v := self.scores[name][metric]), sign * v))

    def table(self) -> Table:
        table = Table(title="Calibrators")
        metrics = list(next(iter(self.scores.values())))
        table.add_column("calibrator")
        for metric in metrics:
            table.add_column(metric, justify="right")
        if self.float_metrics:
            table.add_row("float", *(f"{self.float_metrics[metric]:.4f}" for metric in metrics), end_section=True)
        for name, values in self.scores.items():
            table.add_row(name, *(f"{values[metric]:.4f}" for metric in metrics))
        return table

    def __str__(self) -> str:
        return as_text(self.table(), 100)


def compare_calibrators(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float | Mapping[str, float]],
    calibrators: Iterable[str | Calibrator] = tuple(CALIBRATORS),
) -> CalibratorComparison:
    """Evaluate a calibrated model in float and with the ranges of each calibrator, from the statistics it holds.

    Args:
        model: a calibrated module; its ranges are restored afterwards.
        evaluate: called with ``model``, in evaluation mode and without gradients, as it simulates INT8; gives an
            accuracy, or several metrics by name.
        calibrators: those to compare; by default one of each kind.

    Returns:
        The metrics with each, in the order given.

    Raises:
        ValueError: where ``model`` is not prepared or has no statistics, or a calibrator is unknown or none is given.

    Example:
        >>> import lq, torch, torchvision
        >>> images, labels = torch.randn(8, 3, 32, 32), torch.randint(1000, (8,))
        >>> model = lq.prepare(torchvision.models.resnet18(), images)
        >>> model = lq.calibrate(model, [images])
        >>> accuracy = lambda model: (model(images).argmax(1) == labels).float().mean().item()
        >>> lq.compare_calibrators(model, accuracy, ["minmax", "mse"]).scores.keys()
        dict_keys(['minmax', 'mse'])
    """
    chosen = [get_calibrator(calibrator) for calibrator in calibrators]
    if not chosen:
        raise ValueError(f"calibrators is empty; give at least one of {', '.join(map(repr, CALIBRATORS))}")
    scores = {}
    with evaluating(model), torch.no_grad():
        with quantizers_off(model):
            float_metrics = _metrics(evaluate(model))
        with keeping_ranges(model):
            simulate(model)
            for calibrator in chosen:
                recalibrate(model, calibrator)
                scores[str(calibrator)] = _metrics(evaluate(model))
    return CalibratorComparison(scores, float_metrics)


def choose_calibrator(model: nn.Module, runs: Sequence[Callable[[], Any]]) -> CalibratorComparison:
    """Compare the calibrators by the error that INT8 makes in the outputs of a calibrated model.

    Args:
        model: the module, as it simulates INT8; in evaluation mode.
        runs: each runs the model on one batch of held-out data and returns its outputs.

    Returns:
        With each calibrator ``10 * log10(sum y**2 / sum (y - y_int8)**2)`` over all floating-point outputs ``y`` of
        all processes.

    Raises:
        CalibrationError: where the float outputs are not finite.
    """
    calibrators = [get_calibrator(name) for name in CALIBRATORS]
    energies = torch.zeros(len(calibrators), 2, dtype=torch.float64)  # of the outputs, and of their errors
    with agreed("comparing calibrators"):
        with quantizers_off(model):
            references = [_float_leaves(run()) for run in runs]
        with keeping_ranges(model):
            for calibrator, energy in zip(calibrators, energies, strict=True):
                recalibrate(model, calibrator)
                for run, reference in zip(runs, references, strict=True):
                    for y, y_int8 in zip(reference, _float_leaves(run()), strict=True):
                        if y.shape == y_int8.shape:  # of what is found, detections say, there may be another number
                            energy += torch.stack([y.square().sum(), (y - y_int8).square().sum()])
    scores = {}
    for calibrator, (signal, noise) in zip(calibrators, _sum_over_processes(energies, model), strict=True):
        if not torch.isfinite(signal):
            raise CalibrationError(
                "the float model's outputs on held-out calibration batches have a NaN or an infinity in them; "
                "check the calibration data"
            )
        # INT8 outputs can be infinite (-inf dB) or NaN (worse than any) where the float outputs are not.
        scores[str(calibrator)] = {SQNR: math.inf if noise == 0 else float(10 * torch.log10(signal / noise))}
    return CalibratorComparison(scores, {})


@contextmanager
def keeping_ranges(model: nn.Module) -> Iterator[None]:
    """Restore ranges, calibrators and states of the quantizers on exit."""
    activations = activation_quantizers(model)
    kept = {q: (q.scale.clone(), q.zero_point.clone(), q.calibrator) for q in activations.values()}
    states = {q: q.state for q in quantizers(model).values()}
    try:
        yield
    finally:
        for quantizer, (scale, zero_point, calibrator) in kept.items():
            quantizer.scale.copy_(scale)
            quantizer.zero_point.copy_(zero_point)
            quantizer.calibrator = calibrator
        for quantizer, state in states.items():
            quantizer.state = state


def _metrics(value: float | Mapping[str, float]) -> dict[str, float]:
    values = value if isinstance(value, Mapping) else {"score": value}
    return {name: float(number) for name, number in values.items()}


def _float_leaves(outputs: Any) -> list[Tensor]:
    leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return [leaf.detach().cpu().double() for leaf in leaves]


def _sum_over_processes(values: Tensor, model: nn.Module) -> Tensor:
    if world_size() > 1:
        # NCCL takes only GPU tensors.
        device = next((p.device for p in model.parameters()), values.device)
        values = values.float().to(device)
        dist.all_reduce(values)
    return values.cpu().double()
