"""The examination of the small model, cell by cell; a stopped run goes on where it was.

A cell is one task with one engine, one attention and one weight format. Its row is written to
``results.json`` as soon as it is known.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fd_minicpm41 import __version__
from fd_minicpm41.errors import UsageError
from fd_minicpm41.quantization.atomic import write_text
from fd_minicpm41.quantization.sidecar import hash_file, weight_files
from fd_minicpm41.reference.tokenizer import Tokenizer
from fd_minicpm41.small_model.engines import Engine, perplexity
from fd_minicpm41.small_model.examination import (
    ANSWER_TOKENS,
    FORMAT_KINDS,
    LENGTHS,
    REPLY_TOKENS,
    SEED,
    Document,
    ShortPrompt,
    make_documents,
    make_short_prompts,
    make_windows,
)
from fd_minicpm41.small_model.prose import examination_paragraphs
from fd_minicpm41.small_model.scores import (
    AttentionName,
    EngineName,
    Row,
    format_score,
    retrieval_score,
)
from fd_minicpm41.small_model.tasks import PromptKind

RESULTS = "results.json"
# A written token takes a pass over all weights, a read one a share of such a pass.
WRITTEN_COST = 10


@dataclass(frozen=True)
class Plan:
    """What is to be examined.

    Args:
        lengths: tokens of the documents.
        questions: in all, for each length.
        prompts: of each kind, for the formats of replies.
        kinds: which kinds.
        windows, window_length: of prose, for the perplexity.
    """

    engine: EngineName = "ops"
    attentions: tuple[AttentionName, ...] = ("dense", "sparse")
    weights: tuple[str, ...] = ("bf16",)
    lengths: tuple[int, ...] = LENGTHS
    questions: int = 16
    prompts: int = 16
    kinds: tuple[PromptKind, ...] = FORMAT_KINDS
    windows: int = 1
    window_length: int = 8192
    seed: int = SEED

    def cells(self, attention: AttentionName, weights: str) -> list[Row]:
        """The cells of one model, each as the head of its row."""
        head = {"engine": self.engine, "attention": attention, "weights": weights}
        rows: list[Row] = []
        sizes: Row
        if self.questions:
            for length in self.lengths:
                sizes = {"length": length, "questions": self.questions, "seed": self.seed}
                rows.append({"task": "retrieval", **head, **sizes})
        if self.windows and self.engine != "fastdeploy":
            sizes = {"length": self.window_length, "windows": self.windows}
            rows.append({"task": "perplexity", **head, **sizes})
        if self.prompts:
            for kind in self.kinds:
                sizes = {"kind": kind, "prompts": self.prompts, "seed": self.seed}
                rows.append({"task": "format", **head, **sizes})
        return rows


# Gives the engine of an attention and a weight format; asked only where a cell is to be done.
MakeEngine = Callable[[AttentionName, str], Engine]
# Told (cost done, cost of all cells).
OnProgress = Callable[[int, int], object]


@dataclass
class Results:
    """The rows of ``results.json``, kept for one model.

    Raises:
        UsageError: results of another model, or a file that cannot be read.
    """

    path: Path
    model: str
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path, model: str) -> Results:
        """The results in ``folder``, or none yet."""
        path = folder / RESULTS
        if not path.exists():
            return cls(path, model)
        try:
            values = json.loads(path.read_text("utf-8"))
            rows, held = list(values["rows"]), values["model"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{path} cannot be read ({error}): remove it, or give another --dir"
            ) from None
        if held != model:
            raise UsageError(
                f"{path} holds the results of another model (SHA-256 {str(held)[:16]}..., this one "
                f"has {model[:16]}...): give another --dir, or remove it"
            )
        return cls(path, model, rows)

    def done(self, cell: Row) -> Row | None:
        """The row of a cell, if it is there."""
        for row in self.rows:
            if all(row.get(key) == value for key, value in cell.items()):
                return row
        return None

    def add(self, row: Row) -> None:
        """Keeps a row and writes the file."""
        self.rows.append(row)
        made = {
            "package": __version__,
            "python": platform.python_version(),
            "processors": len(os.sched_getaffinity(0)),
            "date": datetime.date.today().isoformat(),
        }
        values = {"suite": "small", "model": self.model, "made": made}
        lines = ",\n    ".join(json.dumps(row) for row in self.rows)
        text = json.dumps(values, indent=2)[:-2] + f',\n  "rows": [\n    {lines}\n  ]\n}}\n'
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(text, self.path)
        except OSError as error:
            raise UsageError(
                f"{self.path} cannot be written ({error}): free some space or give another --dir"
            ) from None


class Examiner:
    """Holds the prompts of a plan, made once for all of its models."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.plan = plan
        self.tokenizer = Tokenizer(folder)
        self._documents: dict[int, list[Document]] = {}
        self._prompts: dict[str, list[ShortPrompt]] = {}

    def documents(self, length: int) -> list[Document]:
        """Of a length."""
        if length not in self._documents:
            self._documents[length] = make_documents(
                self.tokenizer,
                examination_paragraphs(),
                length,
                self.plan.questions,
                self.plan.seed,
            )
        return self._documents[length]

    def prompts(self, kind: PromptKind) -> list[ShortPrompt]:
        """Of a kind."""
        if kind not in self._prompts:
            self._prompts[kind] = make_short_prompts(
                self.tokenizer, kind, self.plan.prompts, self.plan.seed
            )
        return self._prompts[kind]

    def windows(self) -> list[list[int]]:
        """Of prose."""
        return make_windows(
            self.tokenizer, examination_paragraphs(), self.plan.window_length, self.plan.windows
        )

    def cost(self, cell: Row) -> int:
        """About how much work a cell is, in tokens read, if the replies are the wanted ones."""
        if cell["task"] == "perplexity":
            return cell["windows"] * cell["length"]
        if cell["task"] == "retrieval":
            return sum(
                len(d.shared)
                + sum(map(len, d.rests))
                + WRITTEN_COST * sum(len(self.tokenizer.encode(q.reply)) for q in d.questions)
                for d in self.documents(cell["length"])
            )
        return sum(
            len(p.ids) + WRITTEN_COST * len(self.tokenizer.encode(p.prompt.reply))
            for p in self.prompts(cell["kind"])
        )

    def examine(self, cell: Row, engine: Engine, on_cost: Callable[[int], object]) -> Row:
        """The row of a cell."""
        began = time.perf_counter()
        engine.blocks_read()
        result = {
            "retrieval": self._retrieve,
            "perplexity": self._read,
            "format": self._reply,
        }[cell["task"]](cell, engine, on_cost)
        share = engine.blocks_read()
        if share is not None:
            result["blocks_read"] = round(share, 4)
        return cell | result | {"seconds": round(time.perf_counter() - began, 1)}

    def _retrieve(self, cell: Row, engine: Engine, on_cost: Callable[[int], object]) -> Row:
        questions, replies = [], []
        for document in self.documents(cell["length"]):
            ids = engine.answer(document.shared, document.rests, ANSWER_TOKENS, _costs(on_cost))
            questions += document.questions
            replies += [self.tokenizer.decode(reply) for reply in ids]
        return retrieval_score(questions, replies)

    def _read(self, cell: Row, engine: Engine, on_cost: Callable[[int], object]) -> Row:
        total, tokens = 0.0, 0
        for window in self.windows():
            loss = engine.negative_log_likelihood(window, _costs(on_cost))
            assert loss is not None
            total += loss
            tokens += len(window) - 1
        return {"tokens": tokens, "perplexity": round(perplexity(total, tokens), 5)}

    def _reply(self, cell: Row, engine: Engine, on_cost: Callable[[int], object]) -> Row:
        prompts = self.prompts(cell["kind"])
        replies = []
        for prompt in prompts:
            (ids,) = engine.answer([], [prompt.ids], REPLY_TOKENS, _costs(on_cost))
            replies.append(self.tokenizer.decode(ids))
        return format_score([p.prompt for p in prompts], replies)


def _costs(on_cost: Callable[[int], object]) -> Callable[[int], object]:
    """Counts tokens that come one by one as written ones."""
    return lambda tokens: on_cost(WRITTEN_COST if tokens == 1 else tokens)


def run(
    folder: Path,
    plan: Plan,
    results: Results,
    make_engine: MakeEngine,
    on_progress: OnProgress,
    on_row: Callable[[Row], object],
) -> list[Row]:
    """Examines what is not in ``results`` yet; returns the rows of the plan, in its order.

    Args:
        folder: of the checkpoint, for its tokenizer.
        on_row: told each new row.
    """
    examiner = Examiner(folder, plan)
    models = [(attention, weights) for weights in plan.weights for attention in plan.attentions]
    cells = {model: plan.cells(*model) for model in models}
    waiting = {
        model: [(cell, examiner.cost(cell)) for cell in listed if results.done(cell) is None]
        for model, listed in cells.items()
    }
    done, total = 0, sum(cost for listed in waiting.values() for _, cost in listed)
    on_progress(0, total)
    for model, listed in waiting.items():
        if not listed:
            continue
        engine = make_engine(*model)
        for cell, cost in listed:
            so_far = 0

            def on_cost(amount: int, before: int = done, most: int = cost) -> None:
                nonlocal so_far
                so_far = min(so_far + amount, most)
                on_progress(before + so_far, total)

            row = examiner.examine(cell, engine, on_cost)
            results.add(row)
            on_row(row)
            done += cost
            on_progress(done, total)
    rows = [results.done(cell) for model in models for cell in cells[model]]
    return [row for row in rows if row is not None]


def model_digest(folder: Path) -> str:
    """SHA-256 of a checkpoint's weights, by which results are told apart."""
    digests: Sequence[Any] = [hash_file(path) for path in weight_files(folder)]
    return "+".join(digests)
