"""The launches of an op: all are compiled and loaded before the first is sent, and Ctrl-C waits until the last is.

What can fail, a compiler that Ctrl-C ends among it, fails before anything is changed. Between two launches of a perturbation the flag is up
while some weights are not saved yet: `restore_` would then write what their `saved` happens to hold.
"""

import signal
import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from triton import knobs

Action = Callable[[], Any]


def launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> Action:
    """A launch of `programs` programs, still to be sent: the kernel is compiled for these arguments, and on the device."""
    if knobs.runtime.interpret:
        return partial(kernel[(programs,)], *args, **constants)
    compiled = kernel.warmup(*args, grid=(programs,), **constants)
    given = dict(zip(kernel.arg_names, args, strict=False)) | constants
    return partial(compiled[(programs, 1, 1)], *(given[name] for name in kernel.arg_names))


def send(actions: Iterable[Action]) -> None:
    """All of them, in order. A SIGINT in the meantime is handled afterwards: handlers run in the main thread, between two of its lines."""
    ready = list(actions)
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        for act in ready:
            act()
        return
    late: list[Any] = []
    try:
        signal.signal(signal.SIGINT, lambda *caught: late.append(caught))
        for act in ready:
            act()
    finally:
        signal.signal(signal.SIGINT, handler)
        if late:
            handler(*late[0])
