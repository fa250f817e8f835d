"""Triton kernels for training: rotary embedding, and attention where every row has its own blocks.

A tile of attention is ``ROWS`` neighbouring rows times the 16 heads of their group, which share one
selection. It walks over the union of its rows' blocks and masks what a row did not select, so the
result is exact. :func:`train_small.model.masked_attention` is the same in plain PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from train_small.model import ROWS

BLOCK = 64
GROUP = 16
HEAD_DIM = 128
LOG2_E = 1.4426950408889634


@triton.jit
def _rotate_kernel(x_ptr, cos_ptr, sin_ptr, out_ptr, sign, H: tl.constexpr, HALF: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, H)[:, None] * (2 * HALF)
    pairs = tl.arange(0, HALF)[None, :]
    at = token * (H * 2 * HALF) + heads + pairs
    first = tl.load(x_ptr + at).to(tl.float32)
    second = tl.load(x_ptr + at + HALF).to(tl.float32)
    cos = tl.load(cos_ptr + token * HALF + pairs)
    sin = tl.load(sin_ptr + token * HALF + pairs) * sign
    tl.store(out_ptr + at, (first * cos - second * sin).to(out_ptr.dtype.element_ty))
    tl.store(out_ptr + at + HALF, (second * cos + first * sin).to(out_ptr.dtype.element_ty))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float) -> torch.Tensor:
    out = torch.empty_like(x)
    tokens = x.shape[0] * x.shape[1]
    _rotate_kernel[(tokens,)](x, cos, sin, out, sign, x.shape[2], x.shape[3] // 2)
    return out


class Rotate(torch.autograd.Function):
    """RoPE on NeoX halves: x ``[batch, length, heads, head_dim]``, cos and sin fp32
    ``[batch, length, head_dim / 2]``; computed in fp32, returned in the dtype of ``x``."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x.contiguous(), cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0].contiguous(), cos, sin, -1.0), None, None


@triton.jit
def _tile(length, tile, sequence, group, BLOCK_ROWS: tl.constexpr, G: tl.constexpr):
    """Row of each line of a tile, and its offsets in q and in the per-head statistics."""
    line = tl.arange(0, BLOCK_ROWS * G)
    row = tile * BLOCK_ROWS + line // G
    head = group * G + line % G
    at = (sequence.to(tl.int64) * length + row) * (2 * G) + head
    return row, at


@triton.jit
def _walk(
    chosen_ptr,
    list_ptr,
    count_ptr,
    length,
    blocks,
    R: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
):
    """What a program over rows works on: :func:`_tile` of its tile, that tile's list of blocks and
    their number, what its rows chose, and where the keys of its group begin."""
    tile = tl.program_id(0)
    sequence = tl.program_id(1) // 2
    group = tl.program_id(1) % 2
    row, at = _tile(length, tile, sequence, group, R, G)
    tiles = length // R
    lists = list_ptr + (tl.program_id(1).to(tl.int64) * tiles + tile) * blocks
    count = tl.load(count_ptr + tl.program_id(1) * tiles + tile)
    chosen = chosen_ptr + (tl.program_id(1).to(tl.int64) * length + row) * blocks
    keys = sequence.to(tl.int64) * length * 2 * D + group * D
    return row, at, lists, count, chosen, keys


@triton.jit
def _score(
    q, k_ptr, v_ptr, chosen, keys, block, length, row, scale, D: tl.constexpr, B: tl.constexpr
):
    """Keys and values of a block, its scores in powers of two, and which of them count."""
    key = block * B + tl.arange(0, B)
    inside = key < length
    place = keys + key.to(tl.int64)[:, None] * (2 * D) + tl.arange(0, D)[None, :]
    k = tl.load(k_ptr + place, mask=inside[:, None], other=0.0)
    v = tl.load(v_ptr + place, mask=inside[:, None], other=0.0)
    allowed = (tl.load(chosen + block) != 0)[:, None] & (key[None, :] <= row[:, None])
    return k, v, tl.dot(q, tl.trans(k)) * scale, allowed


@triton.jit
def _forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    chosen_ptr,
    list_ptr,
    count_ptr,
    out_ptr,
    lse_ptr,
    length,
    blocks,
    scale,
    R: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    B: tl.constexpr,
):
    row, at, lists, count, chosen, keys = _walk(
        chosen_ptr, list_ptr, count_ptr, length, blocks, R, G, D
    )
    d = tl.arange(0, D)
    q = tl.load(q_ptr + at[:, None] * D + d[None, :])

    peak = tl.full([R * G], -1.0e30, tl.float32)
    total = tl.zeros([R * G], tl.float32)
    acc = tl.zeros([R * G, D], tl.float32)
    for i in range(count):
        block = tl.load(lists + i)
        k, v, s, allowed = _score(q, k_ptr, v_ptr, chosen, keys, block, length, row, scale, D, B)
        s = tl.where(allowed, s, -1.0e30)
        new = tl.maximum(peak, tl.max(s, 1))
        p = tl.where(allowed, tl.exp2(s - new[:, None]), 0.0)
        shrink = tl.exp2(peak - new)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v)
        peak = new
    tl.store(
        out_ptr + at[:, None] * D + d[None, :], (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    )
    tl.store(lse_ptr + at, peak + tl.log2(total))


@triton.jit
def _query_grad_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    chosen_ptr,
    list_ptr,
    count_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    length,
    blocks,
    scale,
    softmax_scale,
    R: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    B: tl.constexpr,
):
    row, at, lists, count, chosen, keys = _walk(
        chosen_ptr, list_ptr, count_ptr, length, blocks, R, G, D
    )
    d = tl.arange(0, D)
    q = tl.load(q_ptr + at[:, None] * D + d[None, :])
    grad = tl.load(grad_ptr + at[:, None] * D + d[None, :])
    lse = tl.load(lse_ptr + at)
    delta = tl.load(delta_ptr + at)
    dq = tl.zeros([R * G, D], tl.float32)
    for i in range(count):
        block = tl.load(lists + i)
        k, v, s, allowed = _score(q, k_ptr, v_ptr, chosen, keys, block, length, row, scale, D, B)
        p = tl.where(allowed, tl.exp2(s - lse[:, None]), 0.0)
        ds = p * (tl.dot(grad, tl.trans(v)) - delta[:, None]) * softmax_scale
        dq += tl.dot(ds.to(k.dtype), k)
    tl.store(dq_ptr + at[:, None] * D + d[None, :], dq.to(dq_ptr.dtype.element_ty))


@triton.jit
def _key_grad_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    chosen_ptr,
    list_ptr,
    count_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    length,
    blocks,
    scale,
    softmax_scale,
    R: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    B: tl.constexpr,
):
    block = tl.program_id(0)
    sequence = tl.program_id(1) // 2
    group = tl.program_id(1) % 2
    d = tl.arange(0, D)
    n = tl.arange(0, B)
    key = block * B + n
    inside = key < length
    place = sequence.to(tl.int64) * length * 2 * D + group * D
    place = place + key.to(tl.int64)[:, None] * (2 * D) + d[None, :]
    k = tl.load(k_ptr + place, mask=inside[:, None], other=0.0)
    v = tl.load(v_ptr + place, mask=inside[:, None], other=0.0)
    tiles = length // R
    lists = list_ptr + (tl.program_id(1).to(tl.int64) * blocks + block) * tiles
    count = tl.load(count_ptr + tl.program_id(1) * blocks + block)
    dk = tl.zeros([B, D], tl.float32)
    dv = tl.zeros([B, D], tl.float32)
    for i in range(count):
        tile = tl.load(lists + i)
        row, at = _tile(length, tile, sequence, group, R, G)
        q = tl.load(q_ptr + at[:, None] * D + d[None, :])
        grad = tl.load(grad_ptr + at[:, None] * D + d[None, :])
        lse = tl.load(lse_ptr + at)
        delta = tl.load(delta_ptr + at)
        chosen = chosen_ptr + (tl.program_id(1).to(tl.int64) * length + row) * blocks + block
        allowed = (tl.load(chosen) != 0)[None, :] & (key[:, None] <= row[None, :])
        s = tl.dot(k, tl.trans(q)) * scale
        p = tl.where(allowed, tl.exp2(s - lse[None, :]), 0.0)
        dv += tl.dot(p.to(grad.dtype), grad)
        ds = p * (tl.dot(v, tl.trans(grad)) - delta[None, :]) * softmax_scale
        dk += tl.dot(ds.to(q.dtype), q)
    tl.store(dk_ptr + place, dk.to(dk_ptr.dtype.element_ty), mask=inside[:, None])
    tl.store(dv_ptr + place, dv.to(dv_ptr.dtype.element_ty), mask=inside[:, None])


def _lists(occupied: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the last axis is true: the places, ascending and first, and how many they are."""
    order = occupied.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices
    return order.int().contiguous(), occupied.sum(-1, dtype=torch.int32).contiguous()


class BlockSparseAttention(torch.autograd.Function):
    """Softmax attention of each row over the causal tokens of the blocks that it chose.

    q: ``[batch, length, 32, 128]``; k, v: ``[batch, length, 2, 128]``; chosen: bool
    ``[batch, 2, length, blocks]``. Every row chooses its own block at least; the length is a
    multiple of ``ROWS``. Returns ``[batch, length, 32, 128]`` in the dtype of q.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chosen: torch.Tensor
    ) -> torch.Tensor:
        batch, length, _, head_dim = q.shape
        assert length % ROWS == 0 and head_dim == HEAD_DIM and q.shape[2] == 2 * GROUP
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        blocks = chosen.shape[-1]
        tiles = length // ROWS
        chosen = chosen.to(torch.uint8).contiguous()
        union = chosen.view(batch, 2, tiles, ROWS, blocks).amax(3)
        lists, counts = _lists(union)
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:3], device=q.device, dtype=torch.float32)
        scale = head_dim**-0.5
        _forward_kernel[(tiles, 2 * batch)](
            q,
            k,
            v,
            chosen,
            lists,
            counts,
            out,
            lse,
            length,
            blocks,
            scale * LOG2_E,
            ROWS,
            GROUP,
            head_dim,
            BLOCK,
            num_warps=8,
            num_stages=2,
        )
        ctx.save_for_backward(q, k, v, chosen, union, lists, counts, out, lse)
        return out

    @staticmethod
    def backward(
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        q, k, v, chosen, union, lists, counts, out, lse = ctx.saved_tensors
        grad = grads[0].contiguous()
        batch, length, _, head_dim = q.shape
        blocks = chosen.shape[-1]
        delta = (out.float() * grad.float()).sum(-1)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        scale = head_dim**-0.5
        sizes = (length, blocks, scale * LOG2_E, scale, ROWS, GROUP, head_dim, BLOCK)
        _query_grad_kernel[(length // ROWS, 2 * batch)](
            q,
            k,
            v,
            chosen,
            lists,
            counts,
            grad,
            lse,
            delta,
            dq,
            *sizes,
            num_warps=8,
            num_stages=2,
        )
        lists, counts = _lists(union.transpose(2, 3))
        _key_grad_kernel[(blocks, 2 * batch)](
            q,
            k,
            v,
            chosen,
            lists,
            counts,
            grad,
            lse,
            delta,
            dk,
            dv,
            *sizes,
            num_warps=8,
            num_stages=2,
        )
        return dq, dk, dv, None
