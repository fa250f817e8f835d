"""The ledger: everything of FastDeploy that this plugin registers with or changes, and why.

FastDeploy calls :func:`register` in every process that imports its models: API server, engine and
worker. It touches no device and loads no library. :data:`LEDGER` lists each changed function; a
hook is installed once a process, and with a checkpoint of another model it does nothing.
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
from fd_minicpm41.config import ARCHITECTURE
from fd_minicpm41.errors import UsageError
from fd_minicpm41.preflight import check_checkpoint, check_context, is_minicpm

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
    """

    target: str
    why: str
    how: str
    upstream: str
    remove_when: str
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]

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


def _wrap_check(original: Callable[..., Any]) -> Callable[..., Any]:
    def check(self: Any) -> Any:
        check_before_start(self)
        return original(self)

    return check


LEDGER: tuple[Hook, ...] = (
    Hook(
        target="fastdeploy.config:FDConfig.check",
        why="A bad checkpoint or context is only found in the worker, whose failure reaches the "
        "user as 'failed to launch worker' or, offline, as a hang.",
        how="Checks the checkpoint and the context first, in every process that makes a "
        "configuration; other architectures pass straight through.",
        upstream="A hook with which a registered model class checks the configuration it is asked "
        "to serve.",
        remove_when="FastDeploy calls such a hook before it starts workers.",
        wrap=_wrap_check,
    ),
)

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
    except UsageError:
        sys.excepthook = _print_one_line
        raise


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

    text = fastdeploy.__version__
    found = host_version(text)
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


def _join(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
