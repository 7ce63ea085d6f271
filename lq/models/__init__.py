"""Float image classifiers: a LightningModule around any torchvision-style network, the ResNet family, a MobileNetV2."""

from lq.models.classifier import Classifier
from lq.models.mobilenet import build_small_mobilenet_v2
from lq.models.resnet import RESNETS, build_resnet
from lq.models.schedules import SCHEDULES, lr_factor

__all__ = ["RESNETS", "SCHEDULES", "Classifier", "build_resnet", "build_small_mobilenet_v2", "lr_factor"]
