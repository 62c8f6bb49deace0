"""The same bits for every number of threads, from several Python threads at once, and in any denormal mode."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from calls import adam, combine, f32, mask_bytes, perturb, restore, selection, sgd
from cases import Case, Drawn, Spec, mixed
from compare import check, clone, compare_all, contract_part

from cram_kernels import reference

BIG = Case("normal", "uneven", "mixed")
LAYERS = Drawn("rows", mixed([Spec((200, 64, 3, 3)), Spec((1000, 128)), Spec((64, 64, 3, 3), order=(0, 2, 3, 1))]))


def perturb_topk(case: Case, name: str) -> dict[str, Any]:
    arguments = perturb(case, "amp")
    return arguments | selection(name, arguments["params"])


CALLS: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {  # name -> op, arguments
    "topk": ("perturb_topk_", lambda: perturb_topk(BIG, "tenth")),
    "topk of many sets": ("perturb_topk_", lambda: perturb_topk(Case("nonfinite", "pieces", "mixed"), "per_tensor")),
    "topk, fallback": ("perturb_topk_", lambda: perturb_topk(Case("narrow", "pieces", "fp32"), "half")),
    "nm": ("perturb_nm_", lambda: perturb(LAYERS) | {"prune": [1, 1, 1], "n": 2, "m": 4}),
    "masked": ("perturb_masked_", lambda: perturb(BIG, "amp") | {"masks": mask_bytes(BIG, "masks")}),
    "restore": ("restore_", lambda: restore(BIG, "masters")),
    "combine": ("restore_combine_", lambda: combine(BIG, "partial")),
    "sgd": ("restore_sgd_", lambda: sgd(BIG, "masters")),
    "adam": ("restore_adam_", lambda: adam(BIG, "masters")),
    "norm": ("grad_norm", lambda: {"grads": BIG.tensors("grads"), "inv_scale": f32(0.3)}),
}
CALL = pytest.mark.parametrize("call", CALLS)


@CALL
def test_any_number_of_threads(backend, set_threads, call: str) -> None:
    op, arguments = CALLS[call]
    for threads in (1, 2, 3):
        set_threads(threads)
        check(backend, op, arguments())


def check_flushing(backend, op: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """torch.set_flush_denormal changes the arithmetic of the calling thread; not that of the ops, which leave the mode as it is. Returns
    the arguments after the reference's call."""
    if not torch.set_flush_denormal(False):
        pytest.skip("this CPU cannot flush denormals: run on x86-64 or AArch64")
    expected_arguments, actual_arguments = clone(arguments), clone(arguments)
    expected = getattr(reference, op)(**expected_arguments)
    torch.set_flush_denormal(True)
    try:
        actual = backend(op, actual_arguments)
        assert float(torch.tensor(1e-40) * 1) == 0, f"{op} changed the mode of the calling thread"
    finally:
        torch.set_flush_denormal(False)
    compare_all(op, actual_arguments, expected_arguments)
    compare_all(op, contract_part(actual), contract_part(expected))
    return expected_arguments


@CALL
def test_denormals_count_in_any_mode(backend, call: str) -> None:
    op, arguments = CALLS[call][0], CALLS[call][1]()
    for name in ("params", "grads", "first_grads", "saved", "masters", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"):
        for t in arguments.get(name, []):
            t.mul_(torch.finfo(t.dtype).smallest_normal)
    check_flushing(backend, op, arguments)


def vanishing_squares(arguments: dict[str, Any]) -> dict[str, Any]:
    """Of half of the tensors: eps is all that is left in a denominator."""
    for t in arguments["exp_avg_sqs"][::2]:
        t.zero_()
    return arguments


WIDE = Case("range", "shapes", "fp32")  # some values are so large that a denormal option counts
DENORMAL = 1e-40
OPTIONS = {  # op -> its arguments, and the options that are narrowed or read on the calling thread
    "perturb_topk_": (lambda: perturb_topk(WIDE, "half"), ("rho", "inv_scale")),
    "restore_sgd_": (lambda: sgd(WIDE, momentum=[0.9]), ("momentum", "weight_decay", "lr", "inv_scale", "first_inv_scale", "found_inf")),
    "restore_adam_": (
        lambda: vanishing_squares(adam(WIDE, lr=f32(0.1), beta2=[0.5])),
        ("beta1", "beta2", "eps", "weight_decay", "lr", "inv_scale", "first_inv_scale", "found_inf"),
    ),
}


@pytest.mark.parametrize("op, option", [(op, option) for op, (_, options) in OPTIONS.items() for option in options])
def test_denormal_options_count_in_any_mode(backend, op: str, option: str) -> None:
    scalar = option in ("rho", "lr", "inv_scale", "first_inv_scale", "found_inf")

    def arguments(value: float) -> dict[str, Any]:
        return OPTIONS[op][0]() | {option: f32(value) if scalar else [value]}

    flushed = arguments(0)
    getattr(reference, op)(**flushed)
    counted = check_flushing(backend, op, arguments(DENORMAL))
    with pytest.raises(AssertionError, match="differ"):
        compare_all(op, counted, flushed)


def test_two_python_threads_at_once(backend) -> None:
    """Ops release the interpreter lock: two models trained side by side share no scratch memory."""
    calls = [CALLS[name] for name in ("topk of many sets", "nm", "topk, fallback", "adam")]
    prepared = []
    for op, make in calls:
        arguments = make()
        expected_arguments = clone(arguments)
        prepared.append((op, arguments, expected_arguments, getattr(reference, op)(**expected_arguments)))
    failures: list[BaseException] = []

    def work(own: list) -> None:
        try:
            for op, arguments, expected_arguments, expected in own * 3:
                actual_arguments = clone(arguments)
                actual = backend(op, actual_arguments)
                compare_all(op, actual_arguments, expected_arguments)
                compare_all(op, contract_part(actual), contract_part(expected))
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(own,)) for own in (prepared, prepared[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
