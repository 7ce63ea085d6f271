"""Calibrates in one of several processes and writes the ranges: ``distributed_calibration.py RANK WORLD_SIZE FOLDER``.

Each case is run with the process group and, in the first process, before there is one: with all the data at once.
"""

from __future__ import annotations

import functools
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

import lq
from helpers.calibration import activations, found_ranges, images, network
from lq.numerics.calibrators import CALIBRATORS

NUMBERS_OF_BATCHES = (4, 5, 1)  # dealt out evenly, unevenly, and so that the second process has none
NUMBERS_OF_AUTO = (7, 1)
OBSERVERS = {"histogram": tuple(CALIBRATORS), "minmax": ("minmax",), "moving_average": ("moving_average",)}


@functools.cache
def prepared(observer: str) -> nn.Module:
    return lq.prepare(network(), images()[0], observer=observer)


def calibrated(batches: list[Tensor], observer: str = "histogram", **options: Any) -> nn.Module:
    return lq.calibrate(prepared(observer), batches, **options)


def statistics(model: nn.Module) -> list[dict[str, Any]]:
    states = [quantizer.observer.state_dict() for quantizer in activations(model).values()]
    return [{key: value.tolist() for key, value in state.items()} for state in states]


def error_of(batches: list[Tensor], **options: Any) -> str:
    try:
        calibrated(batches, **options)
    except lq.CalibrationError as error:
        return str(error)
    return "none"


def run(rank: int, world_size: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for number in NUMBERS_OF_BATCHES:
        for observer, calibrators in OBSERVERS.items():
            model = calibrated(images(number)[rank::world_size], observer, calibrator=calibrators[0])
            found[f"{number} {observer}"] = statistics(model)
            for calibrator in calibrators:
                found[f"{number} {observer} {calibrator}"] = found_ranges(lq.recalibrate(model, calibrator))
    for number in NUMBERS_OF_AUTO:
        found[f"auto {number}"] = found_ranges(calibrated(images(number)[rank::world_size], calibrator="auto"))
    found["limited"] = found_ranges(calibrated(images(6)[rank::world_size], num_batches=4 // world_size))
    one_bad = images(4)
    one_bad[1][0, 0, 0, 0] = torch.nan  # the second process has it
    found["a NaN"] = [error_of(one_bad[rank::world_size], observer=observer) for observer in OBSERVERS]
    found["no data"] = [error_of([], observer=observer) for observer in OBSERVERS]
    return found


def main() -> None:
    rank, world_size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)  # the same sums in the same order, everywhere
    alone = run(0, 1) if rank == 0 else {}
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=100),
    )
    together = run(rank, world_size)
    torch.save({"alone": alone, "together": together}, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
