"""ResNet-18 on CIFAR-10: train in float, quantize to INT8, compare.

python -m lq.recipes.cifar_resnet18 data.dir=PATH           post-training quantization (PTQ)
python -m lq.recipes.cifar_resnet18 data.dir=PATH mode=qat  quantization-aware fine-tuning (QAT) after it
python -m lq.recipes.cifar_resnet18 data.name=shapes10      no files needed

Top-1 on the 10,000 test images of CIFAR-10 stored as JPEGs, two cores of an AMD EPYC (Zen 3, no VNNI), one run each,
quant.target=x86_avx2, 44.8 to 11.6 MB; QAT with configs/cifar_resnet18_qat.yaml, 5 epochs from the float checkpoint:
configs/cifar_resnet18_reference.yaml (20 epochs of plain SGD): float 76.67, PTQ 76.65, QAT 79.84, its weights in float
79.77;
train.epochs=12: float 80.11, PTQ 79.90 and 80.03, QAT 80.52, its weights in float 80.50.
One image: PyTorch eager 7.9 ms, folded 5.3, ONNX Runtime 0.56, OpenVINO 0.70, AOTInductor 1.83, in process 3.30.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lq.models import build_resnet
from lq.recipes.blocks.config import field, main
from lq.recipes.blocks.float_to_int8 import FloatToInt8Config, float_to_int8, plan_of


@dataclass
class Config(FloatToInt8Config):
    """ResNet-18 on CIFAR-10."""

    stem: Literal["imagenet", "cifar"] = field(
        "imagenet", help="7x7 stride-2 stem (fast) or 3x3 stride-1 stem (slow, more accurate)"
    )
    output_dir: str = field("runs/cifar_resnet18", help="folder for checkpoints, INT8 model and TensorBoard logs")


def run(config: Config) -> None:
    float_to_int8(
        config,
        lambda data: build_resnet(
            "resnet18", num_classes=data.num_classes, stem=config.stem, in_channels=data.input_shape[0]
        ),
    )


def plan(config: Config) -> str:
    return plan_of(config, "ResNet-18")


if __name__ == "__main__":
    main(Config, run, plan, description=__doc__ or "")
