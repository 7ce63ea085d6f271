"""What calibration takes as data, how much of it, and what an interrupted one leaves behind."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import lq
from helpers.calibration import found_ranges, images, network, prepared
from lq.numerics.calibrators import Calibrator
from lq.numerics.observers import Observer
from lq.numerics.quantizer import QuantizerState

BATCHES = images(5)
LABELS = torch.arange(4)


@functools.cache
def expected(number: int = len(BATCHES)) -> dict[str, tuple[float, int, str]]:
    """The ranges of the first so many batches."""
    return found_ranges(lq.calibrate(prepared(), BATCHES[:number]))


class Labelled(NamedTuple):
    image: Tensor
    label: Tensor


class Images(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"label": torch.tensor(index), "input": torch.cat(BATCHES)[index]}


class Stream(IterableDataset[Tensor]):
    """Knows no length."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.cat(BATCHES))


FORMS: dict[str, Callable[[], Iterable[Any]]] = {
    "tensors": lambda: BATCHES,
    "a generator": lambda: (batch for batch in BATCHES),
    "a map": lambda: map(torch.clone, BATCHES),
    "tuples with labels": lambda: [(batch, LABELS) for batch in BATCHES],
    "lists with labels and indices": lambda: [[batch, LABELS, LABELS] for batch in BATCHES],
    "named tuples": lambda: [Labelled(batch, LABELS) for batch in BATCHES],
    "one-tuples": lambda: [(batch,) for batch in BATCHES],
    "dicts with other keys": lambda: [{"label": LABELS, "path": ["a.png"] * 4, "input": batch} for batch in BATCHES],
    "a loader of pairs": lambda: DataLoader(TensorDataset(torch.cat(BATCHES), torch.arange(20)), batch_size=4),
    "a loader of dicts": lambda: DataLoader(Images(), batch_size=4),
    "a loader of a stream": lambda: DataLoader(Stream(), batch_size=4),
    "empty batches between": lambda: [x for batch in BATCHES for x in (batch[:0], batch, batch[:0])],
}


@pytest.mark.parametrize("form", FORMS)
def test_batches_of_every_form(form: str) -> None:
    # Sequential calls its one argument "input".
    model = lq.calibrate(prepared(), FORMS[form]())
    assert found_ranges(model) == expected()


@pytest.mark.parametrize("form", ["tensors", "a generator", "a loader of a stream"])
def test_progress_bar_changes_nothing(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = lq.calibrate(prepared(), FORMS[form](), num_samples=20, progress=True)
    assert "Calibrating" in capsys.readouterr().out
    assert found_ranges(model) == expected()


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, image: Tensor, shift: Tensor, *, twice: bool = False) -> Tensor:
        x = self.conv(image).relu().mean((2, 3)) + shift
        return self.fc(x * 2 if twice else x)


@pytest.mark.parametrize("twice", [False, True])
def test_several_inputs_and_settings(twice: bool) -> None:
    x, shift, model = BATCHES[0], torch.randn(4, 8), TwoInputs().eval()
    forms: list[tuple[bool, Any]] = [
        (False, (x, shift, LABELS)),
        (False, [x, shift]),
        (False, {"shift": shift, "label": LABELS, "image": x}),
        (twice, {"shift": shift, "label": LABELS, "image": x, "twice": twice}),
    ]
    for doubled, batch in forms:
        given = lq.calibrate(lq.prepare(copy.deepcopy(model), (x, shift)), [batch])
        reference = lq.prepare(copy.deepcopy(model), (x, shift))
        lq.calibrate(reference, [x], forward=lambda image, m=reference, d=doubled: m(image, shift, twice=d))
        assert found_ranges(given) == found_ranges(reference)


def test_a_forward_of_ones_own_gets_the_batch_as_it_is() -> None:
    class Batch:
        def __init__(self, image: Tensor) -> None:
            self.image = image

    model, batches = prepared(), [Batch(batch) for batch in BATCHES]
    given: list[Batch] = []

    def forward(batch: Batch) -> Tensor:
        given.append(batch)
        assert not torch.is_grad_enabled()
        assert not model.training
        return model(batch.image)

    lq.calibrate(model.train(), batches, forward=forward)
    assert given == batches
    assert model.training
    assert found_ranges(model) == expected()


@pytest.mark.parametrize(
    ("limits", "number"),
    [
        ({"num_batches": 2}, 2),
        ({"num_batches": 99}, 5),
        ({"num_samples": 1}, 1),
        ({"num_samples": 8}, 2),
        ({"num_samples": 9}, 3),  # whole batches
        ({"num_samples": 9, "num_batches": 2}, 2),
        ({"num_samples": 4, "num_batches": 2}, 1),
        ({"num_samples": 1000}, 5),
        ({}, 5),
    ],
)
@pytest.mark.parametrize("labelled", [False, True])
def test_no_more_data_than_asked_for(limits: dict[str, int], number: int, labelled: bool) -> None:
    taken = 0

    def data() -> Iterator[Any]:
        nonlocal taken
        for batch in BATCHES:
            taken += 1
            yield (batch, LABELS) if labelled else batch

    model = lq.calibrate(prepared(), data(), **limits)
    assert taken == number
    assert found_ranges(model) == expected(number)


@pytest.mark.parametrize("limit", ["num_batches", "num_samples"])
@pytest.mark.parametrize("value", [0, -1])
def test_limits_that_leave_nothing(limit: str, value: int) -> None:
    model = prepared()
    with pytest.raises(ValueError, match=f"{limit}={value} must be at least 1"):
        lq.calibrate(model, BATCHES, **{limit: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("auto", [False, True])
@pytest.mark.parametrize("batches", [[], [BATCHES[0][:0]], [(BATCHES[0][:0], LABELS[:0])] * 3])
def test_no_data(batches: list[Any], auto: bool) -> None:
    model = lq.calibrate(prepared(), BATCHES)
    with pytest.raises(lq.CalibrationError, match="no calibration data reached 'input': give lq.calibrate at least"):
        lq.calibrate(model, batches, calibrator="auto" if auto else None)
    assert torch.equal(model(BATCHES[0]), network()(BATCHES[0]))


@pytest.mark.parametrize("auto", [False, True])
@pytest.mark.parametrize("position", [0, 2])
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_calibration(position: int, calibrated: bool, auto: bool, error: type[BaseException]) -> None:
    def data() -> Iterator[Tensor]:
        yield from BATCHES[:position]
        raise error("in the loader")

    model = prepared()
    if calibrated:
        lq.calibrate(model, BATCHES, calibrator="minmax")
    model.layer1.train()  # type: ignore[union-attr]
    flags = [module.training for module in model.modules()]
    with pytest.raises(error, match="in the loader"):
        lq.calibrate(model, data(), calibrator="auto" if auto else None)
    assert [module.training for module in model.modules()] == flags
    assert torch.is_grad_enabled()
    # Float, bit for bit, and trainable.
    model.eval()
    reference = network()
    outputs = model(BATCHES[0]), reference(BATCHES[0])
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    assert torch.equal(model.stem[0].weight.grad, reference.stem[0].weight.grad)  # type: ignore[index, union-attr]
    assert all(q.state == QuantizerState.OFF for q in lq.quantizers(model).values())
    # And what the interrupted one saw is not in the next.
    assert found_ranges(lq.calibrate(model, BATCHES)) == expected()


def test_an_error_in_the_model() -> None:
    model = prepared()
    with pytest.raises(RuntimeError, match="channels"):
        lq.calibrate(model, [BATCHES[0], torch.zeros(2, 5, 8, 8)])
    assert torch.equal(model(BATCHES[0]), network()(BATCHES[0]))
    with pytest.raises(TypeError, match="input"):
        lq.calibrate(model, [{"picture": BATCHES[0]}])
    assert torch.equal(model(BATCHES[0]), network()(BATCHES[0]))


def test_a_training_model_learns_nothing_from_calibration() -> None:
    model = prepared().train()
    before = {key: value.clone() for key, value in network().state_dict().items()}
    rng = torch.get_rng_state()
    lq.calibrate(model, BATCHES)
    assert torch.equal(torch.get_rng_state(), rng)
    assert model.training
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert found_ranges(model) == expected()  # batch norms in evaluation mode, that is


def test_under_inference_mode_and_with_gradients_afterwards() -> None:
    model = prepared()
    with torch.inference_mode():
        lq.calibrate(model, BATCHES)
    assert found_ranges(model) == expected()
    model(BATCHES[0]).sum().backward()
    lq.calibrate(model, BATCHES[:2])
    assert found_ranges(model) == expected(2)
    assert found_ranges(copy.deepcopy(model)) == expected(2)


@pytest.mark.parametrize("calibrator", ["auto", "mse", "percentile:99.9", "moving_average"])
def test_statistics_that_are_not_collected_are_missed_before_the_data_go_through(calibrator: str) -> None:
    def batches() -> Iterator[Tensor]:
        pytest.fail("the data went through")
        yield

    model = lq.prepare(network(), BATCHES[0], observer="minmax")
    with pytest.raises(ValueError, match=r"needs a histogram, and a MinMaxObserver keeps none; prepare .*'histogram'"):
        lq.calibrate(model, batches(), calibrator=calibrator)


def test_state_dict_with_a_calibrator_of_ones_own() -> None:
    class Half(Calibrator):
        name = "half"

        def __call__(self, observer: Observer, spec: lq.QuantSpec) -> tuple[Tensor, Tensor]:
            low, high = observer.range()
            return low / 2, high / 2

    model = lq.calibrate(prepared(), BATCHES, calibrator=Half())
    again = prepared()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(BATCHES[0]), model(BATCHES[0]))
