"""How a low-bit weight is stored: codes, scales, and the values that they stand for.

NumPy alone, so that every side (quantiser, host, kernels' tests) shares one definition. A linear
layer's weight is ``W [N, K]``, out features by in features; groups and Hadamard blocks run along K.
Plain layout of the codes: uint8 ``[N, K * bits / 8]``, code i of a row in byte ``i * bits // 8``,
low bits first. The value of a code is ``(code - zero / 2) * scale``:

======  =======  ========================  =================
bits    zero     values                    name
======  =======  ========================  =================
2       3        -1.5, -0.5, 0.5, 1.5      levels without 0
2       2        -1, 0, 1 (code 3 unused)  ternary
4       16       -8 ... 7
8       256      -127 ... 127 (0 unused)
======  =======  ========================  =================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fd_minicpm41.errors import UsageError

GROUPS = (64, 128)
HADAMARD_BLOCKS = (0, 64, 128)
ZEROS = {2: (3, 2), 4: (16,), 8: (256,)}
TERNARY_ZERO = 2

# e4m3: 448 is the largest value; blocks of FastDeploy's block-wise fp8.
FP8_MAX = 448.0
FP8_BLOCK = 128


@dataclass(frozen=True)
class LowBitFormat:
    """The format of one weight.

    Args:
        bits: 2, 4 or 8 a code.
        group: columns that share a scale: 64 or 128; with 8 bits also the whole row.
        zero: twice the code that stands for 0; see the table above.
        hadamard: 64 or 128 if what is stored is ``W H`` with H the block-diagonal Hadamard matrix
            of that size, normalised, so that ``x W^T = (x H) (W H)^T``; 0 if it is W itself.

    Raises:
        UsageError: a value that the format does not have.
    """

    bits: int
    group: int
    zero: int
    hadamard: int = 0

    def __post_init__(self) -> None:
        if self.bits not in ZEROS:
            raise UsageError(f"bits is {self.bits!r}, wanted 2, 4 or 8: correct it")
        if self.zero not in ZEROS[self.bits]:
            raise UsageError(
                f"zero is {self.zero!r} with {self.bits} bits, wanted "
                f"{' or '.join(map(str, ZEROS[self.bits]))}: quantise the checkpoint again"
            )
        whole_row = self.bits == 8 and isinstance(self.group, int) and self.group > 0
        if self.group not in GROUPS and not whole_row:
            raise UsageError(
                f"group is {self.group!r} with {self.bits} bits, wanted 64 or 128: correct it"
            )
        if self.hadamard not in HADAMARD_BLOCKS:
            raise UsageError(f"hadamard is {self.hadamard!r}, wanted 0, 64 or 128: correct it")

    def check_columns(self, columns: int, name: str) -> None:
        """Holds the format against a weight of ``columns`` in features called ``name``.

        Raises:
            UsageError: a group or Hadamard block that does not divide them.
        """
        if columns % self.group != 0 or (self.group not in GROUPS and self.group != columns):
            raise UsageError(
                f"{name} has {columns} in features, which the group of {self.group} does not "
                "divide: choose a group that does (64 or 128)"
            )
        if self.hadamard and columns % self.hadamard != 0:
            raise UsageError(
                f"{name} has {columns} in features, which the Hadamard block of {self.hadamard} "
                "does not divide: choose 64, or 0 for none"
            )

    @property
    def max_code(self) -> int:
        """The largest code in use."""
        return 2 if self.zero == TERNARY_ZERO else 2**self.bits - 1

    @property
    def min_code(self) -> int:
        """The smallest code in use: 8 bits are kept symmetric."""
        return 1 if self.bits == 8 else 0

    @property
    def bits_per_weight(self) -> float:
        """Bits of code and of the group's bf16 scale; a row's ``channel_scale`` is not counted."""
        return self.bits + 16 / self.group


def pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes ``[N, K]``, one a byte, to the plain layout ``[N, K * bits / 8]``.

    Raises:
        UsageError: columns that do not fill whole bytes, or a code of more bits.
    """
    per_byte = 8 // bits
    rows, columns = codes.shape
    if columns % per_byte != 0:
        raise UsageError(
            f"a row of {columns} codes of {bits} bits does not fill whole bytes, wanted a multiple "
            f"of {per_byte}: choose another format for this weight"
        )
    if codes.size and int(codes.max()) >= 2**bits:
        raise UsageError(f"a code is {int(codes.max())}, wanted less than {2**bits}: a defect")
    if per_byte == 1:
        return np.ascontiguousarray(codes)
    parts = codes.reshape(rows, columns // per_byte, per_byte)
    packed = np.zeros(parts.shape[:2], np.uint8)
    for i in range(per_byte):
        packed |= parts[:, :, i] << np.uint8(i * bits)
    return packed


def unpack(qweight: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """The plain layout ``[N, K * bits / 8]`` back to codes ``[N, K]``, one a byte."""
    per_byte = 8 // bits
    if per_byte == 1:
        return np.ascontiguousarray(qweight)
    rows, width = qweight.shape
    codes = np.empty((rows, width, per_byte), np.uint8)
    for i in range(per_byte):
        codes[:, :, i] = (qweight >> np.uint8(i * bits)) & np.uint8(2**bits - 1)
    return codes.reshape(rows, width * per_byte)


def dequantize(
    qweight: NDArray[np.uint8], scales: NDArray[Any], fmt: LowBitFormat
) -> NDArray[np.float32]:
    """The weight itself, fp32 ``[N, K]``; a Hadamard transform is undone.

    Args:
        qweight: plain layout.
        scales: ``[N, K / group]``, bf16 as stored, or any float dtype.
    """
    stored = dequantize_stored(qweight, scales, fmt)
    return hadamard_blocks(stored, fmt.hadamard) if fmt.hadamard else stored


def dequantize_stored(
    qweight: NDArray[np.uint8], scales: NDArray[Any], fmt: LowBitFormat
) -> NDArray[np.float32]:
    """What the codes stand for, fp32 ``[N, K]``: ``W H`` where there is a Hadamard transform."""
    codes = unpack(qweight, fmt.bits).astype(np.float32)
    rows, columns = codes.shape
    codes -= np.float32(fmt.zero / 2)
    grouped = codes.reshape(rows, columns // fmt.group, fmt.group)
    grouped *= scales.astype(np.float32)[:, :, None]
    return codes


def hadamard_blocks(weight: NDArray[np.float32], block: int) -> NDArray[np.float32]:
    """``W H``: Sylvester's Hadamard matrix over ``sqrt(block)`` on each block of columns, fp32.

    H is symmetric and its own inverse, so this does and undoes. ``block`` is a power of two.
    """
    rows, columns = weight.shape
    x = weight.astype(np.float32).reshape(rows * columns // block, block)
    step = 1
    while step < block:
        pairs = x.reshape(-1, block // (2 * step), 2, step)
        x = np.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), axis=2)
        step *= 2
    return x.reshape(rows, columns) * np.float32(block**-0.5)
