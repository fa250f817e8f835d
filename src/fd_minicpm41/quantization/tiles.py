"""Plain codes and scales to the tiles that the kernels read, and back.

Array operations alone, the same for NumPy arrays and Paddle tensors of any place: a host tiles its
weights once, where they lie, after loading. ``csrc/params.h`` (``LowBitWeight``) has the layout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import paddle

    Array = TypeVar("Array", NDArray[Any], paddle.Tensor)
else:
    Array = TypeVar("Array")

TILE_ROWS, TILE_COLUMNS = 16, 128

# A row splits into (2 halves, 8 rows), 128 columns into (2 pairs of blocks, 2 blocks, 4 pairs,
# 4 lanes, 2 elements). For each width the order of these axes in a tile, axes 0 and 3 being the
# tile's own row and column.
_SPLIT = (2, 8), (2, 2, 4, 4, 2)
_HALF, _ROW, _BLOCKS, _BLOCK, _PAIR, _LANE, _ELEMENT = 1, 2, 4, 5, 6, 7, 8
_ORDER = {
    # bits 16 e + 2 (4 (b % 2) + p) of word 2 (b / 2) + h
    2: (0, 3, _ROW, _LANE, _BLOCKS, _HALF, _ELEMENT, _BLOCK, _PAIR),
    # bits 16 e + 4 p of word 2 (b % 2) + h, chunk b / 2
    4: (0, 3, _BLOCKS, _ROW, _LANE, _BLOCK, _HALF, _ELEMENT, _PAIR),
    # bytes (h, p, e) of chunk b
    8: (0, 3, _BLOCKS, _BLOCK, _ROW, _LANE, _HALF, _PAIR, _ELEMENT),
}


def tile_weight(qweight: Array, bits: int) -> Array:
    """Plain codes, uint8 ``[N, K * bits / 8]``, as ``[ceil(N / 16), ceil(K / 128), 256 * bits]``.

    Rows and columns that fill the last tiles hold code 0.
    """
    codes = _unpack(qweight, bits)
    codes = _pad(_pad(codes, 0, TILE_ROWS), 1, TILE_COLUMNS)
    row_tiles, k_tiles = codes.shape[0] // TILE_ROWS, codes.shape[1] // TILE_COLUMNS
    split = codes.reshape([row_tiles, *_SPLIT[0], k_tiles, *_SPLIT[1]])
    ordered = _transpose(split, _ORDER[bits])
    return _pack(ordered.reshape([row_tiles, k_tiles, TILE_ROWS * TILE_COLUMNS]), bits)


def untile_weight(tiles: Array, bits: int, rows: int, columns: int) -> Array:
    """The inverse: plain codes, uint8 ``[rows, columns * bits / 8]``."""
    codes = _unpack(tiles, bits)
    row_tiles, k_tiles = codes.shape[:2]
    sizes = (row_tiles, *_SPLIT[0], k_tiles, *_SPLIT[1])
    split = codes.reshape([sizes[axis] for axis in _ORDER[bits]])
    plain = _transpose(split, tuple(int(axis) for axis in np.argsort(_ORDER[bits])))
    plain = plain.reshape([row_tiles * TILE_ROWS, k_tiles * TILE_COLUMNS])
    return _pack(plain[:rows, :columns], bits)


def tile_scales(scales: Array) -> Array:
    """Scales ``[N, groups]`` as ``[ceil(N / 16), groups, 16]``, rows in the order 0, 8, 1, ..."""
    padded = _pad(scales, 0, TILE_ROWS)
    row_tiles, groups = padded.shape[0] // TILE_ROWS, padded.shape[1]
    split = _transpose(padded.reshape([row_tiles, 2, 8, groups]), (0, 3, 2, 1))
    return split.reshape([row_tiles, groups, TILE_ROWS])


def untile_scales(tiles: Array, rows: int) -> Array:
    """The inverse: ``[rows, groups]``."""
    row_tiles, groups = tiles.shape[:2]
    split = _transpose(tiles.reshape([row_tiles, groups, 8, 2]), (0, 3, 2, 1))
    return split.reshape([row_tiles * TILE_ROWS, groups])[:rows]


def _unpack(packed: Array, bits: int) -> Array:
    """One code a byte along the last axis, low bits first."""
    if bits == 8:
        return packed
    parts = [(packed << (8 - bits - at)) >> (8 - bits) for at in range(0, 8, bits)]
    codes = _stack(parts)
    return codes.reshape([*packed.shape[:-1], packed.shape[-1] * (8 // bits)])


def _pack(codes: Array, bits: int) -> Array:
    if bits == 8:
        return _contiguous(codes)
    per_byte = 8 // bits
    split = codes.reshape([*codes.shape[:-1], codes.shape[-1] // per_byte, per_byte])
    packed = split[..., 0]
    for i in range(1, per_byte):
        packed = packed | (split[..., i] << (bits * i))
    return _contiguous(packed)


def _pad(array: Array, axis: int, multiple: int) -> Array:
    missing = -array.shape[axis] % multiple
    if missing == 0:
        return array
    shape = list(array.shape)
    shape[axis] = missing
    if isinstance(array, np.ndarray):
        return np.concatenate([array, np.zeros(shape, array.dtype)], axis)
    import paddle

    return paddle.concat([array, paddle.zeros(shape, array.dtype).to(array.place)], axis)


def _stack(arrays: list[Array]) -> Array:
    if isinstance(arrays[0], np.ndarray):
        return np.stack(arrays, -1)
    import paddle

    return paddle.stack(arrays, -1)


def _transpose(array: Array, order: tuple[int, ...]) -> Array:
    return array.transpose(list(order))


def _contiguous(array: Array) -> Array:
    return np.ascontiguousarray(array) if isinstance(array, np.ndarray) else array.contiguous()
