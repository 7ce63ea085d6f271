"""ResNet-18 on CIFAR-10: train in float, quantize to INT8, compare.

python -m lq.recipes.cifar_resnet18 data.dir=PATH           post-training quantization (PTQ)
python -m lq.recipes.cifar_resnet18 data.dir=PATH mode=qat  quantization-aware fine-tuning (QAT) behind it
python -m lq.recipes.cifar_resnet18 data.name=shapes10      no files needed
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from lq.config import field, main
from lq.data import CIFAR10, Shapes10
from lq.models import Classifier, build_resnet
from lq.recipes.blocks import (
    DataConfig,
    QuantConfig,
    TrainConfig,
    callback,
    image_data,
    load_float_weights,
    print_result,
)


@dataclass
class Config:
    """ResNet-18 on CIFAR-10."""

    mode: Literal["ptq", "qat"] = field("ptq", help="quantize after training, or fine-tune with fake-quantizers")
    ckpt: str | None = field(None, help="float checkpoint to quantize instead of training one")
    stem: Literal["imagenet", "cifar"] = field(
        "imagenet", help="7x7 stride-2 stem (fast) or 3x3 stride-1 stem (slow, more accurate)"
    )
    output_dir: str = field("runs/cifar_resnet18", help="folder for checkpoints, INT8 model and TensorBoard logs")
    seed: int = field(0, help="seed of everything")
    accelerator: str = field("auto", help="cpu, gpu or auto")
    precision: str = field("32-true", help="of training, for example 16-mixed")
    progress: bool = field(True, help="show progress bars")
    data: DataConfig = field(DataConfig(), help="the images")
    train: TrainConfig = field(TrainConfig(), help="float training")
    quant: QuantConfig = field(QuantConfig(), help="quantization")


def run(config: Config) -> None:
    seed_everything(config.seed, verbose=False)
    output = Path(config.output_dir)
    data = image_data(config.data, config.seed)
    network = build_resnet("resnet18", num_classes=data.num_classes, stem=config.stem)
    epochs = _epochs(config, data)
    model = Classifier(
        network, data.num_classes, lr=config.train.lr, weight_decay=config.train.weight_decay, nesterov=True
    )
    quantize = callback(config.quant, config.mode, str(output / "int8"))
    logger = TensorBoardLogger(save_dir=output, name="tensorboard")

    def trainer(max_epochs: int, *callbacks: ModelCheckpoint | type(quantize)) -> Trainer:  # type: ignore[valid-type]
        return Trainer(
            max_epochs=max_epochs,
            accelerator=config.accelerator,
            devices=1,
            precision=config.precision,  # type: ignore[arg-type]
            callbacks=list(callbacks),
            logger=logger,
            default_root_dir=output,
            enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
            enable_progress_bar=config.progress,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=10,
        )

    notes = {}
    if config.ckpt is not None:
        load_float_weights(model, config.ckpt)
        notes["float checkpoint"] = config.ckpt
        if config.mode == "ptq":
            trainer(0, quantize).fit(model, data)
    else:
        checkpoint = ModelCheckpoint(dirpath=output / "checkpoints", filename="float", enable_version_counter=False)
        callbacks = (checkpoint, quantize) if config.mode == "ptq" else (checkpoint,)
        trainer(epochs, *callbacks).fit(model, data)
        notes["float checkpoint"] = checkpoint.best_model_path
    if config.mode == "qat":
        float_trainer = trainer(0)
        before = float_trainer.validate(model, data, verbose=False)[0]
        notes["float before QAT"] = ", ".join(f"{name} {value:.4f}" for name, value in before.items())
        tuned = Classifier(network, data.num_classes, lr=config.quant.lr, weight_decay=config.train.weight_decay)
        trainer(config.quant.epochs, quantize).fit(tuned, data)

    assert quantize.result is not None
    notes["INT8 model"] = quantize.result.artifact
    notes["TensorBoard"] = f"tensorboard --logdir {logger.log_dir}"
    print_result(quantize.result, data.name, notes)


def _epochs(config: Config, data: CIFAR10 | Shapes10) -> int:
    if config.train.epochs is not None:
        return config.train.epochs
    return 3 if isinstance(data, Shapes10) else 20


def plan(config: Config) -> str:
    what = f"quantize {config.ckpt}" if config.ckpt else "train ResNet-18 in float, then quantize it"
    epochs = f" ({config.quant.epochs} epochs of fine-tuning)" if config.mode == "qat" else ""
    return f"{what} with {config.mode.upper()}{epochs} for {config.quant.target}; write to {config.output_dir}"


if __name__ == "__main__":
    main(Config, run, plan, description=__doc__ or "")
