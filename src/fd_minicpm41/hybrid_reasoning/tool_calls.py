"""Tool calls as the MiniCPM family writes them: Python calls with literal keyword arguments.

Nothing is ever executed. The grammar below admits calls of plain names and literals only; a single
string or number is read by :func:`ast.literal_eval`, everything around it by this parser, so that
no text can nest deeper, grow larger or reach further than the limits here allow.
"""

from __future__ import annotations

import ast
import json
import re
import uuid
import warnings
from dataclasses import dataclass, field
from typing import Any

MAX_CODE_CHARS = 1 << 18
MAX_CALLS = 128
MAX_DEPTH = 32
MAX_NUMBER_CHARS = 320

# Skipped on its own: were it part of _TOKEN, a failed match would back up into a comment.
_SKIP = re.compile(r"(?:\s+|\#[^\n]*|\\\n)*")
_TOKEN = re.compile(
    r"""
      (?P<string>[rRuU]?(?:\'\'\'[^'\\]*(?:(?:\\.|'(?!''))[^'\\]*)*\'\'\'
        |\"\"\"[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*\"\"\"
        |(?!\'\'\')'[^'\\\n]*(?:\\.[^'\\\n]*)*'
        |(?!\"\"\")"[^"\\\n]*(?:\\.[^"\\\n]*)*"))
      |(?P<number>[0-9][0-9A-Za-z_.]*(?:(?<=[eE])[+-][0-9]+)?|\.[0-9][0-9eE]*)
      |(?P<name>[^\W\d]\w*)
      |(?P<mark>\*\*|[()\[\]{}:,;=+-])
      |(?P<end>\Z)
    """,
    re.VERBOSE | re.DOTALL,
)
_CONSTANTS = {
    "True": True,
    "False": False,
    "None": None,
    "true": True,
    "false": False,
    "null": None,
}
_LANGUAGES = ("python", "py", "tool_code")


class _Invalid(ValueError):
    """The text is not a list of calls with literal arguments."""


@dataclass(frozen=True)
class ToolCall:
    """One call; ``arguments`` is a JSON object as text, which is how OpenAI's interface has it."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}", compare=False)


class _Parser:
    def __init__(self, code: str) -> None:
        self._code = code
        self._at = 0
        self._advance()

    def _advance(self) -> None:
        skipped = _SKIP.match(self._code, self._at)
        assert skipped is not None
        self._new_line = "\n" in skipped.group()
        match = _TOKEN.match(self._code, skipped.end())
        if match is None:
            raise _Invalid
        self._at = match.end()
        self._kind = match.lastgroup or "end"
        self._text = match.group(self._kind)

    def _take(self, text: str) -> bool:
        if self._kind == "mark" and self._text == text:
            self._advance()
            return True
        return False

    def _expect(self, text: str) -> None:
        if not self._take(text):
            raise _Invalid

    def calls(self) -> list[tuple[str, dict[str, Any]]]:
        """The whole text: calls on lines of their own, or in one list."""
        found: list[tuple[str, dict[str, Any]]] = []
        listed = self._take("[")
        while self._kind == "name":
            if len(found) == MAX_CALLS:
                raise _Invalid
            found.append(self._call())
            if not (self._take(",") or (not listed and (self._take(";") or self._new_line))):
                break
        if listed:
            self._expect("]")
        if self._kind != "end":
            raise _Invalid
        return found

    def _call(self) -> tuple[str, dict[str, Any]]:
        name = self._text
        self._advance()
        self._expect("(")
        arguments: dict[str, Any] = {}
        while not self._take(")"):
            if self._take("**"):
                given = self._value(1)
                if not isinstance(given, dict):
                    raise _Invalid
            elif self._kind == "name":
                # A Python keyword is a usual name for a parameter: from, class, in.
                key = self._text
                self._advance()
                self._expect("=")
                given = {key: self._value(1)}
            else:
                raise _Invalid
            if arguments.keys() & given.keys():
                raise _Invalid
            arguments |= given
            if not self._take(","):
                self._expect(")")
                break
        return name, arguments

    def _literal(self) -> Any:
        if self._kind == "number" and len(self._text) > MAX_NUMBER_CHARS:
            raise _Invalid
        with warnings.catch_warnings():
            # "\d" and the like: Python warns, the model means the two characters.
            warnings.simplefilter("ignore")
            value = ast.literal_eval(self._text)
        if not isinstance(value, (str, int, float)):
            raise _Invalid
        self._advance()
        return value

    def _value(self, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise _Invalid
        if self._kind == "string":
            parts = []
            while self._kind == "string":
                parts.append(self._literal())
            return "".join(parts)
        if self._kind == "name":
            if self._text not in _CONSTANTS:
                raise _Invalid
            value = _CONSTANTS[self._text]
            self._advance()
            return value
        if self._kind == "mark" and self._text in "+-":
            negative = self._text == "-"
            self._advance()
            if self._kind != "number":
                raise _Invalid
            number = self._literal()
            return -number if negative else number
        if self._kind == "number":
            return self._literal()
        if self._take("["):
            return self._items("]", depth)
        if self._take("("):
            return self._items(")", depth)
        if self._take("{"):
            return self._pairs(depth)
        raise _Invalid

    def _items(self, end: str, depth: int) -> Any:
        items: list[Any] = []
        comma = False
        while not self._take(end):
            items.append(self._value(depth + 1))
            comma = self._take(",")
            if not comma:
                self._expect(end)
                break
        # As in Python, (1) is a number and (1,) a tuple.
        return items[0] if end == ")" and len(items) == 1 and not comma else items

    def _pairs(self, depth: int) -> dict[str, Any]:
        pairs: dict[str, Any] = {}
        while not self._take("}"):
            key = self._value(depth + 1)
            if not isinstance(key, str):
                raise _Invalid
            self._expect(":")
            pairs[key] = self._value(depth + 1)
            if not self._take(","):
                self._expect("}")
                break
        return pairs


def _unfence(text: str) -> tuple[str, bool]:
    """The text within a Markdown fence, if there is one, and whether a fence was closed."""
    body = text.strip()
    if not body.startswith("```"):
        return text, False
    body = body[3:]
    closed = body.endswith("```")
    body = body.removesuffix("```")
    for language in _LANGUAGES:
        if body.startswith(language) and body[len(language) :][:1].isspace():
            return body[len(language) :], closed
    return body, closed


def parse_tool_calls(text: str, *, closed: bool = True) -> tuple[ToolCall, ...]:
    """The calls in the text between the family's tool-call markers; none if it is anything else.

    Args:
        text: calls, with or without a Markdown fence around them.
        closed: the end marker was seen. Without it only a closed fence tells that all is there.
    """
    if len(text) > MAX_CODE_CHARS:
        return ()
    code, complete = _unfence(text)
    if not (closed or complete):
        return ()
    try:
        found = _Parser(code).calls()
        calls = tuple(
            ToolCall(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False))
            for name, arguments in found
        )
        for call in calls:
            # A lone surrogate could not be sent.
            (call.name + call.arguments).encode("utf-8")
    except (ValueError, SyntaxError):
        return ()
    return calls


def render_tool_call(name: str, arguments: dict[str, Any]) -> str:
    """The call as the model would have written it; :func:`parse_tool_calls` reads it back."""
    plain = {k: v for k, v in arguments.items() if k.isidentifier()}
    other = {k: v for k, v in arguments.items() if not k.isidentifier()}
    given = [f"{key}={value!r}" for key, value in plain.items()]
    if other:
        given.append(f"**{other!r}")
    return f"{name}({', '.join(given)})"
