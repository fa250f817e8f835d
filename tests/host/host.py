"""Real FastDeploy in processes of its own: an offline engine, a server, a script.

Every process gets the CPU shim through PYTHONPATH and nothing else: no ``FD_PLUGINS``, no
``FD_ATTENTION_BACKEND`` unless a test asks for it. Each runs in its own process group, which is
killed when its ``with`` block ends; every wait has a limit.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
START_LIMIT = 240.0
"""Seconds for an engine to come up; about 15 on an idle machine."""
REPLY_LIMIT = 240.0
WORKER_FAILED = "Failed to launch worker"
"""FastDeploy says so on its console; an offline engine then waits for ever."""

ENGINE_DEFAULTS: dict[str, Any] = {
    "max_model_len": 1024,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 1024,
    "num_gpu_blocks_override": 96,
    "graph_optimization_config": {"use_cudagraph": False},
}

# All requests are let in at once, with no page kept for what they will say: some are preempted.
CROWDED = {
    "FD_USE_NEW_TOKEN_RATIO_RESERVE": "0",
    "FD_RESERVE_OUTPUT_BLOCK_NUM_FOR_DECODE_WHEN_SCHEDULE_NEW_PREFILL": "0",
}


def missing_host() -> str | None:
    """Why the host tests cannot run here, or ``None``."""
    if os.environ.get("FASTDEPLOY_SRC"):
        return None
    if importlib.util.find_spec("fastdeploy") is None:
        return "FastDeploy is not here: make test-host FASTDEPLOY_SRC=path"
    return None


def host_environment(
    log_dir: Path, *, extra_path: Sequence[str | Path] = (), **variables: str
) -> dict[str, str]:
    """The environment of a host process; ``extra_path`` goes in front of PYTHONPATH."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("FD_", "PYTHON", "COV_"))}
    path = [*extra_path, HERE / "shim", os.environ.get("FASTDEPLOY_SRC", "")]
    log_dir.mkdir(parents=True, exist_ok=True)
    return own | {
        "PYTHONPATH": os.pathsep.join(str(p) for p in path if str(p)),
        "PYTHONUNBUFFERED": "1",
        "FD_MINICPM41_TEST_CPU_HOST": "1",
        "FD_USE_GET_SAVE_OUTPUT_V1": "1",
        "FD_LOG_DIR": str(log_dir),
        "DO_NOT_TRACK": "1",
        **variables,
    }


def free_port() -> int:
    """A port nobody listens on, of those that no outgoing connection is given meanwhile: FastDeploy
    binds it seconds later."""
    while True:
        port = random.randrange(10000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class HostProcess:
    """A process of the host with its output in ``log_dir/output.txt``."""

    def __init__(
        self, command: Sequence[str], log_dir: Path, environment: dict[str, str], **kwargs: Any
    ) -> None:
        self.log_dir = log_dir
        self.log_path = log_dir / "output.txt"
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=log_dir,
                env=environment,
                stderr=log,
                start_new_session=True,
                **({"stdout": log} | kwargs),
            )

    @property
    def output(self) -> str:
        return self.log_path.read_text("utf-8", errors="replace")

    def logs(self) -> str:
        """The output and every log file of FastDeploy's: what is shown when a test fails."""
        return "\n".join(
            f"--- {p.name}\n{p.read_text('utf-8', errors='replace')[-4000:]}"
            for p in self.log_files()
        )

    def log_files(self) -> list[Path]:
        files = [self.log_path, *sorted(self.log_dir.rglob("*log*"))]
        return [p for p in files if p.is_file()]

    def said(self, text: str) -> bool:
        """Whether any log has the text, however long ago."""
        return any(text in p.read_text("utf-8", errors="replace") for p in self.log_files())

    def stop(self) -> None:
        """Ends the whole process group."""
        for sign, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience)
        if self.process.stdin:
            self.process.stdin.close()
        if self.process.stdout:
            self.process.stdout.close()


class OfflineEngine(HostProcess):
    """``fastdeploy.LLM`` in a process of its own, kept for several rounds of generation."""

    def __init__(
        self,
        checkpoint: Path,
        log_dir: Path,
        environment: dict[str, str],
        options: dict[str, Any],
        python: str,
    ) -> None:
        ports = {name: free_port() for name in ("engine_worker_queue_port", "cache_queue_port")}
        arguments = json.dumps({"model": str(checkpoint)} | ENGINE_DEFAULTS | ports | options)
        super().__init__(
            [python, str(HERE / "offline_llm.py"), arguments],
            log_dir,
            environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.unread = b""

    def read_reply(self, limit: float) -> Any:
        assert self.process.stdout is not None
        end = time.monotonic() + limit
        while b"\n" not in self.unread:
            ready, _, _ = select.select([self.process.stdout], [], [], 1.0)
            chunk = os.read(self.process.stdout.fileno(), 1 << 16) if ready else b""
            if ready and not chunk:
                raise RuntimeError(f"the offline engine ended\n{self.logs()}")
            if WORKER_FAILED in self.output:
                raise RuntimeError(f"the offline engine has no worker\n{self.logs()}")
            if time.monotonic() > end:
                raise RuntimeError(f"no word for {limit:.0f} s\n{self.logs()}")
            self.unread += chunk
        line, _, self.unread = self.unread.partition(b"\n")
        return json.loads(line)

    def generate(self, prompts: Sequence[list[int]], **sampling: Any) -> list[dict[str, Any]]:
        """One round: ``token_ids``, ``text`` and ``finish_reason`` of each prompt, in order.

        Greedy unless ``sampling`` says otherwise; its keywords are those of ``SamplingParams``.
        """
        assert self.process.stdin is not None
        sampling = {"temperature": 0.0, "top_p": 0.0001, "max_tokens": 16} | sampling
        request = json.dumps({"prompts": list(prompts), "sampling": sampling})
        self.process.stdin.write(request.encode() + b"\n")
        self.process.stdin.flush()
        return list(self.read_reply(REPLY_LIMIT))


class Server(HostProcess):
    """``fastdeploy serve``; ``url`` is the root of its API."""

    def __init__(
        self,
        checkpoint: Path,
        log_dir: Path,
        environment: dict[str, str],
        arguments: Sequence[str] = (),
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = shutil.which("fastdeploy")
        assert command is not None, "no fastdeploy command on PATH"
        options = {
            "--model": str(checkpoint),
            "--host": "127.0.0.1",
            "--port": str(self.port),
            "--metrics-port": str(free_port()),
            "--engine-worker-queue-port": str(free_port()),
            "--cache-queue-port": str(free_port()),
            "--max-model-len": "1024",
            "--max-num-seqs": "4",
            "--max-num-batched-tokens": "1024",
            "--num-gpu-blocks-override": "96",
            "--graph-optimization-config": '{"use_cudagraph": false}',
        }
        given = set(arguments)
        flat = [part for key, value in options.items() if key not in given for part in (key, value)]
        super().__init__([command, "serve", *flat, *arguments], log_dir, environment)

    def wait_until_healthy(self, limit: float = START_LIMIT) -> None:
        end = time.monotonic() + limit
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended at start-up\n{self.logs()}")
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.url}/health", timeout=5)
                return
            time.sleep(0.3)
        raise RuntimeError(f"the server is not healthy after {limit:.0f} s\n{self.logs()}")

    def wait_for_end(self, limit: float = START_LIMIT) -> str:
        """Waits until a server that must refuse to start has ended; its output."""
        try:
            self.process.wait(limit)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"the server runs on after {limit:.0f} s\n{self.logs()}") from None
        return self.output


@contextlib.contextmanager
def offline_engine(
    checkpoint: Path,
    log_dir: Path,
    *,
    extra_path: Sequence[str | Path] = (),
    variables: dict[str, str] | None = None,
    python: str = sys.executable,
    **options: Any,
) -> Iterator[OfflineEngine]:
    """An engine that has come up; ``options`` are those of ``fastdeploy.LLM``."""
    environment = host_environment(log_dir, extra_path=extra_path, **(variables or {}))
    engine = OfflineEngine(checkpoint, log_dir, environment, options, python)
    try:
        engine.read_reply(START_LIMIT)
        yield engine
    finally:
        engine.stop()


@contextlib.contextmanager
def server(
    checkpoint: Path,
    log_dir: Path,
    arguments: Sequence[str] = (),
    *,
    extra_path: Sequence[str | Path] = (),
    variables: dict[str, str] | None = None,
    healthy: bool = True,
) -> Iterator[Server]:
    """A server; with ``healthy`` it answers before the block begins."""
    environment = host_environment(log_dir, extra_path=extra_path, **(variables or {}))
    started = Server(checkpoint, log_dir, environment, arguments)
    try:
        if healthy:
            started.wait_until_healthy()
        yield started
    finally:
        started.stop()


def run_script(
    code: str,
    log_dir: Path,
    *,
    python: str = sys.executable,
    limit: float = 180.0,
    extra_path: Sequence[str | Path] = (),
    variables: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs Python code as a host process; ``log_dir`` is its working folder."""
    environment = host_environment(log_dir, extra_path=extra_path, **(variables or {}))
    return subprocess.run(
        [python, "-c", code],
        cwd=log_dir,
        env=environment,
        capture_output=True,
        text=True,
        timeout=limit,
    )
