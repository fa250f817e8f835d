"""What the small model is trained and examined on: facts in long documents, and short chats.

Everything is drawn from a ``random.Random``, so a seed fixes it. Each fact and each prompt belongs
to one of two splits by a checksum of what identifies it (the named thing, the operands, the words,
the arguments of a call): nothing that is drawn from "held_out" can be drawn from "train".
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from fd_minicpm41.hybrid_reasoning.mode import HybridReasoningMode
from fd_minicpm41.hybrid_reasoning.reply import ReplySplitter
from fd_minicpm41.hybrid_reasoning.tool_calls import render_tool_call

Split = Literal["train", "held_out"]
FactKind = Literal["pass_key", "key_value"]
PromptKind = Literal[
    "copy", "count", "arithmetic_think", "arithmetic_no_think", "tool_call", "chat"
]
LengthOf = Callable[[str], int]
Message = dict[str, Any]

FACT_KINDS: tuple[FactKind, ...] = ("pass_key", "key_value")
PROMPT_KINDS: tuple[PromptKind, ...] = (
    "copy",
    "count",
    "arithmetic_think",
    "arithmetic_no_think",
    "tool_call",
    "chat",
)

# One in this many of everything is held out.
HELD_OUT_SHARE = 8


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    "amber ancient black blue brave bright broken brown calm clever cold copper curious dark deep "
    "dusty early eager empty fair faint fierce frozen gentle golden grand gray green happy heavy "
    "hidden hollow honest humble iron ivory large late little lonely lucky merry narrow noble old "
    "pale patient plain proud purple quiet rapid red rough round royal rusty scarlet secret silent "
    "silver slow"
)
NOUNS = _words(
    "anchor apple arrow badger barrel basket bell boat bottle bridge candle castle chair clock "
    "cloud coin compass crown door dragon eagle falcon feather field forest fountain fox garden "
    "gate hammer harbor helmet hill horse island jewel kettle key lamp lantern lion meadow mill "
    "mirror mountain needle oak ocean orchard owl painter palace pearl pigeon raven ribbon river "
    "robin saddle ship"
)
FIRST_NAMES = _words(
    "Adam Agnes Albert Alice Anna Arthur Bella Boris Carl Clara Daniel David Diana Edgar Edith "
    "Ella Emil Emma Ernest Eva Felix Fiona Frank Grace Hanna Harold Helen Henry Hugo Ida Irene "
    "Jacob Jane Julia Karen Laura Leo Lucy Martin Mary Nora Oliver Oscar Paul Peter Rosa Simon "
    "Victor"
)
LAST_NAMES = _words(
    "Archer Baker Barnes Bennett Bishop Brook Carter Cole Cooper Dale Drake Farmer Fisher Ford "
    "Foster Gray Hall Harper Hayes Hill Hunt Hunter King Lake Lane Marsh Mason Miller Moore Morgan "
    "North Parker Porter Reed Rivers Rose Sharp Shaw Stone Sutton Taylor Turner Wade Walker Waters "
    "West White Wood"
)
CITIES = _words(
    "Berlin Boston Cairo Dublin Geneva Lisbon London Madrid Milan Moscow Oslo Paris Prague Rome "
    "Tokyo Vienna"
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

REMEMBER = " Remember it:"
READ = "Read the text and remember the facts in it.\n\n"

_SENTENCE_END = re.compile(
    r"(?:(?<=[.!?])|(?<=[.!?][\"']))(?<!Mr\.)(?<!Mrs\.)(?<!Dr\.)(?<!St\.)\s+"
)
_NUMBER = re.compile(r"[0-9]+")


@dataclass(frozen=True)
class Verdict:
    """Whether a reply has the wanted form, and whether it says the right thing."""

    format_ok: bool
    answer_ok: bool


def split_of(identity: str) -> Split:
    """The split to which a fact or a prompt belongs."""
    return "held_out" if zlib.crc32(identity.encode("utf-8")) % HELD_OUT_SHARE == 0 else "train"


@dataclass(frozen=True)
class Question:
    """One question about a document.

    Attributes:
        answer: the value asked for.
        reply: the whole sentence that the model is trained to answer with.
        depth: share of the document's tokens that precede the fact, 0 to 1.
        kind: "pass_key" has five digits for a value, "key_value" a first and a last name.
    """

    question: str
    answer: str
    reply: str
    depth: float
    kind: FactKind

    def check(self, text: str) -> Verdict:
        """Judges a reply; thinking before it is allowed, a second value is not."""
        delta = _split_reply(text, tools=False)
        content = delta.content.strip()
        if self.kind == "pass_key":
            found = _NUMBER.findall(content)
            return Verdict(len(set(found)) == 1, set(found) == {self.answer})
        last = LAST_NAMES
        named = re.findall(r"\b([A-Z][a-z]+) ([A-Z][a-z]+)\b", content)
        values = {f"{a} {b}" for a, b in named if a in FIRST_NAMES and b in last}
        return Verdict(len(values) == 1, values == {self.answer})


@dataclass(frozen=True)
class Retrieval:
    """A document with facts strewn over it, and a question for each."""

    document: str
    questions: tuple[Question, ...]

    @property
    def prefix(self) -> str:
        """What every prompt about this document begins with, in the user's message."""
        return f"{READ}{self.document}\n\n"

    def messages(self, question: Question) -> list[Message]:
        """The conversation that asks one question."""
        return [{"role": "user", "content": self.prefix + question.question}]


@dataclass(frozen=True)
class _Fact:
    sentence: str
    question: Question


def _make_fact(rng: Random, kind: FactKind, thing: str, split: Split) -> _Fact:
    if kind == "pass_key":
        while True:
            value = "".join(rng.choice("0123456789") for _ in range(5))
            if split_of(value) == split:
                break
        reply = f"The pass key: {thing} {value}."
        question = f"What is the pass key of the {thing}?"
    else:
        while True:
            value = f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"
            if split_of(value) == split:
                break
        reply = f"The owner: {thing} {value}."
        question = f"Who is the owner of the {thing}?"
    # The value follows the thing at once: so small a model finds what followed a word before, but
    # not what followed the word after it.
    sentence = f"{reply}{REMEMBER} {thing} {value}."
    return _Fact(sentence, Question(question, value, reply, 0.0, kind))


def draw_questions(rng: Random, count: int, split: Split = "train") -> list[Question]:
    """Questions about different things, without a document; their depth is 0."""
    return [
        _make_fact(rng, rng.choice(FACT_KINDS), thing, split).question
        for thing in _draw_things(rng, count, split)
    ]


def _draw_things(rng: Random, count: int, split: Split) -> list[str]:
    """Different things; while there are words left, no two share one."""
    things: dict[str, None] = {}
    while len(things) < count:
        unused = set(ADJECTIVES)
        for noun in rng.sample(NOUNS, len(NOUNS)):
            pairs = [(a, f"{a} {noun}") for a in ADJECTIVES]
            fresh = [(a, t) for a, t in pairs if split_of(t) == split and t not in things]
            choice = [pair for pair in fresh if pair[0] in unused] or fresh
            if choice and len(things) < count:
                adjective, thing = rng.choice(choice)
                things[thing] = None
                unused.discard(adjective)
    return list(things)


def make_retrieval(
    rng: Random,
    paragraphs: Sequence[str],
    length_of: LengthOf,
    target_tokens: int,
    needles: int,
    split: Split = "train",
) -> Retrieval:
    """A document of prose with ``needles`` facts spread evenly over its depth.

    Args:
        paragraphs: prose; consecutive ones are taken from a random place on, in a circle.
        length_of: tokens of a text. It is asked for single sentences.
        target_tokens: tokens of the document, reached to within one sentence and never exceeded,
            if tokens of parts add up. A document holds its facts at least.
        needles: facts, each about another thing.
    """
    facts = [
        _make_fact(rng, rng.choice(FACT_KINDS), thing, split)
        for thing in _draw_things(rng, needles, split)
    ]
    fact_tokens = [length_of(" " + fact.sentence) for fact in facts]
    room = target_tokens - sum(fact_tokens)
    sentences: list[tuple[str, int]] = []
    at = rng.randrange(len(paragraphs))
    full = room <= 0
    while not full:
        pieces = [piece for piece in _SENTENCE_END.split(paragraphs[at % len(paragraphs)]) if piece]
        for i, piece in enumerate(pieces):
            tokens = length_of(" " + piece) + (i == len(pieces) - 1)
            if tokens > room:
                full = True
                break
            room -= tokens
            sentences.append((piece + ("\n" if i == len(pieces) - 1 else ""), tokens))
        at += 1

    total = sum(tokens for _, tokens in sentences)
    places = sorted((i + rng.random()) / needles * total for i in range(needles))
    order = rng.sample(range(needles), needles)
    text: list[str] = []
    questions: list[Question] = []
    before = prose = placed = 0
    whole = max(1, total + sum(fact_tokens))

    def place(number: int) -> None:
        nonlocal before
        q = facts[number].question
        questions.append(Question(q.question, q.answer, q.reply, before / whole, q.kind))
        text.append(facts[number].sentence)
        before += fact_tokens[number]

    for sentence, tokens in sentences:
        while placed < needles and places[placed] <= prose:
            place(order[placed])
            placed += 1
        text.append(sentence)
        prose += tokens
        before += tokens
    for number in order[placed:]:
        place(number)
    document = " ".join(text).replace("\n ", "\n").strip()
    return Retrieval(document, tuple(questions))


def _split_reply(text: str, *, tools: bool) -> Any:
    return ReplySplitter(HybridReasoningMode(), tools=tools).feed(text, finished=True)


@dataclass(frozen=True)
class Prompt:
    """A short conversation with the reply that the model is trained to give.

    Attributes:
        messages: what the chat template renders; plain text contents.
        tools: function descriptions as OpenAI's interface has them.
        enable_thinking: passed to the chat template, which closes the thinking itself if false.
        reply: raw text from the end of the prompt to the end of the turn.
        answer: the content after the thinking; for a tool call the call as it is written.
        thinks: the reply must hold thinking. False where the template or "/no_think" ended it.
    """

    kind: PromptKind
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] | None
    enable_thinking: bool
    reply: str
    answer: str
    thinks: bool

    def check(self, text: str) -> Verdict:
        """Judges a raw reply (``<think>`` and all, without the end-of-turn token).

        The form asks for thinking that is there, not empty and closed, or that is absent or empty;
        for an answer without markers; for a tool call, for exactly one call of a function on offer
        and nothing beside it. The answer must be the wanted one, word for word; arguments of a call
        are compared as JSON.
        """
        wants_call = self.kind == "tool_call"
        splitter = ReplySplitter(HybridReasoningMode(), tools=wants_call)
        delta = splitter.feed(text, finished=True)
        content = delta.content.strip()
        thought = bool(delta.reasoning.strip())
        format_ok = (thought and splitter.thought) if self.thinks else not thought
        format_ok = format_ok and "think>" not in content and "<|" not in content
        if not wants_call:
            return Verdict(format_ok and bool(content), content == self.answer)
        names = {tool["function"]["name"] for tool in self.tools or ()}
        one = len(delta.calls) == 1 and not content and delta.calls[0].name in names
        expected = _split_reply(self.answer, tools=True).calls[0]
        right = one and (
            delta.calls[0].name == expected.name
            and json.loads(delta.calls[0].arguments) == json.loads(expected.arguments)
        )
        return Verdict(format_ok and one, bool(right))


@dataclass(frozen=True)
class _Exercise:
    """The parts of a prompt before it is decided how thinking is switched."""

    identity: str
    question: str
    work: str
    answer: str
    tools: tuple[dict[str, Any], ...] | None = None
    earlier: tuple[Message, ...] = ()


def make_prompt(rng: Random, kind: PromptKind, split: Split = "train") -> Prompt:
    """A prompt of a kind.

    "arithmetic_think" always thinks, "arithmetic_no_think" never; of the others half think. Where
    a reply does not think, it was told so by the template or by "/no_think" in the message.
    """
    while True:
        exercise = _EXERCISES[kind](rng)
        if split_of(exercise.identity) == split:
            break
    thinks = kind != "arithmetic_no_think" and (kind == "arithmetic_think" or rng.random() < 0.5)
    by_words = not thinks and rng.random() < 0.4
    question = exercise.question + (" /no_think" if by_words else "")
    if thinks:
        reply = f"<think>\n{exercise.work}\n</think>\n{exercise.answer}"
    elif by_words:
        reply = f"<think>\n\n</think>\n{exercise.answer}"
    else:
        reply = exercise.answer
    return Prompt(
        kind=kind,
        messages=(*exercise.earlier, {"role": "user", "content": question}),
        tools=exercise.tools,
        enable_thinking=thinks or by_words,
        reply=reply,
        answer=exercise.answer,
        thinks=thinks,
    )


def _copy(rng: Random) -> _Exercise:
    words = " ".join(rng.choice(NOUNS) for _ in range(rng.randint(3, 10)))
    question = rng.choice(("Repeat these words: ", "Copy this line: ", "Say exactly this: "))
    return _Exercise(words, question + words, "I repeat the words one by one.", words)


def _count(rng: Random) -> _Exercise:
    word = rng.choice(NOUNS)
    others = [noun for noun in rng.sample(NOUNS, 5) if noun != word]
    words = [word] * rng.randint(1, 5) + [rng.choice(others) for _ in range(rng.randint(1, 6))]
    rng.shuffle(words)
    number = words.count(word)
    listed = ", ".join(f"{word} {i + 1}" for i in range(number))
    line = " ".join(words)
    return _Exercise(
        f"{word}: {line}",
        f"How many times does the word {word} occur here: {line}?",
        f"I count: {listed}.",
        f"The word {word} occurs {number} times.",
    )


def _arithmetic(rng: Random) -> _Exercise:
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    if rng.random() < 0.5:
        sign, result, work = "+", a + b, _add(a, b)
    else:
        a, b = max(a, b), min(a, b)
        sign, result, work = "-", a - b, _subtract(a, b)
    sentence = f"{a} {sign} {b}"
    question = rng.choice(("What is {}?", "Compute {}.", "How much is {}?")).format(sentence)
    return _Exercise(sentence, question, work, f"{sentence} = {result}.")


def _add(a: int, b: int) -> str:
    ones = a % 10 + b % 10
    tens = a // 10 + b // 10 + ones // 10
    return (
        f"Ones: {a % 10} + {b % 10} = {ones}, carry {ones // 10}. "
        f"Tens: {a // 10} + {b // 10} + {ones // 10} = {tens}. "
        f"Together {a + b}."
    )


def _subtract(a: int, b: int) -> str:
    borrow = int(a % 10 < b % 10)
    ones = a % 10 + 10 * borrow - b % 10
    return (
        f"Ones: {a % 10 + 10 * borrow} - {b % 10} = {ones}, borrow {borrow}. "
        f"Tens: {a // 10} - {b // 10} - {borrow} = {a // 10 - b // 10 - borrow}. "
        f"Together {a - b}."
    )


def _tool(function: str, description: str, /, **parameters: str) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {
            "name": function,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {key: {"type": kind} for key, kind in parameters.items()},
                "required": list(parameters),
            },
        },
    }


TOOLS: dict[str, dict[str, Any]] = {
    tool["function"]["name"]: tool
    for tool in (
        _tool("get_weather", "The weather in a city", city="string"),
        _tool("get_time", "The local time in a city", city="string"),
        _tool("set_timer", "Start a timer", minutes="integer"),
        _tool("add_event", "Put an event into the calendar", title="string", day="string"),
        _tool("find_person", "Look up a person", name="string"),
        _tool("book_table", "Book a table", city="string", guests="integer"),
        _tool("multiply", "Multiply two numbers", a="integer", b="integer"),
        _tool("send_message", "Send a message to a person", name="string", text="string"),
    )
}


def _tool_request(rng: Random, name: str) -> tuple[str, dict[str, Any]]:
    city, day = rng.choice(CITIES), rng.choice(DAYS)
    person = f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"
    words = f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
    a, b = rng.randint(2, 99), rng.randint(2, 99)
    if name == "get_weather":
        how = rng.choice(("What is the weather in {}?", "Tell me the weather in {}."))
        return how.format(city), {"city": city}
    if name == "get_time":
        how = rng.choice(("What time is it in {}?", "Tell me the time in {}."))
        return how.format(city), {"city": city}
    if name == "set_timer":
        how = rng.choice(("Set a timer for {} minutes.", "Start a timer of {} minutes."))
        return how.format(a), {"minutes": a}
    if name == "add_event":
        return f"Put {words} into my calendar on {day}.", {"title": words, "day": day}
    if name == "find_person":
        return rng.choice(("Find {}.", "Look up {}.")).format(person), {"name": person}
    if name == "book_table":
        return f"Book a table for {a} guests in {city}.", {"city": city, "guests": a}
    if name == "multiply":
        return rng.choice(("Multiply {} by {}.", "What is {} times {}?")).format(a, b), {
            "a": a,
            "b": b,
        }
    return f"Send {person} the message {words}.", {"name": person, "text": words}


def _tool_call(rng: Random) -> _Exercise:
    offered = rng.sample(sorted(TOOLS), rng.randint(1, 3))
    name = rng.choice(offered)
    question, arguments = _tool_request(rng, name)
    mode = HybridReasoningMode()
    call = render_tool_call(name, arguments)
    answer = f"{mode.call_open}\n```python\n{call}\n```\n{mode.call_close}"
    return _Exercise(
        question,
        question,
        f"I can call {name} for this.",
        answer,
        tools=tuple(TOOLS[tool] for tool in offered),
    )


def _chat(rng: Random) -> _Exercise:
    name = rng.choice(FIRST_NAMES)
    thing = f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
    kind = rng.randrange(5)
    if kind == 0:
        return _Exercise(
            name,
            f"Hello, my name is {name}.",
            f"I greet {name}.",
            f"Hello, {name}. How can I help you?",
        )
    if kind == 1:
        return _Exercise(
            f"remember {name}",
            "What is my name?",
            "The name was said before.",
            f"Your name is {name}.",
            earlier=(
                {"role": "user", "content": f"Hello, my name is {name}."},
                {"role": "assistant", "content": f"Hello, {name}. How can I help you?"},
            ),
        )
    if kind == 2:
        number = rng.randint(1, 99)
        return _Exercise(
            f"{thing} {number}",
            f"The {thing} costs {number} coins. What does the {thing} cost?",
            "The price was said in the question.",
            f"The {thing} costs {number} coins.",
        )
    if kind == 3:
        city = rng.choice(CITIES)
        return _Exercise(
            f"{name} {city}",
            f"{name} lives in {city}. Where does {name} live?",
            "The city was said in the question.",
            f"{name} lives in {city}.",
        )
    polite = rng.choice(("Hello", "Hi", "Good day", "Please tell me", "Say", "Well"))
    return _Exercise(
        f"{polite} {thing}",
        f"{polite}, {name} with the {thing} asks: who are you?",
        "I say what I am.",
        "I am a small MiniCPM4.1 model, made for tests.",
    )


_EXERCISES: dict[PromptKind, Callable[[Random], _Exercise]] = {
    "copy": _copy,
    "count": _count,
    "arithmetic_think": _arithmetic,
    "arithmetic_no_think": _arithmetic,
    "tool_call": _tool_call,
    "chat": _chat,
}
