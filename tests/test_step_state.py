"""Between FastDeploy and the ops: the rows a step counts, the compressed keys it finds."""

from __future__ import annotations

import paddle

from fd_minicpm41.cache import compressed_keys_of, compressed_keys_share
from fd_minicpm41.metadata import InfLLMV2AttentionMetadata
from fd_minicpm41.ops import Batch


def int32(values: list[int]) -> paddle.Tensor:
    return paddle.to_tensor(values, dtype="int32")


def test_rows_are_counted_by_their_own_position():
    # A chunk of 4 rows at 98..101, an idle slot, a decode row at 500, and padding.
    batch = Batch(
        batch_id_per_token=int32([0, 0, 0, 0, 2, -1]),
        cu_seqlens_q=int32([0, 4, 4, 5]),
        query_lens=int32([4, 0, 1]),
        history_lens=int32([98, 7, 500]),
        block_tables=paddle.zeros([3, 8], "int32"),
    )
    step = InfLLMV2AttentionMetadata(batch, compress_from=batch.history_lens)
    assert step.count_rows(dense_len=101) == (3, 2)
    assert step.count_rows(dense_len=-1) == (5, 0)
    assert step.count_rows(dense_len=8192) == (0, 5)


def test_compressed_keys_belong_to_one_key_cache_and_are_made_once():
    k_cache, other = paddle.zeros([5, 2, 64, 16], "float16"), paddle.zeros([5, 2, 64, 16])
    k1, k2 = compressed_keys_of(k_cache)
    assert (k1.shape, k2.shape, k1.dtype) == ([5, 2, 4, 16], [5, 2, 1, 16], paddle.float16)
    assert compressed_keys_of(k_cache).k1 is k1
    assert compressed_keys_of(other).k1 is not k1


def test_the_share_of_the_compressed_keys_is_their_bytes_over_those_of_a_page():
    k_cache = paddle.zeros([3, 2, 64, 128])
    extra = sum(keys.size for keys in compressed_keys_of(k_cache))
    assert compressed_keys_share(page_size=64) == extra / (2 * k_cache.size) == 5 / 128
