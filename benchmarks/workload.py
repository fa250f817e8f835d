"""One prompt to time prefill on: its pages, and queries whose selections are like a model's.

Measured on the activations of a trained model (SmolLM2-135M over 8192 tokens of novels and of
source code, every length of the algorithm divided by 4, rows past the middle), T neighbouring
tokens together list ``MEASURED_UNIONS[T]`` blocks of 64 tokens, 96 each. ``correlated`` queries
give that curve through the real selection: keys are independent, and a query is a vector that turns
slowly, new every ``TURN_TOKENS`` tokens, plus a share of noise of its own. The same share swaps
more blocks the more there are to choose from, so it falls with the position. ``independent``
queries are noise alone, the worst case.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from cases import TRUE_GEOMETRY, Geometry

MEASURED_UNIONS = {1: 96, 2: 111, 4: 128, 8: 148, 16: 169, 32: 192}
TURN_TOKENS = 128
# Position, and the share of a query's variance that is its own there; between them by logarithm.
NOISE_SHARE = (
    (12288, 0.22),
    (16384, 0.13),
    (24576, 0.07),
    (49152, 0.045),
    (98304, 0.035),
    (131072, 0.03),
)
GEOMETRY = Geometry(TRUE_GEOMETRY.num_q_heads, TRUE_GEOMETRY.num_kv_heads, 128, "bfloat16")
Q_HEADS, KV_HEADS, HEAD_DIM = 32, 2, 128
BLOCK_SIZE = 64
# Rows that a server selects for and attends to together (fd_minicpm41.metadata).
WINDOW_ROWS = 32768


def noise_share(positions: torch.Tensor) -> torch.Tensor:
    """fp32 share for each position, of a correlated prompt."""
    at, share = (np.array(column, np.float32) for column in zip(*NOISE_SHARE, strict=True))
    logs = np.log(np.maximum(positions.cpu().numpy(), 1))
    return torch.as_tensor(np.interp(logs, np.log(at), share), dtype=torch.float32)


def correlated_queries(length: int) -> torch.Tensor:
    """bfloat16 ``[length, Q_HEADS, HEAD_DIM]`` of unit variance."""
    anchors = torch.randn(length // TURN_TOKENS + 2, Q_HEADS, HEAD_DIM, device="cuda")
    q = torch.empty(length, Q_HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    for start in range(0, length, 8192):
        positions = torch.arange(start, min(start + 8192, length))
        turn = (positions % TURN_TOKENS / TURN_TOKENS * (torch.pi / 2)).cuda()[:, None, None]
        before = (positions // TURN_TOKENS).cuda()
        slow = turn.cos() * anchors[before] + turn.sin() * anchors[before + 1]
        own = noise_share(positions).cuda()[:, None, None]
        rows = (1 - own).sqrt() * slow + own.sqrt() * torch.randn_like(slow)
        q[start : start + len(positions)] = rows.to(torch.bfloat16)
    return q


@dataclass
class Rows:
    """One call of an op: ``num_rows`` rows of a step of one request, its tensors as ``capi`` reads
    them. A call may hold a window of the step: ``cu_seqlens_q`` is then shifted below 0."""

    geometry: Geometry
    batch_id_per_token: torch.Tensor
    cu_seqlens_q: torch.Tensor
    query_lens: torch.Tensor
    history_lens: torch.Tensor
    block_tables: torch.Tensor
    q: torch.Tensor | None
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    k1_cache: torch.Tensor
    k2_cache: torch.Tensor
    max_query_len: int

    @property
    def num_tokens(self) -> int:
        return len(self.batch_id_per_token)


class Pages:
    """One layer of the cache of a request of ``length`` tokens: random keys and values, written to
    scrambled pages.

    Attributes:
        k_cache, v_cache: ``[pages, KV_HEADS, 64, HEAD_DIM]``.
        block_tables: ``[1, pages]``; layers of one request share it.
    """

    q: torch.Tensor | None = None

    def __init__(self, length: int, block_tables: torch.Tensor | None = None) -> None:
        self.length = length
        pages = -(-length // BLOCK_SIZE)
        if block_tables is None:
            block_tables = torch.randperm(pages, device="cuda").to(torch.int32)[None].contiguous()
        self.block_tables = block_tables
        self.k_cache = _random(pages, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
        self.v_cache = _random(pages, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
        self.k1_cache = torch.full_like(self.k_cache[:, :, :4], float("nan"))
        self.k2_cache = torch.full_like(self.k_cache[:, :, :1], float("nan"))

    def rows(self, history_len: int, query_len: int, first: int, num_rows: int) -> Rows:
        """Rows ``first .. first + num_rows - 1`` of the step that brings ``query_len`` tokens."""
        start = history_len + first
        return Rows(
            geometry=GEOMETRY,
            batch_id_per_token=torch.zeros(num_rows, dtype=torch.int32, device="cuda"),
            cu_seqlens_q=_ints(-first, query_len - first),
            query_lens=_ints(query_len),
            history_lens=_ints(history_len),
            block_tables=self.block_tables,
            q=None if self.q is None else self.q[start : start + num_rows],
            k_cache=self.k_cache,
            v_cache=self.v_cache,
            k1_cache=self.k1_cache,
            k2_cache=self.k2_cache,
            max_query_len=query_len,
        )

    def in_order(self, cache: torch.Tensor) -> torch.Tensor:
        """``[KV_HEADS, slots of all pages in order, HEAD_DIM]`` of a paged cache."""
        pages = cache[self.block_tables[0].long()]
        return pages.transpose(0, 1).reshape(KV_HEADS, -1, HEAD_DIM)


class Prompt(Pages):
    """The same with the queries of all tokens: ``q``, bfloat16 ``[length, Q_HEADS, HEAD_DIM]``."""

    def __init__(self, length: int, is_correlated: bool) -> None:
        super().__init__(length)
        self.q = correlated_queries(length) if is_correlated else _random(length, Q_HEADS, HEAD_DIM)


def run_starts(rows: int, samples: int, device: str) -> torch.Tensor:
    """First rows of the runs that :func:`union_sizes` looks at."""
    run = max(MEASURED_UNIONS)
    return torch.linspace(rows // 2, rows - run, samples, device=device).long() // run * run


def union_sizes(topk_idx: torch.Tensor, samples: int = 128) -> dict[int, float]:
    """Mean number of blocks that T neighbouring rows list together, over rows past the middle.

    Args:
        topk_idx: ``[KV_HEADS, rows, budget]``, of a whole prompt or of its last rows.
        samples: runs of 32 rows looked at, evenly spread.
    """
    rows = topk_idx.shape[1]
    run = max(MEASURED_UNIONS)
    starts = run_starts(rows, samples, "cuda")
    picked = topk_idx[:, (starts[:, None] + torch.arange(run, device="cuda")).reshape(-1)]
    num_blocks = int(picked.max()) + 1
    listed = torch.zeros(*picked.shape[:2], num_blocks + 1, dtype=torch.bool, device="cuda")
    # -1, no block, goes to the column beyond the last.
    listed.scatter_(2, torch.where(picked < 0, num_blocks, picked).long(), True)
    listed = listed[:, :, :num_blocks]
    return {
        count: listed.view(-1, count, num_blocks).any(1).sum(1).float().mean().item()
        for count in MEASURED_UNIONS
    }


def _ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")
