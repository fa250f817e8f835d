"""Unmodified FastDeploy serves low-bit weights: the tokens are those of the dequantised model."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import SMALL_SPARSE_CONFIG, write_tiny_checkpoint
from host.greedy import assert_greedy, expected_tokens, random_prompt
from host.host import missing_host, offline_engine, run_script, server
from low_bit_checkpoints import (
    FORMATS,
    LINEAR,
    copy_checkpoint,
    make_ternary,
    read_weights,
    write_low_bit,
    write_restored,
)

pytestmark = [
    pytest.mark.host,
    pytest.mark.slow,
    pytest.mark.skipif(missing_host() is not None, reason=str(missing_host())),
]

# A step of at most 64 tokens takes the decode kernels' side, where activations are not rounded.
SHORT_STEPS = {"max_num_batched_tokens": 64}
PROMPT_LENS = (1, 63, 65, 300)
SMOLLM2 = Path(__file__).parents[2] / ".demo" / "smollm2-135m-instruct"
VOCABULARY = ("model.embed_tokens", "lm_head")


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bf16") / "checkpoint"
    return write_tiny_checkpoint(folder, hidden_size=1024, intermediate_size=512)


def quantise(source: Path, folder: Path, method: str, *options: str) -> None:
    """``fd-minicpm41 quantize`` by rounding, as a user runs it."""
    command = shutil.which("fd-minicpm41")
    assert command is not None
    arguments = ["--model", str(source), "--out", str(folder), "--method", method, "--algo", "rtn"]
    done = subprocess.run(
        [command, "quantize", *arguments, *options], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr


def assert_serves(
    folder: Path, reference: Path, log: Path, attention: str = "dense", **options: Any
) -> str:
    """Greedy tokens are the reference's; returns what the processes logged."""
    prompts = [random_prompt(n, seed=n) for n in PROMPT_LENS]
    with offline_engine(folder, log, **(SHORT_STEPS | options)) as engine:
        for prompt, reply in zip(prompts, engine.generate(prompts, max_tokens=16), strict=True):
            assert_greedy(reply["token_ids"], reference, prompt, 16, attention)
        return engine.logs()


@pytest.mark.parametrize("method", list(FORMATS))
def test_stored_weights(bf16: Path, tmp_path: Path, method: str) -> None:
    folder = write_low_bit(bf16, tmp_path / "checkpoint", method)
    assert_serves(folder, write_restored(folder, tmp_path / "reference"), tmp_path / "log")


@pytest.mark.parametrize("method", ["wint2", "w4a8", "wint8"])
def test_two_ranks(tmp_path: Path, method: str) -> None:
    """Two real processes that share rows of qkv, gate, up and head, columns of o and down."""
    bf16 = write_tiny_checkpoint(
        tmp_path / "bf16",
        hidden_size=1024,
        intermediate_size=512,
        sparse_config=SMALL_SPARSE_CONFIG,
    )
    folder = write_low_bit(bf16, tmp_path / "checkpoint", method, rows_8_bit=VOCABULARY)
    reference = write_restored(folder, tmp_path / "reference")
    assert_serves(folder, reference, tmp_path / "log", "infllmv2", tensor_parallel_size=2)


@pytest.mark.parametrize("method", ["wint4", "w4afp8"])
def test_what_the_command_writes(bf16: Path, tmp_path: Path, method: str) -> None:
    folder = tmp_path / "checkpoint"
    quantise(bf16, folder, method, "--lm-head", "int8", "--embedding", "int8")
    assert_serves(folder, folder, tmp_path / "log")


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="SmolLM2 is not here: run make demo-smollm2 first")
def test_smollm2_in_4_bits(tmp_path: Path) -> None:
    """A real model, whose head is its embedding, both in 8 bits."""
    from tokenizers import Tokenizer

    folder = tmp_path / "checkpoint"
    options = ("--group", "64", "--lm-head", "int8", "--embedding", "int8")
    quantise(SMOLLM2, folder, "wint4", *options)
    text = "Once upon a time there was a king who had twelve daughters, each more beautiful. "
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text * 9).ids
    with offline_engine(folder, tmp_path / "log") as engine:
        for prompt in (ids[:1], ids[:65], ids[:150]):
            (reply,) = engine.generate([prompt], max_tokens=16)
            assert_greedy(reply["token_ids"], folder, prompt, 16)


def test_ternary_weights_by_the_variable(bf16: Path, tmp_path: Path) -> None:
    """Nothing is lost: the reference is the bf16 checkpoint itself."""
    folder = make_ternary(bf16, tmp_path / "ternary", group=128)
    prompts = [random_prompt(n, seed=n) for n in PROMPT_LENS]
    with offline_engine(folder, tmp_path / "log", variables={"FD_QUANT_TYPE": "WINT2"}) as engine:
        for prompt, reply in zip(prompts, engine.generate(prompts, max_tokens=16), strict=True):
            assert_greedy(reply["token_ids"], folder, prompt, 16)


@pytest.mark.parametrize("method, ranks", [("wint4", 1), ("w4a8", 2), ("w4afp8", 2)])
def test_rounded_as_it_is_loaded(bf16: Path, tmp_path: Path, method: str, ranks: int) -> None:
    """On two ranks as on one: also where a row's scale is that of both ranks' columns."""
    import paddle

    from fd_minicpm41.quantization.rtn import quantise_rtn, restore

    tensors, fmt = read_weights(bf16), FORMATS[method]
    for name, weight in tensors.items():
        if any(f".{linear}." in name for linear in LINEAR):
            columns = paddle.to_tensor(np.ascontiguousarray(weight.T))
            codes, scales, _ = quantise_rtn(columns, fmt, method)
            tensors[name] = restore(codes, scales, fmt).numpy().T.copy()
    reference = copy_checkpoint(bf16, tmp_path / "reference", tensors)
    options = {"quantization": {"quantization": method}, "tensor_parallel_size": ranks}
    assert_serves(bf16, reference, tmp_path / "log", **options)


def test_long_steps_of_w4a8_round_their_tokens(bf16: Path, tmp_path: Path) -> None:
    """A whole prompt at once: 8-bit activations, and so nearly the reference's tokens."""
    folder = write_low_bit(bf16, tmp_path / "checkpoint", "w4a8")
    reference = write_restored(folder, tmp_path / "reference")
    prompts = [random_prompt(200, seed=seed) for seed in range(6)]
    with offline_engine(folder, tmp_path / "log") as engine:
        replies = engine.generate(prompts, max_tokens=2)
    pairs = zip(prompts, replies, strict=True)
    same = sum(r["token_ids"][0] == expected_tokens(reference, p, 2)[0] for p, r in pairs)
    # The first token follows the rounded prompt. Rounding moves a random model's logits by about a
    # hundredth of their spread, so that close calls may differ and clear ones may not.
    assert same >= 4


class TestCommandLine:
    def refuse(self, folder: Path, log: Path, *arguments: str, **variables: str) -> str:
        with server(folder, log, arguments, healthy=False, variables=variables) as started:
            output = started.wait_for_end(120)
        lines = [x for x in output.splitlines() if x.startswith("fd_minicpm41: error: ")]
        assert len(lines) == 1, output
        return lines[0]

    def test_wint2_says_how_to_quantise(self, bf16: Path, tmp_path: Path) -> None:
        line = self.refuse(bf16, tmp_path, "--quantization", "wint2")
        assert "is not ternary" in line and "fd-minicpm41 quantize" in line

    def test_another_format_than_the_stored_one(self, bf16: Path, tmp_path: Path) -> None:
        folder = write_low_bit(bf16, tmp_path / "checkpoint", "wint8")
        line = self.refuse(folder, tmp_path / "log", FD_QUANT_TYPE="wint4")
        assert "FD_QUANT_TYPE is 'wint4'" in line and "stored as wint8" in line

    def test_more_than_a_name(self, bf16: Path, tmp_path: Path) -> None:
        asked = {"quantization": "wint4", "kv_cache_quant_type": "int8"}
        line = self.refuse(bf16, tmp_path, "--quantization", json.dumps(asked))
        assert "wanted the name alone" in line


OTHER_MODEL = """
from fastdeploy.engine.args_utils import EngineArgs
from fastdeploy.model_executor.layers import quantization
from fastdeploy.utils import parse_quantization

def engine(asked):
    args = EngineArgs(
        model=MODEL, quantization=asked,
        max_model_len=512, max_num_seqs=4, max_num_batched_tokens=512,
    )
    return args.create_engine_config().model_config.quantization

assert engine(None) is None
for name in ("wint2", "wint4", "w4a8", "w4afp8"):
    assert engine(parse_quantization(name)) == {"quantization": name}
from fastdeploy.model_executor.layers.quantization.wint2 import WINT2Config
from fastdeploy.model_executor.layers.quantization.w4a8 import W4A8Config
assert quantization.get_quantization_config("wint2") is WINT2Config
assert quantization.get_quantization_config("w4a8") is W4A8Config
try:
    quantization.get_quantization_config("fp8")
except ValueError as error:
    assert "Invalid quantization method" in str(error)
else:
    raise AssertionError("fp8 is no name of FastDeploy's")
print("UNTOUCHED")
"""


def test_another_model_is_served_as_without_us(tmp_path: Path) -> None:
    """The names keep FastDeploy's meaning, and our variable means nothing."""
    folder = write_tiny_checkpoint(
        tmp_path / "qwen2", hidden_size=1024, architectures=["Qwen2ForCausalLM"], model_type="qwen2"
    )
    code = OTHER_MODEL.replace("MODEL", repr(str(folder)))
    result = run_script(code, tmp_path, variables={"FD_QUANT_TYPE": "WINT2"})
    assert result.returncode == 0 and "UNTOUCHED" in result.stdout, result.stderr[-3000:]
