"""Looks through a folder of low-bit weights: what is in it, and whether it is what it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fd_minicpm41.config import MiniCPMConfig
from fd_minicpm41.errors import UsageError
from fd_minicpm41.quantization.formats import LowBitFormat, pack, unpack
from fd_minicpm41.quantization.plan import DEFAULT_ZERO
from fd_minicpm41.quantization.quantise import relative_error
from fd_minicpm41.quantization.rtn import INTEGER_STEPS, POWER_STEPS
from fd_minicpm41.quantization.sidecar import SIDECAR, Sidecar, check_hashes
from fd_minicpm41.quantization.streaming import Progress
from fd_minicpm41.reference.checkpoint import Checkpoint

MADE_AGAIN = "the folder was changed or is damaged; quantise the checkpoint again"
OTHER_SOURCE = "these are not the weights it was made from; give those"


@dataclass
class ModuleReport:
    """What is stored of one module; ``counts`` of each code, ``size`` in bytes."""

    shape: tuple[int, int]
    fmt: LowBitFormat
    size: int
    counts: list[int] = field(default_factory=list)


def open_quantised(folder: str | Path) -> tuple[Checkpoint, Sidecar]:
    """A folder that must have a sidecar, its tensors held against it and against config.json.

    Raises:
        UsageError: none, or what does not fit.
    """
    checkpoint = Checkpoint(folder)
    if checkpoint.sidecar is None:
        raise UsageError(
            f"{folder} has no {SIDECAR}: give a folder that fd-minicpm41 quantize wrote"
        )
    checkpoint.check(MiniCPMConfig.from_pretrained(folder))
    return checkpoint, checkpoint.sidecar


def inspect_modules(
    folder: str | Path, on_progress: Progress | None = None
) -> dict[str, ModuleReport]:
    """Sizes and code counts of every quantised module.

    Raises:
        UsageError: as :func:`open_quantised` does.
    """
    checkpoint, sidecar = open_quantised(folder)
    reports = {}
    for done, (module, fmt) in enumerate(sidecar.modules.items(), start=1):
        files = checkpoint.files
        rows, columns = checkpoint.shapes[f"{module}.weight"]
        size = rows * columns * fmt.bits // 8 + 2 * rows * columns // fmt.group
        if f"{module}.channel_scales" in files.shapes:
            size += 4 * rows
        report = ModuleReport((rows, columns), fmt, size)
        report.counts = count_codes(files.load(f"{module}.qweight").numpy(), fmt.bits)
        reports[module] = report
        if on_progress is not None:
            on_progress(done, len(sidecar.modules))
    return reports


def count_codes(qweight: NDArray[np.uint8], bits: int) -> list[int]:
    """How often each code occurs in packed codes; the bytes are counted, not unpacked."""
    counts = np.bincount(qweight.reshape(-1), minlength=256)
    codes = unpack(np.arange(256, dtype=np.uint8).reshape(256, 1), bits)
    return [int((counts[:, None] * (codes == code)).sum()) for code in range(2**bits)]


def verify(
    folder: str | Path,
    source: str | Path | None = None,
    *,
    on_progress: Progress | None = None,
    on_bytes: Callable[[int], object] | None = None,
) -> dict[str, float]:
    """Holds a folder against its sidecar, and against its source where that is given.

    Checked are the hashes, that packing undoes unpacking, that codes and scales are those of the
    format; with a source also its hashes, and that what is not quantised is unchanged.

    Returns:
        The relative error of each module's weight, empty without a source; 0 is exact.

    Raises:
        UsageError: the first thing that is not as it should be, by name.
    """
    folder = Path(folder)
    checkpoint, sidecar = open_quantised(folder)
    check_hashes(folder, sidecar.files, MADE_AGAIN, on_bytes)
    original = None
    if source is not None:
        check_hashes(Path(source), sidecar.source, OTHER_SOURCE, on_bytes)
        if sidecar.algorithm != "import":
            original = Checkpoint(source)
            _check_unchanged(checkpoint, original)
    errors = {}
    for done, (module, fmt) in enumerate(sidecar.modules.items(), start=1):
        _check_module(checkpoint, sidecar, module, fmt)
        if original is not None:
            name = f"{module}.weight"
            errors[module] = relative_error(checkpoint.load(name), original.load(name))
            if fmt.bits == 2 and fmt.zero != DEFAULT_ZERO[2] and errors[module] != 0:
                raise UsageError(f"{folder}: {module} is not exactly its source: {MADE_AGAIN}")
        if on_progress is not None:
            on_progress(done, len(sidecar.modules))
    return errors


def _check_unchanged(checkpoint: Checkpoint, original: Checkpoint) -> None:
    for name in checkpoint.files.shapes:
        if name in original.files.shapes:
            held, wanted = checkpoint.files.load(name), original.files.load(name)
            if held.dtype != wanted.dtype or not np.array_equal(held.numpy(), wanted.numpy()):
                raise UsageError(f"{name} is not that of the source: {MADE_AGAIN}")


def _check_module(checkpoint: Checkpoint, sidecar: Sidecar, module: str, fmt: LowBitFormat) -> None:
    qweight = checkpoint.files.load(f"{module}.qweight").numpy()
    codes = unpack(qweight, fmt.bits)
    if not np.array_equal(pack(codes, fmt.bits), qweight):
        raise UsageError(f"{module}.qweight does not survive unpacking and packing: a defect")
    low, high = int(codes.min()), int(codes.max())
    if low < fmt.min_code or high > fmt.max_code:
        raise UsageError(
            f"{module}.qweight has codes {low} to {high}, wanted {fmt.min_code} to "
            f"{fmt.max_code}: {MADE_AGAIN}"
        )
    scales = checkpoint.files.load(f"{module}.scales").astype("float32").numpy()
    if not np.isfinite(scales).all():
        raise UsageError(f"{module}.scales holds NaN or infinity: {MADE_AGAIN}")
    if f"{module}.channel_scales" in checkpoint.files.shapes:
        channel = checkpoint.files.load(f"{module}.channel_scales").numpy()[:, None]
        steps = np.array(INTEGER_STEPS if sidecar.method == "w4a8" else POWER_STEPS, np.float32)
        nearest = np.abs((scales / channel)[:, :, None] - steps).argmin(axis=-1)
        if not np.all((scales == channel * steps[nearest]) | (scales == 0)):
            raise UsageError(
                f"{module}.scales are not whole steps of its channel_scales: {MADE_AGAIN}"
            )
