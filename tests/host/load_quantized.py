"""Chooses a format as FastDeploy's engine does, loads as its worker does, and saves what runs.

    load_quantized.py CHECKPOINT OUTPUT.npz QUANTIZATION

QUANTIZATION is the value of ``--quantization``, or empty for none. Saved are every parameter,
``layers`` (JSON: class of the method, format), and of each linear layer its output ``NAME@M`` for
the first M rows of ``rows(K)``. Run by ``tests/models`` in the environment of :mod:`host`;
``FD_MINICPM41_TEST_SM`` there makes it a GPU of that compute capability, on which FastDeploy's own
linear methods are chosen.
"""

import json
import os
import sys

import numpy as np

NUM_ROWS = (1, 65)


def rows(columns: int) -> np.ndarray:
    """fp32 ``[65, columns]``, what every layer is multiplied by."""
    return np.random.default_rng(columns).standard_normal((max(NUM_ROWS), columns), np.float32)


def main() -> None:
    checkpoint, output, quantization = sys.argv[1:]
    sm_version = int(os.environ.get("FD_MINICPM41_TEST_SM", "0"))
    sys.argv[1:] = []
    from fastdeploy.engine.args_utils import EngineArgs
    from fastdeploy.utils import parse_quantization

    asked = parse_quantization(quantization) if quantization else None
    sizes = {"max_model_len": 512, "max_num_seqs": 4, "max_num_batched_tokens": 512}
    engine = EngineArgs(model=checkpoint, quantization=asked, **sizes).create_engine_config()
    chosen = json.dumps(engine.model_config.quantization)

    # The engine always passes these, and FastDeploy 2.5 needs them.
    empty = ("speculative_config", "eplb_config", "routing_replay_config")
    sys.argv[1:] = ["--model", checkpoint, "--max_model_len", "512", "--max_num_seqs", "4"]
    sys.argv += [part for name in empty for part in (f"--{name}", "{}")]
    sys.argv += ["--quantization", chosen]
    from fastdeploy.worker import worker_process

    args = worker_process.parse_args()
    if 0 < sm_version < 90 and "fp8" not in chosen:
        # Paddle's own quantiser takes 16-bit weights only, and has no product on a CPU.
        args.dtype = "bfloat16"
    ranks, local_rank = worker_process.init_distributed_environment()
    fd_config = worker_process.initialize_fd_config(args, ranks, local_rank)

    import paddle
    from fastdeploy.model_executor.layers.linear import LinearBase
    from fastdeploy.model_executor.model_loader import get_model_loader

    model = get_model_loader(load_config=fd_config.load_config).load_model(fd_config=fd_config)
    arrays = {"chosen": np.array(chosen), "loader": np.array(fd_config.load_config.load_choices)}
    for name, parameter in model.named_parameters():
        is_integer = parameter.dtype in (paddle.uint8, paddle.int8, paddle.int32)
        arrays[name] = (parameter if is_integer else parameter.astype("float32")).numpy()
    layers = {}
    for name, layer in model.named_sublayers():
        if not isinstance(layer, LinearBase):
            continue
        method = layer.quant_method
        fmt = getattr(method, "fmt", None)
        layers[name] = [type(method).__name__, None if fmt is None else vars(fmt)]
        if args.dtype == "bfloat16":
            continue
        x = paddle.to_tensor(rows(layer.weight_shape[0]))
        if type(method).__name__ == "WFP8AFP8LinearMethod":
            x = x.astype("bfloat16")
        for count in NUM_ROWS:
            arrays[f"{name}@{count}"] = method.apply(layer, x[:count]).astype("float32").numpy()
    if args.dtype != "bfloat16":
        ids = paddle.to_tensor([0, 1, 257, 5])
        arrays["embedded"] = model.model.embed_tokens(ids).numpy()
        hidden = paddle.to_tensor(rows(model.config.hidden_size))
        arrays["logits"] = model.compute_logits(hidden).numpy()
    arrays["layers"] = np.array(json.dumps(layers))
    np.savez(output, **arrays)


if __name__ == "__main__":
    main()
