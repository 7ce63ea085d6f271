"""The benchmark of image loading as a user runs it, at tiny size."""

from __future__ import annotations

import pytest

from lq.recipes import bench_image_loading as recipe
from lq.recipes.blocks.config import main


def test_generated_images(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["workers=[0]", "batch_size=2", "batches=2", "rounds=1"]
    main(recipe.Config, recipe.run, recipe.plan, description=recipe.__doc__ or "", argv=argv)
    printed = capsys.readouterr().out
    assert "images/s" in printed
    assert "QAT of resnet18 takes" in printed


def test_a_folder_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(recipe.Config, recipe.run, recipe.plan, argv=["data_dir=nowhere"])
    assert "data_dir='nowhere' does not exist" in capsys.readouterr().err
