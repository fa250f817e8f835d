"""reference/attention.py against a second implementation and against what must hold of any data.

The reference is fp32. Its error against float64 is a few times 1e-6 for unit-variance data and dot
products of 8 to 128 terms; 2e-5 leaves a factor of several and is far under what a wrong block, a
missing key or a wrong scale changes (1e-1).
"""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brute_force import infllmv2_rows
from fd_minicpm41.config import SparseConfig
from fd_minicpm41.reference.attention import (
    block_mask,
    block_sparse_attention,
    compress_keys,
    dense_attention,
    forced_blocks,
    infllmv2_attention,
    num_windows,
    score_blocks,
    select_blocks,
)

ATOL = 2e-5
SMALL = SparseConfig(
    topk=3, window_size=64, dense_len=-1
)  # a budget of 4 blocks: sparse from 257 on
WINDOW_LENGTHS = (
    *(1, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 79, 80),
    *(127, 128, 129, 191, 192, 193, 1023, 1024, 1025),
)


def random_qkv(num_tokens, *, history_len=0, num_q_heads=4, num_kv_heads=2, head_dim=8, seed=0):
    rng = np.random.default_rng(seed)
    kv_len = history_len + num_tokens
    return (
        paddle.to_tensor(rng.standard_normal([num_tokens, num_q_heads, head_dim], np.float32)),
        paddle.to_tensor(rng.standard_normal([kv_len, num_kv_heads, head_dim], np.float32)),
        paddle.to_tensor(rng.standard_normal([kv_len, num_kv_heads, head_dim], np.float32)),
    )


def assert_close(got, wanted, atol=ATOL):
    np.testing.assert_allclose(np.asarray(got), np.asarray(wanted), rtol=0, atol=atol)


def assert_same_list(got, wanted, scores, budget, forced):
    """Equal lists, or a swap of blocks whose scores tie with the last one chosen within fp32."""
    if got == wanted:
        return
    assert len(got) == len(wanted) == budget
    assert forced <= set(got)
    threshold = min(scores[b] for b in wanted if b not in forced)
    for b in set(got) ^ set(wanted):
        assert scores[b] == pytest.approx(threshold, rel=1e-5)


@pytest.mark.parametrize("history_len, num_tokens", [(0, 1), (0, 420), (333, 90), (640, 1)])
@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        SparseConfig(topk=3, window_size=64, dense_len=350),
        SparseConfig(topk=2, window_size=0, init_blocks=0, dense_len=-1),
        SparseConfig(topk=4, window_size=128, init_blocks=2, dense_len=400),
        SparseConfig(kernel_size=16, kernel_stride=8, topk=3, window_size=64, dense_len=-1),
        SparseConfig(kernel_size=64, kernel_stride=32, topk=3, window_size=64, dense_len=-1),
    ],
    ids=["small", "dense-below-350", "no-local", "two-init", "fine-windows", "wide-windows"],
)
def test_equals_brute_force(config, history_len, num_tokens):
    q, k, v = random_qkv(num_tokens, history_len=history_len, seed=num_tokens)
    out, topk_idx = infllmv2_attention(q, k, v, config, history_len)
    wanted, lists, scores = infllmv2_rows(
        *(x.numpy().astype(np.float64) for x in (q, k, v)),
        history_len=history_len,
        init_blocks=config.init_blocks,
        local_blocks=config.local_blocks,
        budget=config.budget,
        dense_len=config.dense_len,
        kernel_size=config.kernel_size,
        kernel_stride=config.kernel_stride,
    )
    swapped = np.zeros(out.shape[:2], bool)
    for g in range(k.shape[1]):
        for t in range(num_tokens):
            got = [int(b) for b in topk_idx[g, t].numpy() if b >= 0]
            own = (history_len + t) // 64
            forced = {
                b
                for b in range(own + 1)
                if b < config.init_blocks or b >= own - config.local_blocks
            }
            assert_same_list(got, lists[g][t], scores[g][t], config.budget, forced)
            swapped[t, 2 * g : 2 * g + 2] = got != lists[g][t]
    assert swapped.mean() < 0.01  # exact ties hardly occur in random data
    assert_close(out.numpy()[~swapped], wanted[~swapped])


@pytest.mark.parametrize("kv_len", WINDOW_LENGTHS)
def test_windows_are_the_means_of_the_keys_they_cover(kv_len):
    k = random_qkv(kv_len)[1]
    k1, k2 = compress_keys(k, SparseConfig())
    for means, size, stride in ((k1, 32, 16), (k2, 128, 64)):
        starts = [s for s in range(0, kv_len, stride) if s + size <= kv_len]
        assert means.shape[0] == len(starts) == num_windows(kv_len, size, stride)
        for j, start in enumerate(starts):
            assert_close(means[j], k.numpy()[start : start + size].mean(0), atol=1e-6)


def test_compressed_keys_are_rounded_once_to_the_keys_dtype():
    k = random_qkv(300)[1].astype("bfloat16")
    k1, _ = compress_keys(k, SparseConfig())
    assert k1.dtype == paddle.bfloat16
    exact, _ = compress_keys(k.astype("float32"), SparseConfig())
    assert bool((k1 == exact.astype("bfloat16")).all())


def test_a_row_never_sees_a_later_token():
    q, k, v = random_qkv(600)
    out, topk_idx = infllmv2_attention(q, k, v, SMALL)
    for p in (0, 30, 31, 63, 64, 126, 127, 255, 256, 300, 511, 598):
        k_later, v_later = k.clone(), v.clone()
        k_later[p + 1 :] = 7.0
        v_later[p + 1 :] = 1e30
        out_later, topk_later = infllmv2_attention(q, k_later, v_later, SMALL)
        assert bool((out_later[: p + 1] == out[: p + 1]).all())
        assert bool((topk_later[:, : p + 1] == topk_idx[:, : p + 1]).all())


def test_sparse_equals_dense_until_the_budget_is_full_and_differs_beyond():
    q, k, v = random_qkv(700)
    out, _ = infllmv2_attention(q, k, v, SMALL)
    dense = dense_attention(q, k, v)
    boundary = SMALL.budget * 64
    assert bool((out[:boundary] == dense[:boundary]).all())
    assert float((out[boundary:] - dense[boundary:]).abs().max()) > 0.1


@pytest.mark.parametrize("config", [SMALL, SparseConfig(topk=5, window_size=128, dense_len=-1)])
def test_lists_are_full_ascending_causal_and_hold_the_forced_blocks(config):
    q, k, v = random_qkv(1000, seed=3)
    topk_idx = infllmv2_attention(q, k, v, config)[1].numpy()
    forced = forced_blocks(paddle.arange(1000), 16, config).numpy()
    for p in range(1000):
        own = p // 64
        for g in range(2):
            row = topk_idx[g, p]
            listed = row[row >= 0]
            assert len(listed) == min(config.budget, own + 1)
            assert (np.diff(listed) > 0).all() and listed[-1] == own
            assert (row[len(listed) :] == -1).all()
            assert set(np.flatnonzero(forced[p])) <= set(listed)


def test_the_local_rules_of_the_paper_and_of_hugging_face_differ_by_one_block():
    positions = paddle.to_tensor([64 * 50 + 5])
    config = SparseConfig()
    hf = forced_blocks(positions, 51, config).numpy()[0]
    paper = forced_blocks(positions, 51, config, local="paper").numpy()[0]
    assert list(np.flatnonzero(hf)) == [0, *range(18, 51)]
    assert list(np.flatnonzero(paper)) == [0, *range(19, 51)]
    assert config.budget == 96


@pytest.mark.parametrize("kv_len", [6143, 6144, 6145, 8190, 8191, 8192, 8193, 8255, 8256, 8257])
def test_the_published_switch(kv_len):
    """The last row of a prompt: dense under 8192 tokens; sparse shows only beyond 96 blocks."""
    config = SparseConfig()
    q, k, v = random_qkv(1, history_len=kv_len - 1, seed=kv_len)
    out, topk_idx = infllmv2_attention(q, k, v, config, kv_len - 1)
    dense = dense_attention(q, k, v, kv_len - 1)
    listed = topk_idx.numpy()[0, 0]
    if kv_len < 8192:
        assert bool((out == dense).all())
        assert list(listed) == list(range(96))
    else:
        assert float((out - dense).abs().max()) > 1e-3
        assert listed[0] == 0 and listed[-1] == (kv_len - 1) // 64 and (listed >= 0).all()


def test_dense_len_of_minus_one_is_sparse_from_the_first_row_the_budget_does_not_hold():
    q, k, v = random_qkv(1, history_len=6144)
    out, _ = infllmv2_attention(q, k, v, SparseConfig(), 6144, dense_len=-1)
    assert float((out - dense_attention(q, k, v, 6144)).abs().max()) > 1e-3


@pytest.mark.parametrize("dense_len", [-1, 300])
@pytest.mark.parametrize("cut", [1, 63, 64, 65, 128, 256, 299, 300, 301, 449])
def test_a_prompt_may_be_cut_anywhere(cut, dense_len):
    q, k, v = random_qkv(450)
    whole, topk_whole = infllmv2_attention(q, k, v, SMALL, 0, dense_len)
    head, topk_head = infllmv2_attention(q[:cut], k[:cut], v[:cut], SMALL, 0, dense_len)
    tail, topk_tail = infllmv2_attention(q[cut:], k, v, SMALL, cut, dense_len)
    assert_close(paddle.concat([head, tail]), whole)
    assert bool((paddle.concat([topk_head, topk_tail], axis=1) == topk_whole).all())


def test_token_by_token_equals_one_shot_through_every_length():
    q, k, v = random_qkv(400, seed=5)
    whole, topk_whole = infllmv2_attention(q, k, v, SMALL)
    for p in range(400):
        out, topk_idx = infllmv2_attention(q[p : p + 1], k[: p + 1], v[: p + 1], SMALL, p)
        assert_close(out[0], whole[p])
        assert bool((topk_idx[:, 0] == topk_whole[:, p]).all())


def test_heads_of_a_group_commute_and_so_do_groups():
    q, k, v = random_qkv(500, num_q_heads=8)
    out, topk_idx = infllmv2_attention(q, k, v, SMALL)
    within = paddle.to_tensor([2, 0, 3, 1, 4, 5, 7, 6])
    out_within, topk_within = infllmv2_attention(q[:, within], k, v, SMALL)
    assert bool((topk_within == topk_idx).all())
    assert_close(out_within, out[:, within])
    groups = paddle.to_tensor([4, 5, 6, 7, 0, 1, 2, 3])
    out_groups, topk_groups = infllmv2_attention(q[:, groups], k[:, [1, 0]], v[:, [1, 0]], SMALL)
    assert bool((topk_groups == topk_idx[[1, 0]]).all())
    assert_close(out_groups, out[:, groups])


def test_adding_a_constant_to_all_keys_changes_nothing():
    """Softmax is shift invariant, in the scores too: a wrong normaliser shows here."""
    q, k, v = random_qkv(500)
    out, topk_idx = infllmv2_attention(q, k, v, SMALL)
    shift = paddle.to_tensor(np.random.default_rng(1).standard_normal([1, 2, 8], np.float32))
    out_shifted, topk_shifted = infllmv2_attention(q, k + shift, v, SMALL)
    assert bool((topk_shifted == topk_idx).all())
    assert_close(out_shifted, out, atol=5e-5)  # logits of a larger magnitude round coarser


def test_values_enter_linearly_and_unselected_ones_not_at_all():
    q, k, v = random_qkv(500)
    out, topk_idx = infllmv2_attention(q, k, v, SMALL)
    other = random_qkv(500, seed=9)[2]
    summed, _ = infllmv2_attention(q, k, v + 2 * other, SMALL)
    assert_close(summed, out + 2 * infllmv2_attention(q, k, other, SMALL)[0], atol=5e-5)
    chosen = block_mask(topk_idx[:, -1:], 8).numpy()[:, 0]
    v_hidden = v.clone()
    for g in range(2):
        for block in np.flatnonzero(~chosen[g]):
            v_hidden[64 * block : 64 * block + 64, g] = 1e30
    hidden, _ = infllmv2_attention(q[-1:], k, v_hidden, SMALL, 499)
    assert_close(hidden[0], out[-1])


def test_a_larger_budget_keeps_what_a_smaller_one_chose():
    q, k, v = random_qkv(900)
    smaller = None
    for topk in (3, 4, 6, 9):
        config = SparseConfig(topk=topk, window_size=64, dense_len=-1)
        mask = block_mask(infllmv2_attention(q, k, v, config)[1], 15)
        if smaller is not None:
            assert bool((mask | ~smaller).all())
        smaller = mask


def test_a_needle_is_found_by_both_kv_heads_and_equal_keys_choose_the_lowest_ids():
    q, k, v = random_qkv(1, history_len=1500, num_q_heads=8, head_dim=32)
    k[64 * 11 + 16 : 64 * 11 + 48] = q[0].reshape([2, 4, 32]).mean(1) * 4
    _, topk_idx = infllmv2_attention(q, k, v, SMALL, 1500)
    assert (topk_idx.numpy() == 11).any(axis=2).all()
    _, topk_idx = infllmv2_attention(q, paddle.ones_like(k), v, SMALL, 1500)
    assert topk_idx.numpy()[:, 0].tolist() == [[0, 1, 22, 23]] * 2


def test_huge_queries_and_one_dominating_head_stay_finite():
    q, k, v = random_qkv(400)
    q[:, 1] *= 1e4
    out, topk_idx = infllmv2_attention(q, k, v, SMALL)
    assert bool(paddle.isfinite(out).all())
    assert (topk_idx.numpy()[:, -1] >= 0).all()
    dominated = score_blocks(q, *compress_keys(k, SMALL), SMALL).numpy()[0, -1]
    alone = score_blocks(q[:, 1:2], *compress_keys(k[:, :1], SMALL), SMALL).numpy()[0, -1]
    # The other head adds about e^0, which shows only where the dominating one scores a block low.
    np.testing.assert_allclose(dominated[alone > 50], alone[alone > 50], rtol=1e-4)
    assert (alone > 50).sum() >= 4


def test_a_row_without_a_block_is_zero():
    q, k, v = random_qkv(3)
    nothing = paddle.full([2, 3, 4], -1, "int32")
    assert bool((block_sparse_attention(q, k, v, nothing) == 0).all())


def test_attention_over_a_list_is_what_the_whole_does():
    q, k, v = random_qkv(1, history_len=700)
    out, topk_idx = infllmv2_attention(q, k, v, SMALL, 700)
    assert bool((block_sparse_attention(q, k, v, topk_idx, 700) == out).all())
    k1, k2 = compress_keys(k, SMALL)
    assert bool((select_blocks(q, k1, k2, SMALL, 700) == topk_idx).all())


@settings(max_examples=25, deadline=None)
@given(
    history_len=st.integers(0, 400),
    num_tokens=st.integers(1, 40),
    topk=st.integers(2, 5),
    window=st.integers(0, 2),
    dense_len=st.sampled_from([-1, 0, 64, 200, 257]),
    seed=st.integers(0, 2**16),
)
def test_any_geometry_equals_brute_force(history_len, num_tokens, topk, window, dense_len, seed):
    config = SparseConfig(topk=topk, window_size=64 * window, dense_len=dense_len)
    q, k, v = random_qkv(num_tokens, history_len=history_len, seed=seed)
    out, topk_idx = infllmv2_attention(q, k, v, config, history_len)
    wanted, lists, _ = infllmv2_rows(
        *(x.numpy().astype(np.float64) for x in (q, k, v)),
        history_len=history_len,
        init_blocks=1,
        local_blocks=window,
        budget=config.budget,
        dense_len=dense_len,
    )
    got = [[[int(b) for b in row if b >= 0] for row in head] for head in topk_idx.numpy()]
    assert got == lists
    assert_close(out, wanted)
