"""``quantize``, ``inspect``, ``eval`` and ``verify`` as a user types them."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoints import write_tiny_checkpoint
from fd_minicpm41.cli import main
from fd_minicpm41.quantization.sidecar import read_sidecar
from fd_minicpm41.reference.checkpoint import Checkpoint

BOOK = Path(__file__).resolve().parent / "data/sense_and_sensibility.txt"
CALIB = ["--calib", str(BOOK), "--calib-windows", "3", "--calib-length", "96"]
PNG = b"\x89PNG\r\n\x1a\n"

Run = Callable[..., str]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("cli") / "tiny", seed=21)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command that must work; returns what it prints."""

    def run_command(*argv: object) -> str:
        assert main([str(word) for word in argv]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out

    return run_command


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command that must fail; returns the one line it says."""

    def run_command(*argv: object) -> str:
        assert main([str(word) for word in argv]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        return captured.err

    return run_command


def test_quantize_inspect_verify_eval(tmp_path: Path, source: Path, run: Run) -> None:
    out, chart = tmp_path / "out", tmp_path / "chart.png"
    made = ["--model", source, "--out", out, "--method", "wint2", "--group", 64, *CALIB]
    said = run("quantize", *made, "--bits-map", '{"down_proj": 4}', "--chart", chart)
    sidecar = read_sidecar(out)
    assert sidecar is not None and sidecar.algorithm == "gptq"
    assert f"wint2-mix by gptq, {sidecar.bits_per_weight} bits a weight" in said
    assert 2.25 < sidecar.bits_per_weight < 4.25
    assert {fmt.hadamard for fmt in sidecar.modules.values() if fmt.bits == 2} == {64}
    assert sidecar.calibration == sidecar.calibration | {"windows": 3, "tokens": 288}
    assert chart.read_bytes().startswith(PNG)

    table = run("inspect", "--model", out, "--chart", tmp_path / "again.png")
    assert "calibrated on 288 tokens of sense_and_sensibility.txt" in table
    line = next(line for line in table.splitlines() if line.startswith("down_proj"))
    assert line.split()[1:9] == ["2", "256", "x", "384", "4", "64", "-", "4.250"]
    assert "levels of 2 bits, in scales" in table and "levels of 4 bits" in table
    each = run("inspect", "--model", out, "--all")
    assert len([row for row in each.splitlines() if row.startswith("model.layers.")]) == 14
    values = json.loads(run("inspect", "--model", out, "--json"))
    assert values["bits_per_weight"] == sidecar.bits_per_weight
    counts = values["counts"]["model.layers.1.mlp.up_proj"]
    assert len(counts) == 4 and sum(counts) == 384 * 256

    assert "files and 14 modules are whole" in run("verify", "--model", out)
    assert f"made from {source}" in run("verify", "--model", out, "--source", source)

    question = ["--text", BOOK, "--windows", 2, "--length", 64]
    chart.unlink()
    said = run("eval", "--model", out, "--source", source, *question, "--chart", chart)
    assert "126 predictions over sense_and_sensibility.txt" in said
    assert "KL divergence" in said and "top-1 agreement" in said
    assert chart.read_bytes().startswith(PNG)
    values = json.loads(run("eval", "--model", out, "--source", source, *question, "--json"))
    assert values["kl"] > 0 and 0 < values["top1"] < 1 and len(values["layer_errors"]) == 2
    alone = json.loads(run("eval", "--model", source, *question, "--json"))
    assert alone["perplexity"] == pytest.approx(values["source_perplexity"])
    assert alone.keys() == {"num_tokens", "perplexity"}
    fp8 = ["--model", source, "--source", source, "--simulate", "fp8", *question]
    assert 0 < json.loads(run("eval", *fp8, "--json"))["kl"] < values["kl"] / 5


def test_generate_reads_a_low_bit_folder(tmp_path: Path, source: Path, run: Run) -> None:
    """The same words as from a checkpoint that holds the dequantised weights in fp32."""
    out, plain = tmp_path / "out", tmp_path / "plain"
    run("quantize", "--model", source, "--out", out, "--method", "w4a8", "--embedding", "int8")
    write_tiny_checkpoint(plain, dtype="float32")
    checkpoint = Checkpoint(out)
    save_file(
        {name: checkpoint.load(name).numpy() for name in checkpoint.shapes},
        plain / "model.safetensors",
    )
    command = ["--prompt", "the thinker", "--max-tokens", 12, "--json"]
    low_bit, full = (
        json.loads(run("generate", "--model", folder, *command)) for folder in (out, plain)
    )
    assert low_bit["token_ids"] == full["token_ids"]


@pytest.mark.parametrize(
    ("method", "more", "algorithm"),
    [("wint8", [], "rtn"), ("wint4", [], "rtn"), ("w4afp8", CALIB, "gptq")],
)
def test_the_algorithm_that_is_chosen(
    tmp_path: Path, source: Path, run: Run, method: str, more: list[str], algorithm: str
) -> None:
    said = run("quantize", "--model", source, "--out", tmp_path / "out", "--method", method, *more)
    assert f"{method} by {algorithm}, " in said


def test_ternary_weights_are_noticed(tmp_path: Path, source: Path, run: Run) -> None:
    folder = write_tiny_checkpoint(tmp_path / "ternary", seed=21)
    held = load_file(folder / "model.safetensors")
    for name, array in held.items():
        if name.endswith("_proj.weight"):
            held[name] = np.sign(array) * np.array(0.0625, array.dtype)
    save_file(held, folder / "model.safetensors")
    said = run("quantize", "--model", folder, "--out", tmp_path / "out", "--method", "wint2")
    assert "wint2 by ternary, 2.125 bits" in said
    run("verify", "--model", tmp_path / "out", "--source", folder)
    levels = run("inspect", "--model", tmp_path / "out")
    assert "          -1  50." in levels or "          -1  49." in levels


def test_bits_map_from_a_file(tmp_path: Path, source: Path, run: Run) -> None:
    path = tmp_path / "bits.json"
    path.write_text('{"*": 16, "o_proj": 4}')
    out = tmp_path / "out"
    run("quantize", "--model", source, "--out", out, "--method", "wint8", "--bits-map", path)
    sidecar = read_sidecar(out)
    assert sidecar is not None and {name.split(".")[-1] for name in sidecar.modules} == {"o_proj"}


def test_bad_input_is_one_line(tmp_path: Path, source: Path, refuse: Run) -> None:
    out = tmp_path / "out"
    made = ["quantize", "--model", source, "--out", out, "--method"]
    short = tmp_path / "short.txt"
    short.write_text("the")
    for argv, said in (
        ([*made, "wint2"], "2 bits without calibration destroy a model"),
        ([*made, "wint3"], "invalid choice: 'wint3'"),
        ([*made, "fp8"], "serve the bf16 checkpoint with --quantization fp8"),
        ([*made, "wint8", *CALIB], "wint8 needs no calibration"),
        ([*made, "wint4", "--calib", short], "give a longer text"),
        ([*made, "wint4", "--group", 96], "group is 96"),
        ([*made, "wint4", "--bits-map", "{"], "--bits-map cannot be read"),
        ([*made, "wint4", "--bits-map", tmp_path / "no.json"], "--bits-map cannot be read"),
        ([*made, "wint4", "--device", "gpu"], "--device is gpu, but Paddle sees none"),
        (["quantize", "--model", tmp_path / "no", *made[3:], "wint4"], "does not exist"),
        (["inspect", "--model", source], "has no fdm_quant.json"),
        (["verify", "--model", source], "has no fdm_quant.json"),
        (["eval", "--model", source, "--text", short], "give a longer text"),
        (["eval", "--model", source, "--text", BOOK, "--chart", "x.png"], "give --source too"),
    ):
        line = refuse(*argv)
        assert said in line, line
        assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_a_chart_that_cannot_be_written(
    tmp_path: Path, source: Path, run: Run, refuse: Run
) -> None:
    out = tmp_path / "out"
    run("quantize", "--model", source, "--out", out, "--method", "wint4")
    said = refuse("inspect", "--model", out, "--chart", tmp_path / "no" / "chart.png")
    assert "chart.png cannot be written" in said


def test_progress_with_time_left_on_a_terminal(tmp_path: Path, source: Path) -> None:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    command = [sys.executable, "-W", "ignore", "-m", "fd_minicpm41.cli", "quantize"]
    command += ["--model", str(source), "--out", str(tmp_path / "out"), "--method", "wint2"]
    child = subprocess.Popen([*command, *CALIB], stderr=slave, stdout=subprocess.DEVNULL)
    os.close(slave)
    seen = b""
    with contextlib.suppress(OSError):  # the terminal is gone when the child is
        while chunk := os.read(master, 4096):
            seen += chunk
    os.close(master)
    assert child.wait() == 0
    bars = [bar for bar in re.split(r"[\r\n]", seen.decode()) if bar.startswith("quantising (")]
    assert any(re.search(r"\| \d+/14 \[\d\d:\d\d<\d\d:\d\d, ", bar) for bar in bars), bars


def test_a_chart_without_matplotlib(
    tmp_path: Path, source: Path, run: Run, refuse: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("quantize", "--model", source, "--out", tmp_path / "out", "--method", "wint4")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = refuse("inspect", "--model", tmp_path / "out", "--chart", tmp_path / "chart.png")
    assert "pip install 'fd-minicpm41[plot]'" in said
