"""A Llama model in a GGUF file, rewritten as a MiniCPM checkpoint whose scalings are the identity.

MiniCPM without its muP scalings is Llama: with scale_emb 1, scale_depth sqrt(layers),
dim_model_base hidden_size and rope factors of 1, every scaling is a product with 1. Quantised
tensors are restored to the fp32 values that they stand for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from fd_minicpm41.config import ARCHITECTURE, MiniCPMConfig
from fd_minicpm41.errors import UsageError
from fd_minicpm41.reference.checkpoint import CheckpointWriter
from fd_minicpm41.reference.model import weight_shapes

# GGUF's name of each weight; {} is the layer.
GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.layers.{}.input_layernorm.weight": "blk.{}.attn_norm.weight",
    "model.layers.{}.self_attn.q_proj.weight": "blk.{}.attn_q.weight",
    "model.layers.{}.self_attn.k_proj.weight": "blk.{}.attn_k.weight",
    "model.layers.{}.self_attn.v_proj.weight": "blk.{}.attn_v.weight",
    "model.layers.{}.self_attn.o_proj.weight": "blk.{}.attn_output.weight",
    "model.layers.{}.post_attention_layernorm.weight": "blk.{}.ffn_norm.weight",
    "model.layers.{}.mlp.gate_proj.weight": "blk.{}.ffn_gate.weight",
    "model.layers.{}.mlp.up_proj.weight": "blk.{}.ffn_up.weight",
    "model.layers.{}.mlp.down_proj.weight": "blk.{}.ffn_down.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
GGUF_HEAD = "output.weight"
# GGUF's token types: control tokens are special, user-defined ones are matched whole in the text.
CONTROL, USER_DEFINED = 3, 4


def import_gguf(
    path: str | Path, out: str | Path, on_progress: Callable[[int, int], object] | None = None
) -> None:
    """Writes the checkpoint folder ``out`` from a Llama GGUF file.

    Args:
        path: the GGUF file, with a byte-level BPE tokenizer in its metadata.
        out: a folder that does not exist yet; it appears complete or not at all.
        on_progress: told (tensors done, tensors in all) after each.

    Raises:
        UsageError: not such a file, or ``out`` cannot be written.
    """
    path = Path(path)
    # The reader maps tensors from the file, so only metadata is in memory yet.
    reader = _open(path)
    field = _Fields(path, reader)
    config = _config(field, tied=GGUF_HEAD not in {t.name for t in reader.tensors})
    tokenizer = _tokenizer(path, field)
    with CheckpointWriter(out) as writer:
        writer.write_json("config.json", config)
        writer.write_json(
            "generation_config.json",
            {name: config[name] for name in ("bos_token_id", "eos_token_id")},
        )
        writer.write_json("tokenizer_config.json", _tokenizer_config(field))
        writer.write_text("tokenizer.json", tokenizer.to_str(pretty=True))
        writer.write_weights(_weights(path, reader, MiniCPMConfig.from_dict(config), on_progress))


class _Fields:
    """The file's metadata; a missing value is told by name."""

    def __init__(self, path: Path, reader: Any) -> None:
        self._path = path
        self._reader = reader

    def get(self, name: str, default: Any = None) -> Any:
        held = self._reader.get_field(name)
        return default if held is None else held.contents()

    def __getitem__(self, name: str) -> Any:
        value = self.get(name)
        if value is None:
            raise UsageError(
                f"{self._path} has no {name}: give a Llama model with its tokenizer, as "
                "llama.cpp's converter writes it"
            )
        return value


def _open(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UsageError(
            "reading GGUF needs the package gguf: pip install 'fd-minicpm41[demo]'"
        ) from None
    if not path.is_file():
        raise UsageError(f"{path} does not exist: give the path of a GGUF file")
    try:
        return GGUFReader(path)
    except Exception as error:  # the library lets numpy's and its own errors through
        raise UsageError(
            f"{path} is no GGUF file, or cut short ({error}): download it again"
        ) from None


def _config(field: _Fields, tied: bool) -> dict[str, Any]:
    architecture = field["general.architecture"]
    if architecture != "llama":
        raise UsageError(
            f"the GGUF architecture is {architecture!r}, wanted 'llama': only Llama's layers are "
            "those of MiniCPM with identity scalings"
        )
    hidden, layers = field["llama.embedding_length"], field["llama.block_count"]
    heads, context = field["llama.attention.head_count"], field["llama.context_length"]
    head_dim = hidden // heads
    if field.get("llama.rope.dimension_count", head_dim) != head_dim:
        raise UsageError(
            "the GGUF file rotates a part of each head only: MiniCPM rotates all of it"
        )
    if field.get("llama.rope.scaling.type", "none") != "none":
        raise UsageError(
            f"the GGUF file scales RoPE by {field['llama.rope.scaling.type']!r}: give a model "
            "without scaling"
        )
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "minicpm",
        "torch_dtype": "float32",
        "vocab_size": len(field["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": field["llama.feed_forward_length"],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": field.get("llama.attention.head_count_kv", heads),
        "hidden_act": "silu",
        "rms_norm_eps": field["llama.attention.layer_norm_rms_epsilon"],
        "max_position_embeddings": context,
        "rope_theta": field.get("llama.rope.freq_base", 10000.0),
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": [1.0] * (head_dim // 2),
            "long_factor": [1.0] * (head_dim // 2),
            "original_max_position_embeddings": context,
        },
        "scale_emb": 1,
        "scale_depth": math.sqrt(layers),
        "dim_model_base": hidden,
        "tie_word_embeddings": tied,
        "bos_token_id": field["tokenizer.ggml.bos_token_id"],
        "eos_token_id": field["tokenizer.ggml.eos_token_id"],
    }


def _weights(
    path: Path,
    reader: Any,
    config: MiniCPMConfig,
    on_progress: Callable[[int, int], object] | None,
) -> dict[str, NDArray[np.float32]]:
    from gguf.quants import dequantize

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    shapes = weight_shapes(config, tied=GGUF_HEAD not in tensors)
    sources = {name: _gguf_name(name) for name in shapes}
    odd = sorted(set(sources.values()) ^ set(tensors))
    if odd:
        raise UsageError(
            f"{path}: tensors {', '.join(odd[:6])} are missing or unknown: give a plain Llama "
            "model without biases, RoPE factors or adapters"
        )
    weights = {}
    for done, (name, shape) in enumerate(shapes.items(), start=1):
        tensor = tensors[sources[name]]
        try:
            array = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        except NotImplementedError:
            raise UsageError(
                f"{path}: {tensor.name} is {tensor.tensor_type.name}, which the gguf package "
                "cannot restore: give another quantisation, such as Q8_0"
            ) from None
        if array.shape != shape:
            raise UsageError(
                f"{path}: {tensor.name} is {list(array.shape)}, wanted {list(shape)}: the file's "
                "metadata and tensors do not fit; download it again"
            )
        if name.endswith("q_proj.weight"):
            array = _unpermute(array, config.num_q_heads)
        elif name.endswith("k_proj.weight"):
            array = _unpermute(array, config.num_kv_heads)
        weights[name] = np.ascontiguousarray(array)
        if on_progress is not None:
            on_progress(done, len(shapes))
    return weights


def _gguf_name(name: str) -> str:
    parts = name.split(".")
    if parts[1] != "layers":
        return GGUF_NAMES[name]
    layer = parts[2]
    return GGUF_NAMES[".".join([*parts[:2], "{}", *parts[3:]])].format(layer)


def _unpermute(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """From GGUF's rows, which rotate in neighbouring pairs, to NeoX halves of each head."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _tokenizer(path: Path, field: _Fields) -> FastTokenizer:
    model, pre = field["tokenizer.ggml.model"], field.get("tokenizer.ggml.pre", "default")
    if model != "gpt2" or pre not in PRE_TOKENIZERS:
        raise UsageError(
            f"{path} has the tokenizer {model!r} with {pre!r} pre-tokenization, wanted byte-level "
            f"BPE ('gpt2') with one of {', '.join(PRE_TOKENIZERS)}: give another model"
        )
    tokens, types = field["tokenizer.ggml.tokens"], field["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in field["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = FastTokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()

    def added(kind: int) -> list[AddedToken]:
        return [
            AddedToken(token, normalized=False)
            for token, held in zip(tokens, types, strict=True)
            if held == kind
        ]

    tokenizer.add_special_tokens(added(CONTROL))
    tokenizer.add_tokens(added(USER_DEFINED))
    return tokenizer


def _byte_level() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _digits_then_byte_level() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()])


# How llama.cpp's name for a way of cutting text reads in the tokenizers library.
PRE_TOKENIZERS: dict[str, Callable[[], Any]] = {
    "gpt-2": _byte_level,
    "smollm": _digits_then_byte_level,
}


def _tokenizer_config(field: _Fields) -> dict[str, Any]:
    tokens = field["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(field.get("tokenizer.ggml.add_bos_token", False)),
        "bos_token": tokens[field["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[field["tokenizer.ggml.eos_token_id"]],
        "chat_template": field.get("tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": field["llama.context_length"],
    }
