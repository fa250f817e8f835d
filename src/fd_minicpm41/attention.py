"""The attention backend: the walk of one step through the ops, with no arithmetic of its own.

FastDeploy constructs a backend once a process, calls ``init_attention_metadata`` before each step
and ``forward_mixed`` for each layer of it. A captured decode step runs the same ops as an eager
one: dense and sparse rows are told apart inside them, from lengths on the device.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import paddle
from fastdeploy.model_executor.layers.attention import AppendAttentionBackend

from fd_minicpm41 import ops
from fd_minicpm41.cache import compressed_keys_of, compressed_keys_share
from fd_minicpm41.config import BLOCK_SIZE
from fd_minicpm41.metadata import InfLLMV2AttentionMetadata, longest_query
from fd_minicpm41.preflight import check_sparse_attention, served_sparse_config

if TYPE_CHECKING:
    from fastdeploy.config import FDConfig
    from fastdeploy.model_executor.forward_meta import ForwardMeta
    from fastdeploy.model_executor.layers.attention.attention import Attention

logger = logging.getLogger(__name__)


class InfLLMV2AttentionBackend(AppendAttentionBackend):
    """InfLLM-V2 over FastDeploy's pages: one page holds one block.

    Raises:
        UsageError: a setting under which sparse attention would be wrong.
    """

    def __init__(self, fd_config: FDConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(fd_config, *args, **kwargs)
        check_sparse_attention(fd_config)
        self.sparse = served_sparse_config(fd_config.model_config.model)
        # With no context long enough there is no sparse row: the stock kernels serve every step.
        self.is_never_sparse = self.max_seq_len < self.sparse.dense_len
        # FastDeploy counts this with the bytes of a page (fastdeploy_hooks.py).
        self.compressed_keys_share = (
            0.0 if self.is_never_sparse else compressed_keys_share(self.block_size)
        )
        self.step: InfLLMV2AttentionMetadata | None = None
        if self.is_never_sparse:
            what = f"dense at every length: max_model_len is {self.max_seq_len}"
        else:
            what = f"sparse from {max(self.sparse.dense_len, 0)} tokens of context, dense below"
        logger.info(
            "fd_minicpm41: InfLLM-V2 attention, %s (budget %d blocks of %d tokens, dense_len %d)",
            what,
            self.sparse.budget,
            BLOCK_SIZE,
            self.sparse.dense_len,
        )

    def init_attention_metadata(self, forward_meta: ForwardMeta) -> None:
        """Translates the step's lengths; allocates the compressed keys when new caches appear."""
        super().init_attention_metadata(forward_meta)
        if self.is_never_sparse or not forward_meta.caches:
            return
        for k_cache in forward_meta.caches[::2]:
            compressed_keys_of(k_cache)
        self.step = InfLLMV2AttentionMetadata.from_forward_meta(forward_meta)
        if logger.isEnabledFor(logging.DEBUG):
            counts = self.step.count_rows(self.sparse.dense_len)
            logger.debug("fd_minicpm41: %d sparse rows, %d dense rows in this step", *counts)

    def forward_mixed(
        self,
        q: paddle.Tensor,
        k: paddle.Tensor,
        v: paddle.Tensor,
        qkv: paddle.Tensor,
        compressed_kv: paddle.Tensor,
        k_pe: paddle.Tensor,
        layer: Attention,
        forward_meta: ForwardMeta,
    ) -> paddle.Tensor:
        """Attention of one layer for prefill and decode rows together.

        Args:
            qkv: ``[num_tokens, (num_q_heads + 2 * num_kv_heads) * head_dim]``, q rotated in place.

        Returns:
            ``[num_tokens, num_q_heads * head_dim]``.
        """
        if self.is_never_sparse:
            return super().forward_mixed(q, k, v, qkv, compressed_kv, k_pe, layer, forward_meta)
        assert self.step is not None, "init_attention_metadata was not called before this step"
        step, sparse = self.step, self.sparse
        k_cache, v_cache = forward_meta.caches[2 * layer.layer_id : 2 * layer.layer_id + 2]
        k1_cache, k2_cache = compressed_keys_of(k_cache)
        batch = step.batch._replace(max_query_len=longest_query(forward_meta))
        ops.rope_and_write_kv(qkv, forward_meta.rotary_embs, k_cache, v_cache, batch)
        # Without a prefill chunk there is no prefix to rebuild.
        start = None if batch.max_query_len == 1 else step.compress_from
        ops.compress_keys(k_cache, k1_cache, k2_cache, start, batch)
        if not step.windows:
            topk_idx = ops.select_blocks(qkv, k1_cache, k2_cache, batch, sparse, overlap=True)
            return ops.sparse_attention(
                qkv, k_cache, v_cache, topk_idx, batch, sparse, overlap=True
            )
        out = paddle.empty([qkv.shape[0], self.num_heads * self.head_dim], qkv.dtype)
        for rows, window in step.windows:
            part = qkv[rows]
            # Only the first window has compress_keys right before it.
            topk_idx = ops.select_blocks(
                part, k1_cache, k2_cache, window, sparse, overlap=rows.start == 0
            )
            out[rows] = ops.sparse_attention(
                part, k_cache, v_cache, topk_idx, window, sparse, overlap=True
            )
        return out
