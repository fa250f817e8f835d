"""The small model's tasks: what is held out stays out, and verdicts tell form from answer."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from fd_minicpm41.hybrid_reasoning import parse_tool_calls
from fd_minicpm41.small_model import tasks
from fd_minicpm41.small_model.tasks import (
    FACT_KINDS,
    PROMPT_KINDS,
    Prompt,
    Question,
    Verdict,
    make_prompt,
    make_retrieval,
    split_of,
)

PROSE = [
    "It was dark. Mr. Hill said so, and nobody answered him! Then it rained.",
    "A ship came in; she carried nothing but sand. Who had sent her?",
    "The third day was as long as the first two together.",
] * 40


def words(text: str) -> int:
    return len(text.split())


def retrieval(seed: int, split: tasks.Split, tokens: int = 900, needles: int = 12):
    return make_retrieval(Random(seed), PROSE, words, tokens, needles, split)


def draw(kind: tasks.PromptKind, split: tasks.Split, count: int, seed: int = 0) -> list[Prompt]:
    rng = Random(seed)
    return [make_prompt(rng, kind, split) for _ in range(count)]


def test_a_seed_fixes_everything():
    assert retrieval(3, "train") == retrieval(3, "train") != retrieval(4, "train")
    for kind in PROMPT_KINDS:
        assert draw(kind, "train", 20) == draw(kind, "train", 20)


def test_held_out_facts_are_never_drawn_for_training():
    def facts(split: tasks.Split) -> set[tuple[str, str]]:
        made = [retrieval(seed, split) for seed in range(40)]
        return {(q.question, q.answer) for r in made for q in r.questions}

    train, held_out = facts("train"), facts("held_out")
    assert len(held_out) > 300
    assert {question for question, _ in train}.isdisjoint(q for q, _ in held_out)
    assert {answer for _, answer in train}.isdisjoint(answer for _, answer in held_out)


@pytest.mark.parametrize("kind", PROMPT_KINDS)
def test_held_out_prompts_are_never_drawn_for_training(kind):
    def text(prompt: Prompt) -> str:
        said = " ".join(str(m["content"]) for m in prompt.messages)
        return said.removesuffix(" /no_think")

    train = {text(p) for p in draw(kind, "train", 3000)}
    held_out = [text(p) for p in draw(kind, "held_out", 500)]
    assert train.isdisjoint(held_out)
    # Some kinds have few hundred held-out ones, so that 500 drawings meet many twice.
    assert len(set(held_out)) > 250


@pytest.mark.parametrize("tokens,needles", [(300, 4), (900, 12), (4000, 24)])
def test_a_document_holds_its_facts_where_it_says(tokens, needles):
    made = retrieval(1, "held_out", tokens, needles)
    assert 0.9 * tokens < words(made.document) <= tokens
    depths = [question.depth for question in made.questions]
    assert depths == sorted(depths) and len(depths) == needles
    for question in made.questions:
        assert made.document.count(question.reply) == 1
        before = made.document[: made.document.index(question.reply)]
        assert words(before) / words(made.document) == pytest.approx(question.depth, abs=0.01)
        assert made.messages(question) == [
            {"role": "user", "content": made.prefix + question.question}
        ]
    # One fact in each of as many equal parts, up to the length of a sentence and of the facts.
    assert max(abs(d - (i + 0.5) / needles) for i, d in enumerate(depths)) < 0.6 / needles + 0.05


def test_a_document_without_room_for_prose_still_holds_its_facts():
    made = retrieval(0, "train", 0, 3)
    assert all(question.reply in made.document for question in made.questions)


@pytest.mark.parametrize("kind", FACT_KINDS)
def test_verdict_of_a_retrieval(kind):
    question = next(q for q in retrieval(5, "held_out").questions if q.kind == kind)
    other = next(q for q in retrieval(6, "held_out").questions if q.kind == kind and q != question)

    def check(text: str) -> Verdict:
        return question.check(text)

    assert check(question.reply) == Verdict(True, True)
    assert check(question.answer) == Verdict(True, True)
    assert check(f"<think>\nI look it up.\n</think>\n{question.reply}") == Verdict(True, True)
    assert check(other.reply) == Verdict(True, False)
    assert check(f"{question.answer} or {other.answer}") == Verdict(False, False)
    assert check("I do not know.") == Verdict(False, False)
    # Said in thinking alone is not said.
    assert check(f"<think>\n{question.reply}\n</think>\nIndeed.") == Verdict(False, False)


def test_a_longer_number_is_another_number():
    question = Question("?", "12345", "", 0.0, "pass_key")
    assert not question.check("123456").answer_ok
    assert not question.check("1234").answer_ok


@pytest.mark.parametrize("kind", PROMPT_KINDS)
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_wanted_reply_passes(kind, split):
    for prompt in draw(kind, split, 200):
        assert prompt.check(prompt.reply) == Verdict(True, True), prompt
        assert split_of("x") in ("train", "held_out")


def test_thinking_must_be_there_closed_and_not_empty():
    for prompt in draw("arithmetic_think", "held_out", 30):
        assert prompt.thinks and prompt.enable_thinking
        answer = prompt.answer
        for bad in (
            answer,
            f"<think>\n\n</think>\n{answer}",
            f"<think>\nwork {answer}",
            f"work\n</think>\n{answer}",
            "<think>\nwork\n</think>\n",
            f"<think>\nwork\n</think>\n{answer} </think>",
        ):
            assert not prompt.check(bad).format_ok, bad
        wrong = f"<think>\nwork\n</think>\n{answer[:-1]}0."
        assert prompt.check(wrong) == Verdict(True, False)


def test_no_thinking_must_be_absent_or_empty():
    by_words = set()
    for prompt in draw("arithmetic_no_think", "held_out", 60):
        assert not prompt.thinks
        said = prompt.messages[-1]["content"].endswith(" /no_think")
        assert said == prompt.enable_thinking  # else the template closes the thinking itself
        by_words.add(said)
        assert prompt.check(prompt.answer) == Verdict(True, True)
        assert prompt.check(f"<think>\n\n</think>\n{prompt.answer}") == Verdict(True, True)
        assert not prompt.check(f"<think>\nwork\n</think>\n{prompt.answer}").format_ok
    assert by_words == {True, False}


def test_a_tool_call_must_be_the_one_that_was_asked_for():
    for prompt in draw("tool_call", "held_out", 60):
        assert prompt.tools is not None
        start = prompt.reply.index("<|tool_call_start|>")
        thinking, call = prompt.reply[:start], prompt.reply[start:]
        code = call.split("```")[1].removeprefix("python")
        (parsed,) = parse_tool_calls(code)
        assert prompt.check(f"{thinking}I call it. {call}") == Verdict(False, False)
        assert prompt.check(thinking + call + "\n" + call) == Verdict(False, False)
        assert prompt.check(thinking + call.replace(parsed.name, "unknown_tool")) == Verdict(
            False, False
        )
        other = call.replace("(", "(extra=1, ", 1)
        assert prompt.check(thinking + other) == Verdict(True, False)
        assert prompt.check(thinking + parsed.name) == Verdict(False, False)


def test_arithmetic_is_right():
    for kind in ("arithmetic_think", "arithmetic_no_think"):
        for prompt in draw(kind, "train", 300):
            left, right = prompt.answer.rstrip(".").split(" = ")
            a, sign, b = left.split()
            assert int(right) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
            if prompt.thinks:
                assert f"Together {right}." in prompt.reply


def test_a_prompt_is_judged_by_its_own_answer():
    prompt = draw("copy", "held_out", 1)[0]
    assert not replace(prompt, answer="something else").check(prompt.reply).answer_ok
