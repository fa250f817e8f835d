"""How far low-bit weights are from their source: perplexity, KL divergence, top-1 agreement.

Both models are walked layer by layer side by side, so that two checkpoints of which neither fits
into memory as fp32 are compared within that of one layer of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import paddle

from fd_minicpm41.config import MiniCPMConfig
from fd_minicpm41.quantization.formats import FP8_BLOCK, FP8_MAX
from fd_minicpm41.quantization.plan import EMBEDDING
from fd_minicpm41.quantization.quantise import relative_error
from fd_minicpm41.quantization.streaming import (
    LayerRunner,
    Progress,
    embed,
    finite_loader,
    load_layer,
)
from fd_minicpm41.reference.checkpoint import HEAD, Checkpoint
from fd_minicpm41.reference.model import DecoderLayer, RMSNorm, WeightLoader

# Rows of logits that are held at once.
LOGIT_ROWS = 256
# Steps of a row of activations in int8, of both signs.
INT8_STEPS = 127

# Rounds what a linear layer reads, [num_tokens, K].
Rounding = Callable[[paddle.Tensor], paddle.Tensor]


@dataclass
class Evaluation:
    """Means over the predicted tokens of a text.

    Attributes:
        num_tokens: predictions.
        perplexity, source_perplexity: exp of the mean negative log-likelihood.
        kl: mean divergence of the predictions from the source's, in nats.
        top1: share of predictions whose best token is the source's.
        layer_errors: relative error of the hidden states after each layer.
    """

    num_tokens: int = 0
    perplexity: float = math.nan
    source_perplexity: float = math.nan
    kl: float = math.nan
    top1: float = math.nan
    layer_errors: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Side:
    """A model to evaluate.

    Args:
        load: gives the fp32 weights.
        tied: its head is its embedding.
        rounding: what its linear layers do to their input first; ``None`` nothing.
    """

    load: WeightLoader
    tied: bool
    rounding: Rounding | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint, device: str = "cpu") -> Side:
        """A checkpoint as a server runs prompts: with the rounding of its method's activations.

        Loading raises UsageError for weights that are NaN or infinite.
        """
        method = None if checkpoint.sidecar is None else checkpoint.sidecar.method
        rounding = {"w4a8": round_int8, "w4afp8": round_fp8_rows}.get(method or "")
        return cls(finite_loader(checkpoint.load, device), checkpoint.is_tied, rounding)

    def as_fp8(self) -> Side:
        """The same weights as a server makes them block-wise fp8, and the rounding of its input."""

        def load(name: str) -> paddle.Tensor:
            weight = self.load(name)
            return round_fp8_blocks(weight) if name.endswith("_proj.weight") else weight

        return Side(load, self.tied, round_fp8_groups)


def evaluate(
    config: MiniCPMConfig,
    windows: list[list[int]],
    side: Side,
    source: Side | None = None,
    on_progress: Progress | None = None,
) -> Evaluation:
    """Reads windows of tokens with one model, or with two.

    Args:
        side: the model in question.
        source: what it is held against; without one there is perplexity alone.
        on_progress: told (layers done, in all).
    """
    sides = [side] if source is None else [side, source]
    result = Evaluation()
    runner = LayerRunner(config, max(map(len, windows)))
    with paddle.no_grad():
        hidden = [embed(config, windows, s.load(f"{EMBEDDING}.weight")) for s in sides]
        for index in range(config.num_layers):
            for i, s in enumerate(sides):
                layer = load_layer(config, s.load, index)
                round_inputs(layer, s.rounding)
                hidden[i] = [runner(layer, x) for x in hidden[i]]
            if source is not None:
                pairs = zip(hidden[0], hidden[1], strict=True)
                errors = [relative_error(got, wanted) for got, wanted in pairs]
                result.layer_errors.append(sum(errors) / len(errors))
            if on_progress is not None:
                on_progress(index + 1, config.num_layers)
        _predict(config, windows, sides, hidden, result)
    return result


def _predict(
    config: MiniCPMConfig,
    windows: list[list[int]],
    sides: list[Side],
    hidden: list[list[paddle.Tensor]],
    result: Evaluation,
) -> None:
    norms = [RMSNorm(config, s.load, "model.norm.weight") for s in sides]
    heads = [s.load(f"{EMBEDDING}.weight" if s.tied else HEAD) for s in sides]
    losses, kl, agreed = [0.0] * len(sides), 0.0, 0
    for w, window in enumerate(windows):
        for start in range(0, len(window) - 1, LOGIT_ROWS):
            end = min(start + LOGIT_ROWS, len(window) - 1)
            targets = paddle.to_tensor(window[start + 1 : end + 1], "int64").unsqueeze(1)
            logs = []
            for i in range(len(sides)):
                x = norms[i](hidden[i][w][start:end]) * config.logits_scale
                log = log_softmax(paddle.matmul(x, heads[i], transpose_y=True))
                losses[i] -= float(paddle.take_along_axis(log, targets, axis=1).sum())
                logs.append(log)
            if len(logs) == 2:
                kl += float((logs[1].exp() * (logs[1] - logs[0])).sum())
                agreed += int((logs[0].argmax(-1) == logs[1].argmax(-1)).sum())
            result.num_tokens += end - start
    result.perplexity = math.exp(losses[0] / result.num_tokens)
    if len(sides) == 2:
        result.source_perplexity = math.exp(losses[1] / result.num_tokens)
        result.kl = kl / result.num_tokens
        result.top1 = agreed / result.num_tokens


def log_softmax(logits: paddle.Tensor) -> paddle.Tensor:
    """Over the last axis. Paddle's own takes minutes for a large vocabulary on a CPU."""
    shifted = logits - logits.max(axis=-1, keepdim=True)
    return shifted - shifted.exp().sum(axis=-1, keepdim=True).log()


def round_inputs(layer: DecoderLayer, rounding: Rounding | None) -> None:
    """Makes the linear layers round what they read; ``None``: they take it as it is."""
    a, m = layer.self_attn, layer.mlp
    for linear in (a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj):
        linear.rounding = rounding


def round_int8(x: paddle.Tensor) -> paddle.Tensor:
    """Each row to 8-bit integers of its own scale, as w4a8 multiplies prompts."""
    scales = paddle.clip(x.abs().max(axis=-1, keepdim=True), min=1e-30) / INT8_STEPS
    return paddle.round(x / scales) * scales


def round_fp8_rows(x: paddle.Tensor) -> paddle.Tensor:
    """Each row to e4m3 of its own scale, as w4afp8 multiplies prompts."""
    return _scaled_e4m3(x, x.abs().max(axis=-1, keepdim=True))


def round_fp8_groups(x: paddle.Tensor) -> paddle.Tensor:
    """Each 128 values of a row to e4m3 of their own scale, the rest at the end likewise."""
    parts = [
        _scaled_e4m3(part, part.abs().max(axis=-1, keepdim=True))
        for part in (x[:, k : k + FP8_BLOCK] for k in range(0, x.shape[1], FP8_BLOCK))
    ]
    return paddle.concat(parts, axis=-1)


def round_fp8_blocks(weight: paddle.Tensor) -> paddle.Tensor:
    """A weight ``[N, K]`` as block-wise fp8 holds it: e4m3, one scale a block of 128 x 128.

    At an edge that 128 does not divide a block is what is left: its scale comes from it alone.
    """
    rows, columns = weight.shape
    out = paddle.empty_like(weight)
    for n in range(0, rows, FP8_BLOCK):
        for k in range(0, columns, FP8_BLOCK):
            block = weight[n : n + FP8_BLOCK, k : k + FP8_BLOCK]
            out[n : n + FP8_BLOCK, k : k + FP8_BLOCK] = _scaled_e4m3(block, block.abs().max())
    return out


def _scaled_e4m3(x: paddle.Tensor, largest: paddle.Tensor) -> paddle.Tensor:
    scales = paddle.clip(largest, min=1e-30) / FP8_MAX
    # Paddle's own cast is not there on every device.
    rounded = (x / scales).numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return paddle.to_tensor(rounded) * scales
