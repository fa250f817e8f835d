"""InfLLM-V2 attention, step by step. Algorithm and edge rules: ``docs/sparse_attention.md``.

One request at a time. Shapes: ``num_tokens`` query tokens at positions ``history_len ..``;
``kv_len = history_len + num_tokens`` keys. All arithmetic is fp32 whatever the inputs; compressed
keys are rounded to the dtype of the keys, as a cache stores them. Sources: the InfLLM-V2 paper
(arXiv 2509.24663), and the Hugging Face modelling code of MiniCPM4 where the paper leaves a choice.
"""

from __future__ import annotations

from typing import Literal

import paddle

from fd_minicpm41.config import SparseConfig

LocalRule = Literal["hf", "paper"]


def infllmv2_attention(
    q: paddle.Tensor,
    k: paddle.Tensor,
    v: paddle.Tensor,
    sparse_config: SparseConfig,
    history_len: int = 0,
    dense_len: int | None = None,
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Attention of a chunk of query tokens, each over the blocks it selects.

    Args:
        q: ``[num_tokens, num_q_heads, head_dim]``, rotated.
        k: ``[history_len + num_tokens, num_kv_heads, head_dim]``, rotated.
        v: as ``k``, not rotated.
        sparse_config: window sizes, budget and switch length.
        history_len: keys that precede the first query token.
        dense_len: overrides ``sparse_config.dense_len``.

    Returns:
        out: ``[num_tokens, num_q_heads, head_dim]``, dtype of ``q``.
        topk_idx: int32 ``[num_kv_heads, num_tokens, budget]``, logical block ids, ascending, -1
        padded. A row at position p with ``p + 1 < dense_len`` attends densely; it lists its causal
        blocks as far as the budget reaches.
    """
    dense_len = sparse_config.dense_len if dense_len is None else dense_len
    k1, k2 = compress_keys(k, sparse_config)
    topk_idx = select_blocks(q, k1, k2, sparse_config, history_len, dense_len)
    positions = history_len + paddle.arange(q.shape[0])
    is_sparse = positions + 1 >= dense_len
    # The switch is per row, so that the result does not depend on how a prompt is cut into chunks.
    allowed = block_mask(topk_idx, num_blocks(k.shape[0])) | ~is_sparse[None, :, None]
    return _masked_attention(q, k, v, history_len, allowed), topk_idx


def compress_keys(
    k: paddle.Tensor, sparse_config: SparseConfig
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Means of every complete fine and coarse window of keys.

    Window j of K1 covers keys ``kernel_stride * j .. kernel_stride * j + kernel_size - 1``; K2 the
    same with 4 times both. Sums are fp32, the result is rounded to the dtype of ``k``.

    Args:
        k: ``[kv_len, num_kv_heads, head_dim]``.

    Returns:
        k1: ``[num_windows(kv_len, kernel_size, kernel_stride), num_kv_heads, head_dim]``.
        k2: likewise for the coarse windows.
    """
    c = sparse_config
    k1 = _window_means(k, c.kernel_size, c.kernel_stride)
    k2 = _window_means(k, c.coarse_kernel_size, c.coarse_kernel_stride)
    return k1, k2


def num_windows(kv_len: int, size: int, stride: int) -> int:
    """Complete windows in the first ``kv_len`` keys; at position p, those of ``kv_len = p + 1``."""
    return max(0, (kv_len - size) // stride + 1)


def num_blocks(kv_len: int, block_size: int = 64) -> int:
    """Blocks that hold ``kv_len`` keys, the last one perhaps in part."""
    return -(-kv_len // block_size)


def score_blocks(
    q: paddle.Tensor,
    k1: paddle.Tensor,
    k2: paddle.Tensor,
    sparse_config: SparseConfig,
    history_len: int = 0,
) -> paddle.Tensor:
    """How much attention each kv head's query group pays to each block, by the compressed keys.

    ``exp(scale * q.k1_j - lse)`` summed over the heads of a group, where ``lse`` is the log-sum-exp
    of ``scale * q.k2`` and ``scale = head_dim ** -0.5``; a block takes the largest value of the
    fine windows that overlap it. A row sees only windows that end at or before its own position.

    Args:
        q: ``[num_tokens, num_q_heads, head_dim]``.
        k1, k2: as :func:`compress_keys` returns them for ``history_len + num_tokens`` keys.

    Returns:
        fp32 ``[num_kv_heads, num_tokens, num_blocks]``, the natural logarithm of that value, which
        ranks alike and cannot overflow; -inf where a row sees no overlapping window.
    """
    c = sparse_config
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads = k1.shape[1]
    positions = history_len + paddle.arange(num_tokens)
    blocks = num_blocks(history_len + num_tokens, c.block_size)
    scores = paddle.full([num_kv_heads, num_tokens, blocks], float("-inf"), "float32")
    if k1.shape[0] == 0:
        return scores

    grouped = q.astype("float32").reshape([num_tokens, num_kv_heads, -1, head_dim])
    grouped = (
        grouped.transpose([1, 2, 0, 3]) * head_dim**-0.5
    )  # [kv_heads, group, tokens, head_dim]

    def logits(keys: paddle.Tensor, size: int, stride: int) -> tuple[paddle.Tensor, paddle.Tensor]:
        product = grouped @ keys.astype("float32").transpose([1, 2, 0]).unsqueeze(1)
        last_token = paddle.arange(keys.shape[0]) * stride + size - 1
        return product, last_token[None, :] <= positions[:, None]

    fine, fine_visible = logits(k1, c.kernel_size, c.kernel_stride)
    if k2.shape[0] > 0:
        coarse, coarse_visible = logits(k2, c.coarse_kernel_size, c.coarse_kernel_stride)
        coarse = paddle.where(coarse_visible, coarse, paddle.full_like(coarse, float("-inf")))
        lse = paddle.logsumexp(coarse, axis=-1, keepdim=True)
        # A row that sees no coarse window has at most 2 blocks, and they are selected anyway.
        lse = paddle.where(paddle.isfinite(lse), lse, paddle.zeros_like(lse))
    else:
        lse = paddle.zeros_like(fine[..., :1])
    window_scores = paddle.logsumexp(fine - lse, axis=1)
    unseen = paddle.full_like(window_scores, float("-inf"))
    window_scores = paddle.where(fine_visible, window_scores, unseen)

    for block in range(blocks):
        first = max(0, (block * c.block_size - c.kernel_size) // c.kernel_stride + 1)
        last = min(k1.shape[0] - 1, (block * c.block_size + c.block_size - 1) // c.kernel_stride)
        if first <= last:
            scores[:, :, block] = window_scores[:, :, first : last + 1].max(axis=-1)
    return scores


def forced_blocks(
    positions: paddle.Tensor, blocks: int, sparse_config: SparseConfig, local: LocalRule = "hf"
) -> paddle.Tensor:
    """The blocks a row attends to whatever their score: the first ones and the local window.

    Args:
        positions: int64 ``[num_tokens]``.
        local: "hf" forces ``local_blocks`` blocks besides the token's own (33 as published),
            "paper" counts its own among them (32).

    Returns:
        bool ``[num_tokens, blocks]``; causal.
    """
    c = sparse_config
    own = (positions // c.block_size)[:, None]
    ids = paddle.arange(blocks)[None, :]
    reach = c.local_blocks if local == "hf" else max(0, c.local_blocks - 1)
    return ((ids < c.init_blocks) | (ids >= own - reach)) & (ids <= own)


def select_blocks(
    q: paddle.Tensor,
    k1: paddle.Tensor,
    k2: paddle.Tensor,
    sparse_config: SparseConfig,
    history_len: int = 0,
    dense_len: int | None = None,
    local: LocalRule = "hf",
) -> paddle.Tensor:
    """The blocks of each row: the forced ones, then the best scores, ties to the lower id.

    Shapes as in :func:`score_blocks`.

    Returns:
        topk_idx: int32 ``[num_kv_heads, num_tokens, budget]``, ascending, -1 padded. A row with no
        more causal blocks than the budget lists them all; one below ``dense_len`` the first ones.
    """
    c = sparse_config
    dense_len = c.dense_len if dense_len is None else dense_len
    scores = score_blocks(q, k1, k2, c, history_len)
    num_kv_heads, num_tokens, blocks = scores.shape
    positions = history_len + paddle.arange(num_tokens)
    ids = paddle.arange(blocks)
    own = positions // c.block_size
    is_causal = ids[None, :] <= own[:, None]
    takes_all = (own + 1 <= c.budget) | (positions + 1 < dense_len)

    keys = paddle.where(paddle.isnan(scores), paddle.full_like(scores, float("-inf")), scores)
    forced = forced_blocks(positions, blocks, c, local)
    keys = paddle.where(forced, paddle.full_like(keys, float("inf")), keys)
    # Below every causal block, whose keys may be -inf when their scores are not numbers.
    lowest = paddle.full_like(keys, paddle.finfo(paddle.float32).min)
    keys = paddle.where(
        is_causal, paddle.maximum(keys, lowest), paddle.full_like(keys, float("-inf"))
    )
    order = paddle.argsort(keys, axis=-1, descending=True, stable=True)
    rank = paddle.argsort(order, axis=-1)
    chosen = is_causal & (takes_all[:, None] | (rank < c.budget))

    listed = paddle.where(chosen, ids.expand_as(rank), paddle.full_like(rank, blocks))
    listed = paddle.sort(listed, axis=-1)[:, :, : c.budget]
    listed = paddle.where(listed < blocks, listed, paddle.full_like(listed, -1))
    topk_idx = paddle.full([num_kv_heads, num_tokens, c.budget], -1, "int32")
    topk_idx[:, :, : listed.shape[2]] = listed.astype("int32")
    return topk_idx


def block_sparse_attention(
    q: paddle.Tensor,
    k: paddle.Tensor,
    v: paddle.Tensor,
    topk_idx: paddle.Tensor,
    history_len: int = 0,
) -> paddle.Tensor:
    """Softmax attention of each row over the causal tokens of its listed blocks.

    Shapes as in :func:`infllmv2_attention`; a row that lists no block gets zeros.
    """
    allowed = block_mask(topk_idx, num_blocks(k.shape[0]))
    return _masked_attention(q, k, v, history_len, allowed)


def dense_attention(
    q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor, history_len: int = 0
) -> paddle.Tensor:
    """Causal softmax attention, shapes as in :func:`infllmv2_attention`."""
    allowed = paddle.ones([k.shape[1], q.shape[0], num_blocks(k.shape[0])], "bool")
    return _masked_attention(q, k, v, history_len, allowed)


def block_mask(topk_idx: paddle.Tensor, blocks: int) -> paddle.Tensor:
    """Lists of blocks as bool ``[num_kv_heads, num_tokens, blocks]``."""
    num_kv_heads, num_tokens, _ = topk_idx.shape
    targets = paddle.where(topk_idx >= 0, topk_idx, paddle.full_like(topk_idx, blocks))
    targets = targets.astype("int64")
    marks = paddle.zeros([num_kv_heads, num_tokens, blocks + 1], "int64")
    marks = paddle.put_along_axis(marks, targets, 1, axis=2)
    return marks[:, :, :blocks].astype("bool")


def _window_means(k: paddle.Tensor, size: int, stride: int) -> paddle.Tensor:
    count = num_windows(k.shape[0], size, stride)
    if count == 0:
        return paddle.zeros([0, *k.shape[1:]], k.dtype)
    strips = k[: (count - 1) * stride + size].astype("float32")
    strips = strips.reshape([-1, stride, *k.shape[1:]]).sum(axis=1)
    total = strips[:count]
    for strip in range(1, size // stride):
        total = total + strips[strip : strip + count]
    return (total / size).astype(k.dtype)


def _masked_attention(
    q: paddle.Tensor,
    k: paddle.Tensor,
    v: paddle.Tensor,
    history_len: int,
    allowed: paddle.Tensor,
    block_size: int = 64,
    chunk: int = 128,
) -> paddle.Tensor:
    """Attention where ``allowed[kv_head, token, block]``, in chunks of tokens to bound memory."""
    num_tokens, num_q_heads, head_dim = q.shape
    kv_len, num_kv_heads, _ = k.shape
    keys = k.astype("float32").transpose([1, 2, 0]).unsqueeze(1)  # [kv_heads, 1, head_dim, kv_len]
    values = v.astype("float32").transpose([1, 0, 2]).unsqueeze(1)
    key_positions = paddle.arange(kv_len)
    key_blocks = key_positions // block_size

    outs = []
    for start in range(0, num_tokens, chunk):
        rows = q[start : start + chunk].astype("float32")
        grouped = rows.reshape([rows.shape[0], num_kv_heads, -1, head_dim]).transpose([1, 2, 0, 3])
        positions = history_len + start + paddle.arange(rows.shape[0])
        kv_len = history_len + start + rows.shape[0]  # no row of this chunk sees further
        visible = key_positions[None, :kv_len] <= positions[:, None]
        row_blocks = allowed[:, start : start + chunk]
        visible = visible & paddle.gather(row_blocks, key_blocks[:kv_len], axis=2)
        logits = grouped @ keys[..., :kv_len] * head_dim**-0.5
        logits = paddle.where(visible.unsqueeze(1), logits, paddle.full_like(logits, float("-inf")))
        peak = logits.max(axis=-1, keepdim=True)
        peak = paddle.where(paddle.isfinite(peak), peak, paddle.zeros_like(peak))
        # Masked again: the CPU's vectorised exp returns 1e-38 for -inf, and a value may be 1e30.
        weights = paddle.exp(logits - peak) * visible.unsqueeze(1).astype("float32")
        total = weights.sum(axis=-1, keepdim=True)
        # A row without a key has weights of 0 only: its result is 0, not a division by 0.
        out = weights @ values[:, :, :kv_len]
        out = out / paddle.where(total > 0, total, paddle.ones_like(total))
        outs.append(out.transpose([2, 0, 1, 3]).reshape([rows.shape[0], num_q_heads, head_dim]))
    return paddle.concat(outs).astype(q.dtype)
