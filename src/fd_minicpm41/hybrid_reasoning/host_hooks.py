"""Where FastDeploy has no plugin point for hybrid reasoning: each change, why, and when it may go.

Request fields
    Why: FastDeploy drops ``tool_choice`` and ``thinking_budget`` from a request, and answers 500
    to whatever is wrong in a field it does not check itself.
    How: ``protocol.ChatCompletionRequest`` and ``CompletionRequest`` are replaced by subclasses
    with these fields and one check, before the API server takes the names. Without our model the
    check passes everything.
    Remove when: FastDeploy keeps both fields and answers 400 to a processor's ValueError.

Logits processor
    Why: a model cannot bring a logits processor; the user would have to name it at every start.
    How: ``build_logits_processors`` adds ours for our architecture.
    Remove when: a model class may name its processors.

Generated tokens
    Why: a request that was preempted is prefilled again with its reply so far, of which a logits
    processor is told nothing; its budget would start again.
    How: ``GPUModelRunner.insert_tasks_v1`` first writes the reply so far into the arguments that
    every processor gets.
    Remove when: ``share_inputs`` has the tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any

from fd_minicpm41.config import ARCHITECTURE
from fd_minicpm41.hybrid_reasoning.thinking_budget import GENERATED_KEY, ThinkingBudget

PROCESSOR = f"{ThinkingBudget.__module__}:{ThinkingBudget.__name__}"
_MARK = "_fd_minicpm41"


def extend_requests() -> None:
    """Gives chat and completion requests the fields of hybrid reasoning; once."""
    protocol = import_module("fastdeploy.entrypoints.openai.protocol")
    pydantic = import_module("pydantic")

    def check(cls: type, values: Any) -> Any:
        processor = sys.modules.get("fd_minicpm41.hybrid_reasoning.processor")
        if processor is not None and processor.served is not None and isinstance(values, dict):
            from fd_minicpm41.hybrid_reasoning.request import check_request

            check_request(values, processor.served.template_arguments())
        return values

    for name, fields in (
        ("ChatCompletionRequest", ("tool_choice", "thinking_budget")),
        ("CompletionRequest", ("thinking_budget",)),
    ):
        host = getattr(protocol, name)
        if getattr(host, _MARK, False):
            continue
        added: dict[str, Any] = {f: (Any, None) for f in fields if f not in host.model_fields}
        ours = pydantic.create_model(
            name,
            __base__=host,
            __module__=host.__module__,
            __validators__={
                "check_hybrid_reasoning": pydantic.model_validator(mode="before")(
                    classmethod(check)
                )
            },
            **added,
        )
        setattr(ours, _MARK, True)
        setattr(protocol, name, ours)


def _wrap(owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    """Replaces ``owner.name`` by ``wrapper`` of it, unless that was done already."""
    original = getattr(owner, name)
    if not getattr(original, _MARK, False):
        replaced = wraps(original)(wrapper(original))
        setattr(replaced, _MARK, True)
        setattr(owner, name, replaced)


def add_logits_processor() -> None:
    """Has every worker that serves our model build :class:`ThinkingBudget`; once."""

    def wrapper(original: Callable[[Any], list[Any]]) -> Callable[[Any], list[Any]]:
        def build_logits_processors(fd_config: Any) -> list[Any]:
            built = original(fd_config)
            ours = ARCHITECTURE in (fd_config.model_config.architectures or ())
            if ours and not any(isinstance(processor, ThinkingBudget) for processor in built):
                built.append(ThinkingBudget(fd_config))
                carry_generated_tokens()
            return built

        return build_logits_processors

    name = "build_logits_processors"
    package = import_module("fastdeploy.model_executor.logits_processor")
    _wrap(package, name, wrapper)
    # The worker's module binds the name when it is imported, which may have happened.
    worker = sys.modules.get("fastdeploy.worker.input_batch")
    if worker is not None:
        setattr(worker, name, getattr(package, name))


def carry_generated_tokens() -> None:
    """Has the model runner tell logits processors the reply so far of a repeated prefill; once."""

    def wrapper(original: Callable[..., Any]) -> Callable[..., Any]:
        def insert_tasks_v1(self: Any, req_dicts: list[Any], *args: Any, **kwargs: Any) -> Any:
            for request in req_dicts:
                params: Any = getattr(request, "sampling_params", None)
                given = getattr(params, "logits_processors_args", None)
                if given:
                    # A new object each time, by which the processor knows a prefill.
                    generated = list(getattr(request, "output_token_ids", None) or ())
                    params.logits_processors_args = given | {GENERATED_KEY: generated}
            return original(self, req_dicts, *args, **kwargs)

        return insert_tasks_v1

    runner = import_module("fastdeploy.worker.gpu_model_runner")
    _wrap(runner.GPUModelRunner, "insert_tasks_v1", wrapper)
