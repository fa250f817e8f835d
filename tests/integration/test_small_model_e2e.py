"""Unmodified FastDeploy serves the small trained model: it finds facts, thinks and calls tools.

The checkpoint is the one inside the installed wheel. What is right is known from how each prompt
was made; that the server says it as the model does is held to the reference, token for token.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest

from fd_minicpm41.config import BLOCK_SIZE
from fd_minicpm41.hybrid_reasoning import HybridReasoningMode, ReplySplitter
from fd_minicpm41.reference.checkpoint import load_model
from fd_minicpm41.reference.sampling import common_prefix, generate
from fd_minicpm41.reference.tokenizer import Tokenizer
from fd_minicpm41.small_model import path
from fd_minicpm41.small_model.prose import examination_paragraphs
from fd_minicpm41.small_model.tasks import (
    PROMPT_KINDS,
    Prompt,
    PromptKind,
    make_prompt,
    make_retrieval,
)
from host.host import Server, missing_host, server

pytestmark = [
    pytest.mark.host,
    pytest.mark.slow,
    pytest.mark.skipif(missing_host() is not None, reason=str(missing_host())),
]
openai = pytest.importorskip("openai", reason="the OpenAI client comes with FastDeploy")

FACTS = 4
PROMPTS = 8
MAX_MODEL_LEN = 8192
# What the model's card leads one to expect of so few prompts: half of what it has of hundreds.
LEAST_RIGHT: dict[PromptKind, float] = {
    "copy": 0.5,
    "count": 0.0,
    "arithmetic_think": 0.4,
    "arithmetic_no_think": 0.0,
    "tool_call": 0.375,
    "chat": 0.5,
}


@dataclass
class Reply:
    """A reply of the server's, whole or put together from its stream."""

    reasoning: str = ""
    content: str = ""
    calls: tuple[tuple[str, dict[str, Any]], ...] = ()
    prompt_ids: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()
    finish_reason: str = ""


class Reference:
    """The plain-Paddle model; it goes on from what a prompt shares with the one before."""

    def __init__(self, folder: Path) -> None:
        self.model, self.tokenizer = load_model(folder), Tokenizer(folder)
        self.cache = self.model.new_cache(MAX_MODEL_LEN, "infllmv2")
        self.known: list[int] = []

    def reply(self, prompt_ids: list[int], max_tokens: int) -> list[int]:
        """Greedy tokens without the one that ends the reply."""
        kept = common_prefix(self.known[: self.cache.length], prompt_ids[:-1])
        self.cache.rewind(kept)
        stop = self.tokenizer.stop_ids
        rest = prompt_ids[kept:]
        tokens = list(generate(self.model, self.cache, rest, max_tokens, stop_ids=stop))
        self.known = [*prompt_ids, *tokens]
        return tokens


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    folder = path()
    # The checkpoint of the installed package, not of the source tree.
    assert "site-packages" in folder.parts
    return folder


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    return Reference(checkpoint)


@pytest.fixture(scope="module")
def running(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    arguments = ["--max-model-len", str(MAX_MODEL_LEN), "--num-gpu-blocks-override", "512"]
    arguments += ["--max-num-batched-tokens", "2048", "--enable-prefix-caching"]
    with server(checkpoint, tmp_path_factory.mktemp("logs"), arguments) as started:
        yield started


@pytest.fixture(scope="module")
def client(running: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", timeout=240, max_retries=0)


def ask(client: openai.OpenAI, *, stream: bool, enable_thinking: bool, **given: Any) -> Reply:
    """One chat completion, greedy."""
    answer = client.chat.completions.create(
        model="small",
        temperature=0,
        stream=stream,
        extra_body={
            "return_token_ids": True,
            "chat_template_kwargs": {"enable_thinking": enable_thinking},
        },
        **given,
    )
    reply = Reply()
    for choice in [c for event in answer for c in event.choices] if stream else answer.choices:
        message = choice.delta if stream else choice.message
        reply.reasoning += getattr(message, "reasoning_content", None) or ""
        reply.content += message.content or ""
        for call in message.tool_calls or ():
            reply.calls += ((call.function.name, json.loads(call.function.arguments)),)
        reply.prompt_ids += tuple(getattr(message, "prompt_token_ids", None) or ())
        reply.token_ids += tuple(getattr(message, "completion_token_ids", None) or ())
        reply.finish_reason = choice.finish_reason or reply.finish_reason
    return reply


def assert_is_the_references(reply: Reply, reference: Reference, limit: int) -> str:
    """Token for token; returns the text. A reply's last token is the stop token, also of one that
    FastDeploy cut."""
    *tokens, last = reply.token_ids
    assert last in reference.tokenizer.stop_ids
    assert tokens == reference.reply(list(reply.prompt_ids), limit)[: limit - 1]
    return reference.tokenizer.decode(tokens)


def test_facts_are_found_in_a_prompt_past_dense_len(
    running: Server, client: openai.OpenAI, reference: Reference
) -> None:
    sparse, tokenizer = reference.model.config.sparse, reference.tokenizer
    assert sparse is not None
    # So long that the rows of the answer must leave blocks out.
    length = max(sparse.dense_len, sparse.budget * BLOCK_SIZE) + 8 * BLOCK_SIZE

    def length_of(text: str) -> int:
        return len(tokenizer.encode(text)) - 1  # without BOS

    prose = examination_paragraphs()
    made = make_retrieval(Random(0), prose, length_of, length, FACTS, "held_out")
    for number, question in enumerate(made.questions):
        messages = made.messages(question)
        reply = ask(
            client, messages=messages, stream=number % 2 == 1, max_tokens=64, enable_thinking=False
        )
        assert list(reply.prompt_ids) == tokenizer.encode_chat(messages, enable_thinking=False)
        assert (reply.reasoning, reply.finish_reason) == ("", "stop")
        attended, present = reference.cache.blocks_attended, reference.cache.blocks_present
        text = assert_is_the_references(reply, reference, 64)
        assert reply.content == text
        assert question.check(text).answer_ok, (question, text)
        if number:  # the first one's rows are those of the document
            attended = reference.cache.blocks_attended - attended
            assert attended < reference.cache.blocks_present - present
    assert f"sparse from {sparse.dense_len} tokens of context" in running.logs()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", PROMPT_KINDS)
def test_each_part_of_a_reply_is_in_its_field(
    client: openai.OpenAI, reference: Reference, kind: PromptKind, stream: bool
) -> None:
    rng = Random(f"{kind} {stream}")
    prompts = [make_prompt(rng, kind, "held_out") for _ in range(PROMPTS)]

    def send(prompt: Prompt) -> Reply:
        given = {"tools": list(prompt.tools)} if prompt.tools else {}
        return ask(
            client,
            messages=list(prompt.messages),
            stream=stream,
            max_tokens=256,
            enable_thinking=prompt.enable_thinking,
            **given,
        )

    with ThreadPoolExecutor(PROMPTS) as pool:
        replies = list(pool.map(send, prompts))
    tokenizer = reference.tokenizer
    right = 0
    for prompt, reply in zip(prompts, replies, strict=True):
        wanted = tokenizer.encode_chat(prompt.messages, prompt.enable_thinking, prompt.tools)
        assert list(reply.prompt_ids) == wanted
        text = assert_is_the_references(reply, reference, 256)
        verdict = prompt.check(text)
        assert verdict.format_ok, text
        right += verdict.answer_ok
        parts = ReplySplitter(HybridReasoningMode(), tools=kind == "tool_call").feed(text, True)
        assert (reply.reasoning, reply.content) == (parts.reasoning, parts.content)
        assert bool(reply.reasoning.strip()) == prompt.thinks
        assert reply.calls == tuple((c.name, json.loads(c.arguments)) for c in parts.calls)
        assert len(reply.calls) == (kind == "tool_call")
        assert reply.finish_reason == ("tool_calls" if kind == "tool_call" else "stop")
    assert right >= LEAST_RIGHT[kind] * PROMPTS
