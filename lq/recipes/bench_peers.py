"""INT8 latency against the peers, by engine: torch.ao FX, torchao PT2E, ONNX Runtime's, OpenVINO's, ExecuTorch's.

python -m lq.recipes.bench_peers                                          every row: one to two hours
python -m lq.recipes.bench_peers rows=[resnet18_32_b1] peers=[ort_static,nncf]

Each row is called in three ways: back to back, and after a sleep of 20 ms, as a server that waits for requests is (then
an engine has to wake its threads up), without and with OMP_WAIT_POLICY=passive. Without it, an OpenMP thread that
waits for a woken one spins, often on the very core that the woken one was given: on two cores half of the calls that
follow a sleep take 10 ms longer, in every engine that is built on torch, so that a median is a toss of a coin. Below
the table of a row stands lq against the peer on the same engine.

Two threads on two cores of an AMD EPYC (Zen 3: AVX2, no VNNI), PyTorch 2.15, OpenVINO 2026.4, ONNX Runtime 1.31, two
runs, back to back; best runtime of lq against the best peer, ms: resnet18 32x32 batch 1 0.59 / 0.76; and, before lq
cropped kernels, batch 128 26.9 / 27.4, 224x224 batch 1 13.6 / 13.7, resnet50 224x224 batch 1 29.9 / 30.1, batch 32
923 / 930.

The networks have random weights and are calibrated on random images: speed does not depend on the weights. Every
contender lives in a process of its own, and the processes take turns. Peers need their packages
(pip install 'lightning-quantization[peers]'); those that are not installed are named and left out.
"""

from __future__ import annotations

import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import lq
from lq.deployment.formats import RUNTIMES, best_format
from lq.errors import CompilerError, ConfigError, ContenderError
from lq.recipes.blocks.config import field, main
from lq.timing.race import Measurement, race
from lq.util.cpu import cpu_name, has_vnni

#: A row is a network of torchvision, an image size and a batch size.
ROW = re.compile(r"(?P<network>\w+)_(?P<size>\d+)_b(?P<batch>\d+)")

#: Those that are measured by default.
DEFAULT_ROWS = [
    "resnet18_32_b1",
    "resnet18_32_b128",
    "resnet18_224_b1",
    "resnet50_224_b1",
    "mobilenet_v2_224_b1",
    "efficientnet_b0_224_b1",
    "densenet121_224_b1",
    "shufflenet_v2_x1_0_224_b1",
]

#: Ways of calling: seconds of sleep before each call, and variables of its environment.
WAYS: dict[str, tuple[float, dict[str, str]]] = {
    "back to back": (0.0, {}),
    "after 20 ms": (0.02, {}),
    "after 20 ms, passive": (0.02, {"OMP_WAIT_POLICY": "passive"}),
}

FLOAT = "float eager"
FLOAT_EXECUTORCH = "ExecuTorch, float"

#: lq and its peer on each engine.
ENGINES = {
    "in process": ("lq, torch", "torch.ao FX"),
    "AOTInductor": ("lq, aoti", "torchao PT2E, AOTInductor"),
    "ONNX Runtime": ("lq, onnxruntime", "ONNX Runtime, quantize_static"),
    "OpenVINO": ("lq, openvino", "OpenVINO, NNCF"),
    "ExecuTorch": ("lq, executorch", "ExecuTorch, XNNPACKQuantizer"),
}

Model = Callable[[Tensor], Any]


def float_network(name: str) -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of networks that are slow to initialize
        network: nn.Module = torchvision.models.get_model(name, num_classes=10)
    return network.eval()


def images(size: int, count: int) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


# Peers, each made from scratch in its process


def torch_ao_fx(name: str, size: int, engine: str, script: bool) -> Model:
    """torch.ao's FX mode, run as an FX graph or as TorchScript."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    warnings.simplefilter("ignore")
    torch.backends.quantized.engine = engine
    x = images(size, 8)
    prepared = prepare_fx(float_network(name), get_default_qconfig_mapping(engine), example_inputs=(x,))
    prepared(x)
    return _scripted(convert_fx(prepared), x) if script else convert_fx(prepared)  # type: ignore[no-any-return]


def torch_ao_eager(name: str, size: int, engine: str, script: bool) -> Model:
    """torch.ao's eager mode, on torchvision's networks written for it."""
    import torch.ao.quantization as ao

    warnings.simplefilter("ignore")
    torch.backends.quantized.engine = engine
    x = images(size, 8)
    network = getattr(torchvision.models.quantization, name)(num_classes=10).eval()
    network.fuse_model()
    network.qconfig = ao.get_default_qconfig(engine)
    ao.prepare(network, inplace=True)
    network(x)
    ao.convert(network, inplace=True)
    return _scripted(network, x) if script else network  # type: ignore[no-any-return]


def _scripted(network: nn.Module, x: Tensor) -> Model:
    with torch.no_grad():
        scripted = torch.jit.trace(network, x[:1])
        return torch.jit.freeze(scripted.eval())  # type: ignore[no-any-return]


def torchao_pt2e(name: str, size: int, batch_size: int, ahead_of_time: bool) -> Model:
    """torchao's PT2E flow with X86InductorQuantizer, compiled by Inductor, just in time or ahead of time."""
    from torch._inductor import aoti_compile_and_package, aoti_load_package
    from torch._inductor import config as inductor_config
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    x = images(size, batch_size)
    with torch.no_grad():
        # In non-strict mode, this quantizer fails on torchvision's residual networks.
        exported = torch.export.export(float_network(name), (x,), strict=True).module()
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(exported, quantizer)
        prepared(x)
        converted = convert_pt2e(prepared)
        inductor_config.freezing = True
        if not ahead_of_time:
            return torch.compile(converted)
        folder = tempfile.mkdtemp()
        path = aoti_compile_and_package(torch.export.export(converted, (x,)), package_path=f"{folder}/model.pt2")
        return aoti_load_package(path)


def ort_static(name: str, size: int, threads: int) -> Model:
    """ONNX Runtime's ``quantize_static`` on a float ONNX export, Q/DQ format, weights per channel."""
    from onnxruntime import quantization as ortq

    class Reader(ortq.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._batches = iter([{"x": images(size, 8).numpy()}])

        def get_next(self) -> Any:
            return next(self._batches, None)

    with tempfile.TemporaryDirectory() as folder:
        _float_onnx(name, size, f"{folder}/float.onnx")
        ortq.quant_pre_process(f"{folder}/float.onnx", f"{folder}/prepared.onnx", skip_symbolic_shape=True)
        ortq.quantize_static(
            f"{folder}/prepared.onnx",
            f"{folder}/int8.onnx",
            Reader(),
            quant_format=ortq.QuantFormat.QDQ,
            per_channel=True,
            reduce_range=not has_vnni(),
            activation_type=ortq.QuantType.QUInt8,
            weight_type=ortq.QuantType.QInt8,
        )
        return lq.load(f"{folder}/int8.onnx", "onnxruntime", threads=threads)


def nncf(name: str, size: int, threads: int) -> Model:
    """OpenVINO's quantizer NNCF on a float ONNX export, run by OpenVINO."""
    import nncf
    import openvino as ov

    with tempfile.TemporaryDirectory() as folder:
        _float_onnx(name, size, f"{folder}/float.onnx")
        core = ov.Core()
        x = images(size, 8)
        quantized = nncf.quantize(core.read_model(f"{folder}/float.onnx"), nncf.Dataset([x.numpy()]))
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    requests: dict[tuple[int, ...], Any] = {}

    def infer(x: Tensor) -> Tensor:
        if tuple(x.shape) not in requests:
            quantized.reshape(list(x.shape))
            requests[tuple(x.shape)] = core.compile_model(quantized, "CPU", settings).create_infer_request()
        return torch.from_numpy(requests[tuple(x.shape)].infer([x.numpy()], share_inputs=True).to_tuple()[0])

    return infer


def executorch_xnnpack(name: str, size: int, batch_size: int, threads: int, quantized: bool) -> Model:
    """ExecuTorch with XNNPACK: the float network, or what its own ``XNNPACKQuantizer`` makes of it."""
    import executorch.extension.pybindings.portable_lib as pybindings
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as xnnpack
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    x = images(size, batch_size)
    with torch.no_grad():
        network: nn.Module = torch.export.export(float_network(name), (x,), strict=True).module()
        if quantized:
            quantizer = xnnpack.XNNPACKQuantizer()
            quantizer.set_global(xnnpack.get_symmetric_quantization_config(is_per_channel=True))
            network = prepare_pt2e(network, quantizer)
            network(images(size, 8)[:batch_size])
            network = convert_pt2e(network)
        exported = torch.export.export(network, (x,), strict=True)
    program = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch()
    pybindings._unsafe_reset_threadpool(threads)
    loaded = Runtime.get().load_program(bytes(program.buffer))
    # The method reads the program's bytes, which only the program keeps.
    return lambda x: loaded.load_method("forward").execute([x])[0]


def _float_onnx(name: str, size: int, path: str) -> None:
    warnings.simplefilter("ignore")
    batch = torch.export.Dim("batch")
    torch.onnx.export(
        float_network(name),
        (images(size, 2),),
        path,
        dynamo=True,
        input_names=["x"],
        dynamic_shapes=({0: batch},),
        verbose=False,
        external_data=False,
    )


PEERS = (
    "torch_ao_eager",
    "torch_ao_fx",
    "torch_ao_eager_script",
    "torch_ao_fx_script",
    "pt2e_inductor",
    "pt2e_aoti",
    "ort_static",
    "nncf",
    "executorch",
    "executorch_float",
)

#: One for each engine of lq; the others are slower, or use the deprecated TorchScript.
DEFAULT_PEERS = ("torch_ao_fx", "pt2e_aoti", "ort_static", "nncf", "executorch", "executorch_float")


@dataclass
class Config:
    """lq against its peers."""

    rows: list[str] = field(DEFAULT_ROWS, help="NETWORK_SIZE_bBATCH, the network one of torchvision's")
    peers: list[str] = field(list(DEFAULT_PEERS), help=f"of {', '.join(PEERS)}")
    ways: list[str] = field(list(WAYS), help=f"of calling: {', '.join(map(repr, WAYS))}")
    threads: int = field(2, help="CPU threads")
    seconds: float = field(4.0, help="about how long to time each contender")


def run(config: Config) -> None:
    for peer in config.peers:
        if peer not in PEERS:
            raise ConfigError(f"peers={peer!r} is unknown; choose from {', '.join(PEERS)}")
    for way in config.ways:
        if way not in WAYS:
            raise ConfigError(f"ways={way!r} is unknown; choose from {', '.join(map(repr, WAYS))}")
    if not config.ways:
        raise ConfigError(f"ways=[] leaves nothing to measure; choose from {', '.join(map(repr, WAYS))}")
    for row in config.rows:
        parts = ROW.fullmatch(row)
        if parts is None or parts["network"] not in torchvision.models.list_models(torchvision.models):
            raise ConfigError(
                f"rows={row!r} is not NETWORK_SIZE_bBATCH with a network of torchvision, like {DEFAULT_ROWS[0]}"
            )
    with tempfile.TemporaryDirectory() as folder:
        for row in config.rows:
            _run_row(row, config, Path(folder))


def _run_row(row: str, config: Config, folder: Path) -> None:
    parts = ROW.fullmatch(row)
    assert parts is not None
    name, size, batch_size = parts["network"], int(parts["size"]), int(parts["batch"])
    contenders: dict[str, Callable[[], Model]] = {FLOAT: partial(float_network, name)}
    contenders |= _ours(name, size, config.threads, folder)
    contenders |= _theirs(name, size, batch_size, config)
    measurements: dict[str, dict[str, Measurement]] = {}
    failed: dict[str, ContenderError] = {}
    for way in config.ways:
        sleep, environment = WAYS[way]
        results = race(
            contenders,
            [images(size, batch_size)],
            threads=config.threads,
            seconds=config.seconds,
            sleep=sleep,
            environment=environment,
        )
        measurements[way] = {label: result for label, result in results.items() if isinstance(result, Measurement)}
        failed |= {label: result for label, result in results.items() if isinstance(result, ContenderError)}
    console = Console(width=120)
    console.print(_table(row, measurements, config.threads))
    console.print(_by_engine(measurements))
    for contender, error in failed.items():
        print(f"{contender} did not run: {str(error).strip().splitlines()[-1]}")


def _ours(name: str, size: int, threads: int, folder: Path) -> dict[str, Callable[[], Model]]:
    """One network with one set of scales, on every runtime of lq that is installed."""
    network = float_network(name)
    x = images(size, 8)
    lq.prepare(network, x[:2], target="auto")
    lq.calibrate(network, [x])
    contenders: dict[str, Callable[[], Model]] = {}
    for runtime in RUNTIMES:
        format = best_format(runtime)
        path = folder / f"{name}_{size}_{format.file}"
        try:
            if not path.exists():
                lq.export(network, path, format=format.name, verify=False)
            lq.load(path, runtime)
        except (lq.MissingRuntimeError, CompilerError, ValueError) as error:
            print(f"lq, {runtime} is left out: {error}")
            continue
        contenders[f"lq, {runtime}"] = partial(lq.load, path, runtime, threads=threads)
    return contenders


def _theirs(name: str, size: int, batch_size: int, config: Config) -> dict[str, Callable[[], Model]]:
    makers: dict[str, dict[str, Callable[[], Model]]] = {
        "torch_ao_eager": {"torch.ao eager mode": partial(torch_ao_eager, name, size, "x86", False)},
        "torch_ao_fx": {"torch.ao FX": partial(torch_ao_fx, name, size, "x86", False)},
        "torch_ao_eager_script": {
            "torch.ao eager mode, TorchScript": partial(torch_ao_eager, name, size, "fbgemm", True)
        },
        "torch_ao_fx_script": {
            f"torch.ao FX, TorchScript, {engine}": partial(torch_ao_fx, name, size, engine, True)
            for engine in ("x86", "fbgemm")
        },
        "pt2e_inductor": {"torchao PT2E, Inductor": partial(torchao_pt2e, name, size, batch_size, False)},
        "pt2e_aoti": {"torchao PT2E, AOTInductor": partial(torchao_pt2e, name, size, batch_size, True)},
        "ort_static": {"ONNX Runtime, quantize_static": partial(ort_static, name, size, config.threads)},
        "nncf": {"OpenVINO, NNCF": partial(nncf, name, size, config.threads)},
        "executorch": {
            "ExecuTorch, XNNPACKQuantizer": partial(executorch_xnnpack, name, size, batch_size, config.threads, True)
        },
        "executorch_float": {
            FLOAT_EXECUTORCH: partial(executorch_xnnpack, name, size, batch_size, config.threads, False)
        },
    }
    if not hasattr(torchvision.models.quantization, name):  # eager mode needs networks that were written for it
        makers |= {"torch_ao_eager": {}, "torch_ao_eager_script": {}}
    return {label: make for peer in config.peers for label, make in makers[peer].items()}


def _table(row: str, measurements: Mapping[str, Mapping[str, Measurement]], threads: int) -> Table:
    """The contenders, fastest first, for each way of calling."""
    parts = ROW.fullmatch(row)
    assert parts is not None
    name, size, batch_size = parts["network"], int(parts["size"]), int(parts["batch"])
    table = Table(title=f"{name}, {size}x{size}, batch {batch_size}, {threads} threads, {cpu_name()}")
    table.add_column("contender")
    for way in measurements:
        table.add_column(f"p50 (p95) ms, {way}", justify="right")
        table.add_column("against float", justify="right")
    table.add_column("memory MB", justify="right")
    first = next(iter(measurements.values()))
    for label, result in sorted(first.items(), key=lambda item: item[1].timing.p50_ms):
        cells: list[str] = []
        for measured in measurements.values():
            if label not in measured:
                cells += ["", ""]
                continue
            timing = measured[label].timing
            ratio = f"{measured[FLOAT].timing.p50_ms / timing.p50_ms:.2f}×" if FLOAT in measured else ""
            cells += [f"{timing.p50_ms:.3g} ({timing.p95_ms:.3g})", ratio]
        style = "bold" if label.startswith("lq,") else ""
        table.add_row(label, *cells, f"{result.memory_bytes / 1e6:.0f}", style=style)
    return table


def _by_engine(measurements: Mapping[str, Mapping[str, Measurement]]) -> Table:
    """lq against the peer on the same engine, and the best of lq against the best of the peers: medians, ms."""
    table = Table(title="on the same engine, p50 ms: lq / peer")
    table.add_column("engine")
    table.add_column("peer")
    for way in measurements:
        table.add_column(way, justify="right")
    for engine, (ours, theirs) in ENGINES.items():
        cells = [_against(measured.get(ours), measured.get(theirs)) for measured in measurements.values()]
        if any(cells):
            table.add_row(engine, theirs, *cells)
    cells = []
    for measured in measurements.values():
        mine = [result for label, result in measured.items() if label.startswith("lq,")]
        others = [
            result
            for label, result in measured.items()
            if label not in (FLOAT, FLOAT_EXECUTORCH) and not label.startswith("lq,")
        ]
        cells.append(_against(*(min(each, key=_p50) if each else None for each in (mine, others))))
    table.add_row("the best", "the best", *cells, style="bold")
    return table


def _against(ours: Measurement | None, theirs: Measurement | None) -> str:
    if ours is None or theirs is None:
        return ""
    return f"{_p50(ours):.3g} / {_p50(theirs):.3g} = {_p50(ours) / _p50(theirs):.2f}"


def _p50(result: Measurement) -> float:
    return result.timing.p50_ms


def plan(config: Config) -> str:
    return (
        f"time {', '.join(config.rows)} on {config.threads} threads with lq and {', '.join(config.peers) or 'no peers'}"
    )


if __name__ == "__main__":
    main(Config, run, plan, description=__doc__ or "")
