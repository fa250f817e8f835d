"""What a request may ask of hybrid reasoning, checked before anything else is done with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fd_minicpm41.errors import UsageError
from fd_minicpm41.hybrid_reasoning.chat_template import message_text
from fd_minicpm41.hybrid_reasoning.mode import check_budget

TEMPLATE_ARGUMENTS = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "documents",
        "enable_thinking",
        "reasoning_effort",
        "thinking_budget",
        "tools",
    }
)
"""Names in ``chat_template_kwargs`` that mean something without a template's help."""


def _mapping(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    given = values.get(name)
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise UsageError(f"{name} is {given!r}, wanted an object of named values: correct it")
    return given


def _budgets(values: Mapping[str, Any]) -> list[int]:
    """The thinking budgets that a request gives, wherever it gives them."""
    processor = _mapping(values, "logits_processors_args")
    template = _mapping(values, "chat_template_kwargs")
    given = [
        check_budget("reasoning_max_tokens", values.get("reasoning_max_tokens")),
        check_budget("thinking_budget", values.get("thinking_budget")),
        check_budget("thinking_budget", processor.get("thinking_budget")),
        check_budget("thinking_budget", template.get("thinking_budget")),
    ]
    return [budget for budget in given if budget is not None]


def request_budget(values: Mapping[str, Any], default: int | None) -> int | None:
    """The smallest of a request's budgets, the server's default if it gives none."""
    return min(_budgets(values), default=default)


def check_request(values: Mapping[str, Any], template_arguments: Iterable[str] | None) -> None:
    """Refuses what cannot be done.

    Args:
        values: fields of the request as they came.
        template_arguments: further names that the chat template knows; ``None`` for any.

    Raises:
        UsageError: a bad budget, switch or tool choice, an unknown template argument, or a message
            that is not text.
    """
    _budgets(values)
    if "think_stop_sentence" in _mapping(values, "logits_processors_args"):
        raise UsageError(
            "think_stop_sentence is not a request's choice here: set "
            "FD_MINICPM41_CLOSING_SENTENCE for the server"
        )
    template = _mapping(values, "chat_template_kwargs")
    if template_arguments is not None:
        known = TEMPLATE_ARGUMENTS.union(template_arguments)
        unknown = sorted(str(name) for name in template if name not in known)
        if unknown:
            raise UsageError(
                f"chat_template_kwargs has {', '.join(unknown)}, wanted only "
                f"{', '.join(sorted(known))}: remove or rename it"
            )
    for switch in (template.get("enable_thinking"), values.get("enable_thinking")):
        if switch is not None and not isinstance(switch, bool):
            raise UsageError(f"enable_thinking is {switch!r}, wanted true or false: correct it")
    messages = values.get("messages")
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, Mapping):
            message_text(message.get("content"))
    choice = values.get("tool_choice")
    if choice not in (None, "none", "auto"):
        raise UsageError(
            f'tool_choice is {choice!r}, wanted "auto" or "none": the model cannot be made to call '
            "a tool, so ask for it in the prompt"
        )
