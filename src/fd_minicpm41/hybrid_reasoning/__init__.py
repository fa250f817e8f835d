"""Hybrid reasoning: thinking switched, limited and split from the answer; tool calls.

Importing it imports neither Paddle nor FastDeploy; only the processor and the two parsers, which
FastDeploy asks for, are made of its classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fd_minicpm41.hybrid_reasoning.mode import HybridReasoningMode, ThinkMarkers, check_budget
from fd_minicpm41.hybrid_reasoning.reply import ReplyDelta, ReplySplitter
from fd_minicpm41.hybrid_reasoning.tool_calls import ToolCall, parse_tool_calls, render_tool_call

__all__ = [
    "HybridReasoningMode",
    "ReplyDelta",
    "ReplySplitter",
    "ThinkMarkers",
    "ToolCall",
    "check_budget",
    "parse_tool_calls",
    "render_tool_call",
]


def register_reasoning_parser() -> None:
    """Entry point of ``fastdeploy.reasoning_parser_plugins``."""
    from fastdeploy.reasoning import ReasoningParserManager

    from fd_minicpm41.hybrid_reasoning.reasoning_parser import MiniCPM41ReasoningParser

    ReasoningParserManager.register_module("minicpm41", module=MiniCPM41ReasoningParser)


def register_tool_parser() -> None:
    """Entry point of ``fastdeploy.tool_parser_plugins``."""
    from fastdeploy.entrypoints.openai.tool_parsers import ToolParserManager

    from fd_minicpm41.fastdeploy_hooks import extend_requests
    from fd_minicpm41.hybrid_reasoning.tool_parser import MiniCPM41ToolParser

    extend_requests()
    ToolParserManager.register_module("minicpm41", module=MiniCPM41ToolParser)


def input_processor() -> Callable[..., Any]:
    """Entry point of ``fastdeploy.input_processor_plugins``: makes the data processor."""
    from fd_minicpm41.hybrid_reasoning.processor import create_processor

    return create_processor
