"""The error budget, in NumPy: how far a kernel may be from the truth, and why.

A tolerance is never picked: it is twice the error that a framework makes in the same dtype,
measured in the test, plus one rounding of the result. Two, because a kernel adds in another order
and rounds in other places than the framework; no number has to change with the dtype.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# From 1 to the next number; rounding a result moves it by half of that at most.
EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def same_dtype_attention(
    q: NDArray, keys: NDArray, values: NDArray, allowed: NDArray[np.bool_]
) -> NDArray:
    """Attention as a framework does it op by op: each op's result is rounded to the inputs' dtype.

    Args:
        q: ``[num_tokens, num_q_heads, head_dim]``.
        keys, values: ``[kv_len, num_kv_heads, head_dim]``.
        allowed: ``[num_kv_heads, num_tokens, kv_len]``.

    Returns:
        As ``q``, in float64.
    """
    dtype = q.dtype

    def rounded(x: NDArray) -> NDArray:
        return x.astype(dtype).astype(np.float32)

    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads = keys.shape[1]
    grouped = q.astype(np.float32).reshape(num_tokens, num_kv_heads, -1, head_dim)
    logits = rounded(np.einsum("tghd,kgd->gthk", grouped, keys.astype(np.float32), optimize=True))
    logits = rounded(logits * np.float32(head_dim**-0.5))
    logits = np.where(allowed[:, :, None], logits, -np.inf)
    peak = logits.max(-1, keepdims=True)
    weights = np.exp(logits - np.where(np.isfinite(peak), peak, 0))
    total = weights.sum(-1, keepdims=True)
    weights = rounded(weights / np.where(total > 0, total, 1))
    # Keys that are not allowed may hold NaN, and 0 * NaN is NaN.
    seen = np.where(allowed.any(1).T[:, :, None], values.astype(np.float32), 0)
    out = rounded(np.einsum("gthk,kgd->tghd", weights, seen, optimize=True))
    return out.reshape(q.shape).astype(np.float64)


def exact_attention(
    q: NDArray, keys: NDArray, values: NDArray, allowed: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Attention and the log-sum-exp of its logits in float64, arguments as above.

    Returns:
        out as ``q``, lse ``[num_tokens, num_q_heads]``; a row without keys has 0 and -inf.
    """
    q, keys, values = (x.astype(np.float64) for x in (q, keys, values))
    num_tokens, num_q_heads, head_dim = q.shape
    grouped = q.reshape(num_tokens, keys.shape[1], -1, head_dim)
    logits = np.einsum("tghd,kgd->gthk", grouped, keys, optimize=True) * head_dim**-0.5
    logits = np.where(allowed[:, :, None], logits, -np.inf)
    peak = logits.max(-1, keepdims=True)
    peak = np.where(np.isfinite(peak), peak, 0)
    weights = np.exp(logits - peak)
    total = weights.sum(-1, keepdims=True)
    out = np.einsum(
        "gthk,kgd->gthd", weights / np.where(total > 0, total, 1), values, optimize=True
    )
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + peak)[..., 0]
    shape = (num_tokens, num_q_heads)
    return out.transpose(1, 0, 2, 3).reshape(*shape, head_dim), lse.transpose(1, 0, 2).reshape(
        shape
    )


def same_dtype_errors(
    q: NDArray, keys: NDArray, values: NDArray, allowed: NDArray[np.bool_], orders: int = 3
) -> NDArray[np.float64]:
    """:func:`same_dtype_attention` where it came out worst, over some orders of addition.

    A sum in fp32 is as good as its order is lucky, and a few rows are few draws.
    """
    truth, _ = exact_attention(q, keys, values, allowed)
    worst = same_dtype_attention(q, keys, values, allowed)
    rng = np.random.default_rng(0)
    for _ in range(orders - 1):
        tokens, dims = rng.permutation(len(keys)), rng.permutation(q.shape[2])
        inputs = q[:, :, dims], keys[tokens][:, :, dims], values[tokens], allowed[:, :, tokens]
        out = same_dtype_attention(*inputs)
        worst = np.where(np.abs(out - truth) > np.abs(worst - truth), out, worst)
    return worst


def assert_within_budget(
    got: NDArray, truth: NDArray, framework: NDArray, dtype: str, what: str = "result"
) -> None:
    """``max |got - truth| <= 2 * max |framework - truth| + one rounding``, where truth is finite;
    elsewhere neither is."""
    got, truth, framework = (np.asarray(x).astype(np.float64) for x in (got, truth, framework))
    assert got.shape == truth.shape == framework.shape, (what, got.shape, truth.shape)
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(truth), err_msg=what)
    finite = np.isfinite(truth)
    if not finite.any():
        return
    error = np.abs(got - truth)[finite].max()
    budget = 2 * np.abs(framework - truth)[finite].max()
    budget += EPSILON[dtype] / 2 * np.abs(truth)[finite].max()
    assert error <= budget, f"{what}: off by {error:.3g}, budget {budget:.3g}"


def assert_within_one_step(got: NDArray, wanted: NDArray, what: str = "result") -> None:
    """Each number equal to the other or its neighbour in their common dtype."""
    assert got.dtype == wanted.dtype and got.shape == wanted.shape, (what, got.shape, wanted.shape)
    name = got.dtype.name
    got, wanted = got.astype(np.float64), wanted.astype(np.float64)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(wanted), err_msg=what)
    step = EPSILON[name] * np.exp2(np.floor(np.log2(np.maximum(np.abs(wanted), 1e-30))))
    wrong = np.abs(got - wanted) > step
    assert not wrong.any(), f"{what}: {wrong.sum()} of {wrong.size} are more than a step off"


def assert_selection(
    topk_idx: NDArray[np.int32],
    scores: NDArray[np.float32],
    forced: NDArray[np.bool_],
    positions: NDArray[np.int64],
    budget: int,
    dense_len: int,
    tolerance: float = 1e-4,
) -> None:
    """That each row lists what the scores say, ties and near ties open.

    Count, order and forced blocks are exact. Of the others, each chosen one scores at least, each
    rejected one at most the lowest score the reference would choose, give or take ``tolerance``:
    scores are logarithms in fp32, of sums over dozens of heads and hundreds of keys in any order.

    Args:
        topk_idx: ``[num_kv_heads, num_tokens, budget]``.
        scores: the reference's ``[num_kv_heads, num_tokens, num_blocks]``.
        forced: ``[num_tokens, num_blocks]``.
        positions: ``[num_tokens]``.
    """
    for head in range(topk_idx.shape[0]):
        for row, position in enumerate(positions):
            where = f"kv head {head}, position {position}"
            own = int(position) // 64
            count = min(budget, own + 1)
            listed = topk_idx[head, row]
            assert (listed[count:] == -1).all(), f"{where}: {listed}"
            chosen = listed[:count]
            assert (np.diff(chosen) > 0).all() and chosen[0] >= 0 and chosen[-1] <= own, where
            if own + 1 <= budget or position + 1 < dense_len:
                assert (chosen == np.arange(count)).all(), f"{where}: {chosen}"
                continue
            is_chosen = np.zeros(own + 1, bool)
            is_chosen[chosen] = True
            is_forced = forced[row, : own + 1]
            assert is_chosen[is_forced].all(), f"{where}: misses a forced block, {chosen}"
            open_scores = scores[head, row, : own + 1][~is_forced]
            open_chosen = is_chosen[~is_forced]
            if not open_chosen.any():
                continue
            threshold = np.sort(open_scores)[::-1][open_chosen.sum() - 1]
            assert (open_scores[open_chosen] >= threshold - tolerance).all(), where
            assert (open_scores[~open_chosen] <= threshold + tolerance).all(), where
