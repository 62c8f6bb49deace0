"""What torch has to know of the ops beyond their schemas: result shapes for tracing, and version counters.

Ops of the stable ABI do not bump the version counters of what they mutate by themselves; a backward that saved an old weight would then be
silently wrong instead of raising. The counters are bumped before the op runs: if an exception interrupts the call, such a backward raises
although nothing may have changed, and never the other way round.
"""

import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils import _pytree as pytree

from . import _native

NATIVE = "cram_kernels"
_libraries: list[torch.library.Library] = []  # what they registered ends with them

OPS: tuple[str, ...] = tuple(_native.host.ops()) if _native.host is not None else ()

# What ops return, by its name in their schemas: made empty from the arguments of a call.
RESULTS: dict[str, Callable[[dict[str, Any]], Tensor]] = {
    "thresholds": lambda a: a["k"].new_empty(a["k"].numel(), dtype=torch.int32),
    "stats": lambda a: a["k"].new_empty(a["k"].numel(), 3),
    "bins": lambda a: a["prefix"].new_empty(a["prefix"].numel(), 2 ** a["bits"]),
    "norm": lambda a: a["grads"][0].new_empty((), dtype=torch.float32),
}


def keep(library: torch.library.Library) -> torch.library.Library:
    _libraries.append(library)
    return library


def define(namespace: str) -> None:
    """The native ops' schemas once more, for another backend."""
    library = keep(torch.library.Library(namespace, "DEF"))
    for name in OPS:
        schema = str(getattr(getattr(torch.ops, NATIVE), name).default._schema)
        library.define(schema.removeprefix(f"{NATIVE}::"))


def tensors(args: Any) -> list[Tensor]:
    """The tensors among arguments, lists of them opened."""
    found = []
    for arg in args:
        if isinstance(arg, Tensor):
            found.append(arg)
        elif isinstance(arg, (list, tuple)):
            found.extend(t for t in arg if isinstance(t, Tensor))
    return found


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)  # by their number in a table of InBuffer


class InBuffer(list[Tensor]):
    """Tensors that lie in one buffer, with one of 0 elements where there is none. A native op takes the buffer and a table of what is in it
    (csrc/check.h): to hand a tensor over takes torch longer than the op to check it. The list must not change."""

    __slots__ = ("handed_over",)

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__(tensors)
        storage = next(t for t in tensors if t.numel() > 0).untyped_storage()
        buffer = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        table: list[int] = []
        for t in tensors:
            begin = t.data_ptr() - storage.data_ptr() if t.numel() > 0 else 0
            table += [begin, _DTYPES.index(t.dtype), t.dim(), *t.shape, *t.stride()]
        self.handed_over = [buffer, torch.tensor(table, dtype=torch.int64)]


def _written(op: Any) -> list[tuple[int, str]]:
    """Place and name of each argument that the op writes."""
    return [(i, a.name) for i, a in enumerate(op._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]


def _bump(written: list[tuple[int, str]], args: Any, kwargs: Any) -> None:
    """Count up the versions of all that a call writes."""
    changed: list[Any] = []
    for place, name in written:
        value = args[place] if place < len(args) else kwargs.get(name)
        if type(value) is InBuffer:
            changed.append(value.handed_over[0])
        elif isinstance(value, (list, tuple)):
            changed += value
        elif value is not None:
            changed.append(value)
    try:
        torch._C._increment_version(changed)
    except TypeError:
        return  # of what is no tensor; the op says so in its own words


def _bump_versions(library: torch.library.Library, name: str) -> None:
    op = getattr(getattr(torch.ops, library.ns), name).default
    if not op._schema.is_mutable:
        return
    below, written = torch._C._after_ADInplaceOrView_keyset, _written(op)

    def kernel(keyset: torch.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        _bump(written, args, kwargs)
        return op.redispatch(keyset & below, *args, **kwargs)

    library.impl(name, kernel, "ADInplaceOrView", with_keyset=True)


def direct(namespace: str) -> SimpleNamespace:
    """The ops for calls from Python. Version counters are counted up here, without the detour through `kernel` above, for which torch
    translates every list to Python and back once more."""

    def make(name: str) -> Callable[..., Any]:
        op = getattr(getattr(torch.ops, namespace), name).default
        written, run = _written(op), op._op  # what the overload calls, with a dict more

        def call(*args: Any, **kwargs: Any) -> Any:
            if is_compiling():
                with torch.no_grad():
                    return op(*args, **kwargs)
            _bump(written, args, kwargs)
            if namespace == NATIVE:
                args = tuple([arg.handed_over if type(arg) is InBuffer else arg for arg in args])
            with torch._C._AutoDispatchBelowADInplaceOrView():
                return run(*args, **kwargs)

        return call

    return SimpleNamespace(**{name: make(name) for name in OPS})


def _named(op: Any, args: Any, kwargs: Any) -> Iterator[tuple[Any, str, Tensor]]:
    """Every tensor of a call, with its argument in the schema and its name: `params[3]`."""
    schema = op._schema.arguments
    for argument, value in [*zip(schema, args, strict=False), *((a, kwargs.get(a.name)) for a in schema[len(args) :])]:
        for i, t in enumerate(tensors([value])):
            yield argument, f"{argument.name}[{i}]" if isinstance(value, (list, tuple)) else argument.name, t


def _same_device(name: str, args: Any, kwargs: Any) -> None:
    """A tensor on "meta" among others would bring a call here that then did nothing at all."""
    device = None
    for _, where, t in _named(getattr(torch.ops.cram_kernels, name).default, args, kwargs):
        device = device or t.device
        if t.device != device and t.numel() > 0:
            raise RuntimeError(f"{name}: {where} must be on {device} like the tensors before it, got {t.device}")


def materialized(arguments: Any) -> Any:
    """With plain tensors for negative and conjugate views, whose memory is not yet their values."""
    return pytree.tree_map_only(Tensor, lambda t: t.resolve_conj().resolve_neg(), arguments)


def _refuse_lazy(library: torch.library.Library, name: str) -> None:
    """Negative and conjugate views bring a call here: those that are read only are materialized, as torch does it."""
    op = getattr(getattr(torch.ops, library.ns), name).default

    def kernel(*args: Any, **kwargs: Any) -> Any:
        for argument, where, t in _named(op, args, kwargs):
            if argument.alias_info is not None and argument.alias_info.is_write and (t.is_neg() or t.is_conj()):
                bit, cure = ("conjugate", "resolve_conj") if t.is_conj() else ("negative", "resolve_neg")
                raise RuntimeError(
                    f"{name.removeprefix('check_')}: {where} must hold its own values ({cure}()), got a view with the {bit} bit"
                )
        args, kwargs = materialized((args, kwargs))
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return op(*args, **kwargs)

    for key in ("Negative", "Conjugate"):
        library.impl(name, kernel, key)


def _refuse_sparse(library: torch.library.Library, name: str) -> None:
    """A sparse tensor among the arguments brings the call to kernels of its own: they name it."""
    check = getattr(torch.ops.cram_kernels, f"check_{name}")

    def kernel(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        raise RuntimeError(f"{name}: every tensor must be dense (strided), got a sparse one")

    for key in ("SparseCPU", "SparseCUDA", "SparseCsrCPU", "SparseCsrCUDA"):
        library.impl(name, kernel, key)


def _fake(name: str) -> Any:
    schema = getattr(torch.ops.cram_kernels, name).default._schema

    def fake(*args: Any, **kwargs: Any) -> Any:
        _same_device(name, args, kwargs)
        arguments = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
        results = tuple(RESULTS[result.name](arguments) for result in schema.returns)
        return results if len(results) > 1 else next(iter(results), None)

    return fake


def register(namespace: str = NATIVE) -> None:
    library = keep(torch.library.Library(namespace, "IMPL"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators", category=UserWarning)
        for name in OPS:
            _bump_versions(library, name)
    for name in OPS:
        torch.library.register_fake(f"{namespace}::{name}", _fake(name))
        _refuse_sparse(library, name)
        _refuse_lazy(library, name)
        if namespace == NATIVE:
            _refuse_lazy(library, f"check_{name}")
