"""Which networks of timm and torchvision are run, and at which image size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import timm
import torchvision
from torch import nn

#: What the names of torchvision's networks begin with.
TORCHVISION = "torchvision/"


@dataclass(frozen=True)
class Network:
    """A network with random weights.

    Args:
        name: timm's, or ``torchvision/`` and torchvision's.
        size: height and width of the images.
        settings: further arguments of ``timm.create_model`` or ``torchvision.models.get_model``.
    """

    name: str
    size: int
    settings: tuple[tuple[str, Any], ...] = ()

    def make(self) -> nn.Module:
        if self.name.startswith(TORCHVISION):
            name = self.name.removeprefix(TORCHVISION)
            model: nn.Module = torchvision.models.get_model(name, weights=None, **dict(self.settings))
            return model
        return timm.create_model(self.name, pretrained=False, **dict(self.settings))


#: The smallest sensible image: five strides of two leave 2x2 positions of it.
SMALL = 64

#: One or two of each family, the smallest where it does not matter.
_SMALL = """
    resnet18 resnet26d resnetblur50 resnetv2_50 seresnet50 legacy_senet154 eca_resnet33ts
    skresnet18 resnest14d res2net50_26w_4s cspresnet50 cs3darknet_s darknet53 dla34 dpn68 densenet121
    hrnet_w18_small vgg11_bn vovnet39a selecsls42b gernet_s nf_resnet26 nfnet_l0 repvgg_a0 tresnet_m
    regnetx_004 regnety_004 regnetz_b16
    mobilenetv2_100 mobilenetv3_large_100 tf_mobilenetv3_small_minimal_100 mobilenetv4_conv_small mnasnet_100
    fbnetc_100 efficientnet_lite0 tf_efficientnet_b0 tf_efficientnetv2_b0 mixnet_s tf_efficientnet_cc_b0_4e
    hardcorenas_a lcnet_050 tinynet_e ghostnet_100 rexnet_100 mobileone_s0 repvit_m0_9
    convnext_atto convnextv2_atto edgenext_xx_small mobilevit_xxs poolformer_s12 starnet_s1
"""

#: Valid padding, or windows and tables that are made for one size.
_LARGER = {
    "inception_v3": 128,
    "inception_v4": 128,
    "xception41": 96,
    "bat_resnext26ts": 256,
    "halonet26t": 256,
    "botnet26t_256": 256,
    "sehalonet33ts": 256,
    "levit_128s": 224,
    "efficientformer_l1": 224,
    "coatnet_pico_rw_224": 224,
    "visformer_tiny": 224,
    "pit_ti_224": 224,
    "swin_tiny_patch4_window7_224": 224,
}

NETWORKS: dict[str, Network] = {
    **{name: Network(name, SMALL) for name in _SMALL.split()},
    **{name: Network(name, size) for name, size in _LARGER.items()},
    "deit_tiny_patch16_224": Network("deit_tiny_patch16_224", 96, (("img_size", 96),)),
}


_FAMILIES = """
    alexnet vgg11_bn resnet18 resnet50 resnext50_32x4d wide_resnet50_2 squeezenet1_1 densenet121
    mobilenet_v2 mobilenet_v3_small mobilenet_v3_large mnasnet1_0 shufflenet_v2_x1_0
    efficientnet_b0 efficientnet_v2_s regnet_x_400mf regnet_y_400mf convnext_tiny swin_t swin_v2_t
"""

#: Classifiers of torchvision, one or two of each family, and its networks for segmentation.
TORCHVISION_NETWORKS: dict[str, Network] = {
    network.name: network
    for network in (
        *(Network(TORCHVISION + name, SMALL) for name in _FAMILIES.split()),
        Network(TORCHVISION + "googlenet", SMALL, (("init_weights", False),)),
        Network(TORCHVISION + "inception_v3", 299, (("init_weights", False),)),
        Network(TORCHVISION + "vit_b_16", 64, (("image_size", 64),)),
        Network(TORCHVISION + "maxvit_t", 224),
        *(
            Network(TORCHVISION + name, SMALL, (("weights_backbone", None), ("num_classes", 5)))
            for name in ("fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")
        ),
    )
}


def network(name: str) -> Network:
    """The listed network of this name, or timm's at its own size."""
    listed = {**NETWORKS, **TORCHVISION_NETWORKS}
    if name in listed:
        return listed[name]
    if name not in timm.list_models():
        near = ", ".join(timm.list_models(f"*{name[:6]}*")[:10])
        raise SystemExit(f"{name!r} is no network of timm {timm.__version__}; near it: {near or 'none'}")
    return Network(name, timm.get_pretrained_cfg(name).input_size[-1])
