"""Rounding to nearest with searched scales: no calibration, and the step that GPTQ repeats.

Weights are turned here, ``[K, N]``, and cut into groups ``[K / group, group, N]``: a column of the
layer's input is then one contiguous row. Scales are fp32 tensors that bf16 holds exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import paddle

from fd_minicpm41.quantization.formats import LowBitFormat

# Where a searched scale starts, as fractions of the largest value: from clipping little to much.
# With few levels the best scale leaves the tails outside.
NUM_STARTS = 12
FRACTIONS = {2: (0.25, 0.72), 4: (0.55, 1.02)}
REFINEMENTS = 2

# The multipliers of a row's scale in w4a8: code * m is an int8.
INTEGER_STEPS = tuple(float(m) for m in range(1, 16))
# The same in w4afp8: code * 2^k is exact in e4m3, whose values go from 2^-9 to 448.
POWER_STEPS = tuple(2.0**k for k in range(-9, 6))
# A row's scale in w4a8 has 4 significant bits, so that its product with m fits bf16's 8.
CHANNEL_BITS = 4
# Candidates within a factor of 2 for a row's scale in w4afp8.
NUM_MANTISSAS = 8


@dataclass(frozen=True)
class Ladder:
    """Scales that a row may use: ``channel * step``.

    Attributes:
        channel: fp32 ``[N]``.
        steps: the multipliers.
    """

    channel: paddle.Tensor
    steps: tuple[float, ...]


def to_bf16(x: paddle.Tensor) -> paddle.Tensor:
    """Rounded to the nearest bf16, as fp32."""
    return x.astype("bfloat16").astype("float32")


def round_codes(values: paddle.Tensor, scales: paddle.Tensor, fmt: LowBitFormat) -> paddle.Tensor:
    """The nearest codes, as fp32; ``scales`` is broadcast against ``values``."""
    divisor = paddle.where(scales == 0, paddle.ones_like(scales), scales)
    codes = paddle.round(values / divisor + fmt.zero / 2)
    return paddle.clip(codes, fmt.min_code, fmt.max_code)


def _loss(
    values: paddle.Tensor, scales: paddle.Tensor, importance: paddle.Tensor, fmt: LowBitFormat
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Weighted squared error a group, ``[G, N]``, and the levels that were chosen."""
    levels = round_codes(values, scales.unsqueeze(1), fmt) - fmt.zero / 2
    error = values - levels * scales.unsqueeze(1)
    return (error * error * importance.unsqueeze(-1)).sum(axis=1), levels


def fit_scales(
    values: paddle.Tensor,
    importance: paddle.Tensor,
    fmt: LowBitFormat,
    ladder: Ladder | None = None,
) -> paddle.Tensor:
    """The scale of each group that rounds it best.

    Args:
        values: ``[G, group, N]``.
        importance: ``[G, group]``, the weight of each column's squared error.
        ladder: the scales that are allowed; ``None`` for any bf16.

    Returns:
        ``[G, N]``; a group of zeros has scale 0.
    """
    largest = values.abs().max(axis=1)
    if fmt.bits == 8:
        return to_bf16(largest / 127)
    best = paddle.zeros_like(largest)
    best_loss = paddle.full_like(largest, float("inf"))

    def try_scale(scales: paddle.Tensor) -> paddle.Tensor:
        nonlocal best, best_loss
        loss, levels = _loss(values, scales, importance, fmt)
        is_better = loss < best_loss
        best = paddle.where(is_better, scales, best)
        best_loss = paddle.where(is_better, loss, best_loss)
        return levels

    if ladder is not None:
        for step in ladder.steps:
            try_scale((ladder.channel * step).expand_as(largest))
        return paddle.where(largest == 0, paddle.zeros_like(best), best)

    low, high = FRACTIONS[fmt.bits]
    reach = fmt.max_code - fmt.zero / 2
    for i in range(NUM_STARTS):
        fraction = low + (high - low) * i / (NUM_STARTS - 1)
        try_scale(to_bf16(largest * (fraction / reach)))
    weights = importance.unsqueeze(-1)
    for _ in range(REFINEMENTS):
        # With its codes fixed the best scale is a least-squares quotient.
        _, levels = _loss(values, best, importance, fmt)
        norm = (levels * levels * weights).sum(axis=1)
        fitted = (values * levels * weights).sum(axis=1) / paddle.clip(norm, min=1e-30)
        try_scale(to_bf16(paddle.where(norm > 0, fitted, best)))
    return paddle.where(largest == 0, paddle.zeros_like(best), best)


def fit_ladder(
    values: paddle.Tensor, importance: paddle.Tensor, fmt: LowBitFormat, method: str
) -> Ladder | None:
    """The scale of each row that w4a8 and w4afp8 need; ``None`` for the other methods.

    Arguments as in :func:`fit_scales`.
    """
    if method not in ("w4a8", "w4afp8"):
        return None
    free = fit_scales(values, importance, fmt).abs()
    largest = free.max(axis=0)
    # A row of zeros: any scale will do, as its groups all have scale 0.
    largest = paddle.where(largest == 0, paddle.ones_like(largest), largest)
    exponent = paddle.floor(paddle.log2(largest))
    if method == "w4a8":
        wanted = largest / INTEGER_STEPS[-1]
        unit = 2.0 ** (paddle.floor(paddle.log2(wanted)) - (CHANNEL_BITS - 1))
        return Ladder(paddle.ceil(wanted / unit) * unit, INTEGER_STEPS)
    best = largest
    best_loss = paddle.full_like(largest, float("inf"))
    for i in range(NUM_MANTISSAS):
        # The largest scale of the row is then one of the upper steps.
        channel = 2.0 ** (exponent - 4) * (1 + i / NUM_MANTISSAS)
        nearest = channel * 2.0 ** paddle.clip(
            paddle.round(paddle.log2(paddle.clip(free, min=1e-30) / channel)), -9, 5
        )
        loss = _loss(values, nearest, importance, fmt)[0].sum(axis=0)
        is_better = loss < best_loss
        best = paddle.where(is_better, channel, best)
        best_loss = paddle.where(is_better, loss, best_loss)
    return Ladder(best, POWER_STEPS)


def quantise_rtn(
    weight: paddle.Tensor, fmt: LowBitFormat, method: str
) -> tuple[paddle.Tensor, paddle.Tensor, Ladder | None]:
    """Every weight to the nearest level of its group.

    Args:
        weight: fp32 ``[K, N]``, transformed already if the format has a Hadamard transform.

    Returns:
        codes: uint8 ``[K, N]``.
        scales: fp32 ``[K / group, N]``, exact in bf16.
        ladder: of w4a8 and w4afp8.
    """
    columns, rows = weight.shape
    groups = weight.reshape([columns // fmt.group, fmt.group, rows])
    importance = paddle.ones([groups.shape[0], fmt.group], "float32")
    ladder = fit_ladder(groups, importance, fmt, method)
    scales = fit_scales(groups, importance, fmt, ladder)
    codes = round_codes(groups, scales.unsqueeze(1), fmt)
    return codes.reshape([columns, rows]).astype("uint8"), scales, ladder


def restore(codes: paddle.Tensor, scales: paddle.Tensor, fmt: LowBitFormat) -> paddle.Tensor:
    """What codes ``[K, N]`` stand for, fp32; a Hadamard transform is not undone."""
    columns, rows = codes.shape
    levels = codes.astype("float32").reshape([columns // fmt.group, fmt.group, rows])
    levels = (levels - fmt.zero / 2) * scales.unsqueeze(1)
    return levels.reshape([columns, rows])
