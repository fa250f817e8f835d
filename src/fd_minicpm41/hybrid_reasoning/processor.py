"""FastDeploy's data processor for this model: what a request asks and whose reply a text is.

It is the host's own processor with its parsers on by default, the switch and the budget resolved,
one BOS, and each reply split by a splitter of its own that knows when the reply ends.
"""

from __future__ import annotations

import inspect
import sys
from functools import cached_property
from typing import Any

from fastdeploy.utils import llm_logger as logger

try:
    from fastdeploy.input.text_processor import TextProcessor as _HostProcessor
except ImportError:  # before 2.6
    from fastdeploy.input.text_processor import DataProcessor as _HostProcessor

from fd_minicpm41.config import ARCHITECTURE
from fd_minicpm41.errors import UsageError
from fd_minicpm41.hybrid_reasoning.chat_template import (
    bundled_template,
    lacking,
    prepare_messages,
    prompt_switch,
    tools_as_sent,
    uses_tools,
    with_one_bos,
)
from fd_minicpm41.hybrid_reasoning.mode import HybridReasoningMode
from fd_minicpm41.hybrid_reasoning.reasoning_parser import (
    MiniCPM41ReasoningParser,
    ModelStatus,
    prompt_start,
)
from fd_minicpm41.hybrid_reasoning.reply_context import Reply, current_reply
from fd_minicpm41.hybrid_reasoning.request import check_request, request_budget
from fd_minicpm41.hybrid_reasoning.thinking_budget import BUDGET_KEY, GENERATED_KEY, START_KEY
from fd_minicpm41.hybrid_reasoning.tool_parser import MiniCPM41ToolParser, tools_wanted
from fd_minicpm41.preflight import is_minicpm

# Far more than a server runs at once.
MAX_REPLIES = 1 << 14

served: MiniCPM41Processor | None = None
"""The processor of this process, once the model it serves is known to be ours."""


def create_processor(**kwargs: Any) -> MiniCPM41Processor:
    """What FastDeploy's processor plugin group asks for.

    Raises:
        UsageError: the model is another one, or has no configuration; FastDeploy then uses its own
            processor.
    """
    global served
    model = kwargs["model_name_or_path"]
    if not is_minicpm(model):
        raise UsageError(f"{model} is no {ARCHITECTURE} checkpoint: it needs no processor of ours")
    try:
        served = MiniCPM41Processor(**kwargs)
    except Exception:
        # FastDeploy falls back to its own processor and hardly says so.
        logger.exception("fd_minicpm41: the data processor failed; thinking will not be split")
        raise
    return served


class MiniCPM41Processor(_HostProcessor):
    """The host's text processor with hybrid reasoning done right."""

    def __init__(
        self,
        model_name_or_path: str,
        reasoning_parser_obj: type | None = None,
        tool_parser_obj: type | None = None,
        **kwargs: Any,
    ) -> None:
        self._mode = HybridReasoningMode.from_environment()
        self._replies: dict[str, Reply] = {}
        self._said: set[str] = set()
        known = inspect.signature(_HostProcessor.__init__).parameters
        super().__init__(
            model_name_or_path=model_name_or_path,
            reasoning_parser_obj=reasoning_parser_obj or MiniCPM41ReasoningParser,
            tool_parser_obj=tool_parser_obj or MiniCPM41ToolParser,
            **{k: v for k, v in kwargs.items() if k in known},
        )
        self._own_template: str | None = getattr(self.tokenizer, "chat_template", None)
        if not self._own_template:
            self._say_once("a chat template")
            self.tokenizer.chat_template = bundled_template()
        logger.info(
            "fd_minicpm41: reasoning parser %s, tool parser %s, default thinking budget %s",
            type(self.reasoning_parser).__name__,
            self.tool_parser_obj.__name__,
            "unlimited" if self._mode.budget is None else self._mode.budget,
        )

    def get_pad_id(self) -> int:
        """A tokenizer may name no padding; FastDeploy would start its worker with ``None``."""
        padding = self.tokenizer.pad_token_id
        return self.eos_token_ids[0] if padding is None else padding

    def _say_once(self, missing: str) -> None:
        if missing not in self._said:
            self._said.add(missing)
            logger.warning(
                "fd_minicpm41: the checkpoint lacks %s; using the bundled chat template", missing
            )

    @cached_property
    def template_arguments(self) -> frozenset[str] | None:
        """Names that ``chat_template_kwargs`` may hold for the template; ``None`` for any."""
        if any(argument.split("=")[0] == "--chat-template" for argument in sys.argv):
            return None
        from jinja2 import Environment, TemplateError, meta

        names: set[str] = set()
        for template in (self._own_template, bundled_template()):
            try:
                tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template or "")
                names |= meta.find_undeclared_variables(tree)
            except TemplateError:
                return None
        return frozenset(names - {"messages", "raise_exception", "strftime_now"})

    # Requests

    def process_request_dict(
        self, request: Any, max_model_len: int | None = None, **kwargs: Any
    ) -> Any:
        """The host's request with the thinking budget as the worker's logits processor reads it."""
        fields = request if isinstance(request, dict) else vars(request)
        check_request(fields, None)
        budget = request_budget(fields, self._mode.budget)
        arguments = dict(request.get("logits_processors_args") or {})
        for key in (BUDGET_KEY, START_KEY, GENERATED_KEY):
            arguments.pop(key, None)
        # One authority: the host's own limit would compare single tokens.
        request["reasoning_max_tokens"] = None
        request["logits_processors_args"] = arguments
        if isinstance(request.get("prompt"), str) and request.get("add_special_tokens") is None:
            request["add_special_tokens"] = True

        request_id = str(request["request_id"])
        base, _, number = request_id.rpartition("_")
        plain = "_" not in request_id or (base.count("_") == 0 and number.isdecimal())
        if not plain:
            # The host splits the id at its first underscore, wherever that is.
            request["request_id"] = "renamed"
        try:
            request = super().process_request_dict(request, max_model_len, **kwargs)
        finally:
            request["request_id"] = request_id

        start = prompt_start(self.tokenizer, request["prompt_token_ids"], self._mode)
        if not plain:
            status = self.model_status_dict.pop("renamed", ModelStatus(start))
            count = request.get("n") or 1
            first = int(number) * count if number.isdecimal() else 0
            for i in range(first, first + count):
                self.model_status_dict[f"{base}_{i}" if number.isdecimal() else request_id] = status
        if budget is not None and start != "off":
            arguments = dict(request.get("logits_processors_args") or {})
            request["logits_processors_args"] = arguments | {BUDGET_KEY: budget, START_KEY: start}
        return request

    def messages2ids(self, request: Any, **kwargs: Any) -> list[int]:
        """Messages as tokens: switch, tools and history resolved, one BOS in front."""
        messages = request["messages"]
        thinking = kwargs.pop("enable_thinking", None)
        if thinking is None:
            thinking = prompt_switch(messages)
        thinking = True if thinking is None else thinking
        if request.get("tool_choice") == "none":
            request["tools"] = None
            kwargs.pop("tools", None)
        if request.get("tools"):
            request["tools"] = tools_as_sent(request["tools"])
        tools = request.get("tools") or kwargs.get("tools")
        template = kwargs.pop("chat_template", None)
        if template is None:
            missing = lacking(
                self._own_template, thinking=thinking, tools=uses_tools(messages, tools)
            )
            if missing:
                self._say_once(missing)
                template = bundled_template()
        write_calls = "tool_calls" not in (template or self._own_template or "")
        request["messages"] = prepare_messages(messages, self._mode, write_calls=write_calls)
        request["enable_thinking"] = thinking
        kwargs.pop("thinking_budget", None)
        ids = super().messages2ids(
            request, chat_template=template, enable_thinking=thinking, **kwargs
        )
        return with_one_bos(ids, self.tokenizer.bos_token_id)

    def text2ids(self, text: Any, max_model_len: int | None = None, **kwargs: Any) -> Any:
        """A raw prompt as tokens, one BOS in front unless the request forbids special tokens."""
        ids = super().text2ids(text, max_model_len, **kwargs)
        if not kwargs.get("add_special_tokens", False):
            return ids
        import numpy as np

        return np.array(with_one_bos([int(i) for i in ids], self.tokenizer.bos_token_id), np.int64)

    # Replies

    def process_response_dict(self, response_dict: Any, **kwargs: Any) -> Any:
        """The host's processing, with the parsers told which reply this is and whether it ends."""
        request_id = response_dict["request_id"]
        if response_dict.get("outputs") is None or response_dict.get("error_code", 200) != 200:
            self._replies.pop(request_id, None)
            return super().process_response_dict(response_dict, **kwargs)
        reply = self._replies.get(request_id)
        if reply is None:
            ours = issubclass(self.tool_parser_obj, MiniCPM41ToolParser)
            reply = Reply(tools=ours and tools_wanted(kwargs.get("request")))
            # A client that goes away never finishes its reply.
            if len(self._replies) >= MAX_REPLIES:
                self._replies.pop(next(iter(self._replies)))
            self._replies[request_id] = reply
        reply.finished = bool(response_dict["finished"])
        # A reply whose request was not seen here, as in an echo of another process, has no status.
        self.model_status_dict.setdefault(request_id, ModelStatus("auto"))
        token = current_reply.set(reply)
        try:
            return super().process_response_dict(response_dict, **kwargs)
        finally:
            current_reply.reset(token)
            if reply.finished:
                self._replies.pop(request_id, None)
