"""Hybrid reasoning through an unmodified FastDeploy server and the OpenAI client.

The model says scripts cut into awkward pieces, so each reply is known in advance, token by token.
"""

from __future__ import annotations

import contextlib
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from checkpoints import write_tiny_checkpoint
from fd_minicpm41.hybrid_reasoning import HybridReasoningMode, ReplySplitter
from host.host import CROWDED, missing_host, run_script, server
from scripted_checkpoint import script_tag, scripted_tokenizer, write_scripted_checkpoint

MISSING = missing_host()
pytestmark = [
    pytest.mark.host,
    pytest.mark.slow,
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
]
openai = pytest.importorskip("openai", reason="the OpenAI client comes with FastDeploy")

OPEN, CLOSE = ["<thi", "nk>"], ["</", "thi", "nk>"]
CALL = [
    "<|tool_",
    "call_start|>\n``",
    "`python\n",
    "wea",
    'ther(city="Pa',
    'ris", days=[1, {"k": None}])',
]
CALL_END = ["\n``", "`\n<|tool_call_", "end|>"]
TWO_CALLS = [*CALL, "\nnow(", ")", *CALL_END]
WEATHER = ("weather", {"city": "Paris", "days": [1, {"k": None}]})
HOSTILE = ["<|tool_call_start|>", "f(a=", "[" * 100, "().__class__", ")", "<|tool_call_end|>"]
SCRIPTS = {
    "after a forced end": ["Forced", " answer", "."],
    "long": [*OPEN, "\n", *["z"] * 100, *CLOSE, "\n\n", "Natural", " answer", "."],
    "no opening": [*["z"] * 100, *CLOSE, "\n\n", "Natural", " answer", "."],
    "plain": ["plain", " 答", "<"],
    "marker in the answer": ["The ", *OPEN, " tag ", *CLOSE, "."],
    "several blocks": [*OPEN, "a", *CLOSE, "\n", *OPEN, "b", *CLOSE, "c"],
    "empty block": [*OPEN, "\n\n", *CLOSE, "\n\n", "x"],
    "never closed": [*OPEN, "思", *["z"] * 60, "</thi"],
    "two calls": [*OPEN, "hm", *CLOSE, "Look: ", *TWO_CALLS, " done"],
    "two blocks of calls": [*CALL, *CALL_END, "\n", *CALL, *CALL_END],
    "call in thinking": [*OPEN, *CALL, *CALL_END, *CLOSE, "x"],
    "hostile call": HOSTILE,
    "longest": [*OPEN, "\n", *["z"] * 250, *CLOSE, "\n\n", "Natural", " answer", "."],
}
TAGS = {name: script_tag(i) for i, name in enumerate(SCRIPTS)}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("weather", "now")
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripted")
    return write_scripted_checkpoint(folder, list(SCRIPTS.values()), after_newline=0)


@contextlib.contextmanager
def serving(
    checkpoint,
    logs,
    *,
    pages,
    seqs=16,
    prefill=512,
    context=1024,
    flags=(),
    extra_path=(),
    **variables,
):
    """A client of a server with so many pages, slots, tokens in a prefill and in all."""
    arguments = ["--num-gpu-blocks-override", str(pages), "--max-num-seqs", str(seqs)]
    arguments += ["--max-num-batched-tokens", str(prefill), "--max-model-len", str(context)]
    arguments += flags
    with server(checkpoint, logs, arguments, extra_path=extra_path, variables=variables) as started:
        yield openai.OpenAI(
            base_url=f"{started.url}/v1", api_key="none", max_retries=0, timeout=120
        )


@pytest.fixture(scope="module")
def client(checkpoint, tmp_path_factory):
    with serving(checkpoint, tmp_path_factory.mktemp("logs"), pages=128, prefill=128) as client:
        yield client


class Answer:
    """One reply, asked for whole or as a stream."""

    def __init__(
        self, client, script, *, stream, messages=None, max_tokens=250, extra=None, **given
    ):
        messages = messages or [{"role": "user", "content": "Hi "}]
        messages = [
            *messages[:-1],
            messages[-1] | {"content": messages[-1]["content"] + TAGS[script]},
        ]
        reply = client.chat.completions.create(
            model="default",
            messages=messages,
            max_tokens=max_tokens,
            temperature=0,
            stream=stream,
            extra_body={"return_token_ids": True} | (extra or {}),
            **given,
        )
        self.reasoning, self.content, self.calls, self.tokens = "", "", [], []
        for choice in [c for event in reply for c in event.choices] if stream else reply.choices:
            message = choice.delta if stream else choice.message
            self.reasoning += getattr(message, "reasoning_content", None) or ""
            self.content += message.content or ""
            self.tokens += getattr(message, "completion_token_ids", None) or []
            self.prompt = getattr(message, "prompt_tokens", None) or getattr(self, "prompt", "")
            self.prompt_ids = getattr(message, "prompt_token_ids", None) or getattr(
                self, "prompt_ids", []
            )
            self.finish_reason = choice.finish_reason
            for call in message.tool_calls or []:
                assert not stream or call.index == len(self.calls)
                assert call.id and call.type == "function"
                self.calls.append((call.function.name, json.loads(call.function.arguments)))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("script", "given", "reasoning", "content", "calls", "finish_reason"),
    [
        ("long", {}, "\n" + "z" * 100, "\n\nNatural answer.", [], "stop"),
        ("plain", {}, "", "plain 答<", [], "stop"),
        # FastDeploy turns the last token that fits into an end of turn.
        ("plain", {"max_tokens": 4}, "", "plain 答<", [], "length"),
        ("marker in the answer", {}, "", "The <think> tag </think>.", [], "stop"),
        ("several blocks", {}, "a\nb", "c", [], "stop"),
        ("empty block", {}, "\n\n", "\n\nx", [], "stop"),
        ("never closed", {}, "思" + "z" * 60 + "</thi", "", [], "stop"),
        ("never closed", {"max_tokens": 20}, "思" + "z" * 16, "", [], "length"),
        ("never closed", {"max_tokens": 2}, "", "<thi", [], "length"),
        ("two calls", {"tools": TOOLS}, "hm", "Look:  done", [WEATHER, ("now", {})], "tool_calls"),
        (
            "two calls",
            {"tools": TOOLS, "tool_choice": "auto"},
            "hm",
            "Look:  done",
            [WEATHER, ("now", {})],
            "tool_calls",
        ),
        (
            "two calls",
            {"tools": TOOLS, "tool_choice": "none"},
            "hm",
            "Look: " + "".join(TWO_CALLS) + " done",
            [],
            "stop",
        ),
        ("two calls", {}, "hm", "Look: " + "".join(TWO_CALLS) + " done", [], "stop"),
        ("two blocks of calls", {"tools": TOOLS}, "", "\n", [WEATHER, WEATHER], "tool_calls"),
        (
            "two blocks of calls",
            {"tools": TOOLS, "max_tokens": 4},
            "",
            "".join(CALL[:3]),
            [],
            "length",
        ),
        ("call in thinking", {"tools": TOOLS}, "".join([*CALL, *CALL_END]), "x", [], "stop"),
        ("hostile call", {"tools": TOOLS}, "", "".join(HOSTILE), [], "stop"),
    ],
)
def test_split(client, stream, script, given, reasoning, content, calls, finish_reason):
    answer = Answer(client, script, stream=stream, **given)
    assert (answer.reasoning, answer.content, answer.calls) == (reasoning, content, calls)
    assert answer.finish_reason == finish_reason


def expected(budget, *, opened=False, length=100):
    """Thinking and answer of the long script under a budget."""
    if budget is None or budget > length:
        return "\n" * (not opened) + "z" * length, "\n\nNatural answer."
    if opened:
        # The prompt's newline is not the reply's.
        return "z" * budget + "\n" * (budget > 0), "\nForced answer."
    return "\n" * (budget > 0) + "z" * (budget - 1) + "\n" * (budget != 1), "\nForced answer."


@pytest.mark.parametrize("opened", [False, True])
def test_sixteen_requests_with_different_budgets_at_once(client, opened):
    budgets = [0, 1, 7, 64, None] * 3 + [200]
    template = {"opened": True} if opened else {}
    ways = (
        lambda budget: {"thinking_budget": budget, "chat_template_kwargs": template},
        lambda budget: {"reasoning_max_tokens": budget, "chat_template_kwargs": template},
        lambda budget: {
            "logits_processors_args": {"thinking_budget": budget},
            "chat_template_kwargs": template,
        },
        lambda budget: {"chat_template_kwargs": template | {"thinking_budget": budget}},
    )

    def ask(i):
        extra = (
            {"chat_template_kwargs": template} if budgets[i] is None else ways[i % 4](budgets[i])
        )
        script = "no opening" if opened else "long"
        return Answer(client, script, stream=i % 2 == 1, extra=extra)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(16)))
    for budget, answer in zip(budgets, answers, strict=True):
        assert (answer.reasoning, answer.content) == expected(budget, opened=opened), budget
        # The scripts' pieces are one token each: opening, thinking, then what was forced and said.
        num_forced = (
            len(answer.tokens)
            - (0 if opened else 2)
            - (budget or 0)
            - len(SCRIPTS["after a forced end"])
            - 1
        )
        if budget is not None and budget < 100:
            assert 0 < num_forced <= len("\n</think>\n")


def test_every_budget_while_others_come_and_go(client):
    """Slots are reused in every order; no reply is touched by another's budget."""
    budgets = [None if b % 9 == 8 else b for b in range(48)]

    def ask(i):
        extra = {} if budgets[i] is None else {"thinking_budget": budgets[i]}
        return Answer(client, "long", stream=i % 2 == 0, extra=extra)

    with ThreadPoolExecutor(12) as pool:
        for budget, answer in zip(budgets, pool.map(ask, range(48)), strict=True):
            assert (answer.reasoning, answer.content) == expected(budget), budget


def test_prompt_in_several_chunks(client):
    """A prefill in parts samples tokens that nobody keeps; they must not count."""
    messages = [{"role": "user", "content": "word " * 60}]
    answer = Answer(client, "long", stream=False, messages=messages, extra={"thinking_budget": 7})
    assert len(answer.prompt_ids) > 2 * 128
    assert (answer.reasoning, answer.content) == expected(7)


def test_smallest_of_several_budgets(client):
    extra = {"thinking_budget": 9, "reasoning_max_tokens": 7}
    answer = Answer(client, "long", stream=False, extra=extra)
    assert answer.reasoning == expected(7)[0]


def test_switch_history_and_bos(client):
    history = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "<think>old</think>\n\nYes."},
        {"role": "user", "content": "And? "},
    ]
    answer = Answer(client, "plain", stream=False, messages=history)
    assert "old" not in answer.prompt and "assistant\nYes.<|im_end|>" in answer.prompt
    assert answer.prompt_ids.count(1) == 1 and answer.prompt_ids[0] == 1
    assert answer.prompt.endswith("<|im_start|>assistant\n" + TAGS["plain"])

    off = {"chat_template_kwargs": {"enable_thinking": False}}
    answer = Answer(client, "long", stream=False, extra=off | {"thinking_budget": 3})
    assert answer.prompt.endswith("<think>\n\n</think>\n" + TAGS["long"])
    # With thinking off everything is the answer, and there is nothing to limit.
    assert (answer.reasoning, answer.content) == ("", "".join(SCRIPTS["long"]))

    soft = [{"role": "user", "content": "Hi /no_think "}]
    answer = Answer(client, "plain", stream=True, messages=soft)
    assert "/no_think" in answer.prompt
    assert answer.prompt.endswith("<think>\n\n</think>\n" + TAGS["plain"])
    on = {"chat_template_kwargs": {"enable_thinking": True}}
    answer = Answer(client, "plain", stream=True, messages=soft, extra=on)
    assert answer.prompt.endswith("<|im_start|>assistant\n" + TAGS["plain"])


def test_tools_are_shown_unless_refused(client):
    assert '"weather"' in Answer(client, "plain", stream=False, tools=TOOLS).prompt
    refused = Answer(client, "plain", stream=False, tools=TOOLS, tool_choice="none")
    assert '"weather"' not in refused.prompt


def test_a_conversation_with_tools_goes_back_to_the_model_in_its_own_words(client):
    calls = [
        {"id": "1", "type": "function", "function": {"name": "now", "arguments": '{"tz": "X"}'}}
    ]
    messages = [
        {"role": "user", "content": "When?"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "content": "12:00"},
        {"role": "user", "content": "And? "},
    ]
    prompt = Answer(client, "plain", stream=False, messages=messages, tools=TOOLS).prompt
    assert "<|tool_call_start|>\n```python\nnow(tz='X')\n```\n<|tool_call_end|><|im_end|>" in prompt
    assert "<|im_start|>tool\n12:00<|im_end|>" in prompt


def test_several_choices_and_an_awkward_user_name(client):
    reply = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": "Hi " + TAGS["long"]}],
        temperature=0,
        max_tokens=250,
        n=2,
        user="a_b_c",
        extra_body={"thinking_budget": 5},
    )
    assert len(reply.choices) == 2
    for choice in reply.choices:
        assert (choice.message.reasoning_content, choice.message.content) == expected(5)


@pytest.mark.parametrize("stream", [False, True])
def test_a_plain_completion_is_no_chat(client, stream):
    reply = client.completions.create(
        model="default", prompt="a\n" + TAGS["long"], temperature=0, max_tokens=250, stream=stream
    )
    text = "".join(c.text for e in reply for c in e.choices) if stream else reply.choices[0].text
    assert text == "".join(SCRIPTS["long"])


@pytest.mark.parametrize(
    ("extra", "given", "reason"),
    [
        ({"thinking_budget": -1}, {}, "thinking_budget is -1"),
        ({"thinking_budget": "many"}, {}, "whole number"),
        ({"reasoning_max_tokens": -5}, {}, "reasoning_max_tokens is -5"),
        ({"reasoning_max_tokens": 1.5}, {}, "whole number"),
        (
            {"logits_processors_args": {"thinking_budget": None, "think_stop_sentence": "x"}},
            {},
            "CLOSING_SENTENCE",
        ),
        ({"chat_template_kwargs": {"enable_thinkin": True}}, {}, "enable_thinkin, wanted only"),
        ({"chat_template_kwargs": {"enable_thinking": "no"}}, {}, "true or false"),
        ({}, {"tools": TOOLS, "tool_choice": "required"}, "tool_choice is 'required'"),
    ],
)
def test_bad_requests_get_400_and_a_reason(client, extra, given, reason):
    with pytest.raises(openai.BadRequestError, match=reason):
        Answer(client, "plain", stream=False, extra=extra, **given)


def test_a_bad_default_budget_ends_the_start_up(checkpoint, tmp_path):
    variables = {"FD_MINICPM41_THINKING_BUDGET": "-1"}
    with server(checkpoint, tmp_path, variables=variables, healthy=False) as started:
        output = started.wait_for_end()
    assert "fd_minicpm41: error: FD_MINICPM41_THINKING_BUDGET is '-1', wanted a whole" in output


def test_preempted_requests_keep_their_budgets(checkpoint, tmp_path_factory):
    """Too few pages for all: requests are thrown out, then prefilled with what they have said."""
    logs = tmp_path_factory.mktemp("preempted")
    budgets = [190, 100, 150, 230]
    with serving(checkpoint, logs, pages=14, seqs=4, context=512, **CROWDED) as client:

        def ask(budget):
            extra = {"thinking_budget": budget}
            messages = [{"role": "user", "content": "word " * 8}]
            return Answer(
                client, "longest", stream=False, messages=messages, max_tokens=300, extra=extra
            )

        with ThreadPoolExecutor(4) as pool:
            for budget, answer in zip(budgets, pool.map(ask, budgets), strict=True):
                wanted = expected(budget, length=250)
                assert (answer.reasoning, answer.content) == wanted, budget
    texts = [p.read_text("utf-8", errors="replace") for p in logs.rglob("*log*") if p.is_file()]
    assert any("Preempted request id" in text for text in texts)


def test_closing_sentence_default_budget_and_parsers_by_name(checkpoint, tmp_path_factory):
    flags = ["--reasoning-parser", "minicpm41", "--tool-call-parser", "minicpm41"]
    environment = {
        "FD_MINICPM41_THINKING_BUDGET": "4",
        "FD_MINICPM41_CLOSING_SENTENCE": "Time is up.",
    }
    logs = tmp_path_factory.mktemp("sentence")
    with serving(checkpoint, logs, pages=64, flags=flags, **environment) as client:
        answer = Answer(client, "long", stream=True)
        assert answer.reasoning == "\nzzz\nTime is up.\n"
        assert answer.content == "\nForced answer."
        # A larger budget of the request replaces the server's.
        answer = Answer(client, "long", stream=False, extra={"thinking_budget": 6})
        assert answer.reasoning == "\nzzzzz\nTime is up.\n"


TEMPLATES = """
import json
from types import SimpleNamespace
from fastdeploy.input.preprocess import InputPreprocessor

prompts = []
for number, (folder, asked) in enumerate(CASES):
    config = SimpleNamespace(model=folder, architectures=["MiniCPMForCausalLM"], enable_mm=False)
    processor = InputPreprocessor(config).create_processor()
    messages = [{"role": "user", "content": "Hi"}]
    request = {"request_id": f"chatcmpl-{number}_0", "messages": messages, "max_tokens": 9} | asked
    processor.process_request_dict(request, 2048)
    prompts.append([request["prompt_tokens"], request["prompt_token_ids"]])
print("PROMPTS" + json.dumps(prompts))
"""


def test_templates_that_lack_something(tmp_path):
    """The checkpoint's template serves where it can, the bundled one where it cannot; one BOS."""
    own = json.loads(
        (write_tiny_checkpoint(tmp_path / "own") / "tokenizer_config.json").read_text()
    )
    variants = {
        "own": own,
        "none": {k: v for k, v in own.items() if k != "chat_template"},
        "bos": own | {"chat_template": "<s><s>" + own["chat_template"]},
        "no switch": own | {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"},
    }
    for name, values in variants.items():
        folder = write_tiny_checkpoint(tmp_path / name)
        (folder / "tokenizer_config.json").write_text(json.dumps(values))
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    chat = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    asked = [
        ("own", {}, chat),
        ("own", off, chat + "<think>\n\n</think>\n"),
        ("own", {"tools": TOOLS}, None),
        ("none", {}, chat),
        ("bos", {}, "<s><s>" + chat),
        ("no switch", {}, "Hi"),
        ("no switch", off, chat + "<think>\n\n</think>\n"),
    ]
    cases = [(str(tmp_path / name), values) for name, values, _ in asked]
    variables = {"FD_PLUGINS": "fd_minicpm41"}
    done = run_script(f"CASES = {cases!r}\n" + TEMPLATES, tmp_path, variables=variables)
    assert "PROMPTS" in done.stdout, done.stderr[-3000:]
    prompts = json.loads(done.stdout.rpartition("PROMPTS")[2])
    for (name, values, wanted), (text, ids) in zip(asked, prompts, strict=True):
        assert ids[0] == 1 and ids.count(1) == 1, name
        if "tools" in values:
            assert text.startswith("<|im_start|>system\n# Functions") and text.endswith(chat)
        else:
            assert text == wanted, name
    log = (tmp_path / "fastdeploy.log").read_text("utf-8")
    for missing in ("a tools section", "a chat template", "the enable_thinking switch"):
        assert log.count(f"fd_minicpm41: the checkpoint lacks {missing}") == 1


OWN_PROCESSOR = """
import json, sys
from types import SimpleNamespace
from fastdeploy.entrypoints.openai.tool_parsers import ToolParserManager
from fastdeploy.input import text_processor
from fastdeploy.reasoning import ReasoningParserManager

Processor = getattr(text_processor, "TextProcessor", None) or text_processor.DataProcessor
processor = Processor(
    CHECKPOINT,
    reasoning_parser_obj=ReasoningParserManager.get_reasoning_parser("minicpm41"),
    tool_parser_obj=ToolParserManager.get_tool_parser("minicpm41"),
)
end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
results = []
for number, (tag, tokens) in enumerate(CASES):
    row = []
    for stream in (False, True):
        request_id = f"chatcmpl-{number}{stream}_0"
        messages = [{"role": "user", "content": "Hi " + tag}]
        request = {"request_id": request_id, "messages": messages, "max_tokens": 400}
        processor.process_request_dict(request, 1024)
        reasoning, content, calls = "", "", []
        for i, token in enumerate([*tokens, end]):
            outputs = {"token_ids": [token]}
            finished = i == len(tokens)
            response = {"request_id": request_id, "finished": finished, "outputs": outputs}
            request = SimpleNamespace(tools=TOOLS)
            out = processor.process_response_dict(response, stream=stream, request=request)
            out = out["outputs"]
            if stream or finished:
                if not out.get("skipped"):
                    reasoning += out["reasoning_content"]
                    content += out["text"]
                for call in out.get("tool_calls") or []:
                    calls.append([call.function.name, json.loads(call.function.arguments)])
        row.append([reasoning, content, calls])
    results.append(row)
print("RESULTS" + json.dumps(results))
"""


def test_parsers_on_the_hosts_own_processor(checkpoint, tmp_path):
    """Another plugin may take the data processor's place; the parsers then work by themselves.

    They are not told that a reply ends, nor, for a whole reply, that tool calls were found: what
    that costs is the text of calls left in the content of a reply that is not streamed.
    """
    _, ids = scripted_tokenizer(list(SCRIPTS.values()))
    names = list(SCRIPTS)
    cases = [(TAGS[name], ids[names.index(name)]) for name in names]
    values = f"CHECKPOINT, CASES, TOOLS = {str(checkpoint)!r}, {cases!r}, {TOOLS!r}\n"
    # As the start-up file of the wheel would have it.
    variables = {"FD_PLUGINS": "fd_minicpm41"}
    done = run_script(values + OWN_PROCESSOR, tmp_path, variables=variables)
    assert "RESULTS" in done.stdout, done.stderr[-3000:]
    results = json.loads(done.stdout.rpartition("RESULTS")[2])
    for name, (whole, streamed) in zip(names, results, strict=True):
        splitter = ReplySplitter(HybridReasoningMode(), tools=True)
        delta = splitter.feed("".join(SCRIPTS[name]), finished=True)
        calls = [[call.name, json.loads(call.arguments)] for call in delta.calls]
        assert streamed == [delta.reasoning, delta.content, calls], name
        assert whole == [delta.reasoning, delta.text, calls], name
