"""The CUDA ops against the oracle, at every edge of the algorithm and in mixed batches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import oracle  # noqa: E402
from gpu_ops import (  # noqa: E402
    BF16,
    FP16,
    PUBLISHED,
    SMALL,
    Launches,
    assert_step,
    compress,
    download,
    from_gpu,
    on_gpu,
    ready,
    run_step,
    same_bits,
    stream,
    upload,
    window,
)

import capi  # noqa: E402
from accuracy import (  # noqa: E402
    assert_within_budget,
    assert_within_one_step,
    same_dtype_attention,
)
from cases import (  # noqa: E402
    DTYPES,
    WINDOW_LENGTHS,
    Step,
    load_windows,
    make_step,
)

ONE_KV_HEAD = replace(BF16, num_q_heads=16, num_kv_heads=1)
FOUR_KV_HEADS = replace(BF16, num_q_heads=64, num_kv_heads=4)
GEOMETRIES = [BF16, FP16, ONE_KV_HEAD, FOUR_KV_HEADS]


def alone(step: Step, request: int) -> Step:
    """One request of a GPU step by itself, over the same pages and with the same table width."""
    rows = step.rows(request)
    count = step.requests[request].query_len
    return replace(
        step,
        requests=(step.requests[request],),
        batch_id_per_token=torch.zeros(count, dtype=torch.int32, device="cuda"),
        cu_seqlens_q=torch.tensor([0, count], dtype=torch.int32, device="cuda"),
        query_lens=step.query_lens[request : request + 1].clone(),
        history_lens=step.history_lens[request : request + 1].clone(),
        block_tables=step.block_tables[request : request + 1].clone(),
        q=step.q[rows].clone(),
    )


# ---- compress_keys, rope_and_write_kv ----


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_windows_of_every_length(geometry) -> None:
    host, gpu = ready([(0, length) for length in WINDOW_LENGTHS], geometry)
    stored = from_gpu(gpu)
    written = 0
    for number in range(len(host.requests)):
        for got, size in zip(load_windows(stored, number), (32, 128), strict=True):
            wanted = oracle.window_means(host.keys[number], size, size // 2).astype(got.dtype)
            assert_within_one_step(got, wanted, f"request {number}")
            written += got.size
    caches = (stored.k1_cache, stored.k2_cache)
    assert written == sum(np.isfinite(c.astype(np.float32)).sum() for c in caches)


def test_windows_token_by_token_and_by_chunks_equal_one_pass_bitwise() -> None:
    host, whole = ready([(0, 400)], padding_rows=0)
    for cuts in (list(range(401)), [0, 1, 63, 64, 65, 128, 191, 300, 400]):
        pieces = on_gpu(host)
        for start, end in zip(cuts, cuts[1:], strict=False):
            piece = replace(
                pieces,
                batch_id_per_token=torch.zeros(end - start, dtype=torch.int32, device="cuda"),
                cu_seqlens_q=torch.tensor([0, end - start], dtype=torch.int32, device="cuda"),
                query_lens=torch.tensor([end - start], dtype=torch.int32, device="cuda"),
                history_lens=torch.tensor([start], dtype=torch.int32, device="cuda"),
            )
            compress(piece)
        same_bits(download(pieces.k1_cache), download(whole.k1_cache))
        same_bits(download(pieces.k2_cache), download(whole.k2_cache))


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_rope_and_write_kv(geometry) -> None:
    host = make_step([(0, 70), (1000, 1), (0, 0), (127, 3)], geometry)
    dtype, g = DTYPES[geometry.dtype], geometry
    rng = np.random.default_rng(1)
    width = g.num_q_heads + 2 * g.num_kv_heads
    qkv = rng.standard_normal((host.num_tokens, width, g.head_dim)).astype(dtype)
    angles = np.outer(np.arange(1100), 10000.0 ** -(np.arange(64) / 64))
    cos, sin = (np.tile(f(angles), 2).astype(np.float32) for f in (np.cos, np.sin))

    gpu = on_gpu(host.before_writing())
    fused, tables = upload(qkv), [upload(cos), upload(sin)]
    params = capi.rope_and_write_kv_params(gpu, fused, fused, fused, *tables)
    size = fused.element_size() * g.head_dim
    params.k = fused.data_ptr() + g.num_q_heads * size
    params.v = fused.data_ptr() + (g.num_q_heads + g.num_kv_heads) * size
    params.q_stride = params.k_stride = params.v_stride = width * g.head_dim
    capi.run_cuda(params, stream())
    torch.cuda.synchronize()

    def rotated(x: np.ndarray, position: int) -> np.ndarray:
        x = x.astype(np.float32)
        turned = np.concatenate([-x[..., 64:], x[..., :64]], -1)
        return (x * cos[position] + turned * sin[position]).astype(dtype)

    got, stored = download(fused), from_gpu(gpu)
    before = host.before_writing()
    wanted_k, wanted_v, wanted_q = before.k_cache.copy(), before.v_cache.copy(), qkv.copy()
    for row, request in enumerate(host.batch_id_per_token):
        if request < 0:
            continue
        position = int(host.history_lens[request]) + row - int(host.cu_seqlens_q[request])
        page, slot = host.block_tables[request, position // 64], position % 64
        wanted_q[row, : g.num_q_heads] = rotated(qkv[row, : g.num_q_heads], position)
        keys = qkv[row, g.num_q_heads : g.num_q_heads + g.num_kv_heads]
        wanted_k[page, :, slot] = rotated(keys, position)
        wanted_v[page, :, slot] = qkv[row, g.num_q_heads + g.num_kv_heads :]
    same_bits(got, wanted_q, "q")
    np.testing.assert_array_equal(stored.k_cache.astype(np.float32), wanted_k.astype(np.float32))
    np.testing.assert_array_equal(stored.v_cache.astype(np.float32), wanted_v.astype(np.float32))


def test_a_long_rebuild_and_its_chunks_equal_one_pass_bitwise() -> None:
    host, whole = ready([(0, 20_001), (0, 0), (0, 777)], padding_rows=0)
    for got, size in zip(load_windows(from_gpu(whole), 0), (32, 128), strict=True):
        wanted = oracle.window_means(host.keys[0], size, size // 2).astype(got.dtype)
        assert_within_one_step(got, wanted)
    pieces = on_gpu(host)
    lens = {number: request.kv_len for number, request in enumerate(host.requests)}
    for start, end in ((0, 4097), (4097, 8192), (8192, 8255), (8255, 20_001)):
        query_lens = [max(0, min(end, lens[n]) - start) for n in lens]
        piece = replace(
            pieces,
            batch_id_per_token=torch.zeros(sum(query_lens), dtype=torch.int32, device="cuda"),
            query_lens=torch.tensor(query_lens, dtype=torch.int32, device="cuda"),
            history_lens=torch.tensor([start] * len(lens), dtype=torch.int32, device="cuda"),
        )
        compress(piece)
    same_bits(download(pieces.k1_cache), download(whole.k1_cache))
    same_bits(download(pieces.k2_cache), download(whole.k2_cache))
    compress(pieces, [0, 0, 0])  # again, over what is there
    same_bits(download(pieces.k1_cache), download(whole.k1_cache))


@pytest.mark.parametrize("request_", [(0, 1030), (1039, 1)], ids=["prompt", "decode row"])
def test_a_request_without_pages_is_left_alone(request_: tuple[int, int]) -> None:
    host, gpu = ready([(159, 1), request_])
    gpu.block_tables[1] = -1
    before = from_gpu(gpu)
    compress(gpu)
    compress(gpu, [0, 0])
    qkv = torch.randn(gpu.num_tokens, 36, 128, dtype=torch.bfloat16, device="cuda")
    tables = torch.zeros(2, 1100, 128, device="cuda")
    params = capi.rope_and_write_kv_params(gpu, qkv, qkv[:, 32:], qkv[:, 34:], *tables)
    params.q_stride = params.k_stride = params.v_stride = 36 * 128
    capi.run_cuda(params, stream())
    torch.cuda.synchronize()
    after = from_gpu(gpu)
    others = np.setdiff1d(np.arange(len(before.k_cache)), host.block_tables[0, :3])
    for name in ("k_cache", "v_cache", "k1_cache", "k2_cache"):
        same_bits(getattr(after, name)[others], getattr(before, name)[others], name)


# ---- the whole step ----


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_decode_at_every_window_length(geometry) -> None:
    host, gpu = ready([(length - 1, 1) for length in WINDOW_LENGTHS], geometry)
    assert_step(host, gpu, SMALL, run_step(gpu, SMALL))


@pytest.mark.parametrize("dense_len", [-1, 511, 512, 513, 10_000])
def test_mixed_batch_of_prefill_decode_and_idle_requests(dense_len: int) -> None:
    sizes = replace(SMALL, dense_len=dense_len)
    host, gpu = ready([(0, 600), (1030, 1), (0, 0), (700, 77), (383, 3), (1500, 1)])
    assert_step(host, gpu, sizes, run_step(gpu, sizes), rows=40)


@pytest.mark.parametrize("geometry", [BF16, FP16], ids=str)
def test_decode_around_the_switch_and_block_edges(geometry) -> None:
    lengths = [6143, 6144, 6145, 6209, 8190, 8191, 8192, 8193, 8255, 8256, 8257, 12345]
    host, gpu = ready([(length - 1, 1) for length in lengths], geometry)
    assert_step(host, gpu, PUBLISHED, run_step(gpu, PUBLISHED))
    always = replace(PUBLISHED, dense_len=-1)
    assert_step(host, gpu, always, run_step(gpu, always))


@pytest.mark.parametrize("length", [16384, 32768, 65536, 65599, 131071, 131072])
def test_long_decode(length: int) -> None:
    host, gpu = ready([(length - 1, 1)], seed=length)
    for dense_len in (8192, 131073):
        sizes = replace(PUBLISHED, dense_len=dense_len)
        assert_step(host, gpu, sizes, run_step(gpu, sizes))


@pytest.mark.parametrize("batch", [1, 2, 5, 17, 33, 70, 128])
def test_decode_batches_of_mixed_lengths(batch: int) -> None:
    rng = np.random.default_rng(batch)
    lengths = rng.integers(1, 12000, batch)
    lengths[:3] = [9000, 1, 8192][: len(lengths[:3])]
    host, gpu = ready([(int(length) - 1, 1) for length in lengths], seed=batch)
    assert_step(host, gpu, PUBLISHED, run_step(gpu, PUBLISHED), rows=1)


def test_prefill_chunk_behind_a_long_history() -> None:
    host, gpu = ready([(9000, 130), (0, 300)])
    assert_step(host, gpu, PUBLISHED, run_step(gpu, PUBLISHED), rows=12)


# ---- bits ----


MIXED_LENGTHS = [9000, 8191, 12000, 700, 1, 65, 6145, 5000, 8192]
MIXED_LENGTHS += [int(x) for x in np.random.default_rng(0).integers(1, 9500, 61)]
# Every number of blocks from 1 to 70, the longest rows first; the last block is not always full.
SHORT_LENGTHS = [64 * blocks - blocks % 3 * 20 for blocks in range(70, 0, -1)]


@pytest.mark.parametrize("lengths", [MIXED_LENGTHS, SHORT_LENGTHS], ids=["mixed", "short"])
def test_alone_and_in_a_crowd_bitwise(lengths: list[int]) -> None:
    # 1 to 70 requests: every number of thread blocks that may share a row. Some rows are dense.
    _, gpu = ready([(length - 1, 1) for length in lengths], padding_rows=0)
    single = [run_step(alone(gpu, request), PUBLISHED) for request in range(len(lengths))]
    for count in (2, 3, 5, 9, 17, 35, 70):
        some = replace(
            gpu,
            requests=gpu.requests[:count],
            batch_id_per_token=gpu.batch_id_per_token[:count],
            cu_seqlens_q=gpu.cu_seqlens_q[: count + 1],
            query_lens=gpu.query_lens[:count],
            history_lens=gpu.history_lens[:count],
            block_tables=gpu.block_tables[:count],
            q=gpu.q[:count],
        )
        topk_idx, out, lse = run_step(some, PUBLISHED)
        for request in range(count):
            what = f"request {request} of {count}"
            np.testing.assert_array_equal(topk_idx[:, request], single[request][0][:, 0], what)
            same_bits(out[request], single[request][1][0], what)
            same_bits(lse[request], single[request][2][0], what)


@pytest.mark.parametrize("num_rows", [100, 333, 680])
def test_windows_of_rows_equal_the_step_bitwise(num_rows: int) -> None:
    _, gpu = ready([(900, 1), (0, 600), (0, 0), (1030, 1), (700, 77)], padding_rows=3)
    whole = run_step(gpu, SMALL)
    for first in range(0, gpu.num_tokens, num_rows):
        rows = slice(first, min(first + num_rows, gpu.num_tokens))
        launches = Launches(window(gpu, first, num_rows), SMALL, max_query_len=600)
        for params in (launches.select, launches.attend):
            capi.run_cuda(params, stream())
        topk_idx, out, lse = launches.result()
        same_bits(topk_idx, whole[0][:, rows], f"lists of rows {rows}")
        same_bits(out, whole[1][rows], f"rows {rows}")
        same_bits(lse, whole[2][rows], f"lse of rows {rows}")


def test_a_short_chunk_equals_its_rows_bitwise() -> None:
    # Up to 15 tokens of a request are decode rows.
    _, gpu = ready([(0, 700)], padding_rows=0)

    def rows(start: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        step = replace(
            alone(gpu, 0),
            batch_id_per_token=torch.zeros(count, dtype=torch.int32, device="cuda"),
            cu_seqlens_q=torch.tensor([0, count], dtype=torch.int32, device="cuda"),
            query_lens=torch.full((1,), count, dtype=torch.int32, device="cuda"),
            history_lens=torch.full((1,), start, dtype=torch.int32, device="cuda"),
            q=gpu.q[start : start + count].clone(),
        )
        return run_step(step, SMALL)

    for start in (0, 55, 120, 376, 390, 500, 685):
        chunk = rows(start, 15)
        for token in (0, 7, 8, 14):
            row = rows(start + token, 1)
            np.testing.assert_array_equal(row[0][:, 0], chunk[0][:, token])
            same_bits(row[1][0], chunk[1][token])


def test_repeated_and_overlapped_launches_give_the_same_bits() -> None:
    lengths = [9000, 8192, 16384, 700, 12345]
    _, gpu = ready([(length - 1, 1) for length in lengths])
    wanted = run_step(gpu, PUBLISHED)
    for overlap in (0, 1):
        for _ in range(20):
            for got, want in zip(run_step(gpu, PUBLISHED, overlap), wanted, strict=True):
                same_bits(got, want, f"overlap {overlap}")


def test_graph_replay_equals_eager_after_lengths_have_grown() -> None:
    starts = [8150, 700, 9980, 6100, 1]
    steps = 150
    host = make_step([(start + steps - 1, 1) for start in starts], padding_rows=1, geometry=BF16)
    gpu = on_gpu(host)
    gpu.history_lens.copy_(torch.tensor([s - 1 for s in starts], dtype=torch.int32))
    compress(gpu, [0] * len(starts))
    # What the steps to come will write is not there yet.
    for number, start in enumerate(starts):
        for position in range(start + 15, start + steps):
            if (position + 1) % 16 == 0:
                page = int(host.block_tables[number, position // 64])
                gpu.k1_cache[page, :, position % 64 // 16] = float("nan")
                if (position + 1) % 64 == 0:
                    gpu.k2_cache[page] = float("nan")
    eager = replace(gpu, k1_cache=gpu.k1_cache.clone(), k2_cache=gpu.k2_cache.clone())
    captured = Launches(gpu, PUBLISHED, overlap=1)
    captured.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.run()
    for step in range(steps):
        captured.poison()
        graph.replay()
        got = captured.result()
        for a, b in zip(got, run_step(eager, PUBLISHED), strict=True):
            same_bits(a, b, f"step {step}")
        gpu.history_lens.add_(1)
    same_bits(download(gpu.k1_cache), download(eager.k1_cache))


# ---- properties ----


def test_values_of_unlisted_blocks_never_leak() -> None:
    host, gpu = ready([(9999, 1)])
    topk_idx, out, _ = run_step(gpu, PUBLISHED)
    for head in range(2):
        unlisted = np.setdiff1d(np.arange(157), topk_idx[head, 0])
        pages = torch.from_numpy(host.block_tables[0, unlisted]).cuda().long()
        gpu.v_cache[pages, head] = float("nan")
        gpu.k_cache[pages, head] = float("nan")
    same_bits(run_step(gpu, PUBLISHED)[1], out)


def test_order_of_heads_in_a_group_does_not_matter_and_groups_commute() -> None:
    _, gpu = ready([(9999, 1), (8500, 1)], padding_rows=0)
    topk_idx, out, _ = run_step(gpu, PUBLISHED)
    heads = np.concatenate([np.arange(16)[::-1], 16 + np.roll(np.arange(16), 5)])
    got = run_step(replace(gpu, q=gpu.q[:, heads.tolist()].contiguous()), PUBLISHED)
    # Sums over the heads run in another order: near ties may turn, hence a share of the lists.
    assert (got[0] == topk_idx).mean() > 0.99
    if (got[0] == topk_idx).all():
        same_bits(got[1], out[:, heads])
    swapped = replace(
        gpu,
        q=gpu.q.reshape(-1, 2, 16, 128).flip(1).reshape(gpu.q.shape).contiguous(),
        **{
            name: getattr(gpu, name).flip(1).contiguous()
            for name in ("k_cache", "v_cache", "k1_cache", "k2_cache")
        },
    )
    got = run_step(swapped, PUBLISHED)
    np.testing.assert_array_equal(got[0], topk_idx[::-1])
    same_bits(got[1].reshape(-1, 2, 16, 128)[:, ::-1], out.reshape(-1, 2, 16, 128))


def test_adding_one_vector_to_every_key_changes_nothing() -> None:
    # Both softmaxes are blind to it: a wrong normaliser is not. Small integers, so that bf16 holds
    # keys and shifted keys exactly.
    host = make_step([(9999, 1)], BF16)
    rng = np.random.default_rng(3)
    shape = host.k_cache.shape
    keys = rng.integers(-3, 4, shape).astype(np.float32)
    shift = rng.integers(-2, 3, (1, shape[1], 1, shape[3])).astype(np.float32)
    results = []
    for moved in (keys, keys + shift):
        k_cache = np.where(np.isnan(host.k_cache.astype(np.float32)), np.nan, moved)
        gpu = on_gpu(replace(host, k_cache=k_cache.astype(host.k_cache.dtype)))
        compress(gpu, [0])
        results.append(run_step(gpu, PUBLISHED))
    # Compressed keys are rounded after the shift: near ties may turn.
    assert np.intersect1d(results[0][0][0, 0], results[1][0][0, 0]).size >= 90
    dense = replace(PUBLISHED, dense_len=20_000)
    outs = []
    for moved in (keys, keys + shift):
        k_cache = np.where(np.isnan(host.k_cache.astype(np.float32)), np.nan, moved)
        gpu = on_gpu(replace(host, k_cache=k_cache.astype(host.k_cache.dtype)))
        outs.append(run_step(gpu, dense)[1].astype(np.float32))
    np.testing.assert_allclose(outs[0][0], outs[1][0], atol=2**-7)


def test_equal_keys_tie_to_the_lowest_ids() -> None:
    host = make_step([(9999, 1)], BF16)
    k_cache = np.where(np.isnan(host.k_cache.astype(np.float32)), np.nan, 0.5)
    gpu = on_gpu(replace(host, k_cache=k_cache.astype(host.k_cache.dtype)))
    compress(gpu, [0])
    topk_idx, _, _ = run_step(gpu, PUBLISHED)
    wanted = [*range(63), *range(156 - 32, 157)]
    assert (topk_idx[:, 0] == wanted).all()


def test_finds_the_keys_that_match_the_query() -> None:
    host = make_step([(20_000, 1)], BF16, padding_rows=0)
    needle = 101  # neither initial nor local
    for head in range(2):
        page = host.block_tables[0, needle]
        host.k_cache[page, head, 10:58] = 4 * host.q[0, 16 * head].astype(np.float32)
    gpu = on_gpu(host)
    compress(gpu, [0])
    assert (run_step(gpu, PUBLISHED)[0] == needle).any(axis=2).all()


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_huge_queries_still_choose(scale: float) -> None:
    _, gpu = ready([(9999, 1)], padding_rows=0)
    topk_idx, out, lse = run_step(replace(gpu, q=gpu.q * scale), PUBLISHED)
    assert ((topk_idx >= 0) & (np.diff(topk_idx, prepend=-1) > 0)).all()
    assert np.isfinite(out.astype(np.float32)).all() and np.isfinite(lse).all()


def test_nan_in_one_request_does_not_reach_another() -> None:
    _, gpu = ready([(8999, 1), (9499, 1), (700, 1)])
    wanted = run_step(gpu, PUBLISHED)
    blocks = gpu.block_tables[1, :149].long()
    for name in ("k_cache", "v_cache", "k1_cache", "k2_cache"):
        getattr(gpu, name)[blocks] = float("nan")
    got = run_step(gpu, PUBLISHED)
    for request in (0, 2):
        np.testing.assert_array_equal(got[0][:, request], wanted[0][:, request])
        same_bits(got[1][request], wanted[1][request])
    # Its own lists still name blocks that exist.
    assert ((got[0][:, 1] >= 0) & (got[0][:, 1] <= 148)).all()


def test_a_row_that_lists_nothing_gets_zeros() -> None:
    _, gpu = ready([(9999, 1), (8999, 1)], padding_rows=0)
    launches = Launches(gpu, PUBLISHED)
    launches.topk_idx.fill_(-1)
    capi.run_cuda(launches.attend, stream())
    _, out, lse = launches.result()
    assert (out.astype(np.float32) == 0).all() and np.isneginf(lse).all()


def test_lists_without_the_newest_blocks_are_served_and_the_rest_is_not_read() -> None:
    # The kernel begins with the newest blocks before it sees the list: here the list leaves out
    # all of them, or all but the row's own, or names them all.
    host, gpu = ready([(9999, 1), (9999, 1), (9999, 1), (4999, 1)], padding_rows=0)
    launches = Launches(gpu, replace(PUBLISHED, dense_len=-1))
    own = np.array([9999 // 64] * 3 + [4999 // 64])
    rng = np.random.default_rng(3)
    older = np.sort(rng.choice(own[0] - 40, 50, replace=False))
    lists = [older, [*older, own[1]], [*older, *range(own[2] - 31, own[2] + 1)], older[older < 40]]
    launches.topk_idx.fill_(-1)
    for request, blocks in enumerate(lists):
        launches.topk_idx[:, request, : len(blocks)] = torch.tensor(blocks, device="cuda")
        pages = host.block_tables[request, np.setdiff1d(np.arange(own[request] + 1), blocks)]
        for cache in (gpu.k_cache, gpu.v_cache):
            cache[torch.from_numpy(pages).cuda().long()] = float("nan")
    capi.run_cuda(launches.attend, stream())
    _, out, lse = launches.result()
    for request, blocks in enumerate(lists):
        tokens = oracle.listed_tokens(np.array(blocks), int(host.requests[request].history_len))
        for head in range(2):
            heads = slice(16 * head, 16 * head + 16)
            q = host.q[request, heads]
            keys, values = host.keys[request][tokens, head], host.values[request][tokens, head]
            truth, true_lse = oracle.attention(q, keys, values)
            framework = same_dtype_attention(
                q[None], keys[:, None], values[:, None], np.ones((1, 1, len(tokens)), bool)
            )
            assert_within_budget(out[request, heads], truth, framework[0], "bfloat16")
            np.testing.assert_allclose(lse[request, heads], true_lse, atol=1e-3)


# ---- bad input ----


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": capi.FLOAT32}, ["dtype is 0", "1 (float16) or 2 (bfloat16)"]),
        ({"head_dim": 64}, ["head_dim is 64", "128"]),
        ({"num_q_heads": 16}, ["num_q_heads is 16", "16 for each of 2 kv heads"]),
    ],
    ids=str,
)
def test_what_the_gpu_does_not_serve_is_refused_before_the_launch(change, words) -> None:
    _, gpu = ready([(600, 1)])
    launches = Launches(gpu, SMALL)
    launches.poison()
    for params in (launches.select, launches.attend):
        for name, value in change.items():
            setattr(params.heads, name, value)
        with pytest.raises(capi.KernelError) as error:
            capi.run_cuda(params, stream())
        assert str(error.value).startswith(params.op)
        for word in words:
            assert word in str(error.value)
    topk_idx, out, _ = launches.result()
    assert np.isnan(out.astype(np.float32)).all()
    del topk_idx
