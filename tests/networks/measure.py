"""One network in this process: prepared, trained a step, calibrated, converted; each compared with eager."""

from __future__ import annotations

import copy
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import lq
from lq.util.cpu import has_onednn_int8

from .networks import Network

#: 7-bit weights: INT8 kernels and simulation agree on every x86 CPU.
TARGET = "x86_avx2"

BATCH = 4

#: Relative differences up to this are the order of floating-point sums.
EQUAL = 1e-4


@dataclass
class Result:
    """What was found; None where the measurement did not come so far.

    Args:
        name: the network's.
        size: height and width of the images.
        prepare_seconds: of ``lq.prepare``.
        convert_seconds: of ``lq.convert``.
        batch_error: largest difference of the prepared model's output from eager's, by eager's largest value.
        sample_error: the same for the first sample alone.
        training_error: the same of outputs, gradients and buffers of one training step, whichever is worst.
        training_worst: what of the step that was.
        int8_share: of the multiply-adds (of convolutions, linear layers, matrix products; torch counts none inside its
            attention for CPUs), those that INT8 kernels do.
        int8_layers: how many rows of the report run in INT8.
        loose_norms: batch norms that the INT8 network computes on a convolution's very output, unfolded.
        float_layers: how many rows of the report stay float, by operator and reason.
        simulation_sqnr: INT8 simulation against eager float, decibels.
        rounding_sqnr: INT8 simulation against the calibrated model, decibels.
        kernels_sqnr: INT8 kernels against the simulation, decibels.
        error: the exception that ended the measurement, with the step that it ended.
    """

    name: str
    size: int
    prepare_seconds: float | None = None
    convert_seconds: float | None = None
    batch_error: float | None = None
    sample_error: float | None = None
    training_error: float | None = None
    training_worst: str = ""
    int8_share: float | None = None
    int8_layers: int | None = None
    loose_norms: int | None = None
    float_layers: dict[str, int] = field(default_factory=dict)
    simulation_sqnr: float | None = None
    rounding_sqnr: float | None = None
    kernels_sqnr: float | None = None
    error: str = ""


def measure(network: Network, save: Callable[[dict[str, Any]], None]) -> None:
    """Measure ``network``, and ``save`` what is known so far after each step: the next may be the last."""
    result = Result(network.name, network.size)
    x = torch.randn(BATCH, 3, network.size, network.size, generator=torch.Generator().manual_seed(1))

    @contextmanager
    def step(name: str) -> Iterator[None]:
        result.error = f"{name}: not finished"
        save(asdict(result))
        try:
            yield
        except Exception as error:
            # One line of a table.
            result.error = f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            save(asdict(result))
            raise SystemExit(0) from error
        result.error = ""
        save(asdict(result))

    with step("making"):
        torch.manual_seed(0)
        eager = with_statistics(network.make(), network.size).eval()
        model, trained = copy.deepcopy(eager), copy.deepcopy(eager)
    with step("prepare"):
        start = time.perf_counter()
        lq.prepare(model, x, target=TARGET)
        result.prepare_seconds = time.perf_counter() - start
    with step("float"), torch.no_grad():
        result.batch_error = difference(model(x), eager(x))
        result.sample_error = difference(model(x[:1]), eager(x[:1]))
    with step("training"):
        steps = zip(training_step(copy.deepcopy(model), x), training_step(trained, x), strict=True)
        errors = [(difference(actual, expected), what) for (what, actual), (_, expected) in steps]
        result.training_error, result.training_worst = max(errors)
    with step("calibrate"):
        lq.calibrate(model, [x])
    with step("convert"):
        start = time.perf_counter()
        int8 = lq.convert(model)
        result.convert_seconds = time.perf_counter() - start
        report = lq.report(int8)
        result.int8_layers = len(report.int8_layers)
        reasons = Counter(f"{layer.kind}: {layer.reason}" for layer in report.float_layers)
        result.float_layers = dict(reasons.most_common())
    with step("simulation"), torch.no_grad():
        int8.execution = "simulation"
        with LooseNorms() as norms:
            simulated = int8(x)
        result.loose_norms = norms.count
        result.simulation_sqnr = sqnr(simulated, eager(x))
        result.rounding_sqnr = sqnr(simulated, model(x))
    with step("kernels"):
        if has_onednn_int8():
            int8.execution = "kernels"
            result.kernels_sqnr = sqnr(int8(x), simulated)
            result.int8_share = 1 - float_operations(int8, x[:1]) / float_operations(eager, x[:1])


def float_operations(model: nn.Module, x: Tensor) -> int:
    """Floating-point operations of a call; those of INT8 kernels are none."""
    model.requires_grad_(False)  # torch's counter looks for gradients of leaves
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return int(counter.get_total_flops())


def with_statistics(model: nn.Module, size: int) -> nn.Module:
    """Batch norms with the mean of two random batches' statistics: with those of a new one, values grow or vanish."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    with torch.no_grad():
        for seed in (2, 3):
            model(torch.randn(2 * BATCH, 3, size, size, generator=torch.Generator().manual_seed(seed)))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model


def training_step(model: nn.Module, x: Tensor) -> list[tuple[str, Any]]:
    """Outputs, gradients and buffers of one step, each with its name."""
    torch.manual_seed(0)
    random.seed(0)
    x = x.clone().requires_grad_()
    outputs = [v for v in tree_leaves(model.train()(x)) if isinstance(v, Tensor)]
    generator = torch.Generator().manual_seed(0)
    torch.stack([(v * torch.randn(v.shape, generator=generator)).sum() for v in outputs]).sum().backward()
    own = [(n, p.grad) for n, p in model.named_parameters() if not n.startswith("lq_")]
    kept = [(n, b) for n, b in model.named_buffers() if not n.startswith("lq_")]
    found = [("output", [v.detach() for v in outputs]), ("gradient of the input", x.grad)]
    found += [(f"gradient of {n}", g) for n, g in own]
    return found + [(f"buffer {n}", b) for n, b in kept]


def difference(actual: Any, expected: Any) -> float:
    """Largest difference by the largest expected value; infinite where there is none on one side."""
    worst = 0.0
    for a, e in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        if (a is None) != (e is None):
            return math.inf
        if a is not None:
            largest = e.detach().double().abs().max().item() if e.numel() else 0.0
            error = (a.detach().double() - e.detach().double()).abs().max().item() if e.numel() else 0.0
            # A gradient in front of a batch norm is zero but for rounding.
            worst = max(worst, error / max(largest, 1e-3))
    return worst


def sqnr(actual: Any, expected: Any) -> float:
    """Signal to quantization noise, decibels; the worst of all outputs."""
    pairs = zip(tree_leaves(actual), tree_leaves(expected), strict=True)
    noise = [(e.square().mean() / (a - e).square().mean()).item() for a, e in pairs]
    return 10 * math.log10(max(min(noise), 1e-10)) if math.isfinite(min(noise)) else 99.0


class LooseNorms(TorchDispatchMode):
    """Counts the batch norms that are computed on the very output of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._convolved: list[Tensor] = []  # kept alive, or another tensor would get the number of one of them

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("convolution", "mkldnn_convolution", "addmm", "linear"):
            self._convolved.append(out)
        elif "batch_norm" in name and any(args[0] is known for known in self._convolved):
            self.count += 1
        return out
