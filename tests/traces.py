"""Op calls recorded from a real FastDeploy run, and their replay through the C interface.

``host/shim/record_ops.py`` writes a folder; :func:`pack` makes one file of it. A replay starts from
empty caches and repeats the calls in order, so that mixed batches, chunked prefill, preemption and
prefix hits are exactly those of the engine. Arrays are NumPy's or any tensor library's: the caller
brings ``upload`` and ``run``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import capi
from cases import DTYPES

BATCH = ("batch_id_per_token", "cu_seqlens_q", "query_lens", "history_lens", "block_tables")
INPUTS = {
    "rope_and_write_kv": ("qkv", "rotary_embs", "k_cache", "v_cache", *BATCH),
    "compress_keys": ("k_cache", "k1_cache", "k2_cache", "compress_from", *BATCH),
    "select_blocks": ("qkv", "k1_cache", "k2_cache", *BATCH),
    "sparse_attention": ("qkv", "k_cache", "v_cache", "topk_idx", *BATCH),
}


def pack(folder: Path, file: Path) -> None:
    """Packs a recorded folder; arrays that a call repeats from an earlier one are kept once."""
    lines = [json.loads(x) for x in (folder / "calls.jsonl").read_text().splitlines()]
    arrays: dict[str, np.ndarray] = {}
    kept: dict[bytes, str] = {}
    for number, line in enumerate(lines):
        with np.load(folder / f"{number:05d}.npz") as stored:
            for name in (*line["inputs"], *line["outputs"]):
                if not name.startswith("cache:"):
                    array = stored[name]
                    content = repr((array.dtype, array.shape)).encode() + array.tobytes()
                    key = kept.setdefault(content, f"{number}.{name}")
                    arrays[key] = array
                    line[name] = key
    calls = np.frombuffer(json.dumps(lines).encode(), np.uint8)
    np.savez_compressed(file, calls=calls, **arrays)


@dataclass(frozen=True)
class Call:
    """One recorded op call: arrays by the op's own names, caches as ``cache:N``."""

    op: str
    attributes: list[float]
    inputs: dict[str, np.ndarray | str]
    output: np.ndarray | None
    new_caches: dict[str, list[int]]


def load(file: Path) -> Iterator[Call]:
    """The calls of a packed trace, in order; bfloat16 where the run had it."""

    def typed(array: np.ndarray) -> np.ndarray:
        return array.view(DTYPES["bfloat16"]) if array.dtype == np.uint16 else array

    with np.load(file) as stored:
        for line in json.loads(stored["calls"].tobytes()):
            recorded = [
                x if x.startswith("cache:") else typed(stored[line[x]]) for x in line["inputs"]
            ]
            yield Call(
                op=line["op"],
                attributes=line["attributes"],
                inputs=dict(zip(INPUTS[line["op"]], recorded, strict=True)),
                output=typed(stored[line[line["outputs"][0]]]) if line["outputs"] else None,
                new_caches=line["caches"],
            )


class Replay:
    """Repeats calls on one side of the library.

    Args:
        upload: an array for the side's memory, contiguous; changed by ops that write.
        run: launches filled params and waits.
        workspace: bytes of scratch that params want, 0 for none.
    """

    def __init__(
        self,
        upload: Callable[[np.ndarray], Any],
        run: Callable[[capi.Params], None],
        workspace: Callable[[Any], int] = lambda params: 0,
    ) -> None:
        self.upload, self.run_params, self.workspace = upload, run, workspace
        self.caches: dict[str, Any] = {}
        self.num_q_heads = 0

    def run(self, call: Call) -> Any:
        """The output on the side's memory: ``qkv``, ``topk_idx``, ``out`` or None.

        ``topk_idx`` of padding rows is -1, as an op need not write it.
        """
        for name, shape in call.new_caches.items():
            self.caches[name] = self.upload(np.zeros(shape, DTYPES["bfloat16"]))
        arrays = {
            name: self.caches[given] if isinstance(given, str) else self.upload(given)
            for name, given in call.inputs.items()
        }
        cache = arrays["k1_cache" if call.op == "select_blocks" else "k_cache"]
        num_kv_heads, head_dim = cache.shape[1], cache.shape[3]
        row = 0
        if "qkv" in arrays:
            row = arrays["qkv"].shape[1]
            self.num_q_heads = row // head_dim - 2 * num_kv_heads
        batch = capi.Batch(
            **{name: capi.address(arrays[name]) for name in BATCH},
            num_tokens=arrays["batch_id_per_token"].shape[0],
            batch_size=arrays["query_lens"].shape[0],
            max_blocks=arrays["block_tables"].shape[1],
            num_pages=cache.shape[0],
            max_query_len=arrays["batch_id_per_token"].shape[0],
        )
        heads = capi.Heads(self.num_q_heads, num_kv_heads, head_dim, capi.DTYPES["bfloat16"])
        given = {
            name: capi.address(array)
            for name, array in arrays.items()
            if name not in BATCH and name not in ("qkv", "rotary_embs")
        }
        num_tokens = batch.num_tokens
        if call.op == "compress_keys":
            self.run_params(capi.CompressKeysParams(batch=batch, heads=heads, **given))
            return None
        q = capi.address(arrays["qkv"])
        if call.op == "rope_and_write_kv":
            table = arrays["rotary_embs"]
            width = 2 * head_dim  # bytes of a head
            params = capi.RopeAndWriteKvParams(
                batch=batch,
                heads=heads,
                q=q,
                k=q + self.num_q_heads * width,
                v=q + (self.num_q_heads + num_kv_heads) * width,
                cos=capi.address(table),
                sin=capi.address(table) + 4 * table.shape[2] * head_dim,
                q_stride=row,
                k_stride=row,
                v_stride=row,
                max_position=table.shape[2],
                **given,
            )
            self.run_params(params)
            return arrays["qkv"]
        if call.op == "select_blocks":
            # A trace may be older than the attribute before these.
            scale, init_blocks, local_blocks, budget, dense_len, _ = call.attributes[-6:]
            result = self.upload(np.full((num_kv_heads, num_tokens, int(budget)), -1, np.int32))
            select = capi.SelectBlocksParams(
                batch=batch,
                heads=heads,
                q=q,
                topk_idx=capi.address(result),
                q_stride=row,
                softmax_scale=scale,
                init_blocks=int(init_blocks),
                local_blocks=int(local_blocks),
                budget=int(budget),
                dense_len=int(dense_len),
                **given,
            )
            self._run_with_workspace(select)
            return result
        scale, dense_len, _ = call.attributes[-3:]
        shape = (num_tokens, self.num_q_heads * head_dim)
        result = self.upload(np.full(shape, np.nan, DTYPES["bfloat16"]))
        attend = capi.SparseAttentionParams(
            batch=batch,
            heads=heads,
            q=q,
            out=capi.address(result),
            q_stride=row,
            out_stride=shape[1],
            softmax_scale=scale,
            budget=arrays["topk_idx"].shape[2],
            dense_len=int(dense_len),
            **given,
        )
        self._run_with_workspace(attend)
        return result

    def _run_with_workspace(self, params: Any) -> None:
        size = self.workspace(params)
        scratch = self.upload(np.zeros(max(1, size), np.uint8))
        params.workspace, params.workspace_bytes = capi.address(scratch), size
        self.run_params(params)
