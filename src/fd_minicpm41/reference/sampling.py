"""From logits to text: choosing the next token, and handing out whole characters."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from numpy.typing import NDArray

from fd_minicpm41.config import read_json
from fd_minicpm41.errors import UsageError
from fd_minicpm41.reference.model import ForCausalLM, KVCache

REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class SamplingParams:
    """How a token is chosen.

    Args:
        temperature: divides the logits; 0 is greedy, ties going to the lower id.
        top_p: keeps the fewest most likely tokens that together reach this probability.
        top_k: keeps this many of the most likely tokens; 0 keeps all.
        seed: fixes the draw; ``None`` differs each time.

    Raises:
        UsageError: a value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        ranges: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
            ("temperature", lambda t: 0 <= t < math.inf, "0 or more (0 is greedy)"),
            ("top_p", lambda p: 0 < p <= 1, "more than 0 and at most 1"),
            ("top_k", lambda k: k >= 0, "0 or more (0 keeps all)"),
            ("seed", lambda s: s >= 0, "0 or more"),
        )
        for name, is_good, wanted in ranges:
            value = getattr(self, name)
            if value is None and name == "seed":
                continue
            if not isinstance(value, (int, float)) or not is_good(value):
                raise UsageError(f"{name} is {value!r}, wanted {wanted}: correct it")


def default_sampling(folder: str | Path) -> SamplingParams:
    """What the checkpoint's ``generation_config.json`` asks for; greedy if it asks for nothing.

    Raises:
        UsageError: a file that cannot be read, or values out of range.
    """
    folder = Path(folder)
    if not (folder / "generation_config.json").exists():
        return SamplingParams()
    values = read_json(folder, "generation_config.json")
    if not values.get("do_sample", False):
        return SamplingParams()
    return SamplingParams(
        temperature=values.get("temperature", 1.0),
        top_p=values.get("top_p", 1.0),
        top_k=values.get("top_k", 0),
    )


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts share from the start."""
    shared = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        shared += 1
    return shared


def sample(logits: NDArray[np.float32], params: SamplingParams, rng: np.random.Generator) -> int:
    """One token id for ``logits [vocab_size]``; top_k is applied before top_p."""
    if params.temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")
    if params.top_k:
        order = order[: params.top_k]
    scaled = logits[order].astype(np.float64) / params.temperature
    probabilities = np.exp(scaled - scaled[0])
    probabilities /= probabilities.sum()
    # The token that crosses top_p is kept, so at least one is.
    before = np.cumsum(probabilities) - probabilities
    kept = probabilities * (before < params.top_p)
    return int(order[rng.choice(len(order), p=kept / kept.sum())])


def generate(
    model: ForCausalLM,
    cache: KVCache,
    prompt_ids: Sequence[int],
    max_tokens: int,
    params: SamplingParams | None = None,
    stop_ids: Collection[int] = (),
    on_prefill: Callable[[int], object] | None = None,
) -> Iterator[int]:
    """Token ids after a prompt, one at a time; a stop id ends the text and is not given out.

    Args:
        cache: what came before the prompt; holds afterwards the prompt and every token given out,
            but not the last.
        on_prefill: told the tokens of each chunk of the prompt when it has been read.

    Raises:
        UsageError: an empty prompt, or a cache without room.
    """
    params = params or SamplingParams()
    rng = np.random.default_rng(params.seed)
    logits: paddle.Tensor = model.prefill(prompt_ids, cache, on_progress=on_prefill)
    for step in range(max_tokens):
        token = sample(logits.numpy(), params, rng)
        if token in stop_ids:
            return
        yield token
        if step + 1 < max_tokens:
            logits = model([token], cache)[0]


class CharacterStream:
    """Turns token ids into text as they come, never cutting a character in two.

    Args:
        decode: text of a list of token ids; bytes that form no character give U+FFFD.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        # Tokens from _start on give the text in hand, of which _shown characters were given out.
        self._start = 0
        self._shown = 0

    def push(self, token_id: int) -> str:
        """The characters that this token completes, perhaps none."""
        self._ids.append(token_id)
        text = self._decode(self._ids[self._start :])
        if text.endswith(REPLACEMENT):
            return ""
        fresh = text[self._shown :]
        # Decoding goes on from this token, not from the next: a decoder may treat the first token
        # of a text in its own way. It must be whole characters by itself to start from.
        last = self._decode(self._ids[-1:])
        if REPLACEMENT in last:
            self._shown = len(text)
        else:
            self._start, self._shown = len(self._ids) - 1, len(last)
        return fresh

    def finish(self) -> str:
        """What is left: an unfinished character, as U+FFFD."""
        fresh = self._decode(self._ids[self._start :])[self._shown :]
        self._start, self._shown = len(self._ids), 0
        return fresh
