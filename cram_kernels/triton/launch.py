"""The launches of an op: compiled and loaded before the first is sent, and sent without an interruption: it happens whole or not at all.

What can fail, a compiler that Ctrl-C ends among it, fails before anything is changed. A signal that arrives while launches are sent is
answered after the last one.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from triton import knobs

Action = Callable[[], Any]
SIGNALS = tuple(signal.valid_signals())


def launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> Action:
    """A launch of `programs` programs, still to be sent: the kernel is compiled for these arguments, and on the device."""
    if knobs.runtime.interpret:
        return partial(kernel[(programs,)], *args, **constants)
    compiled = kernel.warmup(*args, grid=(programs,), **constants)
    given = dict(zip(kernel.arg_names, args, strict=False)) | constants
    return partial(compiled[(programs, 1, 1)], *(given[name] for name in kernel.arg_names))


def send(actions: Iterable[Action]) -> None:
    """All of them, in order."""
    ready = list(actions)
    with uninterrupted():
        for act in ready:
            act()


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """A block in which no Python handler of a signal runs, and so none raises, as SIGINT's does (KeyboardInterrupt): they run after it.

    Handlers run in the main thread only: in other threads there is nothing to put off.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers: dict[int, Any] = {number: handler for number in SIGNALS if callable(handler := signal.getsignal(number))}
    late: list[Action] = []

    def note(number: int, frame: Any) -> None:
        late.append(partial(handlers[number], number, frame))

    try:
        for number in handlers:
            signal.signal(number, note)
        yield
    finally:
        try:
            _each([partial(signal.signal, number, handler) for number, handler in handlers.items()])
        finally:
            _each(late)


def _each(actions: list[Action]) -> None:
    """All of them, whatever one raises."""
    if actions:
        try:
            actions[0]()
        finally:
            _each(actions[1:])
