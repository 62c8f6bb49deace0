"""The ops of sparse inference: against float64 products of plain torch, within the error bound of a sum of that length."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import SIMD_LEVELS
from torch import Tensor
from torch.nn import functional

from cram_kernels import _native
from cram_kernels.inference import ops
from cram_kernels.inference.weights import Layout, layout_of, pack, unpack

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


F32, BF16 = torch.float32, torch.bfloat16


def zeros_or(bias: Tensor | None, weight: Tensor) -> Tensor:
    return torch.zeros(len(weight)) if bias is None else bias


def linear(x: Tensor, weight: Tensor, bias: Any, plan: list[int], block: int = 255, section: int = 128, values: Any = F32) -> Tensor:
    layout = replace(layout_of(tuple(weight.shape), block, section), values=values)
    return ops.sparse_linear(x, pack(weight, layout), zeros_or(bias, weight), layout.form(plan))


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
            for block, section in ((255, 128), (128, 112), (127, 128), (129, 16), (64, 128), (65, 32), (32, 64), (7, 16)):
                check(linear(x, weight, bias, [10**6, tile], block, section), functional.linear, x, weight, bias)


@pytest.mark.parametrize("tile", TILES)
def test_bfloat16_values(level: str, tile: int) -> None:
    """Products of the rounded weight: the same bound, so sums are float32."""
    weight, bias = pruned(150, 300, density=0.2), torch.randn(150)
    for n in (1, 3, 40):
        x = torch.randn(n, 300)
        for block, section in ((255, 128), (127, 48), (60, 16)):
            y = linear(x, weight, bias, [10**6, tile], block, section, BF16)
            check(y, functional.linear, x, weight.bfloat16().float(), bias)


def test_linear_of_each_plan_entry() -> None:
    """An entry is good up to its number of columns; behind the last one the defaults are."""
    weight, x = pruned(20, 50, density=0.3), torch.randn(30, 50)
    for n in (1, 2, 3, 10, 30):
        check(linear(x[:n], weight, None, [1, 1, 3, 8, 10, 16]), functional.linear, x[:n], weight, None)


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
        layouts = [layout_of(tuple(weight.shape), block, section) for block, section in ((255, 128), (5, 16))]
        packed = [pack(weight, layout) for layout in layouts]
        for batch in (0, 1, 3):
            x = torch.randn(batch, channels, *size)
            for tile in TILES[1:]:
                for own, layout in zip(packed, layouts, strict=True):
                    y = ops.sparse_conv2d(x, own, zeros_or(bias, weight), layout.form([10**6, tile]), kernel, stride, padding, dilation)
                    check(y, product, x, weight, bias)


@pytest.mark.parametrize("tile", TILES[1:])
def test_large_outputs(level: str, tile: int) -> None:
    """More than 1 MiB, which AVX-512 writes past the caches; the image has whole cache lines, or not."""
    weight, bias = pruned(96, 10, 1, 1, density=0.3), torch.randn(96)
    layout = layout_of((96, 10, 1, 1), 5, 64)
    for size in ((64, 48), (63, 47)):
        x = torch.randn(1, 10, *size)
        y = ops.sparse_conv2d(x, pack(weight, layout), bias, layout.form([10**6, tile]), [1, 1], [1, 1], [0, 0], [1, 1])
        check(y, functional.conv2d, x, weight, bias)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("block", (16, 64, 100, 128, 129, 255))
def test_nan_and_inf(level: str, tile: int, block: int) -> None:
    """They go where a stored weight takes them, and nowhere else: 0 * Inf is skipped, also at the first and last column of a block."""
    weight, x = pruned(20, 300, density=0.1, seed=1), torch.randn(9, 300)
    weight[2, 5], weight[4, 6] = torch.nan, torch.inf
    x[1, 7], x[3, 8], x[5, 9] = torch.inf, -torch.inf, torch.nan
    x[6, ::block], x[7, block - 1 :: block] = torch.inf, torch.nan
    y = linear(x, weight, None, [10**6, tile], block, 16)
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
    layout = layout_of((64, 32, 3, 3), 100, 16)
    image_packed = pack(image_weight, layout)

    def run() -> list[Tensor]:
        return [
            *(linear(x, weight, None, [10**6, tile], 100, 64) for tile in (1, 8, 32)),
            ops.sparse_conv2d(image, image_packed, torch.zeros(64), layout.form([10**6, 32]), [3, 3], [1, 1], [1, 1], [1, 1]),
        ]

    set_threads(1)
    alone = run()
    set_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(alone, run(), strict=True))


@pytest.mark.parametrize("block, section", [(255, 128), (7, 16), (1, 32)])
def test_pack_and_back(block: int, section: int) -> None:
    """To the bit: -0, denormals and NaN with a payload are stored."""
    weight = pruned(45, 7, 10, density=0.3)
    weight[0, 0, :4] = torch.tensor([-0.0, torch.nan, 1e-45, -torch.inf])
    weight.view(torch.int32)[1, 1, 1] = 0x7FA00001
    layout = layout_of((45, 7, 10), block, section)
    packed = pack(weight, layout)
    assert torch.equal(unpack(packed, layout, (45, 7, 10)).view(torch.int32), weight.view(torch.int32))
    assert layout.section % 16 == 0 and layout.block <= block


def test_wide_rows() -> None:
    wide, x = pruned(2, 70000, density=0.9), torch.ones(2, 70000)
    check(linear(x, wide, None, []), functional.linear, x, wide, None)


LAYOUT = Layout(20, 18, 9, 16)  # two sections, two blocks, 5 bytes of order and steps at its end


def arguments() -> dict[str, Any]:
    packed = pack(pruned(20, 18, density=0.5), LAYOUT)
    return {"input": torch.randn(4, 18), "packed": packed, "bias": torch.randn(20), "form": LAYOUT.form([100, 8])}


def parts(packed: Tensor) -> tuple[Tensor, ...]:
    """Views of the values, the columns, the order of rows, its inverse, the steps of slices."""
    steps = (packed.numel() - 80 - 4) // 80  # 2 bytes for 20 rows in 2 blocks; 2 sections of a slice in 2 blocks
    return packed.split((64 * steps, 16 * steps, 40, 40, 4))


def changed(part: int, i: int, value: int) -> Any:
    def change(given: dict[str, Any]) -> dict[str, Any]:
        packed = given["packed"].clone()
        parts(packed)[part][i] = value
        return given | {"packed": packed}

    return change


def form(*numbers: int) -> Any:
    return lambda given: given | {"form": torch.tensor(numbers)}


WRONG: dict[str, tuple[Any, str]] = {
    "input of float64": (lambda a: a | {"input": a["input"].double()}, "input must be float32"),
    "input not contiguous": (lambda a: a | {"input": torch.randn(18, 4).t()}, "input must be contiguous"),
    "scalar": (lambda a: a | {"input": torch.tensor(1.0)}, "input must have 1 or more dims"),
    "another width": (lambda a: a | {"input": torch.randn(4, 17)}, "input must meet 18 columns of the weight, got 17"),
    "packed of int8": (lambda a: a | {"packed": a["packed"].view(torch.int8)}, "packed must be a contiguous vector of uint8"),
    "packed cut off": (lambda a: a | {"packed": a["packed"][:-1]}, "packed must have 84 bytes and 80 a step"),
    "packed without its tables": (lambda a: a | {"packed": a["packed"][:4]}, "packed must have 84 bytes and 80 a step, got 4"),
    "packed at an odd address": (
        lambda a: a | {"packed": torch.cat([a["packed"][:1], a["packed"]])[1:]},
        "packed must begin at a multiple",
    ),
    "a step less": (lambda a: a | {"packed": a["packed"][80:]}, "packed must have numbers of steps that add up to"),
    "a step too many": (changed(4, 0, 200), "packed must have numbers of steps that add up to"),
    "column beyond the block": (changed(1, 3, 10), "packed must have columns of at most 9, got 10"),
    "row beyond the section": (changed(2, 0, 16), "packed must have places of rows below 16, got 16"),
    "row beyond the last section": (changed(2, 39, 25), "packed must have places of rows below 4, got 25"),
    "place beyond the section": (changed(3, 31, 16), "packed must have places of rows below 16, got 16"),
    "place beyond the last section": (changed(3, 32, 4), "packed must have places of rows below 4, got 4"),
    "a row twice": (lambda a: changed(2, 1, int(parts(a["packed"])[2][0]))(a), "packed must have each row once"),
    "a place twice": (lambda a: changed(3, 39, int(parts(a["packed"])[3][38]))(a), "packed must have each row once"),
    "form cut off": (form(20, 18, 9, 16), "form must have 5 numbers of the layout and 2 an entry of the plan, got 4"),
    "form of int32": (lambda a: a | {"form": a["form"].int()}, "form must be a contiguous vector of int64, got int32"),
    "no block": (form(20, 18, 0, 16, 4), "form must begin with rows, columns, a block of 1 to 255"),
    "a block of 256": (form(20, 18, 256, 16, 4), "form must begin with rows, columns, a block of 1 to 255"),
    "a section of 8": (form(20, 18, 9, 8, 4), "form must begin with rows, columns, a block of 1 to 255"),
    "a section of 144": (form(20, 18, 9, 144, 4), "form must begin with rows, columns, a block of 1 to 255"),
    "values of 3 bytes": (form(20, 18, 9, 16, 3), "form must begin with rows, columns, a block of 1 to 255"),
    "too many rows": (form(2**60, 18, 1, 16, 4), "form must begin with rows, columns, a block of 1 to 255"),
    "more rows than are packed": (form(2000, 18, 9, 16, 4), "packed must have"),
    "bias too short": (lambda a: a | {"bias": a["bias"][:-1]}, "bias must be a contiguous vector of 20 float32"),
    "plan cut off": (form(20, 18, 9, 16, 4, 1), "form must have 5 numbers of the layout and 2 an entry of the plan, got 6"),
    "unknown tile": (form(20, 18, 9, 16, 4, 9, 12), "form must have a tile of 8, 16, 32, 64 or 128"),
}


@pytest.mark.parametrize("tile", (1, 8))
@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_refused_by_name(level: str, case: str, tile: int) -> None:
    change, message = WRONG[case]
    given = arguments() | {"form": LAYOUT.form([100, tile])}
    with pytest.raises(RuntimeError, match=f"sparse_linear: {message}"):
        ops.sparse_linear(**change(given))


def conv_arguments() -> dict[str, Any]:
    layout = layout_of((6, 2, 3, 3))
    own = {
        "input": torch.randn(1, 2, 5, 5),
        "packed": pack(pruned(6, 2, 3, 3, density=0.5), layout),
        "bias": torch.zeros(6),
        "form": layout.form([]),
    }
    return own | {"kernel_size": [3, 3], "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1]}


WRONG_CONVOLUTION: dict[str, tuple[Any, str]] = {
    "three dims": (lambda a: a | {"input": torch.randn(2, 5, 5)}, "input must be .batch, channels, height, width."),
    "one stride": (lambda a: a | {"stride": [1]}, "stride must have 2 numbers, got 1"),
    "stride 0": (lambda a: a | {"stride": [1, 0]}, "stride must be from 1 to 65535, got 0"),
    "padding -1": (lambda a: a | {"padding": [-1, 0]}, "padding must be from 0 to 65535, got -1"),
    "image too small": (
        lambda a: a | {"padding": [0, 0], "input": torch.randn(1, 2, 2, 5)},
        "input must be at least as large",
    ),
    "too many channels": (lambda a: a | {"input": torch.empty(0, 2**40, 3, 3)}, "input must meet 18 columns of the weight"),
    "fewer channels": (lambda a: a | {"input": torch.randn(1, 1, 5, 5)}, "input must meet 18 columns of the weight, got 9"),
    "a tile of 1": (lambda a: a | {"form": torch.cat([a["form"], torch.tensor([99, 1])])}, "form must have a tile of 8, 16, 32, 64 or 128"),
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
