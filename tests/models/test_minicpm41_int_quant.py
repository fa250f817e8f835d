"""Each weight format through unmodified FastDeploy: what is chosen, held, and multiplied.

A CPU runs our own kernels' CPU side for real. FastDeploy's own formats (wint8, wint4 and fp8 of a
bf16 checkpoint, on a GPU) run as far as its Python goes, on reference ops; Paddle's weight-only
product has no CPU side at all, so of it the chosen method and the bytes are checked here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from checkpoints import write_tiny_checkpoint
from fd_minicpm41.quantization.formats import LowBitFormat, dequantize
from fd_minicpm41.quantization.tiles import untile_scales, untile_weight
from host.host import HERE, host_environment, missing_host
from host.load_quantized import NUM_ROWS, rows
from low_bit_checkpoints import FORMATS, make_ternary, read_weights, restored, write_low_bit

pytestmark = [
    pytest.mark.host,
    pytest.mark.slow,
    pytest.mark.skipif(missing_host() is not None, reason=str(missing_host())),
]

Arrays = dict[str, Any]
LAYER = "model.layers.0."
# FastDeploy's layer, and the parts of it in a checkpoint.
LAYERS = {
    f"{LAYER}self_attn.qkv_proj": [f"{LAYER}self_attn.{n}_proj" for n in "qkv"],
    f"{LAYER}self_attn.o_proj": [f"{LAYER}self_attn.o_proj"],
    f"{LAYER}mlp.up_gate_proj": [f"{LAYER}mlp.{n}_proj" for n in ("gate", "up")],
    f"{LAYER}mlp.down_proj": [f"{LAYER}mlp.down_proj"],
}
# fp32 sums of at most 512 products in another order than NumPy's: relative to the largest output.
SAME_SUM = 1e-5


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("int_quant")


@pytest.fixture(scope="module")
def bf16(work: Path) -> Path:
    return write_tiny_checkpoint(
        work / "bf16", num_layers=1, hidden_size=512, intermediate_size=256, num_q_heads=16
    )


def run(folder: Path, quantization: str, **variables: str) -> subprocess.CompletedProcess[str]:
    work = folder.parent
    return subprocess.run(
        [sys.executable, str(HERE / "load_quantized.py"), str(folder), "loaded.npz", quantization],
        cwd=work,
        env=host_environment(work, **variables),
        capture_output=True,
        text=True,
        timeout=240,
    )


@cache
def loaded(folder: Path, quantization: str, sm_version: int = 0, **variables: str) -> Arrays:
    """What ``load_quantized.py`` saves, layers unpacked, and ``log``: the line that we log."""
    if sm_version:
        # FastDeploy's own switches: the layout Paddle packs for, and its own rounding of tokens.
        variables |= {
            "FD_MINICPM41_TEST_SM": str(sm_version),
            "FLAGS_weight_only_linear_arch": "80",
            "FD_USE_PHI_FP8_QUANT": "0",
        }
    result = run(folder, quantization, **variables)
    assert result.returncode == 0, result.stderr[-4000:]
    with np.load(folder.parent / "loaded.npz") as file:
        arrays: Arrays = dict(file)
    arrays["layers"] = json.loads(str(arrays["layers"]))
    arrays["chosen"] = json.loads(str(arrays["chosen"]))
    (arrays["log"],) = (
        line.split("weights: ")[1]
        for line in (result.stdout + result.stderr).splitlines()
        if "fd_minicpm41: weights: " in line
    )
    return arrays


def refused(folder: Path, quantization: str, **variables: str) -> str:
    result = run(folder, quantization, **variables)
    assert result.returncode != 0
    (line,) = (x for x in result.stderr.splitlines() if "fd_minicpm41: error: " in x)
    return line


def held(arrays: Arrays, layer: str) -> NDArray[np.float32]:
    """The weight ``[N, K]`` that a layer of ours holds, from its tiles."""
    fmt = LowBitFormat(**arrays["layers"][layer][1])
    rows_, columns = shape_of(arrays, layer)
    qweight = untile_weight(arrays[f"{layer}.qweight"], fmt.bits, rows_, columns)
    return dequantize(qweight, untile_scales(arrays[f"{layer}.scales"], rows_), fmt)


def shape_of(arrays: Arrays, layer: str) -> tuple[int, int]:
    """Out and in features."""
    columns = 256 if layer.endswith("down_proj") else 512
    return arrays[f"{layer}@1"].shape[1], columns


def merged(weights: dict[str, NDArray[np.float32]], layer: str) -> NDArray[np.float32]:
    """The parts of FastDeploy's layer one above the other, as a checkpoint has them."""
    return np.concatenate([weights[f"{part}.weight"] for part in LAYERS[layer]])


def rounded_tokens(x: NDArray[np.float32], method: str) -> NDArray[np.float64]:
    """What w4a8 and w4afp8 make of more tokens than the decode kernels take."""
    largest = np.float32(127 if method == "w4a8" else 448)
    scales = np.abs(x).max(-1, keepdims=True) / largest
    dtype = ml_dtypes.float8_e4m3fn if method == "w4afp8" else np.float32
    rounded = np.rint(x / scales) if method == "w4a8" else (x / scales).astype(dtype)
    return rounded.astype(np.float64) * scales


def assert_products(arrays: Arrays, layer: str, weight: NDArray[np.float32], method: str) -> None:
    """One token and 65: the decode kernels' side, and the one beyond them."""
    for count in NUM_ROWS:
        x = rows(weight.shape[1])[:count].astype(np.float64)
        if method in ("w4a8", "w4afp8") and count > 64:
            x = rounded_tokens(x.astype(np.float32), method)
        wanted = x @ weight.T.astype(np.float64)
        error = np.abs(arrays[f"{layer}@{count}"] - wanted).max()
        assert error <= SAME_SUM * np.abs(wanted).max(), (layer, count)


def assert_bytes(arrays: Arrays, layer: str, fmt: LowBitFormat, method: str) -> None:
    """Exactly the format's bytes, and no 16-bit weight beside them."""
    rows_, columns = shape_of(arrays, layer)
    assert arrays[f"{layer}.qweight"].nbytes == rows_ * columns * fmt.bits // 8
    assert arrays[f"{layer}.scales"].size == rows_ * columns // fmt.group
    assert f"{layer}.weight" not in arrays
    has_channels = method in ("w4a8", "w4afp8")
    assert (f"{layer}.channel_scales" in arrays) is has_channels
    if has_channels:
        assert arrays[f"{layer}.channel_scales"].shape == (rows_,)


# Relative error of the whole weight (Gaussian): a step of largest / 127 in groups of 128 is 0.7 %,
# one of about largest / 7.5 some 11 %, and a little more where scales are not free.
ROUNDING = {"wint8": 0.01, "wint4": 0.13, "w4a8": 0.15, "w4afp8": 0.18}


@pytest.mark.parametrize("method", list(ROUNDING))
def test_a_bf16_checkpoint_is_rounded_as_it_is_loaded(bf16: Path, method: str) -> None:
    arrays, weights = loaded(bf16, method.upper()), read_weights(bf16)
    assert arrays["chosen"] == {"quantization": f"fdm_{method}"}
    assert str(arrays["loader"]) == "default_v1"
    fmt = LowBitFormat(8, 128, 256) if method == "wint8" else LowBitFormat(4, 128, 16)
    assert arrays["layers"] == {layer: ["RoundingLinearMethod", vars(fmt)] for layer in LAYERS}
    assert arrays["log"] == (
        f"4 layers of {method}: {fmt.bits} bits in groups of 128 by fd_minicpm41's kernels"
    )
    for layer in LAYERS:
        assert_bytes(arrays, layer, fmt, method)
        weight, original = held(arrays, layer), merged(weights, layer)
        error = np.linalg.norm(weight - original) / np.linalg.norm(original)
        assert 0 < error < ROUNDING[method]
        assert_products(arrays, layer, weight, method)
    # Embedding, norms and head stay as they are.
    embedding = arrays["model.embed_tokens.embeddings.weight"]
    stored = weights["model.embed_tokens.weight"]
    assert np.array_equal(embedding[: len(stored)], stored)


def test_w4a8_and_w4afp8_hold_what_8_bit_products_take_exactly(bf16: Path) -> None:
    for method, largest in (("w4a8", 127), ("w4afp8", 448)):
        arrays = loaded(bf16, method.upper())
        for layer in LAYERS:
            rows8 = held(arrays, layer) / arrays[f"{layer}.channel_scales"][:, None]
            assert np.abs(rows8).max() <= largest
            exact = ml_dtypes.float8_e4m3fn if method == "w4afp8" else np.int8
            assert np.array_equal(rows8.astype(exact).astype(np.float32), rows8)


def test_wint2_of_a_ternary_checkpoint_is_lossless(bf16: Path, work: Path) -> None:
    folder = make_ternary(bf16, work / "ternary" / "c", group=128)
    arrays, weights = loaded(folder, '{"quantization": "wint2"}'), read_weights(folder)
    assert arrays["chosen"] == {"quantization": "fdm_wint2"}
    assert str(arrays["loader"]) == "default_v1"
    fmt = LowBitFormat(2, 128, 2)
    assert arrays["layers"] == {layer: ["RoundingLinearMethod", vars(fmt)] for layer in LAYERS}
    assert "2 bits (ternary) in groups of 128" in arrays["log"]
    for layer in LAYERS:
        assert_bytes(arrays, layer, fmt, "wint2")
        assert np.array_equal(held(arrays, layer), merged(weights, layer))
        assert_products(arrays, layer, merged(weights, layer), "wint2")


def test_wint2_of_any_other_needs_a_word(bf16: Path) -> None:
    line = refused(bf16, "wint2")
    assert "is not ternary" in line and "fd-minicpm41 quantize" in line
    arrays = loaded(bf16, "wint2", FD_MINICPM41_DATA_FREE_WINT2="1")
    fmt = LowBitFormat(2, 64, 3)
    assert arrays["layers"] == {layer: ["RoundingLinearMethod", vars(fmt)] for layer in LAYERS}
    for layer in LAYERS:
        assert_bytes(arrays, layer, fmt, "wint2")
        assert_products(arrays, layer, held(arrays, layer), "wint2")


@pytest.mark.parametrize("method", list(FORMATS))
def test_stored_weights_are_served_as_they_are(bf16: Path, work: Path, method: str) -> None:
    """Nothing is named; the head and the embedding are stored with 8 bits a weight."""
    vocabulary = ("model.embed_tokens", "lm_head")
    folder = write_low_bit(bf16, work / f"stored_{method}" / "c", method, rows_8_bit=vocabulary)
    arrays, weights = loaded(folder, ""), restored(folder)
    assert arrays["chosen"] == {"quantization": f"fdm_{method}", "is_quantized": True}
    assert str(arrays["loader"]) == "default_v1"
    fmt, head = FORMATS[method], LowBitFormat(8, 512, 256)
    methods = {layer: ["StoredLinearMethod", vars(fmt)] for layer in LAYERS}
    assert arrays["layers"] == methods | {"lm_head.linear": ["StoredLinearMethod", vars(head)]}
    for layer in LAYERS:
        assert_bytes(arrays, layer, fmt, method)
        # A Hadamard transform is undone in fp32 on both sides, in different orders of the sum.
        assert np.allclose(held(arrays, layer), merged(weights, layer), atol=1e-6)
        assert_products(arrays, layer, merged(weights, layer), method)
    embedding = weights["model.embed_tokens.weight"]
    assert np.array_equal(arrays["embedded"], embedding[[0, 1, 257, 5]])
    assert arrays["model.embed_tokens.embeddings.qweight"].nbytes == embedding.size
    wanted = rows(512) / 16 @ weights["lm_head.weight"].T
    error = np.abs(arrays["logits"] - wanted).max()
    assert error <= SAME_SUM * np.abs(wanted).max()


@pytest.mark.parametrize("rows_8_bit", [(), ("model.embed_tokens",)], ids=["bf16", "8 bits"])
def test_bits_may_differ_by_layer_and_the_head_be_the_embedding(
    tmp_path: Path, rows_8_bit: tuple[str, ...]
) -> None:
    tied = write_tiny_checkpoint(
        tmp_path / "tied",
        num_layers=1,
        hidden_size=512,
        intermediate_size=256,
        num_q_heads=16,
        tied=True,
    )
    formats = {
        "down_proj": LowBitFormat(4, 64, 16, 64),
        "o_proj": None,
        "gate_proj": LowBitFormat(2, 128, 3),
        "up_proj": LowBitFormat(2, 128, 3),
    }
    folder = write_low_bit(tied, tmp_path / "mixed" / "c", "wint2", formats, rows_8_bit)
    arrays, weights = loaded(folder, "wint2"), restored(folder)
    kinds = {name.rpartition(".")[2]: kind for name, (kind, _) in arrays["layers"].items()}
    assert kinds.pop("o_proj") == "UnquantizedLinearMethod"
    assert set(kinds.values()) == {"StoredLinearMethod"}
    assert ("linear" in kinds) is bool(rows_8_bit)
    for layer in LAYERS:
        method = "wint4" if layer.endswith("down_proj") else "wint2"
        assert_products(arrays, layer, merged(weights, layer), method)
    assert "1 layers of 16 bits" in arrays["log"]
    wanted = rows(512) / 16 @ weights["model.embed_tokens.weight"].T
    error = np.abs(arrays["logits"][:, : wanted.shape[1]] - wanted).max()
    assert error <= SAME_SUM * np.abs(wanted).max()


# FastDeploy's own methods, as they are chosen on a GPU.


@pytest.mark.parametrize("method, bits", [("wint8", 8), ("wint4", 4)])
def test_hopper_has_fastdeploys_machete(bf16: Path, method: str, bits: int) -> None:
    arrays, weights = loaded(bf16, method, 90), read_weights(bf16)
    assert arrays["layers"] == {layer: ["MacheteWeightOnlyLinearMethod", None] for layer in LAYERS}
    assert "in groups of 128 by FastDeploy's Machete" in arrays["log"]
    for layer in LAYERS:
        rows_, columns = shape_of(arrays, layer)
        words = arrays[f"{layer}.weight"].view(np.uint32)
        assert words.nbytes == rows_ * columns * bits // 8
        codes = np.stack([words >> i & 2**bits - 1 for i in range(0, 32, bits)], -1)
        levels = codes.reshape(rows_, columns).astype(np.float32) - 2 ** (bits - 1)
        scales = arrays[f"{layer}.weight_scale"].T
        weight = levels * np.repeat(scales, 128, 1)
        # Rounded to nearest: no weight is further off than half a step of its group.
        assert (np.abs(weight - merged(weights, layer)) <= np.repeat(scales, 128, 1) * 0.5001).all()
        assert_products(arrays, layer, weight, method)


def test_other_gpus_have_fastdeploys_wint8(bf16: Path) -> None:
    arrays = loaded(bf16, "wint8", 80)
    assert arrays["layers"] == {layer: ["GPUWeightOnlyLinearMethod", None] for layer in LAYERS}
    for layer, parts in LAYERS.items():
        weight, scales = arrays[f"{layer}.weight"], arrays[f"{layer}.weight_scale"]
        assert weight.dtype == np.int8 and scales.shape == (weight.shape[0],)
        assert weight.size == sum(read_weights(bf16)[f"{part}.weight"].size for part in parts)


def test_other_gpus_have_wint4_in_groups(bf16: Path) -> None:
    """FastDeploy alone has one scale a row there."""
    arrays, weights = loaded(bf16, "wint4", 80), read_weights(bf16)
    assert arrays["layers"] == {layer: ["GroupwiseLinearMethod", None] for layer in LAYERS}
    assert arrays["log"] == "4 layers of wint4: 4 bits in groups of 128 by Paddle's kernels"
    for layer in LAYERS:
        weight = merged(weights, layer)
        groups = weight.reshape(len(weight), -1, 128)
        scales = arrays[f"{layer}.weight_scale"].T
        # bf16 of the largest weight over 7.
        assert np.allclose(scales, np.abs(groups).max(-1) / 7, rtol=2**-8)
        codes = arrays[f"{layer}.weight"].view(np.uint8)
        assert codes.size == weight.size // 2
        # Paddle permutes the codes for its kernels: they are the same ones, with a few halves
        # rounded to the other side.
        found = np.bincount(np.concatenate([codes.ravel() & 15, codes.ravel() >> 4]), minlength=16)
        levels = np.rint(groups / scales[:, :, None]).astype(int) + 8
        wanted = np.bincount(levels.ravel(), minlength=16)
        assert np.abs(found - wanted).sum() <= 0.01 * weight.size


def test_fp8_of_an_ada_gpu_has_a_scale_a_row(bf16: Path) -> None:
    arrays, weights = loaded(bf16, "FP8", 89), read_weights(bf16)
    assert arrays["layers"] == {layer: ["WFP8AFP8LinearMethod", None] for layer in LAYERS}
    for layer in LAYERS:
        weight = arrays[f"{layer}.weight"] * arrays[f"{layer}.weight_scale"].reshape(-1, 1)
        assert_fp8(arrays, layer, weight, merged(weights, layer))


def test_fp8_of_a_hopper_gpu_has_a_scale_a_block(bf16: Path) -> None:
    arrays, weights = loaded(bf16, "fp8", 90), read_weights(bf16)
    assert arrays["layers"] == {layer: ["BlockWiseFP8LinearMethod", None] for layer in LAYERS}
    for layer in LAYERS:
        rows_, columns = shape_of(arrays, layer)
        blocks = arrays[f"{layer}.weight_scale_inv"]
        assert blocks.shape == (-(-rows_ // 128), columns // 128)
        scales = np.repeat(np.repeat(blocks, 128, 0), 128, 1)[:rows_]
        assert_fp8(arrays, layer, arrays[f"{layer}.weight"] * scales, merged(weights, layer))


def assert_fp8(
    arrays: Arrays, layer: str, weight: NDArray[np.float32], original: NDArray[np.float32]
) -> None:
    """e4m3 is off by a 16th at most, on average by a 40th; tokens are rounded to it as well."""
    held_values = arrays[f"{layer}.weight"]
    assert np.array_equal(held_values.astype(ml_dtypes.float8_e4m3fn), held_values)
    assert 0 < np.linalg.norm(weight - original) / np.linalg.norm(original) < 1 / 30
    for count in NUM_ROWS:
        wanted = rows(weight.shape[1])[:count] @ weight.T
        error = np.linalg.norm(arrays[f"{layer}@{count}"] - wanted) / np.linalg.norm(wanted)
        assert 1e-3 < error < 1 / 30


def test_fp8_is_refused_where_a_gpu_has_none(bf16: Path) -> None:
    result = run(bf16, "fp8")
    assert result.returncode != 0
    (line,) = (x for x in result.stderr.splitlines() if "UsageError: " in x)
    assert (
        "fp8 needs a GPU that multiplies fp8" in line and "this one has 8.0: choose wint8" in line
    )
