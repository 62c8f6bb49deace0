"""Triton's interpreter, made quick enough for the suite: it looks through all of triton.language at every call of one jitted function by
another, though the launch has patched it already, or another call of a function of the same module."""

from typing import Any

from triton.runtime import interpreter

_seen: set[int] = set()  # modules' dictionaries, since the launch began
_launch = interpreter.GridExecutor.__call__


def _patched_once(self: Any, *args: Any, **kwargs: Any) -> Any:
    _seen.clear()
    return _launch(self, *args, **kwargs)


def _called(self: Any, *args: Any, **kwargs: Any) -> Any:
    if id(self.fn.__globals__) not in _seen:
        interpreter._patch_lang(self.fn)
        _seen.add(id(self.fn.__globals__))
    try:
        return self.rewrite()(*args, **kwargs)
    except interpreter.InterpreterError:
        raise
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


def hurry() -> None:
    object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)  # checks whose results nobody reads
    interpreter.GridExecutor.__call__ = _patched_once
    interpreter.InterpretedFunction.__call__ = _called
