"""Hydra, which needs an older OmegaConf than the newest, in the process that lq's recipes run in, too."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

import lq
from helpers.classifiers import images
from helpers.runs import train_data, val_data
from helpers.tiny_recipe import TINY
from lq import Int8Module
from lq.recipes import cifar_resnet18
from lq.recipes.blocks.config import main

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("hydra") is None, reason="Hydra is not installed (pip install hydra-core)"
)

CONFIG = """
defaults: [_self_]
model:
  _target_: helpers.classifiers.Wrapped
trainer:
  _target_: lightning.pytorch.Trainer
  accelerator: cpu
  max_epochs: 2
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  log_every_n_steps: 1
  callbacks:
    - _target_: lq.QuantizationCallback
      mode: qat
      target: x86_avx2
      export: [onnx]
      evaluate: false
      analyze: false
      overrides:
        "3": {weight_bits: 6}
        "8": null
      output_dir: ${output_dir}
output_dir: int8
"""


@pytest.mark.support("Callbacks", "Hydra: Trainer and callback from its configs")
def test_trainer_and_callback_from_a_config(tmp_path: Path) -> None:
    hydra: Any = pytest.importorskip("hydra")
    (tmp_path / "config.yaml").write_text(CONFIG)
    with hydra.initialize_config_dir(str(tmp_path), version_base=None):
        config: Any = hydra.compose("config", overrides=[f"output_dir={tmp_path / 'out'}", "trainer.max_epochs=1"])
    model, trainer = (hydra.utils.instantiate(config[name]) for name in ("model", "trainer"))
    trainer.fit(model, train_data(), val_data())
    assert isinstance(model.model, Int8Module)
    (callback,) = [callback for callback in trainer.callbacks if isinstance(callback, lq.QuantizationCallback)]
    assert callback.result is not None
    assert [Path(path).name for path in callback.result.exports] == ["int8.pt2", "int8.onnx"]
    assert callback.result.settings["overrides"] == {"3": {"weight_bits": 6}, "8": None}
    assert lq.load(callback.result.artifact)(images(2)[0]).shape == (2, 4)


@pytest.mark.usefixtures("no_rehearsal")
@pytest.mark.filterwarnings("ignore:.*smaller than the logging interval")
def test_a_recipe_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(
        cifar_resnet18.Config,
        cifar_resnet18.run,
        cifar_resnet18.plan,
        argv=[*TINY, f"output_dir={tmp_path}", "quant.schedule=cosine"],
    )
    assert "INT8 model:" in capsys.readouterr().out
    assert (tmp_path / "int8" / "int8.pt2").exists()
