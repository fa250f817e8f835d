"""The CPU ops on the steps of ``cases``, and the reference on the same steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import paddle
import pytest
from numpy.typing import NDArray

import capi
from cases import DTYPES, Step, make_step, store_windows
from fd_minicpm41.config import SparseConfig
from fd_minicpm41.reference import attention as reference

# Budget 6: sparsity starts at 385 tokens of context, and a row chooses 3 blocks of those it may.
SMALL = SparseConfig(init_blocks=1, window_size=64, topk=5, dense_len=-1)
NOT_WRITTEN = -7


@contextmanager
def instruction_set(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Asks for an instruction set from now on, and skips the test if the first ops run inside are
    refused for want of it. Every machine has the baseline, and any other refusal is a failure."""
    monkeypatch.setenv("FD_MINICPM41_CPU_ISA", name)
    try:
        yield
    except capi.KernelError as refusal:
        if name == "baseline" or "FD_MINICPM41_CPU_ISA" not in str(refusal):
            raise
        pytest.skip(f"this machine or build has no {name}: {refusal}")


def tensor(array: NDArray) -> paddle.Tensor:
    """The numbers as an fp32 Paddle tensor."""
    return paddle.to_tensor(np.asarray(array, np.float32))


def positions_of(step: Step, request: int) -> NDArray[np.int64]:
    r = step.requests[request]
    return r.history_len + np.arange(r.query_len)


def active(step: Step) -> list[int]:
    """The requests that are not idle."""
    return [number for number, r in enumerate(step.requests) if r.query_len]


def compress(step: Step, compress_from: list[int] | None = None) -> None:
    """Writes the windows that end in the new tokens, or after ``compress_from``."""
    start = None if compress_from is None else np.array(compress_from, np.int32)
    capi.run_cpu(capi.compress_keys_params(step, start))


def select(step: Step, config: SparseConfig) -> NDArray[np.int32]:
    shape = (step.geometry.num_kv_heads, step.num_tokens, config.budget)
    topk_idx = np.full(shape, NOT_WRITTEN, np.int32)
    capi.run_cpu(capi.select_blocks_params(step, config, topk_idx))
    return topk_idx


def attend(
    step: Step, topk_idx: NDArray[np.int32], dense_len: int = -1
) -> tuple[NDArray, NDArray[np.float32]]:
    """out and lse, both NaN before the call."""
    out = np.full_like(step.q, np.nan)
    lse = np.full(step.q.shape[:2], np.nan, np.float32)
    capi.run_cpu(capi.sparse_attention_params(step, topk_idx, out, dense_len, lse))
    return out, lse


def reference_windows(step: Step, request: int) -> tuple[NDArray, NDArray]:
    """K1 and K2 of a request's whole sequence, in the dtype of the step."""
    keys = tensor(step.keys[request]).astype(step.geometry.dtype)
    windows = reference.compress_keys(keys, SparseConfig())
    dtype = DTYPES[step.geometry.dtype]
    k1, k2 = (w.astype("float32").numpy().astype(dtype) for w in windows)
    return k1, k2


def make_compressed_step(*args: object, **kwargs: object) -> Step:
    """``make_step`` with the reference's windows in their slots."""
    step = make_step(*args, **kwargs)  # type: ignore[arg-type]
    for request in active(step):
        store_windows(step, request, *reference_windows(step, request))
    return step


def reference_scores(step: Step, request: int, config: SparseConfig) -> NDArray[np.float32]:
    k1, k2 = (tensor(w) for w in reference_windows(step, request))
    q = tensor(step.q[step.rows(request)])
    history_len = step.requests[request].history_len
    return reference.score_blocks(q, k1, k2, config, history_len).numpy()


def reference_forced(step: Step, request: int, config: SparseConfig) -> NDArray[np.bool_]:
    blocks = reference.num_blocks(step.requests[request].kv_len)
    positions = paddle.to_tensor(positions_of(step, request))
    return reference.forced_blocks(positions, blocks, config).numpy()


def allowed_tokens(
    step: Step, request: int, topk_idx: NDArray[np.int32], dense_len: int
) -> NDArray[np.bool_]:
    """bool ``[num_kv_heads, query_len, kv_len]``: what each row of a request attends to."""
    kv_len = step.requests[request].kv_len
    positions = positions_of(step, request)
    lists = topk_idx[:, step.rows(request)]
    blocks = np.arange(kv_len) // 64
    listed = (lists[..., None] == np.arange(blocks[-1] + 1)).any(2)[..., blocks]
    is_dense = (positions + 1 < dense_len)[None, :, None]
    return (listed | is_dense) & (np.arange(kv_len) <= positions[:, None])[None]


def reference_attention(
    step: Step, request: int, topk_idx: NDArray[np.int32], dense_len: int
) -> NDArray[np.float32]:
    """fp32 result over the given lists."""
    q, k, v = step.q[step.rows(request)], step.keys[request], step.values[request]
    history_len = step.requests[request].history_len
    lists = paddle.to_tensor(topk_idx[:, step.rows(request)])
    inputs = (tensor(q), tensor(k), tensor(v))
    sparse = reference.block_sparse_attention(*inputs, lists, history_len).numpy()
    dense = reference.dense_attention(*inputs, history_len).numpy()
    is_dense = positions_of(step, request) + 1 < dense_len
    return np.where(is_dense[:, None, None], dense, sparse)


def with_poisoned_request(step: Step, request: int) -> Step:
    """The step with NaN in everything of one request: q, keys, values, compressed keys."""
    step = replace(
        step,
        q=step.q.copy(),
        k_cache=step.k_cache.copy(),
        v_cache=step.v_cache.copy(),
        k1_cache=step.k1_cache.copy(),
        k2_cache=step.k2_cache.copy(),
    )
    step.q[step.rows(request)] = np.nan
    pages = step.block_tables[request, : -(-step.requests[request].kv_len // 64)]
    for cache in (step.k_cache, step.v_cache, step.k1_cache, step.k2_cache):
        cache[pages] = np.nan
    return step


def only(step: Step, request: int) -> Step:
    """One request of a step by itself, over the same pages."""
    rows = step.rows(request)
    return replace(
        step,
        requests=(step.requests[request],),
        batch_id_per_token=np.zeros(step.requests[request].query_len, np.int32),
        cu_seqlens_q=np.array([0, step.requests[request].query_len], np.int32),
        query_lens=step.query_lens[request : request + 1].copy(),
        history_lens=step.history_lens[request : request + 1].copy(),
        block_tables=step.block_tables[request : request + 1].copy(),
        q=step.q[rows].copy(),
        keys=(step.keys[request],),
        values=(step.values[request],),
    )


def part(step: Step, start: int, end: int) -> Step:
    """A one-request step cut down to its new tokens ``start .. end - 1``, over the same pages."""
    (request,) = step.requests
    cut = replace(request, history_len=request.history_len + start, query_len=end - start)
    whole = only(step, 0)
    return replace(
        whole,
        requests=(cut,),
        batch_id_per_token=np.zeros(end - start, np.int32),
        cu_seqlens_q=np.array([0, end - start], np.int32),
        query_lens=np.array([end - start], np.int32),
        history_lens=np.array([cut.history_len], np.int32),
        q=whole.q[start:end].copy(),
    )
