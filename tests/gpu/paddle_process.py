"""Runs the ops inside a Paddle process, on Paddle's own tensors and stream, against the oracle.

``python paddle_process.py`` needs a GPU, a Paddle with CUDA on the path, NumPy and
ml_dtypes, and no PyTorch. ``test_paddle_process.py`` starts it. Only copies and our own ops touch
the GPU: an older Paddle has kernels of its own for older architectures only.
"""

from __future__ import annotations

import ctypes
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import paddle
from paddle.utils.cpp_extension import load_op_meta_info_and_register_op

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "gpu"), str(ROOT / "src")]

import oracle  # noqa: E402

import capi  # noqa: E402
from accuracy import (  # noqa: E402
    EPSILON,
    assert_selection,
    assert_within_budget,
    assert_within_one_step,
    same_dtype_attention,
)
from cases import DTYPES, TRUE_GEOMETRY, Step, load_windows, make_step  # noqa: E402
from fd_minicpm41 import binding  # noqa: E402
from low_bit_cases import (  # noqa: E402
    FORMATS,
    exact_rows,
    framework_linear,
    make_exact_weight,
    make_weight,
    make_x,
)

# The published sizes, and at lengths on both sides of the switch.
INIT, LOCAL, BUDGET, DENSE_LEN = 1, 33, 96, 8192
REQUESTS = [(9000, 1), (8190, 1), (0, 70), (0, 0), (127, 3), (8191, 1), (8180, 20)]
BATCH = ("batch_id_per_token", "cu_seqlens_q", "query_lens", "history_lens", "block_tables")


def op(name: str, *arguments: object) -> object:
    eager = getattr(paddle, "base", None) and paddle.base.core.eager
    run = getattr(paddle._C_ops, "_run_custom_op", None) or eager._run_custom_op
    results = run(f"minicpm41_{name}", *arguments)
    is_one = isinstance(results, list | tuple) and len(results) == 1
    return results[0] if is_one else results


def to_paddle(array: np.ndarray) -> paddle.Tensor:
    if array.dtype == DTYPES["bfloat16"]:
        array = array.view(np.uint16)  # how Paddle takes and gives bfloat16
    return paddle.to_tensor(array.copy(), place=paddle.CUDAPlace(0))


def to_numpy(tensor: paddle.Tensor) -> np.ndarray:
    array = tensor.numpy()
    return array.view(DTYPES["bfloat16"]) if array.dtype == np.uint16 else array


def rotated(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    x32 = x.astype(np.float32)
    turned = np.concatenate([-x32[..., 64:], x32[..., :64]], -1)
    return (x32 * cos + turned * sin).astype(x.dtype)


def check_dtype(dtype: str) -> None:
    geometry = replace(TRUE_GEOMETRY, dtype=dtype)
    full = make_step(REQUESTS, geometry)
    host = full.before_writing()
    g = geometry
    rng = np.random.default_rng(3)
    width = g.num_q_heads + 2 * g.num_kv_heads
    qkv = rng.standard_normal((host.num_tokens, width, g.head_dim)).astype(DTYPES[dtype])
    angles = np.outer(np.arange(9100), 10000.0 ** -(np.arange(64) / 64))
    cos, sin = (np.tile(f(angles), 2).astype(np.float32) for f in (np.cos, np.sin))

    fused = to_paddle(qkv.reshape(host.num_tokens, -1))
    caches = {n: to_paddle(getattr(host, f"{n}_cache")) for n in ("k", "v", "k1", "k2")}
    batch = [to_paddle(getattr(host, name)) for name in BATCH]
    longest = int(host.query_lens.max())
    tables = to_paddle(np.stack([cos, sin])[:, None, :, None])
    op("rope_and_write_kv", fused, tables, caches["k"], caches["v"], *batch, longest)
    start = to_paddle(np.zeros(len(host.requests), np.int32))
    op("compress_keys", caches["k"], caches["k1"], caches["k2"], start, *batch, longest)
    sizes = (g.head_dim**-0.5, INIT, LOCAL, BUDGET, DENSE_LEN)
    lists, outs = [], []
    for overlap in (False, True):
        if overlap:  # what it promises: the launch before is compress_keys
            op("compress_keys", caches["k"], caches["k1"], caches["k2"], start, *batch, longest)
        topk = op(
            "select_blocks", fused, caches["k1"], caches["k2"], *batch, longest, *sizes, overlap
        )
        args = (
            fused,
            caches["k"],
            caches["v"],
            topk,
            *batch,
            longest,
            sizes[0],
            DENSE_LEN,
            overlap,
        )
        out = op("sparse_attention", *args)
        lists.append(to_numpy(topk))
        outs.append(to_numpy(out).reshape(host.num_tokens, g.num_q_heads, g.head_dim))
    is_row = ~host.is_padding()
    np.testing.assert_array_equal(lists[0][:, is_row], lists[1][:, is_row])
    np.testing.assert_array_equal(outs[0].view(np.uint16), outs[1].view(np.uint16))

    stored = replace(host, **{f"{n}_cache": to_numpy(caches[n]) for n in caches})
    q = to_numpy(fused).reshape(qkv.shape)
    check_written(stored, qkv, q, cos, sin)
    assert (outs[0][~is_row].astype(np.float32) == 0).all(), "a padding row's output is not 0"
    for number, request in enumerate(stored.requests):
        if request.query_len:
            check_request(stored, number, q, lists[0], outs[0])


def check_written(
    stored: Step, before: np.ndarray, after: np.ndarray, cos: np.ndarray, sin: np.ndarray
) -> None:
    """The rotated q in place, and rotated k and plain v in their pages."""
    heads, kv_heads = stored.geometry.num_q_heads, stored.geometry.num_kv_heads
    for row, request in enumerate(stored.batch_id_per_token):
        if request < 0:
            continue
        position = int(stored.history_lens[request]) + row - int(stored.cu_seqlens_q[request])
        page, slot = stored.block_tables[request, position // 64], position % 64
        wanted = rotated(before[row, : heads + kv_heads], cos[position], sin[position])
        assert_within_one_step(after[row, :heads], wanted[:heads], f"q of row {row}")
        assert_within_one_step(stored.k_cache[page, :, slot], wanted[heads:], f"k of row {row}")
        values = before[row, heads + kv_heads :].astype(np.float32)
        np.testing.assert_array_equal(stored.v_cache[page, :, slot].astype(np.float32), values)


def check_request(
    stored: Step, number: int, q: np.ndarray, topk_idx: np.ndarray, out: np.ndarray
) -> None:
    """Windows, lists and outputs of the first and the last row of one request."""
    g, request = stored.geometry, stored.requests[number]
    keys = stored.cached(stored.k_cache, number)
    values = stored.cached(stored.v_cache, number)
    windows = load_windows(stored, number)
    for got, size in zip(windows, (32, 128), strict=True):
        # One rounding, and fp32 sums 17 additions deep: a mean may cancel to almost nothing.
        wanted = oracle.window_means(keys, size, size // 2)
        spread = oracle.window_means(np.abs(keys), size, size // 2)
        error = np.abs(got.astype(np.float64) - wanted)
        budget = EPSILON[g.dtype] * np.abs(wanted) + 2.0**-24 * (1 + 17 * spread)
        assert (error <= budget).all(), f"windows of {size} keys, request {number}"
    first = int(stored.cu_seqlens_q[number])
    for pick in sorted({0, request.query_len - 1}):
        row, position = first + pick, request.history_len + pick
        for head in range(g.num_kv_heads):
            heads = slice(head * g.group_size, (head + 1) * g.group_size)
            k1, k2 = (w[:, head] for w in windows)
            mine = q[row, heads]
            assert_selection(
                topk_idx[head : head + 1, row : row + 1],
                oracle.block_scores(mine, k1, k2, position)[None, None],
                oracle.forced_blocks(position, INIT, LOCAL)[None],
                np.array([position]),
                BUDGET,
                DENSE_LEN,
            )
            is_dense = position + 1 < DENSE_LEN
            blocks = np.arange(position // 64 + 1) if is_dense else topk_idx[head, row]
            tokens = oracle.listed_tokens(blocks, position)
            some_keys, some_values = keys[tokens, head], values[tokens, head]
            truth, _ = oracle.attention(mine, some_keys, some_values)
            everything = np.ones((1, 1, len(tokens)), bool)
            framework = same_dtype_attention(
                mine[None], some_keys[:, None], some_values[:, None], everything
            )
            what = f"request {number}, position {position}, kv head {head}"
            assert_within_budget(out[row, heads], truth, framework[0], g.dtype, what)


def check_products(dtype: str) -> None:
    """Products of every format at the kernels' limits of tokens, and rows expanded."""
    for fmt in FORMATS:
        weight = make_weight(fmt, 264, 4096)
        tiles = [to_paddle(tile) for tile in weight.tiles()]
        sizes = (fmt.bits, fmt.group, fmt.zero, fmt.hadamard)
        plain = weight.plain()
        for tokens in (1, 9, 33, 64):
            x = make_x(tokens, 4096, dtype, tokens)
            out = to_numpy(op("low_bit_linear", to_paddle(x), *tiles, 264, *sizes))
            truth = x.astype(np.float64) @ plain.T
            what = f"{tokens} tokens by {fmt}"
            assert_within_budget(out, truth, framework_linear(x, plain), dtype, what)
        if not fmt.hadamard:  # else sums in fp32 stand before the one rounding
            rows = op("expand_low_bit_weight", *tiles, None, 264, 4096, *sizes, 16, 99, dtype)
            rows = to_numpy(rows)
            np.testing.assert_array_equal(rows, plain[16 : 16 + 99].astype(DTYPES[dtype]))
    weight = make_exact_weight("int8", 73, 384)
    tiles = [to_paddle(tile) for tile in weight.tiles()]
    sizes = (weight.fmt.bits, weight.fmt.group, weight.fmt.zero, weight.fmt.hadamard)
    scales = to_paddle(weight.channel_scales)
    rows = op("expand_low_bit_weight", *tiles, scales, 73, 384, *sizes, 0, 73, "int8")
    np.testing.assert_array_equal(to_numpy(rows), exact_rows(weight))


def main() -> None:
    ctypes.CDLL(str(capi.library_path()), mode=ctypes.RTLD_GLOBAL)
    installed = binding.PaddleInstallation.find()
    assert installed is not None
    with tempfile.TemporaryDirectory() as folder:
        path = binding.compile_binding(ROOT / "csrc", installed, Path(folder))
        load_op_meta_info_and_register_op(str(path))
        for dtype in ("bfloat16", "float16"):
            check_dtype(dtype)
            check_products(dtype)
            print(f"Paddle {installed.version}: {dtype} holds", flush=True)


if __name__ == "__main__":
    main()
