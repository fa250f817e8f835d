"""What the model writes around its thinking and its tool calls, and how thinking is limited."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fd_minicpm41.errors import UsageError

# No reply is longer, so a larger budget means the same as none and fits 32 bits everywhere.
MAX_BUDGET = 1 << 24

BUDGET_VARIABLE = "FD_MINICPM41_THINKING_BUDGET"
SENTENCE_VARIABLE = "FD_MINICPM41_CLOSING_SENTENCE"


def check_budget(name: str, value: Any) -> int | None:
    """A thinking budget in tokens, ``None`` for unlimited.

    Raises:
        UsageError: not a whole number of at least 0.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UsageError(
            f"{name} is {value!r}, wanted a whole number of tokens of at least 0: "
            "correct it, or leave it out for unlimited thinking"
        )
    return min(value, MAX_BUDGET)


@dataclass(frozen=True)
class ThinkMarkers:
    """The texts that open and close a block of thinking."""

    open: str
    close: str


@dataclass(frozen=True)
class HybridReasoningMode:
    """Everything that is a choice in hybrid reasoning; the defaults are MiniCPM4.1's.

    Args:
        markers: texts around thinking. The first pair is the model's own; the second is what the
            family writes before tool calls.
        call_open, call_close: texts around a fenced Python block of tool calls.
        budget: thinking tokens of a request that names none; ``None`` is unlimited.
        closing_sentence: said before thinking is ended by force; empty for nothing.
    """

    markers: tuple[ThinkMarkers, ...] = (
        ThinkMarkers("<think>", "</think>"),
        ThinkMarkers("<|thought_start|>", "<|thought_end|>"),
    )
    call_open: str = "<|tool_call_start|>"
    call_close: str = "<|tool_call_end|>"
    budget: int | None = None
    closing_sentence: str = ""

    def __post_init__(self) -> None:
        check_budget("budget", self.budget)
        texts = [text for pair in self.markers for text in (pair.open, pair.close)]
        if not self.markers or not all(text and text.isascii() for text in texts):
            raise UsageError(
                f"thinking markers are {texts!r}, wanted at least one pair of plain ASCII texts: "
                "leave them out to use the model's own"
            )
        if any(pair.close in self.closing_sentence for pair in self.markers):
            raise UsageError(
                f"closing_sentence is {self.closing_sentence!r}, wanted a text without an end "
                "marker: remove it, the marker is added by itself"
            )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> HybridReasoningMode:
        """The mode of a server: the defaults, changed by two environment variables."""
        values = os.environ if environment is None else environment
        text = values.get(BUDGET_VARIABLE, "").strip()
        if text and not text.isdecimal():
            check_budget(BUDGET_VARIABLE, text)
        return cls(
            budget=check_budget(BUDGET_VARIABLE, int(text)) if text else None,
            closing_sentence=values.get(SENTENCE_VARIABLE, ""),
        )
