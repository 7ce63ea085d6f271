"""The sweep as a user runs it, at tiny size, on files in Fashion-MNIST's format."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import lq
from lq.recipes import mnist_resnet18 as recipe
from lq.recipes.blocks.config import main

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")


def idx(array: np.ndarray) -> bytes:
    """An array of bytes as an IDX file: two zeros, the type (8 is uint8), the number of axes, their lengths."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


@pytest.mark.filterwarnings("ignore:.*this CPU's INT8 kernels get it wrong")
def test_every_target_with_every_calibrator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    for prefix, count in (("train", 48), ("t10k", 20)):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (tmp_path / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(idx((np.arange(count) % 10).astype(np.uint8)))
    argv = [
        "data.name=fashion_mnist",
        f"data.dir={tmp_path}",
        "data.batch_size=16",
        "train.epochs=1",
        "targets=[x86_avx2,xnnpack]",
        "calibrators=[percentile:99.9]",
        "num_batches=2",
        "accelerator=cpu",
        "progress=false",
        f"output_dir={tmp_path / 'run'}",
    ]
    main(recipe.Config, recipe.run, recipe.plan, description=recipe.__doc__ or "", argv=argv)
    assert "Data: Fashion-MNIST" in capsys.readouterr().out
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert [(row["target"], row["calibrator"]) for row in rows] == [
        ("", ""),
        ("x86_avx2", "percentile:99.9"),
        ("xnnpack", "percentile:99.9"),
    ]
    assert all(0 <= row["top1"] <= 1 and row["p50_ms"] > 0 for row in rows)
    assert all(row["size_mb"] < rows[0]["size_mb"] / 3 for row in rows[1:])
    assert (tmp_path / "run" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    int8 = lq.load(tmp_path / "run" / "xnnpack_percentile_99.9.pt2")
    assert int8(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    main(recipe.Config, recipe.run, recipe.plan, argv=["--dry-run"])
    assert "for auto, xnnpack with minmax, moving_average, percentile, mse, entropy" in capsys.readouterr().out
