"""The ops as Paddle runs them: equal to the C interface bit for bit, and their refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import paddle
import pytest
from numpy.typing import NDArray

from cases import TRUE_GEOMETRY, Geometry, Step, make_step
from cpu_ops import NOT_WRITTEN, SMALL, attend, compress, select
from fd_minicpm41 import ops
from test_rope_and_write_kv import Fused

REQUESTS = [(0, 200), (600, 7), (0, 0), (511, 1), (128, 1)]
GEOMETRIES = [Geometry(), Geometry(8, 2, 64, "bfloat16"), replace(TRUE_GEOMETRY, dtype="float16")]


def to_paddle(array: NDArray) -> paddle.Tensor:
    if array.dtype in (np.int32, np.float32):
        return paddle.to_tensor(array)
    return paddle.to_tensor(array.astype(np.float32)).astype(array.dtype.name)


def to_numpy(tensor: paddle.Tensor) -> NDArray[np.float32]:
    return tensor.astype("float32").numpy()


class Layer:
    """What a step's ops take, in Paddle's tensors and FastDeploy's shapes."""

    def __init__(self, fused: Fused) -> None:
        step, g = fused.step, fused.step.geometry
        width = (g.num_q_heads + 2 * g.num_kv_heads) * g.head_dim
        self.qkv = to_paddle(fused.qkv.reshape(step.num_tokens, width))
        table = np.stack([fused.cos, fused.sin]).reshape(2, 1, -1, 1, g.head_dim)
        self.rotary_embs = to_paddle(table)
        self.k_cache, self.v_cache, self.k1_cache, self.k2_cache = (
            to_paddle(c) for c in (step.k_cache, step.v_cache, step.k1_cache, step.k2_cache)
        )
        self.batch = [
            to_paddle(getattr(step, name))
            for name in (
                "batch_id_per_token",
                "cu_seqlens_q",
                "query_lens",
                "history_lens",
                "block_tables",
            )
        ]

    def rope_and_write_kv(self) -> None:
        ops.rope_and_write_kv(
            self.qkv, self.rotary_embs, self.k_cache, self.v_cache, ops.Batch(*self.batch)
        )

    def compress_keys(self, compress_from: paddle.Tensor | None = None) -> None:
        ops.compress_keys(
            self.k_cache, self.k1_cache, self.k2_cache, compress_from, ops.Batch(*self.batch)
        )

    def select_blocks(self) -> paddle.Tensor:
        return ops.select_blocks(
            self.qkv, self.k1_cache, self.k2_cache, ops.Batch(*self.batch), SMALL
        )

    def sparse_attention(self, topk_idx: paddle.Tensor) -> paddle.Tensor:
        return ops.sparse_attention(
            self.qkv, self.k_cache, self.v_cache, topk_idx, ops.Batch(*self.batch), SMALL
        )


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_one_step_equals_the_c_interface_bitwise(geometry: Geometry) -> None:
    fused = Fused(make_step(REQUESTS, geometry))
    layer, step = Layer(fused), fused.step
    rebuild = np.zeros(len(REQUESTS), np.int32)

    layer.rope_and_write_kv()
    layer.compress_keys(paddle.to_tensor(rebuild))
    topk_idx = layer.select_blocks()
    out = layer.sparse_attention(topk_idx)

    fused.run()
    compress(step, rebuild.tolist())
    rotated = replace(step, q=fused.qkv[:, : geometry.num_q_heads].copy())
    lists = select(rotated, SMALL)
    wanted, _ = attend(rotated, lists)
    for got, cache in (
        (layer.qkv, fused.qkv.reshape(step.num_tokens, -1)),
        (layer.k_cache, step.k_cache),
        (layer.v_cache, step.v_cache),
        (layer.k1_cache, step.k1_cache),
        (layer.k2_cache, step.k2_cache),
        (out, wanted.reshape(step.num_tokens, -1)),
    ):
        assert got.dtype == getattr(paddle, geometry.dtype)
        np.testing.assert_array_equal(to_numpy(got), cache.astype(np.float32))
    real = ~step.is_padding()
    np.testing.assert_array_equal(topk_idx.numpy()[:, real], lists[:, real])
    assert (lists[:, real] != NOT_WRITTEN).all()


def test_without_a_start_compress_keys_begins_at_the_history() -> None:
    fused = Fused(make_step(REQUESTS))
    fused.run()
    layer = Layer(fused)
    layer.compress_keys()
    compress(fused.step)
    np.testing.assert_array_equal(layer.k1_cache.numpy(), fused.step.k1_cache)
    np.testing.assert_array_equal(layer.k2_cache.numpy(), fused.step.k2_cache)


def test_a_step_without_tokens() -> None:
    layer = Layer(Fused(make_step([(5, 0), (0, 0)], padding_rows=0)))
    layer.rope_and_write_kv()
    layer.compress_keys()
    topk_idx = layer.select_blocks()
    assert topk_idx.shape == [2, 0, SMALL.budget]
    assert layer.sparse_attention(topk_idx).shape == [0, 4 * 32]


Change = Callable[[Layer], None]


def _set(name: str, make: Callable[[paddle.Tensor], paddle.Tensor]) -> Change:
    return lambda layer: setattr(layer, name, make(getattr(layer, name)))


def _set_batch(index: int, make: Callable[[paddle.Tensor], paddle.Tensor]) -> Change:
    def change(layer: Layer) -> None:
        layer.batch[index] = make(layer.batch[index])

    return change


def _step() -> Step:
    return make_step([(100, 5), (60, 3)], padding_rows=0)


ROPE = [
    (
        _set("rotary_embs", lambda t: t.astype("float64")),
        "rotary_embs: wanted float32 [2, 1, max_position, 1, head_dim=32], "
        "got float64 [2, 1, 256, 1, 32]",
    ),
    (
        _set("rotary_embs", lambda t: t[..., :16].contiguous()),
        "rotary_embs: wanted float32 [2, 1, max_position, 1, head_dim=32], "
        "got float32 [2, 1, 256, 1, 16]",
    ),
    (
        _set("qkv", lambda t: t.astype("float16")),
        "qkv: wanted float32 [num_tokens, qkv_width], got float16 [8, 256]",
    ),
    (
        _set("qkv", lambda t: t[:, :250].contiguous()),
        "qkv: wanted a width of (num_q_heads + 2 * 2) * 32, got 250",
    ),
    (_set("qkv", lambda t: t.T.contiguous().T), "qkv: wanted contiguous, got strides [1, 8]"),
    (
        _set("v_cache", lambda t: t[:3].contiguous()),
        "v_cache: wanted float32 [num_pages=6, num_kv_heads=2, 64, head_dim=32], "
        "got float32 [3, 2, 64, 32]",
    ),
    (
        _set("k_cache", lambda t: t.astype("float64")),
        "k_cache: wanted float32, float16 or bfloat16, got float64",
    ),
    (
        _set_batch(0, lambda t: t[:7].contiguous()),
        "batch_id_per_token: wanted int32 [num_tokens=8], got int32 [7]",
    ),
    (
        _set_batch(1, lambda t: t[:2].contiguous()),
        "cu_seqlens_q: wanted int32 [3], got int32 [2]",
    ),
    (
        _set_batch(2, lambda t: t.reshape([2, 1])),
        "query_lens: wanted int32 [batch_size], got int32 [2, 1]",
    ),
    (
        _set_batch(3, lambda t: t.astype("int64")),
        "history_lens: wanted int32 [batch_size=2], got int64 [2]",
    ),
    (
        _set_batch(4, lambda t: t.astype("int64")),
        "block_tables: wanted int32 [batch_size=2, max_blocks], got int64 [2, 4]",
    ),
    (
        _set_batch(4, lambda t: t * 0 + 9),
        "block_tables[0][0] is 9, wanted a page from 0 to 5",
    ),
]

COMPRESS = [
    (
        _set("k_cache", lambda t: t[:, :, :32].contiguous()),
        "k_cache: wanted float32 [num_pages, num_kv_heads, 64, head_dim], "
        "got float32 [6, 2, 32, 32]",
    ),
    (
        _set("k1_cache", lambda t: t.astype("bfloat16")),
        "k1_cache: wanted float32 [num_pages=6, num_kv_heads=2, 4, head_dim=32], "
        "got bfloat16 [6, 2, 4, 32]",
    ),
    (
        _set("k2_cache", lambda t: t.reshape([6, 2, 32])),
        "k2_cache: wanted float32 [num_pages=6, num_kv_heads=2, 1, head_dim=32], "
        "got float32 [6, 2, 32]",
    ),
    (
        _set("k1_cache", lambda t: t.transpose([0, 1, 3, 2]).contiguous().transpose([0, 1, 3, 2])),
        "k1_cache: wanted contiguous, got strides [256, 128, 1, 4]",
    ),
]

SELECT = [
    (
        _set("k2_cache", lambda t: t[:, :1].contiguous()),
        "k2_cache: wanted float32 [num_pages=6, num_kv_heads=2, 1, head_dim=32], "
        "got float32 [6, 1, 1, 32]",
    ),
    (
        _set("qkv", lambda t: t.reshape([8, 8, 32])),
        "qkv: wanted float32 [num_tokens, qkv_width], got float32 [8, 8, 32]",
    ),
]

ATTEND = [
    (
        _set("v_cache", lambda t: t.astype("bfloat16")),
        "v_cache: wanted float32 [num_pages=6, num_kv_heads=2, 64, head_dim=32], "
        "got bfloat16 [6, 2, 64, 32]",
    ),
    (
        _set_batch(4, lambda t: t[:1].contiguous()),
        "block_tables: wanted int32 [batch_size=2, max_blocks], got int32 [1, 4]",
    ),
]

REFUSALS = [
    *(("rope_and_write_kv", *case) for case in ROPE),
    *(("compress_keys", *case) for case in COMPRESS),
    *(("select_blocks", *case) for case in SELECT),
    *(("sparse_attention", *case) for case in ATTEND),
]


@pytest.mark.parametrize(
    ("op", "change", "message"), REFUSALS, ids=[f"{op}: {message}" for op, _, message in REFUSALS]
)
def test_refuses(op: str, change: Change, message: str) -> None:
    layer = Layer(Fused(_step()))
    lists = paddle.zeros([2, 8, SMALL.budget], "int32")
    change(layer)
    caches = (layer.qkv, layer.k_cache, layer.v_cache, layer.k1_cache, layer.k2_cache)
    before = [cache.clone() for cache in caches]
    with pytest.raises(ValueError) as refusal:
        layer.sparse_attention(lists) if op == "sparse_attention" else getattr(layer, op)()
    assert str(refusal.value) == f"minicpm41_{op}: {message}"
    for cache, copy in zip(caches, before, strict=True):
        np.testing.assert_array_equal(to_numpy(cache), to_numpy(copy))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: paddle.zeros([2, 8, 6], "int64"),
            "topk_idx: wanted int32 [num_kv_heads=2, num_tokens=8, budget], got int64 [2, 8, 6]",
        ),
        (
            lambda: paddle.zeros([2, 7, 6], "int32"),
            "topk_idx: wanted int32 [num_kv_heads=2, num_tokens=8, budget], got int32 [2, 7, 6]",
        ),
        (
            lambda: paddle.full([2, 8, 6], 5, "int32"),
            "topk_idx[0][0][0] is 5, wanted ascending block ids from 0 to 1, then -1",
        ),
    ],
)
def test_refuses_lists(make: Callable[[], paddle.Tensor], message: str) -> None:
    layer = Layer(Fused(_step()))
    with pytest.raises(ValueError) as refusal:
        layer.sparse_attention(make())
    assert str(refusal.value) == f"minicpm41_sparse_attention: {message}"
