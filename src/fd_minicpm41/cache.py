"""The compressed keys, kept beside FastDeploy's own KV cache.

Each window is stored in the page that holds its last token. A page's slots are then a function of
the tokens up to its end, which is what a prefix cache shares pages by: sharing, reuse and eviction
of pages are right by construction, and slot validity follows from a request's length alone.
"""

from __future__ import annotations

from typing import NamedTuple

import paddle

# Slots of a page: windows that end inside its 64 tokens.
FINE_SLOTS = 4
COARSE_SLOTS = 1

_ATTRIBUTE = "_fd_minicpm41_compressed_keys"


class CompressedKeys(NamedTuple):
    """The compressed keys of one layer, in the dtype of its key cache.

    Attributes:
        k1: ``[num_pages, num_kv_heads, 4, head_dim]``, means of 32 keys every 16.
        k2: ``[num_pages, num_kv_heads, 1, head_dim]``, means of 128 keys every 64.
    """

    k1: paddle.Tensor
    k2: paddle.Tensor


def compressed_keys_of(k_cache: paddle.Tensor) -> CompressedKeys:
    """The compressed keys that belong to a layer's key cache, allocated when it is first seen.

    They hang on the key cache itself, so they live exactly as long: FastDeploy makes its caches
    twice (profile run, then the real size) and again when it wakes from sleep.

    Args:
        k_cache: ``[num_pages, num_kv_heads, 64, head_dim]``.
    """
    found: CompressedKeys | None = getattr(k_cache, _ATTRIBUTE, None)
    if found is None:
        num_pages, num_kv_heads, _, head_dim = k_cache.shape
        found = CompressedKeys(
            k1=paddle.zeros([num_pages, num_kv_heads, FINE_SLOTS, head_dim], k_cache.dtype),
            k2=paddle.zeros([num_pages, num_kv_heads, COARSE_SLOTS, head_dim], k_cache.dtype),
        )
        setattr(k_cache, _ATTRIBUTE, found)
    return found


def compressed_keys_share(page_size: int) -> float:
    """Bytes of compressed keys for each byte of K and V: 5 rows against 2 x 64, so 3.9 %."""
    return (FINE_SLOTS + COARSE_SLOTS) / (2 * page_size)
