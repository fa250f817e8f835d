"""The prompts that a model is examined with, as token ids: the same ones for every engine.

Needs neither Paddle nor PyTorch. Everything is drawn from the held-out split by a seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import get_args

from fd_minicpm41.errors import UsageError
from fd_minicpm41.reference.tokenizer import Tokenizer
from fd_minicpm41.small_model.tasks import (
    ADJECTIVES,
    NOUNS,
    READ,
    Prompt,
    PromptKind,
    Question,
    make_prompt,
    make_retrieval,
)

LENGTHS = (1024, 2048, 4096, 8192, 16384)
PROMPT_KINDS: tuple[PromptKind, ...] = get_args(PromptKind)
# Those whose form is asked for.
FORMAT_KINDS: tuple[PromptKind, ...] = ("arithmetic_think", "arithmetic_no_think", "tool_call")
SEED = 20261123

# Facts of a document: one for so many tokens, within these bounds.
TOKENS_A_NEEDLE = 384
LEAST_NEEDLES, MOST_NEEDLES = 8, 32

# Tokens that sentences may have more of together than apart, and names more than others.
SPARE_TOKENS = 8

# Longer replies are cut: a retrieved sentence has about 20 tokens, the longest work about 90.
ANSWER_TOKENS = 40
REPLY_TOKENS = 160

# A user's words may look like a marker of the template's; these do not.
_MARK = "\u2042"


@dataclass(frozen=True)
class Document:
    """A document that is read once, and what follows it for each of its questions."""

    shared: list[int]
    rests: list[list[int]]
    questions: list[Question]


@dataclass(frozen=True)
class ShortPrompt:
    """A prompt of another task, with what judges its reply."""

    ids: list[int]
    prompt: Prompt


def needles_of(length: int, count: int) -> int:
    """Facts in a document of ``length`` tokens where ``count`` questions are asked in all."""
    return min(count, max(LEAST_NEEDLES, min(MOST_NEEDLES, length // TOKENS_A_NEEDLE)))


def make_documents(
    tokenizer: Tokenizer, paragraphs: Sequence[str], length: int, count: int, seed: int = SEED
) -> list[Document]:
    """Documents with ``count`` questions about them in all; each prompt and its reply together have
    at most ``length`` tokens, and not much less.

    Raises:
        UsageError: a tokenizer that joins a document's end to what follows it.
    """
    rng = Random(f"{seed} {length}")
    needles, room = needles_of(length, count), length - _other_tokens(tokenizer)
    # Documents of one book have many sentences in common.
    length_of = cache(lambda text: len(plain_ids(tokenizer, text)))
    documents = []
    while count > 0:
        made = make_retrieval(rng, paragraphs, length_of, room, needles, "held_out")
        asked = list(made.questions)
        if len(asked) > count:
            asked = sorted(rng.sample(asked, count), key=lambda question: question.depth)
        # The conversation around the document, cut where its text ends.
        marked = [{"role": "user", "content": made.prefix.rstrip() + _MARK}]
        head, after = tokenizer.render_chat(marked, enable_thinking=False).split(_MARK)
        gap = made.prefix[len(made.prefix.rstrip()) :]
        rests = [plain_ids(tokenizer, gap + question.question + after) for question in asked]
        shared = tokenizer.encode(head)
        whole = tokenizer.encode_chat(made.messages(asked[0]), enable_thinking=False)
        if whole != shared + rests[0]:
            raise UsageError(
                "the tokenizer joins the end of a document to the question after it, so that one "
                "reading cannot serve all questions: give a checkpoint whose tokenizer keeps "
                "lines apart"
            )
        documents.append(Document(shared, rests, asked))
        count -= len(asked)
    return documents


def _other_tokens(tokenizer: Tokenizer) -> int:
    """At least the tokens of a question, its reply and the conversation around the document."""
    thing = f"{max(ADJECTIVES, key=len)} {max(NOUNS, key=len)}"
    asked = [{"role": "user", "content": f"{READ}\n\nWhat is the pass key of the {thing}?"}]
    reply = plain_ids(tokenizer, f"The pass key of the {thing} is Christopher Bennett.")
    return len(tokenizer.encode_chat(asked, enable_thinking=False)) + len(reply) + SPARE_TOKENS


def make_short_prompts(
    tokenizer: Tokenizer, kind: PromptKind, count: int, seed: int = SEED
) -> list[ShortPrompt]:
    """Held-out prompts of a kind, all different."""
    rng = Random(f"{seed} {kind}")
    made: dict[tuple[int, ...], Prompt] = {}
    while len(made) < count:
        prompt = make_prompt(rng, kind, "held_out")
        ids = tokenizer.encode_chat(prompt.messages, prompt.enable_thinking, prompt.tools)
        made[tuple(ids)] = prompt
    return [ShortPrompt(list(ids), prompt) for ids, prompt in made.items()]


def make_windows(
    tokenizer: Tokenizer, paragraphs: Sequence[str], length: int, count: int
) -> list[list[int]]:
    """``count`` windows of ``length`` tokens of prose, one after the other.

    Raises:
        UsageError: less prose than that.
    """
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = plain_ids(tokenizer, "\n".join(paragraphs))
    step = length - len(start)
    if len(ids) < count * step:
        raise UsageError(
            f"the held-out prose has {len(ids)} tokens, wanted {count * step} for {count} windows "
            f"of {length}: ask for fewer or shorter ones"
        )
    return [[*start, *ids[i * step : (i + 1) * step]] for i in range(count)]


def plain_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids without BOS."""
    ids = tokenizer.encode(text)
    return ids[1:] if tokenizer.bos_id is not None else ids
