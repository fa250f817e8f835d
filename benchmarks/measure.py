"""How a figure is made: cold caches, CUDA graphs, medians, and what it was made on."""

from __future__ import annotations

import datetime
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# Inputs rotate until they have moved this many bytes: three times the L2 of an H100.
COLD_BYTES = 160 * 2**20
# Where a kernel reads with a policy that L2 evicts first, some of that outlives three times its
# size: 30 MB did. Then as much as some layers of a model read between two turns of one.
COLD_BYTES_WITH_POLICIES = 10 * COLD_BYTES
REPLAYS = 25


def copies_for(bytes_read: int, bytes_held: int, cold_bytes: int = COLD_BYTES) -> int:
    """Copies of the inputs to rotate over, so that none of them is in L2 when its turn comes."""
    limit = 24 * 2**30
    wanted = max(2, -(-cold_bytes // max(1, bytes_read)))
    return int(min(wanted, max(1, limit // bytes_held)))


def graph_time(run: Callable[[int], None], copies: int, rounds: int | None = None) -> float:
    """Median microseconds of one call of ``run``, over CUDA-graph replays of ``rounds`` for each
    copy; None: as many as make a graph of 16 calls."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for index in range(copies):
            run(index)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    rounds = rounds or max(1, 16 // copies)
    with torch.cuda.graph(graph, stream=side):
        for _ in range(rounds):
            for index in range(copies):
                run(index)
    times = []
    for replay in range(REPLAYS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if replay >= 3:
            times.append(start.elapsed_time(end) * 1e3 / (rounds * copies))
    return statistics.median(times)


def copy_rate() -> float:
    """Bytes a second of a kernel that reads and writes 2 GiB each, both counted.

    A kernel, not ``copy_``: in a graph that is a memcpy node, which reaches less.
    """
    source = torch.randint(0, 2**31 - 1, (2**29,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)

    def invert(_: int) -> None:
        torch.bitwise_not(source, out=target)

    microseconds = graph_time(invert, 1)
    return 2 * source.numel() * source.element_size() / microseconds * 1e6


def product_rate() -> float:
    """Floating-point operations a second of a bfloat16 product of 8192 x 8192 matrices."""
    size = 8192
    left, right = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    result = torch.empty_like(left)
    microseconds = graph_time(lambda _: torch.mm(left, right, out=result), 1)
    return 2 * size**3 / microseconds * 1e6


def environment(command: str) -> dict[str, Any]:
    """What a published figure must say about the machine and the versions."""
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "python": sys.version.split()[0],
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
    }


def rounded(value: Any) -> Any:
    """Floats with three decimals, also inside dicts."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return round(value, 3) if isinstance(value, float) else value


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Writes a result, one row a line."""
    rows = ",\n    ".join(json.dumps(row) for row in result["rows"])
    head = json.dumps({k: v for k, v in result.items() if k != "rows"}, indent=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head[:-2]},\n  "rows": [\n    {rows}\n  ]\n}}\n')
