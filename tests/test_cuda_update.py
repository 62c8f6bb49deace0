"""The restoring ops, the updates and the norm of the CUDA backend, executed on the CPU, equal the reference to the bit."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from calls import UPDATE_VARIANTS, adam, combine, f32, flag, restore, sgd
from capture import check_captured, launches
from cases import DTYPES, SMALL, Case, Drawn, Spec, mixed
from compare import check

OPS: dict[str, Callable[..., dict[str, Any]]] = {
    "restore_": restore,
    "restore_combine_": combine,
    "restore_sgd_": sgd,
    "restore_adam_": adam,
}
OP = pytest.mark.parametrize("op", OPS)
CASE = pytest.mark.parametrize("case", SMALL, ids=str)
MIXED = Case("bits", "shapes", "mixed")


def norm(case: Case | Drawn, variant: str = "plain") -> dict[str, Any]:
    return {"grads": case.tensors("grads"), "inv_scale": f32(1 / 3) if variant == "amp" else None}


@CASE
@OP
def test_values_and_layouts(executed, op: str, case: Case) -> None:
    for variant in ("plain", "masters"):
        check(executed, op, OPS[op](case, variant))


@pytest.mark.parametrize("variant", UPDATE_VARIANTS)
@OP
def test_variants(executed, op: str, variant: str) -> None:
    for case in (MIXED, Case("normal", "scales", "fp32"), Case("nonfinite", "offsets", "bf16")):
        check(executed, op, OPS[op](case, variant))


@pytest.mark.parametrize("variant", ["plain", "masters", "amp"])
@OP
def test_in_all_ways(executed_in_all_ways, op: str, variant: str) -> None:
    for case in (Case("bits", "offsets", "mixed"), Case("normal", "scales", "bf16"), Case("ties", "orders", "mixed")):
        check(executed_in_all_ways, op, OPS[op](case, variant))


@pytest.mark.parametrize("found_inf", [0.0, -0.0, 1.0, 1e-45, math.nan])
@pytest.mark.parametrize("op", list(OPS)[1:])
def test_found_inf(executed, op: str, found_inf: float) -> None:
    for perturbed in (0, 1):
        check(executed, op, OPS[op](MIXED, "masters") | {"found_inf": f32(found_inf), "perturbed": flag(perturbed)})


@OP
def test_many_tensors_take_one_launch_per_450(executed, op: str) -> None:
    specs = mixed([Spec((1 + 7 * i % 23,)) for i in range(901)])
    assert launches(executed, op, OPS[op](Drawn("normal", specs[:450]), "masters")) == 1
    assert launches(executed, op, OPS[op](Drawn("normal", specs), "masters")) == 3
    check(executed, op, OPS[op](Drawn("normal", specs), "masters"))


@OP
def test_nothing_but_the_flag(executed, op: str) -> None:
    """Of an empty list, and of tensors without elements."""
    for layout in ("none", "empty"):
        arguments = OPS[op](Case("normal", layout, "fp32"))
        check(executed, op, arguments)
        assert launches(executed, op, arguments) == 1


def test_more_settings_than_a_launch_holds(executed) -> None:
    specs = mixed([Spec((3 + i,)) for i in range(40)])
    options = {"momentum": [i / 40 for i in range(40)], "lr": torch.linspace(0.1, 0.5, 40)}
    assert launches(executed, "restore_sgd_", sgd(Drawn("normal", specs), **options)) == 3  # of 16 at most
    check(executed, "restore_sgd_", sgd(Drawn("normal", specs), **options))
    options = {"beta2": [0.9 + i / 1000 for i in range(40)], "amsgrad": [1], "lr": torch.linspace(0.1, 0.5, 40)}
    check(executed, "restore_adam_", adam(Drawn("normal", specs), "masters", **options))


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("amsgrad", [0, 1])
def test_adam_options(executed, decoupled: bool, amsgrad: int) -> None:
    options = {"decoupled": decoupled, "amsgrad": [amsgrad], "weight_decay": [0.01], "maximize": [amsgrad]}
    check(executed, "restore_adam_", adam(MIXED, "masters", **options))
    check(executed, "restore_adam_", adam(Case("normal", "shapes", "mixed"), "partial") | {"decoupled": decoupled})


def test_steps_beyond_what_float32_counts(executed) -> None:
    """2^24 + 1 is 2^24, on the device as in the reference."""
    steps = [f32(float(s)) for s in (2**24 - 1, 2**24, 0)]
    check(executed, "restore_adam_", adam(Drawn("normal", [Spec((9,))] * 3), lr=f32(0.1)) | {"steps": steps})


@pytest.mark.parametrize("nesterov", [0, 1])
@pytest.mark.parametrize("fresh", [0, 1])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_options(executed, nesterov: int, fresh: int, momentum: float) -> None:
    options = {"nesterov": [nesterov], "fresh": [fresh], "momentum": [momentum], "dampening": [0.1], "weight_decay": [5e-4]}
    check(executed, "restore_sgd_", sgd(MIXED, "masters", **options))


@pytest.mark.parametrize("variant", ["plain", "amp", "masters", "overflow"])
@OP
def test_captured(executed, op: str, variant: str) -> None:
    check_captured(executed, op, OPS[op](Case("normal", "scales", "bf16"), variant))


@CASE
def test_norm(executed, case: Case) -> None:
    if case.specs:
        for variant in ("plain", "amp"):
            check(executed, "grad_norm", norm(case, variant))


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_every_length_around_a_chunk(executed, dtype: str) -> None:
    for lengths in ([1], [1023], [1024], [1025], [2047, 3], [5 * 1024 + 1], [1024] * 33, [0, 1, 0, 2048]):
        check(executed, "grad_norm", norm(Drawn("normal", [Spec((n,), DTYPES[dtype], offset=i % 3) for i, n in enumerate(lengths)])))


def test_norm_in_all_ways(executed_in_all_ways) -> None:
    for case in (Case("range", "scales", "mixed"), Case("normal", "pieces", "mixed")):
        check(executed_in_all_ways, "grad_norm", norm(case))
    check_captured(executed_in_all_ways, "grad_norm", norm(Case("normal", "scales", "fp16"), "amp"))
