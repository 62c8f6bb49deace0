"""Signals wait for the end of what must not be interrupted, and every handler is as it was before."""

import ctypes
import faulthandler
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from optim_cases import random_tensors
from test_optim_every_line import Trace, python_answers_ctrl_c

from cram_kernels import CrAM, TopK, ops, signals
from cram_kernels.signals import uninterrupted

pytestmark = pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="signals reach the main thread only: run without `-n`"
)
CTRL_C = partial(signal.raise_signal, signal.SIGINT)


@pytest.fixture(autouse=True)
def sigint() -> Any:
    with python_answers_ctrl_c():
        yield


@pytest.fixture
def term() -> Any:
    """SIGTERM with a handler that notes it and raises; what it has noted."""
    noted: list[str] = []

    def handler(number: int, frame: Any) -> None:
        noted.append(frame.f_code.co_name)
        raise TimeoutError("term")

    before = signal.signal(signal.SIGTERM, handler)
    yield noted
    assert signal.getsignal(signal.SIGTERM) is handler
    signal.signal(signal.SIGTERM, before)


def test_both_wait(term: list[str]) -> None:
    after = False
    with pytest.raises(KeyboardInterrupt) as error:
        with uninterrupted():
            signal.raise_signal(signal.SIGTERM)
            with uninterrupted():
                CTRL_C()
            after = not term
    assert after and term == ["test_both_wait"] and isinstance(error.value.__context__, TimeoutError)
    with pytest.raises(TimeoutError):
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        CTRL_C()


def test_an_error_of_the_block(term: list[str]) -> None:
    with pytest.raises(ValueError, match="own"):
        with uninterrupted():
            raise ValueError("own")
    with pytest.raises(KeyboardInterrupt) as error:
        with uninterrupted():
            CTRL_C()
            raise ValueError("own")
    assert isinstance(error.value.__context__, ValueError)
    with uninterrupted():
        pass


def test_ctrl_c_at_every_line_gives_the_handlers_back(term: list[str]) -> None:
    def run(done: list[int]) -> None:
        with uninterrupted():
            done.append(1)
            done.append(2)

    handlers = [signal.getsignal(number) for number in signals.NUMBERS]
    with Trace(None, signals.__file__, CTRL_C) as clean:
        run([])
    results = set()
    for n in range(1, len(clean.lines) + 1):
        done: list[int] = []
        with Trace(n, signals.__file__, CTRL_C) as trace:
            run(done)
        assert trace.interrupted and done in ([], [1, 2]), trace.lines[-1]
        assert [signal.getsignal(number) for number in signals.NUMBERS] == handlers, trace.lines[-1]
        results.add(len(done))
        with uninterrupted():
            assert signal.getsignal(signal.SIGINT) is not handlers[0], "the next block holds signals again"
    assert results == {0, 2}


def test_what_is_set_in_c_stays(term: list[str]) -> None:
    def actions() -> list[bytes]:
        found = []
        for number in signals.NUMBERS:
            buffer = ctypes.create_string_buffer(256)
            assert ctypes.CDLL(None).sigaction(number, None, buffer) == 0
            found.append(buffer.raw[:16] + buffer.raw[136:140])  # handler, mask, flags; the rest of the mask is not set
        return found

    plain = actions()
    signal.siginterrupt(signal.SIGTERM, False)
    faulthandler.register(signal.SIGINT, file=sys.__stderr__, chain=True)
    try:
        before = actions()
        assert sum(a != b for a, b in zip(before, plain, strict=True)) == 2
        with uninterrupted():
            assert actions() == before
        assert actions() == before
    finally:
        faulthandler.unregister(signal.SIGINT)
        signal.siginterrupt(signal.SIGTERM, True)


def test_thousands_of_late_signals() -> None:
    count = 0

    def handler(number: int, frame: Any) -> None:
        nonlocal count
        count += 1

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with uninterrupted():
            for _ in range(5000):
                signal.raise_signal(signal.SIGUSR1)
            assert count == 0
        assert count == 5000
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_in_another_thread() -> None:
    handlers = [signal.getsignal(number) for number in signals.NUMBERS]

    def run() -> bool:
        with uninterrupted():
            return [signal.getsignal(number) for number in signals.NUMBERS] == handlers

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run).result()


def test_ctrl_c_in_the_update_is_answered_after_the_step_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [torch.nn.Parameter(t) for t in random_tensors([(4, 8)], 0)]
    optimizer = CrAM(params, compression=[TopK(0.5), TopK(0.8)], lr=0.1, momentum=0.9)
    update = ops.restore_sgd_

    def interrupted(*args: Any, **kwargs: Any) -> None:
        update(*args, **kwargs)
        CTRL_C()

    monkeypatch.setattr(ops, "restore_sgd_", interrupted)
    for step in range(1, 4):
        params[0].grad = torch.ones_like(params[0])
        optimizer.perturb()
        params[0].grad = torch.ones_like(params[0])
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
        assert optimizer.param_groups[0]["cram_step"] == step
        assert "momentum_buffer" in optimizer.state[params[0]]
