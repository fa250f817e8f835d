"""A Llama GGUF file as a MiniCPM checkpoint: the same weights, the same tokens, all or nothing."""

from __future__ import annotations

import builtins
import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from fd_minicpm41.config import MiniCPMConfig
from fd_minicpm41.errors import UsageError
from fd_minicpm41.reference.checkpoint import load_model
from fd_minicpm41.reference.import_gguf import import_gguf
from fd_minicpm41.reference.tokenizer import Tokenizer
from gguf_files import CONTEXT, SPECIAL, USER_DEFINED, write_tiny_gguf

QUANTIZATIONS = [gguf.GGMLQuantizationType[name] for name in ("F32", "Q8_0", "Q4_1")]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=lambda q: q.name)
def test_weights_are_those_the_file_stands_for(
    tmp_path: Path, tied: bool, quantization: gguf.GGMLQuantizationType
) -> None:
    wanted = write_tiny_gguf(tmp_path / "m.gguf", tied=tied, quantization=quantization)
    told: list[tuple[int, int]] = []
    import_gguf(tmp_path / "m.gguf", tmp_path / "out", lambda *at: told.append(at))
    got = load_file(tmp_path / "out/model.safetensors")
    assert set(got) == set(wanted)
    for name, array in wanted.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)
    assert told[-1] == (len(wanted), len(wanted))
    model = load_model(tmp_path / "out")
    assert (model.lm_head is model.model.embed_tokens) == tied


def test_every_scaling_is_a_product_with_one(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "m.gguf")
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    config = MiniCPMConfig.from_pretrained(tmp_path / "out")
    assert (config.scale_emb, config.residual_scale, config.logits_scale) == (1, 1.0, 1.0)
    assert config.rope_scaling is not None
    assert set(config.rope_scaling.long_factor + config.rope_scaling.short_factor) == {1.0}
    assert config.max_context == CONTEXT
    assert config.sparse is None


def test_tokenizer_and_template_come_from_the_metadata(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "m.gguf")
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = Tokenizer(tmp_path / "out")
    assert tokenizer.bos_id is None
    assert tokenizer.stop_ids == {SPECIAL.index("<|im_end|>")}
    ids = tokenizer.encode_chat([{"role": "user", "content": "the 12"}])
    assert ids[0] == SPECIAL.index("<|im_start|>")
    assert tokenizer.decode(ids) == "user\nthe 12\nassistant\n"
    size = 256 + len(SPECIAL) + 1
    assert tokenizer.encode("the") == [size + 1]
    assert tokenizer.encode(f"a{USER_DEFINED}")[1:] == [len(SPECIAL)]
    assert tokenizer.decode(tokenizer.encode(f"é{USER_DEFINED}🙂")) == f"é{USER_DEFINED}🙂"


def refusal(tmp_path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "m.gguf") == []
    return str(caught.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"arch": "qwen2"}, "the GGUF architecture is 'qwen2', wanted 'llama'"),
        ({"rope_dimension_count": 8}, "rotates a part of each head only"),
        ({"rope_scaling_type": "yarn"}, "scales RoPE by 'yarn'"),
        ({"tokenizer_model": "llama"}, "has the tokenizer 'llama'"),
        ({"tokenizer_pre": "qwen2"}, "with 'qwen2' pre-tokenization"),
        ({"with_tokens": False}, "has no tokenizer.ggml.tokens"),
        ({"leave_out": ("blk.1.ffn_up.weight",)}, "tensors blk.1.ffn_up.weight are missing"),
        ({"extra_tensors": {"rope_freqs.weight": np.ones(8, np.float32)}}, "rope_freqs.weight"),
        ({"feed_forward_length": 128}, "blk.0.ffn_gate.weight is [96, 64], wanted [128, 64]"),
    ],
)
def test_what_is_not_a_plain_llama(tmp_path: Path, fields: dict, said: str) -> None:
    write_tiny_gguf(tmp_path / "m.gguf", **fields)
    assert said in refusal(tmp_path)


def test_no_file_another_file_and_a_cut_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.gguf"
    assert "does not exist" in refusal(tmp_path)
    write_tiny_gguf(path)
    whole = path.read_bytes()
    for content in (b"", b"no such thing", whole[:300], whole[: len(whole) // 2]):
        path.write_bytes(content)
        assert "is no GGUF file, or cut short" in refusal(tmp_path)
    real_import = builtins.__import__

    def without_gguf(name: str, *args: object, **kwargs: object) -> object:
        if name == "gguf":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without_gguf)
    assert "pip install 'fd-minicpm41[demo]'" in refusal(tmp_path)


def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    """The kernel refuses to write on in the middle of the weights, as on a full disk."""
    write_tiny_gguf(tmp_path / "m.gguf")
    limited = (
        "import resource, sys; from fd_minicpm41.cli import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000));"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", limited, "import-gguf", "m.gguf", "--out", "out"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("fd-minicpm41: error: ")
    assert "File too large" in result.stderr and "free some space" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_the_written_configuration_is_plain_json(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "m.gguf")
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["MiniCPMForCausalLM"]
    assert config["torch_dtype"] == "float32"
    assert config["tie_word_embeddings"] is True
