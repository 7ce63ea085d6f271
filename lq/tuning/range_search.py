"""Range search: the activations' ranges, tuned one after another by what the network's outputs gain."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lq.analysis.measures import energy, error_energy, float_leaves
from lq.errors import CalibrationError
from lq.numerics.quantizer import Quantizer
from lq.util.modes import evaluating
from lq.util.progress import progress_bar
from lq.workflow.calibrate import batch_size, default_forward
from lq.workflow.convert import check_calibrated
from lq.workflow.prepare import activation_quantizers, quantizers_off, simulate

M = TypeVar("M", bound=nn.Module)

#: By what share a range is made narrower, or wider again, in each round over the tensors: first those far off are
#: found, later they are fitted to one another.
_STEPS = (0.5, 0.25, 0.1, 0.05)

#: A smaller gain may be one for these samples alone: of the outputs' squared error.
_WORTH = 0.002


def search_ranges(
    model: M,
    batches: Iterable[Any],
    *,
    seconds: float = 60.0,
    num_samples: int = 128,
    forward: Callable[[Any], Any] | None = None,
    progress: bool = True,
) -> M:
    """Make the range of each activation narrower or wider, by what the outputs of the whole network gain.

    A calibrator looks at one tensor at a time: what clamping its largest values costs depends on the layers behind it.
    So a coordinate search (the joint tuning of step sizes of Nahshan et al. 2021, "Loss aware post-training
    quantization", with the squared error of the outputs for the loss, and a line search in place of Powell's method)
    goes through the tensors in order, round after round: ``[low, high]`` is scaled by ``1 - s`` for as long as
    ``|f(x) - f_int8(x)|^2`` becomes smaller, or else by its inverse, with a step ``s`` of 0.5, 0.25, 0.1 and 0.05. It
    ends with the time, or where a round with the last step gains nothing.

    Args:
        model: prepared for PTQ and calibrated; its ranges are changed in place. Weights stay as they are, and so do the
            statistics: a conversion for a target with other grids has ranges from these.
        batches: see :func:`lq.calibrate`.
        seconds: about how long it may take.
        num_samples: whole batches, until so many samples are there.
        forward: see :func:`lq.calibrate`.
        progress: whether to show a progress bar.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: where ``model`` is not prepared or has no ranges, or a number is out of its range.
        CalibrationError: where ``batches`` has no samples, or the outputs hold no floating-point numbers.

    Example:
        >>> import lq, torch, torchvision
        >>> images = torch.randn(8, 3, 32, 32)
        >>> model = lq.calibrate(lq.prepare(torchvision.models.resnet18(), images), [images])
        >>> model = lq.search_ranges(model, [images], seconds=1, progress=False)
        >>> int8 = lq.convert(model)
    """
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples} must be at least 1")
    if not seconds > 0:
        raise ValueError(f"seconds={seconds} must be above 0")
    check_calibrated(model, "lq.search_ranges(model, batches)")
    run = default_forward(model) if forward is None else forward
    until = time.perf_counter() + seconds
    with evaluating(model), torch.no_grad():
        kept = _first(batches, num_samples)
        with quantizers_off(model):
            wanted = [float_leaves(run(batch)) for batch in kept]
        if not any(map(energy, wanted)):
            raise CalibrationError("the outputs are zero, or hold no floating-point numbers: nothing is to be gained")
        simulate(model)

        def error() -> float:
            pairs = zip(kept, wanted, strict=True)
            return sum(error_energy(outputs, float_leaves(run(batch))) for batch, outputs in pairs)

        _search([q for q in activation_quantizers(model).values() if q.rounds], error, until, progress)
    return model


def _first(batches: Iterable[Any], num_samples: int) -> list[Any]:
    kept: list[Any] = []
    seen = 0
    for batch in batches:
        kept.append(batch)
        seen += batch_size(batch)
        if seen >= num_samples:
            break
    if not seen:
        raise CalibrationError("batches has no samples: give lq.search_ranges what the model is calibrated on")
    return kept


def _search(quantizers: list[Quantizer], error: Callable[[], float], until: float, progress: bool) -> None:
    """Round after round over all tensors, until one with the smallest step gains nothing."""
    least = error()
    steps, gained = list(_STEPS), True
    while (steps or gained) and time.perf_counter() < until:
        step = steps.pop(0) if steps else _STEPS[-1]
        gained = False
        bar = progress_bar(quantizers, len(quantizers), enabled=progress, label="Searching ranges")
        for quantizer in bar:
            if time.perf_counter() >= until:
                break
            for factor in (1 - step, 1 / (1 - step)):
                before, least = least, _line(quantizer, factor, error, least, until)
                gained = gained or least < before
                if least < before:
                    break


def _line(quantizer: Quantizer, factor: float, error: Callable[[], float], least: float, until: float) -> float:
    """Scale a range for as long as the error becomes smaller; the error then."""
    while time.perf_counter() < until:
        kept = _range(quantizer)
        low, high = quantizer.quantized_range()
        quantizer.set_range(low * factor, high * factor)
        found = error()
        if not found < least * (1 - _WORTH):
            _put_back(quantizer, kept)
            break
        least = found
    return least


def _range(quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    return quantizer.scale.clone(), quantizer.zero_point.clone()


def _put_back(quantizer: Quantizer, kept: tuple[Tensor, Tensor]) -> None:
    quantizer.scale.copy_(kept[0])
    quantizer.zero_point.copy_(kept[1])
