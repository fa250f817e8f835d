"""What answers the suite's prompts: the readable reference, the ops, or a FastDeploy server.

A document is read once and answers many questions: they share their first tokens, and each goes on
from a cache that holds those.
"""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from fd_minicpm41.errors import UsageError
from fd_minicpm41.small_model.scores import AttentionName

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fd_minicpm41.quantization.evaluation import Side

# Tokens of a prompt that are read at once: the reference holds the scores of all of them.
CHUNKS = {"reference": 512, "ops": 2048}
REPLY_SECONDS = 600.0

# Told the tokens that were read or written.
OnTokens = Callable[[int], object]


class Engine(Protocol):
    """A model with its attention and its weights."""

    def answer(
        self,
        shared: Sequence[int],
        rests: Sequence[Sequence[int]],
        max_tokens: int,
        on_tokens: OnTokens,
    ) -> list[list[int]]:
        """The greedy replies to ``shared + rest`` for each of ``rests``, without the stop token."""
        ...

    def negative_log_likelihood(self, window: Sequence[int], on_tokens: OnTokens) -> float | None:
        """Sum over every token but the first, in nats; ``None`` where it cannot be had."""
        ...

    def blocks_read(self) -> float | None:
        """Share of the blocks before them that the sparse rows of replies and questions read, since
        the last time this was asked; ``None`` without such rows."""
        ...


class LocalEngine:
    """A model in this process.

    Args:
        folder: a checkpoint, low-bit or not.
        name: "reference" masks what is not selected, "ops" runs the project's kernels.
        attention: "sparse" takes the checkpoint's ``sparse_config``.
        side: the weights and what the linear layers do to their input; ``None`` for the folder's.

    Raises:
        UsageError: whatever is wrong with the checkpoint.
    """

    def __init__(
        self,
        folder: str | Path,
        name: Literal["reference", "ops"],
        attention: AttentionName,
        side: Side | None = None,
        stop_ids: frozenset[int] = frozenset(),
    ) -> None:
        from fd_minicpm41.config import MiniCPMConfig
        from fd_minicpm41.quantization.evaluation import Side, round_inputs
        from fd_minicpm41.reference.checkpoint import Checkpoint
        from fd_minicpm41.reference.model import ForCausalLM

        config = MiniCPMConfig.from_pretrained(folder)
        if attention == "sparse" and config.sparse is None:
            raise UsageError(
                f"{folder}/config.json has no sparse_config, which sparse attention needs: add it, "
                "or ask for --attention dense"
            )
        checkpoint = Checkpoint(folder)
        checkpoint.check(config)
        side = side or Side.of(checkpoint)
        self._model = ForCausalLM(config, side.load, side.tied)
        for layer in self._model.model.layers:
            round_inputs(layer, side.rounding)
        self._sparse = config.sparse if attention == "sparse" else None
        self._chunk = CHUNKS[name]
        self._stop_ids = stop_ids
        self._attended = self._present = 0
        if name == "ops":
            from fd_minicpm41.small_model.paged import PagedCache, put_ops_in

            put_ops_in(self._model, checkpoint)
            self._cache_type: Callable[..., Any] = PagedCache
        else:
            from fd_minicpm41.reference.model import KVCache

            self._cache_type = KVCache

    def answer(
        self,
        shared: Sequence[int],
        rests: Sequence[Sequence[int]],
        max_tokens: int,
        on_tokens: OnTokens,
    ) -> list[list[int]]:
        from fd_minicpm41.reference.sampling import generate

        room = len(shared) + max(map(len, rests)) + max_tokens
        cache = self._cache_type(self._model.config, room, self._sparse)
        if shared:
            self._model.prefill(shared, cache, self._chunk, on_tokens)
        cache.blocks_attended = cache.blocks_present = 0
        replies = []
        for rest in rests:
            cache.rewind(len(shared))
            reply: list[int] = []
            tokens: Iterator[int] = generate(
                self._model, cache, rest, max_tokens, stop_ids=self._stop_ids, on_prefill=on_tokens
            )
            for token in tokens:
                reply.append(token)
                on_tokens(1)
            replies.append(reply)
        self._attended += cache.blocks_attended
        self._present += cache.blocks_present
        return replies

    def negative_log_likelihood(self, window: Sequence[int], on_tokens: OnTokens) -> float:
        import paddle

        from fd_minicpm41.quantization.evaluation import log_softmax

        cache = self._cache_type(self._model.config, len(window), self._sparse)
        total = 0.0
        for start in range(0, len(window) - 1, self._chunk):
            part = window[start : start + self._chunk]
            targets = window[start + 1 : start + 1 + len(part)]
            log = log_softmax(self._model(part, cache)[: len(targets)])
            wanted = paddle.to_tensor(targets, "int64").unsqueeze(1)
            total -= float(paddle.take_along_axis(log, wanted, axis=1).sum())
            on_tokens(len(part))
        return total

    def blocks_read(self) -> float | None:
        share = self._attended / self._present if self._present else None
        self._attended = self._present = 0
        return share


class ServerEngine:
    """A running FastDeploy server, asked for the tokens of greedy completions.

    Which weights and which attention it has, it was started with; its prefix cache is what shares a
    document among questions.

    Args:
        url: such as ``http://127.0.0.1:8180``.

    Raises:
        UsageError, when it is asked: no server there, or an answer without token ids.
    """

    def __init__(self, url: str, stop_ids: frozenset[int] = frozenset()) -> None:
        self._url = url.rstrip("/").removesuffix("/v1") + "/v1/completions"
        self._stop_ids = stop_ids

    def answer(
        self,
        shared: Sequence[int],
        rests: Sequence[Sequence[int]],
        max_tokens: int,
        on_tokens: OnTokens,
    ) -> list[list[int]]:
        replies = []
        for index, rest in enumerate(rests):
            reply = self._complete([*shared, *rest], max_tokens)
            replies.append(reply)
            on_tokens((0 if index else len(shared)) + len(rest) + len(reply))
        return replies

    def negative_log_likelihood(self, window: Sequence[int], on_tokens: OnTokens) -> None:
        """A server gives no likelihoods of a prompt by default: not measured through it."""

    def blocks_read(self) -> None:
        """A server does not count them."""

    def _complete(self, prompt: list[int], max_tokens: int) -> list[int]:
        body = {
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "return_token_ids": True,
        }
        request = urllib.request.Request(
            self._url, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=REPLY_SECONDS) as answer:
                values = json.load(answer)
            ids = [int(i) for i in values["choices"][0]["completion_token_ids"]]
        except urllib.error.HTTPError as error:
            said = " ".join(error.read().decode("utf-8", "replace").split())[:300]
            raise UsageError(
                f"{self._url} refuses a prompt of {len(prompt)} tokens ({error.code}: {said}): "
                "start the server with a larger --max-model-len, or ask for smaller --lengths"
            ) from None
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{self._url} gives no answer ({error}): start `fastdeploy serve` and give its "
                "address with --url"
            ) from None
        except (KeyError, IndexError, TypeError):
            raise UsageError(
                f"{self._url} answers without completion_token_ids: give the address of a "
                "FastDeploy server of version 2.5 or later"
            ) from None
        # A reply ends with the stop token.
        while ids and ids[-1] in self._stop_ids:
            ids.pop()
        return ids


def perplexity(total: float, tokens: int) -> float:
    """From a sum of negative log-likelihoods in nats."""
    return math.exp(total / tokens)
