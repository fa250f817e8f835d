"""Bad values and bad structs: each op refuses them, says what it wanted, and writes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

import capi
from cases import Step, make_step
from cpu_ops import SMALL, make_compressed_step


def _lists(step: Step) -> NDArray[np.int32]:
    lists = np.full((2, step.num_tokens, 3), -1, np.int32)
    lists[:, :, 0] = 0
    return lists


def _set(name: str, index: object, value: int) -> Callable[[Step], Step]:
    def change(step: Step) -> Step:
        array = getattr(step, name).copy()
        array[index] = value
        return replace(step, **{name: array})

    return change


BAD_BATCHES = [
    (_set("query_lens", 0, -1), "query_lens[0] is -1, wanted at least 0"),
    (_set("history_lens", 1, -5), "history_lens[1] is -5, wanted at least 0"),
    (_set("history_lens", 1, 500), "history_lens[1] + query_lens is 503, wanted at most 256"),
    (_set("history_lens", 1, 2**31 - 1), "history_lens[1] + query_lens is 2147483650"),
    (_set("cu_seqlens_q", 1, 6), "cu_seqlens_q[1] is 6, wanted 5, the sum of query_lens"),
    (_set("cu_seqlens_q", 2, 9), "cu_seqlens_q[2] is 9, wanted 8, the sum of query_lens"),
    (_set("batch_id_per_token", 2, 1), "batch_id_per_token[2] is 1, wanted 0 by cu_seqlens_q"),
    (_set("batch_id_per_token", 8, 5), "batch_id_per_token[8] is 5, wanted -1 by cu_seqlens_q"),
    (_set("batch_id_per_token", 0, -1), "batch_id_per_token[0] is -1, wanted 0 by cu_seqlens_q"),
    (_set("block_tables", (0, 1), -1), "block_tables[0][1] is -1, wanted a page from 0 to 5"),
    (_set("block_tables", (1, 0), 7), "block_tables[1][0] is 7, wanted a page from 0 to 5"),
]


@pytest.mark.parametrize(("change", "message"), BAD_BATCHES, ids=[m for _, m in BAD_BATCHES])
@pytest.mark.parametrize(
    "op", ["rope_and_write_kv", "compress_keys", "select_blocks", "sparse_attention"]
)
def test_every_op_refuses_a_bad_batch_and_writes_nothing(
    op: str, change: Callable[[Step], Step], message: str
) -> None:
    good = make_compressed_step([(100, 5), (60, 3)])
    step = change(good)
    lists, out = _lists(step), np.full_like(step.q, 7)
    table = np.ones((256, 32), np.float32)
    caches = [step.k_cache, step.v_cache, step.k1_cache, step.k2_cache]
    before = [cache.copy() for cache in caches]
    params = {
        "rope_and_write_kv": lambda: capi.rope_and_write_kv_params(
            step, step.q, step.q, step.q, table, table
        ),
        "compress_keys": lambda: capi.compress_keys_params(step),
        "select_blocks": lambda: capi.select_blocks_params(step, SMALL, lists),
        "sparse_attention": lambda: capi.sparse_attention_params(step, lists, out, -1),
    }[op]()
    if op == "compress_keys" and "batch_id_per_token" in message:
        pytest.skip("compress_keys goes by request and never reads batch_id_per_token")
    with pytest.raises(capi.KernelError) as refusal:
        capi.run_cpu(params)
    assert str(refusal.value).startswith(f"{op}: {message}")
    assert (out == 7).all()
    for cache, copy in zip(caches, before, strict=True):
        np.testing.assert_array_equal(cache, copy)


@pytest.mark.parametrize(
    ("part_of", "name", "value", "message"),
    [
        ("heads", "dtype", 3, "dtype is 3, wanted 0 (float32), 1 (float16) or 2 (bfloat16)"),
        ("heads", "num_kv_heads", 0, "num_kv_heads is 0, wanted at least 1"),
        ("heads", "num_q_heads", 5, "num_q_heads is 5, wanted a multiple of num_kv_heads (2)"),
        ("heads", "head_dim", 40, "head_dim is 40, wanted a multiple of 16 up to 256"),
        ("heads", "head_dim", 272, "head_dim is 272, wanted a multiple of 16 up to 256"),
        ("batch", "num_tokens", -1, "num_tokens is -1, wanted at least 0"),
        ("batch", "max_query_len", 0, "max_query_len is 0, wanted at least 1"),
        ("batch", "max_query_len", 4, "query_lens[0] is 5, wanted at most max_query_len (4)"),
        ("batch", "batch_size", 0, "batch_size is 0, wanted at least 1"),
        ("batch", "max_blocks", 0, "max_blocks is 0, wanted at least 1"),
        ("batch", "num_pages", 0, "num_pages is 0, wanted at least 1"),
        ("batch", "block_tables", None, "block_tables is null, wanted an address"),
        ("batch", "query_lens", None, "query_lens is null, wanted an address"),
        (None, "k_cache", None, "k_cache is null, wanted an address"),
        (None, "out", None, "out is null, wanted an address"),
        (None, "q_stride", 8, "q_stride is 8, wanted at least 128"),
        (None, "out_stride", 8, "out_stride is 8, wanted at least 128"),
        (None, "budget", 0, "budget is 0, wanted at least 1"),
        (None, "dense_len", -2, "dense_len is -2, wanted at least -1"),
    ],
)
def test_refuses_a_bad_struct(part_of: str | None, name: str, value: object, message: str) -> None:
    step = make_step([(100, 5), (60, 3)])
    lists, out = _lists(step), np.empty_like(step.q)
    params = capi.sparse_attention_params(step, lists, out, -1)
    setattr(getattr(params, part_of) if part_of else params, name, value)
    with pytest.raises(capi.KernelError) as refusal:
        capi.run_cpu(params)
    assert str(refusal.value) == f"sparse_attention: {message}"


@pytest.mark.parametrize("op", ["rope_and_write_kv", "compress_keys"])
def test_only_the_ops_that_take_windows_take_part_of_a_step(op: str) -> None:
    step = make_step([(100, 5), (60, 3)])
    table = np.ones((256, 32), np.float32)
    params = {
        "rope_and_write_kv": capi.rope_and_write_kv_params(
            step, step.q, step.q, step.q, table, table
        ),
        "compress_keys": capi.compress_keys_params(step),
    }[op]
    params.batch.num_tokens = 7
    with pytest.raises(capi.KernelError) as refusal:
        capi.run_cpu(params)
    message = "the sum of query_lens is 8, wanted at most num_tokens (7)"
    assert str(refusal.value) == f"{op}: {message}"


@pytest.mark.parametrize("op", ["select_blocks", "sparse_attention"])
def test_a_window_begins_inside_its_step(op: str) -> None:
    step = _set("cu_seqlens_q", 0, 2)(make_compressed_step([(100, 5), (60, 3)]))
    lists, out = _lists(step), np.empty_like(step.q)
    params = {
        "select_blocks": capi.select_blocks_params(step, SMALL, lists),
        "sparse_attention": capi.sparse_attention_params(step, lists, out, -1),
    }[op]
    with pytest.raises(capi.KernelError) as refusal:
        capi.run_cpu(params)
    message = "cu_seqlens_q[0] is 2, wanted at most 0, where the step begins"
    assert str(refusal.value) == f"{op}: {message}"
