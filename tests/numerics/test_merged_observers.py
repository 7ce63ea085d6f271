"""Observers of several processes, merged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from helpers.processes import finish, start
from lq.numerics.observers import MovingAverageObserver, all_reduce_together


def _observe(folder: Path, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    seldom, often = MovingAverageObserver(), MovingAverageObserver()
    for _ in range(150):
        often(torch.tensor([-2.0, 2.0]))
        if rank == 1:
            seldom(torch.tensor([-1.0, 1.0]))
    all_reduce_together([seldom, often])
    merged = [value.clone() for value in seldom.range()]
    seldom(torch.tensor([-100.0, 100.0]))
    torch.save([merged, seldom.range(), often.range()], folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_a_process_that_sees_data_late_does_not_begin_anew(tmp_path: Path) -> None:
    processes = [start(_observe, tmp_path, rank, output=tmp_path / f"output{rank}") for rank in (0, 1)]
    for rank, process in enumerate(processes):
        finish(process, tmp_path / f"output{rank}")
        merged, after, often = torch.load(tmp_path / f"{rank}.pt")
        assert [float(value) for value in merged] == [-1, 1]
        assert [float(value) for value in often] == [-2, 2]
        assert [float(value) for value in after] == pytest.approx([-1.99, 1.99])
