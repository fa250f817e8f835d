"""MiniCPM4.1 in plain Paddle: Attention, MLP, DecoderLayer, Model, ForCausalLM, read downwards.

One request at a time, in fp32. Weights keep Hugging Face's names and shapes; the muP scalings stand
as attributes where they are used. Source of the structure and of the scalings: the Hugging Face
modelling code of MiniCPM4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import paddle
import paddle.nn.functional as F

from fd_minicpm41.config import MiniCPMConfig, SparseConfig
from fd_minicpm41.errors import UsageError
from fd_minicpm41.reference.attention import (
    block_sparse_attention,
    compress_keys,
    dense_attention,
    num_windows,
    select_blocks,
)
from fd_minicpm41.rope import rope_table

AttentionKind = Literal["dense", "infllmv2"]

# Gives the fp32 tensor of a weight's name; called once a name.
WeightLoader = Callable[[str], paddle.Tensor]

# Tokens of a prompt that pass through the model at once. It bounds the memory, not the result.
PREFILL_CHUNK = 512


def weight_shapes(config: MiniCPMConfig, tied: bool) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight, linear layers as ``[out_features, in_features]``.

    ``tied``: the head is the embedding, so there is no ``lm_head.weight``.
    """
    hidden, inter = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_q_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q_size, hidden),
        "self_attn.k_proj.weight": (kv_size, hidden),
        "self_attn.v_proj.weight": (kv_size, hidden),
        "self_attn.o_proj.weight": (hidden, q_size),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inter, hidden),
        "mlp.up_proj.weight": (inter, hidden),
        "mlp.down_proj.weight": (hidden, inter),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for i in range(config.num_layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


class LayerCache:
    """Keys and values of one layer, and the means of their complete windows.

    k, v: fp32 ``[max_len, num_kv_heads, head_dim]``, the keys rotated. k1, k2: the compressed keys,
    ``[windows of max_len, num_kv_heads, head_dim]``; absent when attention is dense. What lies
    beyond the cache's length is undefined.
    """

    def __init__(self, config: MiniCPMConfig, max_len: int, sparse: SparseConfig | None) -> None:
        def rows(count: int) -> paddle.Tensor:
            return paddle.empty([count, config.num_kv_heads, config.head_dim], "float32")

        self.sparse = sparse
        self.k, self.v = rows(max_len), rows(max_len)
        if sparse is not None:
            self.k1 = rows(num_windows(max_len, sparse.kernel_size, sparse.kernel_stride))
            self.k2 = rows(
                num_windows(max_len, sparse.coarse_kernel_size, sparse.coarse_kernel_stride)
            )

    def append(self, k: paddle.Tensor, v: paddle.Tensor, history_len: int) -> None:
        """Stores new rows after ``history_len`` ones and the windows that they complete."""
        kv_len = history_len + k.shape[0]
        self.k[history_len:kv_len] = k
        self.v[history_len:kv_len] = v
        if self.sparse is None:
            return
        c = self.sparse
        old_k1 = num_windows(history_len, c.kernel_size, c.kernel_stride)
        old_k2 = num_windows(history_len, c.coarse_kernel_size, c.coarse_kernel_stride)
        new_k1, new_k2 = self.compressed_lens(kv_len)
        if new_k1 == old_k1:
            return
        # The first missing coarse window starts no later than the first missing fine one, and at
        # the start of a fine one.
        start = old_k2 * c.coarse_kernel_stride
        k1, k2 = compress_keys(self.k[start:kv_len], c)
        self.k1[old_k1:new_k1] = k1[old_k1 - start // c.kernel_stride :]
        if new_k2 > old_k2:
            self.k2[old_k2:new_k2] = k2

    def compressed_lens(self, kv_len: int) -> tuple[int, int]:
        """Complete fine and coarse windows of the first ``kv_len`` keys."""
        c = self.sparse
        assert c is not None
        return (
            num_windows(kv_len, c.kernel_size, c.kernel_stride),
            num_windows(kv_len, c.coarse_kernel_size, c.coarse_kernel_stride),
        )


class KVCache:
    """What the model remembers of one request, and how much of it attention has read.

    Args:
        max_len: tokens there is room for.
        sparse: attends by InfLLM-V2 with these parameters; ``None`` attends densely.

    Attributes:
        length: tokens stored.
        blocks_attended, blocks_present: sums over layers, kv heads and rows since the cache was
            made: blocks that a row attended to, and blocks that it could have.

    Raises:
        UsageError: more tokens than the rope table serves.
    """

    def __init__(self, config: MiniCPMConfig, max_len: int, sparse: SparseConfig | None) -> None:
        cos, sin = rope_table(config, max_len)
        self.cos, self.sin = paddle.to_tensor(cos), paddle.to_tensor(sin)
        self.max_len = max_len
        self.layers = [LayerCache(config, max_len, sparse) for _ in range(config.num_layers)]
        self.length = 0
        self.blocks_attended = 0
        self.blocks_present = 0

    def rewind(self, length: int) -> None:
        """Forgets all but the first ``length`` tokens; compressed keys of the rest are redone."""
        assert 0 <= length <= self.length
        self.length = length

    def count_blocks(self, topk_idx: paddle.Tensor, history_len: int, block_size: int) -> None:
        """Adds the rows of ``topk_idx``, the first of which stands at position ``history_len``."""
        num_kv_heads, num_tokens, _ = topk_idx.shape
        self.blocks_attended += int((topk_idx >= 0).sum())
        own = range(history_len, history_len + num_tokens)
        self.blocks_present += num_kv_heads * sum(p // block_size + 1 for p in own)


class Linear:
    """``x @ weight.T``, without bias.

    Attributes:
        rounding: applied to ``x`` first, where a format rounds activations; ``None`` as a rule.
    """

    rounding: Callable[[paddle.Tensor], paddle.Tensor] | None = None

    def __init__(self, load: WeightLoader, name: str) -> None:
        # Turned once: a product with one row then reads the weight in the order it is stored.
        self.weight = load(name).t().contiguous()

    def __call__(self, x: paddle.Tensor) -> paddle.Tensor:
        return F.linear(x if self.rounding is None else self.rounding(x), self.weight)


class RMSNorm:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis."""

    def __init__(self, config: MiniCPMConfig, load: WeightLoader, name: str) -> None:
        self.eps = config.rms_norm_eps
        self.weight = load(name)

    def __call__(self, x: paddle.Tensor) -> paddle.Tensor:
        return x * paddle.rsqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.weight


def rotate(x: paddle.Tensor, cos: paddle.Tensor, sin: paddle.Tensor) -> paddle.Tensor:
    """RoPE on NeoX halves.

    x: ``[num_tokens, heads, head_dim]``; cos, sin: ``[num_tokens, head_dim]``, both halves alike.
    """
    first, second = x.chunk(2, axis=-1)
    turned = paddle.concat([-second, first], axis=-1)
    return x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)


class Attention:
    """Grouped-query attention, dense or InfLLM-V2 as the cache says."""

    def __init__(self, config: MiniCPMConfig, load: WeightLoader, name: str) -> None:
        self.head_dim = config.head_dim
        self.q_proj = Linear(load, f"{name}.q_proj.weight")
        self.k_proj = Linear(load, f"{name}.k_proj.weight")
        self.v_proj = Linear(load, f"{name}.v_proj.weight")
        self.o_proj = Linear(load, f"{name}.o_proj.weight")

    def __call__(self, x: paddle.Tensor, cache: KVCache, layer: LayerCache) -> paddle.Tensor:
        num_tokens, history_len = x.shape[0], cache.length
        kv_len = history_len + num_tokens
        cos, sin = cache.cos[history_len:kv_len], cache.sin[history_len:kv_len]
        q = rotate(self.q_proj(x).reshape([num_tokens, -1, self.head_dim]), cos, sin)
        k = rotate(self.k_proj(x).reshape([num_tokens, -1, self.head_dim]), cos, sin)
        v = self.v_proj(x).reshape([num_tokens, -1, self.head_dim])
        layer.append(k, v, history_len)

        # A row is sparse from dense_len on, whatever the chunk it comes in.
        num_dense = num_tokens
        if layer.sparse is not None:
            num_dense = min(max(layer.sparse.dense_len - 1 - history_len, 0), num_tokens)
        outs = []
        if num_dense > 0:
            dense_len = history_len + num_dense
            outs.append(
                dense_attention(
                    q[:num_dense], layer.k[:dense_len], layer.v[:dense_len], history_len
                )
            )
        if num_dense < num_tokens:
            outs.append(self.attend_sparsely(q[num_dense:], cache, layer, history_len + num_dense))
        out = outs[0] if len(outs) == 1 else paddle.concat(outs)
        return self.o_proj(out.reshape([num_tokens, -1]))

    def attend_sparsely(
        self, q: paddle.Tensor, cache: KVCache, layer: LayerCache, history_len: int
    ) -> paddle.Tensor:
        """Rows ``q`` from position ``history_len`` on, each over the blocks it selects."""
        assert layer.sparse is not None
        kv_len = history_len + q.shape[0]
        len_k1, len_k2 = layer.compressed_lens(kv_len)
        topk_idx = select_blocks(q, layer.k1[:len_k1], layer.k2[:len_k2], layer.sparse, history_len)
        cache.count_blocks(topk_idx, history_len, layer.sparse.block_size)
        return block_sparse_attention(q, layer.k[:kv_len], layer.v[:kv_len], topk_idx, history_len)


class MLP:
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, load: WeightLoader, name: str) -> None:
        self.gate_proj = Linear(load, f"{name}.gate_proj.weight")
        self.up_proj = Linear(load, f"{name}.up_proj.weight")
        self.down_proj = Linear(load, f"{name}.down_proj.weight")

    def __call__(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer:
    """Attention and MLP, each added to the residual after scaling."""

    def __init__(self, config: MiniCPMConfig, load: WeightLoader, name: str) -> None:
        self.residual_scale = config.residual_scale
        self.input_layernorm = RMSNorm(config, load, f"{name}.input_layernorm.weight")
        self.self_attn = Attention(config, load, f"{name}.self_attn")
        self.post_attention_layernorm = RMSNorm(
            config, load, f"{name}.post_attention_layernorm.weight"
        )
        self.mlp = MLP(load, f"{name}.mlp")

    def __call__(self, x: paddle.Tensor, cache: KVCache, layer: LayerCache) -> paddle.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cache, layer) * self.residual_scale
        return x + self.mlp(self.post_attention_layernorm(x)) * self.residual_scale


class Model:
    """Embedding, decoder layers, last norm."""

    def __init__(self, config: MiniCPMConfig, load: WeightLoader) -> None:
        self.scale_emb = config.scale_emb
        self.embed_tokens = load("model.embed_tokens.weight")
        self.layers = [
            DecoderLayer(config, load, f"model.layers.{i}") for i in range(config.num_layers)
        ]
        self.norm = RMSNorm(config, load, "model.norm.weight")

    def __call__(self, token_ids: paddle.Tensor, cache: KVCache) -> paddle.Tensor:
        x = F.embedding(token_ids, self.embed_tokens) * self.scale_emb
        for decoder_layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            x = decoder_layer(x, cache, layer_cache)
        cache.length += token_ids.shape[0]
        return self.norm(x)


class ForCausalLM:
    """The language model: token ids in, logits out.

    Args:
        config: shape and scalings; ``config.sparse`` holds InfLLM-V2's parameters, if any.
        load: the weights, with the names and shapes of :func:`weight_shapes`.
        tied: the head is the embedding.
    """

    def __init__(self, config: MiniCPMConfig, load: WeightLoader, tied: bool) -> None:
        self.config = config
        self.logits_scale = config.logits_scale
        self.model = Model(config, load)
        self.lm_head = self.model.embed_tokens if tied else load("lm_head.weight")

    def new_cache(self, max_len: int, attention: AttentionKind = "dense") -> KVCache:
        """An empty cache for ``max_len`` tokens; "infllmv2" needs ``config.sparse``.

        Raises:
            UsageError: no sparse parameters, or more tokens than the rope table serves.
        """
        sparse = self.config.sparse if attention == "infllmv2" else None
        if attention == "infllmv2" and sparse is None:
            raise UsageError(
                "config.json has no sparse_config, which infllmv2 attention needs: add it, or "
                "choose dense attention"
            )
        return KVCache(self.config, max_len, sparse)

    def __call__(
        self, token_ids: Sequence[int], cache: KVCache, last_only: bool = False
    ) -> paddle.Tensor:
        """Appends tokens to the cache and predicts what follows each of them.

        Args:
            token_ids: ``[num_tokens]``, at least one.
            cache: holds the history; grows by ``num_tokens``.
            last_only: predict for the last token alone.

        Returns:
            fp32 logits ``[num_tokens or 1, vocab_size]``.

        Raises:
            UsageError: no token, or no room for them all.
        """
        if len(token_ids) == 0:
            raise UsageError("the prompt has no tokens: give it some text")
        if cache.length + len(token_ids) > cache.max_len:
            raise UsageError(
                f"{cache.length + len(token_ids)} tokens exceed the cache's {cache.max_len}: "
                "shorten the prompt or make a larger cache"
            )
        with paddle.no_grad():
            hidden = self.model(paddle.to_tensor(token_ids, "int64"), cache)
            if last_only:
                hidden = hidden[-1:]
            return paddle.matmul(hidden * self.logits_scale, self.lm_head, transpose_y=True)

    def prefill(
        self,
        token_ids: Sequence[int],
        cache: KVCache,
        chunk: int = PREFILL_CHUNK,
        on_progress: Callable[[int], object] | None = None,
    ) -> paddle.Tensor:
        """Reads a prompt in chunks; ``on_progress`` is told the tokens of each chunk when done.

        Returns:
            fp32 logits ``[vocab_size]`` of the token after the prompt. Raises as calling does.
        """
        logits = None
        for start in range(0, max(len(token_ids), 1), chunk):
            part = token_ids[start : start + chunk]
            logits = self(part, cache, last_only=True)
            if on_progress is not None:
                on_progress(len(part))
        assert logits is not None
        return logits[0]
