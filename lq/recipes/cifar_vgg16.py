"""VGG on CIFAR-10, with BatchNorm1d in its classifier: train in float, quantize to INT8, compare.

python -m lq.recipes.cifar_vgg16 data.dir=PATH                     VGG-16 with batch norm
python -m lq.recipes.cifar_vgg16 data.dir=PATH model.name=vgg11    or vgg13_bn, vgg19, ...; A, B, D, E; RA is A, narrow
python -m lq.recipes.cifar_vgg16 data.name=shapes10 model.name=RA  no files needed

Top-1 on the 10,000 test images of CIFAR-10 stored as JPEGs, two cores of an AMD EPYC (Zen 3, no VNNI), one run each,
model.name=RA, train.epochs=20, quant.target=x86_avx2, 9.8 to 2.7 MB: float 85.49, PTQ 85.63, QAT with
configs/cifar_resnet18_qat.yaml (5 epochs from the float checkpoint) 86.04, its weights in float 86.03. VGG-16 was not
trained to the end.
"""

from __future__ import annotations

from dataclasses import dataclass

from lq.errors import ConfigError
from lq.models import VGG_CONFIGURATIONS, VGGS, build_vgg
from lq.recipes.blocks.config import field, main
from lq.recipes.blocks.float_to_int8 import FloatToInt8Config, float_to_int8, plan_of


@dataclass
class ModelConfig:
    """The network."""

    name: str = field("vgg16_bn", help="a VGG by name or by letter", choices=(*VGGS, *VGG_CONFIGURATIONS))
    hidden: int = field(512, help="width of the classifier's hidden layer")
    dropout: float = field(0.5, help="share of its values that training sets to 0")


@dataclass
class Config(FloatToInt8Config):
    """VGG on CIFAR-10."""

    output_dir: str = field("runs/cifar_vgg16", help="folder for checkpoints, INT8 model and TensorBoard logs")
    model: ModelConfig = field(ModelConfig(), help="the network")


def run(config: Config) -> None:
    model = config.model
    if not 0 <= model.dropout < 1:
        raise ConfigError(f"model.dropout={model.dropout} must be in [0, 1)")
    float_to_int8(
        config,
        lambda data: build_vgg(
            model.name,
            num_classes=data.num_classes,
            classifier="cifar",
            hidden=model.hidden,
            dropout=model.dropout,
            in_channels=data.input_shape[0],
        ),
    )


def plan(config: Config) -> str:
    return plan_of(config, config.model.name)


if __name__ == "__main__":
    main(Config, run, plan, description=__doc__ or "")
