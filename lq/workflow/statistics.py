"""Statistics in their own files, apart from the weights: calibrate on one machine, quantize on another."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from lq.numerics.calibrators import Calibrator, get_calibrator
from lq.util.archives import checked_members
from lq.util.files import ensure_writable_dir, write_atomically
from lq.workflow.prepare import activation_quantizers, simulate

M = TypeVar("M", bound=nn.Module)

#: What the statistics of one quantizer unpack to at most (a histogram, and the ranges of ten thousand batches), the
#: header, and how much smaller still more ranges get: what unpacks to more than all of them is no file of statistics.
_QUANTIZER_BYTES = 64 * 1024 + 10_000 * 8
_HEADER_BYTES = 1 << 20
_COMPRESSION = 20

#: Names the format, so that another .npz file is not taken for one of these.
_FORMAT = "lq statistics 1"


def save_statistics(model: nn.Module, path: str | Path) -> None:
    """Write what calibration collected of each activation, and the calibrators in use, to one ``.npz`` file.

    The file holds arrays and JSON, no pickles and no weights. A weight's range is not in it: it follows from the
    weight.

    Args:
        model: a calibrated module.
        path: of the file; replaced as a whole where it exists.

    Raises:
        ValueError: where ``model`` is not prepared, or has no statistics.
        OSError: where ``path`` cannot be written.
    """
    path = Path(path)
    quantizers = activation_quantizers(model)
    arrays: dict[str, np.ndarray] = {}
    for name, quantizer in quantizers.items():
        low, high = quantizer.observer.range()
        if not quantizer.calibrated or low > high:
            raise ValueError(f"{name!r} holds no statistics; call lq.calibrate(model, batches) first")
        for key, value in quantizer.observer.state_dict().items():
            arrays[f"{name}/{key}"] = value.cpu().numpy()
    header = {
        "format": _FORMAT,
        "model": type(model).__name__,
        "quantizers": {
            name: {"observer": type(q.observer).__name__, "calibrator": str(q.calibrator)}
            for name, q in quantizers.items()
        },
    }
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    ensure_writable_dir(path.parent, "path")

    def write(beside: Path) -> None:
        with beside.open("wb") as file:  # given a path, numpy would append .npz to its name
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    write_atomically(path, write)


def load_statistics(model: M, path: str | Path, calibrator: str | Calibrator | None = None) -> M:
    """Give a prepared model statistics that :func:`save_statistics` wrote; afterwards it simulates INT8.

    Args:
        model: a prepared module with the same quantizers as the one that was calibrated.
        path: of the file.
        calibrator: takes the ranges from the statistics; by default the calibrators they were saved with.

    Returns:
        ``model`` itself.

    Raises:
        FileNotFoundError: where there is no file.
        ValueError: where ``model`` is not prepared, the file holds no statistics or is damaged, or it is of another
            model: then with the names that differ. The model is left as it was.
    """
    quantizers = activation_quantizers(model)
    model_name, saved, arrays = _read(Path(path), len(quantizers))
    missing, unknown = [n for n in quantizers if n not in saved], [n for n in saved if n not in quantizers]
    if missing or unknown:
        raise ValueError(
            f"path={str(path)!r} holds the statistics of another model ({model_name}): {len(missing)} quantizers "
            f"of this {type(model).__name__} are not in the file{_some(missing)}, {len(unknown)} of the file's are not "
            f"in the model{_some(unknown)}"
        )
    for name, quantizer in quantizers.items():
        observer_name, _ = saved[name]
        if type(quantizer.observer).__name__ != observer_name:
            raise ValueError(
                f"path={str(path)!r}: {name!r} was watched by a {observer_name} and has a "
                f"{type(quantizer.observer).__name__} here; prepare the model with the observer it was calibrated with"
            )
    loaded = {}
    for name, quantizer in quantizers.items():
        observer = copy.deepcopy(quantizer.observer)
        try:
            observer.load_state_dict(arrays[name])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"path={str(path)!r} is damaged at {name!r}: {error}") from error
        _, calibrator_name = saved[name]
        chosen = get_calibrator(calibrator or calibrator_name)
        loaded[quantizer] = observer, chosen, chosen(observer, quantizer.spec)
    for quantizer, (observer, chosen, new_range) in loaded.items():
        quantizer.observer = observer
        quantizer.calibrator = chosen
        quantizer.set_range(*new_range)
    simulate(model)
    return model


def _read(path: Path, count: int) -> tuple[str, dict[str, tuple[str, str]], dict[str, dict[str, Tensor]]]:
    """The model's class, and by quantizer the names of observer and calibrator, and the observer's state."""
    if not path.is_file():
        raise FileNotFoundError(f"path={str(path)!r}: no such file")
    tensors: dict[str, dict[str, Tensor]] = {}
    try:
        # numpy does not close a file that it opened and found damaged.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            largest = count * _QUANTIZER_BYTES + _HEADER_BYTES + _COMPRESSION * path.stat().st_size
            checked_members(arrays.zip, max_bytes=largest)
            header = json.loads(arrays["header"].tobytes())
            if header["format"] != _FORMAT:
                raise ValueError(f"its format is {header['format']!r}, not {_FORMAT!r}")
            names = {name: (q["observer"], q["calibrator"]) for name, q in header["quantizers"].items()}
            model_name = header["model"]
            for key in arrays.files:
                name, _, buffer = key.rpartition("/")
                if name:
                    tensors.setdefault(name, {})[buffer] = torch.from_numpy(arrays[key])
    except Exception as error:
        raise ValueError(
            f"path={str(path)!r} holds no statistics written by lq.save_statistics, or is damaged: {error}"
        ) from error
    return model_name, names, tensors


def _some(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:5]))
    return f" ({shown}{', ...' if len(names) > 5 else ''})" if names else ""
