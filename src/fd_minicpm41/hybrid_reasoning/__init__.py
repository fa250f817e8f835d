"""Hybrid reasoning: thinking switched, limited and split from the answer; tool calls.

Everything here but ``host`` is free of FastDeploy, and importing it imports neither Paddle nor
FastDeploy.
"""

from __future__ import annotations

from fd_minicpm41.hybrid_reasoning.mode import HybridReasoningMode, ThinkMarkers, check_budget
from fd_minicpm41.hybrid_reasoning.reply import ReplyDelta, ReplySplitter
from fd_minicpm41.hybrid_reasoning.tool_parser import ToolCall, parse_tool_calls, render_tool_call

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
