"""A step cut into windows of rows gives the bits of the whole step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import paddle
import pytest

import capi
from cases import Geometry, Step
from cpu_ops import NOT_WRITTEN, SMALL, attend, make_compressed_step, select
from fd_minicpm41.metadata import cut_into_windows
from fd_minicpm41.ops import Batch

# A prompt, decode rows, an idle slot, a chunk behind a history; 1 + 600 + 1 + 77 + 3 rows.
REQUESTS = [(900, 1), (0, 600), (0, 0), (1030, 1), (700, 77), (383, 3)]


def int32(array: np.ndarray) -> paddle.Tensor:
    return paddle.to_tensor(array, dtype="int32")


@pytest.mark.parametrize("num_rows", [1, 7, 64, 601, 681, 10_000])
def test_windows_equal_the_step_bitwise(num_rows: int) -> None:
    sizes = replace(SMALL, dense_len=450)
    step = make_compressed_step(REQUESTS, Geometry(8, 2, 64, "bfloat16"))
    lists = select(step, sizes)
    out, lse = attend(step, lists, sizes.dense_len)
    batch = Batch(
        int32(step.batch_id_per_token),
        int32(step.cu_seqlens_q),
        int32(step.query_lens),
        int32(step.history_lens),
        int32(step.block_tables % 2**30),
    )
    windows = cut_into_windows(batch, num_rows)
    if num_rows >= step.num_tokens:
        assert windows == ()
        return
    assert [rows.start for rows, _ in windows] == list(range(0, step.num_tokens, num_rows))
    for rows, window in windows:
        part = _part(step, rows, window)
        got_lists = np.full((2, part.num_tokens, sizes.budget), NOT_WRITTEN, np.int32)
        params = capi.select_blocks_params(part, sizes, got_lists)
        params.batch.max_query_len = window.longest_query()
        capi.run_cpu(params)
        np.testing.assert_array_equal(got_lists, lists[:, rows])
        got_out = np.full_like(part.q, np.nan)
        got_lse = np.full(part.q.shape[:2], np.nan, np.float32)
        params = capi.sparse_attention_params(part, got_lists, got_out, sizes.dense_len, got_lse)
        params.batch.max_query_len = window.longest_query()
        capi.run_cpu(params)
        np.testing.assert_array_equal(got_out.view(np.int16), out[rows].view(np.int16))
        np.testing.assert_array_equal(got_lse, lse[rows])


def _part(step: Step, rows: slice, window: Batch) -> Step:
    return replace(
        step,
        batch_id_per_token=window.batch_id_per_token.numpy(),
        cu_seqlens_q=window.cu_seqlens_q.numpy(),
        q=step.q[rows].copy(),
    )
