"""Replies taken apart: no chunking, no text and no hostile call may change or break the result."""

from __future__ import annotations

import json
import random
import time

import pytest

from fd_minicpm41.hybrid_reasoning import (
    HybridReasoningMode,
    ReplySplitter,
    ToolCall,
    parse_tool_calls,
    render_tool_call,
)
from fd_minicpm41.hybrid_reasoning.tool_calls import MAX_CALLS, MAX_CODE_CHARS

MODE = HybridReasoningMode()
CALL = '<|tool_call_start|>\n```python\nweather(city="Paris", days=[1, 2])\n```\n<|tool_call_end|>'
WEATHER = ToolCall("weather", '{"city": "Paris", "days": [1, 2]}')


def split(text, *, start="auto", tools=True, chunks=None):
    """Reasoning, content, text and calls of a reply, cut where ``chunks`` says."""
    splitter = ReplySplitter(MODE, start=start, tools=tools)
    borders = [0, *(chunks or ()), len(text)]
    deltas = [splitter.feed(text[a:b]) for a, b in zip(borders, borders[1:], strict=False)]
    deltas.append(splitter.feed("", finished=True))
    return (
        "".join(d.reasoning for d in deltas),
        "".join(d.content for d in deltas),
        "".join(d.text for d in deltas),
        [call for d in deltas for call in d.calls],
    )


@pytest.mark.parametrize(
    ("reply", "start", "reasoning", "content"),
    [
        ("<think>a\nb</think>\n\nc", "auto", "a\nb", "\n\nc"),
        ("\n <think>a</think>b", "auto", "\n a", "b"),
        ("a</think>b", "open", "a", "b"),
        ("<think>a", "auto", "a", ""),
        ("a <", "open", "a <", ""),
        ("<think></think>b", "auto", "", "b"),
        ("<think>\n\n</think>\n\nb", "auto", "\n\n", "\n\nb"),
        ("<think>a</think>\n<think>b</think>c", "auto", "a\nb", "c"),
        ("<think>a</think>c<think>d</think>", "auto", "a", "c<think>d</think>"),
        ("The tag <think> opens.</think>", "auto", "", "The tag <think> opens.</think>"),
        ("<think>a</think>", "off", "", "<think>a</think>"),
        ("plain <", "auto", "", "plain <"),
        ("<thin", "auto", "", "<thin"),
        ("<think>a <think> b</think>c", "auto", "a <think> b", "c"),
        ("<think>a<|thought_end|>b</think>c", "auto", "a<|thought_end|>b", "c"),
        ("<|thought_start|>a<|thought_end|>b", "auto", "a", "b"),
        ("", "auto", "", ""),
        (" \n", "auto", "", " \n"),
        ("思考<", "open", "思考<", ""),
    ],
)
def test_reasoning_and_content(reply, start, reasoning, content):
    assert split(reply, start=start)[:2] == (reasoning, content)
    assert split(reply, start=start, chunks=range(1, len(reply)))[:2] == (reasoning, content)


@pytest.mark.parametrize(
    ("reply", "content", "calls"),
    [
        (CALL, "", [WEATHER]),
        (f"<think>x</think>a{CALL}b", "ab", [WEATHER]),
        (f"{CALL}\n{CALL}", "\n", [WEATHER, WEATHER]),
        (
            "<|tool_call_start|>f()\ng(a=1)<|tool_call_end|>",
            "",
            [ToolCall("f", "{}"), ToolCall("g", '{"a": 1}')],
        ),
        (
            "<|tool_call_start|>rm(<|tool_call_end|>!",
            "<|tool_call_start|>rm(<|tool_call_end|>!",
            [],
        ),
        ("<|tool_call_start|>f(a=1)", "<|tool_call_start|>f(a=1)", []),
        ("<|tool_call_start|>```python\nf(a=1)\n```", "", [ToolCall("f", '{"a": 1}')]),
        ("x<|tool_call_end|>y", "x<|tool_call_end|>y", []),
        ("a<|tool_call_sta", "a<|tool_call_sta", []),
    ],
)
def test_calls_in_the_answer(reply, content, calls):
    for chunks in (None, range(1, len(reply))):
        assert split(reply, chunks=chunks)[1:2] + split(reply, chunks=chunks)[3:] == (
            content,
            calls,
        )


def test_calls_within_thinking_or_without_tools_are_text():
    assert split(f"<think>{CALL}</think>a")[:2] == (CALL, "a")
    assert split(CALL, tools=False)[1:] == (CALL, CALL, [])


PIECES = (
    "<think>",
    "</think>",
    "<thi",
    "nk>",
    "<",
    "/",
    ">",
    "</",
    "think",
    "\n",
    " ",
    "a",
    "答",
    "\U0001f600",
    "<|thought_start|>",
    "<|thought_end|>",
    "<|",
    "|>",
    "<|tool_call_start|>",
    "<|tool_call_end|>",
    "```python\n",
    "```",
    'f(a="x")',
    "g(b=[1, {'k': None}])",
    "f(",
    ")",
    "'",
    '"',
    "\\",
    "__import__",
    ".",
)


def without_markers(text):
    for pair in MODE.markers:
        text = text.replace(pair.open, "").replace(pair.close, "")
    return text


def test_no_chunking_changes_the_result_and_no_character_is_lost():
    rng = random.Random(41)
    for number in range(10_000):
        reply = "".join(rng.choices(PIECES, k=rng.randint(0, 14)))
        start = ("auto", "open", "off")[number % 3]
        tools = number % 2 == 0
        whole = split(reply, start=start, tools=tools)
        reasoning, content, text, calls = whole
        if not calls:
            assert content == text
        # The text ends the reply untouched; before it only markers of thinking are left out.
        assert reply.endswith(text), reply
        before = reply[: len(reply) - len(text)]
        assert without_markers(before) == without_markers(reasoning), reply
        if not any(pair.open in before or pair.close in before for pair in MODE.markers):
            assert reasoning == before, reply
        # Every way of cutting in two, one character at a time, and a few random ones.
        for border in range(len(reply) + 1):
            assert split(reply, start=start, tools=tools, chunks=[border]) == whole, reply
        assert split(reply, start=start, tools=tools, chunks=range(1, len(reply))) == whole, reply
        for _ in range(4):
            borders = sorted(rng.choices(range(len(reply) + 1), k=5))
            assert split(reply, start=start, tools=tools, chunks=borders) == whole, reply


def test_every_chunking_of_short_replies():
    for reply in ("<think>a</think>", "</think><", "<|tool_call_s"):
        for start in ("auto", "open"):
            whole = split(reply, start=start)
            for mask in range(1 << (len(reply) - 1)):
                borders = [i + 1 for i in range(len(reply) - 1) if mask >> i & 1]
                assert split(reply, start=start, chunks=borders) == whole


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        ("f()", {}),
        (
            "f(a=1, b=-2.5, c=+3, d=1e3, e=0x10, g=1_000,)",
            {"a": 1, "b": -2.5, "c": 3, "d": 1e3, "e": 16, "g": 1000},
        ),
        (
            "f(a='x' \"y\", b='''l1\nl2''', c=r'\\d', d='\\d\\n')",
            {"a": "xy", "b": "l1\nl2", "c": "\\d", "d": "\\d\n"},
        ),
        ("f(a=True, b=None, c=false, d=null)", {"a": True, "b": None, "c": False, "d": None}),
        (
            "f(a=[1, (2, 3), (4), (5,), []], b={'k': {'n': [{}]}})",
            {"a": [1, [2, 3], 4, [5], []], "b": {"k": {"n": [{}]}}},
        ),
        (
            "f(from='a', class='b', **{'not a name': 1})",
            {"from": "a", "class": "b", "not a name": 1},
        ),
        ("# why\nf(\n  a=1,  # one\n)", {"a": 1}),
        ("f(text='<|tool_call_start|> ``` # no')", {"text": "<|tool_call_start|> ``` # no"}),
        ("f(ü='é')", {"ü": "é"}),
    ],
)
def test_literal_arguments(code, arguments):
    (call,) = parse_tool_calls(code)
    assert json.loads(call.arguments) == arguments
    assert call.name == "f"


@pytest.mark.parametrize(
    "fence", ["```python\n{}\n```", "```\n{}```", "\n ```py {} ```\n", "{}", "[{}]"]
)
def test_several_calls_in_any_fence(fence):
    code = "f(a=1), g(b=2)" if fence == "[{}]" else "f(a=1)\ng(b=2)"
    assert [call.name for call in parse_tool_calls(fence.format(code))] == ["f", "g"]


@pytest.mark.parametrize(
    "code",
    [
        "",
        "f",
        "f(1)",
        "f(a)",
        "f(a=b)",
        "f(a=g())",
        "f(a=1, a=2)",
        "f(a=1)(b=2)",
        "f(a=1) g(b=2)",
        "os.system(command='x')",
        "f(a=os.environ)",
        "f(a=().__class__)",
        "f(a='x'.upper())",
        "f.__globals__",
        "__import__('os')",
        "exec('1')",
        "lambda: 0",
        "f(a=[x for x in y])",
        "f(a=1+1)",
        "f(a='x' * 9)",
        "f(a=f'{x}')",
        "f(a=b'x')",
        "f(a={1, 2})",
        "f(a={1: 2})",
        "f(a=...)",
        "f(a=1j)",
        "f(a=--1)",
        "f(*[1])",
        "f(**[1])",
        "f(a=1e999)",
        "f(a='\\ud800')",
        "f(a=not True)",
        "x = f(a=1)",
        "import os",
        "f(a=1",
        "f(a='x",
        "f(a='''x')",
        "#'f(a=1)'\n$",
        "f(a=1)\x00",
        "f(a='\x00')",
        "f(a=0777)",
        "f(a=1__0)",
        "{}",
        "[f(a=1)",
        "f(a=:=1)",
        "await f(a=1)",
        "@f(a=1)",
        "f(a=1);;g(b=1)",
    ],
)
def test_anything_else_is_no_call(code):
    assert parse_tool_calls(code) == ()


@pytest.mark.parametrize(
    "code",
    [
        "f(a=" + "[" * 200_000,
        "f(a=" + "(" * 100_000 + ")" * 100_000 + ")",
        "f(a=" + "{'a':" * 30_000,
        "f(a=" + "-" * 200_000 + "1)",
        "f(a=" + "9" * 200_000 + ")",
        "f(a=0x" + "f" * 200_000 + ")",
        "f(a=1" + "+1" * 100_000 + ")",
        "f(a=x" + ".a" * 100_000 + ")",
        "f" + "()" * 100_000,
        "f()\n" * (MAX_CALLS + 1),
        "'" * 200_001,
        "f(a=" + "'" * 200_001,
        "f(a=" + "\"'" * 100_000,
        "f(a=" + "''' ''" * 40_000,
        "#" * 200_000 + "\n$",
        "f(a='" + "\\" * 200_001,
        " " * 200_000 + "x",
        "```" + " " * 200_000 + "x",
        "```" * 80_000,
        "f(a='" + "x" * MAX_CODE_CHARS + "')",
        "f(" + "a=1," * 60_000 + ")",
        "f(a=" + "#'\n" * 80_000 + "$",
    ],
)
def test_hostile_code_is_refused_at_once(code):
    began = time.process_time()
    assert parse_tool_calls(code) == ()
    # Linear work on a quarter of a megabyte; a quadratic scan would take minutes.
    assert time.process_time() - began < 2.0


def test_large_but_honest_calls_are_read():
    text = "x" * (MAX_CODE_CHARS - 100)
    (call,) = parse_tool_calls(f"f(a={text!r})")
    assert json.loads(call.arguments)["a"] == text


def test_overlong_code_is_content_however_it_is_cut():
    reply = "<|tool_call_start|>" + "x" * (MAX_CODE_CHARS + 9) + CALL + "<|tool_call_end|>end"
    whole = split(reply)
    assert whole[3] == [WEATHER] and whole[2] == reply
    assert split(reply, chunks=range(1000, len(reply), 7919)) == whole


def test_long_streams_take_linear_time():
    splitter = ReplySplitter(MODE, start="open", tools=True)
    began = time.process_time()
    for _ in range(100_000):
        splitter.feed("word <")
    splitter.feed("</think>")
    for _ in range(100_000):
        splitter.feed("word <|tool_call_")
    assert time.process_time() - began < 5.0


def test_rendered_calls_read_back():
    arguments = {"a": [1, None, True, {"k": "v'\"\n"}], "from": -1.5, "not a name": "é"}
    (call,) = parse_tool_calls(render_tool_call("f", arguments))
    assert json.loads(call.arguments) == arguments
