"""Data modules: CIFAR-10, MNIST, Fashion-MNIST, ImageNet, and a built-in synthetic data set."""

from lq.data.cifar10 import CIFAR10
from lq.data.imagenet import ImageNet
from lq.data.in_memory import InMemoryDataModule, InMemoryDataset
from lq.data.mnist import MNIST, FashionMNIST
from lq.data.shapes10 import Shapes10
from lq.errors import DatasetNotFoundError

__all__ = [
    "CIFAR10",
    "MNIST",
    "DatasetNotFoundError",
    "FashionMNIST",
    "ImageNet",
    "InMemoryDataModule",
    "InMemoryDataset",
    "Shapes10",
]
