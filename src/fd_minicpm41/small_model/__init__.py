"""A small trained model of MiniCPM4.1's structure that ships with the package.

It is a test piece, not a language model of use: it finds facts in long texts, thinks, obeys the
switch and calls tools, so that attention, weight formats and servers can be examined on real
weights. ``checkpoint/README.md`` says what it was trained on and what it reaches.
"""

from __future__ import annotations

from pathlib import Path

from fd_minicpm41.errors import UsageError


def path() -> Path:
    """The checkpoint's folder.

    Raises:
        UsageError: the package was installed without it.
    """
    folder = Path(__file__).resolve().parent / "checkpoint"
    if not (folder / "model.safetensors").is_file():
        raise UsageError(
            f"{folder} holds no model.safetensors: install the package's wheel anew, or make the "
            "checkpoint with benchmarks/train_small/train.py"
        )
    return folder
