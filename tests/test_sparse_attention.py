"""sparse_attention on the CPU against the reference, and properties that need no reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import capi
from accuracy import assert_within_budget, exact_attention, same_dtype_errors
from cases import TRUE_GEOMETRY, Geometry, Step, make_step
from cpu_ops import (
    SMALL,
    active,
    allowed_tokens,
    attend,
    instruction_set,
    make_compressed_step,
    only,
    part,
    reference_attention,
    select,
    with_poisoned_request,
)

GEOMETRIES = [
    Geometry(),
    Geometry(8, 2, 64, "bfloat16"),
    Geometry(6, 1, 48, "float16"),
    Geometry(40, 2, 16),  # a group of 20: more than one column of lanes
    TRUE_GEOMETRY,
    replace(TRUE_GEOMETRY, dtype="bfloat16"),
]
MIXED = [(0, 600), (1030, 1), (0, 0), (700, 77), (383, 3)]


def assert_equal_to_reference(step: Step, topk_idx: NDArray[np.int32], dense_len: int = -1) -> None:
    out, lse = attend(step, topk_idx, dense_len)
    padding = step.is_padding()
    assert (out[padding] == 0).all() and (lse[padding] == -np.inf).all()
    g, is_fp32 = step.geometry, step.geometry.dtype == "float32"
    for request in active(step):
        rows = step.rows(request)
        allowed = allowed_tokens(step, request, topk_idx, dense_len)
        q, keys, values = step.q[rows], step.keys[request], step.values[request]
        truth, true_lse = exact_attention(q, keys, values, allowed)
        framework = same_dtype_errors(q, keys, values, allowed, orders=3 if is_fp32 else 1)
        if is_fp32:  # there the reference is such a framework itself, and not the truth
            paddle = reference_attention(step, request, topk_idx, dense_len)
            is_worse = np.abs(paddle - truth) > np.abs(framework - truth)
            framework = np.where(is_worse, paddle, framework)
        assert_within_budget(out[rows], truth, framework, g.dtype, f"request {request}")
        # fp32 whatever the storage: half a step at the largest logit, of sums over head_dim.
        np.testing.assert_allclose(lse[rows], true_lse, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_mixed_batch(geometry: Geometry) -> None:
    step = make_compressed_step(MIXED, geometry)
    assert_equal_to_reference(step, select(step, SMALL))


@pytest.mark.parametrize("dense_len", [-1, 0, 1, 500, 511, 512, 513, 10_000])
def test_dense_and_sparse_rows_in_one_call(dense_len: int) -> None:
    step = make_compressed_step([(0, 600), (509, 5), (510, 1)])
    assert_equal_to_reference(step, select(step, replace(SMALL, dense_len=dense_len)), dense_len)


@pytest.mark.parametrize("length", [1, 15, 31, 33, 63, 64, 65, 127, 128, 129, 383, 384, 385, 449])
def test_lengths_around_every_edge(length: int) -> None:
    step = make_compressed_step([(length - 1, 1), (0, length)])
    assert_equal_to_reference(step, select(step, SMALL))


def test_published_sizes_around_the_switch() -> None:
    # The budget of 96 covers 6144 tokens, and rows are sparse from 8192 on.
    step = make_step([(8189, 4), (6142, 3), (8255, 1)], Geometry(16, 1, 32), padding_rows=0)
    lists = np.full((1, step.num_tokens, 96), -1, np.int32)
    rng = np.random.default_rng(0)
    for token in range(step.num_tokens):
        request = step.batch_id_per_token[token]
        own = int(step.history_lens[request] + token - step.cu_seqlens_q[request]) // 64
        chosen = np.sort(rng.choice(own, min(95, own), replace=False))
        lists[0, token, : len(chosen) + 1] = [*chosen, own]
    assert_equal_to_reference(step, lists, dense_len=8192)


# The same examples each time: where rows are few, the largest of their errors is a draw of luck on
# both sides of the budget, and one batch in some thousands exceeds it by a few per cent.
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    requests=st.lists(st.tuples(st.integers(0, 500), st.integers(0, 30)), min_size=1, max_size=4),
    group_size=st.sampled_from([1, 2, 16, 17]),
    dense_len=st.sampled_from([-1, 100, 300]),
    budget=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_any_batch_and_lists(
    requests: list[tuple[int, int]], group_size: int, dense_len: int, budget: int, seed: int
) -> None:
    step = make_step(requests, Geometry(2 * group_size, 2, 16), seed=seed)
    rng = np.random.default_rng(seed)
    lists = np.full((2, step.num_tokens, budget), -1, np.int32)
    for token in np.flatnonzero(~step.is_padding()):
        request = step.batch_id_per_token[token]
        own = (step.history_lens[request] + token - step.cu_seqlens_q[request]) // 64
        for head in range(2):
            count = rng.integers(0, min(budget, own + 1) + 1)  # an empty list as well
            lists[head, token, :count] = np.sort(rng.choice(own + 1, count, replace=False))
    assert_equal_to_reference(step, lists, dense_len)


def test_a_row_that_lists_nothing_is_zero() -> None:
    step = make_step([(100, 2)])
    out, lse = attend(step, np.full((2, 4, 3), -1, np.int32))
    assert (out[:2] == 0).all() and (lse[:2] == -np.inf).all()


def test_sparse_equals_dense_bitwise_while_the_budget_covers_all() -> None:
    step = make_compressed_step([(0, 384)])
    topk_idx = select(step, SMALL)
    sparse, dense = attend(step, topk_idx, -1), attend(step, topk_idx, 10_000)
    for got, wanted in zip(sparse, dense, strict=True):
        np.testing.assert_array_equal(got, wanted)
    beyond = make_compressed_step([(384, 1)])
    lists = select(beyond, SMALL)
    assert (attend(beyond, lists, -1)[0] != attend(beyond, lists, 10_000)[0]).any()


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(1, 499), min_size=1, max_size=4, unique=True))
def test_any_cut_equals_one_prefill_bitwise(cuts: list[int]) -> None:
    step = make_compressed_step([(0, 500)], padding_rows=0)
    topk_idx = select(step, SMALL)
    whole = attend(step, topk_idx, 420)[0]
    edges = [0, *sorted(cuts), 500]
    for start, end in zip(edges, edges[1:], strict=False):
        lists = np.ascontiguousarray(topk_idx[:, start:end])
        np.testing.assert_array_equal(
            attend(part(step, start, end), lists, 420)[0], whole[start:end]
        )


def test_alone_and_in_a_crowd_bitwise() -> None:
    crowd = make_compressed_step([(0, 500), (900, 9), (650, 1)], Geometry(32, 2, 64))
    topk_idx = select(crowd, SMALL)
    together = attend(crowd, topk_idx)[0]
    for request in range(3):
        rows = crowd.rows(request)
        lists = np.ascontiguousarray(topk_idx[:, rows])
        np.testing.assert_array_equal(attend(only(crowd, request), lists)[0], together[rows])


@pytest.mark.parametrize("threads", ["1", "3", "16"])
def test_number_of_threads_changes_nothing(threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step = make_compressed_step(MIXED)
    lists, out = select(step, SMALL), None
    out = attend(step, lists)[0]
    monkeypatch.setenv("FD_MINICPM41_CPU_THREADS", threads)
    np.testing.assert_array_equal(select(step, SMALL), lists)
    np.testing.assert_array_equal(attend(step, lists)[0], out)


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("geometry", GEOMETRIES[:3], ids=str)
def test_every_instruction_set(
    name: str, geometry: Geometry, monkeypatch: pytest.MonkeyPatch
) -> None:
    with instruction_set(name, monkeypatch):
        step = make_compressed_step(MIXED, geometry)
        topk_idx = select(step, SMALL)
    assert_equal_to_reference(step, topk_idx)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("FD_MINICPM41_CPU_THREADS", "0", "wanted a number of threads from 1 to 1024"),
        ("FD_MINICPM41_CPU_THREADS", "two", "wanted a number of threads from 1 to 1024"),
        ("FD_MINICPM41_CPU_ISA", "mmx", "wanted one of baseline"),
    ],
)
def test_refuses_a_bad_setting(
    variable: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = make_compressed_step([(0, 10)])
    monkeypatch.setenv(variable, value)
    with pytest.raises(capi.KernelError, match=f"{variable} is {value}, {message}"):
        select(step, SMALL)


def test_later_tokens_are_invisible_bitwise() -> None:
    step = make_compressed_step([(0, 300)], padding_rows=0)
    topk_idx = select(step, SMALL)
    before = attend(step, topk_idx)[0]
    table = step.block_tables[0]
    for position in range(200, 300):
        for cache in (step.k_cache, step.v_cache):
            cache[table[position // 64], :, position % 64] = np.nan
    np.testing.assert_array_equal(attend(step, topk_idx)[0][:200], before[:200])


def test_values_of_blocks_not_listed_do_not_leak() -> None:
    step = make_compressed_step([(900, 5)], padding_rows=0)
    topk_idx = select(step, SMALL)
    before = attend(step, topk_idx)[0]
    for head in range(2):
        unlisted = np.setdiff1d(np.arange(15), topk_idx[head])
        assert len(unlisted)
        step.v_cache[step.block_tables[0, unlisted], head] = 1e30
        step.k_cache[step.block_tables[0, unlisted], head] = np.nan
    np.testing.assert_array_equal(attend(step, topk_idx)[0], before)


def test_nan_in_one_request_does_not_reach_another() -> None:
    clean = make_compressed_step([(700, 5), (800, 9), (650, 1)])
    topk_idx = select(clean, SMALL)
    got = attend(with_poisoned_request(clean, 1), topk_idx)[0]
    wanted = attend(clean, topk_idx)[0]
    for request in (0, 2):
        rows = clean.rows(request)
        np.testing.assert_array_equal(got[rows], wanted[rows])
    assert np.isnan(got[clean.rows(1)]).all()


def test_linear_in_values() -> None:
    step = make_compressed_step([(500, 5)], padding_rows=0)
    topk_idx = select(step, SMALL)
    once = attend(step, topk_idx)[0]
    doubled = attend(replace(step, v_cache=step.v_cache * 2), topk_idx)[0]
    np.testing.assert_array_equal(doubled, 2 * once)  # a power of 2 moves exponents alone


def test_merging_parts_of_a_list_by_lse_gives_the_whole() -> None:
    step = make_compressed_step([(900, 6)], padding_rows=0)
    whole_list = select(step, SMALL)
    whole, whole_lse = attend(step, whole_list)
    outs, lses = [], []
    for where in (slice(0, 2), slice(2, 6)):
        lists = np.full_like(whole_list, -1)
        piece = whole_list[:, :, where]
        lists[:, :, : piece.shape[2]] = piece
        out, lse = attend(step, lists)
        outs.append(out.astype(np.float64))
        lses.append(lse.astype(np.float64))
    total = np.logaddexp(*lses)
    merged = sum(o * np.exp(s - total)[..., None] for o, s in zip(outs, lses, strict=True))
    np.testing.assert_allclose(total, whole_lse, atol=1e-5)
    np.testing.assert_allclose(merged, whole, atol=1e-5)


def test_huge_logits_are_finite() -> None:
    step = make_compressed_step([(300, 5)], padding_rows=0)
    out = attend(replace(step, q=step.q * np.float32(1e5)), select(step, SMALL))[0]
    assert np.isfinite(out).all()


def test_output_rows_may_lie_apart() -> None:
    step = make_compressed_step([(300, 5)], padding_rows=1)
    topk_idx = select(step, SMALL)
    wanted = attend(step, topk_idx)[0]
    wide = np.full((step.num_tokens, 3, *wanted.shape[1:]), 7, np.float32)
    params = capi.sparse_attention_params(step, topk_idx, wide, -1)
    params.out_stride *= 3
    capi.run_cpu(params)
    np.testing.assert_array_equal(wide[:, 0], wanted)
    assert (wide[:, 1:] == 7).all()


def _lists(step: Step) -> NDArray[np.int32]:
    lists = np.full((2, step.num_tokens, 3), -1, np.int32)
    lists[:, :, 0] = 0
    return lists


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([1, 0, -1], r"topk_idx[1][3][1] is 0"),
        ([0, 0, -1], r"topk_idx[1][3][1] is 0"),
        ([0, 2, -1], r"topk_idx[1][3][1] is 2"),
        ([0, -1, 1], r"topk_idx[1][3][2] is 1"),
        ([-2, -1, -1], r"topk_idx[1][3][0] is -2"),
        ([2_147_480_000, -1, -1], r"topk_idx[1][3][0] is 2147480000"),
    ],
)
def test_refuses_lists_that_are_not_ascending_causal_blocks(bad: list[int], message: str) -> None:
    step = make_step([(100, 5)])
    lists = _lists(step)
    lists[1, 3] = bad
    with pytest.raises(capi.KernelError) as refusal:
        attend(step, lists)
    wanted = "wanted ascending block ids from 0 to 1, then -1"
    assert str(refusal.value) == f"sparse_attention: {message}, {wanted}"
    attend(step, lists, dense_len=1000)  # not read


def test_sizes_of_the_structs_are_checked_on_loading() -> None:
    assert capi.library().minicpm41_sizeof_sparse_attention() > 0
    assert set(capi.build_info()) == {"version", "cuda"}


def test_a_build_without_cuda_says_so() -> None:
    if capi.build_info()["cuda"] != "none":
        pytest.skip("this build has CUDA kernels")
    step = make_step([(0, 5)])
    with pytest.raises(capi.KernelError, match="was built without CUDA: build the package where"):
        capi.run_cuda(capi.compress_keys_params(step), 0)
