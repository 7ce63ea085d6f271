"""The VGG family against torchvision's own networks, and through INT8."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torchvision.models
from torch import Tensor, nn
from torch.nn import functional as F

import lq
from helpers.quantized import quantized
from helpers.training_steps import sqnr
from lq.models import VGG_CONFIGURATIONS, VGGS, build_vgg
from lq.util.cpu import has_onednn_int8

LETTERS = {"A": "vgg11", "B": "vgg13", "D": "vgg16", "E": "vgg19"}


def parameters(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}


@pytest.mark.parametrize("name", VGGS)
def test_imagenet_network_is_torchvisions(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = build_vgg(name, dropout=0.3), torchvision.models.get_model(name, weights=None, dropout=0.3)
    assert type(ours) is type(theirs) and repr(ours) == repr(theirs)
    assert parameters(ours) == parameters(theirs)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("letter", LETTERS)
def test_a_letter_is_the_paper_s_network(letter: str, batch_norm: bool) -> None:
    with torch.device("meta"):
        ours = build_vgg(letter, batch_norm=batch_norm)
        assert parameters(ours) == parameters(build_vgg(LETTERS[letter] + "_bn" * batch_norm))


def test_the_narrow_network_is_a_at_half_its_width() -> None:
    halves = [layer if isinstance(layer, str) else layer // 2 for layer in VGG_CONFIGURATIONS["A"]]
    assert list(VGG_CONFIGURATIONS["RA"]) == halves
    weights = {
        name: sum(p.numel() for p in build_vgg(name, 10, classifier="cifar").features.parameters())
        for name in ("A", "RA")
    }
    assert weights["RA"] / weights["A"] == pytest.approx(0.25, abs=0.005)


def test_initialised_as_torchvision_does() -> None:
    network = build_vgg("D", 10, classifier="cifar")
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            # He et al., "Delving Deep into Rectifiers": variance 2 / fan-out.
            assert module.weight.std().item() == pytest.approx((2 / (9 * module.out_channels)) ** 0.5, rel=0.06)
        elif isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.01, rel=0.06)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            assert module.bias.eq(0).all()


def test_cifar_classifier() -> None:
    network = build_vgg("RA", 10, classifier="cifar", hidden=64, dropout=0.2)
    kinds = [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Dropout, nn.Linear]
    assert [type(module) for module in network.classifier] == kinds
    assert (network.classifier[0].in_features, network.classifier[0].out_features) == (256, 64)
    assert network.classifier[3].p == 0.2
    assert network.train()(torch.randn(4, 3, 32, 32)).shape == (4, 10)


@pytest.mark.parametrize(
    ("layers", "shape"), [([8, "M", 12], (2, 3, 32, 32)), ((8, 8), (2, 3, 9, 7)), ([4, "M", 8, "M"], (2, 3, 28, 28))]
)
@pytest.mark.parametrize("batch_norm", [None, False])
def test_own_layers(layers: Sequence[int | str], shape: tuple[int, ...], batch_norm: bool | None) -> None:
    network = build_vgg(layers, 5, batch_norm=batch_norm, classifier="cifar").eval()
    found = ["M" if isinstance(m, nn.MaxPool2d) else m.out_channels for m in network.features
             if isinstance(m, nn.Conv2d | nn.MaxPool2d)]  # fmt: skip
    assert found == list(layers)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in network.features)
    assert norms == (0 if batch_norm is False else sum(layer != "M" for layer in layers))
    with torch.no_grad():
        assert network(torch.randn(shape)).shape == (2, 5)


@pytest.mark.parametrize("classifier", ["imagenet", "cifar"])
def test_grey_images(classifier: Any) -> None:
    with torch.device("meta"):
        network = build_vgg("RA", 10, classifier=classifier, in_channels=1).eval()
        assert network(torch.empty(2, 1, 32, 32)).shape == (2, 10)


@pytest.fixture
def pretrained(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Stands in for the download of vgg11's weights: one value for each tensor, of which there is one in memory."""
    with torch.device("meta"):
        shapes = parameters(torchvision.models.vgg11(weights=None))
    state = {name: torch.tensor(0.25 + index).expand(shape) for index, (name, shape) in enumerate(shapes.items())}
    # Random numbers for 124 million weights, which are then overwritten, take five seconds.
    monkeypatch.setattr(nn.Linear, "reset_parameters", lambda self: None)
    monkeypatch.setattr(torchvision.models.VGG11_Weights, "get_state_dict", lambda self, **kwargs: state)
    return state


@pytest.mark.parametrize(
    ("kwargs", "new"),
    [
        ({}, "nothing"),
        ({"num_classes": 10}, "classifier.6."),
        ({"num_classes": 10, "classifier": "cifar"}, "classifier."),
        ({"classifier": "cifar"}, "classifier."),
    ],
)
def test_pretrained_weights(kwargs: dict[str, Any], new: str, pretrained: dict[str, Tensor]) -> None:
    network = build_vgg("vgg11", weights="IMAGENET1K_V1", **kwargs)
    state = network.state_dict()
    kept = [name for name in pretrained if not name.startswith(new)]
    assert len(kept) == len(pretrained) - {"nothing": 0, "classifier.6.": 2, "classifier.": 6}[new]
    assert all(torch.equal(state[name], pretrained[name]) for name in kept)
    assert network.classifier[-1].out_features == kwargs.get("num_classes", 1000)
    if new != "nothing":
        assert network.classifier[-1].weight.abs().max() < 0.1


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Random images that differ in more than their noise, which the many sums of a network average away."""
    torch.manual_seed(0)
    return F.interpolate(torch.randn(32, 3, 4, 4), size=32, mode="bilinear") + 0.1 * torch.randn(32, 3, 32, 32)


def float_and_int8(network: nn.Module, x: Tensor) -> tuple[Tensor, lq.Int8Module]:
    """The float outputs and the INT8 network; ranges from ``x`` itself."""
    with torch.no_grad():
        network.train()(x)  # or the batch norms would be identities
        expected = network.eval()(x)
    return expected, quantized(network, x, example=x[:2])


def narrow(name: str) -> list[int | str]:
    """The layers of a network, an eighth as wide: the deep ones take seconds, and width decides nothing here."""
    layers = VGG_CONFIGURATIONS[{number: letter for letter, number in LETTERS.items()}[name.removesuffix("_bn")]]
    return [layer if isinstance(layer, str) else layer // 8 for layer in layers]


@pytest.mark.parametrize(
    ("name", "batch_norm"),
    [
        *[pytest.param(narrow(name), name.endswith("_bn"), id=f"narrow {name}") for name in VGGS],
        ("vgg11", None),
        ("vgg11_bn", None),
        ("RA", True),
        ("RA", False),
        pytest.param([16, "M", 24, 24, "M"], True, id="own layers"),
    ],
)
def test_cifar_networks_are_int8_throughout(name: Any, batch_norm: bool | None, images: Tensor) -> None:
    network = build_vgg(name, 10, batch_norm=batch_norm, classifier="cifar")
    expected, int8 = float_and_int8(network, images)
    rows = {layer.name: layer.kind for layer in int8.report.int8_layers}
    assert list(rows) == [path for path, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert rows.pop("classifier.0") == "linear + batch_norm + relu"
    assert rows.pop("classifier.4") == "linear"
    fused = "conv + batch_norm + relu" if isinstance(network.features[1], nn.BatchNorm2d) else "conv + relu"
    assert set(rows.values()) == {fused}
    # Five max-pools leave nothing to average.
    averages = isinstance(network.avgpool, nn.AdaptiveAvgPool2d)
    assert averages == (name == [16, "M", 24, 24, "M"])
    assert [layer.name for layer in int8.report.float_layers] == ["avgpool"] * averages
    actual = int8(images)
    assert actual.shape == (32, 10)
    assert sqnr(actual, expected) > 20
    if has_onednn_int8():
        assert int8.kernels().float_ops == []


def test_imagenet_network_is_int8_throughout(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lq.models.vgg._IMAGENET_WIDTH", 64)
    network = build_vgg(narrow("vgg16_bn"), 10, dropout=0.0)
    # 224x224 reach the classifier as 7x7; here 64x64 are averaged to 7x7 from 2x2.
    expected, int8 = float_and_int8(network, F.interpolate(images[:8], size=64))
    assert [layer.kind for layer in int8.report.int8_layers][-3:] == ["linear + relu", "linear + relu", "linear"]
    assert [layer.name for layer in int8.report.float_layers] == ["avgpool"]
    assert len(int8.report.int8_layers) == 13 + 3
    assert sqnr(int8(F.interpolate(images[:8], size=64)), expected) > 20


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"name": "vgg12"}, r"name='vgg12' is not a VGG; did you mean .*'vgg1.'.*\? Choose one of vgg11, .*, RA, or"),
        ({"name": "VGG-16"}, r"did you mean 'vgg16'"),
        ({"name": "ra"}, r"name='ra' is not a VGG; did you mean 'RA' or 'A'\?"),
        ({"name": "resnet18"}, r"name='resnet18' is not a VGG; Choose one of .*give layers, for example \[64, 'M'"),
        ({"name": [8, "P"]}, r"name=\[8, 'P'\] has the layer 'P'; a layer is a number of channels or 'M'"),
        ({"name": [8, 0]}, r"has the layer 0; a layer is a number of channels or 'M'"),
        ({"name": ["M"]}, r"name=\['M'\] has no convolution"),
        ({"name": []}, r"name=\[\] has no convolution"),
        ({"name": [8, *"MMMMMM"]}, r"has 6 max-pools, and 5 leave one position of a 32x32 image: leave some out"),
        ({"batch_norm": True}, r"batch_norm=True contradicts name='vgg11': pass name='vgg11_bn'"),
        ({"name": "vgg13_bn", "batch_norm": False}, r"batch_norm=False contradicts .*: pass name='vgg13'"),
        ({"classifier": "tiny"}, r"classifier='tiny' is not one of imagenet, cifar"),
        ({"num_classes": 0}, r"num_classes=0 must be at least 1"),
        ({"hidden": 0}, r"hidden=0 must be at least 1"),
        ({"in_channels": 0}, r"in_channels=0 must be at least 1"),
        ({"dropout": 1.0}, r"dropout=1\.0 must be in \[0, 1\)"),
        ({"weights": "V9"}, r"weights='V9' do not exist for vgg11; choose one of IMAGENET1K_V1, DEFAULT or None"),
        (
            {"name": "vgg16", "weights": "IMAGENET1K_FEATURES"},
            r"do not exist for vgg16; choose one of IMAGENET1K_V1",
        ),
        ({"name": "A", "weights": "DEFAULT"}, r"weights='DEFAULT' do not exist for name='A': choose one of vgg11, "),
        ({"in_channels": 1, "weights": "DEFAULT"}, r"are for in_channels=3 and not 1: pass weights=None"),
    ],
)
def test_mistake_names_argument_value_and_choices(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_vgg(**{"name": "vgg11", "classifier": "cifar", **kwargs})
