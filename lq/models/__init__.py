"""Float image classifiers: a LightningModule around any torchvision-style network; ResNets, VGGs and a MobileNetV2."""

from lq.models.classifier import Classifier
from lq.models.mobilenet import build_small_mobilenet_v2
from lq.models.resnet import RESNETS, build_resnet
from lq.models.schedules import SCHEDULES, lr_factor
from lq.models.vgg import VGG_CONFIGURATIONS, VGGS, build_vgg

__all__ = [
    "RESNETS",
    "SCHEDULES",
    "VGGS",
    "VGG_CONFIGURATIONS",
    "Classifier",
    "build_resnet",
    "build_small_mobilenet_v2",
    "build_vgg",
    "lr_factor",
]
