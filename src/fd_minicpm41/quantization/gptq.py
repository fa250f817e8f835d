"""GPTQ: weights are rounded one input column after the other, each making up for those before.

With H the second moments of the layer's input and e the error of a row of W, the error of the
output is ``e H e^T``. For ``H = L L^T`` it is the sum over k of ``L[k,k]^2 (e_k + f_k)^2`` with the
feedback ``f_k = sum over j > k of L[j,k] / L[k,k] e_j``: the columns are rounded from the last to
the first, each to the level nearest to ``w_k + f_k``. This is GPTQ (arXiv 2210.17323) as QuIP
(arXiv 2307.13304) rewrote it: the same numbers without an inverse of H. The order of the columns
is theirs, turned round, because L is then the plain Cholesky factor.
"""

from __future__ import annotations

import paddle

from fd_minicpm41.errors import UsageError
from fd_minicpm41.quantization.formats import LowBitFormat
from fd_minicpm41.quantization.rtn import Ladder, fit_ladder, fit_scales, round_codes

# Rows of H that are updated together: bounds the memory beside H itself.
HESSIAN_BLOCK = 2048
# Added to the diagonal, as a share of its mean, so that H can be factored; raised if it cannot.
DAMP = 0.01
MAX_DAMP = 1.0


class Hessian:
    """Sums ``x^T x`` over the tokens that reach a linear layer: fp32 ``[K, K]``, lower triangle."""

    def __init__(self, columns: int) -> None:
        self.sums = paddle.zeros([columns, columns], "float32")

    def add(self, x: paddle.Tensor) -> None:
        """Adds tokens ``[num_tokens, K]``."""
        columns = x.shape[1]
        for start in range(0, columns, HESSIAN_BLOCK):
            end = min(start + HESSIAN_BLOCK, columns)
            part = paddle.matmul(x[:, start:end], x[:, :end], transpose_x=True)
            self.sums[start:end, :end] += part


def factor(hessian: Hessian, name: str, damp: float = DAMP) -> paddle.Tensor:
    """The lower Cholesky factor ``[K, K]`` of the damped second moments of the input of ``name``.

    Raises:
        UsageError: activations that are not finite.
    """
    diagonal = paddle.diagonal(hessian.sums)
    mean = diagonal.mean()
    if not bool(paddle.isfinite(mean)):
        raise UsageError(
            f"the calibration text drives the input of {name} to infinity or NaN: check the "
            "checkpoint with fd-minicpm41 generate"
        )
    if float(mean) == 0:
        mean = paddle.ones_like(mean)
    while damp <= MAX_DAMP:
        damped = paddle.diagonal_scatter(hessian.sums, diagonal + damp * mean)
        try:
            lower = paddle.linalg.cholesky(damped)
            if bool(paddle.isfinite(paddle.diagonal(lower)).all()):
                return lower
        except (ValueError, RuntimeError, OSError):  # Paddle: "not positive definite"
            pass
        damp *= 10
    raise UsageError(f"the inputs of {name} cannot be factored: give another calibration text")


def quantise_gptq(
    weight: paddle.Tensor, lower: paddle.Tensor, fmt: LowBitFormat, method: str
) -> tuple[paddle.Tensor, paddle.Tensor, Ladder | None]:
    """Rounds a weight against the factor of its input's second moments.

    Args:
        weight: fp32 ``[K, N]``; both it and H transformed if the format has a Hadamard transform.
            Layers that share their input may be given side by side.
        lower: :func:`factor`'s result.

    Returns:
        As :func:`~fd_minicpm41.quantization.rtn.quantise_rtn`.
    """
    columns, rows = weight.shape
    group = fmt.group
    diagonal = paddle.diagonal(lower)
    importance = (diagonal * diagonal).reshape([columns // group, group])
    ladder = fit_ladder(weight.reshape([columns // group, group, rows]), importance, fmt, method)
    codes = paddle.empty([columns, rows], "uint8")
    scales = paddle.empty([columns // group, rows], "float32")
    error = paddle.zeros([columns, rows], "float32")
    for index in reversed(range(columns // group)):
        start, end = index * group, (index + 1) * group
        block = lower[start:end, start:end] / diagonal[start:end]
        target = weight[start:end]
        if end < columns:
            feedback = lower[end:, start:end] / diagonal[start:end]
            target = target + paddle.matmul(feedback, error[end:], transpose_x=True)
        # Where the columns will stand if none of this group is rounded: the scale is fitted to it.
        shift = paddle.linalg.triangular_solve(
            block, target - weight[start:end], upper=False, transpose=True, unitriangular=True
        )
        group_scales = fit_scales(
            (weight[start:end] + shift).unsqueeze(0),
            importance[index : index + 1],
            fmt,
            ladder,
        )[0]
        group_codes, group_error = _round_group(weight[start:end], target, block, group_scales, fmt)
        codes[start:end] = group_codes.astype("uint8")
        scales[index] = group_scales
        error[start:end] = group_error
    return codes, scales, ladder


def _round_group(
    weight: paddle.Tensor,
    target: paddle.Tensor,
    block: paddle.Tensor,
    scales: paddle.Tensor,
    fmt: LowBitFormat,
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Codes and errors ``[group, N]`` of one group, its columns from the last to the first."""
    group = weight.shape[0]
    codes = paddle.empty_like(weight)
    error = paddle.zeros_like(weight)
    for k in reversed(range(group)):
        wanted = target[k]
        if k + 1 < group:
            wanted = wanted + paddle.matmul(block[k + 1 :, k], error[k + 1 :])
        code = round_codes(wanted, scales, fmt)
        codes[k] = code
        error[k] = weight[k] - (code - fmt.zero / 2) * scales
    return codes, error
