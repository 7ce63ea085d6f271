"""Quantize: from a float module to an INT8 network whose accuracy is what the user asks for."""

from __future__ import annotations

import copy
import inspect
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lq.analysis.samples import first_samples
from lq.deployment.engine_module import IN_PROCESS
from lq.errors import CalibrationError
from lq.int8.module import Int8Module
from lq.results.tuning import Tuning, TuningStep
from lq.schemes.overrides import OverridesLike
from lq.schemes.targets import AUTO_TARGET, Target
from lq.tuning.builder import METHODS, Builder
from lq.tuning.goal import Goal
from lq.tuning.journal import Journal, check_journal, search_key
from lq.tuning.judged import Judge, check_runtime
from lq.tuning.search import Search
from lq.util.modes import evaluating
from lq.workflow.calibrate import AUTO, batch_size, calibrate_and_compare, default_forward
from lq.workflow.comparison import SQNR
from lq.workflow.prepare import prepare

_log = logging.getLogger("lq")


@dataclass(frozen=True)
class Quantized:
    """An INT8 network, and how it was come by; ``str(quantized)`` is a table of the steps.

    Args:
        int8: the network.
        model: the prepared and calibrated module that it is the conversion of, for :func:`lq.export`,
            :func:`lq.analyze` and the like: a copy of the one that was given.
        tuning: every step with its metric, which one was taken, whether it meets the goal and by how much it falls
            short, and which layers stayed in float.
    """

    int8: Int8Module
    model: nn.Module
    tuning: Tuning

    def __str__(self) -> str:
        return str(self.tuning)


def quantize(
    model: nn.Module,
    batches: Iterable[Any],
    evaluate: Callable[[nn.Module], float],
    *,
    max_drop: float,
    example_inputs: Any = None,
    target: str | Target = AUTO_TARGET,
    runtime: str = IN_PROCESS,
    calibrator: str | None = None,
    overrides: OverridesLike | None = None,
    bias_correction: bool | None = None,
    equalization: bool | None = None,
    learned_rounding: bool | None = False,
    rounding_seconds: float = 120.0,
    max_float_layers: int | None = None,
    fine_tune: Callable[[nn.Module], Any] | None = None,
    num_samples: int | None = 512,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    max_evaluations: int = 40,
    seconds: float | None = None,
    journal: str | Path | None = None,
    progress: bool = False,
) -> Quantized:
    """The INT8 network of a float ``model`` that loses at most ``max_drop`` points of the user's own metric.

    What costs nothing at run time comes first: the calibrator whose INT8 outputs are nearest to float, then the others
    that come close, then the methods that change weights and biases, each kept where it makes the drop smaller by a
    tenth. While the metric still drops by more than it may, the layers that do the most harm stay in float, as few of
    them as are enough: they are ordered by the noise that each alone makes in the outputs (see :func:`lq.analyze`), and
    found by doubling and bisection, so that a network of 170 layers takes about 20 evaluations.

    Args:
        model: a float module, which is left as it is.
        batches: calibration data, of the forms that :func:`lq.calibrate` takes; kept in memory.
        evaluate: called with ``model`` and then with INT8 networks, all of them modules, in evaluation mode and without
            gradients; gives a number of which larger is better, such as the accuracy on data that ``batches`` has not.
        max_drop: by how much the metric may fall, in points: hundredths of a metric that the float model has between 0
            and 1 (0.5 allows an accuracy to fall from 0.876 to 0.871), the metric's own units otherwise (from 87.6 to
            87.1).
        example_inputs: see :func:`lq.prepare`; by default two samples of the first batch: the tensor itself, the first
            item of a tuple, or what the forward takes of a dict.
        target: see :func:`lq.prepare`.
        runtime: the engine that judges, as :func:`lq.load` calls it: engines fuse and round differently, and the
            accuracy to keep is that of the one that will run. By default in process, which takes no file; with another
            one each network is exported, loaded and evaluated there; ``"auto"`` is the one of those installed that
            takes the least time for one sample.
        calibrator: the only one to try; by default all.
        overrides: see :func:`lq.prepare`.
        bias_correction: whether the mean error of each layer goes into its bias, see :func:`lq.correct_bias`: True for
            every network, None for where it is needed and helps, False for none.
        equalization: likewise, whether channels get similar ranges, see :func:`lq.equalize`.
        learned_rounding: likewise, whether each weight is rounded the way its layer's outputs gain from, see
            :func:`lq.learn_rounding`. By default not, for it takes minutes.
        rounding_seconds: how long that may take.
        max_float_layers: how many layers may stay in float for the accuracy's sake; None for as many as it takes, 0 for
            a network that is INT8 throughout.
        fine_tune: called where all of this is not enough, with a copy of ``model`` in training mode that computes with
            fake-quantizers: trains it, in place, by the user's own loop and data. A learning rate of about a hundredth
            of the training's is usual. The activations' ranges stay as calibrated. What it raises is logged, and the
            best network found before is returned. By default nothing is trained.
        num_samples: how many samples of ``batches`` at most.
        forward: runs a model, its first argument, on one batch, its second; for batches of any other form.
        max_evaluations: how often ``evaluate`` is called at most, with the float model.
        seconds: how long all of it may take; None for no limit. What takes longest in one piece, an evaluation or
            the first calibration, may exceed it.
        journal: a file for the steps, written as they are made. Where a process is killed, the same call goes on from
            there: what is in the file is not evaluated again, except the network that is taken at the end, whose ranges
            may come from other batches. Steps of another model, metric or engine are replaced.
        progress: whether to show a progress bar while calibrating.

    Returns:
        The network that meets it with the fewest layers in float, or the one that comes nearest.

    Raises:
        ValueError: where an argument is not one of its choices, or the metric of the float model is not finite.
        MissingRuntimeError: where the package of ``runtime`` is not installed.
        Whatever :func:`lq.prepare`, :func:`lq.calibrate`, :func:`lq.convert` and :func:`lq.export` raise.

    Example:
        >>> import lq, torch, torchvision
        >>> images, labels = torch.randn(16, 3, 32, 32), torch.randint(1000, (16,))
        >>> model = torchvision.models.resnet18()
        >>> accuracy = lambda network: (network(images).argmax(1) == labels).float().mean().item()
        >>> quantized = lq.quantize(model, [images], accuracy, max_drop=1.0, max_evaluations=3)
        >>> quantized.tuning.met or quantized.tuning.shortfall > 0
        True
    """
    begun = time.monotonic()
    goal = Goal(max_drop, max_evaluations, seconds, max_float_layers=max_float_layers)
    check_runtime(runtime)
    if not rounding_seconds > 0:
        raise ValueError(f"rounding_seconds={rounding_seconds} must be above 0")
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"num_samples={num_samples} must be at least 1, or None for all of them")
    if journal is not None:
        check_journal(Path(journal))
    kept = _first_batches(batches, num_samples)
    example = _example(model, kept[0]) if example_inputs is None else example_inputs
    prepared = prepare(copy.deepcopy(model), example, target=target, overrides=overrides)
    run = default_forward(prepared) if forward is None else partial(forward, prepared)
    comparison = calibrate_and_compare(prepared, kept, calibrator=calibrator or AUTO, forward=run, progress=progress)
    scores = {calibrator or AUTO: 0.0}  # the only one there is
    if comparison is not None:
        scores = {name: values[SQNR] for name, values in comparison.scores.items()}

    def judge(network: nn.Module) -> float:
        with evaluating(network), torch.no_grad():
            return float(evaluate(network))

    float_metric = judge(model)
    steps = None
    if journal is not None:
        about = {"metric": f"{float_metric:.6g}", "runtime": runtime, "num_samples": num_samples}
        steps = Journal(Path(journal), search_key(prepared, about))
    builder = Builder(
        prepared,
        kept,
        run,
        rounding_seconds=rounding_seconds,
        judge=Judge(runtime),
        fine_tune=None if fine_tune is None else lambda: fine_tune(prepared.train()),
    )
    wanted = dict(zip(METHODS, (bias_correction, equalization, learned_rounding), strict=True))
    always = tuple(name for name, value in wanted.items() if value)
    where_needed = tuple(name for name, value in wanted.items() if value is None)
    search = Search(builder, judge, float_metric, goal, always, where_needed, _tell, steps, begun)
    tuning, choice, int8 = search.run(scores)
    builder.settle(choice)
    _log.info("lq: %s", tuning.verdict)
    return Quantized(int8, prepared, tuning)


def _first_batches(batches: Iterable[Any], num_samples: int | None) -> list[Any]:
    """Whole batches, until so many samples are there."""
    kept: list[Any] = []
    seen = 0
    for batch in batches:
        kept.append(batch)
        seen += batch_size(batch)
        if num_samples is not None and seen >= num_samples:
            break
    if not kept:
        raise CalibrationError("batches is empty: give lq.quantize at least one batch to calibrate on")
    return kept


def _example(model: nn.Module, batch: Any) -> Any:
    """What :func:`lq.prepare` runs the model with."""
    few = first_samples(batch, 2)
    if isinstance(few, Mapping):
        inputs = inspect.signature(model.forward).parameters
        return {name: value for name, value in few.items() if name in inputs}
    return few[0] if isinstance(few, (tuple, list)) else few


def _tell(step: TuningStep) -> None:
    _log.info("lq: %s: %.4f (drop %+.4f), %.1f s", step.change, step.metric, step.drop, step.seconds)
