"""Lists of prefill rows: tiles of many query tokens against the oracle, row by row, and bit by bit
wherever a prompt is cut."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import oracle  # noqa: E402
from gpu_ops import (  # noqa: E402
    BF16,
    FP16,
    NOT_WRITTEN,
    PUBLISHED,
    SMALL,
    TORCH_DTYPES,
    Launches,
    Sizes,
    compress,
    download,
    from_gpu,
    ready,
    same_bits,
    stream,
    window,
)

import capi  # noqa: E402
from accuracy import assert_selection  # noqa: E402
from cases import HUGE, Geometry, Request, Step, load_windows  # noqa: E402

GEOMETRIES = [BF16, FP16, replace(BF16, num_q_heads=16, num_kv_heads=1)]
ALWAYS = replace(PUBLISHED, dense_len=-1)


def long_prompt(length: int, seed: int = 0) -> Step:
    """A prompt on the GPU alone, keys with a slowly turning part, pages scrambled."""
    g, pages = BF16, -(-length // 64) + 3
    torch.manual_seed(seed)
    shape = (pages, g.num_kv_heads, 64, g.head_dim)
    keys = torch.randn(shape, device="cuda")
    at = torch.arange(pages * 64, device="cuda").view(pages, 1, 64, 1) / 50
    keys += 1.5 * torch.sin(at + 6 * torch.rand(1, shape[1], 1, shape[3], device="cuda"))
    table = torch.randperm(pages, device="cuda")[None].to(torch.int32)
    caches = [torch.full((pages, shape[1], n, shape[3]), float("nan")) for n in (64, 64, 4, 1)]
    k, v, k1, k2 = (cache.to("cuda", TORCH_DTYPES[g.dtype]) for cache in caches)
    k[table[0].long()] = keys.to(k.dtype)
    return Step(
        geometry=g,
        requests=(Request(0, length),),
        batch_id_per_token=torch.zeros(length, dtype=torch.int32, device="cuda"),
        cu_seqlens_q=torch.tensor([0, length], dtype=torch.int32, device="cuda"),
        query_lens=torch.tensor([length], dtype=torch.int32, device="cuda"),
        history_lens=torch.zeros(1, dtype=torch.int32, device="cuda"),
        block_tables=table,
        q=torch.randn(length, g.num_q_heads, g.head_dim, dtype=k.dtype, device="cuda"),
        k_cache=k,
        v_cache=v,
        k1_cache=k1,
        k2_cache=k2,
        keys=(),
        values=(),
    )


def select(step: Step, sizes: Sizes, longest: int | None = None) -> NDArray[np.int32]:
    """``topk_idx`` of a step's rows; ``longest`` query of the whole step when these are a part."""
    shape = (step.geometry.num_kv_heads, step.num_tokens, sizes.budget)
    topk_idx = torch.full(shape, NOT_WRITTEN, dtype=torch.int32, device="cuda")
    params = capi.select_blocks_params(step, sizes, topk_idx)
    params.batch.max_query_len = longest or step.num_tokens
    capi.run_cuda(params, stream())
    torch.cuda.synchronize()
    return download(topk_idx)


def chunk(step: Step, start: int, end: int) -> Step:
    """Tokens ``start .. end - 1`` of a prompt, those before them already cached."""

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device="cuda")

    return replace(
        step,
        requests=(Request(start, end - start),),
        batch_id_per_token=torch.zeros(end - start, dtype=torch.int32, device="cuda"),
        cu_seqlens_q=ints(0, end - start),
        query_lens=ints(end - start),
        history_lens=ints(start),
        q=step.q[start:end],
    )


def assert_lists(
    host: Step, gpu: Step, sizes: Sizes, topk_idx: NDArray, rows: int | None = None
) -> None:
    """Holds the lists to the oracle, of each request ``rows`` rows, all by default."""
    stored = from_gpu(gpu)
    assert (topk_idx[:, host.is_padding()] == NOT_WRITTEN).all(), "a padding row was written"
    for number, request in enumerate(host.requests):
        if request.query_len == 0:
            continue
        k1, k2 = load_windows(stored, number)
        first = int(host.cu_seqlens_q[number])
        picks = np.arange(request.query_len)
        if rows is not None:
            picks = np.unique(np.linspace(0, request.query_len - 1, rows).astype(int))
        for pick in picks:
            assert_list(
                stored.q[first + pick],
                (k1, k2),
                request.history_len + pick,
                sizes,
                topk_idx[:, first + pick],
            )


def assert_list(
    q: NDArray, windows: tuple[NDArray, NDArray], position: int, sizes: Sizes, listed: NDArray
) -> None:
    """One row: q ``[num_q_heads, head_dim]``, K1 and K2 ``[windows, num_kv_heads, head_dim]``."""
    k1, k2 = windows
    for head in range(len(listed)):
        group = q.shape[0] // len(listed)
        heads = slice(head * group, (head + 1) * group)
        assert_selection(
            listed[None, None, head],
            oracle.block_scores(q[heads], k1[:, head], k2[:, head], position)[None, None],
            oracle.forced_blocks(position, sizes.init_blocks, sizes.local_blocks + 1)[None],
            np.array([position]),
            sizes.budget,
            sizes.dense_len,
        )


# ---- against the oracle ----


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_every_row_of_a_short_prompt(geometry: Geometry) -> None:
    host, gpu = ready([(0, 1111)], geometry)
    assert_lists(host, gpu, SMALL, select(gpu, SMALL))


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(0, 0, 1, -1),
        Sizes(0, 0, 3, -1),
        Sizes(2, 3, 6, -1),
        Sizes(2, 3, 7, 500),
        Sizes(5, 4, 40, -1),
        Sizes(33, 1, 36, -1),
    ],
    ids=str,
)
def test_sizes_of_every_kind(sizes: Sizes) -> None:
    host, gpu = ready([(0, 700), (2800, 61)])
    assert_lists(host, gpu, sizes, select(gpu, sizes))


def test_prompts_of_every_short_length() -> None:
    # Around kPrefillTokens, tiles of 8 and 12 rows, windows and blocks.
    lengths = [1, 2, 8, 12, 15, 16, 17, 23, 24, 25, 31, 32, 36, 63, 64, 65, 127, 128, 129]
    host, gpu = ready([(0, n) for n in lengths] + [(450, n) for n in lengths])
    assert_lists(host, gpu, SMALL, select(gpu, SMALL))


@pytest.mark.parametrize("dense_len", [-1, 511, 512, 513, 10_000])
def test_mixed_batch_of_prefill_decode_and_idle_requests(dense_len: int) -> None:
    sizes = replace(SMALL, dense_len=dense_len)
    host, gpu = ready([(0, 600), (1030, 1), (0, 0), (700, 77), (383, 3), (1500, 1), (0, 16)])
    assert_lists(host, gpu, sizes, select(gpu, sizes), rows=60)


def test_more_requests_than_lanes() -> None:
    rng = np.random.default_rng(5)
    requests = [(int(h), int(n)) for h, n in rng.integers(0, [900, 50], (70, 2))]
    host, gpu = ready(requests)
    assert_lists(host, gpu, SMALL, select(gpu, SMALL), rows=7)


@pytest.mark.parametrize(
    ("history", "count"), [(6100, 100), (8150, 90), (9000, 130), (16351, 100), (33000, 40)]
)
def test_chunks_behind_a_long_history(history: int, count: int) -> None:
    # The switch, the first sparse row without it, tiles that cross a block.
    host, gpu = ready([(history, count), (0, 30)])
    for sizes in (PUBLISHED, ALWAYS):
        assert_lists(host, gpu, sizes, select(gpu, sizes), rows=24)


@pytest.mark.parametrize("length", [8193, 16384, 40000, 131072])
def test_long_prompts(length: int) -> None:
    gpu = long_prompt(length)
    compress(gpu, [0])
    topk_idx = select(gpu, PUBLISHED)
    k1, k2 = load_windows(from_gpu(gpu), 0)
    rng = np.random.default_rng(length)
    edges = [0, 16, 6143, 6144, 8190, 8191, 8192, length - 1]
    for position in sorted({*edges, *rng.integers(8191, length, 25).tolist()}):
        q = download(gpu.q[position])
        assert_list(q, (k1, k2), position, PUBLISHED, topk_idx[:, position])
    # Every row: full, ascending, with its own block last.
    own = np.arange(length) // 64
    sparse = topk_idx[:, 8191:]
    assert (np.diff(sparse) > 0).all() and (sparse[:, :, 0] == 0).all()
    assert (sparse[:, :, -1] == own[None, 8191:]).all()
    assert (sparse[:, :, -33] == own[None, 8191:] - 32).all()


# ---- bits ----


def test_any_cut_gives_the_same_lists() -> None:
    # Decode kernels serve pieces under 16 tokens: their sums round elsewhere. No ties here.
    length = 9300
    gpu = long_prompt(length, seed=1)
    compress(gpu, [0])
    whole = select(gpu, PUBLISHED)
    for cuts in (
        [0, 63, 8190, 8207, 8300, 9000, length],
        [0, 64, 8191, 8256, 8272, 8289, length],
        [0, 6143, 6160, 8192, 8208, 8961, 8978, length],
        [0, 65, 8193, 8193 + 100, length],
        [*range(7000, length, 555), length],
    ):
        for start, end in zip(cuts, cuts[1:], strict=False):
            got = select(chunk(gpu, start, end), PUBLISHED)
            np.testing.assert_array_equal(got, whole[:, start:end], f"tokens {start} to {end}")


@pytest.mark.parametrize("num_rows", [5, 100, 333, 680])
def test_windows_of_rows_equal_the_step(num_rows: int) -> None:
    _, gpu = ready([(900, 1), (0, 600), (0, 0), (1030, 1), (700, 77)], padding_rows=3)
    whole = select(gpu, SMALL)
    for first in range(0, gpu.num_tokens, num_rows):
        rows = slice(first, min(first + num_rows, gpu.num_tokens))
        part = window(gpu, first, num_rows)
        np.testing.assert_array_equal(select(part, SMALL, 600), whole[:, rows], f"rows {rows}")


def test_alone_and_in_a_crowd_and_again() -> None:
    host, gpu = ready([(9000, 40), (0, 20), (8500, 77), (12000, 1), (8150, 64)], padding_rows=0)
    whole = select(gpu, PUBLISHED)
    for _ in range(10):
        np.testing.assert_array_equal(select(gpu, PUBLISHED), whole)
    for number, request in enumerate(host.requests):
        rows = host.rows(number)
        only = replace(
            chunk(gpu, 0, request.query_len),
            history_lens=gpu.history_lens[number : number + 1].clone(),
            block_tables=gpu.block_tables[number : number + 1].clone(),
            q=gpu.q[rows].clone(),
        )
        np.testing.assert_array_equal(select(only, PUBLISHED), whole[:, rows], f"request {number}")


# ---- properties ----


def test_equal_keys_tie_to_the_lowest_ids() -> None:
    gpu = long_prompt(72_000)
    gpu.k_cache.fill_(0.5)
    compress(gpu, [0])
    # Beyond 65536 tokens a choice is made in two steps.
    for start, end in ((9000, 9100), (71_900, 72_000)):
        topk_idx = select(chunk(gpu, start, end), PUBLISHED)
        for position in range(start, end):
            own = position // 64
            wanted = [*range(63), *range(own - 32, own + 1)]
            assert (topk_idx[:, position - start] == wanted).all(), position


def test_order_of_heads_and_of_groups_does_not_matter() -> None:
    _, gpu = ready([(9900, 100)], padding_rows=0)
    topk_idx = select(gpu, PUBLISHED)
    heads = np.concatenate([np.arange(16)[::-1], 16 + np.roll(np.arange(16), 5)])
    got = select(replace(gpu, q=gpu.q[:, heads.tolist()].contiguous()), PUBLISHED)
    # Sums over the heads run in another order: near ties may turn.
    assert (got == topk_idx).mean() > 0.99
    swapped = replace(
        gpu,
        q=gpu.q.reshape(-1, 2, 16, 128).flip(1).reshape(gpu.q.shape).contiguous(),
        k1_cache=gpu.k1_cache.flip(1).contiguous(),
        k2_cache=gpu.k2_cache.flip(1).contiguous(),
    )
    np.testing.assert_array_equal(select(swapped, PUBLISHED), topk_idx[::-1])


def test_adding_one_vector_to_every_key_changes_nothing() -> None:
    # Blind to it is only a right normaliser. Multiples of 1/64 up to 2: bf16 sums of windows and a
    # shift by 1 are exact, so that the windows move by exactly the shift.
    gpu = long_prompt(9200)
    torch.manual_seed(2)
    shapes = [cache.shape for cache in (gpu.k1_cache, gpu.k2_cache)]
    k1, k2 = (torch.randint(-64, 64, shape, device="cuda") / 64 for shape in shapes)
    shift = torch.randint(0, 2, (1, 2, 1, 128), device="cuda") * 1.0
    results = []
    for moved in (0.0, shift):
        caches = {"k1_cache": (k1 + moved).bfloat16(), "k2_cache": (k2 + moved).bfloat16()}
        results.append(select(replace(chunk(gpu, 9000, 9200), **caches), PUBLISHED))
    same = [
        np.intersect1d(a, b).size
        for a, b in zip(*(r.reshape(-1, PUBLISHED.budget) for r in results), strict=True)
    ]
    # Logits of another size round elsewhere: a near tie may turn.
    assert min(same) >= 94 and np.mean(same) > 95.9


@pytest.mark.parametrize("scale", [30.0, 1e3])
def test_scores_far_beyond_fp32_are_still_ranked(scale: float) -> None:
    host, gpu = ready([(8200, 40), (8200, 5)])
    huge = replace(gpu, q=gpu.q * scale)
    topk_idx = select(huge, PUBLISHED)
    # Logarithms of this size have this much rounding: fp32 has 24 bits.
    assert ((topk_idx[:, :45] >= 0) & (np.diff(topk_idx[:, :45], prepend=-1) > 0)).all()
    k1, k2 = load_windows(from_gpu(gpu), 0)
    for row in (0, 17, 39):
        q = download(huge.q[row])
        for head in range(2):
            scores = oracle.block_scores(
                q[16 * head : 16 * head + 16], k1[:, head], k2[:, head], 8200 + row
            )
            assert_selection(
                topk_idx[head : head + 1, row : row + 1],
                scores[None, None],
                oracle.forced_blocks(8200 + row, 1, 33)[None],
                np.array([8200 + row]),
                96,
                8192,
                tolerance=float(np.abs(scores[np.isfinite(scores)]).max()) * 2**-20 + 1e-4,
            )


def test_nan_in_one_request_does_not_reach_another() -> None:
    _, gpu = ready([(8999, 40), (9499, 33), (700, 20)])
    wanted = select(gpu, PUBLISHED)
    blocks = gpu.block_tables[1, :149].long()
    gpu.k1_cache[blocks] = float("nan")
    gpu.k2_cache[blocks] = float("nan")
    got = select(gpu, PUBLISHED)
    np.testing.assert_array_equal(got[:, :40], wanted[:, :40])
    np.testing.assert_array_equal(got[:, 73:], wanted[:, 73:])
    # Its own lists still name blocks that exist.
    assert ((got[:, 40:73] >= 0) & (got[:, 40:73] <= 149)).all()


@pytest.mark.parametrize("page", [-1, HUGE])
def test_a_request_without_pages_reads_none(page: int) -> None:
    _, gpu = ready([(8999, 40), (9499, 33)])
    wanted = select(gpu, PUBLISHED)
    gpu.block_tables[1] = page
    got = select(gpu, PUBLISHED)
    np.testing.assert_array_equal(got[:, :40], wanted[:, :40])
    assert ((got[:, 40:73] >= 0) & (got[:, 40:73] <= 149)).all()


def test_graph_replay_equals_eager() -> None:
    _, gpu = ready([(8999, 40), (700, 100)])
    wanted = select(gpu, PUBLISHED)
    topk_idx = torch.full(wanted.shape, NOT_WRITTEN, dtype=torch.int32, device="cuda")
    params = capi.select_blocks_params(gpu, PUBLISHED, topk_idx)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        capi.run_cuda(params, stream())
    topk_idx.fill_(NOT_WRITTEN)
    graph.replay()
    torch.cuda.synchronize()
    np.testing.assert_array_equal(download(topk_idx), wanted)


def test_attention_takes_no_list_of_an_earlier_step() -> None:
    """Attention begins on the lists that are there while select_blocks still makes the others."""
    prompt = long_prompt(38_048)
    prompt.v_cache.normal_()
    gpu = chunk(prompt, 36_000, 38_048)
    compress(gpu, [0])
    plain, overlapped = Launches(gpu, PUBLISHED), Launches(gpu, PUBLISHED, overlap=1)
    for seed in range(3):
        torch.manual_seed(seed)
        gpu.q.copy_(torch.randn(gpu.q.shape, device="cuda"))
        plain.run()
        wanted = plain.result()
        assert np.isfinite(wanted[2]).all()
        for _ in range(5):
            # What its buffers hold is of the queries before.
            overlapped.run()
            for got, want in zip(overlapped.result(), wanted, strict=True):
                same_bits(got, want)
            gpu.q.neg_()
            overlapped.run()
            gpu.q.neg_()


def test_a_budget_beyond_the_buffer_is_refused() -> None:
    _, gpu = ready([(0, 100)])
    with pytest.raises(capi.KernelError, match="select_blocks: budget is 2000, wanted at most"):
        select(gpu, Sizes(1, 1, 2000, -1))
