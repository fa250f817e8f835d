"""The small model in PyTorch: MiniCPM4.1's structure with InfLLM-V2's selection, for training.

Names of weights are Hugging Face's. The selection follows ``fd_minicpm41.reference.attention`` step
by step (``docs/sparse_attention.md``): compressed keys rounded to the keys' dtype, scores in fp32,
ties to the lower block. On a GPU long passes run on ``kernels.py``, elsewhere in plain PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fd_minicpm41.config import MiniCPMConfig, SparseConfig
from fd_minicpm41.rope import rope_table

AttentionKind = Literal["dense", "sparse"]
KINDS: tuple[AttentionKind, AttentionKind] = ("dense", "sparse")
NEVER = float("-inf")
# The kernels work on tiles of so many rows: lengths of whole sequences are multiples of it.
ROWS = 8


def compress_keys(k: Tensor, sparse: SparseConfig) -> tuple[Tensor, Tensor]:
    """Means of every complete fine and coarse window.

    k: ``[batch, kv_len, kv_heads, head_dim]``; each result ``[batch, windows, kv_heads,
    head_dim]`` in the dtype of k, summed in fp32.
    """
    fine = _window_means(k, sparse.kernel_size, sparse.kernel_stride)
    return fine, _window_means(k, sparse.coarse_kernel_size, sparse.coarse_kernel_stride)


def _window_means(k: Tensor, size: int, stride: int) -> Tensor:
    count = max(0, (k.shape[1] - size) // stride + 1)
    if count == 0:
        return k[:, :0]
    strips = k[:, : (count - 1) * stride + size].float()
    strips = strips.reshape(k.shape[0], -1, stride, *k.shape[2:]).sum(2)
    total = strips[:, :count]
    for strip in range(1, size // stride):
        total = total + strips[:, strip : strip + count]
    return (total / size).to(k.dtype)


def score_blocks(
    q: Tensor, k1: Tensor, k2: Tensor, sparse: SparseConfig, positions: Tensor, blocks: int
) -> Tensor:
    """Logarithm of what a group's heads give to each block, by the compressed keys.

    Args:
        q: ``[batch, rows, q_heads, head_dim]``.
        k1, k2: as :func:`compress_keys` returns them.
        positions: int64 ``[batch, rows]``, the place of each row in its sequence.

    Returns:
        fp32 ``[batch, kv_heads, rows, blocks]``; -inf where a row sees no overlapping window.
    """
    batch, rows, _, head_dim = q.shape
    kv_heads, windows = k1.shape[2], k1.shape[1]
    scores = torch.full((batch, kv_heads, rows, blocks), NEVER, device=q.device)
    if windows == 0:
        return scores
    grouped = _by_group(q.float() * head_dim**-0.5, kv_heads)

    def logits(keys: Tensor, size: int, stride: int) -> tuple[Tensor, Tensor]:
        # Else autocast would round the products to bf16.
        with torch.autocast(q.device.type, enabled=False):
            product = grouped @ keys.float().permute(0, 2, 3, 1)
        product = product.unflatten(2, (-1, rows))  # [batch, kv_heads, group, rows, windows]
        last = torch.arange(keys.shape[1], device=q.device) * stride + size - 1
        return product, (last <= positions[..., None])[:, None, None]

    fine, seen = logits(k1, sparse.kernel_size, sparse.kernel_stride)
    if k2.shape[1] > 0:
        coarse, coarse_seen = logits(k2, sparse.coarse_kernel_size, sparse.coarse_kernel_stride)
        lse = coarse.masked_fill(~coarse_seen, NEVER).logsumexp(-1, keepdim=True)
        lse = torch.where(lse.isfinite(), lse, 0.0)
        fine = fine - lse
    window_scores = fine.logsumexp(2).masked_fill(~seen[:, :, 0], NEVER)

    # Windows 4b - 1 .. 4b + 3 overlap block b, in the published sizes.
    per_block = sparse.block_size // sparse.kernel_stride
    before = (sparse.kernel_size - 1) // sparse.kernel_stride
    padded = F.pad(window_scores, (before, blocks * per_block - windows), value=NEVER)
    return padded.unfold(-1, before + per_block, per_block).amax(-1)


def forced_blocks(positions: Tensor, blocks: int, sparse: SparseConfig) -> Tensor:
    """The first blocks, the local ones and a row's own: bool ``[batch, rows, blocks]``."""
    own = (positions // sparse.block_size)[..., None]
    ids = torch.arange(blocks, device=positions.device)
    return ((ids < sparse.init_blocks) | (ids >= own - sparse.local_blocks)) & (ids <= own)


def choose_blocks(
    scores: Tensor, positions: Tensor, sparse: SparseConfig, dense_len: int | None = None
) -> Tensor:
    """The blocks that each row attends to: bool ``[batch, kv_heads, rows, blocks]``.

    A row with no more causal blocks than the budget, or below ``dense_len``, attends to them all.
    """
    dense_len = sparse.dense_len if dense_len is None else dense_len
    blocks = scores.shape[-1]
    ids = torch.arange(blocks, device=scores.device)
    own = positions // sparse.block_size
    causal = ids <= own[..., None]
    takes_all = (own + 1 <= sparse.budget) | (positions + 1 < dense_len)
    keys = scores.masked_fill(scores.isnan(), NEVER)
    keys = keys.masked_fill(forced_blocks(positions, blocks, sparse)[:, None], float("inf"))
    keys = keys.clamp_min(torch.finfo(torch.float32).min)
    keys = keys.masked_fill(~causal[:, None], NEVER)
    order = keys.sort(dim=-1, descending=True, stable=True).indices[..., : sparse.budget]
    chosen = torch.zeros_like(keys, dtype=torch.bool).scatter_(-1, order, True)
    return (chosen | takes_all[:, None, :, None]) & causal[:, None]


def select_blocks(
    q: Tensor,
    k: Tensor,
    sparse: SparseConfig,
    positions: Tensor,
    dense_len: int | None = None,
    rows_at_once: int = 1024,
) -> Tensor:
    """:func:`score_blocks` and :func:`choose_blocks` over the keys k, in parts to bound memory.

    q: ``[batch, rows, q_heads, head_dim]``; k: ``[batch, kv_len, kv_heads, head_dim]``.
    """
    blocks = -(-k.shape[1] // sparse.block_size)
    k1, k2 = compress_keys(k, sparse)
    parts = []
    for start in range(0, q.shape[1], rows_at_once):
        part = slice(start, start + rows_at_once)
        scores = score_blocks(q[:, part], k1, k2, sparse, positions[:, part], blocks)
        parts.append(choose_blocks(scores, positions[:, part], sparse, dense_len))
    return torch.cat(parts, 2)


def list_blocks(chosen: Tensor, budget: int) -> Tensor:
    """Chosen blocks as int32 ids, ascending, -1 padded: ``[batch, kv_heads, rows, budget]``."""
    blocks = chosen.shape[-1]
    ids = torch.arange(blocks, device=chosen.device, dtype=torch.int32)
    ids = torch.where(chosen, ids, blocks).sort(-1).values
    ids = F.pad(ids, (0, max(0, budget - blocks)), value=blocks)[..., :budget]
    return torch.where(ids < blocks, ids, -1).int()


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, chosen: Tensor | None, block_size: int = 64
) -> Tensor:
    """Softmax attention of rows over their causal keys, only those of chosen blocks if given.

    q: ``[batch, rows, q_heads, head_dim]`` at ``positions [batch, rows]``; k, v: ``[batch, kv_len,
    kv_heads, head_dim]``. Softmax is fp32; returns the shape and dtype of q.
    """
    batch, rows, _, head_dim = q.shape
    kv_len, kv_heads = k.shape[1], k.shape[2]
    keys = torch.arange(kv_len, device=q.device)
    visible = (keys <= positions[..., None])[:, None]  # [batch, 1, rows, kv_len]
    if chosen is not None:
        visible = visible & chosen.repeat_interleave(block_size, dim=-1)[..., :kv_len]
    logits = (_by_group(q, kv_heads) @ k.permute(0, 2, 3, 1)).float() * head_dim**-0.5
    logits = logits.unflatten(2, (-1, rows)).masked_fill(~visible.unsqueeze(2), NEVER)
    weights = logits.softmax(-1).to(v.dtype)
    out = (weights.flatten(2, 3) @ v.permute(0, 2, 1, 3)).unflatten(2, (-1, rows))
    return out.permute(0, 3, 1, 2, 4).reshape(q.shape)


def _by_group(q: Tensor, kv_heads: int) -> Tensor:
    """``[batch, kv_heads, group * rows, head_dim]``: what is multiplied with one kv head's keys."""
    q = q.unflatten(2, (kv_heads, -1))
    return q.permute(0, 2, 3, 1, 4).flatten(2, 3)


def selection_loss(q: Tensor, k: Tensor, sparse: SparseConfig, rows: Tensor) -> Tensor:
    """How far the block scores of some rows are from where dense attention goes.

    For each row and kv head: the cross entropy between the mass that dense attention gives to each
    block that is not forced, averaged over the group's heads, and the block scores as a
    distribution over those blocks. Rows whose attention is local weigh little.

    q, k: as in training, whole sequences. rows: int64 ``[batch, count]``.
    """
    batch, length, q_heads, head_dim = q.shape
    kv_heads = k.shape[2]
    blocks = -(-length // sparse.block_size)
    picked = q.gather(1, rows[..., None, None].expand(-1, -1, q_heads, head_dim))
    with torch.no_grad():
        logits = (_by_group(picked, kv_heads) @ k.permute(0, 2, 3, 1)).float() * head_dim**-0.5
        logits = logits.view(batch, kv_heads, -1, rows.shape[1], length)
        later = torch.arange(length, device=q.device) > rows[..., None]
        mass = logits.masked_fill_(later[:, None, None], NEVER).softmax(-1).mean(2)
        mass = F.pad(mass, (0, blocks * sparse.block_size - length))
        mass = mass.unflatten(-1, (blocks, sparse.block_size)).sum(-1)
        own = (rows // sparse.block_size)[..., None]
        ids = torch.arange(blocks, device=q.device)
        # A block behind the last complete window has no score yet; it is forced anyway.
        free = (ids <= own) & ~forced_blocks(rows, blocks, sparse)
        mass = mass * free[:, None]
    k1, k2 = compress_keys(k, sparse)
    scores = score_blocks(picked, k1, k2, sparse, rows, blocks)
    lowest = torch.finfo(torch.float32).min
    log_share = scores.masked_fill(~free[:, None], lowest).log_softmax(-1)
    return -(mass * log_share.masked_fill(~free[:, None], 0.0)).sum(-1).mean()


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis."""

    def __init__(self, config: MiniCPMConfig) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.weight = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on NeoX halves in fp32; x ``[batch, length, heads, head_dim]``, the tables
    ``[batch, length, head_dim / 2]``."""
    if x.is_cuda:
        from train_small.kernels import Rotate

        return Rotate.apply(x, cos, sin)
    first, second = x.float().chunk(2, -1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.to(x.dtype)


@dataclass
class Cache:
    """Keys and values of a layer that precede the rows: ``[batch, kv_len, kv_heads, head_dim]``.

    ``lengths [batch]`` are the tokens stored of each sequence; a pass writes its rows there.
    """

    k: Tensor
    v: Tensor
    lengths: Tensor


@dataclass
class Pass:
    """What a forward pass needs to know, and what it reports.

    Attributes:
        positions: int64 ``[batch, rows]``: angles of the rotary embedding.
        attention: of the rows from ``dense_len`` on.
        probe: rows ``[batch, count]`` for :func:`selection_loss`, whose mean over the layers is
            left in ``selection_loss``; only without caches.
        caches: one a layer, or none: then a pass holds whole sequences.
        kept: keys and values of each layer are appended, if a list is given.
        reads: [blocks attended, blocks present], summed over layers, heads and rows, if counted.
    """

    positions: Tensor
    attention: AttentionKind = "dense"
    probe: Tensor | None = None
    caches: list[Cache] | None = None
    selection_loss: Tensor | float = 0.0
    kept: list[tuple[Tensor, Tensor]] | None = None
    reads: Tensor | None = None


class Attention(nn.Module):
    """Grouped-query attention, dense or InfLLM-V2."""

    def __init__(self, config: MiniCPMConfig, index: int) -> None:
        super().__init__()
        self.config, self.index = config, index
        hidden, head_dim = config.hidden_size, config.head_dim
        q_size, kv_size = config.num_q_heads * head_dim, config.num_kv_heads * head_dim
        self.q_proj = nn.Linear(hidden, q_size, bias=False)
        self.k_proj = nn.Linear(hidden, kv_size, bias=False)
        self.v_proj = nn.Linear(hidden, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, hidden, bias=False)

    def forward(self, x: Tensor, step: Pass, cos: Tensor, sin: Tensor) -> Tensor:
        batch, rows, _ = x.shape
        head_dim = self.config.head_dim
        q = rotate(self.q_proj(x).view(batch, rows, -1, head_dim), cos, sin)
        k = rotate(self.k_proj(x).view(batch, rows, -1, head_dim), cos, sin)
        v = self.v_proj(x).view(batch, rows, -1, head_dim)
        if step.caches is None:
            out = self.attend_whole(q, k, v, step)
        else:
            out = self.attend_cached(q, k, v, step, step.caches[self.index])
        return self.o_proj(out.reshape(batch, rows, -1))

    def attend_whole(self, q: Tensor, k: Tensor, v: Tensor, step: Pass) -> Tensor:
        """Rows are whole sequences, so a row's place is its index, whatever its angle."""
        sparse = self.config.sparse
        assert sparse is not None
        if step.kept is not None:
            step.kept.append((k, v))
        if step.probe is not None:
            loss = selection_loss(q, k, sparse, step.probe)
            step.selection_loss = step.selection_loss + loss / self.config.num_layers
        if step.attention == "dense":
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return out.transpose(1, 2)
        places = torch.arange(q.shape[1], device=q.device).expand(q.shape[0], -1)
        with torch.no_grad():
            chosen = select_blocks(q, k, sparse, places)
            self.count(step, chosen, places)
        if q.is_cuda:
            from train_small.kernels import BlockSparseAttention

            return BlockSparseAttention.apply(q, k, v, chosen)
        return masked_attention(q, k, v, places, chosen)

    def attend_cached(self, q: Tensor, k: Tensor, v: Tensor, step: Pass, cache: Cache) -> Tensor:
        places = cache.lengths[:, None] + torch.arange(q.shape[1], device=q.device)
        at = places[..., None, None].expand_as(k)
        cache.k.scatter_(1, at, k.to(cache.k.dtype))
        cache.v.scatter_(1, at, v.to(cache.v.dtype))
        chosen = None
        if step.attention == "sparse":
            assert self.config.sparse is not None
            chosen = select_blocks(q, cache.k, self.config.sparse, places)
            self.count(step, chosen, places)
        return masked_attention(q, cache.k, cache.v, places, chosen)

    def count(self, step: Pass, chosen: Tensor, places: Tensor) -> None:
        """Adds the blocks of these rows to the tally, if one is kept."""
        if step.reads is not None:
            present = (places // 64 + 1).sum() * chosen.shape[1]
            step.reads += torch.stack([chosen.sum(), present])


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: MiniCPMConfig) -> None:
        super().__init__()
        hidden, inter = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(hidden, inter, bias=False)
        self.up_proj = nn.Linear(hidden, inter, bias=False)
        self.down_proj = nn.Linear(inter, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Attention and MLP, each added to the residual after scaling."""

    def __init__(self, config: MiniCPMConfig, index: int) -> None:
        super().__init__()
        self.residual_scale = config.residual_scale
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, step: Pass, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), step, cos, sin) * self.residual_scale
        return x + self.mlp(self.post_attention_layernorm(x)) * self.residual_scale


class Model(nn.Module):
    """Embedding, decoder layers, last norm."""

    def __init__(self, config: MiniCPMConfig) -> None:
        super().__init__()
        self.scale_emb = config.scale_emb
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config)


class SmallMiniCPM(nn.Module):
    """The language model: ids ``[batch, rows]`` to the last hidden state, scaled for the head."""

    def __init__(self, config: MiniCPMConfig, max_positions: int = 32768) -> None:
        super().__init__()
        self.config = config
        self.model = Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        cos, sin = rope_table(config, max_positions)
        half = config.head_dim // 2
        self.register_buffer("cos", torch.from_numpy(cos[:, :half]).clone(), persistent=False)
        self.register_buffer("sin", torch.from_numpy(sin[:, :half]).clone(), persistent=False)

    def hidden(self, ids: Tensor, step: Pass) -> Tensor:
        """``[batch, rows, hidden_size]``; logits are ``lm_head`` of it."""
        cos, sin = self.cos[step.positions], self.sin[step.positions]
        x = self.model.embed_tokens(ids) * self.model.scale_emb
        for layer in self.model.layers:
            x = layer(x, step, cos, sin)
        if step.caches is not None:
            for cache in step.caches:
                cache.lengths += ids.shape[1]
        return self.model.norm(x) * self.config.logits_scale

    def use_sparse(self, sparse: SparseConfig) -> None:
        """Attends with other parameters of InfLLM-V2 from now on."""
        self.config = replace(self.config, sparse=sparse)
        for layer in self.model.layers:
            layer.self_attn.config = self.config

    def forward(self, ids: Tensor, attention: AttentionKind = "dense") -> Tensor:
        """fp32 logits of whole sequences ``[batch, length]``."""
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        return self.lm_head(self.hidden(ids, Pass(positions, attention))).float()

    def new_caches(self, batch: int, max_len: int, dtype: torch.dtype) -> list[Cache]:
        """Empty caches on the weights' device."""
        weight = self.lm_head.weight
        shape = (batch, max_len, self.config.num_kv_heads, self.config.head_dim)
        return [
            Cache(
                torch.zeros(shape, dtype=dtype, device=weight.device),
                torch.zeros(shape, dtype=dtype, device=weight.device),
                torch.zeros(batch, dtype=torch.int64, device=weight.device),
            )
            for _ in range(self.config.num_layers)
        ]


def initialise(model: SmallMiniCPM, seed: int) -> None:
    """Random weights: unit-variance embeddings, fan-in scaling, silent residual branches."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            continue
        std = weight.shape[1] ** -0.5
        if name.endswith("embed_tokens.weight"):
            std = 1.0 / model.config.scale_emb
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            std = 0.0
        elif name.endswith("lm_head.weight"):
            std *= 0.5
        with torch.no_grad():
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)


@torch.no_grad()
def cap_heads(model: SmallMiniCPM, most: float) -> None:
    """Scales down query and key heads whose weights have grown to ``most`` times their first size.

    The model has no norms on queries and keys: without a bound, attention hardens on a wrong match
    before it has found the right one.
    """
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            # Fan-in scaling makes the expected first size of a head sqrt(head_dim).
            head_dim = layer.self_attn.config.head_dim
            heads = projection.weight.view(-1, head_dim * projection.in_features)
            size = heads.norm(dim=1, keepdim=True)
            heads.mul_((most * head_dim**0.5 / size).clamp(max=1.0))
