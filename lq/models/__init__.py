"""Float image classifiers: a LightningModule around any torchvision-style network, and the ResNet family."""

from lq.models.classifier import Classifier
from lq.models.resnet import RESNETS, build_resnet
from lq.models.schedules import SCHEDULES, lr_factor

__all__ = ["RESNETS", "SCHEDULES", "Classifier", "build_resnet", "lr_factor"]
