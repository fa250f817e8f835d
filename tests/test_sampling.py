"""Choosing tokens, and handing out whole characters."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers

from checkpoints import tiny_tokenizer, write_tiny_checkpoint
from fd_minicpm41.errors import UsageError
from fd_minicpm41.reference.checkpoint import load_model
from fd_minicpm41.reference.sampling import (
    CharacterStream,
    SamplingParams,
    common_prefix,
    default_sampling,
    generate,
    sample,
)

LOGITS = np.log(np.array([0.1, 0.4, 0.05, 0.25, 0.2], np.float32))


def draws(params: SamplingParams, count: int = 2000) -> np.ndarray:
    rng = np.random.default_rng(0)
    chosen = [sample(LOGITS, params, rng) for _ in range(count)]
    return np.bincount(chosen, minlength=len(LOGITS)) / count


def test_greedy_takes_the_best_and_the_lower_id_of_equals() -> None:
    rng = np.random.default_rng(0)
    assert sample(LOGITS, SamplingParams(), rng) == 1
    assert sample(np.array([1, 3, 3], np.float32), SamplingParams(), rng) == 1


@pytest.mark.parametrize(
    ("params", "wanted"),
    [
        (SamplingParams(temperature=1.0), [0.1, 0.4, 0.05, 0.25, 0.2]),
        (SamplingParams(temperature=1.0, top_k=2), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        # 0.4 + 0.25 fall short of 0.7; the token that crosses it is kept.
        (SamplingParams(temperature=1.0, top_p=0.7), [0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85]),
        (SamplingParams(temperature=1.0, top_p=1e-9), [0, 1, 0, 0, 0]),
        (SamplingParams(temperature=1.0, top_k=2, top_p=0.5), [0, 1, 0, 0, 0]),
        (SamplingParams(temperature=0.5), np.array([1, 16, 0.25, 6.25, 4]) / 27.5),
    ],
)
def test_shares_of_many_draws(params: SamplingParams, wanted: list[float]) -> None:
    shares = draws(params)
    # Four standard deviations of a share over 2000 draws, at its widest (0.5).
    assert np.abs(shares - wanted).max() <= 4 * 0.5 / 2000**0.5
    assert (shares[np.asarray(wanted) == 0] == 0).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "hot"},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"seed": -1},
    ],
)
def test_values_out_of_range(wrong: dict) -> None:
    (name,) = wrong
    with pytest.raises(UsageError, match=f"^{name} is .* wanted"):
        SamplingParams(**wrong)


def test_defaults_come_from_the_checkpoint(tmp_path: Path) -> None:
    assert default_sampling(tmp_path) == SamplingParams()
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"do_sample": True, "temperature": 0.8, "top_p": 0.8}))
    assert default_sampling(tmp_path) == SamplingParams(temperature=0.8, top_p=0.8)
    path.write_text(json.dumps({"do_sample": False, "temperature": 0.8}))
    assert default_sampling(tmp_path) == SamplingParams()


def test_generation_stops_repeats_and_counts(tmp_path: Path) -> None:
    model = load_model(write_tiny_checkpoint(tmp_path / "tiny", seed=5))

    def run(seed: int, max_tokens: int = 12, stop_ids: tuple[int, ...] = ()) -> list[int]:
        params = SamplingParams(temperature=1.0, seed=seed)
        cache = model.new_cache(64)
        ids = list(generate(model, cache, [1, 5, 9], max_tokens, params, stop_ids))
        if not stop_ids:
            assert cache.length == 3 + max_tokens - 1
        return ids

    first = run(seed=1)
    assert len(first) == 12
    assert run(seed=1) == first
    assert run(seed=2) != first
    stop = first[5]
    assert run(seed=1, stop_ids=(stop,)) == first[: first.index(stop)]
    greedy = list(generate(model, model.new_cache(64), [1, 5, 9], 4))
    cache = model.new_cache(64)
    assert greedy[0] == int(model([1, 5, 9], cache)[-1].argmax())


def test_common_prefix() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([], [1]) == 0
    assert common_prefix([1, 2], [1, 2, 3]) == 2


def byte_fallback_tokenizer() -> FastTokenizer:
    """Pieces for ASCII letters, single bytes for the rest, as in Llama's sentencepiece models."""
    pieces = ["<unk>"] + [f"<0x{byte:02X}>" for byte in range(256)] + ["▁"]
    pieces += [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = FastTokenizer(
        models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()]
    )
    return tokenizer


TOKENIZERS = {"byte level": tiny_tokenizer(), "byte fallback": byte_fallback_tokenizer()}


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=st.text(alphabet=st.sampled_from("ab \né你🙂<"), max_size=20))
def test_streamed_text_is_the_decoded_text_in_whole_characters(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    stream = CharacterStream(tokenizer.decode)
    pieces = [stream.push(i) for i in ids]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)
    assert stream.finish() == ""


def test_a_cut_character_is_held_back_and_given_out_at_the_end() -> None:
    tokenizer = TOKENIZERS["byte level"]
    ids = tokenizer.encode("a🙂", add_special_tokens=False).ids
    stream = CharacterStream(tokenizer.decode)
    assert [stream.push(i) for i in ids[:-1]] == ["a", "", "", ""]
    assert stream.finish() == "\ufffd"


def test_bytes_of_no_character_do_not_stop_the_stream() -> None:
    tokenizer = TOKENIZERS["byte level"]
    lone = tokenizer.encode("你", add_special_tokens=False).ids[1]
    letters = tokenizer.encode("ab", add_special_tokens=False).ids
    stream = CharacterStream(tokenizer.decode)
    assert "".join(stream.push(i) for i in [letters[0], lone, *letters]) == "a\ufffdab"
