"""FastDeploy's reasoning parser interface, for every signature from 2.5 on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastdeploy.entrypoints.openai.protocol import DeltaMessage
from fastdeploy.reasoning import ReasoningParser

from fd_minicpm41.hybrid_reasoning.mode import HybridReasoningMode
from fd_minicpm41.hybrid_reasoning.reply import ReplySplitter, Start
from fd_minicpm41.hybrid_reasoning.reply_context import current_reply

_HEADER = "<|im_start|>"
_TAIL_TOKENS = 512


class ModelStatus(str):
    """FastDeploy's "think_start" and "think_end", with what it has no word for: where exactly."""

    start: Start

    def __new__(cls, start: Start) -> ModelStatus:
        status = super().__new__(cls, "think_end" if start == "off" else "think_start")
        status.start = start
        return status


def prompt_start(tokenizer: Any, token_ids: Sequence[int], mode: HybridReasoningMode) -> Start:
    """Where the reply to a prompt starts: what the prompt already holds of it decides.

    A prompt without a chat header is not a chat, and what follows it is no thinking.
    """
    ids = [int(token) for token in token_ids]
    header = tokenizer.convert_tokens_to_ids(_HEADER)
    if header in ids and tokenizer.convert_ids_to_tokens(header) == _HEADER:
        last = len(ids) - 1 - ids[::-1].index(header)
        text = tokenizer.decode(ids[last:], skip_special_tokens=False)
    else:
        text = tokenizer.decode(ids[-_TAIL_TOKENS:], skip_special_tokens=False)
    _, found, begun = text.rpartition(_HEADER)
    role, new_line, reply = begun.partition("\n")
    if not (found and new_line and role.strip() == "assistant"):
        return "off"
    splitter = ReplySplitter(mode)
    splitter.feed(reply)
    if splitter.where == "think":
        return "open"
    # Behind a closed block thinking has been switched off or is done.
    return "auto" if splitter.where == "head" and not splitter.thought else "off"


class MiniCPM41ReasoningParser(ReasoningParser):
    """Splits thinking from the answer by text, since the markers are not single tokens."""

    def __init__(self, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(tokenizer)
        self._mode = HybridReasoningMode.from_environment()

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        """Whether thinking has been closed in these tokens."""
        text = self.model_tokenizer.decode(list(input_ids), skip_special_tokens=False)
        return any(pair.close in text for pair in self._mode.markers)

    def extract_content_ids(self, input_ids: list[int]) -> list[int]:
        """The tokens after the one that closes thinking; none while it is open."""
        ids = list(input_ids)
        for end in range(1, len(ids) + 1):
            if self.is_reasoning_end(ids[:end]):
                return ids[end:]
        return []

    def get_model_status(self, prompt_token_ids: Sequence[int]) -> ModelStatus:
        """ "think_start" if the reply to the prompt may think, else "think_end"."""
        return ModelStatus(prompt_start(self.model_tokenizer, prompt_token_ids, self._mode))

    def extract_reasoning_content(
        self, model_output: str, request: Any = None, model_status: str = "think_start", **_: Any
    ) -> tuple[str, str]:
        """Thinking and answer of a whole reply, never ``None``, which FastDeploy cannot count."""
        reply = current_reply.get()
        if reply is not None:
            reply.finished = True
            delta = reply.feed(self._mode, _start(model_status), model_output or "")
            return delta.reasoning, delta.content
        splitter = ReplySplitter(self._mode, start=_start(model_status))
        delta = splitter.feed(model_output or "", finished=True)
        return delta.reasoning, delta.content

    def extract_reasoning_content_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
        model_status: str = "think_start",
        *_: Any,
        **__: Any,
    ) -> DeltaMessage | None:
        """What the next text adds; ``None`` while it is held back as a possible marker.

        Without this package's data processor the parser is told neither the request nor its end:
        it reads the reply again from its start, takes a text without tokens for the end, and leaves
        a block of tool calls in the content, held together for the tool parser to replace.
        """
        reply = current_reply.get()
        if reply is not None:
            delta = reply.feed(self._mode, _start(model_status), delta_text)
            if not delta and not reply.finished:
                return None
            return DeltaMessage(reasoning_content=delta.reasoning, content=delta.content)
        splitter = ReplySplitter(self._mode, start=_start(model_status), tools=True)
        splitter.feed(previous_text)
        delta = splitter.feed(delta_text, finished=not delta_token_ids)
        return DeltaMessage(reasoning_content=delta.reasoning, content=delta.text)


def _start(model_status: str) -> Start:
    if isinstance(model_status, ModelStatus):
        return model_status.start
    return "off" if model_status == "think_end" else "auto"
