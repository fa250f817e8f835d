"""The CUDA product with low-bit weights: within the error budget at every edge and at the model's
own shapes, the same bits every time, in a graph, and refusals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from gpu_low_bit import LowBitLinear, name_of  # noqa: E402
from gpu_ops import TORCH_DTYPES, download, stream, upload  # noqa: E402

import capi  # noqa: E402
from accuracy import EPSILON, assert_within_budget  # noqa: E402
from fd_minicpm41.quantization.formats import LowBitFormat  # noqa: E402
from low_bit_cases import (  # noqa: E402
    FORMATS,
    TOKENS,
    exact_rows,
    framework_linear,
    make_exact_weight,
    make_weight,
    make_x,
)

DTYPES = ("bfloat16", "float16")
# Part of a tile, part of a block of rows, columns that leave the last stage part empty, and enough
# columns for clusters of blocks.
SHAPES = ((40, 256), (73, 1152), (264, 4096))
MODEL_SHAPES = ((4608, 4096), (4096, 4096), (32768, 4096), (4096, 16384))
W2, W4, W8 = LowBitFormat(2, 64, 3), LowBitFormat(4, 128, 16), LowBitFormat(8, 128, 256)


def same_bits(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert torch.equal(got.view(torch.int16), wanted.view(torch.int16))


def assert_product(linear: LowBitLinear, x: torch.Tensor, got: torch.Tensor) -> None:
    """On the GPU, in fp64, by rows that ``test_rows`` holds to the dequantised weight."""
    plain = linear.rows("float16").double()
    truth = x.double() @ plain.T
    framework = torch.nn.functional.linear(x, plain.to(x.dtype))
    arrays = (t.float().cpu().numpy() for t in (got, truth, framework))
    assert_within_budget(*arrays, name_of(x.dtype), f"{x.shape[0]} tokens by {linear.shape}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_equals_the_dequantised_product(fmt: LowBitFormat, dtype: str) -> None:
    for shape in SHAPES:
        weight = make_weight(fmt, *shape)
        linear, plain = LowBitLinear.of(weight), weight.plain()
        for tokens in TOKENS:
            x = make_x(tokens, shape[1], dtype, tokens)
            got = download(linear(upload(x)))
            truth = x.astype(np.float64) @ plain.T
            what = f"{tokens} tokens by {shape}"
            assert_within_budget(got, truth, framework_linear(x, plain), dtype, what)


def test_one_scale_a_row() -> None:
    weight = make_weight(LowBitFormat(8, 1152, 256), 73, 1152)
    linear, plain = LowBitLinear.of(weight), weight.plain()
    for tokens in (1, 16, 40):
        x = make_x(tokens, 1152, "bfloat16")
        truth = x.astype(np.float64) @ plain.T
        framework = framework_linear(x, plain)
        assert_within_budget(download(linear(upload(x))), truth, framework, "bfloat16")


@pytest.mark.parametrize("fmt", [f for f in FORMATS if not f.hadamard], ids=str)
def test_one_column_comes_out_as_it_is(fmt: LowBitFormat) -> None:
    weight = make_weight(fmt, 73, 256)
    linear = LowBitLinear.of(weight)
    eye = torch.eye(256, dtype=torch.float16, device="cuda")
    for first in range(0, 256, 64):
        got = download(linear(eye[first : first + 64].contiguous()))
        wanted = weight.plain()[:, first : first + 64].T.astype(np.float16)
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("fmt", [f for f in FORMATS if not f.hadamard], ids=str)
def test_scales_of_any_size(fmt: LowBitFormat) -> None:
    """Weights of more than 16 tokens are rounded to bfloat16 once, as a framework rounds them,
    whatever the scale: each comes out as it is where one column is asked for."""
    weight = make_weight(fmt, 73, 256)
    rng = np.random.default_rng(2)
    powers = np.exp2(rng.integers(-60, 20, weight.scales.shape))
    powers[::7] = 0
    weight = replace(weight, scales=(weight.scales * powers).astype(weight.scales.dtype))
    linear = LowBitLinear.of(weight)
    wanted = weight.plain().T.astype(weight.scales.dtype)
    eye = torch.eye(256, dtype=torch.bfloat16, device="cuda")
    for tokens in (24, 40, 64):
        for first in range(0, 256 - tokens, tokens):
            got = download(linear(eye[first : first + tokens].contiguous()))
            np.testing.assert_array_equal(got, wanted[first : first + tokens])


@pytest.mark.parametrize("fmt", [W2, W4, W8], ids=str)
@pytest.mark.parametrize("shape", MODEL_SHAPES, ids=str)
def test_the_models_own_shapes(fmt: LowBitFormat, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    linear = LowBitLinear.random(fmt, *shape)
    for tokens in (1, 5, 16, 33, 64):
        x = torch.randn(tokens, shape[1], dtype=torch.bfloat16, device="cuda")
        assert_product(linear, x, linear(x))


@pytest.mark.parametrize("tokens", [1, 3, 16])
@pytest.mark.parametrize("fmt", [W2, FORMATS[1], W4], ids=str)
def test_shares_of_rows(fmt: LowBitFormat, tokens: int) -> None:
    """One to many tiles of rows a multiprocessor, the last one not full, and columns whose last
    stage is not."""
    torch.manual_seed(0)
    tiles = torch.cuda.get_device_properties(0).multi_processor_count
    for share in (1, 2, 3, 4, 5, 9):
        linear = LowBitLinear.random(fmt, share * tiles * 16 - 8, 1152)
        x = torch.randn(tokens, 1152, dtype=torch.bfloat16, device="cuda")
        # Groups far apart in size; what is not finite comes out as such.
        x[0, ::64] *= 512
        assert_product(linear, x, linear(x))
        x[0, 700] = float("inf")
        out = linear(x)
        assert not torch.isfinite(out[0]).any()
        assert torch.isfinite(out[1:]).all()


def test_a_head_whose_rows_do_not_fill_a_tile() -> None:
    torch.manual_seed(0)
    linear = LowBitLinear.random(LowBitFormat(8, 4096, 256), 73448, 4096)
    # More blocks than run side by side: a late one finds what an earlier one left.
    for tokens in (1, 3, 20, 64):
        x = torch.randn(tokens, 4096, dtype=torch.bfloat16, device="cuda")
        for _ in range(3):
            assert_product(linear, x, linear(x))


@pytest.mark.parametrize("fmt", [W2, FORMATS[3], W4, W8], ids=str)
@pytest.mark.parametrize("shape", MODEL_SHAPES[1:], ids=str)
def test_the_same_bits_every_time_and_in_a_graph(fmt: LowBitFormat, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    linear = LowBitLinear.random(fmt, *shape)
    workspace = linear.workspace()
    for tokens in (1, 16, 24, 64):
        x = torch.randn(tokens, shape[1], dtype=torch.bfloat16, device="cuda")
        wanted = linear(x)
        out = torch.empty_like(wanted)
        for _ in range(5):
            out.fill_(float("nan"))
            same_bits(linear(x, out, workspace), wanted)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(3):
                linear(x, out, workspace)
        for seed in range(3):
            torch.manual_seed(seed)
            x.copy_(torch.randn_like(x))
            out.fill_(float("nan"))
            graph.replay()
            same_bits(out, linear(x))


def test_a_chain_of_launches_waits_for_its_input() -> None:
    """Each launch may begin before the one before it ends: it must not read x too early."""
    torch.manual_seed(0)
    linears = [LowBitLinear.random(fmt, 4096, 4096) for fmt in (W2, FORMATS[2], W4, W8)] * 4
    workspace = linears[1].workspace()
    for tokens in (1, 16, 64):
        x = torch.randn(tokens, 4096, dtype=torch.bfloat16, device="cuda")
        buffers = [torch.empty_like(x) for _ in range(2)]

        def chain(wait: bool, x: torch.Tensor = x, buffers: list = buffers) -> torch.Tensor:
            y = x
            for index, linear in enumerate(linears):
                # Two buffers in turn: a launch overwrites what the one before it reads.
                y = linear(y, buffers[index % 2], workspace)
                if wait:
                    torch.cuda.synchronize()
            return y.clone()

        wanted = chain(wait=True)
        assert torch.isfinite(wanted).all() and wanted.abs().max() > 0
        for _ in range(10):
            same_bits(chain(wait=False), wanted)
        chain(wait=False)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = chain(wait=False)
        for _ in range(10):
            graph.replay()
            same_bits(got, wanted)


def test_nothing_is_written_beyond_the_output() -> None:
    linear = LowBitLinear.of(make_weight(W4, 73, 256))
    for tokens in (1, 9, 33):
        guarded = torch.full((tokens + 2, 73), 7.0, dtype=torch.bfloat16, device="cuda")
        x = torch.randn(tokens, 256, dtype=torch.bfloat16, device="cuda")
        linear(x, guarded[1:-1])
        assert (guarded[0] == 7).all() and (guarded[-1] == 7).all()


# ---- rows ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_rows(fmt: LowBitFormat, dtype: str) -> None:
    weight = make_weight(fmt, 73, 1152)
    linear = LowBitLinear.of(weight)
    got = download(linear.rows(dtype))
    wanted = weight.plain().astype(got.dtype)
    if fmt.hadamard:
        # Seven sums in fp32, each off by half a place of the largest, then one rounding.
        plain = weight.plain()
        error = np.abs(got.astype(np.float64) - plain)
        sums = 7 * EPSILON["float32"] / 2 * np.sqrt(fmt.hadamard) * np.abs(plain).max()
        assert (error <= sums + EPSILON[dtype] / 2 * np.abs(plain)).all()
    else:
        np.testing.assert_array_equal(got, wanted)
    panel = torch.full((33, 1152), 77, dtype=TORCH_DTYPES[dtype], device="cuda")
    linear.rows(dtype, first=16, out=panel)
    same_bits(panel, linear.rows(dtype)[16:49])


@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn"])
def test_eight_bit_rows_are_exact(kind: str) -> None:
    weight = make_exact_weight(kind, 73, 384)
    rows = LowBitLinear.of(weight).rows(kind, upload(weight.channel_scales))
    np.testing.assert_array_equal(rows.float().cpu().numpy(), exact_rows(weight))


# ---- refusals ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_tokens": 65}, "num_tokens is 65, wanted at most 64 on a GPU"),
        ({"dtype": 0}, "dtype is 0, wanted 1 (float16) or 2 (bfloat16) on a GPU"),
        ({"workspace_bytes": 0}, "workspace_bytes is 0, wanted at least 1536"),
    ],
)
def test_refuses(change: dict[str, int], message: str) -> None:
    linear = LowBitLinear.of(make_weight(FORMATS[2], 40, 256))
    x = torch.zeros(3, 256, dtype=torch.bfloat16, device="cuda")
    params = linear.params(x, torch.zeros(3, 40, dtype=torch.bfloat16, device="cuda"))
    workspace = linear.workspace(3)
    params.workspace, params.workspace_bytes = workspace.data_ptr(), workspace.numel()
    for name, value in change.items():
        setattr(params, name, value)
    with pytest.raises(capi.KernelError) as refusal:
        capi.run_cuda(params, stream())
    assert str(refusal.value) == f"low_bit_linear: {message}"


def test_refuses_columns_that_end_inside_a_tile() -> None:
    linear = LowBitLinear.of(make_weight(LowBitFormat(4, 64, 16), 40, 192))
    with pytest.raises(capi.KernelError) as refusal:
        linear(torch.zeros(3, 192, dtype=torch.bfloat16, device="cuda"))
    assert str(refusal.value) == (
        "low_bit_linear: in_features is 192, wanted a multiple of 128 on a GPU"
    )
