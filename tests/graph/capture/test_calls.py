"""How a forward is called: its arguments, their forms, and who calls it."""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lq
from helpers.capture_checks import as_tensors, check, check_float, check_int8, right_or_refused
from helpers.networks import Residual, randomize_batch_norm
from helpers.patterns import Forward, conv
from helpers.quantized import noise
from helpers.training_steps import Call, assert_same, sqnr

X = noise(8, 12, seed=1)
OTHER = noise(8, 12, seed=2)
INDEX = torch.arange(8) % 4


class Network(nn.Module):
    """Layers that every forward here runs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = conv(3, 8), conv(8, 8), nn.Linear(8, 10)
        self.table = nn.Embedding(4, 8)

    def image(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x))).mean((2, 3))


class KeywordOnly(Network):
    def forward(self, *, image: Tensor, scale: float = 1.0) -> Tensor:
        return self.fc(self.image(image) * scale)


class OptionalArgument(Network):
    def forward(self, x: Tensor, extra: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        x = self.image(x)
        if extra is not None:
            x = x + extra
        return self.fc(x if mask is None else x * mask)


class Variadic(Network):
    def forward(self, *images: Tensor, **settings: Any) -> Tensor:
        x = self.image(images[0])
        for image in images[1:]:
            x = x + self.image(image) * settings.get("weight", 0.5)
        return self.fc(x)


class DictInput(Network):
    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        x = self.image(batch["image"])
        return {"logits": self.fc(x + self.table(batch["index"])), "features": x}


class ListInput(Network):
    def forward(self, images: list[Tensor]) -> list[Tensor]:
        return [self.fc(self.image(image)) for image in images]


class Outputs(NamedTuple):
    logits: Tensor
    features: tuple[Tensor, Tensor]


class TupleOutput(Network):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Outputs:
        first, second = (self.image(image) for image in pair)
        return Outputs(self.fc(first - second), (first, second))


class IntegerBeside(Network):
    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return self.fc(self.image(x) + self.table(index) * (index > 1)[:, None])


class ComplexBeside(Network):
    def forward(self, x: Tensor, spectrum: Tensor) -> Tensor:
        x = torch.fft.irfft2(torch.fft.rfft2(x) * spectrum, s=x.shape[-2:])
        return self.fc(self.image(x))


class BooleanMask(Network):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.fc(self.image(x.masked_fill(mask, 0.0)))


class BytesInside(Network):
    """Integer images, normalised in the forward."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.image(x.float() / 127.5 - 1))


class Settings(Network):
    def forward(self, x: Tensor, sizes: list[int], mode: str = "mean", flip: bool = False) -> Tensor:
        x = F.adaptive_avg_pool2d(self.b(F.relu(self.a(x.flip(-1) if flip else x))), sizes)
        return self.fc(getattr(x, mode)((2, 3)) if mode == "mean" else x.amax((2, 3)))


def test_keywords_only() -> None:
    check(KeywordOnly(), image=X, scale=2.0)


@pytest.mark.parametrize("given", [{}, {"extra": torch.randn(8, 8)}, {"extra": None, "mask": torch.ones(8, 8)}])
def test_optional_arguments(given: dict[str, Any]) -> None:
    check(OptionalArgument(), X, **given)


def test_calls_with_other_optional_arguments_than_the_example() -> None:
    model = OptionalArgument().eval()
    eager = copy.deepcopy(model)
    lq.prepare(model, X, target="x86_avx2")
    others: list[dict[str, Any]] = [{"extra": torch.ones(8, 8)}, {"mask": torch.ones(8, 8) * 2, "extra": None}]
    for kwargs in ({}, *others):
        assert_same(model(X, **kwargs), eager(X, **kwargs), f"output with {list(kwargs)}")
    int8 = lq.convert(lq.calibrate(model, [X]))
    assert right_or_refused(lambda: int8(X, None, mask=None), eager(X))
    for kwargs in others:
        right_or_refused(lambda kwargs=kwargs: int8(X, **kwargs), eager(X, **kwargs))


@pytest.mark.parametrize("args", [(X,), (X, OTHER)])
def test_any_number_of_arguments(args: tuple[Tensor, ...]) -> None:
    check(Variadic(), *args)
    check(Variadic(), *args, weight=0.25)


def test_structured_arguments() -> None:
    check(DictInput(), {"image": X, "index": INDEX})
    check(ListInput(), [X, OTHER])
    check(TupleOutput(), (X, OTHER))


def test_integers_complex_numbers_and_masks_beside_the_image() -> None:
    check(IntegerBeside(), X, INDEX)
    check(ComplexBeside(), X, torch.randn(12, 7, dtype=torch.complex64))
    check(BooleanMask(), X, X[:, :1] > 1)
    check(BytesInside(), (X * 60 + 128).clamp(0, 255).byte())


@pytest.mark.parametrize("kwargs", [{}, {"mode": "max"}, {"mode": "max", "flip": True}])
def test_lists_and_strings_among_the_arguments(kwargs: dict[str, Any]) -> None:
    check(Settings(), X, [4, 4], **kwargs)


def test_list_arguments_at_the_int8_network() -> None:
    model = lq.prepare(Settings().eval(), (X, [4, 4]), target="x86_avx2")
    lq.calibrate(model, [X], forward=lambda x: model(x, [4, 4]))
    int8 = lq.convert(model)
    assert sqnr(int8(X, [4, 4]), model(X, [4, 4])) > 25
    assert sqnr(int8(X, sizes=[4, 4], mode="mean"), model(X, [4, 4])) > 25
    with pytest.raises(TypeError, match=r"\[2, 2\]"):
        int8(X, [2, 2])


def test_numpy_batches() -> None:
    # A batch of arrays in every form that a batch of tensors may have.
    forms: list[Any] = [X.numpy(), (X.numpy(),), [X.numpy(), np.zeros(8)], {"x": X.numpy()}]
    for batch in forms:
        model = lq.prepare(OptionalArgument().eval(), X, target="x86_avx2")
        expected = model(X)
        int8 = lq.convert(lq.calibrate(model, [batch]))
        assert sqnr(int8(X.numpy()), expected) > 20
        assert sqnr(int8(x=X.numpy()), expected) > 20


def test_numpy_batches_with_labels_and_structure() -> None:
    model = lq.prepare(DictInput().eval(), ({"image": X, "index": INDEX},), target="x86_avx2")
    batch = {"image": X.numpy(), "index": INDEX.numpy()}
    expected = model({"image": X, "index": INDEX})
    lq.calibrate(model, [(batch, np.zeros(8))])
    assert sqnr(as_tensors(lq.convert(model)(batch)), expected) > 20


class CallsForward(nn.Module):
    """Submodules called through ``.forward``, which runs no hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.a, self.fc = Residual(), conv(3, 3), nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc.forward(F.relu(self.body.forward(self.a.forward(x))))


@pytest.mark.parametrize(
    "total",
    [
        pytest.param(lambda x, y: operator.add(x, y), id="operator"),
        pytest.param(lambda x, y: functools.reduce(operator.add, [x, y]), id="reduce"),
        pytest.param(lambda x, y: sum([x, y], start=torch.zeros(())), id="sum"),
        pytest.param(lambda x, y: next(map(torch.Tensor.add, [x], [y])), id="map"),
        pytest.param(lambda x, y: x.add(other=y), id="method"),
    ],
)
def test_sums_by_functions_of_python(total: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Python calls a function from another instruction once it has run a few times: it is the same call."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return self.c(F.relu(total(x, self.b(x))))

    model = Forward(forward, a=conv(3, 8), b=conv(8, 8), c=conv(8, 4)).eval()
    for _ in range(3):
        model(X)
    eager = copy.deepcopy(model)
    lq.calibrate(lq.prepare(model, X[:2]), [X])
    check_int8(lq.convert(model), Call((X,)), eager, model)


def test_modules_called_through_forward() -> None:
    check(randomize_batch_norm(CallsForward()), X)


def test_the_prepared_module_called_through_forward() -> None:
    # Lightning code calls `self.net.forward(x)` and `type(self).forward(self, x)`.
    model = randomize_batch_norm(Residual()).eval()
    eager = copy.deepcopy(model)
    lq.prepare(model, X, target="x86_avx2")
    assert_same(model.forward(X), eager(X), "output of model.forward")
    lq.calibrate(model, [X], forward=lambda x: model.forward(x))
    assert_same(model.forward(X), model(X), "output of model.forward")
    assert (model(X) - eager(X)).abs().max() > 0
    int8 = lq.convert(model)
    check_int8(int8, Call((X,)), eager, model)
    assert_same(int8.forward(X), int8(X), "output of int8.forward")


class Parts(nn.Module):
    """A module whose features and head are called apart, as embeddings and losses do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = conv(3, 8), conv(8, 8), nn.Linear(8, 10)

    def features(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))


def test_methods_beside_the_forward() -> None:
    model = Parts().eval()
    eager = copy.deepcopy(model)
    check_float(model, X)
    eager.load_state_dict(model.state_dict(), strict=False)
    assert_same(model.features(X), eager.features(X), "features")
    assert_same(model.fc(model.features(X)), eager(X), "output of the parts")


def test_another_method_calls_the_forward() -> None:
    class Twice(Parts):
        def twice(self, x: Tensor) -> Tensor:
            return self(x) + self.forward(x.flip(-1))

    model = Twice().eval()
    expected = model.twice(X)
    lq.prepare(model, X)
    assert_same(model.twice(X), expected, "output of both calls")
    lq.calibrate(model, [X])
    assert sqnr(model.twice(X), expected) > 20


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast(dtype: torch.dtype) -> None:
    model = randomize_batch_norm(Residual())
    eager = copy.deepcopy(model)
    lq.prepare(model, X)
    for training in (False, True):
        with torch.autocast("cpu", dtype=dtype):
            actual, expected = model.train(training)(X), eager.train(training)(X)
        assert actual.dtype == expected.dtype
        assert_same(actual, expected, "output under autocast")


class AutocastInside(Parts):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.features(x)
        return self.fc(x.float())


def test_autocast_inside_the_forward() -> None:
    model = AutocastInside()
    eager = copy.deepcopy(model).eval()
    check_float(model, X)
    eager.load_state_dict(model.state_dict(), strict=False)
    right_or_refused(lambda: lq.convert(lq.calibrate(model, [X]))(X), eager(X))


def test_wrappers() -> None:
    model = randomize_batch_norm(Residual())
    eager = copy.deepcopy(model)
    outer = nn.DataParallel(lq.prepare(model, X)).eval()  # without a GPU it calls the module itself
    assert_same(outer(X), eager.eval()(X), "output of the wrapper")
    batched = torch.func.vmap(lambda x: eager(x[None])[0])(X)
    assert_same(torch.func.vmap(lambda x: model.eval()(x[None])[0])(X), batched, "output of vmap")
    state = dict(model.named_parameters())
    assert_same(torch.func.functional_call(model, state, (X,)), eager(X), "output of a functional call")
