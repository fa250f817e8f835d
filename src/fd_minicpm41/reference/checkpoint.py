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
from fd_minicpm41.reference.model import ForCausalLM, weight_shapes

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
HEAD = "lm_head.weight"
# Tables that old files carry and that are computed here.
COMPUTED_SUFFIX = ".rotary_emb.inv_freq"
DTYPES = ("F32", "F16", "BF16")
# Names an error message lists before it only counts.
MAX_LISTED = 6


class Checkpoint:
    """The weights of a folder: one ``model.safetensors``, or shards with an index.

    Headers are checked on opening; a tensor is read when asked for, so that loading needs the
    memory of the model and of one tensor.

    Attributes:
        shapes: shape by name, as stored.

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
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name in names:
            path = folder / name
            file = _open(path)
            for tensor in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                held = file.get_slice(tensor)
                if held.get_dtype() not in DTYPES:
                    raise UsageError(
                        f"{path}: {tensor} is {held.get_dtype()}, wanted one of "
                        f"{', '.join(DTYPES)}: give the unquantised checkpoint"
                    )
                self._file_of[tensor] = file
                self.shapes[tensor] = tuple(held.get_shape())
        absent = sorted(set(index or {}) - set(self.shapes))
        if absent:
            raise UsageError(
                f"{folder / INDEX_FILE} lists tensors that no shard holds ({_listed(absent)}): "
                "download the shards again"
            )

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
        """The tensor as fp32, in its stored shape."""
        tensor = self._file_of[name].get_tensor(name)
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
