"""compress_keys on the CPU against the reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import capi
from accuracy import assert_within_budget, assert_within_one_step
from cases import TRUE_GEOMETRY, WINDOW_LENGTHS, Geometry, Step, load_windows, make_step
from cpu_ops import active, compress, only, part, reference_windows, with_poisoned_request

GEOMETRIES = [
    Geometry(),
    Geometry(8, 2, 64, "bfloat16"),
    Geometry(6, 1, 48, "float16"),
    replace(TRUE_GEOMETRY, dtype="bfloat16"),
]


def assert_equal_to_reference(step: Step) -> None:
    """Every window of every request; slots without one are as they were, NaN."""
    written = 0
    for request in active(step):
        stored, wanted = load_windows(step, request), reference_windows(step, request)
        keys = step.keys[request].astype(np.float64)
        for got, framework, size in zip(stored, wanted, (32, 128), strict=True):
            starts = range(0, (len(keys) - size) // (size // 2) * (size // 2) + 1, size // 2)
            means = np.array([keys[start : start + size].mean(0) for start in starts])
            truth = means.reshape(got.shape)
            dtype = step.geometry.dtype
            assert_within_budget(got, truth, framework, dtype, f"request {request}")
            if dtype != "float32":
                # Both sum in fp32, in another order, and round once to the storage type.
                assert_within_one_step(got, framework, f"request {request}")
            written += got.size
    caches = (step.k1_cache, step.k2_cache)
    assert written == sum(np.isfinite(c.astype(np.float32)).sum() for c in caches)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_every_length_in_one_batch(geometry: Geometry) -> None:
    step = make_step([(0, length) for length in WINDOW_LENGTHS], geometry)
    compress(step)
    assert_equal_to_reference(step)


def test_mixed_batch_rebuilds_what_it_is_asked_to() -> None:
    step = make_step([(300, 7), (0, 0), (127, 1), (0, 200), (90, 100)])
    compress(step, compress_from=[0, 5, 0, 0, 0])
    assert_equal_to_reference(step)


def test_writes_nothing_but_the_windows_that_end_in_the_new_tokens() -> None:
    step = make_step([(300, 20)])
    compress(step)
    k1, k2 = load_windows(step, 0)
    ends = 16 * np.arange(len(k1)) + 31
    assert (np.isfinite(k1).all((1, 2)) == (ends >= 300)).all()
    assert (np.isfinite(k2).all((1, 2)) == (64 * np.arange(len(k2)) + 127 >= 300)).all()
    assert ((ends >= 300) == [False] * 17 + [True] * 2).all()


def test_token_by_token_equals_one_prefill_bitwise() -> None:
    once, steps = make_step([(0, 200)]), make_step([(0, 200)])
    compress(once)
    for token in range(200):
        compress(part(steps, token, token + 1))
    np.testing.assert_array_equal(once.k1_cache, steps.k1_cache)
    np.testing.assert_array_equal(once.k2_cache, steps.k2_cache)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_cut_equals_one_prefill_bitwise(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 500))
    cuts = sorted({0, length, *data.draw(st.lists(st.integers(1, length), max_size=5))})
    once, chunks = make_step([(0, length)]), make_step([(0, length)])
    compress(once)
    for start, end in zip(cuts, cuts[1:], strict=False):
        compress(part(chunks, start, end))
    np.testing.assert_array_equal(once.k1_cache, chunks.k1_cache)
    np.testing.assert_array_equal(once.k2_cache, chunks.k2_cache)


def test_nan_in_one_request_does_not_reach_another() -> None:
    clean = make_step([(100, 60), (0, 150), (31, 1)])
    poisoned = with_poisoned_request(clean, 1)
    for step in (clean, poisoned):
        compress(step, compress_from=[0, 0, 0])
    for request in (0, 2):
        for got, wanted in zip(
            load_windows(poisoned, request), load_windows(clean, request), strict=True
        ):
            np.testing.assert_array_equal(got, wanted)


def test_alone_and_in_a_crowd_bitwise() -> None:
    crowd = make_step([(0, 130), (77, 300), (500, 1)])
    compress(crowd, compress_from=[0, 0, 0])
    together = load_windows(crowd, 1)
    crowd.k1_cache.fill(np.nan)
    crowd.k2_cache.fill(np.nan)
    alone = only(crowd, 1)
    compress(alone, compress_from=[0])
    for got, wanted in zip(load_windows(alone, 0), together, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_no_request_and_idle_slots_alone_do_nothing() -> None:
    compress(make_step([], padding_rows=0))
    idle = make_step([(500, 0), (3, 0)])
    compress(idle)
    assert np.isnan(idle.k1_cache).all()


@pytest.mark.parametrize(
    ("compress_from", "message"),
    [([-1], "compress_from[0] is -1, wanted at least 0")],
)
def test_refuses_a_negative_start(compress_from: list[int], message: str) -> None:
    step = make_step([(0, 100)])
    with pytest.raises(capi.KernelError) as refusal:
        compress(step, compress_from)
    assert message in str(refusal.value)
