"""The NumPy oracle of the GPU tests against the reference."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import paddle
import pytest

from fd_minicpm41.config import SparseConfig
from fd_minicpm41.reference import attention as reference

sys.path.append(str(Path(__file__).parent / "gpu"))
import oracle  # noqa: E402

CONFIG = SparseConfig(init_blocks=1, window_size=64, topk=5, dense_len=-1)


@pytest.mark.parametrize("kv_len", [1, 16, 31, 32, 63, 64, 127, 128, 129, 191, 192, 640, 1025])
def test_oracle_equals_the_reference(kv_len: int) -> None:
    rng = np.random.default_rng(kv_len)
    q = rng.standard_normal((1, 32, 128)).astype(np.float32)
    k, v = rng.standard_normal((2, kv_len, 2, 128)).astype(np.float32)
    position = kv_len - 1
    tensors = [paddle.to_tensor(x) for x in (q, k, v)]
    k1, k2 = reference.compress_keys(tensors[1], CONFIG)
    scores = reference.score_blocks(tensors[0], k1, k2, CONFIG, position).numpy()
    lists = reference.select_blocks(tensors[0], k1, k2, CONFIG, position)
    out = reference.block_sparse_attention(*tensors, lists, position).numpy()
    forced = reference.forced_blocks(
        paddle.to_tensor([position]), position // 64 + 1, CONFIG
    ).numpy()

    np.testing.assert_allclose(oracle.window_means(k, 32, 16), k1.numpy(), atol=1e-6)
    np.testing.assert_allclose(oracle.window_means(k, 128, 64), k2.numpy(), atol=1e-6)
    got_forced = oracle.forced_blocks(position, CONFIG.init_blocks, CONFIG.local_blocks + 1)
    np.testing.assert_array_equal(got_forced, forced[0])
    for head in range(2):
        heads = q[0, 16 * head : 16 * head + 16]
        got = oracle.block_scores(heads, k1.numpy()[:, head], k2.numpy()[:, head], position)
        np.testing.assert_allclose(got, scores[head, 0], atol=1e-5)
        tokens = oracle.listed_tokens(lists.numpy()[head, 0], position)
        got, lse = oracle.attention(heads, k[tokens, head], v[tokens, head])
        np.testing.assert_allclose(got, out[0, 16 * head : 16 * head + 16], atol=1e-5)
        logits = heads.astype(np.float64) @ k[tokens, head].T * 128**-0.5
        np.testing.assert_allclose(lse, np.log(np.exp(logits).sum(1)), atol=1e-9)
