"""Typed functions over the custom ops, and the only file that knows their names.

Importing this module loads nothing; the first call loads the kernels and the Paddle binding
(:mod:`fd_minicpm41.binding`). CPU tensors run on the CPU side, GPU tensors on the CUDA side, on
Paddle's stream. All ops walk FastDeploy's paged caches, where a page holds exactly one block.

``qkv`` is ``[num_tokens, (num_q_heads + 2 * num_kv_heads) * head_dim]`` and shares its dtype
(float32, float16 or bfloat16) with the caches. Tensors that an op writes to must be contiguous.
Every op is safe to capture in a CUDA graph: no host synchronisation, and neither shapes nor grids
depend on lengths.

Bad input raises ValueError, one line with the name, what is wanted and what came. Lengths and block
ids are looked at on the CPU; a CUDA launch checks what the host can know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fd_minicpm41 import binding

if TYPE_CHECKING:
    import paddle

    from fd_minicpm41.config import SparseConfig
    from fd_minicpm41.quantization.formats import LowBitFormat

# The most tokens that the low-bit kernels of a GPU take, and the most that a panel of expanded
# weight takes up: one for every matrix of a layer of the published model, three for its head.
MAX_DECODE_TOKENS = 64
PANEL_BYTES = 256 * 2**20


class Batch(NamedTuple):
    """The requests of one step: what every op takes. All int32, on the device of the caches.

    Attributes:
        batch_id_per_token: ``[num_tokens]``, owner of each row, -1 for a padding row.
        cu_seqlens_q: ``[batch_size + 1]``.
        query_lens: ``[batch_size]``, new tokens of each request; 0 is an idle slot.
        history_lens: ``[batch_size]``, tokens in the cache before the step.
        block_tables: ``[batch_size, max_blocks]``, logical block to page; entries beyond a
            request's length are not read.
        max_query_len: no entry of ``query_lens`` is larger, as far as the host knows without
            asking the device; None where it knows nothing. With less than 16 the CUDA side launches
            its decode kernels alone.
    """

    batch_id_per_token: paddle.Tensor
    cu_seqlens_q: paddle.Tensor
    query_lens: paddle.Tensor
    history_lens: paddle.Tensor
    block_tables: paddle.Tensor
    max_query_len: int | None = None

    def tensors(self) -> tuple[paddle.Tensor, ...]:
        """The five tensors, in the order in which every op takes them."""
        return self[:5]

    def longest_query(self) -> int:
        """``max_query_len``, or the number of tokens where that is not known."""
        if self.max_query_len is None:
            return int(self.batch_id_per_token.shape[0])
        return self.max_query_len

    def window(self, rows: slice) -> Batch:
        """The same step with only these of its rows, for :func:`select_blocks` and
        :func:`sparse_attention`: their scratch then grows with a window, not with the step.

        Its ``cu_seqlens_q`` counts from the window's first row and so starts below 0.
        """
        return self._replace(
            batch_id_per_token=self.batch_id_per_token[rows],
            cu_seqlens_q=self.cu_seqlens_q - rows.start,
            max_query_len=self.longest_query(),
        )


def rope_and_write_kv(
    qkv: paddle.Tensor,
    rotary_embs: paddle.Tensor,
    k_cache: paddle.Tensor,
    v_cache: paddle.Tensor,
    batch: Batch,
) -> None:
    """Rotates q inside ``qkv`` and writes rotated k and plain v to their pages.

    Equivalent to ``reference.model.rotate`` on q and k, then a scatter.

    Args:
        qkv: its q part is changed in place.
        rotary_embs: fp32 ``[2, 1, max_position, 1, head_dim]``, cos and sin, NeoX halves.
        k_cache, v_cache: ``[num_pages, num_kv_heads, 64, head_dim]``, written.
    """
    _run(
        "rope_and_write_kv",
        {"qkv": qkv, "k_cache": k_cache, "v_cache": v_cache},
        [qkv, rotary_embs, k_cache, v_cache, *batch.tensors()],
        [batch.longest_query()],
    )


def compress_keys(
    k_cache: paddle.Tensor,
    k1_cache: paddle.Tensor,
    k2_cache: paddle.Tensor,
    compress_from: paddle.Tensor | None,
    batch: Batch,
) -> None:
    """Writes the mean of every window that ends inside ``[compress_from, kv_len)`` of its request.

    Equivalent to ``reference.attention.compress_keys``, each window kept in the page that holds its
    last token.

    Args:
        k_cache: ``[num_pages, num_kv_heads, 64, head_dim]``.
        k1_cache: ``[num_pages, num_kv_heads, 4, head_dim]``, fine windows, written.
        k2_cache: ``[num_pages, num_kv_heads, 1, head_dim]``, coarse windows, written.
        compress_from: int32 ``[batch_size]``; None means ``history_lens``, 0 rebuilds a prefix.
            On a GPU the prefix is read while the launch before this one may still run: that one
            writes new keys at most.
    """
    start = batch.history_lens if compress_from is None else compress_from
    _run(
        "compress_keys",
        {"k1_cache": k1_cache, "k2_cache": k2_cache},
        [k_cache, k1_cache, k2_cache, start, *batch.tensors()],
        [batch.longest_query()],
    )


def select_blocks(
    qkv: paddle.Tensor,
    k1_cache: paddle.Tensor,
    k2_cache: paddle.Tensor,
    batch: Batch,
    sparse_config: SparseConfig,
    *,
    overlap: bool = False,
) -> paddle.Tensor:
    """Lists, for each row and kv head, the blocks it attends to.

    Equivalent to ``reference.attention.select_blocks``. Changes nothing.

    Args:
        qkv: q rotated.
        k1_cache, k2_cache: as :func:`compress_keys` leaves them.
        overlap: promises that the launch before this one on the stream is :func:`compress_keys` of
            the same step, so that this one may start before it ends.

    Returns:
        int32 ``[num_kv_heads, num_tokens, budget]``, logical block ids, ascending, -1 padded. Rows
        of padding are not written.
    """
    c = sparse_config
    (topk_idx,) = _run(
        "select_blocks",
        {},
        [qkv, k1_cache, k2_cache, *batch.tensors()],
        # The op counts a row's own block among the local ones.
        [batch.longest_query(), _softmax_scale(k1_cache)]
        + [c.init_blocks, c.local_blocks + 1, c.budget, c.dense_len, overlap],
    )
    return topk_idx


def sparse_attention(
    qkv: paddle.Tensor,
    k_cache: paddle.Tensor,
    v_cache: paddle.Tensor,
    topk_idx: paddle.Tensor,
    batch: Batch,
    sparse_config: SparseConfig,
    *,
    overlap: bool = False,
) -> paddle.Tensor:
    """Attends to the listed blocks, causally; a row below ``dense_len`` to all of its blocks.

    Equivalent to ``reference.attention.infllmv2_attention``, ``topk_idx`` given. Changes nothing.

    Args:
        qkv: q rotated.
        k_cache, v_cache: ``[num_pages, num_kv_heads, 64, head_dim]``.
        topk_idx: int32 ``[num_kv_heads, num_tokens, budget]``; not read for a dense row.
        overlap: promises that the launch before this one on the stream is :func:`select_blocks` of
            the same step.

    Returns:
        ``[num_tokens, num_q_heads * head_dim]``; padding rows are 0.
    """
    (out,) = _run(
        "sparse_attention",
        {},
        [qkv, k_cache, v_cache, topk_idx, *batch.tensors()],
        [batch.longest_query(), _softmax_scale(k_cache), sparse_config.dense_len, overlap],
    )
    return out


def low_bit_linear(
    x: paddle.Tensor,
    qweight: paddle.Tensor,
    scales: paddle.Tensor,
    fmt: LowBitFormat,
    out_features: int,
) -> paddle.Tensor:
    """``x W^T`` with W low-bit, for any number of tokens.

    Equivalent to ``x @ quantization.formats.dequantize(...).T`` with sums in fp32. On a GPU up to
    64 tokens take one launch that reads the codes; more take :func:`expand_low_bit_weight` and the
    framework's product, by panels of at most ``PANEL_BYTES``.

    Args:
        x: ``[num_tokens, in_features]``, float16 or bfloat16, on the CPU also float32.
        qweight, scales: as ``quantization.tiles`` makes them. On a GPU they may be read before the
            launch before this one has ended, which must not be the one that writes them.

    Returns:
        ``[num_tokens, out_features]`` in the dtype of ``x``.
    """
    if x.place.is_cpu_place() or x.shape[0] <= MAX_DECODE_TOKENS:
        (out,) = _run(
            "low_bit_linear", {}, [x, qweight, scales], [out_features, *_format_attributes(fmt)]
        )
        return out
    return multiply_by_panels(x, qweight, scales, fmt, out_features)


def multiply_by_panels(
    x: paddle.Tensor,
    qweight: paddle.Tensor,
    scales: paddle.Tensor,
    fmt: LowBitFormat,
    out_features: int,
) -> paddle.Tensor:
    """:func:`low_bit_linear` for many tokens: the weight is expanded, then multiplied by the
    framework."""
    import paddle

    in_features = int(x.shape[1])
    panel = max(16, PANEL_BYTES // (in_features * x.element_size()) // 16 * 16)
    parts = []
    for first in range(0, out_features, panel):
        rows = expand_low_bit_weight(
            *(qweight, scales, fmt, out_features, in_features, str(x.dtype).split(".")[-1]),
            first_row=first,
            num_rows=min(panel, out_features - first),
        )
        parts.append(paddle.matmul(x, rows, transpose_y=True))
    return parts[0] if len(parts) == 1 else paddle.concat(parts, axis=1)


def expand_low_bit_weight(
    qweight: paddle.Tensor,
    scales: paddle.Tensor,
    fmt: LowBitFormat,
    out_features: int,
    in_features: int,
    dtype: str,
    channel_scales: paddle.Tensor | None = None,
    *,
    first_row: int = 0,
    num_rows: int | None = None,
) -> paddle.Tensor:
    """Rows of a low-bit weight as a tensor that the framework multiplies by.

    Args:
        qweight, scales: as ``quantization.tiles`` makes them.
        dtype: ``float32``, ``float16`` or ``bfloat16``: rows of W itself, a Hadamard transform
            undone; ``int8`` or ``float8_e4m3fn``: rows of ``W / channel_scales``, exact for the
            formats w4a8 and w4afp8 respectively, not served with a Hadamard transform.
        channel_scales: fp32 ``[out_features]``, for the last two.
        first_row: a multiple of 16.
        num_rows: None for all that follow.

    Returns:
        ``[num_rows, in_features]`` in ``dtype``.
    """
    count = out_features - first_row if num_rows is None else num_rows
    (rows,) = _run(
        "expand_low_bit_weight",
        {},
        [qweight, scales, channel_scales],
        [out_features, in_features, *_format_attributes(fmt), first_row, count, dtype],
    )
    return rows


def _format_attributes(fmt: LowBitFormat) -> tuple[int, int, int, int]:
    return fmt.bits, fmt.group, fmt.zero, fmt.hadamard


def _softmax_scale(cache: paddle.Tensor) -> float:
    return float(cache.shape[-1] ** -0.5)


def _run(
    op: str,
    written: dict[str, paddle.Tensor],
    tensors: Sequence[paddle.Tensor | None],
    attributes: Sequence[float | int | bool | str] = (),
) -> Any:
    binding.load()
    import paddle

    for name, tensor in written.items():
        # Paddle would hand the op a contiguous copy, and what it writes would be lost.
        if not tensor.is_contiguous():
            raise ValueError(
                f"minicpm41_{op}: {name}: wanted contiguous, got strides {tensor.strides}"
            )
    try:
        run = paddle._C_ops._run_custom_op
        return run(f"minicpm41_{op}", *tensors, *attributes)
    except OSError as error:
        # How Paddle passes on an exception of an op, with a source line after it.
        raise ValueError(str(error).strip().splitlines()[0]) from None
