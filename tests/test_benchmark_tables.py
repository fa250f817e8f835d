"""The tables of docs/benchmarks.md are what the results say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import write_tables as tables

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", tables.TABLES)
def test_each_table_is_made_from_the_committed_results(name: str) -> None:
    page = tables.PAGE.read_text()
    found = re.findall(f"<!-- table {name} -->\\n(.*?)\\n<!-- end of table -->", page, re.DOTALL)
    try:
        made = tables.TABLES[name]()
    except FileNotFoundError as error:
        pytest.skip(f"{Path(error.filename).relative_to(ROOT)} is not there yet")
    assert found == [made], "run python benchmarks/write_tables.py"
