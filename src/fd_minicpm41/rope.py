"""LongRoPE tables: the one place where positions become angles.

Source of the formula: the Hugging Face modelling code of MiniCPM4,
``inv_freq_i = 1 / (factor_i * theta^(2i / head_dim))`` and
``magnitude = sqrt(1 + ln(max_position / original) / ln(original))`` on cos and sin.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fd_minicpm41.config import MiniCPMConfig
from fd_minicpm41.errors import UsageError


def rope_magnitude(config: MiniCPMConfig) -> float:
    """Factor on cos and sin; 1 unless ``max_position_embeddings`` exceeds the original context."""
    scaling = config.rope_scaling
    if scaling is None:
        return 1.0
    original = scaling.original_max_position_embeddings
    ratio = config.max_position_embeddings / original
    return 1.0 if ratio <= 1.0 else math.sqrt(1.0 + math.log(ratio) / math.log(original))


def rope_table(
    config: MiniCPMConfig, num_positions: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin for positions ``0 .. num_positions - 1``.

    The long factors are used iff the table, which Hugging Face's code starts at
    ``max_position_embeddings``, is longer than the original context: the choice never depends on
    one prompt. Both halves of a row are alike (NeoX layout). Frequencies and angles are rounded to
    fp32 as in training.

    Returns:
        cos, sin: fp32 ``[num_positions, head_dim]``.

    Raises:
        UsageError: more positions than the configuration's ``max_context``.
    """
    if num_positions > config.max_context:
        raise UsageError(
            f"context of {num_positions} tokens exceeds the rope table's {config.max_context}: ask "
            f"for at most {config.max_context}, or choose a longer published table (128k)"
        )
    half = config.head_dim // 2
    frequencies = config.rope_theta ** (np.arange(half, dtype=np.float64) * 2 / config.head_dim)
    scaling = config.rope_scaling
    if scaling is not None:
        table_length = max(num_positions, config.max_position_embeddings)
        is_long = table_length > scaling.original_max_position_embeddings
        frequencies *= np.asarray(scaling.long_factor if is_long else scaling.short_factor)
    inverse = (1.0 / frequencies).astype(np.float32)
    angles = np.arange(num_positions, dtype=np.float32)[:, None] * inverse
    angles = np.concatenate([angles, angles], axis=1).astype(np.float64)
    magnitude = rope_magnitude(config)
    return (
        (np.cos(angles) * magnitude).astype(np.float32),
        (np.sin(angles) * magnitude).astype(np.float32),
    )
