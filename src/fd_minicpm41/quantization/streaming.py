"""A model walked layer by layer, with the memory of one layer and of the tokens' activations."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import paddle
import paddle.nn.functional as F

from fd_minicpm41.config import MiniCPMConfig
from fd_minicpm41.errors import UsageError
from fd_minicpm41.quantization.plan import STAGES
from fd_minicpm41.reference.model import DecoderLayer, KVCache, Linear, WeightLoader
from fd_minicpm41.reference.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenWindows:
    """A text cut into windows of equal length, each starting with BOS if the model uses one.

    Attributes:
        windows: token ids, all of one length.
        name: of the file.
        sha256: of the tokens.
    """

    windows: list[list[int]]
    name: str
    sha256: str

    @property
    def num_tokens(self) -> int:
        """Tokens in all windows."""
        return sum(map(len, self.windows))


def read_windows(
    tokenizer: Tokenizer, path: str | Path, length: int, count: int | None, what: str
) -> TokenWindows:
    """The first ``count`` windows of a UTF-8 text file; ``None`` for all that it fills.

    Raises:
        UsageError: a file that cannot be read, or with too little text.
    """
    path = Path(path)
    if length < 2 or (count is not None and count < 1):
        raise UsageError(f"{what}: {count} windows of {length} tokens, wanted at least 1 of 2")
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{what} {str(path)!r} cannot be read ({error}): give a UTF-8 text file"
        ) from None
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = tokenizer.encode(text)[len(start) :]
    step = length - len(start)
    wanted = 1 if count is None else count
    if len(ids) < wanted * step:
        raise UsageError(
            f"{what} {path} has {len(ids)} tokens, wanted {wanted * step} for {wanted} windows of "
            f"{length}: give a longer text, or ask for fewer or shorter windows"
        )
    windows = [[*start, *ids[i * step : (i + 1) * step]] for i in range(count or len(ids) // step)]
    digest = hashlib.sha256(repr(windows).encode()).hexdigest()
    return TokenWindows(windows, path.name, digest)


def embed(
    config: MiniCPMConfig, windows: Sequence[Sequence[int]], weight: paddle.Tensor
) -> list[paddle.Tensor]:
    """What the first layer reads: fp32 ``[length, hidden_size]`` a window."""
    return [
        F.embedding(paddle.to_tensor(window, "int64"), weight) * config.scale_emb
        for window in windows
    ]


def load_layer(config: MiniCPMConfig, load: WeightLoader, index: int) -> DecoderLayer:
    """One decoder layer by itself."""
    return DecoderLayer(config, load, f"model.layers.{index}")


class LayerRunner:
    """Passes windows through single layers, densely; one cache serves them all."""

    def __init__(self, config: MiniCPMConfig, length: int) -> None:
        self._cache = KVCache(config, length, None)

    def attend(self, layer: DecoderLayer, normed: paddle.Tensor) -> paddle.Tensor:
        """What ``o_proj`` reads, ``[length, num_q_heads * head_dim]``."""
        attention = layer.self_attn
        kept, attention.o_proj = attention.o_proj, _identity  # type: ignore[assignment]
        try:
            return attention(normed, self._cache, self._cache.layers[0])
        finally:
            attention.o_proj = kept

    def __call__(self, layer: DecoderLayer, hidden: paddle.Tensor) -> paddle.Tensor:
        """What the layer makes of a window."""
        return layer(hidden, self._cache, self._cache.layers[0])


def walk_layer(
    runner: LayerRunner,
    layer: DecoderLayer,
    hidden: list[paddle.Tensor],
    stage: Callable[[tuple[str, ...], list[Linear], list[paddle.Tensor]], None],
) -> list[paddle.Tensor]:
    """Passes windows through a layer, and calls ``stage`` before each set of linear layers is used.

    ``stage`` is given their names, the layers and what they read; it may change their weights, and
    what follows reads the outcome.

    Returns:
        What the layer made of the windows.
    """
    attention, mlp = layer.self_attn, layer.mlp
    xs = [layer.input_layernorm(x) for x in hidden]
    stage(STAGES[0], [attention.q_proj, attention.k_proj, attention.v_proj], xs)
    xs = [runner.attend(layer, x) for x in xs]
    stage(STAGES[1], [attention.o_proj], xs)
    hidden = [
        h + attention.o_proj(x) * layer.residual_scale for h, x in zip(hidden, xs, strict=True)
    ]
    xs = [layer.post_attention_layernorm(x) for x in hidden]
    stage(STAGES[2], [mlp.gate_proj, mlp.up_proj], xs)
    xs = [F.silu(mlp.gate_proj(x)) * mlp.up_proj(x) for x in xs]
    stage(STAGES[3], [mlp.down_proj], xs)
    return [h + mlp.down_proj(x) * layer.residual_scale for h, x in zip(hidden, xs, strict=True)]


def _identity(x: paddle.Tensor) -> paddle.Tensor:
    return x


def finite_loader(load: WeightLoader, device: str) -> WeightLoader:
    """A loader that puts weights on a device and refuses those that are not numbers.

    Raises, when called:
        UsageError: NaN or infinite weights, by name.
    """

    def load_checked(name: str) -> paddle.Tensor:
        tensor = load(name)
        if device != "cpu":
            tensor = tensor.to(device)
        if not bool(paddle.isfinite(tensor).all()):
            bad = int((~paddle.isfinite(tensor)).sum())
            raise UsageError(
                f"{name} holds {bad} weights that are NaN or infinite: download the checkpoint "
                "again, or repair it"
            )
        return tensor

    return load_checked


def choose_device(device: str) -> str:
    """Makes ``device`` ("cpu" or "gpu") Paddle's default; "auto" takes a GPU if Paddle has one.

    Raises:
        UsageError: a GPU that Paddle does not have.
    """
    has_gpu = paddle.device.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0
    if device == "auto":
        device = "gpu" if has_gpu else "cpu"
    if device == "gpu" and not has_gpu:
        raise UsageError("--device is gpu, but Paddle sees none: install paddlepaddle-gpu, or cpu")
    paddle.set_device(device)
    return device


Progress = Callable[[int, int], object]
