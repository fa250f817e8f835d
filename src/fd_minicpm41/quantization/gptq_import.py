"""Reads GPTQ checkpoints as AutoGPTQ and GPTQModel write them: 4 bits, symmetric, no act-order.

A linear layer is ``X.qweight`` int32 ``[K / 8, N]`` with eight codes a word along K, low bits
first, ``X.scales`` ``[K / group, N]``, ``X.qzeros`` int32 ``[K / group, N / 8]`` and ``X.g_idx``
int32 ``[K]``. Files of the first version store zeros minus one. The codes are taken over as they
are; scales of fp16 are rounded to the bf16 of this package's format.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import paddle

from fd_minicpm41.config import MiniCPMConfig, read_json
from fd_minicpm41.errors import UsageError
from fd_minicpm41.quantization.formats import GROUPS, LowBitFormat
from fd_minicpm41.quantization.rtn import to_bf16
from fd_minicpm41.reference.checkpoint import HEAD, TensorFiles
from fd_minicpm41.reference.model import weight_shapes

CODES_PER_WORD = 8
FORMAT = LowBitFormat(bits=4, group=128, zero=16)


class GPTQSource:
    """A GPTQ checkpoint folder, as the quantiser reads it.

    Attributes:
        shapes: names and shapes of the checkpoint that it stands for.
        files: the tensors as stored.

    Raises:
        UsageError: no GPTQ checkpoint, or one of a kind that the format cannot hold.
    """

    def __init__(self, folder: str | Path, config: MiniCPMConfig) -> None:
        self._folder = Path(folder)
        self._values = read_json(self._folder, "config.json")
        settings = self._values.get("quantization_config")
        if not isinstance(settings, dict) or settings.get("quant_method") != "gptq":
            raise UsageError(
                f"{folder} has no quantization_config of gptq in config.json: --algo import reads "
                "GPTQ checkpoints alone"
            )
        for name, wanted in (("bits", (4,)), ("sym", (True,)), ("desc_act", (False, None))):
            if settings.get(name) not in wanted:
                raise UsageError(
                    f"quantization_config.{name} is {settings.get(name)!r}, wanted {wanted[0]!r}: "
                    "only symmetric 4-bit GPTQ without act-order has the same values here; "
                    "quantise the bf16 checkpoint instead"
                )
        group = settings.get("group_size")
        if group not in GROUPS:
            raise UsageError(
                f"quantization_config.group_size is {group!r}, wanted 64 or 128: quantise the bf16 "
                "checkpoint instead"
            )
        self._group = int(group)
        self._zero_offset = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
        self.files = TensorFiles(folder)
        self._scale_errors: dict[str, float] = {}
        self.shapes = weight_shapes(config, self.is_tied)
        for name in self.shapes:
            module = name.removesuffix(".weight")
            needed = (
                [f"{module}.{part}" for part in ("qweight", "scales", "qzeros")]
                if name.endswith("_proj.weight")
                else [name]
            )
            missing = [n for n in needed if n not in self.files.shapes]
            if missing:
                raise UsageError(
                    f"{folder} lacks {missing[0]}: give a complete GPTQ checkpoint whose linear "
                    "layers are all quantised"
                )

    @property
    def is_tied(self) -> bool:
        """The head is the embedding."""
        return HEAD not in self.files.shapes

    def load(self, name: str) -> paddle.Tensor:
        """A tensor that is not quantised, as fp32."""
        return self.files.load(name).astype("float32")

    def plain_config(self) -> dict[str, Any]:
        """``config.json`` without the description of the GPTQ files."""
        return {k: v for k, v in self._values.items() if k != "quantization_config"}

    def codes(self, module: str) -> tuple[paddle.Tensor, paddle.Tensor, LowBitFormat]:
        """Codes uint8 ``[K, N]``, scales fp32 ``[K / group, N]`` exact in bf16, and the format.

        Raises:
            UsageError: tensors that do not fit the model, columns in another order, or a zero
                point that is not in the middle.
        """
        rows, columns = self.shapes[f"{module}.weight"]
        groups = columns // self._group
        fmt = LowBitFormat(bits=4, group=self._group, zero=FORMAT.zero)
        fmt.check_columns(columns, module)
        words = self._read(f"{module}.qweight", (columns // CODES_PER_WORD, rows))
        zeros = self._read(f"{module}.qzeros", (groups, rows // CODES_PER_WORD))
        scales = self._read(f"{module}.scales", (groups, rows)).astype(np.float32)
        if f"{module}.g_idx" in self.files.shapes:
            order = self._read(f"{module}.g_idx", (columns,))
            if not np.array_equal(order, np.arange(columns) // self._group):
                raise UsageError(
                    f"{module}.g_idx is not in order, as act-order leaves it: quantise the bf16 "
                    "checkpoint instead"
                )
        if np.any(_nibbles(zeros) + self._zero_offset != FORMAT.zero // 2):
            raise UsageError(
                f"{module}.qzeros is not {FORMAT.zero // 2} throughout: the weights are not "
                "symmetric; quantise the bf16 checkpoint instead"
            )
        if not np.isfinite(scales).all():
            raise UsageError(f"{module}.scales holds NaN or infinity: download it again")
        rounded = to_bf16(paddle.to_tensor(scales))
        change = np.abs(rounded.numpy() - scales) / np.maximum(np.abs(scales), 1e-30)
        self._scale_errors[module] = float(f"{change.max():.6g}")
        codes = _nibbles(words.T).T
        return paddle.to_tensor(np.ascontiguousarray(codes)), rounded, fmt

    def scale_error(self, module: str) -> float:
        """The largest relative change of a scale that :meth:`codes` rounded to bf16."""
        return self._scale_errors[module]

    def _read(self, name: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        if self.files.shapes[name] != shape:
            raise UsageError(
                f"{name} is {list(self.files.shapes[name])}, wanted {list(shape)}: the weights do "
                "not fit config.json"
            )
        tensor = self.files.load(name)
        array: np.ndarray[Any, Any] = (
            tensor.astype("float32") if tensor.dtype == paddle.bfloat16 else tensor
        ).numpy()
        return array


def _nibbles(words: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """int32 ``[A, B]`` to its codes, uint8 ``[A, 8 B]``, low bits first."""
    unsigned = np.ascontiguousarray(words).view(np.uint32)
    parts = [((unsigned >> np.uint32(4 * i)) & np.uint32(15)) for i in range(CODES_PER_WORD)]
    return np.stack(parts, axis=-1).reshape(words.shape[0], -1).astype(np.uint8)
