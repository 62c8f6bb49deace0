"""The launches of an op: compiled and loaded before the first is sent, and sent without an interruption: it happens whole or not at all.

What can fail, a compiler that Ctrl-C ends among it, fails before anything is changed. A signal that arrives while launches are sent is
answered after the last one.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from triton import knobs

from ..signals import uninterrupted

Action = Callable[[], Any]


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
