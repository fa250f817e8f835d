"""FastDeploy's tool parser interface, for every signature from 2.5 on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastdeploy.entrypoints.openai.protocol import (
    DeltaFunctionCall,
    DeltaMessage,
    DeltaToolCall,
    ExtractedToolCallInformation,
    FunctionCall,
    ToolCall,
)
from fastdeploy.entrypoints.openai.tool_parsers import ToolParser

from fd_minicpm41.hybrid_reasoning.mode import HybridReasoningMode
from fd_minicpm41.hybrid_reasoning.reply import ReplySplitter
from fd_minicpm41.hybrid_reasoning.reply_context import current_reply

_UNKNOWN = object()


def tools_wanted(request: Any) -> bool:
    """Whether the reply to a request may call tools; a request that does not tell may."""
    tools = getattr(request, "tools", _UNKNOWN)
    return bool(tools) and getattr(request, "tool_choice", None) != "none"


class MiniCPM41ToolParser(ToolParser):
    """Finds the family's tool calls; FastDeploy makes one parser for each reply."""

    def __init__(self, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(tokenizer)
        self._mode = HybridReasoningMode.from_environment()
        self._splitter: ReplySplitter | None = None
        self._num_calls = 0

    def extract_tool_calls(
        self, model_output: str, request: Any = None, *_: Any, **__: Any
    ) -> ExtractedToolCallInformation:
        """The calls of a whole reply, and its text without them."""
        reply = current_reply.get()
        if reply is not None and reply.splitter is not None:
            delta = reply.delta
        else:
            splitter = ReplySplitter(self._mode, tools=tools_wanted(request))
            delta = splitter.feed(model_output or "", finished=True)
        calls = [
            ToolCall(id=call.id, function=FunctionCall(name=call.name, arguments=call.arguments))
            for call in delta.calls
        ]
        return ExtractedToolCallInformation(
            tools_called=bool(calls), tool_calls=calls, content=delta.content
        )

    def extract_tool_calls_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
        request: Any = None,
        *_: Any,
        **__: Any,
    ) -> DeltaMessage | None:
        """The calls that the next text completes, each whole: a part cannot be judged."""
        reply = current_reply.get()
        if reply is not None and reply.splitter is not None:
            delta, silent = reply.delta, not (reply.delta or reply.finished)
        else:
            if self._splitter is None:
                self._splitter = ReplySplitter(self._mode, tools=tools_wanted(request))
            # None would make FastDeploy drop the thinking that came with this text.
            delta, silent = self._splitter.feed(delta_text, finished=not delta_token_ids), False
        if silent:
            return None
        calls = [
            DeltaToolCall(
                index=self._num_calls + i,
                id=call.id,
                type="function",
                function=DeltaFunctionCall(name=call.name, arguments=call.arguments),
            )
            for i, call in enumerate(delta.calls)
        ]
        self._num_calls += len(calls)
        return DeltaMessage(content=delta.content, tool_calls=calls or None)
