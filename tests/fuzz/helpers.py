"""What the programs use beside torch: layers, hooks and autograd functions as people write them."""

HELPERS: dict[str, str] = {
    "RoundStraightThrough": """\
class RoundStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.round(x * 8) / 8

    @staticmethod
    def backward(ctx, gradient):
        return gradient
""",
    "ReverseGradient": """\
class ReverseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient
""",
    "CheckedBatchNorm2d": """\
class CheckedBatchNorm2d(nn.BatchNorm2d):
    def forward(self, x):
        assert x.dim() == 4, f"expected 4 axes, got {x.dim()}"
        return super().forward(x)
""",
    "BatchNormAct2d": """\
class BatchNormAct2d(nn.BatchNorm2d):
    def forward(self, x):
        if x.ndim != 4:
            raise ValueError("expected 4 axes")
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return F.relu(x)
""",
    "FunctionalBatchNorm": """\
class FunctionalBatchNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        mean, var = self.running_mean, self.running_var
        return F.batch_norm(x, mean, var, self.weight, self.bias, self.training, momentum=0.3)
""",
    "StandardizedConv2d": """\
class StandardizedConv2d(nn.Conv2d):
    def forward(self, x):
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        weight = (self.weight - mean) / (self.weight.std((1, 2, 3), keepdim=True) + 0.1)
        return F.conv2d(x, weight * 0.3, self.bias, self.stride, self.padding, self.dilation, self.groups)
""",
    "SameConv2d": """\
class SameConv2d(nn.Conv2d):
    def forward(self, x):
        sides = []
        for size, kernel, stride in zip(reversed(x.shape[-2:]), reversed(self.kernel_size), reversed(self.stride)):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            sides += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, sides), self.weight, self.bias, self.stride)
""",
    "BiasFromInput": """\
class BiasFromInput(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, channels, 3, 3))

    def forward(self, x):
        return F.conv2d(x, self.weight, x.mean((0, 2, 3)), padding=1)
""",
    "Scaled": """\
class Scaled(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels))

    def forward(self, x):
        return x * self.gamma.view(1, -1, 1, 1)
""",
    "LastUpdates": """\
class LastUpdates(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.register_buffer("average", torch.zeros(channels))

    def forward(self, x):
        if self.training:
            self.average.mul_(0.9).add_(x.detach().mean((0, 2, 3)), alpha=0.1)
        return x - self.average.view(1, -1, 1, 1)
""",
    "Reassigned": """\
class Reassigned(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.register_buffer("average", torch.zeros(channels))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        if self.training:
            self.average = 0.9 * self.average + 0.1 * x.detach().mean((0, 2, 3))
            self.calls = self.calls + 1
        return x - self.average.view(1, -1, 1, 1)
""",
    "doubled": """\
def doubled(module, inputs, output):
    return output * 2
""",
    "doubled_in_place": """\
def doubled_in_place(module, inputs, output):
    output.mul_(2)
""",
    "shifted_input": """\
def shifted_input(module, inputs):
    return (inputs[0] + 0.5,)
""",
    "remember": """\
def remember(module, inputs, output):
    module.feature = output
""",
    "remember_input": """\
def remember_input(module, inputs):
    module.seen = inputs[0]
""",
    "drop_path": """\
def drop_path(x, p, training):
    if not training:
        return x
    keep = (torch.rand(x.shape[0], *[1] * (x.dim() - 1)) > p).to(x.dtype)
    return x * keep / (1 - p)
""",
}
