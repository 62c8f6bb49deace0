"""What a GPU adds to the op tests: whole models, no synchronization, captured graphs, streams, a second device; to the reference's bits.

`make verify-gpu` runs these and the op tests. Without a GPU they run on the CPU backend, a replay being a call, so that they are not wrong
themselves.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from calls import samples
from cases import Drawn, Spec, mixed
from compare import compare_all, contract_part, map_tensors, named_tensors

from cram_kernels import NM, CrAM, Pattern, TopK, ops, reference
from cram_kernels.backend import DEVICES, use_backend, why_missing

pytestmark = pytest.mark.gpu
WANTED = os.environ.get("CRAM_KERNELS_GPU") == "1"  # by `make verify-gpu`: a backend that is missing is a failure
GPU = torch.cuda.is_available() or WANTED
BACKENDS = [name for name in ("cuda", "triton") if WANTED or why_missing(name) is None] if GPU else ["cpu"]
SHARED = ("params", "saved", "masks", "perturbed", "masters")  # by a perturbation and the update that follows it
SPECS = {
    "small": [Spec((64, 32, 3, 3)), Spec((7,)), Spec((257, 129)), Spec((1,)), Spec((33, 64)), Spec((1000, 48)), Spec((2048,))],
    "large": [Spec((64, 32)), Spec((3000, 4096)), Spec((1000, 500, 3, 3)), Spec((4099,))],  # more chunks than a GPU has warps
    "many": [Spec((8, 8)), Spec((3,))] * 500,  # more than one launch takes
}
if not GPU:
    SPECS |= {"large": [Spec((300, 400)), Spec((64, 32, 3, 3))], "many": SPECS["many"][:20]}
Calls = list[tuple[str, dict[str, Any]]]


def case(size: str, values: str = "normal") -> Drawn:
    return Drawn(values, mixed(SPECS[size]))


def copied(calls: Calls, device: str) -> Calls:
    """On a device; tensors that calls share are shared by the copies."""
    made: dict[int, torch.Tensor] = {}

    def copy(t: torch.Tensor) -> torch.Tensor:
        if id(t) not in made:
            made[id(t)] = t.detach().to(device, copy=True)
        return made[id(t)]

    return [(op, map_tensors(arguments, copy)) for op, arguments in calls]


def step(size: str, perturb: str, update: str, values: str = "normal") -> Calls:
    """A perturbation and an update of the same weights, on the CPU."""
    made = samples(case(size, values))
    first, second = made[perturb](), made[update]()
    return [(perturb, first), (update, second | {role: first[role] for role in SHARED})]


def run(calls: Calls, functions: Any = ops) -> list[Any]:
    return [contract_part(getattr(functions, op)(**arguments)) for op, arguments in calls]


def assert_same(calls: Calls, expected: Calls) -> None:
    for (op, actual), (_, wanted) in zip(calls, expected, strict=True):
        compare_all(op, actual, wanted)


@contextlib.contextmanager
def no_synchronization() -> Iterator[None]:
    """torch raises where it would wait for the GPU."""
    if GPU:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if GPU:
            torch.cuda.set_sync_debug_mode("default")


def stream(device: str) -> Callable[[], Any]:
    """A stream of its own, behind all that was queued so far, as a context manager that can be entered again."""
    if not GPU:
        return contextlib.nullcontext
    own = torch.cuda.Stream(device)
    own.wait_stream(torch.cuda.current_stream(device))
    return lambda: torch.cuda.stream(own)


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """call as a graph that can be replayed."""
    if not GPU:
        return call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("size", SPECS)
@pytest.mark.parametrize("op", samples(case("small")))
def test_bits(op: str, size: str, name: str) -> None:
    """Without a synchronization."""
    expected: Calls = [(op, samples(case(size))[op]())]
    actual = copied(expected, DEVICES[name])
    with use_backend(name), no_synchronization():
        results = run(actual)
    compare_all(op, results, run(expected, reference))
    assert_same(actual, expected)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    "perturb, update",
    list(product(("perturb_topk_", "perturb_nm_", "perturb_masked_"), ("restore_combine_", "restore_sgd_", "restore_adam_"))),
)
@pytest.mark.parametrize("size", ["small", "many"])
def test_captured_graph(size: str, perturb: str, update: str, name: str) -> None:
    """Captured once, replayed with new gradients: the bits of as many calls."""
    expected = step(size, perturb, update)
    calls, before = copied(expected, DEVICES[name]), copied(expected, DEVICES[name])
    with use_backend(name):
        with stream(DEVICES[name])():
            run(calls)  # loads or compiles the kernels, which a capture must not
        synchronize()
        for (_, arguments), (_, old) in zip(calls, before, strict=True):
            for (_, t), (_, was) in zip(named_tensors(arguments), named_tensors(old), strict=True):
                t.copy_(was)
        replay = captured(lambda: run(calls))
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            for (_, arguments), (_, own) in zip(calls, expected, strict=True):
                for t, twin in zip(arguments["grads"], own["grads"], strict=True):
                    twin.copy_(torch.randn(twin.shape, generator=generator))
                    t.copy_(twin)
            replay()
            run(expected, reference)
    synchronize()
    assert_same(calls, expected)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("size", SPECS)
def test_two_streams(size: str, name: str) -> None:
    """Steps of two models on two streams at once, again and again: neither sees the other."""
    rounds = 3 if size == "large" else 10
    expected = [step(size, "perturb_topk_", "restore_sgd_", values) for values in ("normal", "ties")]
    models = [copied(calls, DEVICES[name]) for calls in expected]
    streams = [stream(DEVICES[name]) for _ in models]
    with use_backend(name):
        for _ in range(rounds):
            for calls, own in zip(models, streams, strict=True):
                with own():
                    run(calls)
    for _ in range(rounds):  # once the GPU has all its work: between two of its rounds the CPU would leave it idle
        for calls in expected:
            run(calls, reference)
    synchronize()
    for actual, wanted in zip(models, expected, strict=True):
        assert_same(actual, wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="this machine has no second GPU")
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("op", samples(case("small")))
def test_a_device_that_is_not_the_current_one(op: str, name: str) -> None:
    expected: Calls = [(op, samples(case("small"))[op]())]
    actual = copied(expected, "cuda:1")
    with use_backend(name):
        results = run(actual)
    compare_all(op, results, run(expected, reference))
    assert_same(actual, expected)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("pattern", [TopK(0.7), TopK(0.7, "tensor"), NM(2, 4)], ids=str)
@pytest.mark.parametrize("base, options", [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {"amsgrad": True})])
def test_optimizer(base: type, options: dict[str, Any], pattern: Pattern, name: str) -> None:
    """Whole steps, their scalars and states on the device: the weights are those of the reference on the CPU."""

    def trained(device: str) -> list[torch.Tensor]:
        params = [torch.nn.Parameter(t.to(device)) for t in Drawn("normal", SPECS["small"]).tensors("params")]
        optimizer = CrAM(params, base, compression=[pattern], lr=0.1, weight_decay=0.01, **options)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            for half in (optimizer.perturb, optimizer.step):
                for p in params:
                    p.grad = torch.randn(p.shape, generator=generator).to(device)
                half()
        return [p.detach().cpu() for p in params]

    with use_backend(name):
        actual = trained(DEVICES[name])
    with use_backend("reference"):
        expected = trained("cpu")
    compare_all(f"{base.__name__}, {pattern}", actual, expected)
