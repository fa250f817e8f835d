"""What a cell of the suite comes to: one JSON object a cell, and the questions put to all of them.

A row says what was measured (``task``, ``engine``, ``attention``, ``weights`` and the task's own
sizes) and what came of it. Standard library alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

from fd_minicpm41.small_model.tasks import Prompt, Question

DEPTHS = 10
WEIGHTS = ("bf16", "wint8", "wint4", "wint2", "w4a8", "w4afp8", "fp8")
EngineName = Literal["reference", "ops", "fastdeploy"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)
AttentionName = Literal["dense", "sparse"]
ATTENTIONS: tuple[AttentionName, ...] = get_args(AttentionName)

Row = dict[str, Any]


def retrieval_score(questions: Sequence[Question], replies: Sequence[str]) -> Row:
    """Right answers in all, by kind of fact and by tenth of the document."""
    verdicts = [q.check(text) for q, text in zip(questions, replies, strict=True)]
    depths = [[0, 0] for _ in range(DEPTHS)]
    kinds: dict[str, list[int]] = {}
    for question, verdict in zip(questions, verdicts, strict=True):
        tenth = depths[min(DEPTHS - 1, int(question.depth * DEPTHS))]
        for counts in (tenth, kinds.setdefault(question.kind, [0, 0])):
            counts[0] += verdict.answer_ok
            counts[1] += 1
    return {
        "questions": len(questions),
        "right": sum(v.answer_ok for v in verdicts),
        "well_formed": sum(v.format_ok for v in verdicts),
        "kinds": dict(sorted(kinds.items())),
        "depths": depths,
    }


def format_score(prompts: Sequence[Prompt], replies: Sequence[str]) -> Row:
    """Replies of the wanted form, and right answers among all."""
    verdicts = [p.check(text) for p, text in zip(prompts, replies, strict=True)]
    return {
        "prompts": len(prompts),
        "well_formed": sum(v.format_ok for v in verdicts),
        "right": sum(v.answer_ok for v in verdicts),
    }


def share(row: Row, what: str = "right") -> float:
    """The share of a row's questions or prompts that are ``what``."""
    return row[what] / (row["questions"] if "questions" in row else row["prompts"])


def find(rows: Iterable[Row], **wanted: Any) -> Row | None:
    """The row with these values; the last one if there are several."""
    found = None
    for row in rows:
        if all(row.get(key) == value for key, value in wanted.items()):
            found = row
    return found
