"""Tiny Llama GGUF files with the metadata and the row order that llama.cpp's converter writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import pre_tokenizers

HIDDEN, INTER, LAYERS, HEADS, KV_HEADS, CONTEXT = 64, 96, 2, 4, 2, 256
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
USER_DEFINED = "<note>"


def write_tiny_gguf(
    path: Path,
    *,
    tied: bool = True,
    quantization: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    arch: str = "llama",
    leave_out: tuple[str, ...] = (),
    extra_tensors: dict[str, np.ndarray] | None = None,
    **fields: Any,
) -> dict[str, np.ndarray]:
    """Writes the file; returns the weights by Hugging Face's names, rows in NeoX order.

    ``fields`` replace values of the metadata, ``leave_out`` names tensors that are not written.
    """
    rng = np.random.default_rng(11)
    tokens = [*SPECIAL, USER_DEFINED, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the"]
    types = [3] * len(SPECIAL) + [4] + [1] * (len(tokens) - len(SPECIAL) - 1)
    writer = gguf.GGUFWriter(str(path), arch)
    numbers = {
        "block_count": LAYERS,
        "context_length": CONTEXT,
        "embedding_length": HIDDEN,
        "feed_forward_length": INTER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "rope.dimension_count": HIDDEN // HEADS,
    }
    for name, value in numbers.items():
        writer.add_uint32(f"{arch}.{name}", fields.get(name.replace(".", "_"), value))
    writer.add_float32(f"{arch}.rope.freq_base", 10000.0)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5)
    if "rope_scaling_type" in fields:
        writer.add_string(f"{arch}.rope.scaling.type", fields["rope_scaling_type"])
    writer.add_tokenizer_model(fields.get("tokenizer_model", "gpt2"))
    writer.add_tokenizer_pre(fields.get("tokenizer_pre", "smollm"))
    if fields.get("with_tokens", True):
        writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)

    def linear(rows: int, columns: int) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) / columns**0.5).astype(np.float32)

    def norm() -> np.ndarray:
        return (1 + 0.1 * rng.standard_normal(HIDDEN)).astype(np.float32)

    kv = KV_HEADS * HIDDEN // HEADS
    weights: dict[str, np.ndarray] = {}

    def add(gguf_name: str, hf_name: str, array: np.ndarray, heads: int = 0) -> None:
        if array.ndim == 2 and quantization != gguf.GGMLQuantizationType.F32:
            data = gguf.quants.quantize(array, quantization)
            array = gguf.quants.dequantize(data, quantization)
        weights[hf_name] = array
        if gguf_name in leave_out:
            return
        # The converter turns NeoX halves into neighbouring pairs.
        if heads:
            halves = array.reshape(heads, 2, array.shape[0] // heads // 2, -1)
            array = halves.swapaxes(1, 2).reshape(array.shape)
        if array.ndim == 2 and quantization != gguf.GGMLQuantizationType.F32:
            data = gguf.quants.quantize(array, quantization)
            writer.add_tensor(gguf_name, data, raw_dtype=quantization)
        else:
            writer.add_tensor(gguf_name, np.ascontiguousarray(array))

    add("token_embd.weight", "model.embed_tokens.weight", linear(len(tokens), HIDDEN))
    for i in range(LAYERS):
        source, target = f"blk.{i}.", f"model.layers.{i}."
        add(source + "attn_norm.weight", target + "input_layernorm.weight", norm())
        attn = target + "self_attn."
        add(source + "attn_q.weight", attn + "q_proj.weight", linear(HIDDEN, HIDDEN), HEADS)
        add(source + "attn_k.weight", attn + "k_proj.weight", linear(kv, HIDDEN), KV_HEADS)
        add(source + "attn_v.weight", attn + "v_proj.weight", linear(kv, HIDDEN))
        add(source + "attn_output.weight", attn + "o_proj.weight", linear(HIDDEN, HIDDEN))
        add(source + "ffn_norm.weight", target + "post_attention_layernorm.weight", norm())
        add(source + "ffn_gate.weight", target + "mlp.gate_proj.weight", linear(INTER, HIDDEN))
        add(source + "ffn_up.weight", target + "mlp.up_proj.weight", linear(INTER, HIDDEN))
        add(source + "ffn_down.weight", target + "mlp.down_proj.weight", linear(HIDDEN, INTER))
    add("output_norm.weight", "model.norm.weight", norm())
    if not tied:
        add("output.weight", "lm_head.weight", linear(len(tokens), HIDDEN))
    for name, array in (extra_tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights
