"""The reference model with the project's ops in it: attention over pages, low-bit products.

On the CPU the C++ ops run, on a GPU the CUDA ones. Caches and q, k, v are bfloat16, as a server
holds them; everything else is the reference's fp32.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import paddle

from fd_minicpm41 import ops
from fd_minicpm41.cache import COARSE_SLOTS, FINE_SLOTS
from fd_minicpm41.config import BLOCK_SIZE, MiniCPMConfig, SparseConfig
from fd_minicpm41.quantization.formats import LowBitFormat
from fd_minicpm41.quantization.sidecar import CHANNEL_METHODS
from fd_minicpm41.quantization.tiles import tile_scales, tile_weight
from fd_minicpm41.reference.checkpoint import Checkpoint
from fd_minicpm41.reference.model import Attention, ForCausalLM
from fd_minicpm41.rope import rope_table

DTYPE = "bfloat16"


class PagedLayer:
    """One layer's pages: ``[num_pages, num_kv_heads, rows of a page, head_dim]``."""

    def __init__(self, config: MiniCPMConfig, num_pages: int) -> None:
        def pages(rows: int) -> paddle.Tensor:
            return paddle.zeros([num_pages, config.num_kv_heads, rows, config.head_dim], DTYPE)

        self.k, self.v = pages(BLOCK_SIZE), pages(BLOCK_SIZE)
        self.k1, self.k2 = pages(FINE_SLOTS), pages(COARSE_SLOTS)


class PagedCache:
    """What ``reference.model.KVCache`` is to the reference: one request's memory and its counts.

    Args:
        max_len: tokens there is room for.
        sparse: InfLLM-V2's parameters; ``None`` attends densely.

    Attributes:
        length: tokens stored.
        blocks_attended, blocks_present: as in ``KVCache``, of sparse rows alone.

    Raises:
        UsageError: more tokens than the rope table serves.
    """

    def __init__(self, config: MiniCPMConfig, max_len: int, sparse: SparseConfig | None) -> None:
        table = np.stack(rope_table(config, max_len))
        self.rotary_embs = paddle.to_tensor(table[:, None, :, None])
        self.max_len = max_len
        self.sparse = sparse
        # For a dense row the ops read no list.
        self.rule = sparse or replace(SparseConfig(), dense_len=max_len + 1)
        num_pages = -(-max_len // BLOCK_SIZE)
        self.layers = [PagedLayer(config, num_pages) for _ in range(config.num_layers)]
        self._block_tables = paddle.arange(num_pages, dtype="int32").unsqueeze(0)
        self._step: tuple[tuple[int, int], ops.Batch] | None = None
        self.length = 0
        self.blocks_attended = 0
        self.blocks_present = 0

    def rewind(self, length: int) -> None:
        """Forgets all but the first ``length`` tokens; compressed keys of the rest are redone."""
        assert 0 <= length <= self.length
        self.length = length

    def step(self, num_tokens: int) -> ops.Batch:
        """The step that appends ``num_tokens``: the same for all layers."""
        key = (self.length, num_tokens)
        if self._step is None or self._step[0] != key:
            batch = ops.Batch(
                batch_id_per_token=paddle.zeros([num_tokens], "int32"),
                cu_seqlens_q=paddle.to_tensor([0, num_tokens], "int32"),
                query_lens=paddle.to_tensor([num_tokens], "int32"),
                history_lens=paddle.to_tensor([self.length], "int32"),
                block_tables=self._block_tables,
                max_query_len=num_tokens,
            )
            self._step = key, batch
        return self._step[1]

    def count_blocks(self, topk_idx: paddle.Tensor, history_len: int) -> None:
        """Adds the sparse rows of a step whose first row stands at ``history_len``."""
        num_kv_heads, num_tokens, _ = topk_idx.shape
        first = max(0, self.rule.dense_len - 1 - history_len)
        if first >= num_tokens:
            return
        self.blocks_attended += int((topk_idx[:, first:] >= 0).sum())
        own = range(history_len + first, history_len + num_tokens)
        self.blocks_present += num_kv_heads * sum(p // BLOCK_SIZE + 1 for p in own)


class PagedAttention:
    """The projections of a reference layer's attention around the four ops."""

    def __init__(self, attention: Attention) -> None:
        self.q_proj, self.k_proj = attention.q_proj, attention.k_proj
        self.v_proj, self.o_proj = attention.v_proj, attention.o_proj

    def __call__(self, x: paddle.Tensor, cache: PagedCache, layer: PagedLayer) -> paddle.Tensor:
        qkv = paddle.concat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], axis=-1).astype(DTYPE)
        batch = cache.step(x.shape[0])
        ops.rope_and_write_kv(qkv, cache.rotary_embs, layer.k, layer.v, batch)
        if cache.sparse is None:
            topk_idx = paddle.full([layer.k.shape[1], x.shape[0], 1], -1, "int32")
        else:
            ops.compress_keys(layer.k, layer.k1, layer.k2, None, batch)
            topk_idx = ops.select_blocks(qkv, layer.k1, layer.k2, batch, cache.rule)
            cache.count_blocks(topk_idx, cache.length)
        out = ops.sparse_attention(qkv, layer.k, layer.v, topk_idx, batch, cache.rule)
        return self.o_proj(out.astype("float32"))


class LowBitLinear:
    """A linear layer whose codes the op multiplies by, as ``reference.model.Linear`` is called."""

    def __init__(self, checkpoint: Checkpoint, module: str, fmt: LowBitFormat) -> None:
        qweight = checkpoint.files.load(f"{module}.qweight")
        self.out_features = qweight.shape[0]
        self.format = fmt
        self.qweight = tile_weight(qweight, fmt.bits)
        self.scales = tile_scales(checkpoint.files.load(f"{module}.scales"))

    def __call__(self, x: paddle.Tensor) -> paddle.Tensor:
        # The kernels of a GPU take no fp32.
        given = x if x.place.is_cpu_place() else x.astype(DTYPE)
        out = ops.low_bit_linear(given, self.qweight, self.scales, self.format, self.out_features)
        return out.astype("float32")


def put_ops_in(model: ForCausalLM, checkpoint: Checkpoint | None = None) -> None:
    """Makes ``model`` attend by the ops, so that it takes :class:`PagedCache` alone, and multiply
    by the codes of the ``checkpoint`` it was loaded from, if that is given and low-bit.

    Formats that multiply 8-bit activations keep their restored weights and their rounding: their
    products are FastDeploy's.
    """
    sidecar = None if checkpoint is None else checkpoint.sidecar
    for index, layer in enumerate(model.model.layers):
        if checkpoint and sidecar and sidecar.method not in CHANNEL_METHODS:
            for part in (layer.self_attn, layer.mlp):
                kind = "self_attn" if part is layer.self_attn else "mlp"
                for name in vars(part):
                    module = f"model.layers.{index}.{kind}.{name}"
                    if module in sidecar.modules:
                        linear = LowBitLinear(checkpoint, module, sidecar.modules[module])
                        setattr(part, name, linear)
        layer.self_attn = PagedAttention(layer.self_attn)  # type: ignore[assignment]
