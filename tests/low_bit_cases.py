"""Low-bit weights to test on, the same for every side: NumPy arrays, seeded.

What must not be read is poisoned: in the rows that only fill the last tile the codes are random and
the scales NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from cases import DTYPES
from fd_minicpm41.quantization import tiles
from fd_minicpm41.quantization.formats import LowBitFormat, dequantize, pack, unpack

# Every width, group and zero, with and without a Hadamard transform.
FORMATS = (
    LowBitFormat(2, 64, 3),
    LowBitFormat(2, 128, 2),
    LowBitFormat(2, 64, 3, 64),
    LowBitFormat(2, 128, 3, 128),
    LowBitFormat(4, 64, 16),
    LowBitFormat(4, 128, 16),
    LowBitFormat(4, 128, 16, 64),
    LowBitFormat(8, 64, 256),
    LowBitFormat(8, 128, 256, 128),
)
# Around every edge of a tile of tokens and of the kernels' limits.
TOKENS = (0, 1, 2, 7, 8, 9, 16, 17, 33, 63, 64)


@dataclass(frozen=True)
class Weight:
    """One weight, plain and in tiles.

    Attributes:
        fmt: its format.
        qweight: uint8 ``[N, K * bits / 8]``; ``scales`` bf16 ``[N, K / group]``.
        channel_scales: fp32 ``[N]``, by which the scales are whole multiples; else None.
    """

    fmt: LowBitFormat
    qweight: NDArray[np.uint8]
    scales: NDArray
    channel_scales: NDArray[np.float32] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.qweight.shape[0], self.qweight.shape[1] * 8 // self.fmt.bits

    def plain(self) -> NDArray[np.float64]:
        """The weight itself, ``[N, K]``."""
        return dequantize(self.qweight, self.scales, self.fmt).astype(np.float64)

    def tiles(self) -> tuple[NDArray[np.uint8], NDArray]:
        """Tiles of codes and of scales, what fills the last row of tiles poisoned."""
        rng = np.random.default_rng(9)
        missing = -self.shape[0] % tiles.TILE_ROWS
        shape = (missing, self.qweight.shape[1])
        codes = np.concatenate([self.qweight, rng.integers(0, 256, shape, np.uint8)])
        nan = np.full((missing, self.scales.shape[1]), np.nan, self.scales.dtype)
        return tiles.tile_weight(codes, self.fmt.bits), tiles.tile_scales(
            np.concatenate([self.scales, nan])
        )


def make_weight(fmt: LowBitFormat, out_features: int, in_features: int, seed: int = 0) -> Weight:
    """Random codes and scales; scales of both signs, as GPTQ may leave them."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(fmt.min_code, fmt.max_code + 1, (out_features, in_features), np.uint8)
    scales = rng.uniform(0.01, 0.04, (out_features, in_features // fmt.group))
    scales *= rng.choice([-1, 1], scales.shape)
    return Weight(fmt, pack(codes, fmt.bits), scales.astype(ml_dtypes.bfloat16))


def make_exact_weight(kind: str, out_features: int, in_features: int) -> Weight:
    """A weight of w4a8 (``int8``) or w4afp8 (``float8_e4m3fn``): W / channel_scales is exact."""
    rng = np.random.default_rng(1)
    shape = out_features, in_features // 128
    steps = rng.integers(1, 16, shape) if kind == "int8" else 2.0 ** rng.integers(-3, 5, shape)
    channel_scales = (rng.integers(8, 16, out_features) / 2**12).astype(np.float32)
    scales = (steps * channel_scales[:, None]).astype(ml_dtypes.bfloat16)
    assert (scales.astype(np.float64) == steps * channel_scales[:, None].astype(np.float64)).all()
    codes = rng.integers(0, 16, (out_features, in_features), np.uint8)
    return Weight(LowBitFormat(4, 128, 16), pack(codes, 4), scales, channel_scales)


def exact_rows(weight: Weight) -> NDArray[np.float64]:
    """W / channel_scales of :func:`make_exact_weight`, from codes and scales alone."""
    levels = unpack(weight.qweight, 4).astype(np.float64) - 8
    scales = weight.scales.astype(np.float64) / weight.channel_scales.astype(np.float64)[:, None]
    return levels * np.repeat(scales, weight.fmt.group, 1)


def make_x(num_tokens: int, in_features: int, dtype: str, seed: int = 0) -> NDArray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((num_tokens, in_features)).astype(DTYPES[dtype])


def framework_linear(x: NDArray, plain: NDArray[np.float64]) -> NDArray[np.float64]:
    """``x W^T`` as a framework does it: W rounded to the dtype of x, sums in fp32, one rounding."""
    rounded = plain.astype(x.dtype).astype(np.float32)
    return (x.astype(np.float32) @ rounded.T).astype(x.dtype).astype(np.float64)
