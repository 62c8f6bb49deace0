"""Every argument wrong in turn: RuntimeError with op and argument, and nothing is changed. The same words from every backend."""

import re
from collections.abc import Callable
from typing import Any

import messages
import pytest
import torch
from compare import MUTATED, compare_all, named_tensors
from test_schema import SAMPLES
from torch import Tensor

from cram_kernels import ops
from cram_kernels.backend import BackendUnavailable, use_backend

MAIN = ("params", "weights")  # the lists that give shape and dtype to the others; in grad_norm, grads
PER_TENSOR = ("momentum", "dampening", "weight_decay", "nesterov", "maximize", "fresh", "beta1", "beta2", "eps", "amsgrad")


def with_holes(t: Tensor) -> Tensor:
    return t.new_zeros(*t.shape, 2)[..., 0]


def transposed(t: Tensor) -> Tensor:
    """The same shape with the dims in the opposite order in memory."""
    return torch.empty(tuple(reversed(t.shape)), dtype=t.dtype).permute(tuple(reversed(range(t.dim())))).copy_(t)


ANY_LIST: dict[str, Callable[[Tensor], Tensor]] = {
    "float64": Tensor.double,
    "int32": Tensor.int,
    "complex64": lambda t: t.to(torch.complex64),
    "sparse": Tensor.to_sparse,
    "holes": with_holes,
}
FOLLOWERS = {  # of lists that must be like the main one
    "shape": lambda t: t.new_zeros(*t.shape, 2),
    "order": transposed,
    "meta": lambda t: t.to("meta"),
    "other 16-bit dtype": lambda t: t.to(torch.float16 if t.dtype != torch.float16 else torch.bfloat16),
}
MASKS = {
    "int8": Tensor.char,
    "bool": Tensor.bool,
    "long": lambda t: torch.cat([t, t[:1]]),
    "short": lambda t: t[:-1],
    "two dims": lambda t: t[None],
    "holes": with_holes,
    "meta": lambda t: t.to("meta"),
    "sparse": Tensor.to_sparse,
}
SCALARS = {
    "float64": Tensor.double,
    "int16": Tensor.short,
    "two": lambda t: t.new_zeros(2),
    "meta": lambda t: t.to("meta"),
}
RANKS = {"int32": Tensor.int, "float": Tensor.float, "two dims": lambda t: t[None], "meta": lambda t: t.to("meta")}


def replaced(values: list, i: int, value: Any) -> list:
    return [*values[:i], value, *values[i + 1 :]]


def first(tensors: list[Tensor]) -> int:
    """The first entry with elements in two dims or more, or with elements at all."""
    present = [i for i, t in enumerate(tensors) if t.numel() > 0]
    return next((i for i in present if tensors[i].dim() > 1), present[0])


def mistakes_of(op: str, name: str, value: Any) -> dict[str, Any]:
    """Wrong values of one argument by name."""
    if name in ("k", "prefix"):
        return {wrong: f(value) for wrong, f in RANKS.items()}
    if isinstance(value, Tensor):
        return {wrong: f(value) for wrong, f in SCALARS.items()}
    if name == "sets":
        return {"short": value[:-1], "-2": replaced(value, 1, -2), "too large": replaced(value, 1, 4), "long": [*value, 0]}
    if name == "prune":
        return {"short": value[:-1], "2": replaced(value, 0, 2), "-1": replaced(value, 0, -1), "one dim": replaced(value, 3, 1)}
    if name in PER_TENSOR:
        return {"none": [], "two": value[:2], "one more": [*value, value[0]]}
    if name in ("n", "m"):
        return {str(wrong): wrong for wrong in {"n": (0, -1, 4, 5), "m": (2, 1, 0, 1025, 3)}[name]}
    if not isinstance(value, list):
        return {}
    changes = dict(MASKS if name == "masks" else SCALARS if name == "steps" else ANY_LIST)
    main = name in MAIN or op == "grad_norm"
    if name not in ("masks", "steps") and not main:
        changes |= FOLLOWERS
    i = first(value)
    wrong = {what: replaced(value, i, f(value[i])) for what, f in changes.items()}
    if not main:
        wrong["length"] = value[:-1]
    return wrong


def all_mistakes() -> list:
    found = []
    for op, sample in SAMPLES.items():
        for name, value in sample().items():
            for what in mistakes_of(op, name, value):
                found.append(pytest.param(op, name, what, id=f"{op}-{name}-{what}"))
    return found


def assert_refused(op: str, argument: str, arguments: dict[str, Any]) -> None:
    watched = [(name, t, t.clone()) for name, t in named_tensors(arguments) if t.device.type == "cpu"]
    with pytest.raises(RuntimeError) as refusal:
        getattr(ops, op)(**arguments)
    message = str(refusal.value)
    assert message.startswith(f"{op}: ") and argument in message and " must " in message and ", got " in message, message
    dtype = re.fullmatch(r".* must be (float32|bfloat16|float16|int32|int64|uint8), got .*", message)
    assert dtype or not messages.NATIVE or messages.listed(message), f"tests/messages.py does not find this in the source: {message}"
    for name, t, before in watched:
        old, new = (x.to_dense() if x.is_sparse else x for x in (before, t))
        assert bool(((new == old) | (old != old)).all()), f"{op} changed {name} and then raised: {message}"


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("op, argument, what", all_mistakes())
def test_wrong(op: str, argument: str, what: str, name: str) -> None:
    arguments = SAMPLES[op]()
    arguments[argument] = mistakes_of(op, argument, arguments[argument])[what]
    with use_backend(name):
        assert_refused(op, argument, arguments)


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("op", SAMPLES)
def test_views_whose_memory_is_not_their_values(op: str, name: str) -> None:
    """torch._neg_view and conj(): refused where they would be written, materialized where they are read."""
    sample = SAMPLES[op]()
    lists = {key: first(value) for key, value in sample.items() if isinstance(value, list) and value and isinstance(value[0], Tensor)}
    with use_backend(name):
        for key, i in lists.items():
            arguments, t = SAMPLES[op](), sample[key][i]
            if not t.is_floating_point():
                continue
            if key in MUTATED[op]:
                assert_refused(op, f"{key}[{i}]", arguments | {key: replaced(arguments[key], i, torch._neg_view(t))})
                assert_refused(op, f"{key}[{i}]", arguments | {key: replaced(arguments[key], i, t.to(torch.complex64).conj())})
                continue
            expected = SAMPLES[op]()
            expected[key] = replaced(expected[key], i, expected[key][i].neg())
            arguments[key] = replaced(arguments[key], i, torch._neg_view(arguments[key][i]))
            compare_all(op, getattr(ops, op)(**arguments), getattr(ops, op)(**expected))
            for written in MUTATED[op]:
                compare_all(op, arguments.get(written), expected.get(written))


@pytest.mark.parametrize("op", SAMPLES)
def test_a_device_that_the_backend_does_not_serve(op: str) -> None:
    arguments = SAMPLES[op]()
    main = next(iter(arguments))
    with pytest.raises(BackendUnavailable, match="'meta'"):
        getattr(ops, op)(**arguments | {main: [t.to("meta") for t in arguments[main]]})


@pytest.mark.parametrize("op", [op for op in SAMPLES if {*MAIN} & {*MUTATED[op]}])
def test_tied_and_overlapping_tensors(op: str) -> None:
    """One storage twice in what is written, or read and written: it would be perturbed, pruned or updated twice."""
    arguments = SAMPLES[op]()
    main = next(name for name in MAIN if name in arguments)
    tensors = arguments[main]
    same_layout = torch.empty_like(tensors[0])
    lists = {name: value for name, value in arguments.items() if isinstance(value, list) and value and isinstance(value[0], Tensor)}
    doubled = {name: [*value, torch.empty_like(value[0]) if value[0].numel() else value[0]] for name, value in lists.items()}
    extra = {name: [*value, value[0]] for name, value in arguments.items() if name in ("sets", "prune", *PER_TENSOR) and len(value) > 1}
    lengths = {name: torch.cat([value, value[:1]]) for name, value in arguments.items() if name in ("rho", "lr") and value.dim() == 1}
    assert_refused(op, main, arguments | doubled | extra | lengths | {main: [*tensors, tensors[0]]})
    base = torch.zeros(2 * same_layout.numel())
    halves = [base[: same_layout.numel()].view_as(same_layout), base[1 : 1 + same_layout.numel()].view_as(same_layout)]
    assert_refused(op, main, arguments | doubled | extra | lengths | {main: [halves[0], *tensors[1:], halves[1]]})
    if "saved" in arguments:
        assert_refused(op, "s", arguments | {"saved": replaced(arguments["saved"], 0, tensors[0])})


@pytest.mark.parametrize("op", [op for op in SAMPLES if {*MAIN} & {*MUTATED[op]} and op != "prune_nm_"])
def test_scalars_that_share_memory_with_what_is_written(op: str) -> None:
    """A perturbed weight would change rho, k or the scale halfway; a flag would be a weight."""
    arguments = SAMPLES[op]()
    main = next(name for name in MAIN if name in arguments)
    scalars = {name for name, value in arguments.items() if isinstance(value, Tensor)}
    assert scalars
    place = [t.dtype for t in arguments[main]].index(torch.float32)
    weight = arguments[main][place]
    for name in scalars:
        value = arguments[name]
        shared = torch.empty(2 * weight.numel(), dtype=torch.int64)  # room for either, and aligned for both
        tied = shared.view(torch.float32)[: weight.numel()].as_strided(weight.shape, weight.stride()).copy_(weight)
        scalar = shared.view(value.dtype)[: value.numel()].view_as(value).copy_(value)
        assert_refused(op, "share memory", arguments | {name: scalar, main: replaced(arguments[main], place, tied)})


@pytest.mark.parametrize("op", ["perturb_topk_", "perturb_nm_", "perturb_masked_"])
def test_what_a_perturbation_needs(op: str) -> None:
    arguments = SAMPLES[op]()
    assert_refused(op, "perturbed", arguments | {"perturbed": torch.tensor(1, dtype=torch.int32)})
    assert_refused(op, "grads[1]", arguments | {"grads": replaced(arguments["grads"], 1, torch.empty(0))})
    assert_refused(op, "grads", arguments | {"grads": []})
    assert_refused(op, "saved[0]", arguments | {"saved": []})  # a float32 parameter without a copy would be lost
    assert_refused(op, "masters[0]", arguments | {"masters": [torch.zeros_like(p, dtype=torch.float32) for p in arguments["params"]]})


def test_what_an_update_needs() -> None:
    arguments = SAMPLES["restore_sgd_"]()
    assert_refused("restore_sgd_", "momentum_buffers", arguments | {"momentum_buffers": [], "momentum": [0.9]})
    arguments = SAMPLES["restore_adam_"]()
    assert_refused("restore_adam_", "exp_avgs", arguments | {"exp_avgs": []})
    assert_refused("restore_adam_", "exp_avg_sqs", arguments | {"exp_avg_sqs": []})
    assert_refused("restore_adam_", "max_exp_avg_sqs", arguments | {"max_exp_avg_sqs": [], "amsgrad": [1]})


@pytest.mark.parametrize("op", ["prune_nm_", "perturb_nm_"])
def test_an_axis_that_m_does_not_divide(op: str) -> None:
    assert_refused(op, "prune[0]", SAMPLES[op]() | {"m": 5})


@pytest.mark.parametrize("place", [0, 150, 298])
def test_one_overlap_among_many_tensors_in_any_order(place: int) -> None:
    """Neighbours in memory, given in another order, far from the rest of the call's tensors; two of them share one element."""
    base = torch.zeros(300 * 64 + 1)
    views = [base[64 * i : 64 * i + 64 + (i == place)] for i in range(300)]
    shuffled = [views[i] for i in torch.randperm(300, generator=torch.Generator().manual_seed(place)).tolist()]
    fine = [v[:64] for v in shuffled]
    sets, k = [0] * 300, torch.tensor([9600])
    ops.prune_topk_(fine, [], sets, k)
    with pytest.raises(RuntimeError, match=r"prune_topk_: weights\[\d+\] must not share memory with weights\[\d+\], got tensors"):
        ops.prune_topk_(shuffled, [], sets, k)
