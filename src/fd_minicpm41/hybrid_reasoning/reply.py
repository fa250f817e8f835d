"""A reply's text taken apart as it arrives: thinking, answer, tool calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fd_minicpm41.hybrid_reasoning.mode import HybridReasoningMode, ThinkMarkers
from fd_minicpm41.hybrid_reasoning.tool_calls import MAX_CODE_CHARS, ToolCall, parse_tool_calls

Start = Literal["auto", "open", "off"]
"""Where a reply starts: it may open thinking, the prompt has opened it, or there is none."""

_SPACE = " \t\r\n"


@dataclass(frozen=True)
class ReplyDelta:
    """What a piece of text adds to the reply.

    ``text`` is the content with the text of tool calls left in its place.
    """

    reasoning: str = ""
    content: str = ""
    text: str = ""
    calls: tuple[ToolCall, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.text or self.calls)


def _partial(text: str, marker: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of ``marker``."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0


class ReplySplitter:
    """Splits one reply, fed in any chunks, into thinking, content and tool calls.

    Blocks of thinking are recognised at the start of the reply, one or several with nothing but
    white space around them; once the answer has begun, a marker is only text. Thinking that is
    never closed stays thinking. White space before a block belongs to the thinking. Tool calls are
    looked for in the answer, if ``tools``; a block that is not a list of calls stays content. So,
    markers aside, reasoning and text together are the reply, character for character, and no
    chunking changes either.
    """

    def __init__(
        self, mode: HybridReasoningMode, *, start: Start = "auto", tools: bool = False
    ) -> None:
        self._mode = mode
        self._tools = tools
        self._held = ""
        self._call: list[str] = []
        self._call_chars = 0
        self.thought = False
        """Whether a block of thinking has been closed."""
        self._markers: ThinkMarkers = mode.markers[0]
        self._step = {"auto": self._head, "open": self._think, "off": self._answer}[start]

    @property
    def where(self) -> Literal["head", "think", "answer"]:
        """The part of the reply that the next character would belong to."""
        names = {self._head: "head", self._think: "think"}
        return names.get(self._step, "answer")  # type: ignore[return-value]

    def feed(self, text: str, finished: bool = False) -> ReplyDelta:
        """Takes the reply's next ``text``; ``finished`` says it is the last and frees the rest."""
        self._held += text
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._text: list[str] = []
        self._calls: list[ToolCall] = []
        while self._step(finished):
            pass
        return ReplyDelta(
            "".join(self._reasoning),
            "".join(self._content),
            "".join(self._text),
            tuple(self._calls),
        )

    def _say(self, text: str) -> None:
        self._content.append(text)
        self._text.append(text)

    # Each step returns whether another has work to do.

    def _head(self, finished: bool) -> bool:
        rest = self._held.lstrip(_SPACE)
        space = self._held[: len(self._held) - len(rest)]
        for markers in self._mode.markers:
            if rest.startswith(markers.open):
                self._reasoning.append(space)
                self._held = rest[len(markers.open) :]
                self._markers, self._step = markers, self._think
                return True
        if not finished and any(markers.open.startswith(rest) for markers in self._mode.markers):
            return False
        self._step = self._answer
        return True

    def _think(self, finished: bool) -> bool:
        before, marker, after = self._held.partition(self._markers.close)
        if marker:
            self._reasoning.append(before)
            self._held, self._step = after, self._head
            self.thought = True
            return True
        keep = 0 if finished else _partial(before, self._markers.close)
        self._reasoning.append(before[: len(before) - keep])
        self._held = before[len(before) - keep :]
        return False

    def _answer(self, finished: bool) -> bool:
        if not self._tools:
            self._say(self._held)
            self._held = ""
            return False
        before, marker, after = self._held.partition(self._mode.call_open)
        if marker:
            self._say(before)
            self._held, self._step = after, self._in_call
            self._call, self._call_chars = [], 0
            return True
        keep = 0 if finished else _partial(before, self._mode.call_open)
        self._say(before[: len(before) - keep])
        self._held = before[len(before) - keep :]
        return False

    def _in_call(self, finished: bool) -> bool:
        before, marker, after = self._held.partition(self._mode.call_close)
        keep = 0 if marker or finished else _partial(before, self._mode.call_close)
        room = MAX_CODE_CHARS - self._call_chars
        if len(before) - keep > room:
            # Too long for a call. The border depends on the text alone, never on its chunks.
            self._say(self._mode.call_open + "".join(self._call) + self._held[:room])
            self._held, self._step = self._held[room:], self._answer
            return True
        self._call.append(before[: len(before) - keep])
        self._call_chars += len(before) - keep
        self._held = after if marker else before[len(before) - keep :]
        if not (marker or finished):
            return False
        code = "".join(self._call)
        calls = parse_tool_calls(code, closed=bool(marker))
        raw = self._mode.call_open + code + marker
        if calls:
            self._calls.extend(calls)
            self._text.append(raw)
        else:
            self._say(raw)
        self._step = self._answer
        return bool(self._held)
