"""InfLLM-V2 written a second time, from section 0 of the algorithm alone: float64 loops over rows.

Nothing here is shared with ``fd_minicpm41.reference``; the two are held to each other.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def infllmv2_rows(
    q: Array,
    k: Array,
    v: Array,
    *,
    history_len: int,
    init_blocks: int,
    local_blocks: int,
    budget: int,
    dense_len: int,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    block: int = 64,
) -> tuple[Array, list[list[list[int]]], list[list[dict[int, float]]]]:
    """Output ``[tokens, q_heads, head_dim]``, ``lists[kv_head][token]`` and ``scores`` likewise."""
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    group = num_q_heads // num_kv_heads
    scale = head_dim**-0.5
    out = np.zeros_like(q)
    lists: list[list[list[int]]] = [[] for _ in range(num_kv_heads)]
    all_scores: list[list[dict[int, float]]] = [[] for _ in range(num_kv_heads)]
    for g in range(num_kv_heads):
        for t in range(num_tokens):
            p = history_len + t
            own = p // block
            heads = range(g * group, (g + 1) * group)

            # Windows that end at or before p, straight from the keys.
            fine: list[Array] = []
            while len(fine) * kernel_stride + kernel_size - 1 <= p:
                start = len(fine) * kernel_stride
                fine.append(k[start : start + kernel_size, g].mean(0))
            coarse: list[Array] = []
            while len(coarse) * 4 * kernel_stride + 4 * kernel_size - 1 <= p:
                start = len(coarse) * 4 * kernel_stride
                coarse.append(k[start : start + 4 * kernel_size, g].mean(0))

            window_score = np.zeros(len(fine))
            for h in heads:
                normaliser = 0.0
                if coarse:
                    logits = np.array([scale * q[t, h] @ c for c in coarse])
                    normaliser = logits.max() + math.log(np.exp(logits - logits.max()).sum())
                for j, mean in enumerate(fine):
                    window_score[j] += math.exp(scale * q[t, h] @ mean - normaliser)

            scores: dict[int, float] = {}
            for b in range(own + 1):
                overlapping = [
                    window_score[j]
                    for j in range(len(fine))
                    if j * kernel_stride < (b + 1) * block
                    and j * kernel_stride + kernel_size > b * block
                ]
                scores[b] = max(overlapping, default=-math.inf)
            forced = {b for b in range(own + 1) if b < init_blocks or b >= own - local_blocks}
            rest = sorted(set(range(own + 1)) - forced, key=lambda b: (-scores[b], b))
            is_sparse = p + 1 >= dense_len
            if not is_sparse or own + 1 <= budget:
                chosen = list(range(own + 1))
            else:
                chosen = sorted(forced | set(rest[: budget - len(forced)]))
            lists[g].append(chosen[:budget])
            all_scores[g].append(scores)

            seen = [s for b in chosen for s in range(b * block, min((b + 1) * block, p + 1))]
            for h in heads:
                logits = scale * k[seen, g] @ q[t, h]
                weights = np.exp(logits - logits.max())
                out[t, h] = weights @ v[seen, g] / weights.sum()
    return out, lists, all_scores
