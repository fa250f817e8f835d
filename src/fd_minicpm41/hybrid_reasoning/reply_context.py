"""How the data processor tells the parsers which reply a text belongs to.

FastDeploy has one reasoning parser for all requests and gives it texts without saying whose they
are or that they end. Where this package's data processor calls it, this says both.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field

from fd_minicpm41.hybrid_reasoning.mode import HybridReasoningMode
from fd_minicpm41.hybrid_reasoning.reply import ReplyDelta, ReplySplitter, Start


@dataclass
class Reply:
    """One reply on its way: its splitter and what the text at hand added."""

    tools: bool
    finished: bool = False
    splitter: ReplySplitter | None = None
    delta: ReplyDelta = field(default_factory=ReplyDelta)

    def feed(self, mode: HybridReasoningMode, start: Start, text: str) -> ReplyDelta:
        """Splits the next text."""
        if self.splitter is None:
            self.splitter = ReplySplitter(mode, start=start, tools=self.tools)
        self.delta = self.splitter.feed(text, self.finished)
        return self.delta


current_reply: ContextVar[Reply | None] = ContextVar("current_reply", default=None)
