"""FastDeploy's lengths and tables in this project's words, translated once a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import paddle

from fd_minicpm41.ops import Batch

if TYPE_CHECKING:
    from fastdeploy.model_executor.forward_meta import ForwardMeta


# Rows that are selected for and attended together: the lists of so many are 25 MB.
WINDOW_ROWS = 32768


@dataclass(frozen=True)
class InfLLMV2AttentionMetadata:
    """What every layer of one step needs. Nothing here was copied to the host.

    Attributes:
        batch: the requests of the step.
        compress_from: int32 ``[batch_size]``, first token whose windows are computed this step.
        windows: where a longer step is cut, the rows of each window and its batch; else empty.
    """

    batch: Batch
    compress_from: paddle.Tensor
    windows: tuple[tuple[slice, Batch], ...] = ()

    @classmethod
    def from_forward_meta(cls, forward_meta: ForwardMeta) -> InfLLMV2AttentionMetadata:
        """Reads one step's ``ForwardMeta``; called before the step, outside a captured graph."""
        history_lens = _flat(forward_meta.seq_lens_decoder)
        compress_from = history_lens
        if not forward_meta.step_use_cudagraph:
            # A prefill chunk with history may follow a prefix hit, a swap-in or a preemption, whose
            # pages came without compressed keys: rebuild the whole prefix, 512 bytes a token. A
            # graph holds decode rows alone, and only tensors at the addresses it was captured with.
            is_prefill = _flat(forward_meta.seq_lens_encoder) > 0
            compress_from = paddle.where(is_prefill, paddle.zeros_like(history_lens), history_lens)
        batch = Batch(
            batch_id_per_token=_flat(forward_meta.batch_id_per_token),
            cu_seqlens_q=forward_meta.cu_seqlens_q,
            query_lens=_flat(forward_meta.seq_lens_this_time),
            history_lens=history_lens,
            block_tables=forward_meta.block_tables,
        )
        return cls(batch, compress_from, cut_into_windows(batch, WINDOW_ROWS))

    def count_rows(self, dense_len: int) -> tuple[int, int]:
        """Sparse and dense rows of the step; copies to the host, so for a debug log alone."""
        owners = self.batch.batch_id_per_token.numpy()
        rows = np.flatnonzero(owners >= 0)
        owners = owners[rows]
        starts = self.batch.history_lens.numpy() - self.batch.cu_seqlens_q.numpy()[:-1]
        is_sparse = starts[owners] + rows + 1 >= dense_len
        return int(is_sparse.sum()), int((~is_sparse).sum())


def cut_into_windows(batch: Batch, num_rows: int) -> tuple[tuple[slice, Batch], ...]:
    """Windows of ``num_rows`` rows, the last one shorter; none where one would hold the step."""
    num_tokens = int(batch.batch_id_per_token.shape[0])
    if num_tokens <= num_rows:
        return ()
    cuts = [slice(n, min(n + num_rows, num_tokens)) for n in range(0, num_tokens, num_rows)]
    return tuple((rows, batch.window(rows)) for rows in cuts)


def longest_query(forward_meta: ForwardMeta) -> int | None:
    """What the host knows of the longest query: 1 in a step of decode rows alone, else nothing.

    FastDeploy says so on the host between ``init_attention_metadata`` and the first layer: ask in a
    layer. A decode row brings one token, for speculative decoding is refused.
    """
    return None if forward_meta.exist_prefill else 1


def _flat(lens: paddle.Tensor) -> paddle.Tensor:
    """``[n]`` of a tensor that FastDeploy 2.5 holds as ``[n, 1]``; a view, so addresses stay."""
    return lens if lens.ndim == 1 else lens.reshape([-1])
