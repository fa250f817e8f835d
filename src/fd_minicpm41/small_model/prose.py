"""Prose that the small model was not trained on: Joseph Conrad, Heart of Darkness (1899).

The author died in 1924: the text is in the public domain. It is cut once: low-bit weights are
calibrated on the first part, and every score is taken on the second.
"""

from __future__ import annotations

from functools import cache
from importlib import resources

FILE = "data/heart_of_darkness.txt"
CALIBRATION_SHARE = 0.2
# Headings have a few words.
LEAST_CHARACTERS = 40


def split_paragraphs(text: str) -> list[str]:
    """The paragraphs of a book as one line each, without its headings."""
    parts = text.replace("\r\n", "\n").split("\n\n")
    lines = (" ".join(part.split()) for part in parts)
    return [line for line in lines if len(line) > LEAST_CHARACTERS]


@cache
def _paragraphs() -> tuple[str, ...]:
    text = resources.files("fd_minicpm41").joinpath(FILE).read_text("utf-8-sig")
    return tuple(split_paragraphs(text))


def _cut() -> int:
    paragraphs = _paragraphs()
    room = CALIBRATION_SHARE * sum(map(len, paragraphs))
    for number, paragraph in enumerate(paragraphs):
        room -= len(paragraph)
        if room <= 0:
            return number + 1
    return len(paragraphs)


def calibration_paragraphs() -> tuple[str, ...]:
    """What low-bit weights may be calibrated on; each paragraph is one line."""
    return _paragraphs()[: _cut()]


def examination_paragraphs() -> tuple[str, ...]:
    """What scores are taken on."""
    return _paragraphs()[_cut() :]
