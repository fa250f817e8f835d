"""Checkpoint folders: what loads, what is refused in which words, and writing all or nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoints import write_tiny_checkpoint
from fd_minicpm41.config import MiniCPMConfig, SparseConfig
from fd_minicpm41.errors import UsageError
from fd_minicpm41.reference.checkpoint import Checkpoint, CheckpointWriter, load_model


def rewrite(folder: Path, changes: dict[str, np.ndarray | None]) -> None:
    """Replaces, adds or (None) removes tensors of a single-file fp32 checkpoint."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    for name, array in changes.items():
        if array is None:
            del weights[name]
        else:
            weights[name] = array
    save_file(weights, path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_checkpoint(tmp_path / "tiny", dtype="float32", num_layers=1)


def message(folder: Path) -> str:
    with pytest.raises(UsageError) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_dtype_and_layout_gives_the_stored_values_in_fp32(
    tmp_path: Path, dtype: str, num_shards: int
) -> None:
    import ml_dtypes

    exact = write_tiny_checkpoint(tmp_path / "exact", dtype="float32", seed=2)
    folder = write_tiny_checkpoint(tmp_path / "tiny", dtype=dtype, num_shards=num_shards, seed=2)
    assert len(list(folder.glob("*.safetensors"))) == num_shards
    checkpoint = Checkpoint(folder)
    rounded = {"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype)
    for name, array in load_file(exact / "model.safetensors").items():
        wanted = array.astype(rounded).astype(np.float32)
        got = checkpoint.load(name).numpy()
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, wanted, err_msg=name)
    told: list[tuple[int, int]] = []
    load_model(folder, on_progress=lambda *at: told.append(at))
    assert told == [(i + 1, 21) for i in range(21)]


def test_a_tensor_may_be_held_twice(folder: Path) -> None:
    """In a process of its own, which would be aborted."""
    script = (
        "import sys; from fd_minicpm41.reference.checkpoint import Checkpoint\n"
        "checkpoint = Checkpoint(sys.argv[1])\n"
        "held = [checkpoint.load('model.norm.weight') for _ in range(2)]\n"
        "held[0][0] = 7.0\n"
        "print(held[1][0].item() != 7.0)\n"
        "del held\n"
        "print('alive')\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stdout.splitlines() == ["True", "alive"], result.stderr


def test_the_presence_of_the_head_decides_on_tying(tmp_path: Path) -> None:
    """The file's own word is wrong in both."""
    tied = write_tiny_checkpoint(tmp_path / "a", tied=True, tie_word_embeddings=False)
    untied = write_tiny_checkpoint(tmp_path / "b", tied=False, tie_word_embeddings=True)
    model = load_model(tied)
    assert model.lm_head is model.model.embed_tokens
    model = load_model(untied)
    assert model.lm_head is not model.model.embed_tokens


def test_sparse_parameters_come_from_caller_checkpoint_or_publication(tmp_path: Path) -> None:
    own = {"topk": 5, "dense_len": 64}
    plain = write_tiny_checkpoint(tmp_path / "plain")
    with_own = write_tiny_checkpoint(tmp_path / "own", sparse_config=own)
    asked = SparseConfig(topk=9)
    assert load_model(plain).config.sparse == SparseConfig()
    assert load_model(with_own).config.sparse == SparseConfig(topk=5, dense_len=64)
    assert load_model(with_own, sparse=asked).config.sparse == asked


def test_rope_table_by_name(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(
        tmp_path / "wide", hidden_size=256, num_q_heads=2, num_kv_heads=1, num_layers=1
    )
    assert load_model(folder, rope_table="128k").config.max_context == 131072


def test_old_tables_in_the_file_are_ignored(folder: Path) -> None:
    rewrite(folder, {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)})
    load_model(folder)


def test_missing_unexpected_and_misshaped_tensors_are_all_named(folder: Path) -> None:
    rewrite(
        folder,
        {
            "model.norm.weight": None,
            "model.layers.0.self_attn.q_proj.bias": np.zeros(256, np.float32),
            "model.layers.0.mlp.up_proj.weight": np.zeros((384, 255), np.float32),
        },
    )
    said = message(folder)
    assert "1 missing (model.norm.weight)" in said
    assert "1 unexpected (model.layers.0.self_attn.q_proj.bias)" in said
    assert (
        "1 mis-shaped (model.layers.0.mlp.up_proj.weight is [384, 255], wanted [384, 256])" in said
    )


def test_a_long_list_is_cut(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 3}
    (folder / "config.json").write_text(json.dumps(config))
    assert "18 missing (" in message(folder) and "and 12 more)" in message(folder)


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_a_truncated_file_is_one_clear_error(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    said = message(folder)
    assert said.startswith(f"{path} is damaged or cut short (") and "download it again" in said


def test_weights_of_another_kind(folder: Path) -> None:
    rewrite(folder, {"model.norm.weight": np.ones(256, np.int8)})
    assert "model.norm.weight is I8, wanted one of F32, F16, BF16" in message(folder)
    (folder / "model.safetensors").unlink()
    assert "holds neither model.safetensors nor model.safetensors.index.json" in message(folder)


def test_a_missing_folder_and_missing_config(tmp_path: Path) -> None:
    assert "does not exist" in message(tmp_path / "nowhere")
    assert "config.json does not exist" in message(tmp_path)


def test_shards_and_index_that_do_not_fit(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "tiny", num_shards=2)
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    shard = folder / "model-00002-of-00002.safetensors"
    aside = shutil.move(shard, tmp_path / "aside")
    assert f"{shard} does not exist: download the missing shard" in message(folder)
    shutil.move(aside, shard)

    index.write_text(json.dumps({"weight_map": good["weight_map"] | {"extra": shard.name}}))
    assert "lists tensors that no shard holds (extra)" in message(folder)
    for wrong in ({}, {"weight_map": {"a": 1}}):
        index.write_text(json.dumps(wrong))
        assert "has no weight_map" in message(folder)
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    assert "wanted a plain file name" in message(folder)
    index.write_text("{")
    assert "index.json cannot be read" in message(folder)


def test_a_written_checkpoint_is_read_back(tmp_path: Path, folder: Path) -> None:
    out = tmp_path / "new" / "copy"
    weights = load_file(folder / "model.safetensors")
    with CheckpointWriter(out) as writer:
        writer.write_json("config.json", json.loads((folder / "config.json").read_text()))
        writer.write_text("note.txt", "é")
        writer.write_weights(weights)
        assert not out.exists()
    Checkpoint(out).check(MiniCPMConfig.from_pretrained(out))
    for name, array in weights.items():
        np.testing.assert_array_equal(Checkpoint(out).load(name).numpy(), array)
    assert [path.name for path in out.parent.iterdir()] == ["copy"]


def test_nothing_is_left_behind_when_writing_fails(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("x")):
        wanted = UsageError if isinstance(error, OSError) else type(error)
        with pytest.raises(wanted) as caught, CheckpointWriter(out) as writer:
            writer.write_text("half.txt", "half")
            raise error
        assert list(tmp_path.iterdir()) == []
        if wanted is UsageError:
            assert "No space left on device" in str(caught.value)
            assert "free some space" in str(caught.value)


def test_what_a_killed_writer_left_is_removed_and_a_folder_is_never_overwritten(
    tmp_path: Path,
) -> None:
    stale = tmp_path / ".out.partial"
    stale.mkdir()
    (stale / "half").write_text("half")
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.write_text("whole", "whole")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["whole"]
    assert not stale.exists()
    with pytest.raises(UsageError, match="exists already"), CheckpointWriter(tmp_path / "out"):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        CheckpointWriter(tmp_path / "file" / "out").__enter__()


def test_a_folder_that_appeared_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="cannot be written"), CheckpointWriter(out) as writer:
        writer.write_text("ours", "ours")
        out.mkdir()
        (out / "theirs").write_text("theirs")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["theirs"]
