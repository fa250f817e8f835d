"""``eval --suite small --engine fastdeploy``: the suite asks an unmodified FastDeploy server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from checkpoints import SMALL_SPARSE_CONFIG, write_tiny_checkpoint
from fd_minicpm41.cli import main
from fd_minicpm41.reference.tokenizer import Tokenizer
from fd_minicpm41.small_model.engines import ServerEngine
from host.greedy import expected_tokens, random_prompt
from host.host import missing_host, server

MISSING = missing_host()
pytestmark = [
    pytest.mark.host,
    pytest.mark.slow,
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
]


def test_the_suite_reads_a_servers_own_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_tiny_checkpoint(
        tmp_path / "tiny",
        hidden_size=1024,
        intermediate_size=512,
        sparse_config=SMALL_SPARSE_CONFIG,
    )
    arguments = ["--max-model-len", "1024", "--max-num-seqs", "4"]
    with server(checkpoint, tmp_path / "logs", arguments) as started:
        stop_ids = Tokenizer(checkpoint).stop_ids
        engine = ServerEngine(started.url, stop_ids)
        prompt = random_prompt(300)
        replies = engine.answer(prompt[:290], [prompt[290:], prompt[290:295]], 12, lambda _: None)
        for reply, asked in zip(replies, (prompt, prompt[:295]), strict=True):
            # FastDeploy puts a stop token in the place of the last token of a reply that it cut.
            wanted = expected_tokens(checkpoint, asked, 11, attention="infllmv2")
            assert reply == [token for token in wanted if token not in stop_ids]

        command = ["eval", "--suite", "small", "--model", str(checkpoint), "--json"]
        command += ["--dir", str(tmp_path / "results"), "--engine", "fastdeploy"]
        command += ["--url", started.url, "--attention", "sparse", "--weights", "bf16"]
        assert main([*command, "--lengths", "320", "--questions", "2", "--prompts", "1"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["task"] for row in rows] == ["retrieval", "format", "format", "format"]
    assert {row["engine"] for row in rows} == {"fastdeploy"}
