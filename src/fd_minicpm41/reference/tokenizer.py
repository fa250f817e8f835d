"""Text to token ids and back, and the chat template, from the checkpoint's own files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer

from fd_minicpm41.config import read_json
from fd_minicpm41.errors import UsageError

Message = Mapping[str, Any]


class _Pieces(Protocol):
    """What is needed of a tokenizer library; no special token is ever added."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def token_id(self, token: str) -> int | None: ...

    def adds_bos(self, bos_id: int) -> bool: ...


class Tokenizer:
    """A checkpoint's tokenizer.

    ``tokenizer.json`` is preferred; a folder that has only ``tokenizer.model`` needs the package
    ``sentencepiece``. BOS is added in one place, here: exactly once to every prompt, chat or plain,
    if the model uses one, even where the chat template writes none or writes it itself.

    Attributes:
        bos_id: the token that starts every prompt; ``None`` if the model uses none.
        stop_ids: the tokens that end a text, from the tokenizer's and the generation's settings.

    Raises:
        UsageError: a missing or damaged file.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        settings = _optional_json(folder, "tokenizer_config.json")
        if (folder / "tokenizer.json").exists():
            self._pieces: _Pieces = _FastPieces(folder / "tokenizer.json")
        elif (folder / "tokenizer.model").exists():
            self._pieces = _SentencePieces(folder / "tokenizer.model", settings)
        else:
            raise UsageError(
                f"{folder} holds neither tokenizer.json nor tokenizer.model: copy the tokenizer's "
                "files of the model there"
            )
        generation = _optional_json(folder, "generation_config.json")
        config = _optional_json(folder, "config.json")
        self._bos_token = _token_text(settings.get("bos_token"))
        self._eos_token = _token_text(settings.get("eos_token"))
        self.bos_id = self._find_bos(settings)
        self.stop_ids = _token_ids(generation.get("eos_token_id", config.get("eos_token_id")))
        eos_id = self._pieces.token_id(self._eos_token) if self._eos_token else None
        if eos_id is not None:
            self.stop_ids |= {eos_id}
        self._template = _chat_template(folder, settings)

    def _find_bos(self, settings: Mapping[str, Any]) -> int | None:
        """The setting ``add_bos_token`` decides; where it is absent, what the tokenizer does."""
        bos_id = self._pieces.token_id(self._bos_token) if self._bos_token else None
        if bos_id is None:
            return None
        adds_bos = settings.get("add_bos_token")
        if adds_bos is None:
            adds_bos = self._pieces.adds_bos(bos_id)
        return bos_id if adds_bos else None

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain prompt, BOS first if the model uses one."""
        return self._with_bos(self._pieces.encode(text))

    def encode_chat(
        self,
        messages: Sequence[Message],
        enable_thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Token ids of a conversation up to the start of the assistant's answer.

        Args:
            messages: objects with ``role`` and ``content``.
            enable_thinking: passed to the template; ``None`` leaves the template's own default.
            tools: function descriptions as OpenAI's interface has them.
        """
        text = self.render_chat(messages, enable_thinking, tools)
        return self._with_bos(self._pieces.encode(text))

    def render_chat(
        self,
        messages: Sequence[Message],
        enable_thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The conversation as the checkpoint's template writes it.

        Raises:
            UsageError: no template, or one that fails on these messages.
        """
        if self._template is None:
            raise UsageError(
                "the checkpoint has no chat template: use plain prompts (generate), or add "
                "chat_template to tokenizer_config.json"
            )
        values: dict[str, Any] = {
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": True,
            "bos_token": self._bos_token or "",
            "eos_token": self._eos_token or "",
            "tools": None if tools is None else [dict(tool) for tool in tools],
        }
        if enable_thinking is not None:
            values["enable_thinking"] = enable_thinking
        try:
            return _compiled(self._template).render(values)
        except TemplateError as error:
            raise UsageError(
                f"the chat template fails ({type(error).__name__}: {error}): correct "
                "chat_template in tokenizer_config.json"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens; bytes of no character give U+FFFD."""
        return self._pieces.decode(ids)

    def _with_bos(self, ids: list[int]) -> list[int]:
        return ids if self.bos_id is None or ids[:1] == [self.bos_id] else [self.bos_id, *ids]


class _FastPieces:
    """``tokenizer.json``, read by the package ``tokenizers``."""

    def __init__(self, path: Path) -> None:
        try:
            self._tokenizer = FastTokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise UsageError(f"{path} cannot be read ({error}): download it again") from None

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def token_id(self, token: str) -> int | None:
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def adds_bos(self, bos_id: int) -> bool:
        return list(self._tokenizer.encode("").ids[:1]) == [bos_id]


class _SentencePieces:
    """``tokenizer.model``, read by ``sentencepiece``; added tokens are cut out first."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError:
            raise UsageError(
                f"{path} needs the package sentencepiece: pip install sentencepiece"
            ) from None
        try:
            self._processor = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise UsageError(f"{path} cannot be read ({error}): download it again") from None
        added = settings.get("added_tokens_decoder", {})
        self._added = {token["content"]: int(token_id) for token_id, token in added.items()}
        self._special = {int(i) for i, token in added.items() if token.get("special", False)}
        self._special |= {i for i in range(len(self._processor)) if self._processor.IsControl(i)}
        self._added_text = {i: text for text, i in self._added.items()}
        longest_first = sorted(self._added, key=len, reverse=True)
        self._cut = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def encode(self, text: str) -> list[int]:
        parts = self._cut.split(text) if self._added else [text]
        ids: list[int] = []
        for part in parts:
            if part in self._added:
                ids.append(self._added[part])
            elif part:
                ids += self._processor.EncodeAsIds(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text, run = "", []
        for token_id in ids:
            if token_id in self._special:
                continue
            if token_id < len(self._processor) and token_id not in self._added_text:
                run.append(int(token_id))
                continue
            text += self._processor.DecodeIds(run) + self._added_text.get(token_id, "")
            run = []
        return text + str(self._processor.DecodeIds(run))

    def token_id(self, token: str) -> int | None:
        if token in self._added:
            return self._added[token]
        token_id = int(self._processor.PieceToId(token))
        return token_id if self._processor.IdToPiece(token_id) == token else None

    def adds_bos(self, bos_id: int) -> bool:
        # Llama's tokenizer class, which such files are made for, adds one unless told not to.
        return True


@cache
def _compiled(template: str) -> Template:
    return _template_environment().from_string(template)


def _template_environment() -> ImmutableSandboxedEnvironment:
    """A checkpoint is data from elsewhere: its template may compute text and nothing else."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: object, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    environment.filters["tojson"] = tojson
    return environment


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} cannot be read ({error}): download it again") from None
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if template is not None and not isinstance(template, str):
        raise UsageError(
            f"{folder / 'tokenizer_config.json'}: chat_template is {type(template).__name__}, "
            "wanted text: download the file again"
        )
    return template


def _optional_json(folder: Path, name: str) -> dict[str, Any]:
    return read_json(folder, name) if (folder / name).exists() else {}


def _token_text(token: object) -> str | None:
    """A special token is written as text or as an object with its text in ``content``."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _token_ids(value: object) -> frozenset[int]:
    listed = value if isinstance(value, list) else [value]
    return frozenset(i for i in listed if isinstance(i, int))
