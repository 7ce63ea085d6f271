"""Prepare: put quantizers on a float model, in place, and take them off again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from lq.graph.analysis import GraphAnalysis, analyse
from lq.graph.captured import QUANTIZERS, CapturedForward, QuantizerTree, WeightQuantizedForward, without_quantizers
from lq.graph.placement import place, site
from lq.graph.signature import CallSignature
from lq.graph.tracing import CaptureError
from lq.modes import evaluating
from lq.overrides import Overrides, OverridesLike, Scheme
from lq.quantizer import (
    ACTIVATION_OBSERVERS,
    Quantizer,
    QuantizerState,
    WeightQuantizer,
    activation_quantizer,
    weight_quantizer,
)
from lq.targets import Residual, Target, get_target

M = TypeVar("M", bound=nn.Module)

Mode = Literal["ptq", "qat"]


class NothingToQuantizeError(ValueError):
    """The model has no layer that could run in INT8."""


class PreparedForward(CapturedForward):
    """The forward of a prepared module, with what it was prepared for.

    Args:
        module: see :class:`~lq.graph.captured.CapturedForward`.
        analysis: the float module's graph.
        sites: see :class:`~lq.graph.captured.CapturedForward`.
        scheme: the engine family the quantizers were placed for, and the layers that are quantized in another way.
        mode: ``"ptq"`` or ``"qat"``.
        observer: statistics of the activations.
        inputs: example inputs by name; conversion runs the folded model on them.
        settings: the forward's other arguments.
    """

    def __init__(
        self,
        module: nn.Module,
        analysis: GraphAnalysis,
        sites: Mapping[str, str],
        scheme: Scheme,
        mode: Mode,
        observer: str,
        inputs: Mapping[str, Any],
        settings: Mapping[str, Any],
    ) -> None:
        super().__init__(module, analysis.traced, sites)
        self.target = scheme.target
        self.overrides = scheme.overrides
        self.mode: Mode = mode
        self.observer = observer
        self.inputs = dict(inputs)
        self.settings = dict(settings)

    def scheme(self, target: Target | None = None) -> Scheme:
        """What each tensor is rounded to, for the module's own target or another one."""
        return Scheme(target or self.target, self.overrides)

    def analyse(self, target: Target | None = None) -> GraphAnalysis:
        """The float graph of the module as it is now, run on the example inputs with all quantizers off.

        Args:
            target: whose placement it is; by default that of the target the module was prepared for.
        """
        # The module may have been moved, or cast (after training in half precision), since the example was given.
        like = next((p for p in self.module.parameters() if p.is_floating_point()), torch.empty(0))

        def move(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return value.to(like) if value.is_floating_point() else value.to(like.device)

        inputs = tree_map(move, self.inputs)
        with quantizers_off(self.module), without_quantizers(self.module):
            return analyse(self.module, inputs, self.settings, self.scheme(target))


def example_arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``(args, kwargs)`` of a forward call: a tuple is its arguments, a dict its keywords, anything else its one
    argument."""
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (example_inputs,), {}


def is_prepared(module: nn.Module) -> bool:
    """Whether ``module`` carries quantizers that :func:`prepare` put there."""
    return isinstance(module.__dict__.get("forward"), CapturedForward)


def prepared_forward(module: nn.Module) -> PreparedForward:
    """What is known of a prepared module.

    Raises:
        ValueError: where ``module`` is not prepared.
    """
    forward = module.__dict__.get("forward")
    if not isinstance(forward, PreparedForward):
        raise ValueError(f"this {type(module).__name__} is not prepared; call lq.prepare(model, example_inputs) first")
    return forward


def prepare(
    model: M,
    example_inputs: Any,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    target: str | Target = "x86",
    mode: Mode = "ptq",
    observer: str | None = None,
    overrides: OverridesLike | Overrides | None = None,
) -> M:
    """Put quantizers on the tensors of ``model``, in place.

    The model stays the object it is: its class, methods, attributes and parameter names are kept, and its state dict
    has the float keys and those of the quantizers. With ``mode="ptq"`` the quantizers are off until
    :func:`~lq.calibrate`; with ``mode="qat"`` they watch the training batches and round from the first one on, and the
    model is ready to be trained.

    Args:
        model: a float module; where in eval or training mode does not matter, and is kept.
        example_inputs: inputs to run the model with once: a tensor, a tuple (the arguments of the forward) or a dict
            (its keyword arguments). A batch of two or more lets the batch size of the exported model vary.
        example_kwargs: keyword arguments beside ``example_inputs``.
        target: the engine family: a name or a :class:`~lq.Target`.
        mode: ``"ptq"`` or ``"qat"``.
        observer: statistics of the activations. By default ``"histogram"`` for PTQ, which serves every calibrator, and
            ``"moving_average"`` for QAT, where early batches are to be forgotten. ``"minmax"`` is the cheapest.
        overrides: layers that are quantized in another way, by name: a :class:`~lq.LayerSpec`, or None for a module
            that stays in float. The name of a module stands for everything in it, its parts may be globs
            (``"layer*.*.conv1"``), and the most specific name decides.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: where an argument is none of its choices, or the model is prepared already.
        NothingToQuantizeError: where no layer of the model can run in INT8.
        CaptureError: where the forward of ``model`` cannot be captured as a graph.

    Example:
        >>> import lq, torch, torchvision
        >>> model = lq.prepare(torchvision.models.resnet18(), torch.randn(2, 3, 32, 32))
        >>> model = lq.calibrate(model, [torch.randn(8, 3, 32, 32)])
        >>> int8 = lq.convert(model)
        >>> int8(torch.randn(1, 3, 32, 32)).shape
        torch.Size([1, 1000])
    """
    resolved = get_target(target)
    if mode not in get_args(Mode):
        raise ValueError(f"mode={mode!r} is unknown; choose 'ptq' or 'qat'")
    if observer is None:
        observer = "histogram" if mode == "ptq" else "moving_average"
    if observer not in ACTIVATION_OBSERVERS:
        raise ValueError(
            f"observer={observer!r} is unknown; choose one of {', '.join(map(repr, ACTIVATION_OBSERVERS))}"
        )
    if mode == "qat" and observer == "histogram":
        raise ValueError(
            "observer='histogram' serves calibration only; training follows the ranges step by step: choose "
            "'moving_average' or 'minmax' for mode='qat'"
        )
    if is_prepared(model):
        raise ValueError(
            f"this {type(model).__name__} is prepared already; call lq.unprepare(model) first to prepare it anew"
        )

    _refuse_replaced_forward(type(model).__name__, model)

    args, kwargs = example_arguments(example_inputs)
    inputs, settings = CallSignature(type(model).forward).bind(args, {**kwargs, **(example_kwargs or {})})
    scheme = Scheme(resolved, Overrides.of(overrides))
    analysis = analyse(model, inputs, settings, scheme)
    paths = [path for path, _ in model.named_modules() if path]
    scheme.overrides.check([*paths, *(site(node) for node in analysis.graph.nodes)])
    if analysis.traced.registered:
        _check_registered(model, analysis, inputs, settings)
    placement = analysis.placement
    if not placement.chains:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in placement.float_layers.items())
        raise NothingToQuantizeError(
            f"nothing to quantize in {type(model).__name__}: its forward runs no convolution or linear layer that an "
            f"INT8 kernel exists for{reasons}"
        )

    for chain in placement.chains:
        if chain.op.module is not None:
            _refuse_replaced_forward(chain.name, chain.op.module)

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    tree = QuantizerTree()
    sites: dict[str, str] = {}
    everywhere = {
        node
        for residual in get_args(Residual)
        for node in place(analysis.traced, model, analysis.values, _with_residual(scheme, residual)).activations
    }
    for node in analysis.graph.nodes:
        if node in everywhere:
            sites[site(node)] = site(node)
            names = placement.names_of(node)
            quantizer = activation_quantizer(
                scheme.activation(*names),
                observer,
                rounds=node in placement.activations,
                own_calibrator=scheme.calibrator(*names),
            )
            tree[site(node)] = quantizer.to(device)
    for chain in placement.chains:
        layer: Any = chain.op.module
        if chain.weight_key not in list(tree):
            weight = layer.weight if layer is not None else analysis.values[chain.op.weight]  # type: ignore[index]
            tree[chain.weight_key] = weight_quantizer(scheme.weight(chain.name), weight)
        if chain.op.weight is not None:
            sites[site(chain.op.weight)] = chain.weight_key
    for module in tree.modules():
        module.train(model.training)
    model.add_module(QUANTIZERS, tree)
    for chain in placement.chains:
        if chain.op.module is not None:
            quantizer = tree[chain.weight_key]
            assert isinstance(quantizer, WeightQuantizer)
            chain.op.module.forward = WeightQuantizedForward(chain.op.module, quantizer)
    model.forward = PreparedForward(model, analysis, sites, scheme, mode, observer, inputs, settings)
    if mode == "qat":
        set_state(model, QuantizerState.OBSERVE | QuantizerState.FAKE_QUANTIZE)
    return model


def _check_registered(
    model: nn.Module, analysis: GraphAnalysis, inputs: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    """Refuse a registered function that computes something else than the layer it stands for."""
    output = next(node for node in analysis.graph.nodes if node.op == "output")
    with evaluating(model), torch.no_grad():
        expected = tree_leaves(model(**inputs, **settings))
    for found, wanted in zip(tree_leaves(analysis.values[output]), expected, strict=True):
        if isinstance(wanted, torch.Tensor) and not torch.allclose(found, wanted, rtol=1e-3, atol=1e-5):
            raise ValueError(
                f"with the functions registered for {', '.join(sorted(analysis.traced.registered))} the model computes "
                f"something else (difference {(found - wanted).abs().max():.2g}): lq.register_layer(cls, forward) "
                f"needs a forward that does what that of the class does in evaluation mode"
            )


def _with_residual(scheme: Scheme, residual: Residual) -> Scheme:
    return replace(scheme, target=replace(scheme.target, residual=residual))


def _refuse_replaced_forward(name: str, module: nn.Module) -> None:
    if "forward" in module.__dict__:
        raise CaptureError(
            f"{name}: its forward was replaced on the object (module.forward = ...), which a graph captured from its "
            f"class would not do; put the code into a subclass"
        )


def unprepare(model: M) -> M:
    """Take everything off ``model`` that :func:`prepare` put on it; the weights stay as they are now.

    Raises:
        ValueError: where ``model`` is not prepared.
    """
    prepared_forward(model)
    for module in _replaced_forwards(model):
        del module.forward
    del model._modules[QUANTIZERS]
    return model


@contextmanager
def unprepared(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` is the float module, at a float module's speed; afterwards prepared as before.

    Raises:
        ValueError: where ``model`` is not prepared.
    """
    prepared_forward(model)
    forwards = _replaced_forwards(model)
    for module in forwards:
        del module.forward
    try:
        with without_quantizers(model):
            yield
    finally:
        for module, forward in forwards.items():
            module.forward = forward


def _replaced_forwards(model: nn.Module) -> dict[nn.Module, Any]:
    forwards = {module: module.__dict__.get("forward") for module in model.modules()}
    return {m: f for m, f in forwards.items() if isinstance(f, (CapturedForward, WeightQuantizedForward))}


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """The quantizers of a prepared model by name: a tensor's (``layer1.0.relu``) or a weight's
    (``layer1.0.conv1.weight``).

    Raises:
        ValueError: where ``model`` is not prepared.
    """
    prepared_forward(model)
    tree = model._modules[QUANTIZERS]
    assert isinstance(tree, QuantizerTree)
    return {key: tree[key] for key in tree}


def set_state(model: nn.Module, state: QuantizerState) -> None:
    """Set what every quantizer of ``model`` does."""
    for quantizer in quantizers(model).values():
        quantizer.state = state


def freeze(model: nn.Module) -> None:
    """Stop watching activations: their scales and zero points keep their values from here on.

    A weight's scale goes on following the weight, which is at hand at all times and clips where it does not.
    """
    for quantizer in quantizers(model).values():
        if not isinstance(quantizer, WeightQuantizer):
            quantizer.state &= ~QuantizerState.OBSERVE


def refresh_weights(model: nn.Module) -> None:
    """Bring the ranges of the layers' weights up to date, as the next forward would: an optimizer step moved them."""
    for forward in _replaced_forwards(model).values():
        if isinstance(forward, WeightQuantizedForward):
            weight = forward.layer.weight
            assert isinstance(weight, torch.Tensor)
            forward.quantizer.refresh(weight)


def simulate(model: nn.Module) -> None:
    """Let every quantizer of a calibrated model round, with the ranges it has."""
    for quantizer in quantizers(model).values():
        is_weight = isinstance(quantizer, WeightQuantizer)
        quantizer.state = QuantizerState.FAKE_QUANTIZE | (QuantizerState.OBSERVE if is_weight else QuantizerState.OFF)


def activation_quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """The quantizers of a prepared model that sit on activations, by name."""
    return {name: q for name, q in quantizers(model).items() if not isinstance(q, WeightQuantizer)}


@contextmanager
def quantizers_off(model: nn.Module) -> Iterator[None]:
    """The float model: every quantizer off, and its state back afterwards."""
    states = {quantizer: quantizer.state for quantizer in quantizers(model).values()}
    try:
        for quantizer in states:
            quantizer.state = QuantizerState.OFF
        yield
    finally:
        for quantizer, state in states.items():
            quantizer.state = state
