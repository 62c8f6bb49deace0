"""The dense weight of a sparse layer, for reading: what is written to it would be lost."""

from typing import Any

import torch
from torch import Tensor

# Methods that write, besides those whose names end with "_". __set__ assigns to an attribute, such as data.
WRITING = {"__setitem__", "__set__", *(f"__i{name}__" for name in "add sub mul truediv floordiv mod pow and or xor lshift rshift".split())}


class ReadOnly(Tensor):
    """A tensor that refuses to be written to. So do its views; what is computed from it is an ordinary tensor."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.__name__
        written = [kwargs.get("out")]
        if args and (name in WRITING or (name.endswith("_") and not name.endswith("__"))):
            written += args[0] if isinstance(args[0], (tuple, list)) else args[:1]
        if any(isinstance(t, cls) for t in written):
            raise RuntimeError(
                f"SparseLayer.weight: what is written to must be a copy, got the weight itself for {name}: it is unpacked anew at each "
                "access, so the layer would not change. Change layer.weight.clone() and load it as a state dict, or "
                "inference.to_dense(model)"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            memory = {t.untyped_storage().data_ptr() for t in (*args, *kwargs.values()) if isinstance(t, cls)}
            return _read_only(result, memory)


def _read_only(result: Any, memory: set[int]) -> Any:
    """Whatever in a result is a view of this memory refuses, too."""
    if type(result) in (tuple, list):
        return type(result)(_read_only(part, memory) for part in result)
    if isinstance(result, Tensor) and result.layout == torch.strided and result.untyped_storage().data_ptr() in memory:
        return result.as_subclass(ReadOnly)
    if hasattr(result, "setflags"):  # a NumPy array
        result.setflags(write=False)
    return result
