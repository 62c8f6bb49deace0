"""Layers that multiply by a matrix (Linear, Conv, the projections of nn.MultiheadAttention), and what flows through them."""

import copy
import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CHUNK = 2**24  # elements of an intermediate result: 128 MiB in float64
Heard = Callable[[str, Tensor, Tensor], None]  # name of a layer, its input, its output


@dataclass(frozen=True)
class LinearLayer:
    """One matrix: `output = input @ weight.T + bias`, for a convolution with the input unfolded."""

    name: str
    module: Any
    weight: Tensor  # [out, in / groups, ...]: a parameter, or the rows of one
    bias: Tensor | None  # [out]
    parameter: Tensor  # a Parameter that `weight` is or lies in
    conv: bool = False

    @property
    def place(self) -> tuple[int, Any]:
        """The same for all layers that share this weight."""
        return id(self.parameter), self.weight.storage_offset()

    @property
    def groups(self) -> int:
        return self.module.groups if self.conv else 1

    def matrix(self) -> Tensor:
        """The weight as float64 [groups, out / groups, in]."""
        return self.weight.detach().reshape(self.groups, self.weight.shape[0] // self.groups, -1).to(self.device, torch.float64)

    @property
    def device(self) -> torch.device:
        """Where sums are accumulated: beside the weight, but for devices without float64."""
        return torch.device("cpu") if self.weight.device.type == "mps" else self.weight.device

    def rows(self, x: Tensor, y: Tensor, real: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Chunks of input rows [groups, n, in] and output rows [groups, n, out / groups], in float64.

        real: [batch, length] of bool, the positions that are no padding, used where x is [batch, length, in].
        """
        if not self.conv:
            if real is not None and x.shape[:-1] == real.shape:
                x, y = x[real.to(x.device)], y[real.to(y.device)]
            x, y = x.reshape(1, -1, x.shape[-1]), y.reshape(1, -1, y.shape[-1])
            size = max(1, CHUNK // (x.shape[-1] + y.shape[-1]))
            for a, b in zip(x.split(size, 1), y.split(size, 1), strict=True):
                yield a.to(self.device, torch.float64), b.to(self.device, torch.float64)
            return
        if x.dim() == len(self.module.kernel_size) + 1:  # one image, without a batch
            x, y = x[None], y[None]
        size = max(1, CHUNK // (math.prod(y.shape[2:]) * (self.weight[0].numel() * self.groups + y.shape[1])))
        for a, b in zip(x.split(size), y.split(size), strict=True):
            b = b.to(self.device, torch.float64).unflatten(1, (self.groups, -1)).flatten(3)  # [n, groups, out, positions]
            yield self._unfolded(a.to(self.device, torch.float64)), b.permute(1, 0, 3, 2).flatten(1, 2)

    def _unfolded(self, x: Tensor) -> Tensor:
        """Images [n, channels, ...] as rows [groups, n * positions, channels / groups * kernel elements]."""
        conv = self.module
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = F.pad(x, conv._reversed_padding_repeated_twice, mode)
        dims = len(conv.kernel_size)
        for axis, (kernel, stride, dilation) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)):
            x = x.unfold(axis + 2, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
        x = x.unflatten(1, (self.groups, -1))  # [n, groups, channels, *positions, *kernel]
        positions, kernel = range(3, 3 + dims), range(3 + dims, 3 + 2 * dims)
        return x.permute(1, 0, *positions, 2, *kernel).flatten(dims + 2).flatten(1, -2)


def find_layers(model: nn.Module) -> tuple[dict[str, LinearLayer], dict[str, str]]:
    """The layers by name, and of all other weights of 2 or more dims: name -> why they are none."""
    layers: dict[str, LinearLayer] = {}
    inner: set[nn.Module] = set()  # out_proj of attention, which is read, not called
    other: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if _attention(module):
            layers |= {layer.name: layer for layer in _projections(name, module)}
            inner.add(module.out_proj)
    for name, module in model.named_modules(remove_duplicate=False):
        conv = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        if not (conv or isinstance(module, nn.Linear)) or module in inner:
            continue
        weight = module._parameters.get("weight")
        if weight is None:
            other[name] = "its weight is computed from other parameters"
        elif getattr(module, "bias", None) is not module._parameters.get("bias"):
            other[name] = "its bias is computed from other parameters"
        elif not weight.is_floating_point():
            other[name] = f"dtype {weight.dtype}"
        elif not _computes_as(module, _defining(module)):
            other[name] = f"{type(module).__name__} has a forward of its own"
        else:
            layers[name] = LinearLayer(name, module, weight, module._parameters.get("bias"), weight, conv)
    return layers, other


def _defining(module: nn.Module) -> type[nn.Module]:
    return next(kind for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(module, kind))


def _attention(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) and _computes_as(module, nn.MultiheadAttention)


def _computes_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether neither a subclass nor somebody who wrapped this one module has replaced what it computes."""
    return all(
        name not in module.__dict__ and getattr(type(module), name, None) is getattr(kind, name, None)
        for name in ("forward", "_conv_forward")
    )


def _projections(name: str, m: nn.MultiheadAttention) -> Iterator[LinearLayer]:
    prefix, width = f"{name}." if name else "", m.embed_dim
    for i, letter in enumerate("qkv"):
        part = slice(i * width, (i + 1) * width)
        bias = None if m.in_proj_bias is None else m.in_proj_bias[part]
        if m.in_proj_weight is not None:
            yield LinearLayer(f"{prefix}in_proj[{letter}]", m, m.in_proj_weight[part], bias, m.in_proj_weight)
        else:
            weight = getattr(m, f"{letter}_proj_weight")
            yield LinearLayer(f"{prefix}{letter}_proj", m, weight, bias, weight)
    yield LinearLayer(f"{prefix}out_proj", m, m.out_proj.weight, m.out_proj.bias, m.out_proj.weight)


@contextmanager
def listen(layers: dict[str, LinearLayer], heard: Heard) -> Iterator[None]:
    """Within the block, every call of one of the layers is told to `heard`: what it computes, before other hooks change its output."""
    handles = []
    by_module: dict[nn.Module, list[LinearLayer]] = {}
    for layer in layers.values():
        by_module.setdefault(layer.module, []).append(layer)
    try:
        for module, owned in by_module.items():
            if isinstance(module, nn.MultiheadAttention):
                handles.append(module.register_forward_hook(_attention_hook(owned, heard), prepend=True, with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(_layer_hook(owned[0].name, heard), prepend=True, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layer_hook(name: str, heard: Heard) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        heard(name, args[0] if args else kwargs["input"], output)

    return hook


def _attention_hook(owned: list[LinearLayer], heard: Heard) -> Callable[..., None]:
    def hook(module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Tensor, Any]) -> None:
        given = inspect.signature(nn.MultiheadAttention.forward).bind(module, *args, **kwargs).arguments
        for layer in owned:
            if layer.name.endswith("out_proj"):
                without = copy.copy(module)  # the same attention with an identity at its end: what goes into out_proj
                end = nn.Linear(layer.weight.shape[1], layer.weight.shape[1], bias=False, device="meta")
                end.weight = nn.Parameter(torch.eye(layer.weight.shape[1], dtype=layer.weight.dtype, device=layer.weight.device))
                without._modules = {**module._modules, "out_proj": end}
                heard(layer.name, nn.MultiheadAttention.forward(without, *args, **kwargs)[0], output[0])
            else:
                x = given[{"q": "query", "k": "key", "v": "value"}[layer.name.rpartition(".")[2].removeprefix("in_proj[")[0]]]
                heard(layer.name, x, F.linear(x, layer.weight, layer.bias))

    return hook


@dataclass
class Call:
    name: str
    input: Tensor
    version: int  # of the input: layers with the same input do not depend on each other
    output: Tensor
    norm: Any = None  # a batch norm that alone reads the output, and nothing else
    uses: int = 0  # of the output


class _Trace(TorchDispatchMode):
    """Records calls in the order of execution, and counts what reads their outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.by_output: dict[int, Call] = {}
        self.norms: Counter[nn.Module] = Counter()

    def heard(self, name: str, x: Tensor, y: Tensor) -> None:
        call = Call(name, x, x._version, y)  # holds the tensors: their ids are theirs alone
        self.calls.append(call)
        self.by_output[id(y)] = call

    def normalised(self, norm: nn.Module, args: tuple[Any, ...], _: Tensor) -> None:
        self.norms[norm] += 1
        if args and (call := self.by_output.get(id(args[0]))) is not None:
            call.norm = norm

    def count(self, values: Any) -> None:
        for value in tree_leaves(values):
            if (call := self.by_output.get(id(value))) is not None:
                call.uses += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count((args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def trace(model: nn.Module, layers: dict[str, LinearLayer], run: Callable[[], Any]) -> list[Call]:
    """The calls of layers in one forward pass, which `run` does, in order."""
    recorder = _Trace()
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    handles = [norm.register_forward_hook(recorder.normalised) for norm in norms]
    try:
        with listen(layers, recorder.heard), recorder:
            recorder.count(run())
    finally:
        for handle in handles:
            handle.remove()
    for call in recorder.calls:
        if call.norm is not None and (call.uses != 1 or recorder.norms[call.norm] != 1):
            call.norm = None
    return recorder.calls
