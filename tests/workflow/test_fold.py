"""Folding batch norm alone, against torch's own fusion."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import lq


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))
    for norm in (layers[1], layers[4]):
        nn.init.uniform_(norm.weight, -2, 2)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return layers.eval()


def test_is_torchs_fusion() -> None:
    model = network()
    x = torch.randn(2, 3, 8, 8)
    folded = lq.fold_batch_norm(model, x)
    for conv, norm, name in ((model[0], model[1], "0"), (model[3], model[4], "3")):
        fused = fuse_conv_bn_eval(conv, norm)
        torch.testing.assert_close(folded.state_dict()[f"{name}.weight"], fused.weight.detach())
        torch.testing.assert_close(folded.state_dict()[f"{name}.bias"], fused.bias.detach())
    torch.testing.assert_close(folded(x), model(x))
    assert folded.fold_difference < 1e-5


def test_the_model_is_left_alone_and_the_folded_one_travels() -> None:
    model = torchvision.models.resnet18(num_classes=4).train()
    before = copy.deepcopy(model.state_dict())
    folded = lq.fold_batch_norm(model, torch.randn(2, 3, 32, 32))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    x = torch.randn(5, 3, 32, 32)  # another batch size than the example's
    torch.testing.assert_close(pickle.loads(pickle.dumps(folded))(x), model.eval()(x), rtol=1e-4, atol=1e-4)


def test_a_fold_that_changes_the_output_is_refused() -> None:
    model = network()
    model[1].running_var.fill_(float("nan"))
    with pytest.raises(lq.FoldError, match="folding batch norm changes"):
        lq.fold_batch_norm(model, torch.randn(2, 3, 8, 8))


def test_roundings_that_a_later_layer_amplifies_are_no_change() -> None:
    """Two channels that are the same but for roundings, and a layer of their difference, as deep networks have them."""
    torch.manual_seed(0)
    first, norm, second = nn.Conv2d(3, 2, 3, bias=False), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1, bias=False)
    with torch.no_grad():
        first.weight[1] = 3 * first.weight[0]
        norm.running_var[1] = 9 * norm.running_var[0]
        norm.weight.copy_(torch.tensor([0.7, 0.7]))
        second.weight.copy_(torch.tensor([1.0, -1.0 + 1e-5]).reshape(1, 2, 1, 1))
        norm.eps = 0.0
    model, x = nn.Sequential(first, norm, second).eval(), torch.randn(8, 3, 16, 16)
    folded = lq.fold_batch_norm(model, x)
    assert (folded(x) - model(x)).abs().max() > 1e-3 * model(x).abs().max()  # of the whole network
    assert folded.fold_difference < 1e-5  # of a layer
