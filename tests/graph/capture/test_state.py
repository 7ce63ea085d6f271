"""What a module keeps between calls: buffers, copies, pickles, replaced parts; and what preparation leaves behind."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lq
from helpers.capture_checks import check, check_float, check_int8, right_or_refused
from helpers.modes import both_modes
from helpers.networks import Residual, randomize_batch_norm
from helpers.patterns import conv
from helpers.quantized import TARGET, calibrated, noise
from helpers.training_steps import Call, assert_same, assert_same_step, no_tracing_left, training_step

X = noise(8, 12, seed=1)


class Stateful(nn.Module):
    """Layers around ``update``, which a subclass writes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = conv(3, 8), conv(8, 8), nn.Linear(8, 10)
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("running", torch.zeros(8))

    def update(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x = self.update(F.relu(self.a(x)))
        return self.fc(self.b(x).mean((2, 3)))


class Reassigned(Stateful):
    def update(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        self.running = 0.9 * self.running + 0.1 * x.detach().mean((0, 2, 3))
        return x


class WrittenInPlace(Stateful):
    def update(self, x: Tensor) -> Tensor:
        self.count += 1
        with torch.no_grad():
            self.running.mul_(0.9).add_(x.mean((0, 2, 3)), alpha=0.1)
        return x


class InTrainingOnly(Stateful):
    """A normalisation of one's own: batch statistics in training, running ones in evaluation."""

    def update(self, x: Tensor) -> Tensor:
        if self.training:
            self.count = self.count + 1
            mean = x.mean((0, 2, 3))
            self.running.lerp_(mean.detach(), 0.2)
        else:
            mean = self.running
        return x - mean[:, None, None]


class CopiedInto(Stateful):
    def update(self, x: Tensor) -> Tensor:
        self.running.copy_(x.detach().amax((0, 2, 3)))
        self.running[0] = 1
        return x / self.running.clamp(min=0.1)[:, None, None]


class PlainAttributes(Stateful):
    """Numbers and tensors that are no buffers."""

    calls = 0
    last: Any = None

    def update(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x.mean().detach()
        return x


KINDS = [Reassigned, WrittenInPlace, InTrainingOnly, CopiedInto, PlainAttributes]


@pytest.mark.parametrize("kind", KINDS)
def test_buffers_in_float_and_int8(kind: type[Stateful]) -> None:
    # A running average that no output reads may go from the INT8 network; what an output reads may not.
    check(kind(), X)


@pytest.mark.parametrize("kind", KINDS)
def test_what_stays_is_the_users(kind: type[Stateful]) -> None:
    model, eager = kind().eval(), kind().eval()
    eager.load_state_dict(model.state_dict())
    lq.prepare(model, X)
    for m in (model, eager):
        m(X)
        m(X[:2])
    no_tracing_left(model)
    for name, value in eager.state_dict().items():
        assert_same(model.state_dict()[name], value, name)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    copied = lq.prepare(kind().eval(), X)
    copied.load_state_dict(torch.load(file, weights_only=True))
    assert_same(copied(X), model(X), "output of the loaded copy")
    lq.calibrate(model, [X])
    lq.convert(model)
    lq.unprepare(model)
    no_tracing_left(model)
    assert type(model.count) is Tensor and type(model.running) is Tensor
    fresh = copy.deepcopy(model)
    assert_same_step(training_step(model, Call((X,))), training_step(fresh, Call((X,))))
    assert model.state_dict().keys() == eager.state_dict().keys()


def test_attributes_that_a_forward_counts() -> None:
    model = PlainAttributes().eval()
    lq.prepare(model, X)
    before = model.calls
    model(X)
    model(X)
    assert model.calls == before + 2
    assert type(model.last) is Tensor


def residual() -> nn.Module:
    return randomize_batch_norm(Residual())


@both_modes
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_train_alone(mode: str, how: str) -> None:
    model = lq.prepare(residual(), X, mode=mode)
    if mode == "qat":
        training_step(model, Call((X,)))
    else:
        lq.calibrate(model, [X])
    if how == "deepcopy":
        model.zero_grad()
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    expected = model.eval()(X)
    assert_same(twin.eval()(X), expected, "output of the copy")
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.5)
    training_step(twin, Call((X * 3,)))
    optimizer.step()
    assert_same(model.eval()(X), expected, "output after the copy was trained")
    assert (twin.eval()(X) - expected).abs().max() > 0.1
    # And each becomes an INT8 network of its own weights.
    near = lq.convert(twin)
    assert (near(X) - twin(X)).abs().max() < 0.1 * twin(X).abs().max()
    lq.unprepare(twin)
    lq.convert(model)


def test_a_copy_inside_another_module() -> None:
    # Averaged models (EMA, SWA) deep-copy; DataParallel-style replicas are copies in a list.
    model = lq.calibrate(lq.prepare(residual().eval(), X), [X])
    replicas = nn.ModuleList(copy.deepcopy(model) for _ in range(2))
    parts = torch.cat([replica(part) for replica, part in zip(replicas, X.chunk(2), strict=True)])
    assert_same(parts, model(X), "outputs of replicas")
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    assert_same(average(X), model(X), "output of the average")


def test_a_submodule_replaced_after_preparation() -> None:
    # A new head for other classes, or a layer that surgery swapped: the new one computes, or lq says that it cannot.
    model = lq.prepare(residual().eval(), X)
    eager = lq.unprepare(copy.deepcopy(model))
    torch.manual_seed(1)
    model.fc = nn.Linear(16, 5)
    model.conv2 = conv(16, 16, bias=False)
    eager.fc, eager.conv2 = copy.deepcopy(model.fc), copy.deepcopy(model.conv2)
    if right_or_refused(lambda: model(X), eager(X), near=100):
        right_or_refused(lambda: lq.convert(lq.calibrate(model, [X]))(X), eager(X))


def test_a_parameter_replaced_after_preparation() -> None:
    model = lq.prepare(residual().eval(), X, target="x86_avx2")
    eager = lq.unprepare(copy.deepcopy(model))
    torch.manual_seed(1)
    weight = torch.randn_like(model.conv1.weight)
    model.conv1.weight = nn.Parameter(weight)
    eager.conv1.weight = nn.Parameter(weight.clone())
    assert_same(model(X), eager(X), "output")
    lq.calibrate(model, [X])
    check_int8(lq.convert(model), Call((X,)), eager, model)


def test_preparation_twice_is_preparation_once() -> None:
    model = residual().eval()
    eager = copy.deepcopy(model)
    keys = set(model.__dict__), [set(m.__dict__) for m in model.modules()]
    for _ in range(2):
        lq.prepare(model, X)
        lq.calibrate(model, [X])
        lq.convert(model)
        lq.unprepare(model)
        assert (set(model.__dict__), [set(m.__dict__) for m in model.modules()]) == keys
    assert_same_step(training_step(model, Call((X,))), training_step(eager, Call((X,))))


def test_preparation_with_and_without_gradients() -> None:
    for context in (torch.no_grad, torch.enable_grad):
        model = residual()
        eager = copy.deepcopy(model)
        with context():
            lq.prepare(model, X)
        assert_same_step(training_step(model, Call((X,))), training_step(eager, Call((X,))))


def test_preparation_moves_no_random_state() -> None:
    class Noisy(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + 0.01 * torch.randn_like(x))

    model = Noisy()
    state = torch.get_rng_state()
    lq.prepare(model, X)
    assert torch.equal(torch.get_rng_state(), state)


def test_training_flags_are_kept() -> None:
    model = residual().train()
    model.bn1.eval()
    lq.prepare(model, X)
    assert model.training and model.bn.training and not model.bn1.training
    check_float(residual(), X)


class Grid(nn.Module):
    """Adds a grid that it keeps for the next call with such sizes, as heads of detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.grid: Any = None
        self.shape: Any = None

    def features(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu())

    def made_for(self, x: Tensor) -> Tensor:
        size = x.shape[2] * x.shape[3]
        return (torch.arange(size).type_as(x) / size).view(1, 1, *x.shape[2:])

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        if self.shape != x.shape:
            self.grid, self.shape = self.made_for(x), x.shape
        return x + self.grid


class GridOfNone(Grid):
    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        if self.grid is None or self.grid.shape[2:] != x.shape[2:]:
            self.grid = self.made_for(x)
        return x + self.grid


class GridInBuffer(Grid):
    def __init__(self) -> None:
        super().__init__()
        del self.grid
        self.register_buffer("grid", torch.zeros(1, 1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        if self.grid.shape[2:] != x.shape[2:]:
            self.grid = self.made_for(x)
        return x + self.grid


class GridMadeOnce(Grid):
    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        if not hasattr(self, "once"):
            self.once = self.made_for(x)
        return x + self.once


class GridOfStrides(Grid):
    """Of whole cells of four pixels, so that several sizes have the same."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(self.features(x), 4)
        if self.grid is None or self.grid.shape[2:] != x.shape[2:]:
            self.grid = self.made_for(x)
        return x + self.grid


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("used_with", [None, (2, 16), (1, 16), (2, 12)])
@pytest.mark.parametrize("kind", [Grid, GridOfNone, GridInBuffer, GridMadeOnce, GridOfStrides])
def test_what_is_kept_for_sizes(kind: type[Grid], used_with: tuple[int, int] | None, inside: bool) -> None:
    torch.manual_seed(0)
    network = (nn.Sequential(nn.Conv2d(3, 3, 1), kind()) if inside else kind()).eval()
    if used_with is not None:
        batch, size = used_with
        network(torch.randn(batch, 3, size, size))
        if kind is GridMadeOnce and size != 16:
            return  # it takes no other sizes
    original = copy.deepcopy(network)
    x = torch.randn(2, 3, 16, 16)
    int8 = lq.convert(calibrated(network, x, target=TARGET))
    assert int8.report is not None and len(int8.report.int8_layers) == 2 + inside
    # The example's batch size, and the size that the network was used with, too.
    for batch, size in ((2, 16), (1, 16), (3, 16), used_with or (2, 16)):
        given = torch.randn(batch, 3, size, size)
        expected = original(given)
        assert (int8(given) - expected).norm() < 0.03 * expected.norm()


class PooledUnless(Grid):
    """Tests for two sizes at once, of which a capture sees the first alone."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return F.max_pool2d(x, 4) if x.shape[-2:] != (32, 32) else x


class PlacedWhereItFits(Grid):
    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 4, 32, 32))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return x + self.position if x.shape[2:] == self.position.shape[2:] else x


@pytest.mark.parametrize("size", [(16, 16), (64, 64), (16, 32)])
@pytest.mark.parametrize("kind", [PooledUnless, PlacedWhereItFits])
def test_what_a_forward_asks_of_sizes_stays_a_condition(kind: type[Grid], size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    network = kind().eval()
    original = copy.deepcopy(network)
    x = torch.randn(2, 3, *size)
    int8 = lq.convert(calibrated(network, x, target=TARGET))
    with pytest.raises(ValueError, match="it was made for inputs with"):
        int8(torch.randn(2, 3, 32, 32))
    expected = original(x)
    assert (int8(x) - expected).norm() < 0.03 * expected.norm()
