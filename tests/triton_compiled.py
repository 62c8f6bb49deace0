"""Run by test_triton.py in a process of its own: one case or two of each op on the compiled kernels (triton_executor.py), in all ways."""

from collections.abc import Callable
from typing import Any

import pytest
import test_nm
import torch
from calls import adam, combine, f32, mask_bytes, perturb, poisoned_masks, restore, selection, sgd
from cases import Case, Drawn, Spec, mixed
from compare import check, compare_all, named_tensors
from optim_cases import same_bits
from test_histogram import histogram
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction
from triton_executor import WAYS, Compiled

from cram_kernels import reference

SHAPES = Drawn("bits", mixed([Spec((3, 5)), Spec((33, 31), offset=1), Spec((257,)), Spec((0,)), Spec((8, 6, 3, 3), order=(0, 2, 3, 1))]))
BF16 = Drawn("bits", [spec._replace(dtype=torch.bfloat16) for spec in SHAPES.specs])
LARGER = Drawn("normal", [Spec((300, 301), torch.bfloat16), Spec((64, 65), torch.float16)])
TIES = Drawn("two", LARGER.specs)
NARROW = Drawn("narrow", [Spec((300, 301)), Spec((64, 65), torch.float16)])  # nearly all weights within one bin of the sample
LAYERS = Drawn("ties", [spec._replace(dtype=torch.bfloat16) for spec in test_nm.specs(4) if spec.numel])
ZEROS = Drawn("zeros", mixed([Spec((8,)), Spec((40,))]))  # 0 - 0 is not the opposite of 0
FAR = Drawn("ties", [Spec(shape, dtype, (1, 0)) for shape in ((1032, 8), (1001, 4)) for dtype in (torch.bfloat16, torch.float32)])


def topk(case: Drawn, name: str, variant: str = "plain") -> dict[str, Any]:
    arguments = perturb(case, variant)
    return arguments | selection(name, arguments["params"])


def pruned(case: Drawn) -> dict[str, Any]:
    weights = case.tensors("params")
    return {"weights": weights, "masks": poisoned_masks(case), **selection("half", weights)}


def digits(case: Drawn, bits: int) -> dict[str, Any]:
    return histogram(topk(case, "groups", "masters"), 31 - bits, bits, [0] * 4)


def layers(case: Drawn) -> dict[str, Any]:
    return {"prune": [int(len(s.shape) > 1 and s.shape[1] % 4 == 0) for s in case.specs], "n": 2, "m": 4}


CALLS: dict[str, Callable[[], tuple[str, dict[str, Any]]]] = {
    "perturb_masked": lambda: ("perturb_masked_", perturb(SHAPES, "amp") | {"masks": mask_bytes(SHAPES, "masks")}),
    "perturb_masked bf16": lambda: ("perturb_masked_", perturb(BF16, "masters") | {"masks": mask_bytes(BF16, "masks")}),
    "restore": lambda: ("restore_", restore(SHAPES, "masters")),
    "restore_combine": lambda: ("restore_combine_", combine(SHAPES, "partial")),
    "restore_sgd": lambda: ("restore_sgd_", sgd(SHAPES, "masters")),
    "restore_sgd bf16": lambda: ("restore_sgd_", sgd(BF16, "amp")),
    "restore_adam": lambda: ("restore_adam_", adam(SHAPES, "masters") | {"decoupled": True}),
    "restore_adam bf16": lambda: ("restore_adam_", adam(BF16, "amp")),
    "restore_sgd of zeros": lambda: ("restore_sgd_", sgd(ZEROS, momentum=[0.9], maximize=[1])),
    "restore_adam of zeros": lambda: ("restore_adam_", adam(ZEROS, maximize=[1])),
    "grad_norm": lambda: ("grad_norm", {"grads": SHAPES.tensors("grads"), "inv_scale": f32(1 / 3)}),
    "perturb_nm": lambda: ("perturb_nm_", perturb(LAYERS, "amp") | layers(LAYERS)),
    "perturb_nm far apart": lambda: ("perturb_nm_", perturb(FAR, "masters") | {"prune": [1] * 4, "n": 2, "m": 4}),
    "perturb_topk": lambda: ("perturb_topk_", topk(SHAPES, "groups", "masters")),
    "perturb_topk with a bracket": lambda: ("perturb_topk_", topk(LARGER, "tenth", "amp")),
    "perturb_topk of ties": lambda: ("perturb_topk_", topk(TIES, "half")),
    "perturb_topk falls back": lambda: ("perturb_topk_", topk(NARROW, "half")),
    "prune_topk": lambda: ("prune_topk_", pruned(BF16)),
    "topk_histogram": lambda: ("topk_histogram", digits(SHAPES, 11)),
    "topk_histogram of many values": lambda: ("topk_histogram", digits(BF16, 16)),
}


@pytest.mark.parametrize("name", CALLS)
def test_compiled(name: str) -> None:
    op, arguments = CALLS[name]()
    check(Compiled(("plain",)), op, arguments)


@pytest.mark.parametrize("way", list(WAYS)[1:])
@pytest.mark.parametrize(
    "name",
    [
        *("perturb_masked", "restore_sgd bf16", "grad_norm", "prune_topk"),
        *("perturb_nm", "perturb_topk with a bracket"),
    ],
)
def test_in_other_ways(name: str, way: str) -> None:
    op, arguments = CALLS[name]()
    check(Compiled((way,)), op, arguments)


def test_statistics() -> None:
    """The bracket holds where it should, and falls back where it must."""
    for name, fallback in (("perturb_topk with a bracket", 0), ("perturb_topk of ties", 0), ("perturb_topk falls back", 1)):
        op, arguments = CALLS[name]()
        _, stats = check(Compiled(("plain",)), op, arguments)
        assert int(stats[0, 2]) == fallback and (fallback or int(stats[0, 1]) < 20_000)


def test_a_case_of_all_dtypes_is_one_call() -> None:
    case = Case("normal", "offsets", "mixed")
    check(Compiled(("plain",)), "perturb_masked_", perturb(case) | {"masks": mask_bytes(case, "masks")})


@pytest.mark.parametrize("what", ["compile", "load"])
@pytest.mark.parametrize("name", ["perturb_topk", "perturb_nm far apart", "restore_adam"])
def test_a_kernel_that_cannot_be_made_changes_nothing(monkeypatch: pytest.MonkeyPatch, name: str, what: str) -> None:
    """Each kernel of the op fails in turn, while it is compiled or brought to the device: every argument is as before."""
    (op, arguments), (_, untouched) = CALLS[name](), CALLS[name]()
    run = Compiled(("plain",))
    run.select("plain")
    place, method = (JITFunction, "warmup") if what == "compile" else (CompiledKernel, "__getitem__")
    original = getattr(place, method)
    made: list[Any] = []
    for left in range(100):

        def failing(*args: Any, left: int = left, **kwargs: Any) -> Any:
            if len(made) == left:
                raise RuntimeError("no kernel")
            made.append(original(*args, **kwargs))
            return made[-1]

        made.clear()
        monkeypatch.setattr(place, method, failing)
        try:
            run(op, arguments)
        except RuntimeError as error:
            assert str(error) == "no kernel"
        else:
            break
        assert same_bits(*([t for _, t in named_tensors(own)] for own in (arguments, untouched)))
    assert 2 < len(made) == left
    monkeypatch.undo()
    getattr(reference, op)(**untouched)
    compare_all(op, arguments, untouched)
