"""KeyboardInterrupt at every line of the package that a step runs: the weights are clean, or `restore()` makes them clean; they and the
state are those of a step that was done as a whole or not at all, and training goes on from there."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from optim_cases import assert_same_bits, clones, random_tensors, same_bits, set_gradients
from torch import Tensor, nn

import cram_kernels
from cram_kernels import CrAM, TopK

SOURCE = str(Path(cram_kernels.__file__).parent)
SHAPES = [(4, 8), (8,)]
FIRST, SECOND = random_tensors(SHAPES, 1), random_tensors(SHAPES, 2)


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    """The tensors are small: a second thread would only wait."""
    set_threads(1)


@contextlib.contextmanager
def python_answers_ctrl_c() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt: a shell starts what runs in its background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def keyboard_interrupt() -> None:
    raise KeyboardInterrupt


class Trace:
    """Within the block, notes the lines that are run in cram_kernels, and interrupts before the n-th, if n is given.

    A kernel that Triton's interpreter runs is not traced, as none that a GPU runs is. `interrupt` raises, or sends a real signal.
    """

    def __init__(self, n: int | None = None, source: str = SOURCE, interrupt: Callable[[], None] = keyboard_interrupt) -> None:
        self.n, self.source, self.interrupt, self.lines, self.before = n, source, interrupt, [], None

    def __enter__(self) -> "Trace":
        self.before = sys.gettrace()  # coverage may be tracing
        sys.settrace(self.call)
        return self

    def __exit__(self, kind, *_) -> bool:
        sys.settrace(self.before)
        self.interrupted = kind is KeyboardInterrupt
        return self.interrupted

    def call(self, frame, event, _):
        kernel = frame.f_back is not None and frame.f_back.f_code.co_filename.endswith("triton/runtime/interpreter.py")
        return self.line if frame.f_code.co_filename.startswith(self.source) and not kernel else None

    def line(self, frame, event, _):
        if event == "line" and len(self.lines) != self.n:
            self.lines.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
            if len(self.lines) == self.n:
                self.interrupt()
        return self.line

    def last_times(self) -> list[int]:
        """Each line, where it is run for the last time: in a loop over the parameters, when some are done."""
        return list({line: n for n, line in enumerate(self.lines, 1)}.values())


def closure_step(optimizer: CrAM, params: list[Tensor], halves: list[str]) -> None:
    passes = iter((FIRST, SECOND))
    optimizer.step(lambda: set_gradients(params, next(passes)))


def context_step(optimizer: CrAM, params: list[Tensor], halves: list[str]) -> None:
    set_gradients(params, FIRST)
    with optimizer.perturbed():
        halves.append("perturbed")
        set_gradients(params, SECOND)
    optimizer.step()


def calls_step(optimizer: CrAM, params: list[Tensor], halves: list[str]) -> None:
    set_gradients(params, FIRST)
    optimizer.perturb()
    halves.append("perturbed")
    set_gradients(params, SECOND)
    optimizer.step()


class Model(nn.Module):
    """The parameters, and batch norms that attach() freezes in the second pass."""

    def __init__(self) -> None:
        super().__init__()
        self.params = nn.ParameterList(nn.Parameter(t) for t in random_tensors(SHAPES, 0))
        self.norms = nn.ModuleList(nn.BatchNorm1d(4, affine=False) for _ in range(2))


def after_steps(base: type, count: int) -> tuple[list[nn.Parameter], CrAM, Model]:
    model = Model()
    params = list(model.params)
    optimizer = CrAM(params, base, compression=[TopK(0.5)], lr=0.1, **({} if base is torch.optim.Adam else {"momentum": 0.9}))
    for _ in range(count):
        calls_step(optimizer, params, [])
    return params, optimizer.attach(model), model


@pytest.mark.parametrize(
    "form, base, start",  # start 0: the first step of all, which makes the state
    [
        (closure_step, torch.optim.SGD, 0),
        (closure_step, torch.optim.Adam, 0),
        (closure_step, torch.optim.RMSprop, 1),
        (context_step, torch.optim.SGD, 1),
        (calls_step, torch.optim.Adam, 1),
    ],
)
def test_interrupted_at_every_line(form, base, start):
    """Each line that a step runs."""
    begun = after_steps(base, start)
    results = [clones(after_steps(base, start + i)[0]) for i in range(3)]  # not done, done, and one more
    with Trace() as clean:
        form(optimizer=begun[1], params=begun[0], halves=[])
    found = set()
    for n in clean.last_times():
        params, optimizer, model = after_steps(base, start)
        halves: list[str] = []
        with Trace(n) as trace:
            form(optimizer, params, halves)
        where = f"interrupted at {trace.lines[-1]}"
        assert trace.lines == clean.lines[:n], where
        if form is closure_step or (form is calls_step and not halves):  # step(closure) and perturb() bring the weights back themselves
            assert any(same_bits(params, r) for r in results[:2]), where
        optimizer.restore()  # else, or where the restoring was interrupted: the next call
        assert all(norm.track_running_stats for norm in model.norms), where
        done = next((i for i in (0, 1) if same_bits(params, results[i])), None)
        assert done is not None, where
        found.add(done)
        optimizer.zero_grad()
        calls_step(optimizer, params, [])
        assert_same_bits(params, results[done + 1], f"{where}: the state is that of the weights; weights")
    assert found == {0, 1}
