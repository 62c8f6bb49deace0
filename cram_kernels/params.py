"""What a parameter must be for the ops to work on it."""

from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

OPEN_STEPS: WeakSet[Any] = WeakSet()  # of the optimizers whose weights are perturbed now; each answers holds(param)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_unfit(param: Tensor) -> str | None:
    """None where the ops can work on the parameter, else what is wrong, as "must ..., got ..."."""
    if is_lazy(param):
        return "must have its shape: run the model once before making the optimizer, got an uninitialized one of a lazy module"
    if not is_plain(param):
        return f"must be a plain tensor, got {'a nested tensor' if param.is_nested else f'type {type(param).__name__}'}"
    if param.layout is not torch.strided:
        return f"must be dense (no holes, no overlap), got layout {param.layout}"
    if param.is_meta:
        return "must have data, got a meta tensor"
    if param.dtype not in DTYPES:
        return f"must have dtype float32, bfloat16 or float16, got {param.dtype}"
    if param.is_neg():
        return "must hold its own values, got a view with the negative bit; call resolve_neg()"
    if torch.empty_like(param, device="meta").stride() != param.stride():  # empty_like keeps the strides of a dense tensor, and of no other
        return f"must be dense (no holes, no overlap), got strides {param.stride()} for shape {tuple(param.shape)}; make it contiguous"
    return None


def perturbed(param: Tensor) -> bool:
    """Whether an open step holds the parameter: its weights are not the clean ones."""
    return any(step.holds(param) for step in OPEN_STEPS)


def check_unperturbed(op: str, named: Iterable[tuple[str, Tensor]]) -> None:
    """Raise RuntimeError where an open step of an optimizer holds one of these parameters."""
    for name, param in named:
        if perturbed(param):
            raise RuntimeError(f"{op}: parameter {name!r} must not be perturbed, got one within a step: step() or restore() first")


def check_module(op: str, model: Any, name: str = "model") -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"{op}: {name} must be a torch.nn.Module, got {type(model).__name__}")


def is_plain(t: Tensor) -> bool:
    """Whether its memory holds its elements, which subclasses with operations of their own (DTensor, FakeTensor) do not promise."""
    return type(t).__torch_dispatch__ is Tensor.__torch_dispatch__ and not t.is_nested


def overlapping(named: Iterable[tuple[str, Tensor]], among: Collection[str] | None = None) -> tuple[str, str] | None:
    """The names of two tensors that share memory, of which one at least is in `among`, or None. The one that begins later is first."""
    extents = sorted(
        (
            str(t.device),
            t.data_ptr(),
            t.data_ptr() + t.itemsize * (1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))),
            name,
        )
        for name, t in named
        if t.numel() > 0 and t.data_ptr() != 0  # 0: freed for a while, or not torch's
    )
    furthest: dict[
        tuple[str, bool], tuple[int, str]
    ] = {}  # device, whether in `among` -> the end that reaches furthest so far, whose it is
    for device, begin, end, name in extents:
        chosen = among is None or name in among
        for others in (True, False) if chosen else (True,):
            reached, other = furthest.get((device, others), (0, ""))
            if begin < reached:
                return name, other
        furthest[device, chosen] = max(furthest.get((device, chosen), (0, "")), (end, name))
    return None


def embedding_tables(model: nn.Module) -> dict[int, str]:
    """The parameters that are embedding tables: id -> why they stay dense. A table that is tied to another layer (a language model's head)
    is a table there, too. Under a global threshold such tables, drawn with a standard deviation of 1, empty all other layers."""
    reason = "embedding table (prune_embeddings=True prunes it)"
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    own = [p for m in tables for p in m.parameters(recurse=False)]  # m.weight of a parametrized table is a temporary tensor, no parameter
    return {id(p): reason for p in own} | {id(p): reason for m in tables for p in _parametrizations(m).parameters()}


def outputs_on_axis_1(model: nn.Module) -> dict[int, str]:
    """The weights that N:M leaves dense, because their axis 1 is not the input channels: id -> the reason."""
    found = {}
    for m in model.modules():
        if isinstance(m, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            found[id(m._parameters.get("weight"))] = "axis 1 of a transposed convolution is the outputs"
        elif type(m).__name__ == "Conv1D" and hasattr(m, "nf"):  # [inputs, outputs], in GPT-2
            found[id(m._parameters.get("weight"))] = "axis 1 of transformers' Conv1D is the outputs"
    return found


def reparametrized(model: nn.Module) -> dict[int, str]:
    """The parameters from which a weight is computed at each forward pass: id -> of what they are part, and what makes one weight of them.

    Zeros in such a part are not zeros of the weight: weight norm divides by the norm of a row, spectral norm by a singular value, an
    orthogonal matrix has no free zeros, and the masks of torch.nn.utils.prune hide part of `weight_orig`.
    """
    found: dict[int, str] = {}
    for prefix, m in model.named_modules():
        for name, parts in _parametrizations(m).named_children():
            kinds = " and ".join(type(part).__name__.lstrip("_") for part in parts.children())
            told = _part_of(prefix, name, kinds, "torch.nn.utils.parametrize.remove_parametrizations")
            found |= {id(p): told for p in parts.parameters()}
        for hook in m._forward_pre_hooks.values():  # torch.nn.utils.prune, and the older norms
            weight, kind = getattr(hook, "_tensor_name", None) or getattr(hook, "name", None), type(hook).__name__
            stored = [p for suffix in ("_orig", "_g", "_v") if (p := m._parameters.get(f"{weight}{suffix}")) is not None]
            remove = {"WeightNorm": "remove_weight_norm", "SpectralNorm": "remove_spectral_norm"}.get(kind, "prune.remove")
            found |= {id(p): _part_of(prefix, f"{weight}", kind, f"torch.nn.utils.{remove}") for p in stored}
    return found


def _part_of(prefix: str, name: str, kinds: str, remove: str) -> str:
    return f"a part of {f'{prefix}.{name}'.lstrip('.')!r} under {kinds}; {remove}(layer, {name!r}) makes one weight of it"


def _parametrizations(module: nn.Module) -> nn.Module:
    """By the name of a tensor, what torch.nn.utils.parametrize computes it from."""
    return module.parametrizations if is_parametrized(module) else nn.ModuleDict()  # type: ignore[return-value]


def globs_of(where: str, exclude: Any) -> tuple[str, ...]:
    """The option `exclude` as a tuple: a name, several, or None.

    Raises:
        ValueError: something in it is no string.
    """
    globs = () if exclude is None else exclude if isinstance(exclude, Iterable) and not isinstance(exclude, str) else (exclude,)
    globs = tuple(globs)
    if wrong := [glob for glob in globs if not isinstance(glob, str)]:
        raise ValueError(f"{where}exclude must be names of parameters, got {wrong[0]!r}")
    return globs


def excluded(where: str, exclude: Any, names: Iterable[Sequence[str]], kind: str = "parameter") -> set[int]:
    """Which of these parameters `exclude` matches, as in `fnmatch`; each has one name or, if it is tied, several.

    Raises:
        ValueError: a glob matches none: a misspelt one would change what was to be left alone.
    """
    all_names, found = list(names), set()
    for glob in globs_of(where, exclude):
        matched = {i for i, own in enumerate(all_names) if any(fnmatchcase(name, glob) for name in own)}
        if not matched:
            known = [name for own in all_names for name in own]
            near = get_close_matches(glob, known, 3, 0.5)
            some = f"similar: {listed([*map(repr, near)])}" if near else f"there are {listed([*map(repr, known)], 3)}"
            what = f"{glob!r}, which matches none of {len(known)} names; {some}"
            raise ValueError(f"{where}exclude must match the name of a {kind}, got {what}")
        found |= matched
    return found


def listed(items: Sequence[str], most: int = 5) -> str:
    """For a message: all of a few, the first of many."""
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
