"""Where a reply stands, token by token, and what to say when its thinking budget is used up.

The markers of thinking are several tokens, cut differently after different characters, so tokens
are not compared with markers. Each token is the text that it adds, and the text drives an automaton
that knows how much of a marker has been written. With the forced endings it becomes one table of
small integers, the same on the host and on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fd_minicpm41.errors import UsageError
from fd_minicpm41.hybrid_reasoning.mode import HybridReasoningMode
from fd_minicpm41.hybrid_reasoning.reply import _SPACE, Start

State = tuple[Any, ...]
"""("answer",), ("head", written) or ("think", number of the pair, characters matched, new line)."""
ANSWER: State = ("answer",)
HEAD: State = ("head", "")

Decode = Callable[[list[int]], str]
Encode = Callable[[str], list[int]]


class TokenTexts:
    """The text that each token adds after another, and how to write a text as tokens.

    Args:
        decode: text of a list of ids, special tokens included.
        encode: ids of a text, without special tokens around it.
        size: number of ids of the tokenizer.
    """

    def __init__(self, decode: Decode, encode: Encode, size: int) -> None:
        self._encode = encode
        # A first token may lose its leading space, so every token is read behind another.
        anchor = encode("x")[-1:]
        before = decode(anchor)
        self.texts = []
        for token in range(size):
            text = decode([*anchor, token])
            self.texts.append(
                text[len(before) :] if text.startswith(before) else "\N{REPLACEMENT CHARACTER}"
            )

    @cached_property
    def _longest_first(self) -> list[tuple[str, int]]:
        ascii_texts = {t: i for i, t in reversed(list(enumerate(self.texts))) if t and t.isascii()}
        return sorted(ascii_texts.items(), key=lambda item: -len(item[0]))

    def pieces(self, text: str, contexts: Iterable[str]) -> list[int]:
        """Tokens that add exactly ``text``, cut as the tokenizer cuts it after one of the contexts.

        The first context in which a border between tokens falls on the beginning of ``text`` is
        taken; where none does, the longest pieces that fit.

        Raises:
            UsageError: the tokenizer cannot write the text.
        """
        for context in contexts:
            found: list[int] = []
            left = len(text)
            for token in reversed(self._encode(context + text)):
                if left <= 0:
                    break
                found.insert(0, token)
                left -= len(self.texts[token])
            if left == 0 and "".join(self.texts[token] for token in found) == text:
                return found
        found, rest = [], text
        while rest:
            piece = next((item for item in self._longest_first if rest.startswith(item[0])), None)
            if piece is None:
                # Outside ASCII a character may be several byte tokens: left to the tokenizer above.
                raise UsageError(
                    f"the tokenizer cannot write {text!r} in one way after another text: choose "
                    "another closing sentence"
                )
            found.append(piece[1])
            rest = rest[len(piece[0]) :]
        return found


def _step(state: State, char: str, mode: HybridReasoningMode) -> State:
    """The state after one more character; the same rules as ``ReplySplitter``."""
    if state == ANSWER:
        return state
    if state[0] == "head":
        if state == HEAD and char in _SPACE:
            return state
        text = state[1] + char
        for number, markers in enumerate(mode.markers):
            if text == markers.open:
                return ("think", number, 0, False)
        opens = any(markers.open.startswith(text) for markers in mode.markers)
        return ("head", text) if opens else ANSWER
    _, number, matched, _ = state
    close = mode.markers[number].close
    text = close[:matched] + char
    while text and not close.startswith(text):
        text = text[1:]
    if text == close:
        return HEAD
    return ("think", number, len(text), char == "\n")


@dataclass(frozen=True)
class BudgetTables:
    """The automaton as arrays; a position ``u`` is ``2 * state + (1 if budget is left)``.

    Attributes:
        token_class: int32 ``[vocab]``, tokens that act alike share a class; class 0 is no token.
        base: int32 ``[2 * states]``, where the row of a position begins in the next two.
        follow: int32 ``[states * classes]``, ``2 * state`` after a token.
        spent: int32 ``[states * classes]``, 1 where the token is one of thinking.
        forced: int32 ``[2 * states]``, the token that must follow, -1 for any.
        starts: the state a reply starts in.
    """

    token_class: NDArray[np.int32]
    base: NDArray[np.int32]
    follow: NDArray[np.int32]
    spent: NDArray[np.int32]
    forced: NDArray[np.int32]
    starts: dict[Start, int]

    def advance(self, position: int, left: int, tokens: Sequence[int]) -> tuple[int, int]:
        """Position and budget left after ``tokens``: what the device does, on the host."""
        for token in tokens:
            at = self.base[position] + self.token_class[token]
            left -= int(self.spent[at])
            position = int(self.follow[at]) + (left > 0)
        return position, left

    def start(self, start: Start, budget: int) -> tuple[int, int]:
        """Position and budget left before the first token."""
        return 2 * self.starts[start] + (budget > 0), budget


def build_tables(texts: TokenTexts, vocab_size: int, mode: HybridReasoningMode) -> BudgetTables:
    """The tables of a tokenizer; about a second for 73,000 tokens."""
    markers_text = "".join(pair.open + pair.close for pair in mode.markers)
    alphabet = sorted(set(markers_text + _SPACE))
    # Stands for every character that is in no marker.
    other = next(chr(i) for i in range(0x100, 0x200) if chr(i) not in alphabet)

    opened: State = ("think", 0, 0, True)
    states: list[State] = [ANSWER, HEAD, opened]
    for state in states:
        for char in [*alphabet, other]:
            after = _step(state, char, mode)
            if after not in states:
                states.append(after)
    index = {state: i for i, state in enumerate(states)}

    # An ending for every way in which thinking can stand, laid out behind the states.
    forced_tokens: list[int] = []
    forced_next: list[int] = []
    entry: dict[int, int] = {}
    sentence = mode.closing_sentence
    for state in states:
        if state[0] != "think":
            continue
        _, number, matched, new_line = state
        close = mode.markers[number].close + "\n"
        if matched:
            # The model has begun to close by itself: only finish it.
            ending, context = close[matched:], close[:matched]
        else:
            lead = "" if new_line else "\n"
            said = f"{lead}{sentence}\n" if sentence else lead
            ending, context = said + close, "\n" if new_line else ""
        tokens = texts.pieces(ending, (f"a\n{context}", f"a{context}", "a ", "a.", ">"))
        entry[index[state]] = len(states) + len(forced_tokens)
        for i, token in enumerate(tokens):
            last = i == len(tokens) - 1
            forced_next.append(index[HEAD] if last else len(states) + len(forced_tokens) + 1)
            forced_tokens.append(token)

    # Every token from every state, character by character, all tokens at once.
    column = {char: i + 1 for i, char in enumerate([*alphabet, other])}
    delta = np.empty((len(states), len(column) + 1), np.int16)
    delta[:, 0] = np.arange(len(states))
    for i, state in enumerate(states):
        for char, j in column.items():
            delta[i, j] = index[_step(state, char, mode)]
    ends = np.tile(np.arange(len(states), dtype=np.int16)[:, None], (1, vocab_size))
    written = list(texts.texts[:vocab_size])
    place = 0
    rows = np.arange(len(written))
    while rows.size:
        rows = np.array([i for i in rows if len(written[i]) > place], np.int64)
        chars = np.array([column.get(written[i][place], column[other]) for i in rows], np.int64)
        if rows.size:
            ends[:, rows] = delta[ends[:, rows], chars[None, :]]
        place += 1
    kinds, token_kind = np.unique(ends, axis=1, return_inverse=True)

    num_states, num_classes = len(states) + len(forced_tokens), kinds.shape[1] + 1
    follow = np.empty((num_states, num_classes), np.int32)
    follow[:, 0] = np.arange(num_states)
    follow[: len(states), 1:] = kinds
    follow[len(states) :, 1:] = np.array(forced_next, np.int32).reshape(-1, 1)
    spent = np.zeros((num_states, num_classes), np.int32)
    effective = np.repeat(np.arange(num_states), 2)
    for number, at in entry.items():
        spent[number, 1:] = 1
        effective[2 * number] = at
    must = np.full(num_states, -1, np.int32)
    must[len(states) :] = forced_tokens
    return BudgetTables(
        token_class=(token_kind.reshape(-1) + 1).astype(np.int32),
        base=(effective * num_classes).astype(np.int32),
        follow=(2 * follow).reshape(-1),
        spent=spent.reshape(-1),
        forced=must[effective],
        starts={"auto": index[HEAD], "open": index[opened], "off": index[ANSWER]},
    )
