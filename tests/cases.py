"""Steps to run an op on, the same for every side and every tensor library: NumPy arrays, seeded.

What must not be read is poisoned: pages without an owner and slots beyond a request's length hold
NaN, table entries beyond a request's blocks hold a huge number, pages lie in scrambled order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

BLOCK_SIZE, FINE_SLOTS, COARSE_SLOTS = 64, 4, 1
HUGE = 2_147_480_000

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

# Around every edge of a window, a block and a coarse window.
WINDOW_LENGTHS = (
    *(1, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 79, 80),
    *(127, 128, 129, 191, 192, 193, 1023, 1024, 1025),
)


@dataclass(frozen=True)
class Geometry:
    """Heads of one rank, and the storage type."""

    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    dtype: str = "float32"

    @property
    def group_size(self) -> int:
        return self.num_q_heads // self.num_kv_heads


TRUE_GEOMETRY = Geometry(32, 2, 128)


@dataclass(frozen=True)
class Request:
    """Tokens already cached, and new tokens of this step; 0 of them is an idle slot."""

    history_len: int
    query_len: int

    @property
    def kv_len(self) -> int:
        return self.history_len + self.query_len


@dataclass(frozen=True)
class Step:
    """One step's tensors as the ops take them, and each request's own sequence.

    ``keys`` are as cached, that is rotated. The caches hold history and new tokens alike;
    :meth:`before_writing` gives the caches as they stood before the step.
    """

    geometry: Geometry
    requests: tuple[Request, ...]
    batch_id_per_token: NDArray[np.int32]
    cu_seqlens_q: NDArray[np.int32]
    query_lens: NDArray[np.int32]
    history_lens: NDArray[np.int32]
    block_tables: NDArray[np.int32]
    q: NDArray
    k_cache: NDArray
    v_cache: NDArray
    k1_cache: NDArray
    k2_cache: NDArray
    keys: tuple[NDArray, ...]
    values: tuple[NDArray, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.batch_id_per_token)

    def rows(self, request: int) -> slice:
        """The rows of ``q`` that belong to a request."""
        return slice(int(self.cu_seqlens_q[request]), int(self.cu_seqlens_q[request + 1]))

    def is_padding(self) -> NDArray[np.bool_]:
        return self.batch_id_per_token < 0

    def cached(self, cache: NDArray, request: int) -> NDArray:
        """A request's ``[kv_len, num_kv_heads, head_dim]`` read back from a paged cache."""
        kv_len = self.requests[request].kv_len
        pages = self.block_tables[request, : -(-kv_len // BLOCK_SIZE)]
        g = self.geometry
        tokens = cache[pages].transpose(0, 2, 1, 3).reshape(-1, g.num_kv_heads, g.head_dim)
        return tokens[:kv_len]

    def before_writing(self) -> Step:
        """The step with NaN where its new tokens belong."""
        k_cache, v_cache = self.k_cache.copy(), self.v_cache.copy()
        for number, request in enumerate(self.requests):
            for position in range(request.history_len, request.kv_len):
                if request.query_len == 0:
                    break
                page = self.block_tables[number, position // BLOCK_SIZE]
                k_cache[page, :, position % BLOCK_SIZE] = np.nan
                v_cache[page, :, position % BLOCK_SIZE] = np.nan
        return replace(self, k_cache=k_cache, v_cache=v_cache)


def store_windows(step: Step, request: int, k1: NDArray, k2: NDArray) -> None:
    """Puts a request's means, ``[windows, num_kv_heads, head_dim]``, into their slots.

    A window lies in the page that holds its last token.
    """
    table = step.block_tables[request]
    for j in range(len(k1)):
        last = 16 * j + 31
        step.k1_cache[table[last // BLOCK_SIZE], :, last % BLOCK_SIZE // 16] = k1[j]
    for i in range(len(k2)):
        last = 64 * i + 127
        step.k2_cache[table[last // BLOCK_SIZE], :, 0] = k2[i]


def load_windows(step: Step, request: int) -> tuple[NDArray, NDArray]:
    """The stored windows of a request, in order: the inverse of :func:`store_windows`."""
    table, kv_len = step.block_tables[request], step.requests[request].kv_len
    fine = [16 * j + 31 for j in range(max(0, (kv_len - 32) // 16 + 1))]
    coarse = [64 * i + 127 for i in range(max(0, (kv_len - 128) // 64 + 1))]
    g = step.geometry
    shape = (-1, g.num_kv_heads, g.head_dim)
    k1 = [step.k1_cache[table[t // BLOCK_SIZE], :, t % BLOCK_SIZE // 16] for t in fine]
    k2 = [step.k2_cache[table[t // BLOCK_SIZE], :, 0] for t in coarse]
    dtype = step.k1_cache.dtype
    return np.array(k1, dtype).reshape(shape), np.array(k2, dtype).reshape(shape)


def make_step(
    requests: Sequence[Request | tuple[int, int]],
    geometry: Geometry = Geometry(),  # noqa: B008 (frozen)
    seed: int = 0,
    padding_rows: int = 2,
    spare_pages: int = 3,
    spare_blocks: int = 2,
) -> Step:
    """Builds a step of random tensors over scrambled, poisoned pages.

    Keys have a slowly turning part, so that blocks differ in what they score.
    """
    requests = tuple(r if isinstance(r, Request) else Request(*r) for r in requests)
    rng = np.random.default_rng(seed)
    g, dtype = geometry, DTYPES[geometry.dtype]

    query_lens = np.array([r.query_len for r in requests], np.int32)
    cu_seqlens_q = np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32)
    owners = np.repeat(np.arange(len(requests)), query_lens)
    batch_id_per_token = np.concatenate([owners, np.full(padding_rows, -1)]).astype(np.int32)
    blocks = [0 if r.query_len == 0 else -(-r.kv_len // BLOCK_SIZE) for r in requests]
    max_blocks = max([*blocks, 1]) + spare_blocks
    num_pages = sum(blocks) + spare_pages

    block_tables = np.full((len(requests), max_blocks), HUGE, np.int32)
    free = rng.permutation(num_pages)
    for number, count in enumerate(blocks):
        block_tables[number, :count], free = free[:count], free[count:]

    def poisoned(slots: int) -> NDArray:
        return np.full((num_pages, g.num_kv_heads, slots, g.head_dim), np.nan, dtype)

    k_cache, v_cache = poisoned(BLOCK_SIZE), poisoned(BLOCK_SIZE)
    keys, values = [], []
    for number, request in enumerate(requests):
        kv_len = request.kv_len if request.query_len else 0
        shape = (kv_len, g.num_kv_heads, g.head_dim)
        phase = np.arange(kv_len)[:, None, None] / 50 + rng.uniform(0, 6, shape[1:])
        k = (rng.standard_normal(shape) + 1.5 * np.sin(phase)).astype(dtype)
        v = rng.standard_normal(shape).astype(dtype)
        positions = np.arange(kv_len)
        pages = block_tables[number, positions // BLOCK_SIZE]
        k_cache[pages, :, positions % BLOCK_SIZE] = k
        v_cache[pages, :, positions % BLOCK_SIZE] = v
        keys.append(k)
        values.append(v)

    q = rng.standard_normal((len(batch_id_per_token), g.num_q_heads, g.head_dim)).astype(dtype)
    q[batch_id_per_token < 0] = np.nan
    return Step(
        geometry=g,
        requests=requests,
        batch_id_per_token=batch_id_per_token,
        cu_seqlens_q=cu_seqlens_q,
        query_lens=query_lens,
        history_lens=np.array([r.history_len for r in requests], np.int32),
        block_tables=block_tables,
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        k1_cache=poisoned(FINE_SLOTS),
        k2_cache=poisoned(COARSE_SLOTS),
        keys=tuple(keys),
        values=tuple(values),
    )
