"""Blocks that no signal interrupts: what is in one happens as a whole or not at all, Ctrl-C or not."""

import contextlib
import ctypes
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

# Those that programs give handlers; SIGINT, whose handler raises, first and so given back last.
NUMBERS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGALRM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGVTALRM", "SIGPROF", "SIGCHLD")
    if hasattr(signal, name)
]
_libc = ctypes.CDLL(None) if hasattr(signal, "SIGUSR1") else None
_inside = False


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Put off the Python handlers of signals, which may raise as SIGINT's does (KeyboardInterrupt), to the end of the block.

    Handlers run in the main thread only: in other threads there is nothing to put off. A handler in C, of faulthandler for one, stays.
    """
    global _inside
    if _inside or threading.current_thread() is not threading.main_thread():
        yield
        return
    late: list[Callable[[], Any]] = []
    swapped: list[tuple[int, Any]] = []
    error: BaseException | None = None
    try:
        for number in NUMBERS:
            if callable(handler := signal.getsignal(number)):
                swapped.append((number, handler))
                _set(number, lambda number, frame, handler=handler: late.append(lambda: handler(number, frame)))
        _inside = True
        yield
    finally:
        _inside = False
        while swapped:
            try:
                _set(*swapped[-1])
                del swapped[-1]
            except BaseException as raised:  # of a handler that is back already
                error = raised
        while late:
            try:
                late.pop(0)()
            except BaseException as raised:
                raised.__context__ = error
                error = raised
        if error is not None:
            raise error


def _set(number: int, handler: Any) -> None:
    """As signal.signal, which also resets what is set in C: the flags (SA_RESTART of siginterrupt), and a handler that calls Python's."""
    if _libc is None:
        signal.signal(number, handler)
        return
    action = ctypes.create_string_buffer(256)  # a struct sigaction and more
    _libc.sigaction(number, None, action)
    signal.signal(number, handler)
    _libc.sigaction(number, action, None)
