"""Training of the small model: corpus, tokenizer, batches, command line, and the model it trains.

What needs PyTorch is skipped where it is not installed; the logits that PyTorch gives are recorded
in tests/data/small_model_logits.json and held against the reference in Paddle.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest

from fd_minicpm41 import small_model
from fd_minicpm41.config import MiniCPMConfig, SparseConfig
from fd_minicpm41.errors import UsageError
from fd_minicpm41.hybrid_reasoning.chat_template import bundled_template
from fd_minicpm41.reference.checkpoint import load_model
from fd_minicpm41.reference.model import ForCausalLM, KVCache, weight_shapes
from fd_minicpm41.small_model import tasks
from fd_minicpm41.small_model.prose import examination_paragraphs
from train_small import checkpoint, corpus, data, plot, tokenizer

ROOT = Path(__file__).resolve().parents[1]
RECORD = json.loads((ROOT / "tests/data/small_model_logits.json").read_text("utf-8"))
RULE = replace(SparseConfig(**checkpoint.SPARSE), **RECORD["sparse"])

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="PyTorch is not installed"
)


@pytest.fixture(scope="module")
def writer() -> data.Writer:
    return data.Writer(small_model.path(), examination_paragraphs())


def decoded(writer: data.Writer, ids: list[int]) -> str:
    return writer._fast.decode(ids, skip_special_tokens=False)


# Corpus


def test_a_missing_book_is_named(tmp_path):
    assert not corpus.is_complete(tmp_path)
    with pytest.raises(UsageError, match=r"fairy_tales.*missing: run without --corpus") as error:
        corpus.load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_changed_book_is_refused(tmp_path):
    for book in (*corpus.TRAINING, corpus.HELD_OUT):
        (tmp_path / book.file).write_text("changed")
    assert corpus.is_complete(tmp_path)
    with pytest.raises(UsageError, match="SHA-256 .* delete the file and fetch it anew"):
        corpus.load(tmp_path)


def test_the_packages_prose_is_the_held_out_book():
    text = ROOT / "src/fd_minicpm41/data/heart_of_darkness.txt"
    lines = corpus.split_paragraphs(text.read_text("utf-8-sig"))
    assert set(examination_paragraphs()) <= set(lines)
    assert all("Darkness" not in book.member for book in corpus.TRAINING)


def test_headings_are_left_out_and_lines_joined():
    text = "CHAPTER I\r\n\r\nOne line of a paragraph that is\r\nlong, and its second line.\r\n"
    assert corpus.split_paragraphs(text) == [
        "One line of a paragraph that is long, and its second line."
    ]


# Tokenizer


def test_thinking_markers_are_several_pieces_and_digits_single(writer):
    vocab = writer._fast.get_vocab()
    assert len(vocab) == tokenizer.VOCAB_SIZE
    assert "<think>" not in vocab and "</think>" not in vocab
    assert len(writer.encode("<think>")) > 1 and len(writer.encode("</think>")) > 1
    assert len(writer.encode("90210")) == 5
    for token, added in zip(range(2040, 2048), tokenizer.ADDED_TOKENS, strict=True):
        assert vocab[added] == token
    for word in (*tasks.ADJECTIVES, *tasks.NOUNS, *tasks.FIRST_NAMES, *tasks.LAST_NAMES):
        assert len(writer.encode(" " + word)) == 1, word


def test_training_a_tokenizer_gives_the_same_one_again():
    prose = examination_paragraphs()[:60]
    assert tokenizer.train(prose).to_str() == tokenizer.train(prose).to_str()


def test_the_checkpoint_has_the_packages_template():
    settings = json.loads((small_model.path() / "tokenizer_config.json").read_text("utf-8"))
    assert settings["chat_template"] == bundled_template()


# Checkpoint


def test_the_checkpoint_has_the_structure_and_size_it_promises():
    folder = small_model.path()
    config = MiniCPMConfig.from_pretrained(folder)
    assert (config.num_q_heads, config.num_kv_heads, config.head_dim) == (32, 2, 128)
    assert config == checkpoint.parsed_config()
    assert config.sparse is not None and 4 * config.sparse.budget <= 16384 // 64
    for shape in weight_shapes(config, tied=False).values():
        assert all(size % 128 == 0 for size in shape)
    assert (folder / "model.safetensors").stat().st_size <= 24e6
    assert "Licence" in (folder / "README.md").read_text("utf-8")


# Batches


def of_kind(writer: data.Writer, ids: list[int], kinds: list[int], *wanted: int) -> str:
    return decoded(writer, [i for i, kind in zip(ids, kinds, strict=True) if kind in wanted])


@pytest.mark.parametrize("length", [256, 512, 1024, 4096])
def test_a_documents_values_are_told_apart(writer, length):
    for seed in range(6):
        segments = writer.document_sequence(Random(seed), length)
        ids, kinds = writer.tokens(segments)
        assert len(ids) == len(kinds) <= length
        text = decoded(writer, ids)
        asked = text.count("What is the pass key") + text.count("Who is the owner")
        values = [part for part, kind in segments if kind == data.VALUE]
        assert len(values) == asked >= data.MOST_FACTS[length] // 2
        assert of_kind(writer, ids, kinds, data.VALUE, data.FIRST) == "".join(values)
        assert kinds.count(data.FIRST) == asked
        for value in values:
            assert text.count(value) >= 3  # twice in the document, once in the reply
        learned = of_kind(writer, ids, kinds, data.REPLY, data.VALUE, data.FIRST)
        assert learned.count("<|im_end|>") == asked
        # Of the document nothing but what a fact repeats: prose would be learned by heart.
        assert data.PROSE not in kinds
        assert kinds.count(data.REPLY) < 45 * asked


def test_a_drill_tells_each_fact_twice(writer):
    for seed in range(6):
        segments = writer.drill_segments(Random(seed), 512)
        ids, kinds = writer.tokens(segments)
        assert len(ids) <= 512
        values = [part for part, kind in segments if kind == data.VALUE]
        assert len(values) == (512 - 2) // (2 * data.DRILL_TOKENS)
        told = segments[0][0]
        assert all(told.count(value + ".") == 1 for value in values)
        assert of_kind(writer, ids, kinds, data.VALUE, data.FIRST) == "".join(values)


def test_a_batch_is_drawn_from_its_seed_alone(writer):
    recipe = data.Recipe(512, 4096, 0.3, 0.3, stretch=0.5, drills=0.2)
    first, again = (writer.batch(Random(1), recipe) for _ in range(2))
    assert first.ids.shape == first.kinds.shape == first.positions.shape == (8, 512)
    assert np.array_equal(first.ids, again.ids) and np.array_equal(first.kinds, again.kinds)
    assert first.ids.min() >= 0 and first.ids.max() < tokenizer.VOCAB_SIZE
    padded = first.ids == 0
    assert np.all(first.kinds[padded] == data.IGNORED)


def test_chats_are_learned_from_their_replies_alone(writer):
    for seed in range(30):
        (prompt, _), (reply, _) = segments = writer.chat_segments(Random(seed))
        ids, kinds = writer.tokens(segments)
        assert prompt.endswith(("<|im_start|>assistant\n", "</think>\n"))
        assert decoded(writer, [i for i, k in zip(ids, kinds, strict=True) if k]) == reply


def test_positions_are_stretched_but_stay_in_order():
    spans = []
    for seed in range(50):
        positions = data.stretched(Random(seed), 512)
        assert len(positions) == 512 and positions[0] == 0
        assert all(a < b for a, b in pairwise(positions))
        assert sum(b - a > 1 for a, b in pairwise(positions)) <= 4
        spans.append(positions[-1])
    assert max(spans) < data.LONGEST and max(spans) > 8000


def test_workers_follow_when_other_batches_are_wanted():
    recipes = {"a": data.Recipe(512, 512, 0.5, 0.5), "b": data.Recipe(1024, 1024, 0.0, 0.0)}
    feeder = data.Feeder(
        small_model.path(), examination_paragraphs(), recipes, seed=1, workers=1, depth=2
    )
    try:
        feeder.want(["a"])
        assert feeder.get("a").ids.shape == (1, 512)
        feeder.want(["b"])
        assert [feeder.get("b").ids.shape for _ in range(5)] == [(1, 1024)] * 5
    finally:
        feeder.close()


# Command line and pictures


def test_the_loss_curve_is_drawn(tmp_path):
    names = ("prose", "reply", "first", "value", "selection")
    lines = [
        {"step": i, "phase": "short" if i < 5 else "long", "recipe": "1k"}
        | {name: 3.0 / (i + 1) for name in names}
        for i in range(10)
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    assert plot.plot_loss(tmp_path / "log.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = str(ROOT / "benchmarks/train_small/train.py")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, env=environment
    )


@needs_torch
def test_without_a_gpu_one_line_says_so(tmp_path):
    done = command("--out", str(tmp_path))
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: no NVIDIA GPU is visible")


@needs_torch
def test_a_missing_corpus_is_one_line(tmp_path):
    done = command("--out", str(tmp_path), "--corpus", str(tmp_path / "none"), "--rehearse")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "of the corpus is missing" in done.stderr


@needs_torch
def test_too_little_memory_is_one_line(monkeypatch):
    import torch

    from train_small import train

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 << 30, 80 << 30))
    with pytest.raises(UsageError, match=r"the GPU has 3.0 GiB free, wanted \d+: end") as error:
        train.check_device(rehearse=False)
    assert "\n" not in str(error.value)


@needs_torch
def test_a_stopped_run_says_how_to_go_on(monkeypatch, capsys, tmp_path):
    from train_small import train

    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "run", stop)
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(tmp_path)])
    assert train.main() == 130
    assert capsys.readouterr().err == "stopped: the same command goes on from its last save\n"


@needs_torch
def test_a_killed_run_goes_on_from_its_last_save(tmp_path):
    import torch

    from train_small import train
    from train_small.model import SmallMiniCPM, initialise

    def fresh(seed: int) -> train.Trainer:
        model = SmallMiniCPM(train.trained_config(checkpoint.parsed_config()))
        initialise(model, seed)
        return train.Trainer(model, train.REHEARSAL, seed)

    state = tmp_path / "state.pt"
    killed = fresh(3)
    killed.elapsed, killed.steps, killed.hits = 12.5, 40, 0.7
    with torch.no_grad():
        killed.model.lm_head.weight += 1.0
    killed.save(state)
    again = fresh(3)
    again.resume(state)
    assert (again.elapsed, again.steps, again.hits, again.starts) == (12.5, 40, 0.7, 1)
    assert torch.equal(again.model.lm_head.weight, killed.model.lm_head.weight)
    with pytest.raises(UsageError, match="trained with seed 3, wanted 4"):
        fresh(4).resume(state)
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(UsageError, match="cannot be resumed from .*delete it") as error:
        fresh(3).resume(state)
    assert "\n" not in str(error.value)


@needs_torch
def test_the_short_phase_waits_for_the_match_but_not_for_ever():
    from train_small import train
    from train_small.model import SmallMiniCPM

    trainer = train.Trainer(SmallMiniCPM(checkpoint.parsed_config()), train.FULL, 0)
    assert [trainer.phase(at).name for at in (0.0, 0.2, 0.4, 0.6)] == [
        "first",
        "short",
        "short",
        "long",
    ]
    trainer.hits = 0.95
    assert [trainer.phase(at).name for at in (0.2, 0.4, 0.6, 0.8)] == [
        "short",
        "longer",
        "long",
        "sparse",
    ]
    assert trainer.model.config.sparse.budget > checkpoint.TRAINED_BUDGET
    trained = train.trained_config(trainer.model.config).sparse
    assert trained.budget == checkpoint.TRAINED_BUDGET
    assert trained.window_size == trainer.model.config.sparse.window_size


# The model in PyTorch and the reference in Paddle


@pytest.fixture(scope="module")
def reference() -> ForCausalLM:
    return load_model(small_model.path())


def test_the_record_is_of_the_packages_weights():
    content = (small_model.path() / "model.safetensors").read_bytes()
    assert RECORD["sha256"] == hashlib.sha256(content).hexdigest()
    assert {case["attention"] for case in RECORD["cases"]} == {"dense", "sparse"}


@pytest.mark.parametrize("number", range(len(RECORD["cases"])))
def test_pytorch_and_the_reference_give_the_same_logits(reference, number):
    """Both compute in fp32. Sums in another order differ by some 1e-6 of the largest activations,
    which four layers and the head carry to at most 1e-3 of logits of up to 30."""
    case = RECORD["cases"][number]
    ids = case["prompt_ids"]
    sparse = RULE if case["attention"] == "sparse" else None
    cache = KVCache(reference.config, len(ids), sparse)
    rows = len(case["best_ids"])
    reference.prefill(ids[:-rows], cache)
    logits = reference(ids[-rows:], cache).numpy()
    found = np.take_along_axis(logits, np.array(case["best_ids"]), axis=1)
    np.testing.assert_allclose(found, case["best_logits"], atol=1e-3)
    if sparse is not None and len(ids) > 64 * sparse.budget:
        assert cache.blocks_attended < 0.95 * cache.blocks_present


def test_sparse_and_dense_records_differ_where_blocks_are_left_out():
    by_length: dict[int, list] = {}
    for case in RECORD["cases"]:
        by_length.setdefault(len(case["prompt_ids"]), []).append(case["best_logits"])
    assert min(by_length) < RULE.dense_len < 64 * RULE.budget < max(by_length)
    for length, (dense, sparse) in by_length.items():
        assert np.allclose(dense, sparse, atol=1e-3) == (length < RULE.dense_len)
