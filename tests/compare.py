"""Comparing to the bit, and running an op on guarded memory beside the reference."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cram_kernels import reference

LINE = 64  # bytes of a cache line: guarded copies keep their place within it
SENTINEL = 0x7F  # read as a number by mistake it wins: 3.4e38 in fp32 and bf16, NaN in fp16
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

MUTATED = {  # op -> the arguments that it changes; everything else is read only
    "topk_threshold": (),
    "topk_histogram": (),
    "prune_topk_": ("weights", "masks"),
    "perturb_topk_": ("params", "saved", "masks", "perturbed", "found_inf"),
    "prune_nm_": ("weights", "masks"),
    "perturb_nm_": ("params", "saved", "masks", "perturbed", "found_inf"),
    "perturb_masked_": ("params", "saved", "perturbed", "found_inf"),
    "restore_": ("params", "perturbed"),
    "restore_combine_": ("params", "grads", "perturbed"),
    "restore_sgd_": ("params", "perturbed", "momentum_buffers", "masters"),
    "restore_adam_": ("params", "perturbed", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps", "masters"),
    "grad_norm": (),
}


def bits(t: Tensor) -> Tensor:
    """The elements of a dense tensor as integers, [numel], in memory order."""
    return t.detach().as_strided((t.numel(),), (1,)).view(INTEGERS[t.element_size()])


def assert_bitwise_equal(actual: Tensor, expected: Tensor, what: str) -> None:
    """Same dtype, shape, strides and bytes; else the number of differences, and the first with its bytes and values."""
    for name in ("dtype", "shape"):
        a, e = getattr(actual, name), getattr(expected, name)
        assert a == e, f"{what}: {name} is {a}, expected {e}"
    if actual.numel() == 0:
        return
    assert actual.stride() == expected.stride(), f"{what}: strides are {actual.stride()}, expected {expected.stride()}"
    a, e = bits(actual).cpu(), bits(expected).cpu()
    if torch.equal(a, e):
        return
    wrong = (a != e).nonzero().flatten()
    i, digits = int(wrong[0]), 2 * actual.element_size()
    shown = [f"0x{int(b[i]) % (1 << 4 * digits):0{digits}x} ({b.view(t.dtype)[i].item()})" for b, t in ((a, actual), (e, expected))]
    raise AssertionError(
        f"{what}: {wrong.numel()} of {a.numel()} elements differ; the first, at {i} in memory order, is {shown[0]}, expected {shown[1]}"
    )


def map_tensors(x: Any, f: Callable[[Tensor], Tensor]) -> Any:
    """x, a tensor, a list, tuple or dict of such, or a plain value, with f of every tensor."""
    if isinstance(x, Tensor):
        return f(x)
    if isinstance(x, dict):
        return {key: map_tensors(value, f) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return type(x)(map_tensors(value, f) for value in x)
    return x


def named_tensors(x: Any, name: str = "") -> list[tuple[str, Tensor]]:
    """Every tensor in x with its name: `params[3]`."""
    if isinstance(x, Tensor):
        return [(name, x)]
    if isinstance(x, dict):
        return [pair for key, value in x.items() for pair in named_tensors(value, key)]
    if isinstance(x, list | tuple):
        return [pair for i, value in enumerate(x) for pair in named_tensors(value, f"{name}[{i}]")]
    return []


class Arena:
    """Copies of all tensors of a call in one buffer, each at its place within a cache line, sentinel bytes between them."""

    def __init__(self, arguments: dict[str, Any], device: str = "cpu") -> None:
        self.starts: list[tuple[int, str]] = []
        end = 0
        for name, t in named_tensors(arguments):
            start = (end + 2 * LINE) // LINE * LINE + t.data_ptr() % LINE
            self.starts.append((start, name))
            end = start + t.numel() * t.element_size()
        buffer = torch.full((end + 3 * LINE,), SENTINEL, dtype=torch.uint8, device=device)
        self.bytes = buffer[-buffer.data_ptr() % LINE :]
        places = iter(self.starts)
        self.arguments = map_tensors(arguments, lambda t: self._place(t, next(places)[0]))

    def _place(self, t: Tensor, start: int) -> Tensor:
        if t.numel() == 0:
            return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=self.bytes.device)
        inside = self.bytes[start : start + t.numel() * t.element_size()].view(t.dtype)
        inside.copy_(t.as_strided((t.numel(),), (1,)))
        return inside.as_strided(t.shape, t.stride())

    def nearest(self, byte: int) -> str:
        start, name = min(self.starts, key=lambda place: abs(place[0] - byte))
        return f"{byte - start} bytes from the start of {name}"


def clone(arguments: dict[str, Any]) -> dict[str, Any]:
    """A copy with the same strides."""
    return Arena(arguments).arguments


def contract_part(result: Any) -> Any:
    """The result without the statistics that are the backend's own (contract: Top-k)."""
    return (result[0], result[1][:, 0].contiguous()) if isinstance(result, tuple) else result


def check(backend: Any, op: str, arguments: dict[str, Any]) -> Any:
    """Run op on the backend, every variant: arguments, the bytes around them and results equal the reference's. Returns the last result."""
    model, arena = Arena(arguments), Arena(arguments, backend.device)
    before = arena.bytes.clone()
    expected = getattr(reference, op)(**model.arguments)
    for (name, t), (_, own) in zip(named_tensors(arguments), named_tensors(model.arguments), strict=True):
        if name.split("[")[0] not in MUTATED[op]:
            assert_bitwise_equal(own, t, f"{op}, reference: {name}, which is read only")
    for variant in backend.variants:
        backend.select(variant)
        arena.bytes.copy_(before)
        actual = backend(op, arena.arguments)
        what = f"{op} on {backend.name} {variant}"
        if not torch.equal(arena.bytes.cpu(), model.bytes):
            compare_all(what, arena.arguments, model.arguments)
            stray = (arena.bytes.cpu() != model.bytes).nonzero().flatten()
            raise AssertionError(f"{what}: wrote {stray.numel()} bytes outside of all tensors, the first {arena.nearest(int(stray[0]))}")
        compare_all(what, contract_part(actual), contract_part(expected))
    return actual


def compare_all(what: str, actual: Any, expected: Any) -> None:
    for (name, a), (_, e) in zip(named_tensors(actual, "result"), named_tensors(expected, "result"), strict=True):
        assert_bitwise_equal(a, e, f"{what}: {name}")
