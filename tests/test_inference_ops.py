"""The ops of sparse inference: against float64 products of plain torch, within the error bound of a sum of that length."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import SIMD_LEVELS
from torch import Tensor
from torch.nn import functional

from cram_kernels import _native
from cram_kernels.inference import ops
from cram_kernels.inference.weights import compress, decompress

LEVELS = [level for level in SIMD_LEVELS if level in _native.host.simd_levels()]


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    chosen = _native.host.simd_level()
    _native.host.set_simd_level(request.param)
    yield request.param
    _native.host.set_simd_level(chosen)


def pruned(*shape: int, density: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < density, weight, 0.0)


def check(actual: Tensor, product: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """`product` in float64 is the truth. n additions in any order, products fused or not, err by at most (n + 1) ulp/2 of the sum of
    magnitudes (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1)."""
    n = weight[0].numel() + 2
    expected = product(x.double(), weight.double(), None if bias is None else bias.double())
    magnitudes = product(x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs())
    bound = n * 2.0**-24 / (1 - n * 2.0**-24) * magnitudes
    assert actual.shape == expected.shape and actual.dtype == torch.float32 and actual.is_contiguous()
    assert ((actual - expected).abs() <= bound).all(), f"off by {((actual - expected).abs() - bound).max()} more than the bound"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, plan: list[int]) -> Tensor:
    rows = compress(weight)
    return ops.sparse_linear(x, rows.values, rows.columns, rows.counts, bias, plan)


TILES = (1, 8, 16, 32, 64, 128)


@pytest.mark.parametrize("tile", TILES)
def test_linear(level: str, tile: int) -> None:
    """Every tile, blocks that do not divide, odd sizes, empty rows and columns, density 0 and 1."""
    for out_features, in_features, density in ((1, 1, 1.0), (7, 5, 0.5), (40, 33, 0.0), (65, 130, 0.2), (17, 64, 1.0), (300, 257, 0.06)):
        weight = pruned(out_features, in_features, density=density)
        if in_features > 30 and density < 1:
            weight[3] = weight[-1] = 0
            weight[:, 2] = weight[:, -1] = 0
        bias = torch.randn(out_features) if out_features % 2 else None
        for n in (1, 2, 7, 8, 13, 31, 64, 100, 129):
            x = torch.randn(n, in_features)
            for k_block, chunk in ((in_features, 256), (32, 64), (7, 3)):
                plan = [10**6, tile, k_block, chunk]
                check(linear(x, weight, bias, plan), functional.linear, x, weight, bias)


def test_linear_of_each_plan_entry() -> None:
    """An entry is good up to its number of columns; behind the last one the defaults are."""
    weight, x = pruned(20, 50, density=0.3), torch.randn(30, 50)
    for n in (1, 2, 3, 10, 30):
        check(linear(x[:n], weight, None, [1, 1, 50, 64, 3, 8, 20, 10, 10, 16, 50, 5]), functional.linear, x[:n], weight, None)


def test_linear_batches(level: str) -> None:
    """Any leading dims, none among them, and none of the rows."""
    weight, bias = pruned(12, 20, density=0.3), torch.randn(12)
    for shape in ((20,), (1, 20), (2, 3, 20), (2, 1, 3, 4, 20)):
        x = torch.randn(shape)
        check(linear(x, weight, bias, []), functional.linear, x, weight, bias)
    assert linear(torch.empty(0, 20), weight, bias, []).shape == (0, 12)
    assert linear(torch.empty(3, 0, 20), weight, bias, []).shape == (3, 0, 12)


CONVOLUTIONS = {  # channels, out_channels, size, kernel, stride, padding, dilation
    "1x1": (17, 9, (14, 14), (1, 1), (1, 1), (0, 0), (1, 1)),
    "1x1 stride 2": (16, 9, (7, 9), (1, 1), (2, 2), (0, 0), (1, 1)),
    "1x1 padded": (5, 3, (4, 5), (1, 1), (1, 1), (1, 2), (1, 1)),
    "3x3": (12, 33, (7, 7), (3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3 stride 2": (12, 8, (15, 13), (3, 3), (2, 2), (1, 1), (1, 1)),
    "3x3 without padding": (6, 8, (9, 8), (3, 3), (1, 1), (0, 0), (1, 1)),
    "3x3 dilated": (6, 8, (11, 12), (3, 3), (1, 1), (2, 2), (2, 2)),
    "5x3 of all sorts": (3, 4, (17, 19), (5, 3), (3, 2), (2, 1), (1, 3)),
    "7x7 stem": (3, 8, (32, 30), (7, 7), (2, 2), (3, 3), (1, 1)),
    "stride beyond the kernel": (4, 5, (10, 10), (2, 2), (4, 3), (1, 0), (1, 1)),
    "one pixel": (3, 4, (1, 1), (1, 1), (3, 3), (1, 1), (1, 1)),
    "the kernel as large as the image": (3, 4, (5, 6), (5, 6), (1, 1), (0, 0), (1, 1)),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution(level: str, case: str) -> None:
    channels, out_channels, size, kernel, stride, padding, dilation = CONVOLUTIONS[case]

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.conv2d(x, weight, bias, stride, padding, dilation)

    for density in (0.0, 0.2, 1.0):
        weight = pruned(out_channels, channels, *kernel, density=density)
        bias = torch.randn(out_channels) if density else None
        rows = compress(weight)
        for batch in (0, 1, 3):
            x = torch.randn(batch, channels, *size)
            for tile in TILES[1:]:
                for k_block, chunk in ((10**4, 256), (5, 4)):
                    plan = [10**6, tile, k_block, chunk]
                    y = ops.sparse_conv2d(x, rows.values, rows.columns, rows.counts, bias, kernel, stride, padding, dilation, plan)
                    check(y, product, x, weight, bias)


@pytest.mark.parametrize("tile", TILES)
def test_nan_and_inf(level: str, tile: int) -> None:
    """They go where a stored weight takes them, and nowhere else: 0 * Inf is skipped."""
    weight, x = pruned(20, 40, density=0.3, seed=1), torch.randn(9, 40)
    weight[2, 5], weight[4, 6] = torch.nan, torch.inf
    x[1, 7], x[3, 8], x[5, 9] = torch.inf, -torch.inf, torch.nan
    y = linear(x, weight, None, [10**6, tile, 16, 7])
    stored = weight != 0
    products = torch.where(stored[None], x[:, None, :] * torch.where(stored, weight, 1.0)[None], 0.0)  # [n, out, in]
    expected = products.sum(-1)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf()) and torch.equal(y[y.isinf()], expected[expected.isinf()])
    assert y.isnan().any() and y.isinf().any() and y.isfinite().any()


@pytest.mark.parametrize("threads", (1, 2, 3, 4))
def test_threads_do_not_change_a_bit(threads: int, set_threads: Any) -> None:
    """Enough work for four threads; each result is summed by one of them, in one order."""
    weight, image_weight = pruned(700, 300, density=0.2), pruned(64, 32, 3, 3, density=0.2)
    x, image = torch.randn(70, 300), torch.randn(2, 32, 20, 20)
    rows, image_rows = compress(weight), compress(image_weight)

    def run() -> list[Tensor]:
        convolution = (image_rows.values, image_rows.columns, image_rows.counts, None, [3, 3], [1, 1], [1, 1], [1, 1])
        return [
            *(ops.sparse_linear(x, rows.values, rows.columns, rows.counts, None, [10**6, tile, 100, 64]) for tile in (1, 8, 32)),
            ops.sparse_conv2d(image, *convolution, [10**6, 32, 100, 16]),
        ]

    set_threads(1)
    alone = run()
    set_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(alone, run(), strict=True))


def test_compress_and_back() -> None:
    """To the bit: -0, denormals and NaN with a payload are stored."""
    weight = pruned(9, 70, density=0.3)
    weight[0, :4] = torch.tensor([-0.0, torch.nan, 1e-45, -torch.inf])
    weight.view(torch.int32)[1, 1] = 0x7FA00001
    rows = compress(weight)
    assert torch.equal(decompress(rows, (9, 70)).view(torch.int32), weight.view(torch.int32))
    wide = pruned(2, 65535, density=0.9)  # columns and counts that need all 16 bits
    assert torch.equal(decompress(compress(wide), (2, 65535)), wide)
    check(linear(torch.ones(2, 65535), wide, None, []), functional.linear, torch.ones(2, 65535), wide, None)


def arguments() -> dict[str, Any]:
    rows = compress(pruned(6, 18, density=0.5))
    return {
        "input": torch.randn(4, 18),
        "values": rows.values,
        "columns": rows.columns,
        "counts": rows.counts,
        "bias": torch.randn(6),
        "plan": [],
    }


def changed(t: Tensor, i: int, value: int) -> Tensor:
    t = t.clone()
    t[i] = value
    return t


WRONG: dict[str, tuple[Any, str]] = {
    "input of float64": (lambda a: a | {"input": a["input"].double()}, "input must be float32"),
    "input not contiguous": (lambda a: a | {"input": torch.randn(18, 4).t()}, "input must be contiguous"),
    "scalar": (lambda a: a | {"input": torch.tensor(1.0)}, "input must have 1 or more dims"),
    "values of float16": (lambda a: a | {"values": a["values"].half()}, "values must be a contiguous vector of float32"),
    "columns of int64": (lambda a: a | {"columns": a["columns"].long()}, "columns must be a contiguous vector of int16"),
    "columns cut off": (lambda a: a | {"columns": a["columns"][:-1]}, "columns must be as many as the values"),
    "counts do not add up": (lambda a: a | {"counts": a["counts"] + 1}, "counts must add up to"),
    "counts negative": (lambda a: a | {"counts": changed(a["counts"], 0, -1)}, "counts must add up to"),
    "column beyond the input": (lambda a: a | {"columns": changed(a["columns"], -1, 18)}, "columns must be below 18, got 18"),
    "column negative": (lambda a: a | {"columns": changed(a["columns"], 3, -1)}, "columns must be below 18, got 65535"),
    "bias too short": (lambda a: a | {"bias": a["bias"][:-1]}, "bias must be a contiguous vector of 6 float32"),
    "plan cut off": (lambda a: a | {"plan": [1, 8, 8]}, "plan must have 4 numbers an entry"),
    "unknown tile": (lambda a: a | {"plan": [9, 12, 8, 8]}, "plan must have a tile of 8 to 128"),
    "no block": (lambda a: a | {"plan": [9, 8, 0, 8]}, "plan must have a tile of 8 to 128"),
}


@pytest.mark.parametrize("tile", (1, 8))
@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_refused_by_name(level: str, case: str, tile: int) -> None:
    change, message = WRONG[case]
    given = arguments()
    given["plan"] = [100, tile, 18, 64]
    with pytest.raises(RuntimeError, match=f"sparse_linear: {message}"):
        ops.sparse_linear(**change(given))


def test_columns_must_ascend() -> None:
    """Blocks of columns are found by their order; the dot product takes any."""
    given = arguments()
    given["columns"] = given["columns"].flip(0).contiguous()
    with pytest.raises(RuntimeError, match="sparse_linear: columns must ascend within each row"):
        ops.sparse_linear(**given)


def conv_arguments() -> dict[str, Any]:
    rows = compress(pruned(6, 2, 3, 3, density=0.5))
    own = {"input": torch.randn(1, 2, 5, 5), "values": rows.values, "columns": rows.columns, "counts": rows.counts, "bias": None}
    return own | {"kernel_size": [3, 3], "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "plan": []}


WRONG_CONVOLUTION: dict[str, tuple[Any, str]] = {
    "three dims": (lambda a: a | {"input": torch.randn(2, 5, 5)}, "input must be .batch, channels, height, width."),
    "one stride": (lambda a: a | {"stride": [1]}, "stride must have 2 numbers, got 1"),
    "stride 0": (lambda a: a | {"stride": [1, 0]}, "stride must be from 1 to 65535, got 0"),
    "padding -1": (lambda a: a | {"padding": [-1, 0]}, "padding must be from 0 to 65535, got -1"),
    "image too small": (
        lambda a: a | {"padding": [0, 0], "input": torch.randn(1, 2, 2, 5)},
        "input must be at least as large",
    ),
    "too many channels": (lambda a: a | {"input": torch.randn(1, 65536, 3, 3)}, "input must meet 1 to 65535 columns"),
    "fewer channels": (lambda a: a | {"input": torch.randn(1, 1, 5, 5)}, "columns must be below 9"),
    "a tile of 1": (lambda a: a | {"plan": [99, 1, 8, 8]}, "plan must have a tile of 8 to 128"),
}


@pytest.mark.parametrize("case", WRONG_CONVOLUTION)
def test_bad_convolutions_are_refused_by_name(case: str) -> None:
    change, message = WRONG_CONVOLUTION[case]
    with pytest.raises(RuntimeError, match=f"sparse_conv2d: {message}"):
        ops.sparse_conv2d(**change(conv_arguments()))


@pytest.mark.parametrize("op, given", [("sparse_linear", arguments), ("sparse_conv2d", conv_arguments)])
def test_opcheck(op: str, given: Any) -> None:
    torch.library.opcheck(getattr(torch.ops.cram_kernels, op).default, (), given())


@pytest.mark.parametrize("op, given", [("sparse_linear", arguments), ("sparse_conv2d", conv_arguments)])
def test_gradients_are_refused(op: str, given: Any) -> None:
    call = given()
    call["input"].requires_grad_()
    with pytest.raises(RuntimeError, match=f"{op}: no argument must require a gradient"):
        getattr(ops, op)(**call)
    with torch.no_grad():
        getattr(ops, op)(**call)
