"""A tiny checkpoint that says what it is told: the next token is a table over the last one.

Attention and MLP add nothing, so the last token's embedding alone reaches the head, and the head
holds one row for each token that points at the embeddings it follows. A script's tokens carry a
private character that the tokenizer's decoder drops: any text may be cut in any way, and no two
places of any scripts share a token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders

from checkpoints import tiny_config, tiny_tokenizer, tiny_weights, write_tiny_checkpoint

FIRST_TAG = 0xE000
NUM_TAGS = 0x1900
# As the released template, plus a tools section; the last character of the last message chooses
# the script, and its tag rides on the newline that ends the prompt.
CHAT_TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n' }}"
    "{% elif opened is defined and opened %}{{ '<think>\n' }}{% endif %}"
    "{{ messages[-1]['content'][-1] }}"
)


def script_tag(number: int) -> str:
    """The character that a prompt ends with to choose a script."""
    return chr(FIRST_TAG + number)


def scripted_tokenizer(scripts: Sequence[Sequence[str]]) -> tuple[Tokenizer, list[list[int]]]:
    """The tiny tokenizer with a token for each piece of each script, and those tokens' ids."""
    plain = json.loads(tiny_tokenizer().to_str())
    vocab = plain["model"]["vocab"]
    used = len(scripts)
    names: list[list[str]] = []
    encoder = {v: k for k, v in _byte_characters().items()}
    for script in scripts:
        row = []
        for piece in script:
            mapped = "".join(encoder[byte] for byte in piece.encode("utf-8"))
            row.append(mapped + chr(FIRST_TAG + used))
            used += 1
        names.append(row)
    assert used <= NUM_TAGS
    added = [token["content"] for token in plain["added_tokens"]]
    pieces = sorted(vocab, key=vocab.get) + [name for row in names for name in row]
    plain["model"]["vocab"] = {piece: i for i, piece in enumerate(pieces)}
    plain["added_tokens"] = []
    tokenizer = Tokenizer.from_str(json.dumps(plain))
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in added])
    tokenizer.add_tokens(
        [AddedToken("\n" + script_tag(i), normalized=False) for i in range(len(scripts))]
    )
    private = Regex(f"[{chr(FIRST_TAG)}-{chr(FIRST_TAG + NUM_TAGS - 1)}]")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(private, ""), decoders.ByteLevel()])
    return tokenizer, [[tokenizer.token_to_id(name) for name in row] for row in names]


def _byte_characters() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(other)}


def write_scripted_checkpoint(
    folder: str | Path, scripts: Sequence[Sequence[str]], after_newline: int, **config_fields
) -> Path:
    """Writes a checkpoint that says ``scripts[i]`` to a prompt whose last character is its tag.

    Args:
        scripts: the pieces of each reply; an end of turn follows.
        after_newline: the script that follows a plain newline, such as ends a forced closing.
    """
    folder = write_tiny_checkpoint(folder, num_layers=1)
    tokenizer, ids = scripted_tokenizer(scripts)
    end = tokenizer.token_to_id("<|im_end|>")
    follows = {tokenizer.token_to_id("\n" + script_tag(i)): row[0] for i, row in enumerate(ids)}
    for row in ids:
        follows |= dict(zip(row, [*row[1:], end], strict=True))
    newline = tokenizer.encode("a\n", add_special_tokens=False).ids[-1]
    follows[newline] = ids[after_newline][0]

    vocab = tokenizer.get_vocab_size()
    config = tiny_config(
        num_layers=1,
        hidden_size=512,
        num_q_heads=16,
        vocab_size=vocab,
        eos_token_id=[2, end],
        torch_dtype="float32",
        **config_fields,
    )
    weights = tiny_weights(config, tied=False, seed=0)
    rng = np.random.default_rng(5)
    embedding = rng.standard_normal((vocab, 512)).astype(np.float32)
    head = np.zeros((vocab, 512), np.float32)
    for token, after in follows.items():
        head[after] += embedding[token]
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name][:] = 0
        elif name.endswith("norm.weight"):
            weights[name][:] = 1
    weights["model.embed_tokens.weight"] = embedding
    weights["lm_head.weight"] = head * (512 / config["dim_model_base"])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    tokenizer.save(str(folder / "tokenizer.json"))
    for name, changes in (
        ("config.json", config),
        ("generation_config.json", {"eos_token_id": [2, end]}),
        ("tokenizer_config.json", {"chat_template": CHAT_TEMPLATE}),
    ):
        path = folder / name
        values = json.loads(path.read_text("utf-8")) | changes
        path.write_text(json.dumps(values, ensure_ascii=False, indent=2), "utf-8")
    return folder
