"""The ledger: everything of FastDeploy that this plugin registers with or changes, and why.

FastDeploy calls :func:`register` in every process that imports its models: API server, engine and
worker. It touches no device and loads no library. The three ledgers list each changed function or
class, by when its module is in reach; a hook is installed once a process, and with a checkpoint of
another model it does nothing. One file, however long: who asks what we change looks in one place.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import TracebackType
from typing import Any

from fd_minicpm41 import __version__
from fd_minicpm41.config import ARCHITECTURE, MiniCPMConfig
from fd_minicpm41.errors import UsageError
from fd_minicpm41.hybrid_reasoning.mode import HybridReasoningMode
from fd_minicpm41.hybrid_reasoning.thinking_budget import GENERATED_KEY, ThinkingBudget
from fd_minicpm41.preflight import (
    BACKEND,
    BACKEND_VARIABLE,
    check_checkpoint,
    check_context,
    check_sparse_attention,
    is_minicpm,
    is_served_sparsely,
    served_config,
)
from fd_minicpm41.quantization.choice import PREFIX, choose_quantization

logger = logging.getLogger("fd_minicpm41")

FORCE_VARIABLE = "FD_MINICPM41_FORCE"

# The first release whose signatures the contract tests hold us against, and the last.
OLDEST_HOST = (2, 5)
NEWEST_HOST = (2, 6)

_MARK = "_fd_minicpm41"


@dataclass(frozen=True)
class Hook:
    """One function of the host that is replaced by a wrapper around it.

    Attributes:
        target: ``module:Class.function`` or ``module:function``.
        why: what would go wrong without it.
        how: what the wrapper does.
        upstream: what FastDeploy could offer instead.
        remove_when: when the entry has to go.
        wrap: takes the original (a plain function) and returns its replacement.
        bound_in: a module that binds the function by name when it is imported, if there is one.
    """

    target: str
    why: str
    how: str
    upstream: str
    remove_when: str
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
    bound_in: str = ""

    def install(self) -> None:
        """Replaces the target; does nothing when it is replaced already.

        Raises:
            AttributeError, ImportError: the host has no such function.
        """
        module_name, _, path = self.target.partition(":")
        *parents, name = path.split(".")
        owner: Any = import_module(module_name)
        for parent in parents:
            owner = getattr(owner, parent)
        found = vars(owner)[name]
        is_classmethod = isinstance(found, classmethod)
        original = found.__func__ if is_classmethod else found
        if getattr(original, _MARK, False):
            return
        wrapper = functools.wraps(original)(self.wrap(original))
        setattr(wrapper, _MARK, True)
        setattr(owner, name, classmethod(wrapper) if is_classmethod else wrapper)
        if self.bound_in in sys.modules:
            setattr(sys.modules[self.bound_in], name, wrapper)


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


def _wrap_check(original: Callable[..., Any]) -> Callable[..., Any]:
    def check(self: Any) -> Any:
        check_before_start(self)
        return original(self)

    return check


# What FastDeploy answers when the user names no attention backend; set when it is asked.
_stock_backend = ""


def _wrap_backend_choice(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_attention_backend_cls(cls: Any, selected_backend: Any) -> str:
        global _stock_backend
        named = os.environ.get(BACKEND_VARIABLE)
        if named == BACKEND:
            return "fd_minicpm41.attention.InfLLMV2AttentionBackend"
        answer = str(original(cls, selected_backend))
        if named is not None:
            return answer
        _stock_backend = answer
        return f"{__name__}.default_attention_backend"

    return get_attention_backend_cls


def default_attention_backend(fd_config: Any, *args: Any, **kwargs: Any) -> Any:
    """The backend of a server whose user named none: sparse iff the checkpoint says so.

    FastDeploy asks for a backend before it has a model, and calls what it gets with the
    configuration, which is looked at here. Any other model gets the stock backend.
    """
    from fastdeploy.utils import resolve_obj_from_strname

    backend = resolve_obj_from_strname(_stock_backend)
    model_config = fd_config.model_config
    is_ours = ARCHITECTURE in (model_config.architectures or ())
    if is_ours and is_served_sparsely(served_config(model_config.model)):
        from fd_minicpm41.attention import InfLLMV2AttentionBackend

        backend = InfLLMV2AttentionBackend
    return backend(fd_config, *args, **kwargs)


def _wrap_quantization(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_quantization_config(quantization: str) -> Any:
        if quantization.startswith(PREFIX):
            from fd_minicpm41.quantization.config import LowBitConfig

            return LowBitConfig
        return original(quantization)

    return get_quantization_config


def _wrap_page_bytes(original: Callable[..., Any]) -> Callable[..., Any]:
    def cal_theortical_kvcache(self: Any) -> int:
        share = getattr(self.attn_backends[0], "compressed_keys_share", 0.0)
        return int(original(self) * (1.0 + share))

    return cal_theortical_kvcache


def _check_request(cls: type, values: Any) -> Any:
    """Looks at a request's fields first of all; passes everything unless our model is served."""
    processor = sys.modules.get("fd_minicpm41.hybrid_reasoning.processor")
    if processor is not None and processor.served is not None and isinstance(values, dict):
        from fd_minicpm41.hybrid_reasoning.request import check_request

        check_request(values, processor.served.template_arguments)
    return values


def _with_fields(*names: str) -> Callable[[Any], Any]:
    def wrap(host: Any) -> Any:
        pydantic = import_module("pydantic")
        validator = pydantic.model_validator(mode="before")(classmethod(_check_request))
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
        is_ours = ARCHITECTURE in (fd_config.model_config.architectures or ())
        if is_ours and not any(isinstance(processor, ThinkingBudget) for processor in built):
            built.append(ThinkingBudget(fd_config))
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


LEDGER: tuple[Hook, ...] = (
    Hook(
        target="fastdeploy.config:FDConfig.check",
        why="A bad checkpoint or context is only found in the worker, whose failure reaches the "
        "user as 'failed to launch worker' or, offline, as a hang.",
        how="Checks the checkpoint, the context and the weights' format first, in every process "
        "that makes a configuration, and notes the format for the worker's command line; other "
        "architectures pass straight through.",
        upstream="A hook with which a registered model class checks the configuration it is asked "
        "to serve.",
        remove_when="FastDeploy calls such a hook before it starts workers.",
        wrap=_wrap_check,
    ),
    Hook(
        target="fastdeploy.platforms.cuda:CUDAPlatform.get_attention_backend_cls",
        why="The names of attention backends are a closed enumeration.",
        how="Answers FD_ATTENTION_BACKEND=INFLLMV2_ATTN with our class, and an unset variable with "
        "a function that looks at the model: ours with a sparse_config gets our class, any other "
        "what FastDeploy would have given it. A name the user set is passed on.",
        upstream="A registry of attention backends, and a default that a model class may name.",
        remove_when="FastDeploy has both.",
        wrap=_wrap_backend_choice,
    ),
    Hook(
        target="fastdeploy.model_executor.layers.quantization:get_quantization_config",
        why="The names of formats are a closed list, and for a dense model wint2 means 8 bits, "
        "w4afp8 fp8, w4a8 a crash and fp8 nothing.",
        how="Answers the names that start with fdm_, which only our check of the configuration "
        "gives to a worker, and only for our checkpoints; FastDeploy's own names are passed on.",
        upstream="A registry of quantisation methods.",
        remove_when="FastDeploy has one.",
        wrap=_wrap_quantization,
    ),
    Hook(
        target="fastdeploy.model_executor.logits_processor:build_logits_processors",
        why="A model cannot bring a logits processor: a user would have to name it at every start.",
        how="Adds the thinking budget for our architecture; others get what they asked for.",
        upstream="Let a model class name the processors it needs.",
        remove_when="FastDeploy asks the model class.",
        wrap=_wrap_build,
        bound_in="fastdeploy.worker.input_batch",
    ),
)
"""Hooks of modules that every process imports; :func:`register` installs them."""

WORKER_LEDGER: tuple[Hook, ...] = (
    Hook(
        target="fastdeploy.worker.gpu_model_runner:GPUModelRunner.cal_theortical_kvcache",
        why="The number of pages is the free memory over the bytes of a page, which do not count "
        "the compressed keys: a full cache would run out of memory.",
        how="Adds the share of the compressed keys, 3.9 %, when our attention backend runs.",
        upstream="Ask the attention backend for the bytes of a page.",
        remove_when="FastDeploy does.",
        wrap=_wrap_page_bytes,
    ),
    Hook(
        target="fastdeploy.worker.gpu_model_runner:GPUModelRunner.insert_tasks_v1",
        why="A preempted request is prefilled again with its reply so far, of which logits "
        "processors are told nothing: its budget would begin again.",
        how="Writes the reply so far into the arguments that every processor gets.",
        upstream="Hand processors the tokens of a request when it is inserted.",
        remove_when="share_inputs holds them.",
        wrap=_wrap_insert,
    ),
)
"""Hooks of modules that only a worker imports; the model class installs them when it is built."""


_REQUEST_WHY = (
    "FastDeploy drops fields of a request that it does not know, and answers 500 to whatever is "
    "wrong with one it does not check itself."
)
_REQUEST_HOW = (
    "A subclass with the missing fields and one check of what concerns thinking and tools; without "
    "our model it passes everything."
)
_REQUEST_UPSTREAM = "Keep the fields, and answer 400 to a data processor's ValueError."

REQUEST_LEDGER: tuple[Hook, ...] = (
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
"""Hooks of the request classes, before the API server takes them; the parsers install them."""

# Why this process refuses our checkpoints, if it does; other models are served all the same.
_refusal: str | None = None
_is_registered = False


def check_before_start(fd_config: Any) -> None:
    """Stops the start-up of a server that could not serve the checkpoint.

    Raises:
        UsageError: what to change; as the end of a process it is printed as one line.
    """
    folder = fd_config.model_config.model
    if not is_minicpm(folder):
        return
    try:
        if _refusal is not None:
            raise UsageError(_refusal)
        config = check_checkpoint(folder, fd_config.tokenizer)
        check_context(config, fd_config.model_config.max_model_len)
        _choose_quantization(fd_config, config)
        if is_served_sparsely(config):
            check_sparse_attention(fd_config)
        HybridReasoningMode.from_environment()
    except UsageError:
        sys.excepthook = _print_one_line
        raise


def _choose_quantization(fd_config: Any, config: MiniCPMConfig) -> None:
    """Notes the weights' format where FastDeploy's engine takes its worker's ``--quantization``."""
    import paddle

    model_config, has_cuda = fd_config.model_config, paddle.is_compiled_with_cuda()
    chosen = choose_quantization(
        model_config.model,
        config,
        model_config.quantization,
        tensor_parallel_size=fd_config.parallel_config.tensor_parallel_size,
        tile=128 if has_cuda else 64,
        sm_version=_sm_version() if has_cuda else None,
    )
    if fd_config.quant_config is not None and chosen != model_config.quantization:
        raise UsageError(
            f"--quantization of a worker is {model_config.quantization!r}, wanted {chosen!r}: "
            "start it with `fastdeploy serve` or fastdeploy.LLM"
        )
    model_config.quantization = chosen


def _sm_version() -> int | None:
    """Compute capability, times ten, of the first GPU that a worker would use; None if the driver
    cannot be asked. Asking the driver makes no CUDA context here.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    try:
        pynvml = import_module("pynvml")
        pynvml.nvmlInit()
        by = "Index" if visible.isdigit() else "UUID"
        find = getattr(pynvml, f"nvmlDeviceGetHandleBy{by}")
        handle = find(int(visible) if visible.isdigit() else visible)
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    except Exception as error:  # no driver, no such device: the worker looks again
        logger.debug("fd_minicpm41: the GPU's compute capability is not known: %s", error)
        return None
    return int(major) * 10 + int(minor)


def _print_one_line(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    if issubclass(kind, UsageError):
        print(f"fd_minicpm41: error: {error}", file=sys.stderr, flush=True)
    else:
        sys.__excepthook__(kind, error, traceback)


def host_version(text: str) -> tuple[int, int] | None:
    """Major and minor of FastDeploy's version; ``None`` for a source tree, which knows none."""
    match = re.match(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else None


def register() -> None:
    """Registers the model with FastDeploy and installs the hooks; logs one line.

    An unsupported host, or one with a MiniCPM of its own, keeps serving its other models unchanged.
    Anything else that goes wrong is raised: without us FastDeploy would serve a MiniCPM checkpoint
    by a generic fall-back, with a wrong rope table.
    """
    global _is_registered, _refusal
    if _is_registered:
        return
    import fastdeploy
    from fastdeploy.model_executor.models.model_base import ModelCategory, ModelRegistry

    _log_to_console()
    text = fastdeploy.__version__
    found = host_version(text)
    if found is None:
        text = "of unknown version (a source tree)"
    if found is not None and found < OLDEST_HOST:
        _refusal = (
            f"FastDeploy is {text}, wanted {_join(OLDEST_HOST)} or later: upgrade FastDeploy, or "
            "uninstall fd-minicpm41 to be served by FastDeploy alone"
        )
        LEDGER[0].install()
        logger.error("fd_minicpm41 %s: not registered: %s", __version__, _refusal)
        _is_registered = True
        return
    is_native = ARCHITECTURE in ModelRegistry.get_supported_archs()
    if is_native and os.environ.get(FORCE_VARIABLE) != "1":
        logger.warning(
            "fd_minicpm41 %s: not registered: FastDeploy %s has its own %s; set %s=1 to "
            "use this one",
            __version__,
            text,
            ARCHITECTURE,
            FORCE_VARIABLE,
        )
        _is_registered = True
        return
    from fd_minicpm41.model import MiniCPM41ForCausalLM

    ModelRegistry.register_model_class(
        MiniCPM41ForCausalLM,
        architecture=ARCHITECTURE,
        module_name="model",
        module_path="fd_minicpm41",
        category=[ModelCategory.TEXT_GENERATION],
        primary_use=ModelCategory.TEXT_GENERATION,
    )
    for hook in LEDGER:
        hook.install()
    tested = "" if found is None or found <= NEWEST_HOST else ", which is newer than tested"
    logger.info(
        "fd_minicpm41 %s: registered %s with FastDeploy %s%s",
        __version__,
        ARCHITECTURE,
        text,
        tested,
    )
    _is_registered = True


def extend_requests() -> None:
    """Installs :data:`REQUEST_LEDGER`, once a process."""
    for hook in REQUEST_LEDGER:
        hook.install()


def install_worker_hooks() -> None:
    """Installs :data:`WORKER_LEDGER`, once a process."""
    for hook in WORKER_LEDGER:
        hook.install()


def _log_to_console() -> None:
    """Sends the package's log lines where FastDeploy sends those that a user is meant to see.

    FastDeploy leaves the root logger without a handler, so they would be lost otherwise.
    """
    from fastdeploy.utils import console_logger

    for handler in console_logger.handlers:
        if handler not in logger.handlers:
            logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if os.environ.get("FD_DEBUG") == "1" else logging.INFO)
    logger.propagate = False


def _join(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
