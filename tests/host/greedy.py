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
    folder: Path, prompt: Sequence[int], max_tokens: int, attention: Any = "dense"
) -> list[int]:
    """Greedy tokens up to and including the first stop token, at most ``max_tokens``.

    As in FastDeploy, the first token is not a stop token: ``min_tokens`` is 1.
    """
    model = reference_model(folder)
    stop_ids = list(model.config.eos_token_ids)
    cache = model.new_cache(len(prompt) + max_tokens, attention)
    logits = model.prefill(list(prompt), cache).numpy().reshape(-1)
    logits[stop_ids] = -np.inf
    tokens = [int(logits.argmax())]
    while len(tokens) < max_tokens and tokens[-1] not in stop_ids:
        tokens.append(int(model([tokens[-1]], cache).numpy().reshape(-1).argmax()))
    return tokens


def assert_greedy(
    got: Sequence[int],
    folder: Path,
    prompt: Sequence[int],
    max_tokens: int,
    attention: Any = "dense",
) -> None:
    """Token for token. FastDeploy ends every reply with a stop token, also one that it cut."""
    expected = expected_tokens(folder, prompt, max_tokens, attention)
    stop_ids = reference_model(folder).config.eos_token_ids
    assert list(got[:-1]) == expected[:-1], f"prompt of {len(prompt)} tokens"
    assert len(got) == len(expected) and got[-1] in stop_ids
