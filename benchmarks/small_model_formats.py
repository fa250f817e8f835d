"""Makes the small model's low-bit checkpoints, which ``small_model_fidelity.py`` reads.

Run from the repository root: ``python benchmarks/small_model_formats.py --out DIR``. They are the
ones that ``fd-minicpm41 eval --suite small --weights ...`` makes. With ``--lean`` the tensors that
stay as they are in the source are left out, so that the folders are small enough to be carried to
another machine; such a folder is for ``small_model_fidelity.py`` alone.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

from safetensors.paddle import load_file, save_file

from fd_minicpm41.cli.runtime import counted, prepare_paddle, progress
from fd_minicpm41.quantization.sidecar import SIDECAR, split_tensor_name, weight_files
from fd_minicpm41.small_model import path
from fd_minicpm41.small_model.weights import STORED, make_weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="(default: the small model of the package)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=STORED, default=list(STORED))
    parser.add_argument("--lean", type=Path, metavar="DIR", help="write lean copies there")
    args = parser.parse_args()
    prepare_paddle()
    source = path() if args.model is None else args.model
    for method in args.methods:
        began = time.perf_counter()
        with progress(1, f"quantising to {method}", "linear") as bar:
            (folder,) = make_weights(source, [method], args.out, counted(bar)).values()
        print(f"{folder} in {time.perf_counter() - began:.0f} s", flush=True)
        if args.lean is not None:
            lean = args.lean / folder.name
            lean.mkdir(parents=True, exist_ok=True)
            for file in weight_files(folder):
                tensors = load_file(str(file)).items()
                kept = {name: t for name, t in tensors if split_tensor_name(name) is not None}
                if kept:
                    save_file(kept, str(lean / file.name))
            shutil.copyfile(folder / SIDECAR, lean / SIDECAR)


if __name__ == "__main__":
    main()
