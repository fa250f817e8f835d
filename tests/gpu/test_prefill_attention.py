"""Attention of prefill rows over lists that are given, so that nothing depends on how blocks are
selected: the tiles of the prefill kernels, their cuts, and what must not be read."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from gpu_ops import (  # noqa: E402
    BF16,
    FP16,
    PUBLISHED,
    SMALL,
    Sizes,
    assert_output,
    download,
    on_gpu,
    same_bits,
    stream,
    upload,
    window,
)

import capi  # noqa: E402
from cases import HUGE, WINDOW_LENGTHS, Step, make_step  # noqa: E402

ONE_KV_HEAD = replace(BF16, num_q_heads=16, num_kv_heads=1)
FOUR_KV_HEADS = replace(FP16, num_q_heads=64, num_kv_heads=4)
GEOMETRIES = [BF16, FP16, ONE_KV_HEAD, FOUR_KV_HEADS]
# Requests of fewer tokens are decode rows, which other kernels serve.
PREFILL = 16


def positions_of(step: Step) -> NDArray[np.int64]:
    """``[num_tokens]``, -1 for a padding row."""
    positions = np.full(step.num_tokens, -1)
    for number, request in enumerate(step.requests):
        positions[step.rows(number)] = request.history_len + np.arange(request.query_len)
    return positions


def random_lists(step: Step, sizes: Sizes, seed: int = 0, kept: float = 0.8) -> NDArray[np.int32]:
    """``[num_kv_heads, num_tokens, budget]``: forced blocks and those of the highest random scores,
    of which a row keeps a share of about ``kept`` from the row before. Rows under dense_len list
    what nobody may read."""
    rng = np.random.default_rng(seed)
    positions = positions_of(step)
    lists = np.full((step.geometry.num_kv_heads, step.num_tokens, sizes.budget), HUGE, np.int32)
    for listed in lists:
        scores = rng.random(positions.max(initial=0) // 64 + 1)
        for row, position in enumerate(positions):
            if position < 0 or position + 1 < sizes.dense_len:
                continue
            is_new = rng.random(len(scores)) >= kept
            scores[is_new] = rng.random(is_new.sum())
            own = position // 64
            mine = scores[: own + 1].copy()
            mine[: sizes.init_blocks] = mine[max(0, own - sizes.local_blocks) :] = 2
            count = min(sizes.budget, own + 1)
            listed[row] = -1
            listed[row, :count] = np.sort(np.argpartition(mine, -count)[-count:])
    return lists


def attend(
    gpu: Step, lists: NDArray[np.int32], dense_len: int, max_query_len: int | None = None
) -> tuple[NDArray, NDArray]:
    """out and lse of a step on the GPU; ``max_query_len`` as in csrc/params.h."""
    out = torch.full_like(gpu.q, float("nan"))
    lse = torch.full(gpu.q.shape[:2], float("nan"), device="cuda")
    listed = upload(lists)
    params = capi.sparse_attention_params(gpu, listed, out, dense_len, lse)
    if max_query_len is not None:
        params.batch.max_query_len = max_query_len
    # Garbage on purpose: no op may count on what its workspace holds.
    size = capi.workspace_cuda(params)
    workspace = torch.full((max(1, size),), 0xA5, dtype=torch.uint8, device="cuda")
    params.workspace, params.workspace_bytes = workspace.data_ptr(), size
    capi.run_cuda(params, stream())
    torch.cuda.synchronize()
    return download(out), download(lse)


def assert_rows(
    host: Step,
    lists: NDArray[np.int32],
    dense_len: int,
    result: tuple[NDArray, NDArray],
    most: int = 6,
    seed: int = 0,
) -> None:
    """Holds the first and the last row and some others of each request to the oracle."""
    out, lse = result
    rng = np.random.default_rng(seed)
    padding = host.is_padding()
    assert (out[padding].astype(np.float32) == 0).all(), "a padding row's output is not 0"
    assert np.isneginf(lse[padding]).all()
    assert np.isfinite(out.astype(np.float32)).all(), "a row was not written, or reads garbage"
    group = host.geometry.group_size
    for number, request in enumerate(host.requests):
        count = request.query_len
        picks = {0, count - 1, *rng.integers(0, max(count, 1), most - 2).tolist()} if count else ()
        for pick in sorted(picks):
            row, position = int(host.cu_seqlens_q[number]) + pick, request.history_len + pick
            for head in range(host.geometry.num_kv_heads):
                heads = slice(head * group, (head + 1) * group)
                is_dense = position + 1 < dense_len
                assert_output(
                    host.q[row, heads],
                    host.keys[number][:, head],
                    host.values[number][:, head],
                    position,
                    np.arange(position // 64 + 1) if is_dense else lists[head, row],
                    out[row, heads],
                    lse[row, heads],
                    f"request {number}, kv head {head}, position {position}",
                )


def check(
    requests: list[tuple[int, int]], sizes: Sizes, geometry=BF16, most: int = 6, kept: float = 0.8
) -> None:
    host = make_step(requests, geometry)
    lists = random_lists(host, sizes, kept=kept)
    result = attend(on_gpu(host), lists, sizes.dense_len)
    assert_rows(host, lists, sizes.dense_len, result, most)


# ---- lengths, chunks, batches ----


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_prompts_of_every_window_length(geometry) -> None:
    lengths = [*WINDOW_LENGTHS, *range(PREFILL, PREFILL + 13)]
    check([(0, length) for length in lengths], SMALL, geometry, most=2)


@pytest.mark.parametrize("geometry", [BF16, FP16], ids=str)
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.98], ids=str)
def test_chunks_behind_histories_that_are_no_whole_page(geometry, kept: float) -> None:
    requests = [(1, 16), (63, 17), (64, 64), (65, 63), (100, 37), (447, 130), (1999, 201), (640, 1)]
    check(requests, SMALL, geometry, most=4, kept=kept)


@pytest.mark.parametrize("dense_len", [-1, 511, 512, 513, 10_000])
def test_mixed_batch_of_prefill_decode_and_idle_requests(dense_len: int) -> None:
    requests = [(0, 600), (1030, 1), (0, 0), (700, 77), (383, 3), (1500, 1), (20, 15), (495, 16)]
    check(requests, replace(SMALL, dense_len=dense_len), most=5)


def test_more_requests_than_a_warp_has_lanes() -> None:
    rng = np.random.default_rng(5)
    requests = [(int(rng.integers(0, 700)), int(rng.integers(0, 60))) for _ in range(75)]
    check(requests, SMALL, most=2)


def test_published_sizes_around_the_switch() -> None:
    check([(6100, 120), (8150, 150), (0, 300), (12_000, 77)], PUBLISHED, most=4)
    check([(6100, 120)], replace(PUBLISHED, dense_len=-1), FP16, most=4)


# The last has 2100 blocks: the kernels mark 2048 of them at a time.
@pytest.mark.parametrize("kv_len", [16384, 134_400])
def test_chunks_behind_long_histories(kv_len: int) -> None:
    host = make_step([(kv_len - 50, 50)], BF16)
    # Blocks listed by hardly any neighbour, and a dense row beside a sparse one.
    for dense_len, kept in ((8192, 0.0), (kv_len, 0.9)):
        lists = random_lists(host, replace(PUBLISHED, dense_len=dense_len), kept=kept)
        assert_rows(host, lists, dense_len, attend(on_gpu(host), lists, dense_len), most=3)


def test_a_whole_prompt_that_turns_sparse() -> None:
    check([(0, 9001)], PUBLISHED, most=8)


# ---- bits ----


# Where all rows are sparse, the whole prompt has more tiles than a GPU runs thread blocks, all
# about as long, and some are parted. With dense rows tiles are uneven, and none is parted.
@pytest.mark.parametrize("dense_len", [-1, 500])
def test_a_row_does_not_depend_on_where_a_prompt_is_cut(dense_len: int) -> None:
    host = make_step([(0, 900)], BF16, padding_rows=0)
    sizes = replace(SMALL, dense_len=dense_len)
    lists = random_lists(host, sizes)
    gpu = on_gpu(host)
    out, lse = attend(gpu, lists, sizes.dense_len)
    for cuts in ([0, 16, 33, 63, 128, 129 + 16, 500, 884, 900], [0, 451, 900], [0, 900]):
        for start, end in zip(cuts, cuts[1:], strict=False):
            chunk = replace(
                gpu,
                batch_id_per_token=gpu.batch_id_per_token[start:end],
                cu_seqlens_q=torch.tensor([0, end - start], dtype=torch.int32, device="cuda"),
                query_lens=torch.tensor([end - start], dtype=torch.int32, device="cuda"),
                history_lens=torch.tensor([start], dtype=torch.int32, device="cuda"),
                q=gpu.q[start:end].clone(),
            )
            got = attend(chunk, lists[:, start:end], sizes.dense_len)
            same_bits(got[0], out[start:end], f"rows {start} to {end}")
            same_bits(got[1], lse[start:end], f"rows {start} to {end}")


def test_windows_of_a_step_give_the_bits_of_the_whole() -> None:
    # Windows begin and end inside requests, and hold some requests not at all.
    host = make_step([(300, 210), (0, 1), (77, 40), (0, 0), (5, 333)], BF16)
    lists = random_lists(host, SMALL)
    gpu = on_gpu(host)
    out, lse = attend(gpu, lists, SMALL.dense_len)
    for size in (1, 7, 64, 100, 250):
        for first in range(0, host.num_tokens, size):
            rows = slice(first, min(first + size, host.num_tokens))
            got = attend(window(gpu, first, size), lists[:, rows], SMALL.dense_len, 333)
            same_bits(got[0], out[rows], f"{size} rows from {first}")
            same_bits(got[1], lse[rows], f"{size} rows from {first}")


def test_alone_and_in_a_crowd_bitwise() -> None:
    requests = [(9000, 40), (8170, 60), (0, 100), (500, 1), (6000, 200)]
    host = make_step(requests, BF16, padding_rows=0)
    lists = random_lists(host, PUBLISHED)
    gpu = on_gpu(host)
    out, lse = attend(gpu, lists, PUBLISHED.dense_len)
    for number, request in enumerate(requests):
        rows = host.rows(number)
        single = replace(
            gpu,
            batch_id_per_token=torch.zeros(request[1], dtype=torch.int32, device="cuda"),
            cu_seqlens_q=torch.tensor([0, request[1]], dtype=torch.int32, device="cuda"),
            query_lens=gpu.query_lens[number : number + 1].clone(),
            history_lens=gpu.history_lens[number : number + 1].clone(),
            block_tables=gpu.block_tables[number : number + 1].clone(),
            q=gpu.q[rows].clone(),
        )
        got = attend(single, lists[:, rows], PUBLISHED.dense_len)
        same_bits(got[0], out[rows], f"request {number}")
        same_bits(got[1], lse[rows], f"request {number}")


def test_repeated_launches_give_the_same_bits() -> None:
    host = make_step([(7000, 3000), (0, 500)], BF16)
    lists = random_lists(host, PUBLISHED, kept=0.9)
    gpu = on_gpu(host)
    wanted = attend(gpu, lists, PUBLISHED.dense_len)
    for _ in range(5):
        for got, want in zip(attend(gpu, lists, PUBLISHED.dense_len), wanted, strict=True):
            same_bits(got, want)


def test_thread_blocks_that_begin_late_do_not_show() -> None:
    # Tiles are parted here, too. Thread blocks that find no room, since another stream holds their
    # multiprocessors, begin when all others are done.
    host = make_step([(1500, 1200)], BF16)
    sizes = replace(SMALL, dense_len=500)
    lists = random_lists(host, sizes)
    gpu = on_gpu(host)
    wanted = attend(gpu, lists, sizes.dense_len)
    held_ms, clocks_a_ms = 60, 1_900_000
    for holders in (1, 8, 24):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for holder in [torch.cuda.Stream() for _ in range(holders)]:
            with torch.cuda.stream(holder):
                torch.cuda._sleep(held_ms * clocks_a_ms)
        start.record()
        got = attend(gpu, lists, sizes.dense_len)
        end.record()
        torch.cuda.synchronize()
        if torch.cuda.get_device_capability()[0] == 9:  # a thread block there fills its place
            assert start.elapsed_time(end) > held_ms / 4, "nothing was held up"
        for mine, theirs in zip(got, wanted, strict=True):
            same_bits(mine, theirs, f"{holders} multiprocessors held")


def test_graph_replay_equals_an_eager_launch() -> None:
    host = make_step([(7000, 300), (0, 50)], BF16)
    lists = random_lists(host, PUBLISHED)
    gpu = on_gpu(host)
    wanted, _ = attend(gpu, lists, PUBLISHED.dense_len)
    out, listed = torch.full_like(gpu.q, float("nan")), upload(lists)
    params = capi.sparse_attention_params(gpu, listed, out, PUBLISHED.dense_len)
    size = capi.workspace_cuda(params)
    workspace = torch.empty(max(1, size), dtype=torch.uint8, device="cuda")
    params.workspace, params.workspace_bytes = workspace.data_ptr(), size
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        capi.run_cuda(params, stream())
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        same_bits(download(out), wanted)


# ---- what must not show ----


def test_values_that_only_a_neighbour_lists_do_not_leak() -> None:
    host = make_step([(9000, 60)], BF16, padding_rows=0)
    lists = random_lists(host, PUBLISHED, kept=0.5)
    gpu = on_gpu(host)
    out, lse = attend(gpu, lists, PUBLISHED.dense_len)
    for head in range(2):
        row = 30
        others = np.unique(lists[head, row - 8 : row + 8])
        only_neighbours = np.setdiff1d(others, lists[head, row])
        assert len(only_neighbours) > 20
        nobody = np.setdiff1d(np.arange(142), lists[head])
        changed = replace(gpu, k_cache=gpu.k_cache.clone(), v_cache=gpu.v_cache.clone())
        pages = torch.from_numpy(host.block_tables[0, only_neighbours]).cuda().long()
        changed.v_cache[pages, head] = 1e30
        changed.k_cache[pages, head] = -1e30
        pages = torch.from_numpy(host.block_tables[0, nobody]).cuda().long()
        changed.v_cache[pages, head] = float("nan")
        changed.k_cache[pages, head] = float("nan")
        got, got_lse = attend(changed, lists, PUBLISHED.dense_len)
        heads = slice(16 * head, 16 * head + 16)
        same_bits(got[row, heads], out[row, heads])
        same_bits(got_lse[row, heads], lse[row, heads])


def test_nan_in_one_request_does_not_reach_another() -> None:
    host = make_step([(8999, 30), (9499, 40), (0, 70)], BF16)
    lists = random_lists(host, PUBLISHED)
    gpu = on_gpu(host)
    out, _ = attend(gpu, lists, PUBLISHED.dense_len)
    blocks = gpu.block_tables[1, :150].long()
    for name in ("k_cache", "v_cache"):
        getattr(gpu, name)[blocks] = float("nan")
    got, _ = attend(gpu, lists, PUBLISHED.dense_len)
    for request in (0, 2):
        same_bits(got[host.rows(request)], out[host.rows(request)])


def test_tokens_to_come_do_not_show() -> None:
    host = make_step([(1000, 200)], BF16, padding_rows=0)
    lists = random_lists(host, SMALL)
    gpu = on_gpu(host)
    out, _ = attend(gpu, lists, SMALL.dense_len)
    for row in (0, 23, 24, 86, 87, 150):
        changed = replace(gpu, k_cache=gpu.k_cache.clone(), v_cache=gpu.v_cache.clone())
        for position in range(1000 + row + 1, 1200):
            page = int(host.block_tables[0, position // 64])
            changed.k_cache[page, :, position % 64] = 50.0
            changed.v_cache[page, :, position % 64] = -1e30
        got, _ = attend(changed, lists, SMALL.dense_len)
        same_bits(got[: row + 1], out[: row + 1], f"row {row}")


@pytest.mark.parametrize("absent", [-1, HUGE])
def test_blocks_without_a_page_are_absent(absent: int) -> None:
    host = make_step([(9000, 40)], BF16, padding_rows=0)
    lists = random_lists(host, PUBLISHED)
    gpu = on_gpu(host)
    gone = [0, 17, 100, 135]
    for block in gone:
        gpu.block_tables[0, block] = absent
    got = attend(gpu, lists, PUBLISHED.dense_len)
    without = lists.copy()
    without[np.isin(lists, gone)] = -1
    assert (without != lists).any()
    assert_rows(host, without, PUBLISHED.dense_len, got, most=4)


def test_a_request_without_pages_gets_zeros() -> None:
    host = make_step([(9000, 40), (8000, 30)], BF16, padding_rows=0)
    lists = random_lists(host, PUBLISHED)
    gpu = on_gpu(host)
    wanted, _ = attend(gpu, lists, PUBLISHED.dense_len)
    gpu.block_tables[0] = -1
    out, lse = attend(gpu, lists, PUBLISHED.dense_len)
    assert (out[:40].astype(np.float32) == 0).all() and np.isneginf(lse[:40]).all()
    same_bits(out[40:], wanted[40:])


def test_rows_that_list_nothing_or_nonsense() -> None:
    host = make_step([(9000, 48)], BF16, padding_rows=0)
    lists = random_lists(host, PUBLISHED)
    lists[:, 5:9] = -1  # whole warpgroups of rows and single ones
    lists[:, 20] = -1
    nonsense = lists.copy()
    nonsense[:, 5] = 100_000  # no such block
    nonsense[:, 6] = 2**31 - 1
    nonsense[:, 7] = -(2**31)
    nonsense[:, 8] = 142  # in the table's padding, after the row's own block
    got = attend(on_gpu(host), nonsense, PUBLISHED.dense_len)
    empty = np.isin(np.arange(48), [5, 6, 7, 8, 20])
    assert (got[0][empty].astype(np.float32) == 0).all() and np.isneginf(got[1][empty]).all()
    wanted = attend(on_gpu(host), lists, PUBLISHED.dense_len)
    same_bits(got[0], wanted[0])


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_huge_queries_stay_finite(scale: float) -> None:
    host = make_step([(9000, 48)], BF16, padding_rows=0)
    lists = random_lists(host, PUBLISHED)
    gpu = on_gpu(host)
    out, lse = attend(replace(gpu, q=gpu.q * scale), lists, PUBLISHED.dense_len)
    assert np.isfinite(out.astype(np.float32)).all() and np.isfinite(lse).all()


def test_growing_scores_do_not_lose_what_came_before() -> None:
    # Every block's scores lie above those of the block before, so that the softmax's reference
    # moves again and again, by less and by more than it tolerates.
    host = make_step([(3000, 64)], BF16, padding_rows=0)
    for step in (0.5, 3.0, 20.0, 40.0):
        rising = on_gpu(host)
        keys = host.keys[0].astype(np.float32)
        unit = np.zeros(128, np.float32)
        unit[0] = 1
        queries = host.q.astype(np.float32)
        queries[..., 0] = 8
        keys[..., 0] = 0
        keys += (np.arange(3064) // 64 * step / 8 * 11.3)[:, None, None] * unit
        moved = replace(host, q=queries.astype(host.q.dtype), keys=(keys.astype(host.q.dtype),))
        for block in range(48):
            rows = moved.keys[0][block * 64 : block * 64 + 64].transpose(1, 0, 2)
            page = int(host.block_tables[0, block])
            rising.k_cache[page, :, : rows.shape[1]] = upload(np.ascontiguousarray(rows))
        rising = replace(rising, q=upload(moved.q))
        result = attend(rising, np.zeros((2, 64, 6), np.int32), 10_000)
        assert_rows(moved, np.zeros((2, 64, 6), np.int32), 10_000, result)
