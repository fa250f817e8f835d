"""What is looked at before a server starts, so that bad input stops it with one line.

FastDeploy's worker runs in another process and tells only that it failed; these checks run where
the user reads. They need neither Paddle nor FastDeploy.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from fd_minicpm41.config import (
    ARCHITECTURE,
    BLOCK_SIZE,
    MiniCPMConfig,
    SparseConfig,
    read_json,
)
from fd_minicpm41.errors import UsageError

ROPE_VARIABLE = "FD_MINICPM41_ROPE"
DENSE_LEN_VARIABLE = "FD_MINICPM41_DENSE_LEN"

# FastDeploy's own variable, and the value that means our backend.
BACKEND_VARIABLE = "FD_ATTENTION_BACKEND"
BACKEND = "INFLLMV2_ATTN"

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
        mend = "serve the bf16 checkpoint, and choose --quantization for low-bit weights"
        if tool == "gptq":
            mend = (
                f"rewrite it once, `fd-minicpm41 quantize --model {folder} --out {folder}-wint4 "
                f"--method wint4 --algo import`, and serve {folder}-wint4"
            )
        raise UsageError(f"quantization_config in config.json is of {tool!r}, wanted none: {mend}")
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


def is_served_sparsely(config: MiniCPMConfig) -> bool:
    """Whether InfLLM-V2 runs: the user named its backend, or none and the checkpoint wants it."""
    named = os.environ.get(BACKEND_VARIABLE)
    return named == BACKEND or (named is None and config.sparse is not None)


def served_sparse_config(folder: str | Path) -> SparseConfig:
    """The checkpoint's ``sparse_config``, else the published one, with the user's ``dense_len``.

    Raises:
        UsageError: a bad value in ``config.json`` or in ``FD_MINICPM41_DENSE_LEN``.
    """
    sparse = served_config(folder).with_sparse().sparse
    assert sparse is not None
    dense_len = os.environ.get(DENSE_LEN_VARIABLE)
    if not dense_len:
        return sparse
    try:
        return replace(sparse, dense_len=int(dense_len))
    except ValueError:
        raise UsageError(
            f"{DENSE_LEN_VARIABLE} is {dense_len!r}, wanted a number of tokens, or -1 for always "
            "sparse: correct or unset it"
        ) from None


def check_sparse_attention(fd_config: Any) -> None:
    """Refuses the settings under which sparse attention would be wrong, or is not there yet.

    Raises:
        UsageError: the first such setting, and what to change.
    """
    sparse = served_sparse_config(fd_config.model_config.model)
    cache_config, parallel_config = fd_config.cache_config, fd_config.parallel_config
    model_config = fd_config.model_config
    # The engine knows what was asked for, the worker what was made of it.
    asked = model_config.quantization if isinstance(model_config.quantization, dict) else {}
    kv_quantization = asked.get("kv_cache_quant_type") or getattr(
        fd_config.quant_config, "kv_cache_quant_type", None
    )
    dense = f"or serve it densely with {BACKEND_VARIABLE}=APPEND_ATTN"
    refusals = (
        (
            cache_config.block_size != BLOCK_SIZE,
            f"--block-size is {cache_config.block_size}, wanted {BLOCK_SIZE}, what is selected: "
            f"start with --block-size {BLOCK_SIZE}",
        ),
        (
            (sparse.kernel_size, sparse.kernel_stride) != (32, 16),
            f"sparse_config has kernel_size {sparse.kernel_size} and kernel_stride "
            f"{sparse.kernel_stride}, wanted 32 and 16, which the kernels are made for: correct "
            "config.json",
        ),
        (
            fd_config.scheduler_config.splitwise_role != "mixed",
            f"--splitwise-role is {fd_config.scheduler_config.splitwise_role!r}, wanted 'mixed': a "
            "decode node would receive pages without compressed keys; serve without disaggregation",
        ),
        (
            fd_config.speculative_config.method is not None,
            "speculative decoding rewrites keys that were already compressed: start without "
            "--speculative-config",
        ),
        (
            kv_quantization is not None,
            f"kv_cache_quant_type is {kv_quantization!r}, wanted 16-bit pages: remove it from "
            "--quantization",
        ),
        (
            parallel_config.tensor_parallel_size > model_config.num_key_value_heads,
            f"--tensor-parallel-size is {parallel_config.tensor_parallel_size}, wanted at most "
            f"{model_config.num_key_value_heads}: more splits the heads that share a selection",
        ),
    )
    for is_refused, reason in refusals:
        if is_refused:
            raise UsageError(f"InfLLM-V2 attention: {reason}, {dense}")
