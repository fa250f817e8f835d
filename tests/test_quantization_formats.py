"""Codes, scales and the values they stand for: pack and unpack, grids, the Hadamard transform."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fd_minicpm41.errors import UsageError
from fd_minicpm41.quantization.formats import (
    LowBitFormat,
    dequantize,
    dequantize_stored,
    hadamard_blocks,
    pack,
    unpack,
)

BITS = (2, 4, 8)


@given(st.data())
def test_pack_and_unpack_are_inverse(data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from(BITS))
    rows, width = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9))
    shape = (rows, width * 8 // bits)
    codes = data.draw(arrays(np.uint8, shape, elements=st.integers(0, 2**bits - 1)))
    packed = pack(codes, bits)
    assert packed.shape == (rows, width) and packed.dtype == np.uint8
    np.testing.assert_array_equal(unpack(packed, bits), codes)
    every_byte = data.draw(arrays(np.uint8, (rows, width)))
    np.testing.assert_array_equal(pack(unpack(every_byte, bits), bits), every_byte)


def test_the_layout_is_low_bits_first() -> None:
    """Written out by hand, so that no change of both directions goes unseen."""
    assert pack(np.array([[0, 1, 2, 3]], np.uint8), 2).tolist() == [[0b11_10_01_00]]
    assert pack(np.array([[5, 12]], np.uint8), 4).tolist() == [[0xC5]]
    assert pack(np.array([[200]], np.uint8), 8).tolist() == [[200]]


def test_pack_refuses_what_does_not_fit() -> None:
    with pytest.raises(UsageError, match="a row of 6 codes of 2 bits .* a multiple of 4"):
        pack(np.zeros((1, 6), np.uint8), 2)
    with pytest.raises(UsageError, match="a code is 4, wanted less than 4"):
        pack(np.full((1, 4), 4, np.uint8), 2)


@pytest.mark.parametrize(
    ("fmt", "values"),
    [
        (LowBitFormat(2, 64, 3), [-1.5, -0.5, 0.5, 1.5]),
        (LowBitFormat(2, 64, 2), [-1, 0, 1]),
        (LowBitFormat(4, 64, 16), list(range(-8, 8))),
        (LowBitFormat(8, 64, 256), list(range(-127, 128))),
    ],
)
def test_levels(fmt: LowBitFormat, values: list[float]) -> None:
    used = np.arange(fmt.min_code, fmt.max_code + 1, dtype=np.uint8)
    codes = np.resize(used, (1, 64 * -(-len(used) // 64)))
    scales = np.full((1, codes.shape[1] // 64), 0.5, ml_dtypes.bfloat16)
    got = dequantize(pack(codes, fmt.bits), scales, fmt)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got[0, : len(used)], np.array(values, np.float32) * 0.5)


@pytest.mark.parametrize("bits", BITS)
def test_each_group_has_its_scale(bits: int) -> None:
    rng = np.random.default_rng(bits)
    fmt = LowBitFormat(bits, 64, {2: 3, 4: 16, 8: 256}[bits])
    codes = rng.integers(0, 2**bits, (3, 192)).astype(np.uint8)
    scales = rng.standard_normal((3, 3)).astype(ml_dtypes.bfloat16)
    got = dequantize(pack(codes, bits), scales, fmt)
    for n in range(3):
        for k in range(192):
            wanted = (float(codes[n, k]) - fmt.zero / 2) * float(scales[n, k // 64])
            assert got[n, k] == np.float32(wanted)


@pytest.mark.parametrize("block", [64, 128])
def test_the_hadamard_transform_is_sylvesters_and_undoes_itself(block: int) -> None:
    matrix = np.array([[1.0]])
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    matrix /= block**0.5
    weight = np.random.default_rng(0).standard_normal((5, 2 * block)).astype(np.float32)
    wanted = np.hstack([weight[:, :block] @ matrix, weight[:, block:] @ matrix])
    got = hadamard_blocks(weight, block)
    # log2(block) additions of fp32, each with half a unit in the last place of the sum.
    np.testing.assert_allclose(got, wanted, atol=block**0.5 * np.log2(block) * 2.0**-24)
    np.testing.assert_allclose(
        hadamard_blocks(got, block), weight, atol=block**0.5 * 2 * np.log2(block) * 2.0**-24
    )


def test_dequantize_undoes_the_transform() -> None:
    fmt = LowBitFormat(2, 64, 3, 64)
    rng = np.random.default_rng(1)
    packed = pack(rng.integers(0, 4, (4, 128)).astype(np.uint8), 2)
    scales = rng.random((4, 2)).astype(ml_dtypes.bfloat16)
    stored = dequantize_stored(packed, scales, fmt)
    x = rng.standard_normal((7, 128)).astype(np.float32)
    through_weight = x @ dequantize(packed, scales, fmt).T
    through_input = hadamard_blocks(x, 64) @ stored.T
    np.testing.assert_allclose(through_weight, through_input, atol=1e-4)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((3, 64, 3), "bits is 3, wanted 2, 4 or 8"),
        ((2, 64, 16), "zero is 16 with 2 bits, wanted 3 or 2"),
        ((4, 32, 16), "group is 32 with 4 bits, wanted 64 or 128"),
        ((4, 4096, 16), "group is 4096 with 4 bits"),
        ((8, 0, 256), "group is 0 with 8 bits"),
        ((2, 64, 3, 32), "hadamard is 32, wanted 0, 64 or 128"),
    ],
)
def test_formats_that_do_not_exist(values: tuple[int, ...], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        LowBitFormat(*values)


def test_groups_that_do_not_divide() -> None:
    with pytest.raises(UsageError, match="q_proj has 576 in features, which the group of 128"):
        LowBitFormat(4, 128, 16).check_columns(576, "q_proj")
    with pytest.raises(UsageError, match="q_proj has 576 .* the Hadamard block of 128"):
        LowBitFormat(2, 64, 3, 128).check_columns(576, "q_proj")
    with pytest.raises(UsageError, match="group of 96"):
        LowBitFormat(8, 96, 256).check_columns(192, "lm_head")
    LowBitFormat(8, 576, 256).check_columns(576, "lm_head")
    assert LowBitFormat(2, 64, 3).bits_per_weight == 2.25
