"""Convolutions, linear layers, norms and attention."""

from __future__ import annotations

from .program import Step
from .scope import Scope, Table

LAYERS = Table()


def _groups(scope: Scope, channels: int, out: int) -> int:
    return scope.choice(*(n for n in (1, 2, 4, channels) if channels % n == 0 and out % n == 0))  # type: ignore[no-any-return]


def _conv_options(scope: Scope, channels: int, out: int, padding: list[object]) -> tuple[tuple[str, object], ...]:
    options = dict(scope.options(stride=[2, 2, 3], padding=padding, dilation=2, bias=False))
    if scope.chance(0.6):
        options.setdefault("padding", 1)
    if options.get("padding") == "same":
        options.pop("stride", None)
    if scope.chance(0.25):
        options["groups"] = _groups(scope, channels, out)
    if scope.chance(0.1) and isinstance(options.get("padding"), int):
        options["padding_mode"] = scope.choice("reflect", "circular", "replicate")
    return tuple(options.items())


def _width(scope: Scope, channels: int) -> int:
    return scope.choice(4, 6, 8, 8, 12, 16, channels, channels)  # type: ignore[no-any-return]


@LAYERS.add(14)
def conv2d(scope: Scope) -> Step | None:
    x = scope.image()
    if x is None:
        return None
    channels = scope.shapes[x][1]
    out = channels if scope.chance(0.2) else _width(scope, channels)
    kernel = scope.choice(1, 3, 3, 3, 5, (1, 3), (3, 2))
    options = _conv_options(scope, channels, out, [1, 2, "same", "valid", (1, 0)])
    followed = scope.choice("", "", "relu", "bn", "bn_relu", "bn_relu", "bn_relu6")
    layers = [("conv", f"nn.Conv2d({channels}, {out}, {kernel}{{options}})")]
    code = "{out} = {conv}({0})"
    if "bn" in followed:
        layers.append(("bn", f"nn.BatchNorm2d({out})"))
        code = "{out} = {bn}({conv}({0}))"
    if "relu" in followed:
        act = "F.relu6" if "relu6" in followed else scope.choice("F.relu", "torch.relu", "{relu}", "{relu}")
        layers += [("relu*", f"nn.ReLU({scope.choice('', 'inplace=True')})")] if act == "{relu}" else []
        code = code.replace("= ", f"= {act}(") + ")"
    return Step("conv2d", (x,), code, tuple(layers), options=options)


@LAYERS.add(2)
def depthwise(scope: Scope) -> Step | None:
    x = scope.image(3)
    if x is None:
        return None
    channels = scope.shapes[x][1]
    constructor = f"nn.Conv2d({channels}, {channels}, 3, padding=1, groups={channels}{{options}})"
    options = scope.options(stride=2, bias=False)
    return Step("depthwise", (x,), "{out} = {conv}({0})", (("conv", constructor),), options=options)


@LAYERS.add(2)
def custom_conv2d(scope: Scope) -> Step | None:
    x = scope.image(3)
    if x is None:
        return None
    channels = scope.shapes[x][1]
    out = _width(scope, channels)
    name = scope.choice("StandardizedConv2d", "SameConv2d")
    options = scope.options(stride=2, bias=False)
    constructor = f"{name}({channels}, {out}, 3{{options}})"
    return Step(name, (x,), "{out} = {conv}({0})", (("conv", constructor),), options=options)


@LAYERS.add(2)
def functional_conv2d(scope: Scope) -> Step | None:
    x = scope.image(3)
    if x is None:
        return None
    channels = scope.shapes[x][1]
    out = _width(scope, channels)
    layers = [("weight", f"nn.Parameter(torch.randn({out}, {channels}, 3, 3))")]
    bias = scope.choice("", ", {bias}", ", bias={bias}")
    if bias:
        layers.append(("bias", f"nn.Parameter(torch.randn({out}))"))
    options = scope.options(stride=2, padding=[1, "same"])
    if ("padding", "same") in options:
        options = (("padding", "same"),)
    call = scope.choice("F.conv2d", "F.conv2d", "torch.conv2d")
    return Step("F.conv2d", (x,), f"{{out}} = {call}({{0}}, {{weight}}{bias}{{options}})", tuple(layers), "", options)


@LAYERS.add(0.4)
def computed_bias(scope: Scope) -> Step | None:
    x = scope.image(3)
    if x is None:
        return None
    return Step("computed bias", (x,), "{out} = {conv}({0})", (("conv", f"BiasFromInput({scope.shapes[x][1]})"),))


@LAYERS.add(1)
def conv_called_twice(scope: Scope) -> Step | None:
    x = scope.image(3)
    if x is None:
        return None
    channels = scope.shapes[x][1]
    code = scope.choice(
        "{out} = {conv}({conv}({0}))", "{out} = {conv}(F.relu({conv}({0})))", "{out} = {conv}({0}) + {conv}({0} * 0.5)"
    )
    return Step("conv twice", (x,), code, (("conv", f"nn.Conv2d({channels}, {channels}, 3, padding=1)"),))


@LAYERS.add(1)
def conv_transpose2d(scope: Scope) -> Step | None:
    x = scope.pick(lambda shape: len(shape) == 4 and max(shape[2:]) <= 8)
    if x is None:
        return None
    channels = scope.shapes[x][1]
    constructor = f"nn.ConvTranspose2d({channels}, {_width(scope, channels)}, 2, stride=2)"
    return Step("ConvTranspose2d", (x,), "{out} = {conv}({0})", (("conv", constructor),))


@LAYERS.add(2)
def conv1d(scope: Scope) -> Step | None:
    x = scope.pick(lambda shape: len(shape) == 3)
    if x is None:
        return None
    channels = scope.shapes[x][1]
    out = _width(scope, channels)
    options = _conv_options(scope, channels, out, [1, 2, "same"])
    if scope.chance(0.5):
        code, norm = "{out} = F.relu({bn}({conv}({0})))", (("bn", f"nn.BatchNorm1d({out})"),)
    else:
        code, norm = "{out} = {conv}({0})", ()
    layers = (("conv", f"nn.Conv1d({channels}, {out}, 3{{options}})"), *norm)
    return Step("conv1d", (x,), code, layers, options=options)


@LAYERS.add(3)
def conv3d(scope: Scope) -> Step | None:
    x = scope.pick(lambda shape: len(shape) == 5)
    if x is None:
        return None
    channels = scope.shapes[x][1]
    layers = (("conv", f"nn.Conv3d({channels}, 8, 3, padding=1{{options}})"), ("bn", "nn.BatchNorm3d(8)"))
    code = scope.choice("{out} = {conv}({0})", "{out} = F.relu({bn}({conv}({0})))")
    return Step(
        "conv3d", (x,), code, layers if "bn" in code else layers[:1], options=scope.options(stride=2, bias=False)
    )


@LAYERS.add(6)
def linear(scope: Scope) -> Step | None:
    x = scope.pick(lambda shape: len(shape) in (2, 3) and shape[-1] <= 1024)
    if x is None:
        return None
    features, out = scope.shapes[x][-1], scope.choice(4, 8, 10, 16)
    options = scope.options(bias=False)
    code = scope.choice("{out} = {fc}({0})", "{out} = {fc}({0})", "{out} = F.relu({fc}({0}))")
    return Step("linear", (x,), code, (("fc", f"nn.Linear({features}, {out}{{options}})"),), options=options)


@LAYERS.add(1)
def functional_linear(scope: Scope) -> Step | None:
    x = scope.pick(lambda shape: len(shape) in (2, 3) and shape[-1] <= 1024)
    if x is None:
        return None
    features, out = scope.shapes[x][-1], scope.choice(4, 8, 10)
    layers = (("weight", f"nn.Parameter(torch.randn({out}, {features}))"),)
    code = scope.choice(
        "{out} = F.linear({0}, {weight})", "{out} = {0} @ {weight}.t()", "{out} = torch.matmul({0}, {weight}.t())"
    )
    return Step("F.linear", (x,), code, layers)


@LAYERS.add(4)
def batch_norm(scope: Scope) -> Step | None:
    x = scope.pick(lambda shape: len(shape) in (2, 3, 4))
    if x is None:
        return None
    rank, channels = len(scope.shapes[x]), scope.shapes[x][1]
    names = ["nn.BatchNorm2d", "CheckedBatchNorm2d", "BatchNormAct2d", "FunctionalBatchNorm"]
    name = scope.rng.choice(names) if rank == 4 else "nn.BatchNorm1d"
    options = scope.options(affine=False) if name.startswith("nn.") else ()
    return Step(name, (x,), "{out} = {bn}({0})", (("bn", f"{name}({channels}{{options}})"),), options=options)


@LAYERS.add(0.7)
def other_norms(scope: Scope) -> Step | None:
    x = scope.pick(lambda shape: len(shape) in (3, 4))
    if x is None:
        return None
    shape = scope.shapes[x]
    if len(shape) == 3:
        layer = f"nn.LayerNorm({shape[-1]})"
    else:
        layer = scope.choice(
            f"nn.GroupNorm(1, {shape[1]})", f"nn.LayerNorm({list(shape[1:])})", f"nn.InstanceNorm2d({shape[1]})"
        )
    return Step(layer.split("(")[0], (x,), "{out} = {norm}({0})", (("norm", layer),))


@LAYERS.add(0.5)
def attention(scope: Scope) -> Step | None:
    x = scope.pick(lambda shape: len(shape) == 3 and shape[-1] % 2 == 0 and shape[-1] <= 32 and shape[1] <= 64)
    if x is None:
        return None
    width = scope.shapes[x][-1]
    if scope.chance(0.5):
        layer = f"nn.MultiheadAttention({width}, 2, batch_first=True)"
        code = "{out} = {attention}({0}, {0}, {0}, need_weights=False)[0]"
        return Step("MultiheadAttention", (x,), code, (("attention", layer),))
    code = "q, k, w = {qkv}({0}).chunk(3, -1)\n{out} = F.scaled_dot_product_attention(q, k, w)"
    return Step("attention", (x,), code, (("qkv", f"nn.Linear({width}, {3 * width})"),))
