"""Files that are there whole or not at all, whenever the process ends."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors.numpy import save

# A file that is being written; one that a killed process left may be removed.
HALF = ".tmp"


def save_weights(arrays: Mapping[str, NDArray[Any]], path: Path) -> None:
    """A safetensors file, with the access rights of any other.

    The library's own writer would go through a hidden file that only its owner may read.
    """
    content = save(dict(arrays), metadata={"format": "pt"})
    _write(path, lambda half: half.write_bytes(content))


def write_text(text: str, path: Path) -> None:
    """A UTF-8 text file."""
    _write(path, lambda half: half.write_text(text, "utf-8"))


def copy(source: Path, path: Path) -> None:
    """A copy of a file's content."""
    _write(path, lambda half: shutil.copyfile(source, half))


def remove_halves(folder: Path) -> None:
    """Removes what writers that were killed or failed left in a folder and below."""
    for half in folder.rglob(f"*{HALF}"):
        half.unlink(missing_ok=True)


def _write(path: Path, write: Callable[[Path], object]) -> None:
    half = path.with_name(path.name + HALF)
    try:
        write(half)
        with half.open("rb") as file:
            os.fsync(file.fileno())
    except BaseException:
        half.unlink(missing_ok=True)
        raise
    half.replace(path)
