"""Run by test_triton.py with TRITON_INTERPRET=1: the Triton ops as torch sees them."""

import signal
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import perturb, selection
from cases import Drawn, Spec
from compare import compare_all, contract_part, named_tensors
from test_optim_every_line import Trace, python_answers_ctrl_c
from test_schema import SAMPLES, positional
from triton.runtime.interpreter import InterpretedFunction

from cram_kernels import _triton, ops, reference
from cram_kernels import triton as kernels
from cram_kernels.backend import available, use_backend
from cram_kernels.triton import launch, nm, table, topk, tuning

OP = pytest.mark.parametrize("op", SAMPLES)


@pytest.fixture(autouse=True)
def triton_chosen() -> Any:
    assert available()["triton"] is None
    with use_backend("triton"):
        yield


@OP
def test_op(op: str) -> None:
    """Equal to the reference, under torch.compile without a graph break; what is mutated has its version counter bumped."""
    torch._dynamo.reset()
    eager, compiled, expected_arguments = (SAMPLES[op]() for _ in range(3))
    versions = [t._version for _, t in named_tensors(eager)]
    expected = getattr(reference, op)(**expected_arguments)
    for arguments, call in ((eager, getattr(ops, op)), (compiled, torch.compile(getattr(ops, op), fullgraph=True, backend="aot_eager"))):
        actual = call(**arguments)
        compare_all(op, arguments, expected_arguments)
        compare_all(op, contract_part(actual), contract_part(expected))
    schema = getattr(getattr(torch.ops, _triton.NAMESPACE), op).default._schema
    written = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    for (name, t), version in zip(named_tensors(eager), versions, strict=True):
        if t.numel() > 0 and name.split("[")[0] in written:
            assert t._version > version, f"{op}: {name}"


@OP
def test_opcheck(op: str) -> None:
    args, kwargs = positional(op, SAMPLES[op]())
    overload = getattr(getattr(torch.ops, _triton.NAMESPACE), op).default
    torch.library.opcheck(overload, args, kwargs, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("shape, form", [((1032, 8), "columns"), ((1001, 8), "single"), ((6, 8, 9), "windows"), ((40, 8), "rows")])
@pytest.mark.parametrize("n, m", [(2, 4), (3, 8)], ids=str)
def test_every_form_of_groups(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], form: str, n: int, m: int) -> None:
    """With the small programs of a GPU, which the interpreter's large ones would take for windows."""
    monkeypatch.setattr(tuning, "TABLE", {"interpreter": tuning.TABLE["cuda"]})
    order = tuple(reversed(range(len(shape)))) if form in ("columns", "single") else ()
    case = Drawn("ties", [Spec(shape, dtype, order) for dtype in (torch.float32, torch.float16)])
    assert set(nm.Layout(case.tensors("params"), [1, 1], m).forms) == {form}
    arguments, expected = (perturb(case, "amp") | {"prune": [1, 1], "n": n, "m": m} for _ in range(2))
    ops.perturb_nm_(**arguments)
    reference.perturb_nm_(**expected)
    compare_all("perturb_nm_", arguments, expected)


@pytest.mark.parametrize("m", [2, 4, 8, 64, 256, 1024])
def test_groups_side_by_side_are_aligned(monkeypatch: pytest.MonkeyPatch, m: int) -> None:
    """All chunks, also where one holds fewer than 8 groups; where the weights end within 8, the last is not."""
    monkeypatch.setattr(tuning, "TABLE", {"interpreter": tuning.TABLE["cuda"]})
    for rows, expected in ((8, {True}), (1, {True, False} if m < 8 else {True})):
        w = torch.zeros(rows, 5 * 1024 + (m if rows == 1 else 0))
        layout = nm.Layout([w], [1], m)
        launches = layout.passes(table.Table([w], {table.PARAM.value: [w]}))
        assert {options["ALIGNED"] for _, options in launches} == expected


@pytest.mark.parametrize("op", [op for op in SAMPLES if op != "grad_norm"])
def test_no_tensors(op: str) -> None:
    """Empty lists, with selection sets that nothing is in."""
    calls = []
    for _ in range(2):
        arguments = {name: [] if isinstance(value, list) else value for name, value in SAMPLES[op]().items()}
        arguments |= {name: arguments[name][:0] for name in ("lr", "rho") if name in arguments and arguments[name].dim()}
        calls.append(arguments | ({"k": torch.zeros_like(arguments["k"])} if "k" in arguments else {}))
    arguments, expected = calls
    results = getattr(ops, op)(**arguments), getattr(reference, op)(**expected)
    compare_all(op, arguments, expected)
    compare_all(op, *map(contract_part, results))


def test_the_same_words_for_wrong_input() -> None:
    arguments = SAMPLES["restore_"]()
    arguments["saved"] = arguments["saved"][:-1]
    with pytest.raises(RuntimeError, match=r"restore_: saved must be empty or have one tensor a parameter \(4\), got 3"):
        ops.restore_(**arguments)


def test_a_second_perturbation_is_refused_where_the_flag_can_be_read() -> None:
    arguments = SAMPLES["perturb_masked_"]()
    ops.perturb_masked_(**arguments)
    with pytest.raises(RuntimeError, match="perturb_masked_: perturbed must be 0, got 1"):
        ops.perturb_masked_(**arguments)


@pytest.mark.parametrize("op, allocations", [("perturb_topk_", 5), ("perturb_nm_", 1), ("restore_adam_", 1)])
def test_out_of_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch, op: str, allocations: int) -> None:
    """Each of the op's own allocations fails in turn: the flag and the weights are as before."""
    arguments, expected = SAMPLES[op](), SAMPLES[op]()
    empty, zeros = torch.empty, torch.zeros
    for left in range(allocations):
        made = 0

        def allocate(make: Any, *args: Any, left: int = left, **kwargs: Any) -> Any:
            nonlocal made
            made += 1
            if made > left:
                raise torch.OutOfMemoryError("no memory is left")
            return make(*args, **kwargs)

        monkeypatch.setattr(torch, "empty", partial(allocate, empty))
        monkeypatch.setattr(torch, "zeros", partial(allocate, zeros))
        with pytest.raises(torch.OutOfMemoryError):
            ops.__dict__[op](**arguments)
        monkeypatch.undo()
        compare_all(op, arguments, expected)


SENDING = pytest.mark.parametrize("op", ["perturb_topk_", "perturb_nm_", "perturb_masked_", "restore_sgd_", "restore_adam_"])


@SENDING
def test_interrupted_at_every_line(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    """Ctrl-C at each line of this backend's function: all that it sends is sent, or nothing; and the interrupt is not lost.

    A launch only notes that it was sent, so that a line takes no run of interpreted kernels; the flag is what it is.
    """
    call, source = getattr(kernels, op), str(Path(launch.__file__).parent)
    sent: list[str] = []
    monkeypatch.setattr(InterpretedFunction, "run", lambda kernel, *args, grid, **_: sent.append(f"{kernel.__name__} {grid}"))

    def run(trace: Trace) -> tuple[list[str], int]:
        arguments = SAMPLES[op]()
        sent.clear()
        with python_answers_ctrl_c(), trace:
            call(**arguments)
        return list(sent), int(arguments["perturbed"])

    run(Trace())  # what is remembered of a call is there from now on
    clean = Trace(source=source)
    whole = run(clean)
    nothing = [], int(SAMPLES[op]()["perturbed"])
    assert len(whole[0]) > 1 and whole[1] != nothing[1] and not clean.interrupted
    results = []
    for n in sorted(clean.last_times()):
        trace = Trace(n, source, partial(signal.raise_signal, signal.SIGINT))
        results.append(run(trace))
        where = f"interrupted at {trace.lines[-1]}"
        assert trace.lines == clean.lines[:n] and trace.interrupted and results[-1] in (nothing, whole), where
    done = [result == whole for result in results]
    assert done == sorted(done) and set(done) == {False, True}


@SENDING
def test_interrupted_by_each_launch(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    """Ctrl-C while the kernels run, before each: the weights and the state are those of the whole op."""
    run, ctrl_c = InterpretedFunction.run, partial(signal.raise_signal, signal.SIGINT)
    monkeypatch.setattr(InterpretedFunction, "run", lambda *args, **kwargs: (ctrl_c(), run(*args, **kwargs)))
    arguments, expected = SAMPLES[op](), SAMPLES[op]()
    with python_answers_ctrl_c(), pytest.raises(KeyboardInterrupt):
        getattr(kernels, op)(**arguments)
    getattr(reference, op)(**expected)
    compare_all(op, arguments, expected)


def test_launches_of_top_k(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of tensors, of one kind; the flag is an eighth."""
    arguments = perturb(Drawn("normal", [Spec((100,))] * 450))
    arguments |= selection("half", arguments["params"])
    sent: list[str] = []
    monkeypatch.setattr(InterpretedFunction, "run", lambda kernel, *_, **__: sent.append(kernel.__name__))
    kernels.perturb_topk_(**arguments)
    passes = ["sample", "bracket", "stream", "count", "count", "count", "finish"]
    assert sent == [f"{name}_kernel" for name in passes]


def test_many_tensors_in_small_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks as small as on a GPU, of which a program of the later passes has those of several sets, and a set is in several programs."""
    monkeypatch.setattr(tuning, "TABLE", {"interpreter": tuning.TABLE["cuda"]})
    monkeypatch.setattr(topk, "group", lambda: {"GROUP": 32, "RECORDS": 4})
    sizes = [1000 if i % 10 == 0 else 1 + 37 * i % 100 for i in range(200)]  # of set 0, which is sampled, and of the others
    sets = [0 if i % 10 == 0 else -1 if i % 7 == 0 else 1 + i % 14 for i in range(200)]
    numels = [sum(size for size, s in zip(sizes, sets, strict=True) if s == own) for own in range(15)]
    more = {"sets": sets, "k": torch.tensor([numel // (2 + own % 3) for own, numel in enumerate(numels)])}
    arguments, expected = (perturb(Drawn("normal", [Spec((size,)) for size in sizes])) | more for _ in range(2))
    results = ops.perturb_topk_(**arguments), reference.perturb_topk_(**expected)
    compare_all("perturb_topk_", arguments, expected)
    compare_all("perturb_topk_", *map(contract_part, results))


def test_launches_of_another_thread() -> None:
    """Where no handler runs, and none may be set."""
    with ThreadPoolExecutor(1) as pool:
        arguments, expected = SAMPLES["restore_sgd_"](), SAMPLES["restore_sgd_"]()
        pool.submit(ops.restore_sgd_, **arguments).result()
    reference.restore_sgd_(**expected)
    compare_all("restore_sgd_", arguments, expected)
