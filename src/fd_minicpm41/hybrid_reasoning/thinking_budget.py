"""The thinking budget: a logits processor that ends thinking when a request has used it up.

The state of a request is two numbers on the device, moved by each step's token through the tables
of :mod:`~fd_minicpm41.hybrid_reasoning.automaton`. A step gathers from small tables and adds one
number to one logit of each request; nothing is read back, so the host never waits. A request that
is prefilled again after a preemption gets its numbers from its own tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from fd_minicpm41.errors import UsageError
from fd_minicpm41.hybrid_reasoning.automaton import BudgetTables, TokenTexts, build_tables
from fd_minicpm41.hybrid_reasoning.mode import MAX_BUDGET, HybridReasoningMode, check_budget
from fd_minicpm41.hybrid_reasoning.reply import Start

BUDGET_KEY = "thinking_budget"
"""In ``logits_processors_args``: thinking tokens, absent for unlimited."""
START_KEY = "thinking_start"
"""In ``logits_processors_args``: where the reply starts, "auto" if absent."""
GENERATED_KEY = "generated_token_ids"
"""In ``logits_processors_args``: tokens generated before this prefill, which is a repeated one."""

# Added to the logit of a forced token: beyond every logit and penalty, and finite in bf16 and fp16.
_FORCE = {"float32": 1e9, "bfloat16": 1e9, "float16": 3e4}


def load_token_texts(model: str | Path) -> TokenTexts:
    """Reads the checkpoint's ``tokenizer.json``, or has Transformers convert its vocabulary.

    Raises:
        UsageError: neither is possible.
    """
    from tokenizers import Tokenizer

    path = Path(model) / "tokenizer.json"
    if path.is_file():
        tokenizer = Tokenizer.from_file(str(path))
    else:
        try:
            loader = import_module("transformers").AutoTokenizer
            tokenizer = loader.from_pretrained(str(model), use_fast=True).backend_tokenizer
        except Exception as error:
            raise UsageError(
                f"{path} does not exist and cannot be made ({error}): download the checkpoint's "
                "tokenizer.json"
            ) from None
    return TokenTexts(
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        size=tokenizer.get_vocab_size(),
    )


class ThinkingBudget:
    """FastDeploy's logits processor interface: one object a worker, called every step.

    Args:
        fd_config: FastDeploy's configuration, of which the model's folder and vocabulary are read.
    """

    def __init__(self, fd_config: Any) -> None:
        self._mode = HybridReasoningMode.from_environment()
        self._vocab_size = int(fd_config.model_config.vocab_size)
        texts = load_token_texts(fd_config.model_config.model)
        self._host: BudgetTables = build_tables(texts, self._vocab_size, self._mode)
        self._seen: list[Any] = []
        self._limited: list[bool] = []
        self._on = False
        self._ready = False

    def _allocate(self, num_slots: int) -> None:
        """Tables and state on the device of this worker, once."""
        import paddle

        tables = self._host
        self._token_class = paddle.to_tensor(tables.token_class)
        self._base = paddle.to_tensor(tables.base)
        self._follow = paddle.to_tensor(tables.follow)
        self._spent = paddle.to_tensor(tables.spent)
        self._forced = paddle.to_tensor(np.maximum(tables.forced, 0))
        self._must = tables.forced >= 0
        self._push: dict[Any, Any] = {}
        self._rows: dict[int, Any] = {}
        position, left = tables.start("off", MAX_BUDGET)
        self._position = paddle.full([num_slots], position, "int32")
        self._left = paddle.full([num_slots], left, "int32")
        self._seen = [None] * num_slots
        self._limited = [False] * num_slots
        self._ready = True

    def _state_of(self, args: Mapping[str, Any]) -> tuple[int, int]:
        budget = check_budget(BUDGET_KEY, args.get(BUDGET_KEY))
        start: Start = args.get(START_KEY, "auto")
        left = MAX_BUDGET if budget is None else budget
        return self._host.advance(*self._host.start(start, left), args.get(GENERATED_KEY, ()))

    def _insert(self, slots: list[int], args: list[Mapping[str, Any]]) -> None:
        """Sets the state of requests that begin, or begin again, in this step."""
        import paddle

        for slot in slots:
            self._seen[slot] = args[slot]
            self._limited[slot] = args[slot].get(BUDGET_KEY) is not None
        was_on, self._on = self._on, any(self._limited)
        if self._on and not was_on:
            # Slots were not followed meanwhile. Those without a budget need no more than that.
            slots = list(range(len(args)))
        if self._on:
            states = np.array([self._state_of(args[slot]) for slot in slots], np.int32)
            at = paddle.to_tensor(np.array(slots, np.int32))
            paddle.scatter_(self._position, at, paddle.to_tensor(states[:, 0]))
            paddle.scatter_(self._left, at, paddle.to_tensor(states[:, 1]))

    def update_state(self, share_inputs: Any) -> None:
        """Takes the token that each decoding request enters this step with."""
        args = share_inputs["logits_processors_args"]
        if not self._ready:
            self._allocate(len(args))
        # The host puts a new object here whenever it (re)starts a request, and only then.
        seen = self._seen
        new = [slot for slot, value in enumerate(args) if value is not seen[slot]]
        if self._on:
            self._advance(share_inputs)
        if new:
            if getattr(share_inputs, "enable_pd_reorder", False):
                raise UsageError(
                    "FD_PD_REORDER is 1, wanted 0: requests that change places lose their thinking "
                    "budgets; unset it"
                )
            self._insert(new, args)

    def _advance(self, share_inputs: Any) -> None:
        import paddle

        # A prefill has as many tokens as it encodes, a waiting slot has none: 0. A decode: 1.
        one = _flat(share_inputs["seq_lens_this_time_buffer"]) - _flat(
            share_inputs["seq_lens_encoder"]
        )
        kind = paddle.gather(self._token_class, _flat(share_inputs["next_tokens"])) * one
        at = paddle.gather(self._base, self._position) + kind
        self._left.subtract_(paddle.gather(self._spent, at))
        self._position = paddle.gather(self._follow, at) + (self._left > 0).astype("int32")

    def apply(self, logits: Any) -> Any:
        """Raises the forced token of each request that must end its thinking; in place.

        Args:
            logits: ``[slots, vocab]``, the first slots of the server.
        """
        if not self._on:
            return logits
        import paddle

        num_rows = logits.shape[0]
        if num_rows not in self._rows:
            self._rows[num_rows] = paddle.arange(num_rows, dtype="int32")
        if logits.dtype not in self._push:
            force = _FORCE[str(logits.dtype).rpartition(".")[2]]
            self._push[logits.dtype] = paddle.to_tensor((self._must * force).astype(np.float32))
        position = self._position
        if num_rows != position.shape[0]:
            position = position[:num_rows]
        token = paddle.gather(self._forced, position)
        push = paddle.gather(self._push[logits.dtype], position)
        if push.dtype != logits.dtype:
            push = push.astype(logits.dtype)
        return logits.index_put_((self._rows[num_rows], token), push, accumulate=True)


def _flat(tensor: Any) -> Any:
    """A tensor of slots: ``[slots]`` in one version of the host, ``[slots, 1]`` in another."""
    return tensor if len(tensor.shape) == 1 else tensor.reshape([-1])
