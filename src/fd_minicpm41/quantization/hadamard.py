"""The block-Hadamard transform on Paddle tensors, on whichever device they are.

It spreads an outlier over its block, so that few levels serve all of it.
``formats.hadamard_blocks`` is the same in NumPy.
"""

from __future__ import annotations

import numpy as np
import paddle

from fd_minicpm41.quantization.formats import hadamard_blocks


def transform(x: paddle.Tensor, block: int) -> paddle.Tensor:
    """``x H`` over blocks of the last axis, fp32; ``block`` 0 returns ``x``. Undoes itself."""
    if block == 0:
        return x
    matrix = paddle.to_tensor(hadamard_blocks(np.eye(block, dtype=np.float32), block))
    return paddle.matmul(x.reshape([-1, block]), matrix).reshape(x.shape)
