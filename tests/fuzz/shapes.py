"""What moves, selects and pools values: views, concatenation, pads, pools, resizing."""

from __future__ import annotations

from .program import Step
from .scope import Scope, Table

SHAPES = Table()

SHAPES.simple(
    "mean", 2, "{out} = {0}.mean((2, 3))", "{out} = {0}.mean([-2, -1])",
    "{out} = torch.mean({0}, dim=(2, 3), keepdim=True)",
    "{out} = {0}.mean(-1).mean(-1)", "{out} = {0}.amax((2, 3))", "{out} = {0}.mean(1, keepdim=True)", rank=4,
)  # fmt: skip
SHAPES.simple(
    "flatten", 2, "{out} = {0}.flatten(1)", "{out} = torch.flatten({0}, 1)", "{out} = {layer}({0})",
    "{out} = {0}.reshape({0}.size(0), -1)", "{out} = {0}.contiguous().view({0}.shape[0], -1)",
    "{out} = {0}.flatten(start_dim=1)", layers=("", "", "nn.Flatten()", "", "", ""), rank=4,
)  # fmt: skip
SHAPES.simple("tokens", 1.5, "{out} = {0}.flatten(2).transpose(1, 2)", "{out} = {0}.flatten(2)", rank=4)
SHAPES.simple(
    "transpose", 1.5, "{out} = {0}.transpose(2, 3)", "{out} = {0}.permute(0, 1, 3, 2)",
    "{out} = {0}.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)",
    "{out} = {0}.transpose(1, 2).contiguous()", rank=4,
)  # fmt: skip
SHAPES.simple("swap", 1, "{out} = {0}.transpose(1, 2)", "{out} = {0}.unsqueeze(2)", "{out} = {0}[..., None]", rank=3)
SHAPES.simple("to image", 2, "{out} = {0}[:, :, None, None]", "{out} = {0}.unsqueeze(-1).unsqueeze(-1)", rank=2)
SHAPES.simple(
    "there and back", 1, "{out} = {0}.unsqueeze(1).squeeze(1)", "{out} = {0}.unflatten(0, (-1, 1)).flatten(0, 1)"
)
SHAPES.simple("from volume", 3, "{out} = {0}.mean(2)", "{out} = {0}.flatten(1, 2)", "{out} = {layer}({0}).flatten(1)",
              layers=("", "", "nn.AdaptiveAvgPool3d(1)"), rank=5)  # fmt: skip
SHAPES.simple(
    "global pool", 3, "{out} = {layer}({0})", "{out} = F.adaptive_avg_pool2d({0}, 1)", "{out} = {layer}({0})",
    "{out} = F.adaptive_avg_pool2d({0}, (2, 2))", "{out} = F.adaptive_max_pool2d({0}, 1)", "{out} = {layer}({0})",
    layers=("nn.AdaptiveAvgPool2d(1)", "", "nn.AdaptiveAvgPool2d((1, 1))", "", "", "nn.AdaptiveMaxPool2d(1)"), rank=4,
)  # fmt: skip
SHAPES.simple(
    "pad", 2, "{out} = F.pad({0}, (1, 1, 1, 1))", "{out} = F.pad({0}, (0, 1, 0, 1), value=0.5)", "{out} = {layer}({0})",
    "{out} = F.pad({0}, (1, 1, 1, 1), mode='reflect')", "{out} = {layer}({0})",
    "{out} = F.pad({0}, [0, 0, 0, 0, 1, 1])",
    layers=("", "", "nn.ZeroPad2d(1)", "", "nn.ReflectionPad2d(1)", ""), rank=4,
)  # fmt: skip


@SHAPES.add(4)
def pool2d(scope: Scope) -> Step | None:
    x = scope.image(3)
    if x is None:
        return None
    kernel = scope.choice(2, 3, 3)
    options = dict(scope.options(stride=[1, 2], padding=1, ceil_mode=True))
    kind = scope.choice("max", "max", "avg")
    if kind == "max":
        options |= dict(scope.options(dilation=2))
    else:
        options |= dict(scope.options(count_include_pad=False))
    settings = tuple(options.items())
    if scope.chance(0.5):
        return Step(f"{kind}_pool2d", (x,), f"{{out}} = F.{kind}_pool2d({{0}}, {kernel}{{options}})", options=settings)
    layer = f"nn.{kind.capitalize()}Pool2d({kernel}{{options}})"
    return Step(f"{kind}_pool2d", (x,), "{out} = {pool}({0})", (("pool", layer),), options=settings)


@SHAPES.add(1)
def pool1d(scope: Scope) -> Step | None:
    x = scope.pick(lambda shape: len(shape) == 3 and shape[2] >= 4)
    if x is None:
        return None
    code = scope.choice(
        "{out} = F.max_pool1d({0}, 2)", "{out} = F.avg_pool1d({0}, 2)", "{out} = F.adaptive_avg_pool1d({0}, 2)"
    )
    return Step("pool1d", (x,), code)


@SHAPES.add(1)
def interpolate(scope: Scope) -> Step | None:
    x = scope.pick(lambda shape: len(shape) == 4 and max(shape[2:]) <= 10)
    if x is None:
        return None
    code = scope.choice(
        "{out} = F.interpolate({0}, scale_factor=2)",
        "{out} = F.interpolate({0}, scale_factor=2.0, mode='bilinear', align_corners=False)",
        "{out} = F.interpolate({0}, size=({0}.shape[2] * 2, {0}.shape[3]), mode='nearest')",
        "{out} = {up}({0})",
    )
    return Step("interpolate", (x,), code, (("up", "nn.Upsample(scale_factor=2)"),) if "{up}" in code else ())


@SHAPES.add(4)
def cat(scope: Scope) -> Step | None:
    x = scope.pick(lambda shape: len(shape) >= 2)
    if x is None:
        return None
    rest = scope.shapes[x][:1] + scope.shapes[x][2:]
    fitting = [i for i, shape in enumerate(scope.shapes) if shape[:1] + shape[2:] == rest and shape[1] <= 24]
    if not fitting or scope.shapes[x][1] > 24:
        return None
    others = [scope.rng.choice(fitting) for _ in range(scope.choice(1, 1, 2))]
    names = ", ".join(f"{{{index}}}" for index in range(len(others) + 1))
    code = scope.choice(f"{{out}} = torch.cat([{names}], 1)", f"{{out}} = torch.cat(({names}), dim=1)")
    return Step("cat", (x, *others), code)


@SHAPES.add(4)
def split(scope: Scope) -> Step | None:
    """Channels apart and together again."""
    x = scope.pick(lambda shape: len(shape) >= 2 and shape[1] % 2 == 0)
    if x is None:
        return None
    half = scope.shapes[x][1] // 2
    code = scope.choice(
        "a, b = {0}.chunk(2, 1)\n{out} = torch.cat([b, a], 1)",
        "a, b = torch.chunk({0}, 2, dim=1)\n{out} = a * torch.sigmoid(b)",
        f"a, b = torch.split({{0}}, {half}, 1)\n{{out}} = a + b",
        f"a, b = {{0}}.split([{half}, {half}], dim=1)\n{{out}} = torch.cat([F.relu(a), b], 1)",
        "{out} = {0}.chunk(2, 1)[1]",
        f"{{out}} = {{0}}[:, :{half}]",
        f"{{out}} = {{0}}[:, {half}:]",
        "{out} = {0}[:, ::2]",
        f"{{out}} = {{0}}.narrow(1, 0, {half})",
        "a, b = {0}.chunk(2, 1)\nb.relu_()\n{out} = {0} * 1",
    )
    return Step("split", (x,), code)


@SHAPES.add(2)
def convs_of_parts(scope: Scope) -> Step | None:
    """A convolution on a part of the channels, as in ShuffleNet and GhostNet."""
    x = scope.pick(lambda shape: len(shape) == 4 and shape[1] % 2 == 0)
    if x is None:
        return None
    half = scope.shapes[x][1] // 2
    code = scope.choice(
        "a, b = {0}.chunk(2, dim=1)\n{out} = torch.cat((a, {conv}(b)), dim=1)",
        f"{{out}} = torch.cat([{{conv}}({{0}}[:, :{half}]), {{0}}[:, {half}:]], 1)",
        f"a = {{conv}}({{0}}[:, {half}:])\n{{out}} = torch.cat([a, F.relu(a)], 1)",
    )
    return Step("conv of a part", (x,), code, (("conv", f"nn.Conv2d({half}, {half}, 3, padding=1)"),))


@SHAPES.add(2)
def shuffle(scope: Scope) -> Step | None:
    x = scope.pick(lambda shape: len(shape) == 4 and shape[1] % 2 == 0)
    if x is None:
        return None
    half = scope.shapes[x][1] // 2
    code = scope.choice(
        "n, c, h, w = {0}.shape\n{out} = {0}.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)",
        f"n, c, h, w = {{0}}.size()\n{{out}} = {{0}}.reshape(n, {half}, 2, h, w).permute(0, 2, 1, 3, 4).flatten(1, 2)",
        "{out} = F.channel_shuffle({0}, 2)",
        "{out} = torch.stack({0}.chunk(2, 1), 2).flatten(1, 2)",
        "{out} = {0}.roll(1, 1)",
        "{out} = {0}.flip(3)",
    )
    return Step("shuffle", (x,), code)


@SHAPES.add(2)
def crop(scope: Scope) -> Step | None:
    x = scope.image(4)
    if x is None:
        return None
    code = scope.choice(
        "{out} = {0}[:, :, 1:-1, 1:-1]", "{out} = {0}[..., ::2]", "{out} = {0}[:, :, 0]", "{out} = {0}[:, :, :3, :3]",
        "{out} = F.pad({0}, (-1, -1, -1, -1))", "h = {0}.shape[2] // 2\n{out} = {0}[:, :, :h]",
    )  # fmt: skip
    return Step("crop", (x,), code)


@SHAPES.add(1)
def fold_space(scope: Scope) -> Step | None:
    x = scope.pick(lambda shape: len(shape) == 4 and shape[2] % 2 == 0 and shape[3] % 2 == 0 and shape[1] <= 8)
    if x is None:
        return None
    code = scope.choice("{out} = F.pixel_unshuffle({0}, 2)", "{out} = torch.stack([{0}, {0} * 0.5], 1).flatten(1, 2)")
    return Step("fold space", (x,), code)
