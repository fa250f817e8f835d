"""Hugging Face checkpoint folders: read tensor by tensor into fp32, written whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import paddle
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fd_minicpm41.config import MiniCPMConfig, SparseConfig, read_json
from fd_minicpm41.errors import UsageError
from fd_minicpm41.quantization.formats import dequantize
from fd_minicpm41.quantization.sidecar import logical_shapes, read_sidecar, split_tensor_name
from fd_minicpm41.reference.model import ForCausalLM, weight_shapes

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
HEAD = "lm_head.weight"
# Tables that old files carry and that are computed here.
COMPUTED_SUFFIX = ".rotary_emb.inv_freq"
DTYPES = ("F32", "F16", "BF16")
LOW_BIT_DTYPES = {".qweight": ("U8",), ".scales": ("BF16",), ".channel_scales": ("F32",)}
# Names an error message lists before it only counts.
MAX_LISTED = 6


class TensorFiles:
    """The safetensors of a folder: one ``model.safetensors``, or shards with an index.

    Headers are read on opening, a tensor when it is asked for.

    Attributes:
        shapes, dtypes: by name, as stored; dtypes in safetensors' words ("BF16").
        path_of: the file of each tensor.

    Raises:
        UsageError: no weights, a damaged file, or an index that does not fit its shards.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        index: Mapping[str, str] | None = None
        if (folder / INDEX_FILE).exists():
            index = _weight_map(folder)
            names = sorted(set(index.values()))
        elif (folder / SINGLE_FILE).exists():
            names = [SINGLE_FILE]
        else:
            raise UsageError(
                f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}: give a folder with "
                "safetensors weights"
            )
        self._file_of: dict[str, Any] = {}
        self.path_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for name in names:
            path = folder / name
            file = _open(path)
            for tensor in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                held = file.get_slice(tensor)
                self._file_of[tensor] = file
                self.path_of[tensor] = path
                self.shapes[tensor] = tuple(held.get_shape())
                self.dtypes[tensor] = held.get_dtype()
        absent = sorted(set(index or {}) - set(self.shapes))
        if absent:
            raise UsageError(
                f"{folder / INDEX_FILE} lists tensors that no shard holds ({_listed(absent)}): "
                "download the shards again"
            )

    def load(self, name: str) -> paddle.Tensor:
        """The tensor as it lies in the file, a copy of its own.

        Paddle keeps the owners of foreign memory by address: two tensors on the same bytes of the
        mapped file would end the process when the second of them goes.
        """
        return self._file_of[name].get_tensor(name).clone()


class Checkpoint:
    """The weights of a folder, checked on opening and read tensor by tensor.

    Loading needs the memory of the model and of one tensor. A folder with a sidecar of low-bit
    weights reads as the checkpoint that its codes stand for.

    Attributes:
        shapes: shape by name, as the model needs them.
        files: the tensors as stored: others than the model's where weights are low-bit.
        sidecar: what ``fdm_quant.json`` says; ``None`` for full-precision weights.

    Raises:
        UsageError: what :class:`TensorFiles` raises, a dtype that is not read, or tensors that do
            not fit the sidecar.
    """

    def __init__(self, folder: str | Path) -> None:
        self.sidecar = read_sidecar(folder)
        self.files = TensorFiles(folder)
        for tensor, dtype in self.files.dtypes.items():
            dtypes: tuple[str, ...] = DTYPES
            parts = split_tensor_name(tensor)
            if self.sidecar is not None and parts is not None:
                dtypes = LOW_BIT_DTYPES[parts[1]]
            if dtype not in dtypes:
                raise UsageError(
                    f"{self.files.path_of[tensor]}: {tensor} is {dtype}, wanted one of "
                    f"{', '.join(dtypes)}: give the unquantised checkpoint"
                )
        self.shapes = self.files.shapes
        if self.sidecar is not None:
            self.shapes = logical_shapes(self.files.shapes, self.sidecar, str(folder))

    @property
    def is_tied(self) -> bool:
        """The head is the embedding: there is no ``lm_head.weight``."""
        return HEAD not in self.shapes

    def check(self, config: MiniCPMConfig) -> None:
        """Holds names and shapes against what ``config`` needs.

        Raises:
            UsageError: every missing, unexpected and mis-shaped tensor, by name.
        """
        wanted = weight_shapes(config, self.is_tied)
        missing = [name for name in wanted if name not in self.shapes]
        unexpected = [
            name
            for name in sorted(self.shapes)
            if name not in wanted and not name.endswith(COMPUTED_SUFFIX)
        ]
        misshaped = [
            f"{name} is {list(self.shapes[name])}, wanted {list(shape)}"
            for name, shape in wanted.items()
            if name in self.shapes and self.shapes[name] != shape
        ]
        faults = [
            f"{len(names)} {what} ({_listed(names)})"
            for what, names in (
                ("missing", missing),
                ("unexpected", unexpected),
                ("mis-shaped", misshaped),
            )
            if names
        ]
        if faults:
            raise UsageError(
                f"the tensors do not fit config.json: {', '.join(faults)}: give weights and "
                "config.json of the same model"
            )

    def load(self, name: str) -> paddle.Tensor:
        """The tensor as fp32, in the shape the model needs; low-bit weights dequantised."""
        module = name.removesuffix(".weight")
        if self.sidecar is not None and module in self.sidecar.modules:
            qweight = self.files.load(f"{module}.qweight").numpy()
            scales = self.files.load(f"{module}.scales").astype("float32").numpy()
            return paddle.to_tensor(dequantize(qweight, scales, self.sidecar.modules[module]))
        tensor = self.files.load(name)
        return tensor if tensor.dtype == paddle.float32 else tensor.astype("float32")


def load_model(
    folder: str | Path,
    *,
    rope_table: str | None = None,
    sparse: SparseConfig | None = None,
    on_progress: Callable[[int, int], object] | None = None,
) -> ForCausalLM:
    """The model of a checkpoint folder, in fp32.

    Args:
        rope_table: a published factor table for a longer context ("128k").
        sparse: InfLLM-V2's parameters; ``None`` takes the checkpoint's, or the published ones if
            it has none.
        on_progress: told (tensors loaded, tensors in all) after each.

    Raises:
        UsageError: whatever is wrong with the folder, in one line.
    """
    config = MiniCPMConfig.from_pretrained(folder).with_rope_table(rope_table).with_sparse(sparse)
    checkpoint = Checkpoint(folder)
    checkpoint.check(config)
    total = len(weight_shapes(config, checkpoint.is_tied))
    loaded = 0

    def load(name: str) -> paddle.Tensor:
        nonlocal loaded
        tensor = checkpoint.load(name)
        loaded += 1
        if on_progress is not None:
            on_progress(loaded, total)
        return tensor

    return ForCausalLM(config, load, checkpoint.is_tied)


class CheckpointWriter:
    """Writes a checkpoint folder beside its place and moves it there when it is complete.

    Used as a context manager: leaving it normally publishes the folder; an error, an interrupt or a
    full disk removes what was written. What a killed process leaves is a hidden folder
    ``.NAME.partial``, which the next writer of the same folder removes.

    Raises:
        UsageError: the folder exists already, or cannot be written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        self._partial = self.folder.with_name(f".{self.folder.name}.partial")

    def __enter__(self) -> CheckpointWriter:
        if self.folder.exists():
            raise UsageError(f"{self.folder} exists already: remove it or choose another folder")
        try:
            if self._partial.exists():
                shutil.rmtree(self._partial)
            self._partial.mkdir(parents=True)
        except OSError as error:
            raise self._cannot_write(error) from None
        return self

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        """Adds a JSON file."""
        self.write_text(name, json.dumps(values, indent=2, ensure_ascii=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Adds a UTF-8 text file."""
        (self._partial / name).write_text(text, "utf-8")

    def write_weights(self, weights: Mapping[str, NDArray[np.float32]]) -> None:
        """Adds ``model.safetensors``."""
        save_file(dict(weights), self._partial / SINGLE_FILE, metadata={"format": "pt"})

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            try:
                self._partial.rename(self.folder)
                return
            except OSError as rename_error:
                error = rename_error
        shutil.rmtree(self._partial, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise self._cannot_write(error) from None

    def _cannot_write(self, error: Exception) -> UsageError:
        return UsageError(
            f"{self.folder} cannot be written ({error}): free some space, or choose a folder on "
            "another disk; nothing was left behind"
        )


def _weight_map(folder: Path) -> Mapping[str, str]:
    weight_map = read_json(folder, INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise UsageError(
            f"{folder / INDEX_FILE} has no weight_map of file names: download the file again"
        )
    for name in sorted(set(weight_map.values())):
        # A name with a folder in it could point anywhere on the disk.
        if Path(name).name != name:
            raise UsageError(
                f"{folder / INDEX_FILE} names the shard {name!r}, wanted a plain file name: "
                "download the file again"
            )
    return weight_map


def _open(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="paddle", device="cpu").__enter__()
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist: download the missing shard") from None
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} is damaged or cut short ({error}): download it again") from None


def _listed(names: list[str]) -> str:
    rest = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {rest} more" if rest > 0 else "")
