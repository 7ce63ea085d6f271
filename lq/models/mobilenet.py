"""A small MobileNetV2: depthwise convolutions, whose ranges are harder to quantize than a ResNet's."""

from __future__ import annotations

from torchvision.models import MobileNetV2

#: Expansion, channels, repeats and first stride of each stage (Sandler et al. 2018, table 2, cut to 0.3 M weights).
_SMALL = [[1, 16, 1, 1], [4, 24, 2, 1], [4, 32, 2, 2], [4, 64, 3, 2], [4, 96, 1, 1]]


def build_small_mobilenet_v2(num_classes: int = 10) -> MobileNetV2:
    """torchvision's MobileNetV2 with nine inverted residual blocks, for 32x32 images.

    Args:
        num_classes: outputs of the classifier.

    Example:
        >>> import torch
        >>> build_small_mobilenet_v2(10)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    return MobileNetV2(num_classes=num_classes, inverted_residual_setting=_SMALL, dropout=0.1)
