"""Records every op call of a real FastDeploy run, for replay on other kernels.

The worker computes in float32 on the CPU; here the ops run in bfloat16, so that a replay rounds
where the recorded run rounded. Each float32 tensor an op gets is rounded; a cache has one bfloat16
twin for its whole life. Caches are not stored: every byte of them comes from the recorded calls.

A trace is a folder of one ``.npz`` a call and ``calls.jsonl``, a line a call: ``op``,
``attributes``, ``inputs`` (an array's key, or ``cache:N``) and ``outputs``; ``caches`` gives the
shape of each new one. ``tests/traces.py`` packs it into one file. bfloat16 is stored as its bits.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

CACHES = {
    "rope_and_write_kv": ("k_cache", "v_cache"),
    "compress_keys": ("k_cache", "k1_cache", "k2_cache"),
    "select_blocks": ("k1_cache", "k2_cache"),
    "sparse_attention": ("k_cache", "v_cache"),
}
# Where the caches stand among an op's tensors.
FIRST_CACHE = {
    "rope_and_write_kv": 2,
    "compress_keys": 0,
    "select_blocks": 1,
    "sparse_attention": 1,
}


class Recorder:
    """Stands in for ``fd_minicpm41.ops._run``; writes to ``folder`` what passes through."""

    def __init__(self, folder: Path, run: Any) -> None:
        self.folder, self.run = folder, run
        self.twins: dict[int, tuple[Any, Any, str]] = {}
        self.calls = 0

    def twin_of(self, cache: Any) -> tuple[Any, str, bool]:
        """The bfloat16 twin of a cache, its name, and whether it is new."""
        is_new = id(cache) not in self.twins
        if is_new:
            # The original is kept too: its id must not be given to another tensor.
            name = f"cache:{len(self.twins)}"
            self.twins[id(cache)] = (cache, cache.astype("bfloat16"), name)
        _, twin, name = self.twins[id(cache)]
        return twin, name, is_new

    def __call__(
        self,
        op: str,
        written: dict[str, Any],
        tensors: Sequence[Any],
        attributes: Sequence[float | int | bool] = (),
    ) -> Any:
        caches = range(FIRST_CACHE[op], FIRST_CACHE[op] + len(CACHES[op]))
        passed, arrays, inputs, new_caches = [], {}, [], {}
        for i, tensor in enumerate(tensors):
            if i in caches:
                twin, name, is_new = self.twin_of(tensor)
                if is_new:
                    new_caches[name] = twin.shape
                inputs.append(name)
            else:
                is_rope_table = tensor.ndim == 5
                is_float = str(tensor.dtype).endswith("float32") and not is_rope_table
                twin = tensor.astype("bfloat16") if is_float else tensor
                name = f"input{i}"
                arrays[name] = twin.numpy().copy()
                inputs.append(name)
            passed.append(twin)
        found = self.run(op, {}, passed, attributes)
        outputs = []
        if op == "rope_and_write_kv":
            tensors[0].copy_(passed[0].astype("float32"), False)
            arrays["output0"] = passed[0].numpy().copy()
            outputs = ["output0"]
        elif op in ("select_blocks", "sparse_attention"):
            arrays["output0"] = found[0].numpy().copy()
            outputs = ["output0"]
            if op == "sparse_attention":
                found = (found[0].astype("float32"),)
        np.savez_compressed(self.folder / f"{self.calls:05d}.npz", **arrays)
        line = {
            "op": op,
            "attributes": list(attributes),
            "inputs": inputs,
            "outputs": outputs,
            "caches": new_caches,
        }
        with (self.folder / "calls.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        self.calls += 1
        return found


def install(ops: Any, folder: str) -> None:
    """Has the module ``fd_minicpm41.ops`` record its calls into an existing folder."""
    ops._run = Recorder(Path(folder), ops._run)
