"""The tables of docs/fidelity.md and its Chinese twin are what the results say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import write_fidelity as tables

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("language", tables.PAGES)
@pytest.mark.parametrize("name", tables.TABLES)
def test_each_table_is_made_from_the_committed_results(name: str, language: str) -> None:
    page = tables.PAGES[language].read_text("utf-8")
    found = re.findall(f"<!-- table {name} -->\\n(.*?)\\n?<!-- end of table -->", page, re.DOTALL)
    assert len(found) == 1
    try:
        made = tables.TABLES[name](tables.LANGUAGES[language])
    except FileNotFoundError as error:
        pytest.skip(f"{Path(error.filename).relative_to(ROOT)} is not there yet")
    assert found == [made], "run python benchmarks/write_fidelity.py"


def retrieval(length: int, right: int, **model: str) -> dict:
    head = {"engine": "ops", "attention": "dense", "weights": "bf16"} | model
    return {"task": "retrieval", "length": length, "questions": 200, "right": right} | head


def test_a_bar_is_told_by_the_worst_length() -> None:
    """Scores are shares of 200 questions, so one is half a point."""
    rows = [
        *(retrieval(8192, 200), retrieval(16384, 199)),
        *(retrieval(8192, 199, attention="sparse"), retrieval(16384, 196, attention="sparse")),
        *(
            retrieval(n, 198, engine="reference", attention=a)
            for n in (8192, 16384)
            for a in ("dense", "sparse")
        ),
        *(
            retrieval(n, 195, weights="wint8", attention=a)
            for n in (8192, 16384)
            for a in ("dense", "sparse")
        ),
    ]
    values = {name: value for name, _, value, *_ in tables.measured_bars(rows)}
    assert values["dense retrieval, worst length"] == pytest.approx(99.5)
    assert values["sparse below dense, worst length"] == pytest.approx(1.5)
    assert values["wint8 below bf16, worst length"] == pytest.approx(2.5)
    assert values["kernels from the reference, 8K and 16K"] == pytest.approx(1.0)
    assert values["wint4 below bf16, worst length"] is None
    assert values["thinking obeyed"] is None


def test_every_word_of_the_tables_has_its_chinese() -> None:
    for name, _, _, unit, _ in tables.measured_bars([]):
        assert tables.chinese(name) != name
        assert unit in ("", "%") or tables.chinese(unit) != unit


def test_what_the_page_says_of_kernels_and_the_reference_is_so() -> None:
    try:
        rows = tables.read("h100")["rows"]
    except FileNotFoundError as error:
        pytest.skip(f"{Path(error.filename).relative_to(ROOT)} is not there yet")
    found = {
        (r["engine"], r["attention"], r["length"]): r
        for r in rows
        if r["task"] == "retrieval" and r["weights"] == "bf16"
    }
    lengths = tables.lengths_of(rows)
    for length in lengths:
        for attention in ("dense", "sparse"):
            ops, reference = (found[e, attention, length] for e in ("ops", "reference"))
            for what in ("right", "kinds", "depths"):
                assert ops[what] == reference[what]
