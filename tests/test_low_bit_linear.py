"""The product with low-bit weights: against the dequantised weight within the error budget, tiles
and their inverse, rows for the framework's product, and refusals."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import paddle
import pytest
from numpy.typing import NDArray

import capi
from accuracy import assert_within_budget, assert_within_one_step
from cases import DTYPES
from cpu_ops import instruction_set
from fd_minicpm41 import ops
from fd_minicpm41.quantization import tiles
from fd_minicpm41.quantization.formats import (
    LowBitFormat,
    dequantize,
    hadamard_blocks,
    pack,
    unpack,
)
from low_bit_cases import (
    FORMATS,
    TOKENS,
    Weight,
    exact_rows,
    framework_linear,
    make_exact_weight,
    make_weight,
    make_x,
)

WHOLE_ROW = LowBitFormat(8, 192, 256, 64)
# Neither fills its last tile of rows; the second does not fill its last tile of columns.
SHAPES = ((40, 256), (73, 1152))


def linear(weight: Weight, x: NDArray, dtype: str) -> NDArray:
    """Through the C interface; what is not written stays NaN."""
    qweight, scales = weight.tiles()
    out = np.full((x.shape[0], weight.shape[0]), np.nan, x.dtype)
    view = capi.weight_of(qweight, scales, weight.fmt, weight.shape)
    capi.run_cpu(capi.low_bit_linear_params(x, view, out, dtype))
    return out


def rows_of(weight: Weight, dtype: str, first: int = 0, count: int | None = None) -> NDArray:
    qweight, scales = weight.tiles()
    kinds = DTYPES | {"int8": np.int8, "float8_e4m3fn": ml_dtypes.float8_e4m3fn}
    shape = (weight.shape[0] - first if count is None else count, weight.shape[1])
    out = np.full(shape, 77, kinds[dtype])
    view = capi.weight_of(qweight, scales, weight.fmt, weight.shape)
    channel_scales = weight.channel_scales if dtype in ("int8", "float8_e4m3fn") else None
    capi.run_cpu(capi.expand_low_bit_weight_params(view, out, dtype, channel_scales, first))
    return out


# ---- the product ----


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_equals_the_dequantised_product(fmt: LowBitFormat, dtype: str) -> None:
    for shape in SHAPES:
        weight = make_weight(fmt, *shape)
        plain = weight.plain()
        for tokens in (*TOKENS, 65, 512):
            x = make_x(tokens, shape[1], dtype, tokens)
            got = linear(weight, x, dtype)
            truth = x.astype(np.float64) @ plain.T
            what = f"{tokens} tokens by {shape}"
            assert_within_budget(got, truth, framework_linear(x, plain), dtype, what)


def test_one_scale_a_row_and_columns_that_end_inside_a_tile() -> None:
    weight = make_weight(WHOLE_ROW, 50, 192)
    x = make_x(9, 192, "float32")
    truth = x.astype(np.float64) @ weight.plain().T
    got = linear(weight, x, "float32")
    assert_within_budget(got, truth, framework_linear(x, weight.plain()), "float32")


@pytest.mark.parametrize("fmt", [f for f in FORMATS if not f.hadamard], ids=str)
def test_one_column_comes_out_as_it_is(fmt: LowBitFormat) -> None:
    weight = make_weight(fmt, 33, 256)
    x = np.eye(256, dtype=np.float32)
    np.testing.assert_array_equal(linear(weight, x, "float32").T, weight.plain())


def test_a_token_alone_and_in_a_crowd_bitwise() -> None:
    weight = make_weight(FORMATS[0], 40, 256)
    x = make_x(300, 256, "bfloat16")
    together = linear(weight, x, "bfloat16")
    for token in (0, 1, 15, 16, 255, 256, 299):
        alone = linear(weight, x[token : token + 1].copy(), "bfloat16")[0]
        np.testing.assert_array_equal(alone.view(np.uint16), together[token].view(np.uint16))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_instruction_sets_and_thread_counts(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = make_weight(FORMATS[4], 73, 256)
    x = make_x(5, 256, "float32")
    with instruction_set(isa, monkeypatch):
        wanted = linear(weight, x, "float32")
    plain = weight.plain()
    truth = x.astype(np.float64) @ plain.T
    assert_within_budget(wanted, truth, framework_linear(x, plain), "float32")
    for threads in ("1", "3", "64"):
        monkeypatch.setenv("FD_MINICPM41_CPU_THREADS", threads)
        np.testing.assert_array_equal(linear(weight, x, "float32"), wanted)


# ---- rows for the framework's product ----


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_rows_are_the_weight_itself(fmt: LowBitFormat, dtype: str) -> None:
    weight = make_weight(fmt, *SHAPES[1])
    got = rows_of(weight, dtype)
    wanted = weight.plain()
    if not fmt.hadamard:
        np.testing.assert_array_equal(got, wanted.astype(got.dtype))
    else:
        # Seven sums in fp32 either way, each off by half a place of the largest partial sum.
        largest = np.abs(hadamard_blocks(np.abs(wanted).astype(np.float32), fmt.hadamard)).max()
        np.testing.assert_allclose(
            got.astype(np.float64),
            wanted,
            rtol=float(np.float64(ml_dtypes.finfo(got.dtype).eps)),
            atol=16 * 2.0**-24 * largest,
        )


def test_panels_are_parts_of_the_whole() -> None:
    weight = make_weight(FORMATS[2], 73, 256)
    whole = rows_of(weight, "bfloat16")
    for first, count in ((0, 16), (16, 33), (64, 9), (64, 0)):
        part = rows_of(weight, "bfloat16", first, count)
        np.testing.assert_array_equal(part, whole[first : first + count])


@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn"])
def test_eight_bit_rows_are_exact(kind: str) -> None:
    weight = make_exact_weight(kind, 73, 384)
    rows = rows_of(weight, kind).astype(np.float64)
    np.testing.assert_array_equal(rows, exact_rows(weight))
    np.testing.assert_array_equal(rows * weight.channel_scales[:, None], weight.plain())
    assert np.abs(rows).max() <= (127 if kind == "int8" else 448)


def test_every_e4m3_number_is_rounded_as_the_standard_says() -> None:
    # Scales that put levels between numbers, below the smallest and beyond the largest of e4m3.
    scales = np.geomspace(2.0**-14, 500, 73 * 6).reshape(73, 6).astype(ml_dtypes.bfloat16)
    fmt = LowBitFormat(4, 64, 16)
    codes = np.random.default_rng(0).integers(0, 16, (73, 384), np.uint8)
    weight = Weight(fmt, pack(codes, 4), scales, np.ones(73, np.float32))
    wanted = np.clip(weight.plain(), -448, 448).astype(ml_dtypes.float8_e4m3fn)
    got = rows_of(weight, "float8_e4m3fn")
    np.testing.assert_array_equal(got.view(np.uint8), wanted.view(np.uint8))


# ---- tiles ----


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(16, 128), (17, 64), (40, 1152), (1, 192)])
def test_tiles_turn_back(bits: int, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(bits)
    plain = rng.integers(0, 256, (shape[0], shape[1] * bits // 8), np.uint8)
    scales = rng.standard_normal((shape[0], shape[1] // 64)).astype(ml_dtypes.bfloat16)
    cut, cut_scales = tiles.tile_weight(plain, bits), tiles.tile_scales(scales)
    row_tiles, k_tiles = -(-shape[0] // 16), -(-shape[1] // 128)
    assert cut.shape == (row_tiles, k_tiles, 256 * bits) and cut.dtype == np.uint8
    assert cut_scales.shape == (row_tiles, shape[1] // 64, 16)
    np.testing.assert_array_equal(tiles.untile_weight(cut, bits, *shape), plain)
    np.testing.assert_array_equal(tiles.untile_scales(cut_scales, shape[0]), scales)
    # Paddle's tensors take the same way.
    tensor = paddle.to_tensor(plain)
    np.testing.assert_array_equal(tiles.tile_weight(tensor, bits).numpy(), cut)
    back = tiles.untile_weight(tiles.tile_weight(tensor, bits), bits, *shape)
    np.testing.assert_array_equal(back.numpy(), plain)
    bf16 = paddle.to_tensor(scales.astype(np.float32)).astype("bfloat16")
    got = tiles.tile_scales(bf16)
    assert got.dtype == paddle.bfloat16
    np.testing.assert_array_equal(got.astype("float32").numpy(), cut_scales.astype(np.float32))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_code_lies_where_the_layout_says(bits: int) -> None:
    """The formulas of csrc/params.h, code by code."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 2**bits, (32, 256), np.uint8)
    words = tiles.tile_weight(pack(codes, bits), bits).view("<u4")
    for row in range(32):
        for column in range(256):
            r, k = row % 16, column % 128
            lane, b, h = 4 * (r % 8) + k // 2 % 4, k // 32, r // 8
            p, e = k // 8 % 4, k % 2
            chunk, word, shift = {
                2: (0, 2 * (b // 2) + h, 16 * e + 2 * (4 * (b % 2) + p)),
                4: (b // 2, 2 * (b % 2) + h, 16 * e + 4 * p),
                8: (b, 2 * h + p // 2, 16 * (p % 2) + 8 * e),
            }[bits]
            got = words[row // 16, column // 128, (chunk * 32 + lane) * 4 + word]
            assert got >> shift & (2**bits - 1) == codes[row, column], (row, column)


# ---- as Paddle runs it ----


def on_paddle(weight: Weight) -> tuple[paddle.Tensor, paddle.Tensor]:
    qweight, scales = weight.tiles()
    wide = paddle.to_tensor(scales.astype(np.float32))
    return paddle.to_tensor(qweight), wide.astype("bfloat16")


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_the_ops_equal_the_c_interface_bitwise(dtype: str) -> None:
    for fmt in (FORMATS[0], FORMATS[6], FORMATS[8]):
        weight = make_weight(fmt, 73, 256)
        x = make_x(5, 256, dtype)
        wanted = linear(weight, x, dtype)
        tensors = on_paddle(weight)
        x_tensor = paddle.to_tensor(x.astype(np.float32)).astype(dtype)
        got = ops.low_bit_linear(x_tensor, *tensors, fmt, 73)
        assert got.dtype == x_tensor.dtype
        np.testing.assert_array_equal(got.astype("float32").numpy(), wanted.astype(np.float32))
        assert ops.low_bit_linear(x_tensor[:0], *tensors, fmt, 73).shape == [0, 73]
        rows = ops.expand_low_bit_weight(*tensors, fmt, 73, 256, dtype, first_row=16, num_rows=20)
        wanted = rows_of(weight, dtype, 16, 20).astype(np.float32)
        np.testing.assert_array_equal(rows.astype("float32").numpy(), wanted)


@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn"])
def test_eight_bit_rows_as_paddle_tensors(kind: str) -> None:
    weight = make_exact_weight(kind, 73, 384)
    channel_scales = paddle.to_tensor(weight.channel_scales)
    args = (*on_paddle(weight), weight.fmt, 73, 384, kind)
    rows = ops.expand_low_bit_weight(*args, channel_scales)
    assert rows.dtype == getattr(paddle, kind)
    np.testing.assert_array_equal(rows.astype("float32").numpy(), exact_rows(weight))
    rest = ops.expand_low_bit_weight(*args, channel_scales, first_row=64)
    np.testing.assert_array_equal(rest.astype("float32").numpy(), exact_rows(weight)[64:])


@pytest.mark.parametrize("panel_rows", [16, 48, 1000])
def test_many_tokens_by_panels(panel_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = make_weight(FORMATS[2], 73, 256)
    monkeypatch.setattr(ops, "PANEL_BYTES", panel_rows * 256 * 4)
    x = make_x(70, 256, "float32")
    got = ops.multiply_by_panels(paddle.to_tensor(x), *on_paddle(weight), weight.fmt, 73)
    truth = x.astype(np.float64) @ weight.plain().T
    framework = framework_linear(x, weight.plain())
    assert_within_budget(got.numpy(), truth, framework, "float32")


# ---- refusals ----

STRUCT_REFUSALS = [
    ("bits", 3, "bits is 3, wanted 2, 4 or 8"),
    ("out_features", 0, "out_features is 0, wanted at least 1"),
    ("in_features", 250, "in_features is 250, wanted a multiple of 64"),
    ("group", 32, "group is 32, wanted 64 or 128"),
    ("group", 256, "group is 256, wanted 64 or 128"),
    ("group", 128, "in_features is 192, wanted a multiple of group (128)"),
    ("zero", 8, "zero is 8, wanted 16"),
    ("hadamard", 32, "hadamard is 32, wanted 0, 64 or 128"),
    ("hadamard", 128, "in_features is 192, wanted a multiple of hadamard (128)"),
    ("qweight", None, "qweight is null, wanted an address"),
    ("scales", None, "scales is null, wanted an address"),
]


@pytest.mark.parametrize("op", ["low_bit_linear", "expand_low_bit_weight"])
@pytest.mark.parametrize(("field", "value", "message"), STRUCT_REFUSALS)
def test_refuses_a_bad_weight(op: str, field: str, value: object, message: str) -> None:
    weight = make_weight(LowBitFormat(4, 64, 16), 40, 192)
    qweight, scales = weight.tiles()
    view = capi.weight_of(qweight, scales, weight.fmt, weight.shape)
    setattr(view, field, value)
    x, out = make_x(3, 192, "float32"), np.full((40, 192), 7, np.float32)
    params = (
        capi.low_bit_linear_params(x, view, out, "float32")
        if op == "low_bit_linear"
        else capi.expand_low_bit_weight_params(view, out[:0], "float32")
    )
    with pytest.raises(capi.KernelError) as refusal:
        capi.run_cpu(params)
    assert str(refusal.value) == f"{op}: {message}"
    assert (out == 7).all()


@pytest.mark.parametrize(
    ("op", "field", "value", "message"),
    [
        ("low_bit_linear", "num_tokens", -1, "num_tokens is -1, wanted at least 0"),
        (
            "low_bit_linear",
            "dtype",
            3,
            "dtype is 3, wanted 0 (float32), 1 (float16) or 2 (bfloat16)",
        ),
        ("low_bit_linear", "x", None, "x is null, wanted an address"),
        ("low_bit_linear", "out", None, "out is null, wanted an address"),
        ("expand_low_bit_weight", "first_row", 8, "first_row is 8, wanted a multiple of 16"),
        ("expand_low_bit_weight", "first_row", -16, "first_row is -16, wanted at least 0"),
        ("expand_low_bit_weight", "num_rows", -1, "num_rows is -1, wanted at least 0"),
        (
            "expand_low_bit_weight",
            "num_rows",
            41,
            "first_row + num_rows is 41, wanted at most out_features (40)",
        ),
        (
            "expand_low_bit_weight",
            "dtype",
            5,
            "dtype is 5, wanted 0 (float32), 1 (float16), 2 (bfloat16), 3 (int8) or "
            "4 (float8_e4m3)",
        ),
        ("expand_low_bit_weight", "dtype", 3, "channel_scales is null, wanted an address"),
        ("expand_low_bit_weight", "out", None, "out is null, wanted an address"),
    ],
)
def test_refuses_a_bad_struct(op: str, field: str, value: object, message: str) -> None:
    weight = make_weight(LowBitFormat(4, 64, 16), 40, 192)
    qweight, scales = weight.tiles()
    view = capi.weight_of(qweight, scales, weight.fmt, weight.shape)
    x, out = make_x(3, 192, "float32"), np.full((40, 192), 7, np.float32)
    params = (
        capi.low_bit_linear_params(x, view, out, "float32")
        if op == "low_bit_linear"
        else capi.expand_low_bit_weight_params(view, out, "float32")
    )
    setattr(params, field, value)
    with pytest.raises(capi.KernelError) as refusal:
        capi.run_cpu(params)
    assert str(refusal.value) == f"{op}: {message}"
    assert (out == 7).all()


def test_refuses_eight_bit_rows_of_a_transformed_weight() -> None:
    weight = make_weight(LowBitFormat(4, 64, 16, 64), 40, 192)
    qweight, scales = weight.tiles()
    view = capi.weight_of(qweight, scales, weight.fmt, weight.shape)
    out, ones = np.empty((40, 192), np.int8), np.ones(40, np.float32)
    with pytest.raises(capi.KernelError) as refusal:
        capi.run_cpu(capi.expand_low_bit_weight_params(view, out, "int8", ones))
    assert str(refusal.value) == (
        "expand_low_bit_weight: hadamard is 64, wanted 0 for rows of 8-bit numbers"
    )


Call = Callable[[paddle.Tensor, paddle.Tensor, paddle.Tensor, LowBitFormat], object]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x, q, s, fmt: ops.low_bit_linear(x.astype("float64"), q, s, fmt, 40),
            "low_bit_linear: x: wanted float32, float16 or bfloat16, got float64",
        ),
        (
            lambda x, q, s, fmt: ops.low_bit_linear(x[0], q, s, fmt, 40),
            "low_bit_linear: x: wanted float32 [num_tokens, in_features], got float32 [192]",
        ),
        (
            lambda x, q, s, fmt: ops.low_bit_linear(x[:, :128].contiguous(), q, s, fmt, 40),
            "low_bit_linear: qweight: wanted uint8 [3, 1, 1024], got uint8 [3, 2, 1024]",
        ),
        (
            lambda x, q, s, fmt: ops.low_bit_linear(x, q.astype("int32"), s, fmt, 40),
            "low_bit_linear: qweight: wanted uint8 [3, 2, 1024], got int32 [3, 2, 1024]",
        ),
        (
            lambda x, q, s, fmt: ops.low_bit_linear(x, q, s, fmt, 49),
            "low_bit_linear: qweight: wanted uint8 [4, 2, 1024], got uint8 [3, 2, 1024]",
        ),
        (
            lambda x, q, s, fmt: ops.low_bit_linear(x, q, s.astype("float16"), fmt, 40),
            "low_bit_linear: scales: wanted bfloat16 [3, 3, 16], got float16 [3, 3, 16]",
        ),
        (
            lambda x, q, s, fmt: ops.low_bit_linear(x, q, s, LowBitFormat(4, 64, 16, 128), 40),
            "low_bit_linear: in_features is 192, wanted a multiple of hadamard (128)",
        ),
        (
            lambda x, q, s, fmt: ops.expand_low_bit_weight(q, s, fmt, 40, 192, "int4"),
            "expand_low_bit_weight: dtype: wanted float32, float16, bfloat16, int8 or "
            "float8_e4m3fn, got int4",
        ),
        (
            lambda x, q, s, fmt: ops.expand_low_bit_weight(q, s, fmt, 40, 192, "int8"),
            "expand_low_bit_weight: channel_scales is null, wanted an address",
        ),
        (
            lambda x, q, s, fmt: ops.expand_low_bit_weight(q, s, fmt, 40, 192, "int8", x[0]),
            "expand_low_bit_weight: channel_scales: wanted float32 [40], got float32 [192]",
        ),
        (
            lambda x, q, s, fmt: ops.expand_low_bit_weight(
                q, s, fmt, 40, 192, "float32", first_row=48
            ),
            "expand_low_bit_weight: num_rows: wanted at least 0, got -8",
        ),
    ],
)
def test_the_ops_refuse(call: Call, message: str) -> None:
    weight = make_weight(LowBitFormat(4, 64, 16), 40, 192)
    x = paddle.to_tensor(make_x(3, 192, "float32"))
    with pytest.raises(ValueError) as refusal:
        call(x, *on_paddle(weight), weight.fmt)
    assert str(refusal.value) == f"minicpm41_{message}"


def test_plain_codes_survive_the_cases_own_helpers() -> None:
    """The cases are made by pack, and read by dequantize: both hold against first principles."""
    weight = make_weight(FORMATS[0], 5, 128)
    codes = unpack(weight.qweight, 2)
    scales = np.repeat(weight.scales.astype(np.float64), 64, 1)
    np.testing.assert_array_equal(weight.plain(), (codes - 1.5) * scales)
    assert_within_one_step(
        dequantize(weight.qweight, weight.scales, weight.fmt), weight.plain().astype(np.float32)
    )
