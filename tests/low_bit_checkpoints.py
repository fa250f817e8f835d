"""Tiny checkpoints of low-bit weights, written from the format's definition and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from fd_minicpm41.quantization.formats import (
    LowBitFormat,
    dequantize,
    hadamard_blocks,
    pack,
)

BF16 = ml_dtypes.bfloat16
Weights = dict[str, NDArray[np.float32]]
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FORMATS = {
    "wint2": LowBitFormat(2, 64, 3, 64),
    "wint4": LowBitFormat(4, 128, 16),
    "wint8": LowBitFormat(8, 128, 256),
    "w4a8": LowBitFormat(4, 128, 16),
    "w4afp8": LowBitFormat(4, 128, 16),
}


def read_weights(folder: Path) -> Weights:
    """Every tensor of a checkpoint's safetensors, fp32."""
    files = sorted(folder.glob("*.safetensors"))
    return {n: a.astype(np.float32) for f in files for n, a in load_file(f).items()}


def copy_checkpoint(source: Path, folder: Path, tensors: dict[str, NDArray]) -> Path:
    """The files of a checkpoint with other tensors."""
    folder.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix != ".safetensors" and not path.name.endswith(".index.json"):
            shutil.copy(path, folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_ternary(
    source: Path,
    folder: Path,
    group: int,
    change: Callable[[str, NDArray[np.float32]], NDArray[np.float32]] = lambda name, w: w,
) -> Path:
    """The checkpoint with -s, 0 and s in each group of its linear layers, in bf16."""
    tensors = {}
    for name, weight in read_weights(source).items():
        if any(f".{linear}." in name for linear in LINEAR):
            grouped = weight.reshape(len(weight), -1, group)
            scales = np.abs(grouped).mean(-1, keepdims=True).astype(BF16).astype(np.float32)
            levels = np.where(np.abs(grouped) > scales / 2, np.sign(grouped), 0)
            weight = (levels * scales).reshape(weight.shape)
            weight = change(name, weight)
        tensors[name] = weight.astype(BF16)
    return copy_checkpoint(source, folder, tensors)


def round_weight(weight: NDArray[np.float32], fmt: LowBitFormat, method: str) -> dict[str, NDArray]:
    """``qweight``, ``scales`` and, of w4a8 and w4afp8, ``channel_scales``, by plain rounding."""
    rows, columns = weight.shape
    stored = hadamard_blocks(weight, fmt.hadamard) if fmt.hadamard else weight
    grouped = stored.reshape(rows, -1, fmt.group)
    reach = fmt.zero / 2 if fmt.zero == 3 else fmt.zero / 2 - 1
    scales = np.abs(grouped).max(-1) / max(reach, 1)
    parts = {}
    if method in ("w4a8", "w4afp8"):
        # Four significant bits a row, times 1 to 15 or a power of two.
        largest = scales.max(-1)
        unit = 2.0 ** (np.floor(np.log2(largest / 15)) - 3)
        channel = np.ceil(largest / 15 / unit) * unit
        steps = scales / channel[:, None]
        steps = np.clip(np.ceil(steps), 1, 15) if method == "w4a8" else 2 ** np.ceil(np.log2(steps))
        scales = steps * channel[:, None]
        parts["channel_scales"] = channel.astype(np.float32)
    scales = scales.astype(BF16)
    divisor = np.where(scales == 0, 1, scales.astype(np.float32))[:, :, None]
    codes = np.clip(np.rint(grouped / divisor + fmt.zero / 2), fmt.min_code, fmt.max_code)
    parts["qweight"] = pack(codes.astype(np.uint8).reshape(rows, columns), fmt.bits)
    parts["scales"] = scales
    return parts


def write_low_bit(
    source: Path,
    folder: Path,
    method: str,
    formats: dict[str, LowBitFormat | None] | None = None,
    rows_8_bit: tuple[str, ...] = (),
) -> Path:
    """A checkpoint as ``fd-minicpm41 quantize`` lays it out.

    Args:
        formats: by the end of a module's name, in place of the method's own; None keeps bf16.
        rows_8_bit: modules of the vocabulary that are stored with 8 bits and a scale a row.
    """
    tensors: dict[str, NDArray] = {}
    modules = {}
    for name, weight in read_weights(source).items():
        module = name.removesuffix(".weight")
        fmt: LowBitFormat | None = None
        if module in rows_8_bit:
            fmt = LowBitFormat(8, weight.shape[1], 256)
        elif module.endswith(LINEAR):
            found = [f for end, f in (formats or {}).items() if module.endswith(end)]
            fmt = found[0] if found else FORMATS[method]
        if fmt is None:
            tensors[name] = weight.astype(BF16)
            continue
        modules[module] = vars(fmt)
        of = method if module not in rows_8_bit else "wint8"
        tensors |= {f"{module}.{part}": a for part, a in round_weight(weight, fmt, of).items()}
    copy_checkpoint(source, folder, tensors)
    sidecar = {"format": "fdm-quant", "version": 1, "method": method, "modules": modules}
    (folder / "fdm_quant.json").write_text(json.dumps(sidecar))
    return folder


def restored(folder: Path) -> Weights:
    """The weights that a low-bit checkpoint stands for, under their 16-bit names."""
    modules = json.loads((folder / "fdm_quant.json").read_text())["modules"]
    files = load_file(folder / "model.safetensors")
    weights = {}
    for name, array in files.items():
        module, _, part = name.rpartition(".")
        if module not in modules:
            weights[name] = array.astype(np.float32)
        elif part == "qweight":
            fmt = LowBitFormat(**modules[module])
            weights[f"{module}.weight"] = dequantize(array, files[f"{module}.scales"], fmt)
    return weights


def write_restored(source: Path, folder: Path) -> Path:
    """The same as a plain fp32 checkpoint, for the reference."""
    folder = copy_checkpoint(source, folder, restored(source))
    (folder / "fdm_quant.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    return folder
