"""Weights that are ternary already, as quantisation-aware training leaves them, stored exactly."""

from __future__ import annotations

import paddle

from fd_minicpm41.quantization.formats import GROUPS, TERNARY_ZERO, LowBitFormat
from fd_minicpm41.quantization.rtn import to_bf16

# Trained groups of 256 or of a whole row are stored as several of these with equal scales.
STORED_GROUPS = tuple(sorted(GROUPS, reverse=True))


def ternary_group(weight: paddle.Tensor) -> int:
    """The largest group that a trained scale was shared by: 256, 128, 64, 32, or all K; 0 if none.

    Args:
        weight: fp32 ``[K, N]``.
    """
    columns = weight.shape[0]
    for group in (columns, 256, 128, 64, 32):
        if columns % group == 0 and _is_ternary(weight, group):
            return group
    return 0


def quantise_ternary(
    weight: paddle.Tensor,
) -> tuple[paddle.Tensor, paddle.Tensor, LowBitFormat] | None:
    """Codes and scales that stand for exactly this weight; ``None`` if there are none.

    Args:
        weight: fp32 ``[K, N]``.

    Returns:
        codes: uint8 ``[K, N]``; scales: fp32 ``[K / group, N]``, exact in bf16; their format.
    """
    columns, rows = weight.shape
    for group in STORED_GROUPS:
        if columns % group == 0 and _is_ternary(weight, group):
            groups = weight.reshape([columns // group, group, rows])
            codes = (paddle.sign(groups) + TERNARY_ZERO / 2).astype("uint8")
            fmt = LowBitFormat(bits=2, group=group, zero=TERNARY_ZERO)
            return codes.reshape([columns, rows]), groups.abs().max(axis=1), fmt
    return None


def _is_ternary(weight: paddle.Tensor, group: int) -> bool:
    """Each group has one size beside 0, and bf16 holds it."""
    columns, rows = weight.shape
    sizes = weight.abs().reshape([columns // group, group, rows])
    scales = sizes.max(axis=1, keepdim=True)
    if not bool((scales == to_bf16(scales)).all()):
        return False
    return bool(((sizes == scales) | (sizes == 0)).all())
