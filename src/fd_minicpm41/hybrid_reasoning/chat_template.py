"""Messages made ready for the chat template, the thinking switch, the template and the one BOS."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

from fd_minicpm41.errors import UsageError
from fd_minicpm41.hybrid_reasoning.mode import HybridReasoningMode
from fd_minicpm41.hybrid_reasoning.reply import ReplySplitter
from fd_minicpm41.hybrid_reasoning.tool_calls import render_tool_call

Message = dict[str, Any]

# A word of its own: neither the end marker nor a path.
_SWITCH = re.compile(r"(?<![\w<./])/(no_)?think\b(?!>)")


@cache
def bundled_template() -> str:
    """This package's chat template: ChatML with the thinking switch and a tools section."""
    return resources.files("fd_minicpm41").joinpath("data/chat_template.jinja").read_text("utf-8")


def message_text(content: Any) -> str:
    """A message's content, which may be absent or a list of text parts, as one string."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    raise UsageError(
        f"content of a message is {type(content).__name__}, wanted a string or a list of text "
        "parts: this model reads text only"
    )


def without_reasoning(content: str, mode: HybridReasoningMode) -> str:
    """An earlier reply as the model was trained to see it: without its thinking."""
    delta = ReplySplitter(mode).feed(content, finished=True)
    return delta.text.lstrip("\n") if delta.text != content else content


def _with_calls(content: str, calls: Iterable[Mapping[str, Any]], mode: HybridReasoningMode) -> str:
    lines = []
    for call in calls:
        function = call["function"]
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        lines.append(render_tool_call(function["name"], arguments))
    code = "\n".join(lines)
    block = f"{mode.call_open}\n```python\n{code}\n```\n{mode.call_close}"
    return f"{content}\n{block}" if content else block


def prepare_messages(
    messages: Sequence[Mapping[str, Any]], mode: HybridReasoningMode, *, write_calls: bool
) -> list[Message]:
    """Copies of the messages with plain text, no old thinking and no ``reasoning_content``.

    Args:
        write_calls: write earlier tool calls into the text, for a template that does not.
    """
    prepared = []
    for message in messages:
        copy = {k: v for k, v in message.items() if k != "reasoning_content"}
        copy["content"] = message_text(message.get("content"))
        if message.get("role") == "assistant":
            copy["content"] = without_reasoning(copy["content"], mode)
            if write_calls and copy.get("tool_calls"):
                copy["content"] = _with_calls(copy["content"], copy.pop("tool_calls"), mode)
        prepared.append(copy)
    return prepared


def prompt_switch(messages: Sequence[Mapping[str, Any]]) -> bool | None:
    """What the last user message says of thinking: the last of /think and /no_think in it."""
    for message in reversed(messages):
        if message.get("role") == "user":
            found = _SWITCH.findall(message_text(message.get("content")))
            return None if not found else found[-1] == ""
    return None


def tools_as_sent(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The tools without what FastDeploy's request model fills in: null for each field left out."""
    return [
        {**tool, "function": {k: v for k, v in tool["function"].items() if v is not None}}
        for tool in tools
    ]


def uses_tools(messages: Sequence[Mapping[str, Any]], tools: Any) -> bool:
    """Whether the conversation offers tools or has used any."""
    return bool(tools) or any(m.get("role") == "tool" or m.get("tool_calls") for m in messages)


def lacking(template: str | None, *, thinking: bool, tools: bool) -> str:
    """What a checkpoint's template cannot do for this conversation; empty if it can."""
    if not template:
        return "a chat template"
    if tools and "tools" not in template:
        return "a tools section"
    if not thinking and "enable_thinking" not in template:
        return "the enable_thinking switch"
    return ""


def with_one_bos(ids: Sequence[int], bos: int | None) -> list[int]:
    """The ids led by exactly one BOS, whatever a template or a tokenizer put there."""
    ids = list(ids)
    if bos is None:
        return ids
    first = next((i for i, token in enumerate(ids) if token != bos), len(ids))
    return [bos, *ids[first:]]
