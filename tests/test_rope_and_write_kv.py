"""rope_and_write_kv on the CPU against the reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import capi
from accuracy import assert_within_budget
from cases import DTYPES, TRUE_GEOMETRY, Geometry, Step, make_step
from cpu_ops import active, positions_of, tensor
from fd_minicpm41.reference.model import rotate

GEOMETRIES = [Geometry(), Geometry(8, 2, 64, "bfloat16"), Geometry(6, 1, 48, "float16")]
GEOMETRIES += [replace(TRUE_GEOMETRY, dtype="bfloat16")]


def make_table(positions: int, head_dim: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    frequencies = 10000.0 ** (-np.arange(head_dim // 2) * 2 / head_dim)
    angles = np.tile(np.arange(positions)[:, None] * frequencies, 2)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


class Fused:
    """A step's new q, k, v in one tensor, as FastDeploy has them, and their empty places."""

    def __init__(self, step: Step, seed: int = 0) -> None:
        g = step.geometry
        self.step = step.before_writing()
        heads = g.num_q_heads + 2 * g.num_kv_heads
        rng = np.random.default_rng(seed)
        values = rng.standard_normal((step.num_tokens, heads, g.head_dim))
        self.qkv = values.astype(DTYPES[g.dtype])
        self.qkv[step.is_padding()] = np.nan
        self.before = self.qkv.copy()
        self.cos, self.sin = make_table(step.block_tables.shape[1] * 64, g.head_dim)

    def params(self) -> capi.RopeAndWriteKvParams:
        g, (_, heads, head_dim) = self.step.geometry, self.qkv.shape
        q, k = self.qkv[:, : g.num_q_heads], self.qkv[:, g.num_q_heads :]
        v = self.qkv[:, g.num_q_heads + g.num_kv_heads :]
        params = capi.rope_and_write_kv_params(self.step, q, k, v, self.cos, self.sin)
        params.q_stride = params.k_stride = params.v_stride = heads * head_dim
        return params

    def run(self) -> None:
        capi.run_cpu(self.params())


def exactly_rotated(x: NDArray, cos: NDArray, sin: NDArray) -> NDArray[np.float64]:
    x, cos, sin = (a.astype(np.float64) for a in (x, cos, sin))
    half = x.shape[-1] // 2
    turned = np.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    return x * cos[:, None] + turned * sin[:, None]


def assert_equal_to_reference(fused: Fused) -> None:
    step, g = fused.step, fused.step.geometry
    new = np.zeros(step.k_cache.shape[:1] + step.k_cache.shape[2:3], bool)
    for request in active(step):
        rows, positions = step.rows(request), positions_of(step, request)
        cos, sin = fused.cos[positions], fused.sin[positions]
        before = fused.before[rows]
        pages, offsets = step.block_tables[request, positions // 64], positions % 64
        new[pages, offsets] = True
        q, k = before[:, : g.num_q_heads], before[:, g.num_q_heads : -g.num_kv_heads]
        for got, x in (
            (fused.qkv[rows, : g.num_q_heads], q),
            (step.k_cache[pages, :, offsets], k),
        ):
            framework = rotate(tensor(x), tensor(cos), tensor(sin)).numpy().astype(x.dtype)
            truth = exactly_rotated(x, cos, sin)
            assert_within_budget(got, truth, framework, g.dtype, f"request {request}")
        np.testing.assert_array_equal(step.v_cache[pages, :, offsets], before[:, -g.num_kv_heads :])
    # k and v stay in qkv as they were, and so do padding rows.
    kept = np.ones(fused.qkv.shape, bool)
    kept[~step.is_padding(), : g.num_q_heads] = False
    got, wanted = fused.qkv[kept].astype(np.float32), fused.before[kept].astype(np.float32)
    np.testing.assert_array_equal(got, wanted)
    assert np.isfinite(step.k_cache.transpose(0, 2, 1, 3)[new].astype(np.float32)).all()


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_mixed_batch(geometry: Geometry) -> None:
    fused = Fused(make_step([(0, 200), (1030, 1), (0, 0), (63, 2), (127, 1)], geometry))
    fused.run()
    assert_equal_to_reference(fused)


@settings(max_examples=25, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 70)), min_size=1, max_size=5),
    head_dim=st.sampled_from([16, 32, 128]),
    seed=st.integers(0, 100),
)
def test_any_batch(requests: list[tuple[int, int]], head_dim: int, seed: int) -> None:
    fused = Fused(make_step(requests, Geometry(4, 2, head_dim), seed=seed))
    fused.run()
    assert_equal_to_reference(fused)


def test_writes_no_other_slot() -> None:
    step = make_step([(100, 30)])
    fused = Fused(step)
    fused.run()
    for cache, before in (
        (fused.step.k_cache, step.k_cache),
        (fused.step.v_cache, step.v_cache),
    ):
        written = np.zeros(cache.shape[:1] + cache.shape[2:3], bool)
        positions = positions_of(step, 0)
        written[step.block_tables[0, positions // 64], positions % 64] = True
        rest = ~written[:, None, :, None] & np.ones_like(cache, bool)
        np.testing.assert_array_equal(cache[rest], before[rest])


def test_nan_in_one_request_does_not_reach_another() -> None:
    fused = Fused(make_step([(100, 3), (0, 70), (31, 1)]))
    fused.before[fused.step.rows(1)] = fused.qkv[fused.step.rows(1)] = np.nan
    fused.run()
    for request in (0, 2):
        assert np.isfinite(fused.qkv[fused.step.rows(request)]).all()
        assert np.isfinite(fused.step.cached(fused.step.k_cache, request)).all()
        assert np.isfinite(fused.step.cached(fused.step.v_cache, request)).all()


def test_alone_and_in_a_crowd_bitwise() -> None:
    crowd, alone = (Fused(make_step(r, seed=4)) for r in ([(70, 100), (5, 30)], [(70, 100)]))
    alone.qkv[:100] = crowd.qkv[:100]
    crowd.run()
    alone.run()
    np.testing.assert_array_equal(alone.qkv[:100], crowd.qkv[:100])
    new = slice(70, 170)
    np.testing.assert_array_equal(
        alone.step.cached(alone.step.k_cache, 0)[new], crowd.step.cached(crowd.step.k_cache, 0)[new]
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_storage_types_convert_exactly(dtype: str) -> None:
    # Position 0 turns nothing, so every finite number must come back as itself, in q and in k.
    bits = np.arange(2**16, dtype=np.uint16).view(DTYPES[dtype])
    numbers = bits[np.isfinite(bits.astype(np.float32))]
    numbers = numbers[: len(numbers) // 96 * 96].reshape(-1, 3, 32)
    step = make_step([(0, 1)] * len(numbers), Geometry(1, 1, 32, dtype), padding_rows=0)
    fused = Fused(step)
    fused.qkv[...] = numbers
    fused.run()
    assert len(numbers) > 600
    zero = numbers.astype(np.float32) == 0  # 0 - -0 * 0 is 0: the sign of zero may go
    got_k = fused.step.k_cache[step.block_tables[:, 0], :, 0]
    for got, wanted, is_zero in (
        (fused.qkv[:, :1], numbers[:, :1], zero[:, :1]),
        (got_k, numbers[:, 1:2], zero[:, 1:2]),
    ):
        same = got.view(np.uint16) == wanted.view(np.uint16)
        assert (same | (is_zero & (got.astype(np.float32) == 0))).all()


def test_rounds_to_nearest_even() -> None:
    for dtype in ("float16", "bfloat16"):
        step = make_step([(0, 500)], Geometry(4, 2, 32, dtype), padding_rows=0)
        fused = Fused(step)
        fused.cos[:], fused.sin[:] = 1 / 3, 1 / 7
        fused.run()
        x = fused.before[:, :4].astype(np.float32)
        turned = np.concatenate([-x[..., 16:], x[..., :16]], axis=-1)
        exact = x.astype(np.float64) * fused.cos[0, 0] + turned.astype(np.float64) * fused.sin[0, 0]
        wanted = exact.astype(np.float32).astype(DTYPES[dtype])
        differs = (fused.qkv[:, :4] != wanted).mean()
        assert differs < 1e-3, differs  # where fp32 rounding itself decides a tie


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_position", 0, "max_position is 0, wanted at least 1"),
        ("max_position", 104, "history_lens[0] + query_lens is 105, wanted at most 104, the rows"),
        ("q_stride", 100, "q_stride is 100, wanted at least 128"),
        ("k_stride", 60, "k_stride is 60, wanted at least 64"),
        ("v_stride", 60, "v_stride is 60, wanted at least 64"),
        *((name, None, f"{name} is null, wanted an address") for name in ("q", "k", "v")),
        *((name, None, f"{name} is null, wanted an address") for name in ("cos", "v_cache")),
    ],
)
def test_refuses(name: str, value: int | None, message: str) -> None:
    fused = Fused(make_step([(100, 5)]))
    params = fused.params()
    setattr(params, name, value)
    with pytest.raises(capi.KernelError) as refusal:
        capi.run_cpu(params)
    assert str(refusal.value).startswith(f"rope_and_write_kv: {message}")
    np.testing.assert_array_equal(fused.qkv, fused.before)
