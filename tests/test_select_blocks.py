"""select_blocks on the CPU against the reference, and properties that need no reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import capi
from accuracy import assert_selection
from cases import TRUE_GEOMETRY, Geometry, Step, make_step, store_windows
from cpu_ops import (
    NOT_WRITTEN,
    SMALL,
    active,
    compress,
    make_compressed_step,
    only,
    part,
    positions_of,
    reference_forced,
    reference_scores,
    select,
    with_poisoned_request,
)
from fd_minicpm41.config import SparseConfig

GEOMETRIES = [
    Geometry(),
    Geometry(8, 2, 64, "bfloat16"),
    Geometry(6, 1, 48, "float16"),
    Geometry(40, 2, 16),  # a group of 20: more than one column of lanes
    TRUE_GEOMETRY,
]


def assert_equal_to_reference(step: Step, config: SparseConfig) -> None:
    topk_idx = select(step, config)
    assert (topk_idx[:, step.is_padding()] == NOT_WRITTEN).all()
    for request in active(step):
        assert_selection(
            topk_idx[:, step.rows(request)],
            reference_scores(step, request, config),
            reference_forced(step, request, config),
            positions_of(step, request),
            config.budget,
            config.dense_len,
        )


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_mixed_batch(geometry: Geometry) -> None:
    step = make_compressed_step([(0, 600), (1030, 1), (0, 0), (700, 77), (383, 3)], geometry)
    assert_equal_to_reference(step, SMALL)


@pytest.mark.parametrize("length", [127, 128, 129, 383, 384, 385, 447, 448, 449, 1023, 1024, 1025])
def test_lengths_around_every_edge(length: int) -> None:
    assert_equal_to_reference(make_compressed_step([(length - 1, 1), (0, length)]), SMALL)


@pytest.mark.parametrize("dense_len", [-1, 511, 512, 513, 10_000])
def test_rows_below_dense_len_list_their_first_blocks(dense_len: int) -> None:
    step = make_compressed_step([(0, 600), (509, 5)])
    assert_equal_to_reference(step, replace(SMALL, dense_len=dense_len))


def test_published_sizes() -> None:
    published = SparseConfig()
    geometry = Geometry(32, 2, 64)
    requests = [(8190, 3), (6142, 3), (9000, 4), (8254, 3), (12344, 1)]
    assert_equal_to_reference(make_compressed_step(requests, geometry), published)


@settings(max_examples=25, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(0, 900), st.integers(0, 40)), min_size=1, max_size=4),
    group_size=st.sampled_from([1, 2, 16, 17]),
    init_blocks=st.integers(0, 2),
    window_blocks=st.integers(0, 3),
    chosen=st.integers(1, 5),
    dense_len=st.sampled_from([-1, 0, 300, 500]),
    seed=st.integers(0, 1000),
)
def test_any_batch_and_budget(
    requests: list[tuple[int, int]],
    group_size: int,
    init_blocks: int,
    window_blocks: int,
    chosen: int,
    dense_len: int,
    seed: int,
) -> None:
    config = SparseConfig(
        init_blocks=init_blocks,
        window_size=64 * window_blocks,
        topk=init_blocks + 1 + chosen,
        dense_len=dense_len,
    )
    geometry = Geometry(2 * group_size, 2, 16)
    assert_equal_to_reference(make_compressed_step(requests, geometry, seed=seed), config)


def test_decode_equals_prefill_bitwise() -> None:
    step = make_compressed_step([(0, 700)], padding_rows=0)
    whole = select(step, SMALL)
    for token in (0, 127, 383, 384, 400, 511, 640, 699):
        row = select(part(step, token, token + 1), SMALL)
        np.testing.assert_array_equal(row[:, 0], whole[:, token])


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(1, 699), min_size=1, max_size=4, unique=True))
def test_any_cut_equals_one_prefill_bitwise(cuts: list[int]) -> None:
    step = make_compressed_step([(0, 700)], padding_rows=0)
    whole = select(step, SMALL)
    edges = [0, *sorted(cuts), 700]
    chunks = [
        select(part(step, start, end), SMALL) for start, end in zip(edges, edges[1:], strict=False)
    ]
    np.testing.assert_array_equal(np.concatenate(chunks, axis=1), whole)


def test_alone_and_in_a_crowd_bitwise() -> None:
    crowd = make_compressed_step([(0, 500), (900, 9), (650, 1)])
    together = select(crowd, SMALL)
    for request in range(3):
        alone = select(only(crowd, request), SMALL)
        np.testing.assert_array_equal(alone, together[:, crowd.rows(request)])


def test_nan_in_one_request_does_not_reach_another() -> None:
    clean = make_compressed_step([(700, 5), (800, 9), (650, 1)])
    got = select(with_poisoned_request(clean, 1), SMALL)
    wanted = select(clean, SMALL)
    for request in (0, 2):
        rows = clean.rows(request)
        np.testing.assert_array_equal(got[:, rows], wanted[:, rows])
    # Its own rows still list blocks that exist, as many as they may.
    own = got[:, clean.rows(1)]
    assert ((own >= 0) & (own <= 808 // 64)).all()


def _with_keys(step: Step, change: np.ufunc, amount: np.ndarray) -> Step:
    changed = replace(step, k_cache=change(step.k_cache, amount))
    compress(changed, compress_from=[0] * len(step.requests))
    return changed


def test_adding_one_vector_to_every_key_changes_nothing() -> None:
    # Both softmaxes are blind to it: a wrong normaliser is not.
    step = make_step([(900, 40)])
    rng = np.random.default_rng(3)
    shift = rng.standard_normal((2, 1, 32)).astype(np.float32)
    compress(step, compress_from=[0])
    wanted = select(step, SMALL)
    got = select(_with_keys(step, np.add, shift), SMALL)
    assert (got == wanted).mean() > 0.999  # a near tie may turn with the last bit


def test_equal_keys_tie_to_the_lowest_ids() -> None:
    step = make_step([(1000, 3)])
    step.k_cache[np.isfinite(step.k_cache)] = 0.5
    compress(step, compress_from=[0])
    # 1 initial and 2 local blocks are forced; the 3 others are the first there are.
    for row, own in enumerate([15, 15, 15]):
        wanted = [0, 1, 2, 3, own - 1, own]
        assert (select(step, SMALL)[:, row] == wanted).all()


def test_order_of_heads_in_a_group_does_not_matter_and_groups_are_apart() -> None:
    step = make_compressed_step([(900, 20)], Geometry(32, 2, 32), padding_rows=0)
    wanted = select(step, SMALL)
    heads = np.concatenate([np.arange(16)[::-1], 16 + np.roll(np.arange(16), 5)])
    assert (select(replace(step, q=step.q[:, heads].copy()), SMALL) == wanted).mean() > 0.999
    other = step.q.copy()
    other[:, 16:] *= -1
    got = select(replace(step, q=other), SMALL)
    np.testing.assert_array_equal(got[0], wanted[0])
    assert (got[1] != wanted[1]).any()


def test_finds_the_keys_that_match_the_query() -> None:
    step = make_step([(1500, 1)], padding_rows=0)
    table = step.block_tables[0]
    needle = 5  # neither initial nor local
    for head in range(2):
        step.k_cache[table[needle], head, 10:58] = 8 * step.q[0, 2 * head]
    compress(step, compress_from=[0])
    assert (select(step, SMALL) == needle).any(axis=2).all()


@pytest.mark.parametrize("scale", [1e3, 1e6])
def test_huge_queries_still_choose(scale: float) -> None:
    step = make_compressed_step([(900, 8)], padding_rows=0)
    topk_idx = select(replace(step, q=step.q * np.float32(scale)), SMALL)
    assert ((topk_idx >= 0) & (np.diff(topk_idx, prepend=-1) > 0)).all()


def test_nested_as_the_budget_grows() -> None:
    step = make_compressed_step([(1500, 10)], padding_rows=0)
    before: list[set[int]] = [set()] * 20
    for topk in range(3, 12):
        lists = select(step, replace(SMALL, topk=topk)).reshape(20, -1)
        now = [set(row.tolist()) for row in lists]
        assert all(small < large for small, large in zip(before, now, strict=True))
        before = now


def test_coarse_windows_only_weigh_heads_against_each_other() -> None:
    # With one head a group, the normaliser cannot change the order.
    step = make_compressed_step([(900, 20)], Geometry(2, 2, 32), padding_rows=0)
    wanted = select(step, SMALL)
    random = np.random.default_rng(1).standard_normal((13, 2, 32)).astype(np.float32)
    store_windows(step, 0, random[:0], random)
    np.testing.assert_array_equal(select(step, SMALL), wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 2}, "budget is 2, wanted at least 3"),
        ({"local_blocks": 0}, "local_blocks is 0, wanted at least 1"),
        ({"init_blocks": -1}, "init_blocks is -1, wanted at least 0"),
        ({"dense_len": -2}, "dense_len is -2, wanted at least -1"),
        ({"softmax_scale": 0.0}, "softmax_scale is 0.000000, wanted a positive number"),
        ({"q_stride": 127}, "q_stride is 127, wanted at least 128"),
        ({"topk_idx": None}, "topk_idx is null, wanted an address"),
    ],
)
def test_refuses(change: dict[str, object], message: str) -> None:
    step = make_compressed_step([(0, 100)])
    topk_idx = np.empty((2, step.num_tokens, SMALL.budget), np.int32)
    params = capi.select_blocks_params(step, SMALL, topk_idx)
    for name, value in change.items():
        setattr(params, name, value)
    with pytest.raises(capi.KernelError) as refusal:
        capi.run_cpu(params)
    assert str(refusal.value) == f"select_blocks: {message}"
