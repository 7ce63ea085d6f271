"""Prepare: put quantizers on a float model, in place, and take them off again."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import nn
from torch.utils._pytree import tree_map

from lq.errors import CaptureError, NothingToQuantizeError
from lq.graph.analysis import GraphAnalysis, analyze_graph
from lq.graph.capture.agreement import capture_faithfully, disagreement, training_differences
from lq.graph.capture.calls import follow, follow_again, unfollow
from lq.graph.capture.captured import CapturedGraph
from lq.graph.capture.signature import signature_of
from lq.graph.forward import QUANTIZERS, QuantizedForward, QuantizerTree, without_quantizers
from lq.graph.placement import is_result, place, site
from lq.numerics.quantizer import (
    ACTIVATION_OBSERVERS,
    Quantizer,
    QuantizerState,
    WeightQuantizer,
    activation_quantizer,
    weight_quantizer,
)
from lq.schemes.overrides import Overrides, OverridesLike, Scheme
from lq.schemes.targets import AUTO_TARGET, XNNPACK, Operator, Residual, Target, get_target, native_target
from lq.util.modes import evaluating

_log = logging.getLogger("lq")

M = TypeVar("M", bound=nn.Module)

Mode = Literal["ptq", "qat"]


#: Tolerance for a registered function, which may compute in another order than the layer; in float32's epsilons.
_REGISTERED_TOLERANCE = 10_000


class PreparedForward(QuantizedForward):
    """The forward of a prepared module, with what it was prepared for.

    Args:
        module: see :class:`~lq.graph.forward.QuantizedForward`.
        captured: the float module's graph in evaluation mode.
        scheme: the engine family the quantizers were placed for, and the layers that are quantized in another way.
        mode: ``"ptq"`` or ``"qat"``.
        observer: statistics of the activations.
        inputs: example inputs by name; conversion runs the folded model on them.
        settings: the forward's other arguments.
    """

    def __init__(
        self,
        module: nn.Module,
        captured: CapturedGraph,
        scheme: Scheme,
        mode: Mode,
        observer: str,
        inputs: Mapping[str, Any],
        settings: Mapping[str, Any],
    ) -> None:
        super().__init__(module, captured.positions)
        self.captured: CapturedGraph | None = captured
        self.target = scheme.target
        self.overrides = scheme.overrides
        self.mode: Mode = mode
        self.observer = observer
        self.inputs = dict(inputs)
        self.settings = dict(settings)
        #: The attributes that are the layers' weights, by their quantizers; a weight that is computed is not there.
        self.weights: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        # The graph follows from the module: copies and pickles omit it and capture it again.
        return {**super().__getstate__(), "captured": None}

    def scheme(self, target: Target | None = None) -> Scheme:
        """What each tensor is rounded to, for the module's own target or another one."""
        target = target or self.target
        if self.mode == "qat" and not self.target.integer_batch_norms:
            # What training did not watch may stay float there.
            target = replace(target, integer_batch_norms=False)
        return Scheme(target, self.overrides)

    def analyze(self, target: Target | None = None) -> GraphAnalysis:
        """The float graph of the module as it is now, run on the example inputs with all quantizers off.

        The graph is captured again if the module now computes something else: a callback changed an attribute, a layer
        was replaced.

        Args:
            target: whose placement it is; by default that of the target the module was prepared for.

        Raises:
            CaptureError: where the module cannot be captured any more.
            ValueError: where training did not watch what the target rounds.
        """
        inputs = self._moved_inputs()
        with unprepared(self.module), evaluating(self.module):
            captured = self.captured
            if captured is None or disagreement(captured, self.module, inputs, self.settings) is not None:
                captured = capture_faithfully(self.module, inputs, self.settings)
            self.captured = captured
            analysis = analyze_graph(captured, self.module, inputs, self.scheme(target))
        self._check_known(analysis, target or self.target)
        return analysis

    def watches(self, target: Target) -> bool:
        """Whether the tensors that a target's operators round had quantizers from the start; in training, each is time
        at every step."""
        if self.mode == "ptq" or target == self.target:
            return True
        has_outputs = self.target.integer_outputs or not target.integer_outputs
        return has_outputs and set(target.operators) <= set(self.target.operators)

    def change(self) -> str | None:
        """How the module differs from when it was last captured, or None.

        Takes two forward passes of the example inputs; replaced layers are followed from now on.
        """
        if self.captured is None:
            return None
        with unprepared(self.module), evaluating(self.module):
            return disagreement(self.captured, self.module, self._moved_inputs(), self.settings)

    def _moved_inputs(self) -> dict[str, Any]:
        """The example inputs on the module's device, and in its precision."""
        # The module may have been moved, or cast (after training in half precision), since the example was given.
        like = next((p for p in self.module.parameters() if p.is_floating_point()), torch.empty(0))

        def move(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return value.to(like) if value.is_floating_point() else value.to(like.device)

        return {name: tree_map(move, value) for name, value in self.inputs.items()}

    def _check_known(self, analysis: GraphAnalysis, target: Target) -> None:
        """Refuse a network that rounds what had no quantizer when the model was prepared."""
        placement = analysis.placement
        needed = [*map(site, placement.activations), *(chain.weight_key for chain in placement.chains)]
        known = quantizers(self.module)
        channels = {chain.weight_key: len(analysis.values[chain.op.weight]) for chain in placement.chains}
        new = [
            name
            for name in needed
            if name not in known
            or (name in channels and known[name].spec.per_channel and len(known[name].scale) != channels[name])
        ]
        if new and not self.watches(target):
            remedy = "train with target='onnxruntime', or write format='onnx', which ONNX Runtime runs as well"
            engine = "between the convolutions for ONNX Runtime"
            if target.integer_outputs:
                engine, remedy = "for XNNPACK", "train with target='xnnpack', whose ranges serve the others as well"
            raise ValueError(
                f"{new[0]!r} is rounded {engine}, which training for target={self.target.name!r} did not watch: "
                f"{remedy}"
            )
        if new:
            raise CaptureError(
                f"{new[0]!r} is rounded in the INT8 network and had no quantizer when the model was prepared: its "
                f"forward has changed since (an attribute was changed, a layer replaced, a hook added). "
                f"Call lq.unprepare(model) and lq.prepare it as it is now"
            )

    def weight(self, key: str) -> torch.Tensor | None:
        """The weight that the quantizer called ``key`` rounds; None where the forward computes it."""
        if key not in self.weights:
            return None
        path, _, name = self.weights[key].rpartition(".")
        value = getattr(self.module.get_submodule(path), name)
        assert isinstance(value, torch.Tensor)
        return value


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
    return isinstance(module.__dict__.get("forward"), QuantizedForward)


def prepared_forward(module: nn.Module) -> PreparedForward:
    """The :class:`PreparedForward` of a prepared module.

    Raises:
        ValueError: where ``module`` is not prepared.
    """
    forward = module.__dict__.get("forward")
    if not isinstance(forward, PreparedForward):
        inside = module._modules.get("_orig_mod")  # what torch.compile wraps
        if inside is not None and is_prepared(inside):
            raise ValueError(
                f"this is what torch.compile made of a prepared {type(inside).__name__}: give the module itself, which "
                f"is its attribute _orig_mod"
            )
        raise ValueError(f"this {type(module).__name__} is not prepared; call lq.prepare(model, example_inputs) first")
    return forward


def prepare(
    model: M,
    example_inputs: Any,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    target: str | Target = AUTO_TARGET,
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
        model: a float module; its mode (training or evaluation) does not matter, and is kept.
        example_inputs: inputs to run the model with once: a tensor, a tuple (the arguments of the forward) or a dict
            (its keyword arguments). A batch of two or more lets the batch size of the exported model vary.
        example_kwargs: keyword arguments beside ``example_inputs``.
        target: the engine family: a name, a :class:`~lq.Target`, or ``"auto"`` for this machine's CPU:
            ``"x86"`` with VNNI, ``"x86_avx2"`` without, ``"xnnpack"`` on ARM. The log says which.
        mode: ``"ptq"`` or ``"qat"``.
        observer: statistics of the activations. By default ``"histogram"`` for PTQ, which serves every calibrator, and
            ``"moving_average"`` for QAT, where early batches should be forgotten. ``"minmax"`` is the cheapest.
        overrides: layers that are quantized in another way, by name: a :class:`~lq.LayerSpec`, or None for a module
            that stays in float. The name of a module stands for everything in it, its parts may be globs
            (``"layer*.*.conv1"``), and the most specific name decides.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: where an argument is not one of its choices, or the model is prepared already.
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
    if target == AUTO_TARGET:
        _log.info("lq: target %r: %s", resolved.name, native_target()[1])
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
            f"this {type(model).__name__} is prepared already; call lq.unprepare(model) first to prepare it again"
        )

    args, kwargs = example_arguments(example_inputs)
    inputs, settings = signature_of(model, model.__dict__.get("forward")).bind(
        args, {**kwargs, **(example_kwargs or {})}
    )
    scheme = Scheme(resolved, Overrides.of(overrides))
    with evaluating(model):
        captured = capture_faithfully(model, inputs, settings)
        if captured.registered:
            _check_registered(model, captured, inputs, settings)
        analysis = analyze_graph(captured, model, inputs, scheme)
    paths = [path for path, _ in model.named_modules() if path]
    scheme.overrides.check([*paths, *(site(node) for node in analysis.graph.nodes)])
    placement = analysis.placement
    if not placement.chains:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in placement.float_layers.items())
        raise NothingToQuantizeError(
            f"nothing to quantize in {type(model).__name__}: its forward runs no convolution or linear layer that an "
            f"INT8 kernel exists for{reasons}"
        )
    forward = PreparedForward(model, captured, scheme, mode, observer, inputs, settings)
    tree = QuantizerTree()
    _put_on_activations(forward, tree, analysis)
    _put_on_weights(forward, tree, analysis)
    for module in tree.modules():
        module.train(model.training)
    follow(model)
    model.add_module(QUANTIZERS, tree)
    model.forward = forward
    _check_training(model, inputs, settings)
    if mode == "qat":
        set_state(model, QuantizerState.OBSERVE | QuantizerState.FAKE_QUANTIZE)
    return model


def _put_on_activations(forward: PreparedForward, tree: QuantizerTree, analysis: GraphAnalysis) -> None:
    """A quantizer for each tensor that the target quantizes, and a watching one for those of other targets."""
    scheme, placement = forward.scheme(), analysis.placement
    device = next((p.device for p in forward.module.parameters()), torch.device("cpu"))
    everywhere = {
        node
        for variant in _variants(scheme, forward.mode)
        for node in place(analysis.captured, analysis.values, variant).activations
    }
    everywhere |= {chain.end for chain in placement.chains if is_result(chain.end)}
    for node in analysis.graph.nodes:
        if node in everywhere:
            names = placement.names_of(node)
            quantizer = activation_quantizer(
                scheme.activation(*names),
                forward.observer,
                rounds=node in placement.activations,
                own_calibrator=scheme.calibrator(*names),
            ).to(device)
            tree[site(node)] = quantizer
            forward.quantize_tensor(node, quantizer)


def _put_on_weights(forward: PreparedForward, tree: QuantizerTree, analysis: GraphAnalysis) -> None:
    scheme = forward.scheme()
    for chain in analysis.placement.chains:
        weight = chain.op.weight
        if chain.weight_key not in list(tree.keys()):
            spec, range = scheme.weight(chain.name), scheme.weight_range(chain.name)
            tree[chain.weight_key] = weight_quantizer(spec, analysis.values[weight], range)
            if weight.op == "get_attr":
                forward.weights[chain.weight_key] = str(weight.target)
        quantizer = tree[chain.weight_key]
        assert isinstance(quantizer, WeightQuantizer)
        forward.quantize_weight(chain.op.node, quantizer)


def _check_training(model: nn.Module, inputs: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse a prepared model that, with its quantizers off, trains differently from the float model."""
    mismatch = training_differences(model, partial(unprepared, model), inputs, settings)
    if mismatch is not None:
        name = type(unprepare(model)).__name__
        raise CaptureError(
            f"prepared, {name} does not train as it did: {mismatch}. Name a part of the model that does not depend on "
            f"how it is called, or report this with the forward's code"
        )


def _check_registered(
    model: nn.Module, captured: CapturedGraph, inputs: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    """Refuse a registered function that does not compute what its layer does."""
    mismatch = disagreement(captured, model, inputs, settings, tolerance=_REGISTERED_TOLERANCE, as_registered=False)
    if mismatch is not None:
        raise ValueError(
            f"with the functions registered for {', '.join(sorted(captured.registered))} the model computes "
            f"something else ({mismatch}): lq.register_layer(cls, forward) needs a forward that computes what the "
            f"class's own does in evaluation mode"
        )


def _variants(scheme: Scheme, mode: Mode) -> Iterator[Scheme]:
    """The scheme, and those that other targets may be converted with."""
    for residual in get_args(Residual):
        yield replace(scheme, target=replace(scheme.target, residual=residual))
        if mode == "ptq":  # in training, each tensor more that is watched is time at every step
            yield replace(scheme, target=replace(scheme.target, residual=residual, integer_batch_norms=True))
            # Without kernels of concatenations, what batch norms read is rounded part by part.
            normalized = replace(scheme.target, residual=residual, operators=(), integer_batch_norms=True)
            yield replace(scheme, target=normalized)
    if mode == "ptq":
        operators = get_args(Operator)
        yield replace(scheme, target=replace(scheme.target, residual="operands", operators=operators))
        yield replace(scheme, target=replace(XNNPACK, activation=scheme.target.activation))
        # Where an override keeps a concatenation in float, what it joins is rounded on its own.
        separate = tuple(name for name in operators if name != "concat")
        yield replace(scheme, target=replace(scheme.target, residual="operands", operators=separate))


def unprepare(model: M) -> M:
    """Remove everything from ``model`` that :func:`prepare` put on it; the weights stay as they are now.

    Raises:
        ValueError: where ``model`` is not prepared.
    """
    forward = prepared_forward(model)
    unfollow(model)
    _remove(model, forward)
    del model._modules[QUANTIZERS]
    return model


def _remove(model: nn.Module, forward: PreparedForward) -> None:
    del model.forward
    if forward.own is not None:
        model.forward = forward.own


@contextmanager
def unprepared(model: nn.Module) -> Iterator[None]:
    """Inside the context, ``model`` is the float module, at a float module's speed; afterwards prepared as before.

    Raises:
        ValueError: where ``model`` is not prepared.
    """
    forward = prepared_forward(model)
    with without_quantizers(model):
        followed = unfollow(model)
        _remove(model, forward)
        try:
            yield
        finally:
            follow_again(followed)
            follow(model)  # added in the meantime
            model.forward = forward


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """The quantizers of a prepared model by name: a tensor's (``layer1.0.relu``) or a weight's
    (``layer1.0.conv1.weight``).

    Raises:
        ValueError: where ``model`` is not prepared.
    """
    prepared_forward(model)
    tree = model._modules[QUANTIZERS]
    assert isinstance(tree, QuantizerTree)
    return {key: tree[key] for key in tree.keys()}  # noqa: SIM118


def set_state(model: nn.Module, state: QuantizerState) -> None:
    """Set what every quantizer of ``model`` does."""
    for quantizer in quantizers(model).values():
        quantizer.state = state


def freeze(model: nn.Module) -> None:
    """Stop watching activations: their scales and zero points keep their values from now on.

    A weight's scale keeps following the weight, which would be clipped otherwise.
    """
    for quantizer in quantizers(model).values():
        if not isinstance(quantizer, WeightQuantizer):
            quantizer.state &= ~QuantizerState.OBSERVE


def refresh_weights(model: nn.Module) -> None:
    """Update the ranges of the layers' weights, as the next forward would: an optimizer step changed the weights."""
    forward = prepared_forward(model)
    for key, quantizer in quantizers(model).items():
        weight = forward.weight(key)
        if weight is not None and isinstance(quantizer, WeightQuantizer):
            quantizer.refresh(weight)


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
    """Inside the context, the float model: every quantizer is off, and its state is restored on exit."""
    states = {quantizer: quantizer.state for quantizer in quantizers(model).values()}
    try:
        for quantizer in states:
            quantizer.state = QuantizerState.OFF
        yield
    finally:
        for quantizer, state in states.items():
            quantizer.state = state
