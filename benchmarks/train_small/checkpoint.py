"""The small model's shape, and its files in Hugging Face's form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from fd_minicpm41.config import MiniCPMConfig
from train_small import tokenizer as tokenizers_of_ours

HEAD_DIM = 128
# Low frequencies are stretched up to this factor: content is then matched over 16K tokens without
# a turn of the pairs that carry it. One list serves short and long, as in MiniCPM4.1.
ROPE_STRETCH = 32.0

SPARSE: dict[str, Any] = {
    "kernel_size": 32,
    "kernel_stride": 16,
    "init_blocks": 1,
    "block_size": 64,
    "window_size": 256,
    "topk": 44,
    "use_nope": False,
    "dense_len": 2048,
}
"""A budget of 48 blocks: of the 256 that 16K tokens have, the last row reads 19 %."""

TRAINED_BUDGET = 32
"""Trained with fewer blocks than it is served with, so that the served ones leave a margin."""


def model_config() -> dict[str, Any]:
    """The object of ``config.json``."""
    factors = [round(ROPE_STRETCH ** (i / (HEAD_DIM // 2 - 1)), 6) for i in range(HEAD_DIM // 2)]
    return {
        "architectures": ["MiniCPMForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_minicpm.MiniCPMConfig",
            "AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM",
        },
        "model_type": "minicpm",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": [2, tokenizers_of_ours.VOCAB_SIZE - len(tokenizers_of_ours.ADDED_TOKENS)],
        "pad_token_id": 2,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": 256,
        "initializer_range": 0.1,
        "intermediate_size": 512,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "rope_type": "longrope",
            "long_factor": factors,
            "short_factor": factors,
            "original_max_position_embeddings": 32768,
        },
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 128,
        "mup_denominator": 32,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": tokenizers_of_ours.VOCAB_SIZE,
        "sparse_config": dict(SPARSE),
    }


def parsed_config() -> MiniCPMConfig:
    """The same as the package reads it."""
    return MiniCPMConfig.from_dict(model_config())


def write_checkpoint(
    folder: Path, tokenizer: Tokenizer, weights: dict[str, NDArray[np.float32]]
) -> None:
    """Writes weights (rounded to bf16), configuration and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    rounded = {name: np.asarray(w).astype(ml_dtypes.bfloat16) for name, w in weights.items()}
    save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})
    config = model_config()
    _write_json(folder / "config.json", config)
    generation = {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": config["eos_token_id"],
        "pad_token_id": config["pad_token_id"],
        "do_sample": False,
    }
    _write_json(folder / "generation_config.json", generation)
    tokenizers_of_ours.write(tokenizer, folder)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")
