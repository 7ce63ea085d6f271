"""What calibration costs: time per batch against the float forward and against torch.ao, and time per calibrator.

python -m lq.recipes.bench_calibration              both networks, 25 rounds
python -m lq.recipes.bench_calibration rounds=5 networks=[resnet18]

Two cores of an AMD EPYC (Zen 3), PyTorch 2.15, against the float forward, smallest and largest median of the runs:
resnet18, 128 images of 32x32, 5 runs: min/max 1.02 to 1.09, histogram 1.09 to 1.15, torch.ao 1.55 to 1.67;
resnet50, 16 images of 224x224, 3 runs: min/max 1.00 to 1.10, histogram 0.98 to 1.14, torch.ao 2.0 to 2.4.
"""

from __future__ import annotations

import copy
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torchvision
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import lq
from lq.errors import ConfigError
from lq.numerics.calibrators import CALIBRATORS
from lq.recipes.blocks.config import field, main
from lq.workflow.calibrate import observing

#: Shape of the batch of images for each network.
BATCHES = {"resnet18": (128, 3, 32, 32), "resnet50": (16, 3, 224, 224)}


@dataclass
class Config:
    """Cost of calibration."""

    networks: list[str] = field(list(BATCHES), help="torchvision networks: resnet18 at 32x32, resnet50 at 224x224")
    rounds: int = field(25, help="every contender runs once a round; the figures are medians over the rounds")
    threads: int = field(2, help="CPU threads")
    peers: bool = field(True, help="also measure torch.ao's HistogramObserver")
    batch_size: int | None = field(None, help="images per batch, instead of each network's own")


def run(config: Config) -> None:
    for name in config.networks:
        if name not in BATCHES:
            raise ConfigError(f"networks={name!r} is unknown; choose from {', '.join(map(repr, BATCHES))}")
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        _report(config)
    finally:
        torch.set_num_threads(threads)


def _report(config: Config) -> None:
    table = Table(title=f"Time per calibration batch, {config.threads} CPU threads, median of {config.rounds} rounds")
    for header in ("network", "batch", "contender", "time", "against the float forward"):
        table.add_column(header, justify="right" if header in ("time", "against the float forward") else "left")
    durations = {}
    for name in config.networks:
        shape = BATCHES[name]
        batch = torch.randn(config.batch_size or shape[0], *shape[1:])
        times, prepared = measure(name, batch, config)
        for contender, (seconds, ratio) in times.items():
            table.add_row(name, "x".join(map(str, batch.shape)), contender, f"{seconds * 1e3:.1f} ms", f"{ratio:.3f}x")
        table.add_section()
        durations[name] = {method: _duration(prepared, method) for method in CALIBRATORS}
    console = Console()
    console.print(table)
    table = Table(title="Time to compute the ranges of all activations from the statistics, without data")
    table.add_column("calibrator")
    for name in durations:
        table.add_column(name, justify="right")
    for method in CALIBRATORS:
        table.add_row(method, *(f"{seconds[method] * 1e3:.0f} ms" for seconds in durations.values()))
    table.add_section()
    table.add_row("all", *(f"{sum(seconds.values()) * 1e3:.0f} ms" for seconds in durations.values()))
    console.print(table)


def measure(name: str, batch: Tensor, config: Config) -> tuple[dict[str, tuple[float, float]], nn.Module]:
    """Seconds per batch and ratio to the float forward by contender, taking turns; and the network with histograms."""
    network = torchvision.models.get_model(name).eval()
    histogram = _prepared_copy(network, batch, "histogram")
    contenders: dict[str, Callable[[Tensor], object]] = {
        "float forward": network,
        "lq, min/max": _prepared_copy(network, batch, "minmax"),
        "lq, histogram": histogram,
    }
    if config.peers:
        contenders["torch.ao, HistogramObserver"] = _torch_ao(network, batch)
    seconds: dict[str, list[float]] = {contender: [] for contender in contenders}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for contender in ("lq, min/max", "lq, histogram"):
            stack.enter_context(observing(contenders[contender]))  # type: ignore[arg-type]
        for model in contenders.values():
            model(batch)
        order = random.Random(0)
        for _ in range(config.rounds):
            # In a fixed order a contender would always follow the same other one and meet its caches.
            for contender, model in order.sample(list(contenders.items()), len(contenders)):
                start = time.perf_counter()
                model(batch)
                seconds[contender].append(time.perf_counter() - start)
    base = seconds["float forward"]
    ratios = {c: statistics.median(t / b for t, b in zip(s, base, strict=True)) for c, s in seconds.items()}
    return {c: (statistics.median(s), ratios[c]) for c, s in seconds.items()}, histogram


def _prepared_copy(network: nn.Module, batch: Tensor, observer: str) -> nn.Module:
    prepared: nn.Module = lq.prepare(copy.deepcopy(network), batch[:2], observer=observer)
    return prepared


def _duration(model: nn.Module, calibrator: str) -> float:
    start = time.perf_counter()
    lq.recalibrate(model, calibrator)
    return time.perf_counter() - start


def _torch_ao(network: nn.Module, batch: Tensor) -> nn.Module:
    """The network as torch.ao's FX mode observes it with its defaults for x86."""
    with _deprecated():
        from torch.ao.quantization import get_default_qconfig_mapping
        from torch.ao.quantization.quantize_fx import prepare_fx

        mapping = get_default_qconfig_mapping("x86")
        observed: nn.Module = prepare_fx(copy.deepcopy(network), mapping, example_inputs=(batch[:2],))
        return observed


@contextmanager
def _deprecated() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def plan(config: Config) -> str:
    peers = " and torch.ao" if config.peers else ""
    return f"time calibration of {', '.join(config.networks)} with lq{peers}, {config.rounds} rounds"


if __name__ == "__main__":
    main(Config, run, plan, description=__doc__ or "")
