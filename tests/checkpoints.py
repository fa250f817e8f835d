"""Tiny random MiniCPM checkpoints with MiniCPM4.1's fields, tokenizer traits and file layout.

Everything a loader or a server reads is there: ``config.json``, safetensors (one file, or shards
with an index), the tokenizer with its configuration, a chat template, ``generation_config.json``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

BOS, EOS, UNK = "<s>", "</s>", "<unk>"
# In the released tokenizer these follow the text pieces, in this order.
ADDED_TOKENS = (
    "<|im_end|>",
    "<|im_start|>",
    "<|tool_call|>",
    "<|execute_start|>",
    "<|execute_end|>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
)
# <think> and </think> are several pieces, and how they are cut depends on the character before:
# a newline joins the bracket, a space does not.
MERGES = (
    ("Ċ", "<"),
    ("<", "/"),
    ("t", "h"),
    ("th", "i"),
    ("n", "k"),
    ("thi", "nk"),
    ("th", "e"),
    ("Ġ", "a"),
    ("Ġ", "the"),
    ("i", "n"),
    ("e", "r"),
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n' }}{% endif %}"
    "{% endif %}"
)
SMALL_SPARSE_CONFIG = {
    "kernel_size": 32,
    "kernel_stride": 16,
    "init_blocks": 1,
    "block_size": 64,
    "window_size": 64,
    "topk": 3,
    "use_nope": False,
    "dense_len": 192,
}
"""A budget of 4 blocks, so that prompts of a few hundred tokens are really sparse."""


def tiny_tokenizer() -> Tokenizer:
    """Byte-level BPE that adds one BOS to encoded text, as MiniCPM4.1's does."""
    pieces = [UNK, BOS, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += ["".join(pair) for pair in MERGES]
    tokenizer = Tokenizer(
        models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=list(MERGES), unk_token=UNK)
    )
    # Without the regular expression a merge may cross the border between a newline and a bracket.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = (UNK, BOS, EOS, *ADDED_TOKENS)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 1)]
    )
    return tokenizer


def tiny_weights(config: dict[str, Any], *, tied: bool, seed: int) -> dict[str, np.ndarray]:
    """fp32 weights by name, scaled by fan-in so that attention and logits are far from uniform."""
    rng = np.random.default_rng(seed)
    hidden, inter = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim", hidden // config["num_attention_heads"])
    q, kv = (config[f"num_{kind}_heads"] * head_dim for kind in ("attention", "key_value"))

    def linear(rows: int, columns: int, gain: float = 1.5) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * gain / columns**0.5).astype(np.float32)

    def norm() -> np.ndarray:
        return (1.0 + 0.1 * rng.standard_normal(hidden)).astype(np.float32)

    vocab = config["vocab_size"]
    embedding = rng.standard_normal((vocab, hidden)) / config["scale_emb"]
    weights = {"model.embed_tokens.weight": embedding.astype(np.float32)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        weights |= {
            layer + "input_layernorm.weight": norm(),
            layer + "self_attn.q_proj.weight": linear(q, hidden),
            layer + "self_attn.k_proj.weight": linear(kv, hidden),
            layer + "self_attn.v_proj.weight": linear(kv, hidden),
            layer + "self_attn.o_proj.weight": linear(hidden, q),
            layer + "post_attention_layernorm.weight": norm(),
            layer + "mlp.gate_proj.weight": linear(inter, hidden),
            layer + "mlp.up_proj.weight": linear(inter, hidden),
            layer + "mlp.down_proj.weight": linear(hidden, inter),
        }
    weights["model.norm.weight"] = norm()
    if not tied:
        # Undoes the division by hidden_size / dim_model_base: logits spread over a few units.
        weights["lm_head.weight"] = linear(vocab, hidden, 3 * hidden / config["dim_model_base"])
    return weights


def tiny_config(
    *,
    num_layers: int = 2,
    hidden_size: int = 256,
    intermediate_size: int = 384,
    num_q_heads: int = 32,
    num_kv_heads: int = 2,
    head_dim: int | None = None,
    vocab_size: int | None = None,
    max_position_embeddings: int = 65536,
    sparse_config: dict[str, Any] | None = None,
    tied: bool = False,
    **overrides: Any,
) -> dict[str, Any]:
    """``config.json`` with exactly the released fields; ``sparse_config`` only when given."""
    factors = [
        round(1.0 + 0.1 * i, 4) for i in range((head_dim or hidden_size // num_q_heads) // 2)
    ]
    config: dict[str, Any] = {
        "architectures": ["MiniCPMForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_minicpm.MiniCPMConfig",
            "AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM",
        },
        "model_type": "minicpm",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": [2, tiny_tokenizer().token_to_id("<|im_end|>")],
        "pad_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "initializer_range": 0.1,
        "intermediate_size": intermediate_size,
        "max_position_embeddings": max_position_embeddings,
        "num_attention_heads": num_q_heads,
        "num_hidden_layers": num_layers,
        "num_key_value_heads": num_kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "rope_type": "longrope",
            "long_factor": factors,
            "short_factor": factors,
            "original_max_position_embeddings": max_position_embeddings,
        },
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": hidden_size // 16,
        "mup_denominator": 32,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": vocab_size or tiny_tokenizer().get_vocab_size(),
    }
    if sparse_config is not None:
        config["sparse_config"] = sparse_config
    if head_dim is not None:  # the released file has none: it is derived
        config["head_dim"] = head_dim
    return config | overrides


def write_tiny_checkpoint(
    folder: str | Path,
    *,
    num_layers: int = 2,
    hidden_size: int = 256,
    intermediate_size: int = 384,
    num_q_heads: int = 32,
    num_kv_heads: int = 2,
    head_dim: int | None = None,
    vocab_size: int | None = None,
    max_position_embeddings: int = 65536,
    sparse_config: dict[str, Any] | None = None,
    tied: bool = False,
    dtype: str = "bfloat16",
    num_shards: int = 1,
    tokenizer_files: bool = True,
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Writes a checkpoint and returns its folder; ``overrides`` replace fields of ``config.json``.

    The default keeps MiniCPM4.1's 32 query heads over 2 kv heads, a group of 16. ``dtype`` is one
    of "bfloat16", "float16" and "float32"; more than one shard adds the index file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        max_position_embeddings=max_position_embeddings,
        sparse_config=sparse_config,
        tied=tied,
        torch_dtype=dtype,
    )
    numpy_dtype = {
        "bfloat16": ml_dtypes.bfloat16,
        "float16": np.float16,
        "float32": np.float32,
    }[dtype]
    weights = {
        name: array.astype(numpy_dtype)
        for name, array in tiny_weights(config, tied=tied, seed=seed).items()
    }
    names = list(weights)
    if num_shards == 1:
        files = {"model.safetensors": names}
    else:
        files = {
            f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors": names[i::num_shards]
            for i in range(num_shards)
        }
        total = sum(array.nbytes for array in weights.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: file for file, held in files.items() for name in held},
        }
        _write_json(folder / "model.safetensors.index.json", index)
    for file, held in files.items():
        save_file({n: weights[n] for n in held}, folder / file, metadata={"format": "pt"})

    _write_json(folder / "config.json", config | overrides)
    _write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": 1,
            "eos_token_id": config["eos_token_id"],
            "pad_token_id": 2,
            "do_sample": True,
            "temperature": 0.8,
            "top_p": 0.8,
        },
    )
    if tokenizer_files:
        write_tiny_tokenizer(folder)
    return folder


def write_tiny_tokenizer(folder: Path) -> None:
    """The tokenizer's files alone: ``tokenizer.json``, its configuration and the special tokens."""
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    special = {"bos_token": BOS, "eos_token": "<|im_end|>", "unk_token": UNK, "pad_token": EOS}
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(
        folder / "tokenizer_config.json",
        special
        | {
            "add_bos_token": True,
            "add_eos_token": False,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1000000,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")
