"""What is looked at before a server starts, so that bad input stops it with one line.

FastDeploy's worker runs in another process and tells only that it failed; these checks run where
the user reads. They need neither Paddle nor FastDeploy.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fd_minicpm41.config import ARCHITECTURE, BLOCK_SIZE, MiniCPMConfig, read_json
from fd_minicpm41.errors import UsageError

ROPE_VARIABLE = "FD_MINICPM41_ROPE"

# FastDeploy's tokenizer loader is content with any one of these.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


def is_minicpm(folder: str | Path) -> bool:
    """Whether a checkpoint's ``config.json`` names our architecture."""
    return ARCHITECTURE in (read_json(Path(folder), "config.json").get("architectures") or ())


def served_config(folder: str | Path) -> MiniCPMConfig:
    """The checkpoint's configuration with the rope table chosen by ``FD_MINICPM41_ROPE``.

    Raises:
        UsageError: a bad value in ``config.json``, or an unknown rope table.
    """
    config = MiniCPMConfig.from_pretrained(folder)
    return config.with_rope_table(os.environ.get(ROPE_VARIABLE) or None)


def check_checkpoint(folder: str | Path, tokenizer: str | Path | None = None) -> MiniCPMConfig:
    """Looks at the files of a checkpoint that is to be served; ``tokenizer`` is another folder for
    the tokenizer's files.

    Raises:
        UsageError: the first thing that would keep the server from working, and its mend.
    """
    config = served_config(folder)
    quantization: Any = read_json(Path(folder), "config.json").get("quantization_config")
    if quantization is not None:
        tool = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UsageError(
            f"quantization_config in config.json is of {tool!r}, wanted none: serve the bf16 "
            "checkpoint, and choose --quantization for low-bit weights"
        )
    tokenizer_folder = Path(tokenizer or folder)
    if not any((tokenizer_folder / name).is_file() for name in TOKENIZER_FILES):
        raise UsageError(
            f"{tokenizer_folder} has neither {' nor '.join(TOKENIZER_FILES)}: download the "
            "tokenizer's files too, or name their folder with --tokenizer"
        )
    return config


def check_context(config: MiniCPMConfig, max_model_len: int) -> None:
    """Looks at the context the server was asked for.

    Raises:
        UsageError: a length that the pages or the rope table cannot serve.
    """
    if max_model_len % BLOCK_SIZE:
        lower = max(max_model_len - max_model_len % BLOCK_SIZE, BLOCK_SIZE)
        raise UsageError(
            f"--max-model-len is {max_model_len}, wanted a multiple of {BLOCK_SIZE}, the tokens "
            f"of a page: start with --max-model-len {lower}"
        )
    if max_model_len > config.max_context:
        raise UsageError(
            f"--max-model-len is {max_model_len}, beyond the rope table's {config.max_context}: "
            f"ask for at most {config.max_context}, or set {ROPE_VARIABLE}=128k for the published "
            "longer table"
        )
