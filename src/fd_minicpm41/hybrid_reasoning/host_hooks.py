"""The part of the ledger that hybrid reasoning needs, in the form of ``fastdeploy_hooks``.

Each entry is installed when its module is in reach: the request classes as FastDeploy imports its
parsers, the logits processor as it imports its models, the runner in the worker alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from fd_minicpm41.config import ARCHITECTURE
from fd_minicpm41.fastdeploy_hooks import _MARK, Hook
from fd_minicpm41.hybrid_reasoning.thinking_budget import GENERATED_KEY, ThinkingBudget


class ClassHook(Hook):
    """The same for a class, which is replaced by a subclass of itself."""

    def install(self) -> None:
        """Replaces the target; does nothing when it is replaced already."""
        module_name, _, name = self.target.partition(":")
        module = import_module(module_name)
        original = getattr(module, name)
        if _MARK not in vars(original):
            replaced = self.wrap(original)
            setattr(replaced, _MARK, True)
            setattr(module, name, replaced)


def _check(cls: type, values: Any) -> Any:
    """Looks at a request's fields first of all; passes everything unless our model is served."""
    processor = sys.modules.get("fd_minicpm41.hybrid_reasoning.processor")
    if processor is not None and processor.served is not None and isinstance(values, dict):
        from fd_minicpm41.hybrid_reasoning.request import check_request

        check_request(values, processor.served.template_arguments)
    return values


def _with_fields(*names: str) -> Callable[[Any], Any]:
    def wrap(host: Any) -> Any:
        pydantic = import_module("pydantic")
        validator = pydantic.model_validator(mode="before")(classmethod(_check))
        added = {name: (Any, None) for name in names if name not in host.model_fields}
        return pydantic.create_model(
            host.__name__,
            __base__=host,
            __module__=host.__module__,
            __validators__={"check_hybrid_reasoning": validator},
            **added,
        )

    return wrap


def _wrap_build(original: Callable[..., Any]) -> Callable[..., Any]:
    def build_logits_processors(fd_config: Any) -> list[Any]:
        built: list[Any] = original(fd_config)
        if ARCHITECTURE in (fd_config.model_config.architectures or ()):
            if not any(isinstance(processor, ThinkingBudget) for processor in built):
                built.append(ThinkingBudget(fd_config))
            GENERATED_TOKENS.install()
        return built

    return build_logits_processors


def _wrap_insert(original: Callable[..., Any]) -> Callable[..., Any]:
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


_REQUEST_WHY = (
    "FastDeploy drops fields of a request that it does not know, and answers 500 to whatever is "
    "wrong with one it does not check itself."
)
_REQUEST_HOW = (
    "A subclass with the missing fields and one check of what concerns thinking and tools; without "
    "our model it passes everything."
)
_REQUEST_UPSTREAM = "Keep the fields, and answer 400 to a data processor's ValueError."

REQUESTS: tuple[Hook, ...] = (
    ClassHook(
        target="fastdeploy.entrypoints.openai.protocol:ChatCompletionRequest",
        why=_REQUEST_WHY,
        how=_REQUEST_HOW,
        upstream=_REQUEST_UPSTREAM,
        remove_when="FastDeploy does both.",
        wrap=_with_fields("tool_choice", "thinking_budget"),
    ),
    ClassHook(
        target="fastdeploy.entrypoints.openai.protocol:CompletionRequest",
        why=_REQUEST_WHY,
        how=_REQUEST_HOW,
        upstream=_REQUEST_UPSTREAM,
        remove_when="FastDeploy does both.",
        wrap=_with_fields("thinking_budget"),
    ),
)
LOGITS_PROCESSOR = Hook(
    target="fastdeploy.model_executor.logits_processor:build_logits_processors",
    why="A model cannot bring a logits processor: the user would have to name it at every start.",
    how="Adds the thinking budget for our architecture; others get what they asked for.",
    upstream="Let a model class name the processors it needs.",
    remove_when="FastDeploy asks the model class.",
    wrap=_wrap_build,
)
GENERATED_TOKENS = Hook(
    target="fastdeploy.worker.gpu_model_runner:GPUModelRunner.insert_tasks_v1",
    why="A request that was preempted is prefilled again with its reply so far, of which logits "
    "processors are told nothing: its budget would begin again.",
    how="Writes the reply so far into the arguments that every processor gets.",
    upstream="Hand processors the tokens of a request when it is inserted.",
    remove_when="share_inputs holds them.",
    wrap=_wrap_insert,
)


def extend_requests() -> None:
    """Installs :data:`REQUESTS`; before the API server takes the classes."""
    for hook in REQUESTS:
        hook.install()


def add_logits_processor() -> None:
    """Installs :data:`LOGITS_PROCESSOR`, and with it in the worker :data:`GENERATED_TOKENS`."""
    LOGITS_PROCESSOR.install()
    # The worker's module binds the name when it is imported, which may have happened.
    module_name, _, name = LOGITS_PROCESSOR.target.partition(":")
    worker: Any = sys.modules.get("fastdeploy.worker.input_batch")
    if worker is not None:
        setattr(worker, name, getattr(import_module(module_name), name))
