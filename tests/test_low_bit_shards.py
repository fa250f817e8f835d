"""Shards of a low-bit weight, cut as FastDeploy cuts them, multiply to the result of the whole."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from numpy.typing import NDArray

from fd_minicpm41 import ops
from fd_minicpm41.quantization.formats import LowBitFormat, dequantize
from fd_minicpm41.quantization.tiles import tile_scales, tile_weight
from low_bit_checkpoints import FORMATS, round_weight

ROWS, COLUMNS, TOKENS = 96, 512, 5
TERNARY = LowBitFormat(2, 64, 2)
CASES = [*FORMATS.items(), ("ternary", TERNARY)]


def product(x: NDArray, qweight: NDArray, scales: NDArray, fmt: LowBitFormat) -> NDArray:
    def tensor(array: NDArray) -> paddle.Tensor:
        array = np.ascontiguousarray(array)
        is_bf16 = array.dtype.name == "bfloat16"
        plain = paddle.to_tensor(array.astype(np.float32) if is_bf16 else array)
        return plain.astype("bfloat16") if is_bf16 else plain

    tiles = tile_weight(tensor(qweight), fmt.bits), tile_scales(tensor(scales))
    return ops.low_bit_linear(tensor(x), *tiles, fmt, len(qweight)).numpy()


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("method, fmt", CASES, ids=[name for name, _ in CASES])
def test_shards_multiply_to_the_whole(method: str, fmt: LowBitFormat, ranks: int) -> None:
    rng = np.random.default_rng(ranks)
    weight = rng.standard_normal((ROWS, COLUMNS), np.float32)
    x = rng.standard_normal((TOKENS, COLUMNS), np.float32)
    parts = round_weight(weight, fmt, method)
    qweight, scales = parts["qweight"], parts["scales"]
    whole = product(x, qweight, scales, fmt)
    wanted = x @ dequantize(qweight, scales, fmt).T
    assert np.abs(whole - wanted).max() <= 1e-5 * np.abs(wanted).max()

    # By rows, as qkv, gate, up and the head are: every row is the same sum.
    by_rows = [
        product(x, q, s, fmt)
        for q, s in zip(np.split(qweight, ranks), np.split(scales, ranks), strict=True)
    ]
    assert np.array_equal(np.concatenate(by_rows, 1), whole)

    # By columns, as o and down are: whole groups and Hadamard blocks, another order of the sum.
    shards = (np.split(array, ranks, 1) for array in (x, qweight, scales))
    by_columns = [product(*shard, fmt) for shard in zip(*shards, strict=True)]
    assert np.abs(sum(by_columns) - whole).max() <= 1e-5 * np.abs(wanted).max()
