"""A Trainer's checkpoint to INT8, without training; also one of an interrupted run.

python -m lq.recipes.quantize_checkpoint ckpt=PATH model=package.module:MyModule data=package.module:MyDataModule
python -m lq.recipes.quantize_checkpoint ckpt=PATH model=train.py:build_model      of a QAT run, which needs no data
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import seed_everything

import lq
from lq.errors import ConfigError
from lq.recipes.blocks.config import field, main
from lq.recipes.blocks.quantization import EXPORT_HELP
from lq.recipes.blocks.results import print_result
from lq.schemes.targets import TARGET_CHOICES


@dataclass
class Config:
    """A checkpoint to INT8."""

    ckpt: str = field(help="the checkpoint")
    model: str = field(help="MODULE:NAME or FILE.py:NAME of the LightningModule, or of a function that makes it")
    data: str | None = field(
        None, help="MODULE:NAME or FILE.py:NAME of a datamodule, or of a function that makes one or a dataloader"
    )
    module: str | None = field(None, help="path of the submodule to quantize; by default it is found")
    target: str | None = field(
        None,
        help="engine family; by default that of the QAT run, or auto: this CPU's",
        choices=(None, *TARGET_CHOICES),
    )
    calibrator: str | None = field(None, help="minmax, moving_average, percentile, mse, entropy; the best by default")
    calibration_batches: int = field(32, help="training batches that ranges are taken from")
    export: list[str] | None = field(None, help=EXPORT_HELP)
    output_dir: str | None = field(None, help="folder for what is written; by default int8 beside the checkpoint")
    accelerator: str = field("auto", help="where to calibrate: cpu, gpu or auto")
    seed: int = field(0, help="seed of everything")


def run(config: Config) -> None:
    seed_everything(config.seed, verbose=False)
    if not Path(config.ckpt).is_file():
        raise ConfigError(f"ckpt={config.ckpt!r}: no such file")
    model = _find(config.model, "model")
    data = None if config.data is None else _find(config.data, "data")()
    result = lq.quantize_checkpoint(
        config.ckpt,
        model if isinstance(model, type) else model(),
        data,
        module=config.module,
        target=config.target,
        calibrator=config.calibrator,
        calibration_batches=config.calibration_batches,
        export=config.export,  # type: ignore[arg-type]
        output_dir=config.output_dir,
        accelerator=config.accelerator,
    )
    print(result)
    print_result(result, config.data or "none", {"INT8 model": ", ".join(result.exports)})


def plan(config: Config) -> str:
    calibrated = f"calibrate it on {config.data}" if config.data else "take the ranges that are in it"
    return f"load {config.ckpt} into {config.model}, {calibrated}, and convert it to INT8"


def _find(name: str, key: str) -> Callable[..., Any]:
    """The object that ``MODULE:NAME`` or ``FILE.py:NAME`` names."""
    place, _, attribute = name.rpartition(":")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert spec is not None and spec.loader is not None
            module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        member: Any = module
        for part in attribute.split("."):
            member = getattr(member, part)
        return member  # type: ignore[no-any-return]
    except (ImportError, AttributeError, ValueError, OSError) as error:
        raise ConfigError(f"{key}={name!r}: {error}; give MODULE:NAME or FILE.py:NAME") from error


if __name__ == "__main__":
    main(Config, run, plan, description=__doc__ or "")
