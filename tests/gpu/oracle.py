"""InfLLM-V2 for one row and one kv head, in NumPy and float64: what the GPU's results are held to.

A GPU machine need not have Paddle. ``test_oracle.py`` holds this file to the reference.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BLOCK_SIZE = 64


def window_means(keys: NDArray, size: int, stride: int) -> NDArray[np.float64]:
    """Means of the complete windows of ``[kv_len, ...]`` keys."""
    count = max(0, (len(keys) - size) // stride + 1)
    if count == 0:
        return np.zeros((0, *keys.shape[1:]))
    strips = keys[: (count - 1) * stride + size].astype(np.float64)
    strips = strips.reshape(-1, stride, *keys.shape[1:]).sum(1)
    return sum(strips[i : i + count] for i in range(size // stride)) / size


def block_scores(q: NDArray, k1: NDArray, k2: NDArray, position: int) -> NDArray[np.float64]:
    """Logarithm of each causal block's score.

    Args:
        q: ``[group_size, head_dim]``.
        k1, k2: ``[windows, head_dim]``, those visible at ``position`` or more.
    """
    scale = q.shape[1] ** -0.5
    queries = q.astype(np.float64) * scale
    fine = queries @ k1[: max(0, (position + 1) // 16 - 1)].astype(np.float64).T
    coarse = queries @ k2[: max(0, (position + 1) // 64 - 1)].astype(np.float64).T
    lse = _logsumexp(coarse, 1) if coarse.shape[1] else np.zeros(len(q))
    windows = _logsumexp(fine - lse[:, None], 0)
    # Window j covers keys 16 j .. 16 j + 31: block b is overlapped by 4 b - 1 .. 4 b + 3.
    own = position // BLOCK_SIZE
    padded = np.full(4 * own + 5, -np.inf)
    padded[1 : 1 + len(windows)] = windows[: 4 * own + 4]
    return np.array([padded[4 * b : 4 * b + 5].max() for b in range(own + 1)])


def forced_blocks(position: int, init_blocks: int, local_blocks: int) -> NDArray[np.bool_]:
    """Which causal blocks are listed whatever their score; ``local_blocks`` counts the own one."""
    own = position // BLOCK_SIZE
    ids = np.arange(own + 1)
    return (ids < init_blocks) | (ids > own - local_blocks)


def listed_tokens(blocks: NDArray, position: int) -> NDArray[np.int64]:
    """Causal tokens of the listed blocks; -1 lists none."""
    ids = np.asarray(blocks)[np.asarray(blocks) >= 0].astype(np.int64)
    tokens = (ids[:, None] * BLOCK_SIZE + np.arange(BLOCK_SIZE)).reshape(-1)
    return tokens[tokens <= position]


def attention(
    q: NDArray, keys: NDArray, values: NDArray
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """``[group_size, head_dim]`` output and ``[group_size]`` log-sum-exp over the given keys."""
    logits = q.astype(np.float64) @ keys.astype(np.float64).T * q.shape[1] ** -0.5
    lse = _logsumexp(logits, 1)
    return np.exp(logits - lse[:, None]) @ values.astype(np.float64), lse


def _logsumexp(x: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    peak = x.max(axis, keepdims=True, initial=-np.inf)
    peak = np.where(np.isfinite(peak), peak, 0)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(x - peak).sum(axis)) + peak.squeeze(axis)
