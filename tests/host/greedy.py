"""What FastDeploy must answer greedily, computed by the plain-Paddle reference."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from fd_minicpm41.reference.checkpoint import load_model
from fd_minicpm41.reference.model import ForCausalLM


@cache
def reference_model(folder: Path) -> ForCausalLM:
    return load_model(folder)


def random_prompt(num_tokens: int, vocab_size: int = 250, seed: int = 0) -> list[int]:
    """Text pieces only: none of the first three ids, which are special."""
    rng = np.random.default_rng([seed, num_tokens])
    return [int(i) for i in rng.integers(3, vocab_size, num_tokens)]


def expected_tokens(
    folder: Path,
    prompt: Sequence[int],
    max_tokens: int,
    attention: Any = "dense",
    min_tokens: int = 1,
) -> list[int]:
    """Greedy tokens up to and including the first stop token, at most ``max_tokens``.

    The first ``min_tokens`` are no stop tokens; 1 is FastDeploy's default.
    """
    model = reference_model(folder)
    stop_ids = list(model.config.eos_token_ids)
    cache = model.new_cache(len(prompt) + max_tokens, attention)
    logits = model.prefill(list(prompt), cache)
    tokens: list[int] = []
    while True:
        row = logits.numpy().reshape(-1).copy()
        if len(tokens) < min_tokens:
            row[stop_ids] = -np.inf
        tokens.append(int(row.argmax()))
        if len(tokens) == max_tokens or tokens[-1] in stop_ids:
            return tokens
        logits = model([tokens[-1]], cache)


def assert_greedy(
    got: Sequence[int],
    folder: Path,
    prompt: Sequence[int],
    max_tokens: int,
    attention: Any = "dense",
    min_tokens: int = 1,
) -> None:
    """Token for token. FastDeploy ends every reply with a stop token, also one that it cut."""
    expected = expected_tokens(folder, prompt, max_tokens, attention, min_tokens)
    stop_ids = reference_model(folder).config.eos_token_ids
    assert list(got[:-1]) == expected[:-1], f"prompt of {len(prompt)} tokens"
    assert len(got) == len(expected) and got[-1] in stop_ids
