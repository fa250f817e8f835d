"""RTN, GPTQ, the scales of w4a8 and w4afp8, ternary weights: one weight at a time."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import paddle
import pytest

from fd_minicpm41.errors import UsageError
from fd_minicpm41.quantization.formats import LowBitFormat
from fd_minicpm41.quantization.gptq import HESSIAN_BLOCK, Hessian, factor, quantise_gptq
from fd_minicpm41.quantization.hadamard import transform
from fd_minicpm41.quantization.rtn import (
    INTEGER_STEPS,
    POWER_STEPS,
    quantise_rtn,
    restore,
)
from fd_minicpm41.quantization.ternary import quantise_ternary, ternary_group

FORMATS = {
    "wint2": LowBitFormat(2, 64, 3),
    "wint4": LowBitFormat(4, 64, 16),
    "wint8": LowBitFormat(8, 64, 256),
}


def heavy_tailed(columns: int, rows: int, seed: int = 0) -> paddle.Tensor:
    rng = np.random.default_rng(seed)
    return paddle.to_tensor(rng.standard_t(5, (columns, rows)).astype(np.float32) * 0.02)


def correlated(tokens: int, columns: int, seed: int = 0) -> paddle.Tensor:
    """Inputs of few directions and a few loud channels, as those of a language model are."""
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((16, columns))
    x = rng.standard_normal((tokens, 16)) @ directions
    x += 0.3 * rng.standard_normal((tokens, columns))
    x[:, ::37] *= 8
    return paddle.to_tensor(x.astype(np.float32))


def relative(got: paddle.Tensor, wanted: paddle.Tensor) -> float:
    return float(((got - wanted) ** 2).sum() / (wanted**2).sum()) ** 0.5


@pytest.mark.parametrize("method", FORMATS)
def test_rounding_is_to_the_nearest_level_and_scales_are_bf16(method: str) -> None:
    fmt, weight = FORMATS[method], heavy_tailed(192, 24)
    codes, scales, ladder = quantise_rtn(weight, fmt, method)
    assert ladder is None and codes.dtype == paddle.uint8
    exact = scales.numpy()
    np.testing.assert_array_equal(exact.astype(ml_dtypes.bfloat16).astype(np.float32), exact)
    assert fmt.min_code <= codes.numpy().min() and codes.numpy().max() <= fmt.max_code
    levels = np.arange(fmt.min_code, fmt.max_code + 1) - fmt.zero / 2
    values = weight.numpy().reshape(3, 64, 24).astype(np.float64)
    distances = np.abs(values[..., None] - levels * exact[:, None, :, None].astype(np.float64))
    chosen = codes.numpy().reshape(3, 64, 24).astype(int) - fmt.min_code
    got = np.take_along_axis(distances, chosen[..., None], -1)[..., 0]
    # Codes are found by an fp32 division: at a tie of two levels either is as near.
    assert np.all(got <= distances.min(-1) * (1 + 1e-5) + 1e-9)


@pytest.mark.parametrize(("method", "most"), [("wint2", 0.345), ("wint4", 0.11), ("wint8", 0.01)])
def test_errors_of_normal_weights_are_those_of_the_grid(method: str, most: float) -> None:
    """On N(0, 1) the squared error of {+-0.5, +-1.5} is 0.119, and 16 levels have 0.0116."""
    rng = np.random.default_rng(3)
    weight = paddle.to_tensor(rng.standard_normal((512, 64)).astype(np.float32))
    codes, scales, _ = quantise_rtn(weight, FORMATS[method], method)
    assert relative(restore(codes, scales, FORMATS[method]), weight) < most


@pytest.mark.parametrize("method", [*FORMATS, "w4a8", "w4afp8"])
@pytest.mark.parametrize("value", [0.0, -0.0, 0.25, -3.0])
def test_groups_of_equal_values(method: str, value: float) -> None:
    """Zeros stay zero; a single value is met as nearly as bf16 allows."""
    fmt = FORMATS.get(method, FORMATS["wint4"])
    weight = paddle.full([128, 3], value, "float32")
    codes, scales, _ = quantise_rtn(weight, fmt, method)
    got = restore(codes, scales, fmt).numpy()
    assert np.isfinite(got).all()
    # w4afp8's steps are a factor of 2 apart and its mantissas eighths; the level is free to choose.
    budget = {"w4afp8": 0.04, "w4a8": 0.04}.get(method, 2.0**-8)
    assert np.abs(got - value).max() <= abs(value) * budget


@pytest.mark.parametrize("algorithm", ["rtn", "gptq"])
def test_w4a8_scales_are_whole_multiples_that_int8_and_bf16_hold(algorithm: str) -> None:
    codes, scales, channel = channel_case("w4a8", algorithm)
    multiple = scales / channel
    assert set(np.unique(multiple)) <= set(INTEGER_STEPS) | {0.0}
    assert len(np.unique(multiple)) > 3
    # 4 significant bits: the mantissa in eighths is whole.
    mantissa, _ = np.frexp(channel)
    np.testing.assert_array_equal(mantissa * 16, np.round(mantissa * 16))
    expanded = (codes.astype(int) - 8) * np.repeat(multiple, 64, 0)
    assert np.abs(expanded).max() <= 127 and np.array_equal(expanded, np.round(expanded))


@pytest.mark.parametrize("algorithm", ["rtn", "gptq"])
def test_w4afp8_scales_are_powers_of_two_that_e4m3_holds(algorithm: str) -> None:
    codes, scales, channel = channel_case("w4afp8", algorithm)
    multiple = scales / channel
    assert set(np.unique(multiple)) <= set(POWER_STEPS) | {0.0}
    assert len(np.unique(multiple)) > 2
    expanded = ((codes.astype(int) - 8) * np.repeat(multiple, 64, 0)).astype(np.float32)
    held = expanded.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(held, expanded)


def test_every_code_at_every_step_is_exact_in_its_8_bit_type() -> None:
    codes = np.arange(-8, 8, dtype=np.float32)
    for step in POWER_STEPS:
        exact = (codes * step).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        np.testing.assert_array_equal(exact, codes * step)
    assert max(INTEGER_STEPS) * 8 <= 128


def channel_case(method: str, algorithm: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    sizes = np.exp(rng.standard_normal((4, 1, 20))).repeat(64, 1).reshape(256, 20)
    weight = heavy_tailed(256, 20) * paddle.to_tensor(sizes.astype(np.float32))
    weight[:, 3] = 0.0
    fmt = FORMATS["wint4"]
    if algorithm == "rtn":
        codes, scales, ladder = quantise_rtn(weight, fmt, method)
    else:
        hessian = Hessian(256)
        hessian.add(correlated(600, 256))
        codes, scales, ladder = quantise_gptq(weight, factor(hessian, "x"), fmt, method)
    assert ladder is not None
    exact = scales.numpy()
    np.testing.assert_array_equal(exact.astype(ml_dtypes.bfloat16).astype(np.float32), exact)
    assert np.all(restore(codes, scales, fmt).numpy()[:, 3] == 0)
    if algorithm == "rtn":
        # A grid's error grows as its scale: the next larger step is at most twice the best scale,
        # and the better of the two neighbours at most sqrt(2) from it.
        free_codes, free_scales, _ = quantise_rtn(weight, fmt, "wint4")
        free = relative(restore(free_codes, free_scales, fmt), weight)
        assert relative(restore(codes, scales, fmt), weight) < 2**0.5 * free
    return codes.numpy(), exact, ladder.channel.numpy()


def test_the_hessian_sums_over_calls_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert HESSIAN_BLOCK > 128
    monkeypatch.setattr("fd_minicpm41.quantization.gptq.HESSIAN_BLOCK", 48)
    x = correlated(300, 128)
    hessian = Hessian(128)
    hessian.add(x[:100])
    hessian.add(x[100:])
    wanted = x.numpy().astype(np.float64).T @ x.numpy().astype(np.float64)
    got = np.tril(hessian.sums.numpy())
    # 300 fp32 additions at most.
    np.testing.assert_allclose(got, np.tril(wanted), atol=300 * 2.0**-24 * np.abs(wanted).max())


def brute_force_gptq(weight: np.ndarray, hessian: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """GPTQ as its paper writes it, with the inverse of what is left, column by column; fp64.

    The columns go from the last to the first; ``scales [K / 64, N]`` are given.
    """
    weight, columns = weight.astype(np.float64).copy(), len(weight)
    levels = np.zeros_like(weight)
    for k in reversed(range(columns)):
        left = slice(0, k + 1)
        inverse = np.linalg.inv(hessian[left, left])
        scale = scales[k // 64]
        levels[k] = np.clip(np.round(weight[k] / scale), -8, 7)
        error = (weight[k] - levels[k] * scale) / inverse[k, k]
        weight[left] -= np.outer(inverse[left, k], error)
    return levels


def test_gptq_equals_the_papers_recursion() -> None:
    columns, rows = 128, 6
    weight, x = heavy_tailed(columns, rows, 7), correlated(400, columns, 7)
    hessian = Hessian(columns)
    hessian.add(x)
    lower = factor(hessian, "x")
    codes, scales, _ = quantise_gptq(weight, lower, FORMATS["wint4"], "wint4")
    damped = lower.numpy().astype(np.float64) @ lower.numpy().astype(np.float64).T
    wanted = brute_force_gptq(weight.numpy(), damped, scales.numpy().astype(np.float64))
    differ = codes.numpy().astype(int) - 8 != wanted
    # fp32 feedback may fall on the other side of a tie, and that changes what follows in its row.
    assert differ.any(axis=0).sum() <= 1


@pytest.mark.parametrize(("method", "hadamard"), [("wint4", 0), ("wint2", 0), ("wint2", 64)])
def test_gptq_loses_less_of_the_output_than_rtn(method: str, hadamard: int) -> None:
    plain = FORMATS[method]
    fmt = LowBitFormat(plain.bits, 64, plain.zero, hadamard)
    weight, inputs = heavy_tailed(256, 48, 8), correlated(1100, 256, 8)
    x, unseen = inputs[:800], inputs[800:]
    turned = transform(weight.t().contiguous(), hadamard).t().contiguous()
    hessian = Hessian(256)
    hessian.add(transform(x, hadamard))

    def output_error(codes: paddle.Tensor, scales: paddle.Tensor) -> float:
        restored = transform(restore(codes, scales, fmt).t().contiguous(), hadamard).t()
        return relative(unseen @ restored, unseen @ weight)

    rtn = output_error(*quantise_rtn(turned, fmt, method)[:2])
    gptq = output_error(*quantise_gptq(turned, factor(hessian, "x"), fmt, method)[:2])
    assert gptq < 0.7 * rtn


def test_layers_side_by_side_are_rounded_as_alone() -> None:
    a, b, x = heavy_tailed(128, 10, 1), heavy_tailed(128, 7, 2), correlated(400, 128)
    hessian = Hessian(128)
    hessian.add(x)
    lower = factor(hessian, "x")
    both, scales, _ = quantise_gptq(paddle.concat([a, b], 1), lower, FORMATS["wint4"], "wint4")
    alone, alone_scales, _ = quantise_gptq(a, lower, FORMATS["wint4"], "wint4")
    # The products are cut differently, so that a tie may fall the other way in a row.
    same = (both[:, :10] == alone).all(axis=0).numpy()
    assert same.sum() >= 9
    assert (scales[:, :10] == alone_scales).all(axis=0).numpy()[same].all()


def test_inputs_that_are_never_used_or_all_alike_can_be_factored() -> None:
    x = correlated(100, 128)
    x[:, 5] = 0.0
    x[:, 6] = x[:, 7]
    hessian = Hessian(128)
    hessian.add(x)
    assert np.isfinite(factor(hessian, "x").numpy()).all()
    assert np.isfinite(factor(Hessian(64), "x").numpy()).all()
    hessian.sums[3, 3] = float("inf")
    with pytest.raises(UsageError, match="drives the input of x to infinity or NaN"):
        factor(hessian, "x")


def test_more_damping_is_tried_before_giving_up() -> None:
    """Rounding can leave second moments that are not positive definite."""
    hessian = Hessian(2)
    hessian.sums[0, 0] = hessian.sums[1, 1] = 1.0
    hessian.sums[1, 0] = hessian.sums[0, 1] = 1.05
    lower = factor(hessian, "x").numpy()
    np.testing.assert_allclose(lower @ lower.T, [[1.1, 1.05], [1.05, 1.1]], rtol=1e-6)
    hessian.sums[1, 0] = hessian.sums[0, 1] = 3.0
    with pytest.raises(UsageError, match="the inputs of x cannot be factored"):
        factor(hessian, "x")


def ternary_weight(columns: int, group: int, seed: int = 0) -> np.ndarray:
    """``[K, 12]`` with one bf16 size a group of its columns."""
    rng = np.random.default_rng(seed)
    scales = (rng.random((columns // group, 1, 12)) + 0.1).astype(ml_dtypes.bfloat16)
    signs = rng.integers(-1, 2, (columns // group, group, 12))
    return (signs * scales.astype(np.float32)).reshape(columns, 12).astype(np.float32)


@pytest.mark.parametrize(("trained", "stored"), [(512, 128), (256, 128), (128, 128), (64, 64)])
def test_ternary_weights_are_stored_exactly(trained: int, stored: int) -> None:
    weight = ternary_weight(512, trained)
    weight[:128, 4] = -0.0
    found = quantise_ternary(paddle.to_tensor(weight))
    assert found is not None
    codes, scales, fmt = found
    assert fmt == LowBitFormat(2, stored, 2) and codes.numpy().max() <= 2
    np.testing.assert_array_equal(restore(codes, scales, fmt).numpy(), weight)
    assert ternary_group(paddle.to_tensor(weight)) == trained


def test_ternary_in_smaller_groups_is_told_and_not_stored() -> None:
    weight = paddle.to_tensor(ternary_weight(512, 32))
    assert ternary_group(weight) == 32 and quantise_ternary(weight) is None


@pytest.mark.parametrize("change", ["one value", "one sign of two sizes", "scale beyond bf16"])
def test_nearly_ternary_is_not_ternary(change: str) -> None:
    weight = ternary_weight(256, 64)
    row = int(np.flatnonzero(weight[:64, 2])[0])
    if change == "one value":
        weight[row, 2] = np.nextafter(weight[row, 2], np.float32(9))
    elif change == "one sign of two sizes":
        weight[:64, 2] = np.where(weight[:64, 2] > 0, weight[:64, 2] * 2, weight[:64, 2])
    else:
        weight[:64, 2] *= np.float32(1 + 2.0**-12)
    assert quantise_ternary(paddle.to_tensor(weight)) is None
    assert ternary_group(paddle.to_tensor(weight)) == 0
