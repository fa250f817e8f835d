"""What a request may ask, and what becomes of its messages, without FastDeploy."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from checkpoints import CHAT_TEMPLATE
from fd_minicpm41.errors import UsageError
from fd_minicpm41.hybrid_reasoning import HybridReasoningMode, parse_tool_calls
from fd_minicpm41.hybrid_reasoning.chat_template import (
    bundled_template,
    lacking,
    prepare_messages,
    prompt_switch,
    tools_as_sent,
    uses_tools,
    with_one_bos,
    without_reasoning,
)
from fd_minicpm41.hybrid_reasoning.mode import MAX_BUDGET
from fd_minicpm41.hybrid_reasoning.request import check_request, request_budget

MODE = HybridReasoningMode()
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}},
    }
]


def render(messages, **values):
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    values = {"add_generation_prompt": True} | values
    return environment.from_string(bundled_template()).render(messages=messages, **values)


def user(text):
    return {"role": "user", "content": text}


@pytest.mark.parametrize(
    ("text", "switch"),
    [
        ("Hello", None),
        ("Hello /think", True),
        ("Hello /no_think", False),
        ("/no_think\nHello", False),
        ("first /no_think then /think", True),
        ("see src/think or </think> or /thinking or /think>", None),
    ],
)
def test_switch_in_the_prompt(text, switch):
    assert prompt_switch([user(text)]) is switch
    assert prompt_switch([user(text), {"role": "assistant", "content": "/think"}]) is switch
    assert prompt_switch([user("/no_think"), user(text)]) is switch


def test_history_loses_its_thinking_and_nothing_else():
    messages = [
        user("<think>mine</think>"),
        {
            "role": "assistant",
            "content": "<think>\nold\n</think>\n\nYes.",
            "reasoning_content": "o",
        },
        {"role": "assistant", "content": "The tag is </think>."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None},
    ]
    kept = json.dumps(messages)
    prepared = prepare_messages(messages, MODE, write_calls=True)
    contents = [message["content"] for message in prepared]
    assert contents == ["<think>mine</think>", "Yes.", "The tag is </think>.", "ab", ""]
    assert not any("reasoning_content" in message for message in prepared)
    assert json.dumps(messages) == kept
    assert without_reasoning("  plain\n", MODE) == "  plain\n"


def test_earlier_calls_are_written_as_the_model_writes_them():
    calls = [{"function": {"name": "weather", "arguments": '{"city": "Paris", "in": null}'}}]
    message = {"role": "assistant", "content": "", "tool_calls": calls}
    (prepared,) = prepare_messages([message], MODE, write_calls=True)
    code = prepared["content"].removeprefix(MODE.call_open).removesuffix(MODE.call_close)
    (call,) = parse_tool_calls(code)
    assert json.loads(call.arguments) == {"city": "Paris", "in": None}
    assert "tool_calls" not in prepared
    (kept,) = prepare_messages([message], MODE, write_calls=False)
    assert kept["tool_calls"] == calls


def test_images_are_refused():
    with pytest.raises(UsageError, match="text only"):
        prepare_messages([user([{"type": "image_url", "image_url": {}}])], MODE, write_calls=True)


def test_bundled_template_is_the_checkpoints_where_that_suffices():
    messages = [{"role": "system", "content": "Be brief."}, user("Hi"), user("you")]
    environment = ImmutableSandboxedEnvironment()
    for values in ({"enable_thinking": True}, {"enable_thinking": False}, {}):
        values = {"add_generation_prompt": True} | values
        theirs = environment.from_string(CHAT_TEMPLATE).render(messages=messages, **values)
        assert render(messages, **values) == theirs
    without = environment.from_string(CHAT_TEMPLATE).render(messages=messages)
    assert render(messages, add_generation_prompt=False) == without


def test_bundled_template_shows_tools_once_and_keeps_the_system_message():
    text = render([{"role": "system", "content": "Be brief."}, user("Hi")], tools=TOOLS)
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Functions\n")
    assert text.count("<|im_start|>system") == 1
    assert json.dumps(TOOLS[0]["function"]) in text
    assert text.endswith("<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert render([user("Hi")], tools=TOOLS).startswith("<|im_start|>system\n# Functions\n")


def test_fields_that_a_client_left_out_of_a_tool_are_left_out():
    unset = {"description": None, "strict": None}
    filled_in = [{**tool, "function": tool["function"] | unset} for tool in TOOLS]
    assert tools_as_sent(filled_in) == TOOLS


def test_what_a_template_lacks():
    assert lacking(None, thinking=True, tools=False) == "a chat template"
    assert lacking("{{ messages }}", thinking=True, tools=False) == ""
    assert lacking("{{ messages }}", thinking=False, tools=False) == "the enable_thinking switch"
    assert lacking(CHAT_TEMPLATE, thinking=False, tools=False) == ""
    assert lacking(CHAT_TEMPLATE, thinking=True, tools=True) == "a tools section"
    assert lacking(bundled_template(), thinking=False, tools=True) == ""
    assert uses_tools([{"role": "tool", "content": ""}], None)
    assert not uses_tools([user("")], [])


@pytest.mark.parametrize("ids", [[], [5], [1], [1, 5], [1, 1, 1, 5]])
def test_exactly_one_bos(ids):
    assert with_one_bos(ids, 1) == [1, *[i for i in ids if i != 1]]
    assert with_one_bos(ids, None) == ids


def test_smallest_budget_wins_and_none_is_unlimited():
    assert request_budget({}, None) is None
    assert request_budget({}, 9) == 9
    assert request_budget({"reasoning_max_tokens": 0}, 9) == 0
    assert request_budget({"thinking_budget": 1 << 60}, None) == MAX_BUDGET
    everywhere = {
        "reasoning_max_tokens": 7,
        "thinking_budget": 6,
        "logits_processors_args": {"thinking_budget": 5},
        "chat_template_kwargs": {"thinking_budget": 8},
    }
    assert request_budget(everywhere, None) == 5


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"messages": [user("a"), user([{"type": "text", "text": "b"}]), user(None), 7]},
        {"tool_choice": "none", "thinking_budget": 0, "reasoning_max_tokens": None},
        {"tool_choice": "auto", "chat_template_kwargs": {"enable_thinking": False, "extra": 1}},
        {"logits_processors_args": {"logit_bias": {"1": 2}}, "chat_template_kwargs": None},
    ],
)
def test_good_requests_pass(values):
    check_request(values, {"extra"})


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"thinking_budget": -1}, "thinking_budget is -1"),
        ({"thinking_budget": "many"}, "thinking_budget is 'many'"),
        ({"reasoning_max_tokens": 1.5}, "reasoning_max_tokens is 1.5"),
        ({"logits_processors_args": {"thinking_budget": True}}, "thinking_budget is True"),
        ({"logits_processors_args": [1]}, r"logits_processors_args is \[1\]"),
        ({"logits_processors_args": {"think_stop_sentence": "x"}}, "FD_MINICPM41_CLOSING_SENTENCE"),
        ({"chat_template_kwargs": {"thinking_budget": []}}, "thinking_budget is"),
        ({"chat_template_kwargs": {"enable_thinking": "no"}}, "enable_thinking is 'no'"),
        ({"chat_template_kwargs": {"enable_thinkin": True}}, "has enable_thinkin, wanted only"),
        ({"chat_template_kwargs": "x"}, "chat_template_kwargs is 'x'"),
        ({"tool_choice": "required"}, "tool_choice is 'required'"),
        ({"messages": [user([{"type": "image_url"}])]}, "text only"),
        ({"tool_choice": {"type": "function"}}, "tool_choice is"),
    ],
)
def test_bad_requests_are_told(values, reason):
    with pytest.raises(UsageError, match=reason):
        check_request(values, ())


def test_importing_is_free():
    """The package alone, as the command line and the entry points load it."""
    code = (
        "import sys, fd_minicpm41.hybrid_reasoning; "
        "print([m for m in ('paddle', 'fastdeploy', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
