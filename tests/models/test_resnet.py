"""The ResNet family against torchvision's own networks."""

from __future__ import annotations

import pytest
import torch
import torchvision.models
from torch import Tensor, nn

from lq.models import RESNETS, build_resnet


def parameters(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}


@pytest.mark.parametrize("name", RESNETS)
def test_imagenet_stem_is_torchvisions_network(name: str) -> None:
    with torch.device("meta"):
        assert parameters(build_resnet(name)) == parameters(torchvision.models.get_model(name, weights=None))


@pytest.mark.parametrize("name", RESNETS)
def test_cifar_stem_changes_the_first_convolution_only(name: str) -> None:
    with torch.device("meta"):
        ours = parameters(build_resnet(name, num_classes=10, stem="cifar"))
        theirs = parameters(torchvision.models.get_model(name, weights=None, num_classes=10))
    assert ours.pop("conv1.weight") == (64, 3, 3, 3)
    assert theirs.pop("conv1.weight") == (64, 3, 7, 7)
    assert ours == theirs


@pytest.mark.parametrize(("name", "stem", "side"), [("resnet18", "cifar", 32), ("resnet50", "imagenet", 8)])
def test_stem_decides_the_resolution_of_the_first_layer(name: str, stem: str, side: int) -> None:
    network = build_resnet(name, num_classes=7, stem=stem).eval()
    shapes: list[torch.Size] = []

    def see_input(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        shapes.append(args[0].shape)

    network.layer1.register_forward_pre_hook(see_input)
    with torch.no_grad():
        assert network(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert shapes == [(2, 64, side, side)]


def test_cifar_stem_is_initialised_as_torchvision_initialises_convolutions() -> None:
    torch.manual_seed(0)
    weight = build_resnet("resnet18", stem="cifar").conv1.weight
    # He et al., "Delving Deep into Rectifiers": variance 2 / fan-out.
    assert weight.std().item() == pytest.approx((2 / (64 * 3 * 3)) ** 0.5, rel=0.05)


def test_zero_init_residual_starts_every_block_at_its_shortcut() -> None:
    network = build_resnet("resnet18", num_classes=10, stem="cifar", zero_init_residual=True)
    blocks = [module for name, module in network.named_modules() if name.endswith("bn2")]
    assert len(blocks) == 8
    assert all(block.weight.eq(0).all() for block in blocks)


@pytest.fixture
def pretrained(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Stands in for the download of resnet18's weights."""
    state = torchvision.models.resnet18(weights=None).state_dict()
    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", lambda self, **kwargs: state)
    return state


def test_pretrained_weights_are_loaded(pretrained: dict[str, Tensor]) -> None:
    torch.testing.assert_close(dict(build_resnet("resnet18", weights="DEFAULT").state_dict()), dict(pretrained))


def test_pretrained_backbone_gets_a_new_classifier_for_other_classes(pretrained: dict[str, Tensor]) -> None:
    state = dict(build_resnet("resnet18", num_classes=10, weights="IMAGENET1K_V1").state_dict())
    assert state.pop("fc.weight").shape == (10, 512)
    assert state.pop("fc.bias").shape == (10,)
    backbone = {name: tensor for name, tensor in pretrained.items() if not name.startswith("fc.")}
    torch.testing.assert_close(state, backbone)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"name": "resnet81"},
            r"name='resnet81' is not a ResNet; did you mean .*'resnet18'.*\? Choose one of resnet18, ",
        ),
        ({"name": "vgg"}, r"name='vgg' is not a ResNet; Choose one of .*wide_resnet101_2\."),
        ({"num_classes": 0}, r"num_classes=0 must be at least 1"),
        ({"stem": "tiny"}, r"stem='tiny' is not one of imagenet, cifar"),
        ({"weights": "V9"}, r"weights='V9' do not exist for resnet18; choose one of IMAGENET1K_V1, DEFAULT or None"),
        ({"weights": "DEFAULT", "stem": "cifar"}, r"weights='DEFAULT' .* pass stem='imagenet' or weights=None"),
    ],
)
def test_mistake_names_argument_value_and_choices(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_resnet(**{"name": "resnet18", **kwargs})


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_grey_images(stem: str) -> None:
    network = build_resnet("resnet18", num_classes=10, stem=stem, in_channels=1)  # type: ignore[arg-type]
    assert network(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    # As torchvision initialises: He et al. 2015, by the fan out.
    wanted = (2 / (64 * network.conv1.kernel_size[0] ** 2)) ** 0.5
    assert abs(network.conv1.weight.std().item() / wanted - 1) < 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"in_channels": 0}, "in_channels=0 must be"), ({"in_channels": 1, "weights": "DEFAULT"}, "in_channels=1")],
)
def test_channels_that_cannot_be(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_resnet("resnet18", **arguments)
