"""Batches for training, drawn ahead of time by worker processes.

A sequence is one document with facts and all its questions, or prose, or short chats one after the
other. Nothing here needs PyTorch.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as FastTokenizer

from fd_minicpm41.reference.tokenizer import Tokenizer
from fd_minicpm41.small_model import tasks
from fd_minicpm41.small_model.tasks import Message, Question, Retrieval, Split

# What a token is to the loss. The first token of a value is what has to be found; the others of
# it only go on from there.
IGNORED, PROSE, REPLY, VALUE, FIRST = range(5)

END = "<|im_end|>"
# Rotary positions of short documents are stretched to this span, so that a fact is looked for over
# long distances from the beginning of training on.
LONGEST = 16384
QUESTION_TOKENS = 56
# A fact in its shortest form.
DRILL_TOKENS = 15
HEAD_TOKENS = 24
# Documents of these lengths hold at most so many facts.
MOST_FACTS = {256: 2, 512: 5, 1024: 10, 2048: 16, 4096: 20, 8192: 24, 16384: 32}
THINKING_DOCUMENTS = 0.2
THINKING = "I look it up in the text."
THINKING_TOKENS = 16


@dataclass(frozen=True)
class Batch:
    """ids int16, kinds uint8, positions int32, each ``[sequences, length]``."""

    ids: NDArray[np.int16]
    kinds: NDArray[np.uint8]
    positions: NDArray[np.int32]


@dataclass(frozen=True)
class Recipe:
    """What a batch of one length consists of; shares of sequences, the rest is prose.

    ``stretch`` is the share of documents and drills whose positions are stretched.
    """

    length: int
    tokens: int
    retrieval: float
    chats: float
    stretch: float = 0.0
    drills: float = 0.0


class Writer:
    """Texts to tokens, by the checkpoint's own tokenizer and chat template."""

    def __init__(self, folder: Path, paragraphs: Sequence[str]) -> None:
        self.chat = Tokenizer(folder)
        self._fast = FastTokenizer.from_file(str(folder / "tokenizer.json"))
        self.paragraphs = paragraphs
        self.length_of = cache(lambda text: len(self.encode(text)))
        assert self.chat.bos_id is not None
        self.bos = self.chat.bos_id

    def encode(self, text: str) -> list[int]:
        """Token ids without BOS."""
        return list(self._fast.encode(text, add_special_tokens=False).ids)

    def prose(self, rng: Random, length: int) -> list[int]:
        """BOS and consecutive paragraphs, exactly ``length`` tokens."""
        ids, at = [self.bos], rng.randrange(len(self.paragraphs))
        while len(ids) < length:
            ids += self.encode(self.paragraphs[at % len(self.paragraphs)] + "\n")
            at += 1
        return ids[:length]

    def retrieval(
        self, rng: Random, target_tokens: int, facts: int, split: Split = "train"
    ) -> Retrieval:
        """A document of at most ``target_tokens`` tokens."""
        return tasks.make_retrieval(
            rng, self.paragraphs, self.length_of, target_tokens, facts, split
        )

    def document_segments(self, made: Retrieval, prompt: str) -> list[tuple[str, int]]:
        """A prompt with a document. Of it only what a fact repeats of itself is learned: prose in
        documents would be seen too often and be learned by heart."""
        segments, done = [], 0
        for question in made.questions:
            start = prompt.index(question.reply) + len(question.reply) + len(tasks.REMEMBER)
            end = prompt.index(".", start) + 1
            segments += [(prompt[done:start], IGNORED), (prompt[start:end], REPLY)]
            done = end
        return [*segments, (prompt[done:], IGNORED)]

    def reply_segments(self, question: Question, thinking: bool) -> list[tuple[str, int]]:
        """The reply to a question; the value is told apart."""
        before, value, after = question.reply.rpartition(" " + question.answer)
        if thinking:
            before = f"<think>\n{THINKING}\n</think>\n{before}"
        return [(before, REPLY), (value, VALUE), (after + END, REPLY), ("\n", IGNORED)]

    def document_sequence(
        self, rng: Random, length: int, split: Split = "train"
    ) -> list[tuple[str, int]]:
        """A document and questions about its facts, as one conversation.

        A fact may be asked for twice: else the last ones could be told by elimination.
        """
        most = MOST_FACTS[length]
        facts = rng.randint(max(2, most // 2), most)
        thinking = rng.random() < THINKING_DOCUMENTS
        each = QUESTION_TOKENS + (THINKING_TOKENS if thinking else 0)
        made = self.retrieval(rng, length - facts * each - HEAD_TOKENS, facts, split)
        segments: list[tuple[str, int]] = []
        for i, question in enumerate(rng.choices(made.questions, k=facts)):
            alone: list[Message] = [{"role": "user", "content": question.question}]
            messages = made.messages(question) if i == 0 else alone
            prompt = self.chat.render_chat(messages, enable_thinking=thinking)
            segments += self.document_segments(made, prompt) if i == 0 else [(prompt, IGNORED)]
            segments += self.reply_segments(question, thinking)
        return segments

    def drill_segments(
        self, rng: Random, length: int, split: Split = "train"
    ) -> list[tuple[str, int]]:
        """Facts told once, then again in any order, some more often: many times more matches to
        learn from than a document has, and in the words of its replies."""
        facts = tasks.draw_questions(rng, (length - 2) // (2 * DRILL_TOKENS), split)
        segments = [(" ".join(fact.reply for fact in facts) + "\n", IGNORED)]
        for fact in rng.choices(facts, k=len(facts)):
            before, value, after = fact.reply.rpartition(" " + fact.answer)
            segments += [(before, IGNORED), (value, VALUE), (after + "\n", IGNORED)]
        return segments

    def chat_segments(self, rng: Random) -> list[tuple[str, int]]:
        """One short conversation of a random kind."""
        prompt = tasks.make_prompt(rng, rng.choice(tasks.PROMPT_KINDS))
        text = self.chat.render_chat(prompt.messages, prompt.enable_thinking, prompt.tools)
        return [(text, IGNORED), (prompt.reply + END, REPLY)]

    def tokens(self, segments: Sequence[tuple[str, int]]) -> tuple[list[int], list[int]]:
        """BOS and the segments' tokens, with their kinds."""
        ids, kinds = [self.bos], [IGNORED]
        for text, kind in segments:
            part = self.encode(text)
            ids += part
            kinds += [FIRST if kind == VALUE else kind, *[kind] * (len(part) - 1)] if part else []
        return ids, kinds

    def sequence(
        self, rng: Random, recipe: Recipe, split: Split = "train"
    ) -> tuple[list[int], list[int], list[int]]:
        """ids, kinds and positions of one sequence, padded to the recipe's length."""
        length, which = recipe.length, rng.random()
        positions = list(range(length))
        if which < recipe.retrieval:
            ids, kinds = self.tokens(self.document_sequence(rng, length, split))
        elif which < recipe.retrieval + recipe.drills:
            ids, kinds = self.tokens(self.drill_segments(rng, length, split))
        elif which < recipe.retrieval + recipe.drills + recipe.chats:
            ids, kinds = [], []
            while len(ids) < length:
                some, their_kinds = self.tokens(self.chat_segments(rng))
                if len(ids) + len(some) > length:
                    break
                ids += some
                kinds += their_kinds
        else:
            ids = self.prose(rng, length)
            kinds = [PROSE] * length
        if which < recipe.retrieval + recipe.drills and rng.random() < recipe.stretch:
            positions = stretched(rng, length)
        pad = length - len(ids)
        ids, kinds = ids + [0] * pad, kinds + [IGNORED] * pad
        return ids[:length], kinds[:length], positions

    def batch(self, rng: Random, recipe: Recipe, split: Split = "train") -> Batch:
        """As many sequences as the recipe's tokens make."""
        count = recipe.tokens // recipe.length
        made = [self.sequence(rng, recipe, split) for _ in range(count)]
        ids, kinds, positions = zip(*made, strict=True)
        return Batch(
            np.asarray(ids, np.int16), np.asarray(kinds, np.uint8), np.asarray(positions, np.int32)
        )


def stretched(rng: Random, length: int) -> list[int]:
    """Ascending positions with up to four gaps, over a random span of at most ``LONGEST``."""
    span = int(length * (LONGEST / length) ** rng.random())
    gaps = sorted(rng.randint(0, span - length) for _ in range(rng.randint(1, 4)))
    places = sorted(rng.randrange(1, length) for _ in gaps)
    positions, shift = [], 0
    for i in range(length):
        while places and places[0] <= i:
            places.pop(0)
            shift = gaps.pop(0)
        positions.append(i + shift)
    return positions


class Feeder:
    """Worker processes that keep a queue of batches filled for every recipe.

    Batches of the recipes named in :meth:`want` are made first. The same seed draws the same
    batches; which of them come first depends on the machine.
    """

    def __init__(
        self,
        folder: Path,
        paragraphs: Sequence[str],
        recipes: dict[str, Recipe],
        seed: int,
        workers: int,
        depth: int = 8,
    ) -> None:
        context = multiprocessing.get_context("fork")
        self._names = list(recipes)
        self._queues = {name: context.Queue(depth) for name in recipes}
        self._wanted = context.Value("Q", (1 << len(recipes)) - 1)
        self._processes = [
            context.Process(
                target=_work,
                args=(
                    folder,
                    paragraphs,
                    recipes,
                    f"{seed}/{worker}",
                    self._queues,
                    self._wanted,
                ),
                daemon=True,
            )
            for worker in range(workers)
        ]
        for process in self._processes:
            process.start()

    def want(self, names: Sequence[str]) -> None:
        """Makes only batches of these recipes from now on."""
        self._wanted.value = sum(1 << self._names.index(name) for name in names)

    def get(self, name: str) -> Batch:
        """The next batch of a recipe."""
        while True:
            try:
                batch: Batch = self._queues[name].get(timeout=30)
                return batch
            except queue.Empty:
                if not any(process.is_alive() for process in self._processes):
                    raise RuntimeError("the processes that draw batches have died") from None

    def close(self) -> None:
        """Ends the workers."""
        for process in self._processes:
            process.kill()


def _work(
    folder: Path,
    paragraphs: Sequence[str],
    recipes: dict[str, Recipe],
    name: str,
    queues: dict[str, Any],
    wanted: Synchronized[int],
) -> None:
    writer = Writer(folder, paragraphs)
    drawn = dict.fromkeys(recipes, 0)
    names = list(recipes)
    parent = os.getppid()
    while os.getppid() == parent:  # a killed parent ends nobody by itself
        mask = wanted.value
        # The emptiest queue first, so that none runs dry.
        listed = [n for i, n in enumerate(names) if mask >> i & 1]
        kind = min(listed, key=lambda n: queues[n].qsize())
        if queues[kind].full():
            time.sleep(0.005)
            continue
        batch = writer.batch(Random(f"{name}/{kind}/{drawn[kind]}"), recipes[kind])
        drawn[kind] += 1
        # Another worker may have been faster. Waiting must end when the queue is not wanted.
        while wanted.value == mask and os.getppid() == parent:
            try:
                queues[kind].put(batch, timeout=0.1)
                break
            except queue.Full:
                continue
