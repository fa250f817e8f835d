"""``eval --suite small``: its prompts, engines, scores, results and what it prints."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from checkpoints import SMALL_SPARSE_CONFIG, write_tiny_checkpoint
from fd_minicpm41.cli import main
from fd_minicpm41.errors import UsageError
from fd_minicpm41.quantization.plan import Recipe
from fd_minicpm41.quantization.quantise import quantise
from fd_minicpm41.reference.tokenizer import Tokenizer
from fd_minicpm41.small_model import examination, prose, report, scores, suite
from fd_minicpm41.small_model.engines import LocalEngine, ServerEngine
from fd_minicpm41.small_model.tasks import Prompt, Question, make_prompt
from fd_minicpm41.small_model.weights import calibration_windows, make_weights

PNG = b"\x89PNG\r\n\x1a\n"
PLAN = suite.Plan(
    engine="ops", lengths=(256, 512), questions=3, prompts=2, windows=1, window_length=320
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights with the small model's heads; it knows nothing, and knows it at once."""
    return write_tiny_checkpoint(
        tmp_path_factory.mktemp("suite") / "tiny",
        head_dim=128,
        sparse_config=SMALL_SPARSE_CONFIG,
        seed=3,
    )


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer(checkpoint)


def silent(*_: object) -> None:
    """Takes what is told of progress."""


# ---- prompts ----


def test_a_document_and_what_follows_it_are_the_whole_prompt(tokenizer: Tokenizer) -> None:
    paragraphs = prose.examination_paragraphs()
    documents = examination.make_documents(tokenizer, paragraphs, 2048, 9, seed=5)
    assert sum(len(d.questions) for d in documents) == 9
    for document in documents:
        text = tokenizer.decode(document.shared)
        assert 1800 < len(document.shared) < 2000
        for question, rest in zip(document.questions, document.rests, strict=True):
            assert question.answer in text
            assert question.question in tokenizer.decode(rest)
            reply = tokenizer.encode(question.reply)
            assert len(document.shared) + len(rest) + len(reply) <= 2048
            place = text.index(question.answer) / len(text)
            assert abs(place - question.depth) < 0.1


def test_prompts_are_drawn_by_their_seed_and_never_twice(tokenizer: Tokenizer) -> None:
    made = examination.make_short_prompts(tokenizer, "count", 30, seed=1)
    again = examination.make_short_prompts(tokenizer, "count", 30, seed=1)
    assert [p.ids for p in made] == [p.ids for p in again]
    assert len({tuple(p.ids) for p in made}) == 30
    other = examination.make_short_prompts(tokenizer, "count", 30, seed=2)
    assert {tuple(p.ids) for p in made} != {tuple(p.ids) for p in other}


def test_the_tools_of_a_call_stand_in_its_prompt() -> None:
    """The template of the package names them, in the order in which they are offered."""
    from fd_minicpm41.hybrid_reasoning.chat_template import bundled_template

    assert "tools" in bundled_template()
    prompt = make_prompt(Random(3), "tool_call", "held_out")
    assert prompt.tools


def test_scores_are_taken_on_prose_that_nothing_was_calibrated_on(tokenizer: Tokenizer) -> None:
    calibration, held = prose.calibration_paragraphs(), prose.examination_paragraphs()
    assert not set(calibration) & set(held)
    share = sum(map(len, calibration)) / sum(map(len, (*calibration, *held)))
    assert 0.19 < share < 0.25
    windows = calibration_windows(tokenizer, 2, 600)
    assert [len(w) for w in windows.windows] == [600, 600]
    text = "".join(tokenizer.decode(w) for w in windows.windows)
    assert not any(paragraph[:80] in text for paragraph in held)
    with pytest.raises(UsageError, match="wanted .* for 900 windows"):
        examination.make_windows(tokenizer, held, 1024, 900)


# ---- scores ----


def test_retrieval_is_counted_by_depth_and_kind() -> None:
    questions = [
        Question("?", "12345", "", 0.0, "pass_key"),
        Question("?", "54321", "", 0.999, "pass_key"),
        Question("?", "Emma Wood", "", 1.0, "key_value"),
    ]
    row = scores.retrieval_score(questions, ["It is 12345.", "11111", "12345 and Emma Wood"])
    assert row["right"] == 2 and row["questions"] == 3 and row["well_formed"] == 3
    assert row["kinds"] == {"key_value": [1, 1], "pass_key": [1, 2]}
    assert row["depths"][0] == [1, 1] and row["depths"][9] == [1, 2]
    assert scores.share(row) == pytest.approx(2 / 3)


def test_a_form_and_an_answer_are_counted_apart() -> None:
    prompts = [make_prompt(Random(n), "count", "held_out") for n in range(6)]
    replies = [p.reply for p in prompts]
    row = scores.format_score(prompts, replies)
    assert row == {"prompts": 6, "well_formed": 6, "right": 6}
    wrong = [r.replace("occurs", "is found") for r in replies]
    assert scores.format_score(prompts, wrong) == {"prompts": 6, "well_formed": 6, "right": 0}
    swapped = [_turned(p) for p in prompts]
    assert scores.format_score(prompts, swapped)["well_formed"] == 0


def _turned(prompt: Prompt) -> str:
    """The right answer with thinking where none was asked for, and the other way round."""
    return prompt.answer if prompt.thinks else f"<think>\nhm\n</think>\n{prompt.answer}"


# ---- engines ----


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_the_ops_say_what_the_reference_says(checkpoint: Path, attention: Any) -> None:
    """The loss over a window is a mean of many rows: bf16 caches move it by far less than 1 %."""
    rng = np.random.default_rng(1)
    window = [int(i) for i in rng.integers(3, 250, 400)]
    losses, shares = [], []
    for name in ("reference", "ops"):
        engine = LocalEngine(checkpoint, name, attention)  # type: ignore[arg-type]
        losses.append(engine.negative_log_likelihood(window, silent))
        engine.answer(window[:300], [window[300:330], window[330:350]], 4, silent)
        shares.append(engine.blocks_read())
        assert engine.blocks_read() is None
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    assert shares[0] == shares[1]
    assert (shares[0] is None) == (attention == "dense")


@pytest.mark.parametrize("name", ["reference", "ops"])
@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_a_shared_document_changes_no_reply(checkpoint: Path, name: Any, attention: Any) -> None:
    rng = np.random.default_rng(2)
    shared = [int(i) for i in rng.integers(3, 250, 391)]
    rests = [[int(i) for i in rng.integers(3, 250, count)] for count in (5, 90, 1)]
    engine = LocalEngine(checkpoint, name, attention)
    together = engine.answer(shared, rests, 6, silent)
    apart = [engine.answer([], [shared + rest], 6, silent)[0] for rest in rests]
    assert together == apart
    assert len({tuple(reply) for reply in together}) == len(rests)


@pytest.mark.parametrize("method", ["wint8", "wint4"])
def test_the_ops_multiply_by_the_codes(
    checkpoint: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fd_minicpm41 import ops

    calls: list[int] = []
    real = ops.low_bit_linear

    def counted(x: Any, *rest: Any) -> Any:
        calls.append(x.shape[0])
        return real(x, *rest)

    monkeypatch.setattr(ops, "low_bit_linear", counted)
    folder = tmp_path / method
    quantise(checkpoint, folder, Recipe(method, "rtn"))
    window = [int(i) for i in np.random.default_rng(4).integers(3, 250, 300)]
    losses = [
        LocalEngine(folder, name, "sparse").negative_log_likelihood(window, silent)  # type: ignore[arg-type]
        for name in ("reference", "ops")
    ]
    assert calls == [300] * 14  # two layers of seven
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


def test_sparse_attention_without_its_parameters_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "plain", head_dim=128)
    with pytest.raises(UsageError, match="no sparse_config.*--attention dense"):
        LocalEngine(folder, "ops", "sparse")


class Knowing:
    """An engine that was told the replies; of every third one it forgets the end."""

    def __init__(self, tokenizer: Tokenizer, plan: suite.Plan) -> None:
        self.asked = 0
        self.replies: dict[tuple[int, ...], list[int]] = {}
        examiner = suite.Examiner.__new__(suite.Examiner)
        examiner.plan, examiner.tokenizer = plan, tokenizer
        examiner._documents, examiner._prompts = {}, {}
        for length in plan.lengths:
            for d in examiner.documents(length):
                for rest, question in zip(d.rests, d.questions, strict=True):
                    self.replies[(*d.shared, *rest)] = tokenizer.encode(question.reply)[1:]
        for kind in plan.kinds:
            for p in examiner.prompts(kind):
                self.replies[tuple(p.ids)] = tokenizer.encode(p.prompt.reply)[1:]

    def answer(
        self,
        shared: Sequence[int],
        rests: Sequence[Sequence[int]],
        max_tokens: int,
        on_tokens: Callable[[int], object],
    ) -> list[list[int]]:
        replies = []
        for rest in rests:
            reply = self.replies[(*shared, *rest)]
            self.asked += 1
            replies.append(reply if self.asked % 3 else reply[: len(reply) // 2])
            on_tokens(len(shared) + len(rest) + len(reply))
        return replies

    def negative_log_likelihood(self, window: Sequence[int], on_tokens: Any) -> float:
        return 2.0 * (len(window) - 1)

    def blocks_read(self) -> float | None:
        return 0.25


def run_plan(
    checkpoint: Path, folder: Path, plan: suite.Plan, make: Any, on_row: Any = silent
) -> tuple[list[scores.Row], list[tuple[int, int]]]:
    told: list[tuple[int, int]] = []
    results = suite.Results.open(folder, suite.model_digest(checkpoint))
    rows = suite.run(checkpoint, plan, results, make, lambda *p: told.append(p), on_row)
    return rows, told


def test_every_cell_of_a_plan_is_scored(
    checkpoint: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    engine = Knowing(tokenizer, PLAN)
    rows, told = run_plan(checkpoint, tmp_path, PLAN, lambda *model: engine)
    assert len(rows) == 2 * (2 + 1 + 3)
    asked = [row for row in rows if row["task"] != "perplexity"]
    total = sum(row.get("questions", row.get("prompts")) for row in asked)
    assert engine.asked == total
    # A retrieved sentence ends with its value, a thought with its marker.
    assert sum(row["right"] for row in asked) == total - total // 3
    for row in rows:
        if row["task"] == "perplexity":
            assert row["perplexity"] == pytest.approx(np.exp(2.0), abs=1e-5)
            assert row["tokens"] == 319
    assert told[0][0] == 0 and told[-1][0] == told[-1][1]
    assert all(a[0] <= b[0] for a, b in zip(told, told[1:], strict=False))
    held = json.loads((tmp_path / "results.json").read_text())
    assert held["rows"] == rows and held["suite"] == "small"


def test_a_stopped_run_goes_on_where_it_was(
    checkpoint: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    engine = Knowing(tokenizer, PLAN)
    seen: list[scores.Row] = []

    def stop_after_four(row: scores.Row) -> None:
        seen.append(row)
        if len(seen) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_plan(checkpoint, tmp_path, PLAN, lambda *model: engine, stop_after_four)
    before = engine.asked
    asked_for: list[tuple[str, str]] = []

    def make(*model: str) -> Knowing:
        asked_for.append(model)  # type: ignore[arg-type]
        return engine

    rows, _ = run_plan(checkpoint, tmp_path, PLAN, make, seen.append)
    assert [*seen] == rows and len(rows) == 12
    assert engine.asked > before
    assert asked_for == [("dense", "bf16"), ("sparse", "bf16")]
    finished = engine.asked
    rows_again, _ = run_plan(checkpoint, tmp_path, PLAN, make)
    assert rows_again == rows and engine.asked == finished and len(asked_for) == 2


def test_results_of_another_model_are_not_mixed_in(checkpoint: Path, tmp_path: Path) -> None:
    results = suite.Results.open(tmp_path, "a" * 64)
    results.add({"task": "perplexity", "perplexity": 2.0})
    assert suite.Results.open(tmp_path, "a" * 64).rows == results.rows
    with pytest.raises(UsageError, match="another model.*another --dir"):
        suite.Results.open(tmp_path, "b" * 64)
    results.path.write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        suite.Results.open(tmp_path, "a" * 64)


def test_quantised_weights_are_made_once_for_a_source(checkpoint: Path, tmp_path: Path) -> None:
    first = make_weights(checkpoint, ["wint8"], tmp_path)["wint8"]
    written = (first / "fdm_quant.json").stat().st_mtime_ns
    assert make_weights(checkpoint, ["wint8"], tmp_path)["wint8"] == first
    assert (first / "fdm_quant.json").stat().st_mtime_ns == written
    other = write_tiny_checkpoint(tmp_path / "other", head_dim=128, seed=4)
    assert make_weights(other, ["wint8"], tmp_path)["wint8"] != first


# ---- a server ----


class Server(HTTPServer):
    """Answers ``/v1/completions`` with the tokens after the last of the prompt."""

    said: list[dict[str, Any]]
    status = 200
    body: dict[str, Any] | None = None


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.said.append(body | {"path": self.path})
        last = body["prompt"][-1]
        ids = [last + 1, last + 2, 2]
        content = self.server.body or {"choices": [{"completion_token_ids": ids}]}
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as started:
        started.said = []
        thread = threading.Thread(target=started.serve_forever)
        thread.start()
        yield started
        started.shutdown()
        thread.join()


def test_a_server_is_asked_for_greedy_token_ids(server: Server) -> None:
    engine = ServerEngine(f"http://127.0.0.1:{server.server_port}/v1/", frozenset({2}))
    counted: list[int] = []
    replies = engine.answer([5, 6], [[7], [8, 9]], 12, counted.append)
    assert replies == [[8, 9], [10, 11]]
    assert [s["prompt"] for s in server.said] == [[5, 6, 7], [5, 6, 8, 9]]
    for said in server.said:
        assert said["path"] == "/v1/completions" and said["max_tokens"] == 12
        assert said["temperature"] == 0 and said["return_token_ids"] is True
    assert counted == [2 + 1 + 2, 2 + 2]
    assert engine.blocks_read() is None
    assert engine.negative_log_likelihood([1, 2, 3], silent) is None


def test_a_server_that_cannot_answer_is_told_in_one_line(server: Server) -> None:
    engine = ServerEngine(f"http://127.0.0.1:{server.server_port}")
    server.body = {"choices": [{"text": "hello"}]}
    with pytest.raises(UsageError, match="without completion_token_ids"):
        engine.answer([], [[1]], 4, silent)
    server.status = 400
    with pytest.raises(UsageError, match=r"refuses a prompt of 1 tokens \(400.*max-model-len"):
        engine.answer([], [[1]], 4, silent)
    with pytest.raises(UsageError, match="gives no answer.*fastdeploy serve"):
        ServerEngine("http://127.0.0.1:9").answer([], [[1]], 4, silent)


# ---- the command ----


def test_the_command_prints_a_table_and_draws_heat_maps(
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Random weights never end a reply by themselves.
    monkeypatch.setattr(suite, "REPLY_TOKENS", 6)
    monkeypatch.setattr(suite, "ANSWER_TOKENS", 6)
    command = [*("eval", "--suite", "small", "--model", str(checkpoint)), "--dir", str(tmp_path)]
    command += ["--lengths", "300", "--questions", "2", "--prompts", "1", "--prose", "0"]
    command += ["--weights", "bf16", "fp8", "wint8"]
    assert main(command) == 0
    said = capsys.readouterr()
    assert said.err == ""
    lines = said.out.splitlines()
    head = " ".join(lines[0].split())
    assert head == "engine attention weights 300 blocks perplexity thinks no think calls"
    models = [line.split()[:3] for line in lines[1:7]]
    assert models == [
        ["ops", attention, weights]
        for weights in ("bf16", "fp8", "wint8")
        for attention in ("dense", "sparse")
    ]
    assert lines[2].split()[4].endswith("%") and lines[1].split()[4] == report.NOTHING
    assert (tmp_path / "retrieval_ops.png").read_bytes().startswith(PNG)

    assert main([*command, "--json"]) == 0  # all cells are there: it only prints
    values = json.loads(capsys.readouterr().out)
    assert len(values["rows"]) == 6 * 4
    held = json.loads((tmp_path / "results.json").read_text())
    assert held["rows"] == values["rows"] and held["model"] == values["model"]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("--engine ops", "--engine belongs to the suite: add --suite small"),
        ("--model x", "--text is missing: give it, or --suite small"),
        ("--suite small --text x", "--text does not go with --suite"),
        ("--suite small --source x", "--source does not go with --suite"),
        ("--suite small --questions -1", "--questions is -1, wanted 0 or more"),
        ("--suite small --engine fastdeploy --attention dense --weights bf16", "needs --url"),
        ("--suite small --engine fastdeploy --url http://x", "a server has one attention"),
        ("--suite small --url http://x", "--url does not go with --engine ops"),
        ("--suite small --model nowhere", "'nowhere' does not exist"),
    ],
)
def test_what_does_not_go_together_is_refused(
    words: str, wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", *words.split()]) == 2
    said = capsys.readouterr()
    assert wanted in said.err and said.err.count("\n") == 1


def test_a_length_beyond_the_context_is_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", "--suite", "small", "--model", str(checkpoint), "--dir", str(tmp_path)]
    assert main([*command, "--lengths", "65536"]) == 2
    assert "--lengths has 65536, wanted 256 to 65280" in capsys.readouterr().err
