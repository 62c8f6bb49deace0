"""The weights of a model, a state dict or a file as the checker sees them: axis 1 is the input channels."""

import copy
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.sparse import SparseSemiStructuredTensor

from ..distributed import is_spread

# "transposed linear": the weight is [inputs, outputs]; "matrix", "parameter": 2, or more, dims, user unknown; "other": no product's
Kind = Literal["linear", "transposed linear", "conv", "conv transpose", "embedding", "recurrent", "matrix", "parameter", "other"]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
PLAIN = (type(None), bool, int, float, complex, str, bytes, bytearray, io.BytesIO, torch.dtype, torch.device, torch.Size)
PARAMETRIZED = ".parametrizations."
NO_DATA = torch.empty(0, device="meta")


@dataclass(frozen=True)
class Weight:
    """One entry of a state dict. Tied names share one.

    Attributes:
        name, aliases: its names in the model or file.
        tensor: [K, C, ...], with the input channels on axis 1. It is a view, in any memory order.
        kind: the kind of layer that uses it.
        groups: of the convolution, where known.
        why_dense: why it cannot be n:m, or cannot be checked, where its use or its class says so.
        unchecked: whether it may be the weight of a product, though its numbers or its axis are not known.
        is_tensor: False where the entry is no tensor at all, and `tensor` stands for it.
        shape: the shape in an ONNX file that stores the weight in another shape or order.
        index: a function that gives, for each number of `tensor`, its place in that stored tensor, flattened.
    """

    name: str
    tensor: Tensor
    kind: Kind
    groups: int | None = None
    aliases: tuple[str, ...] = ()
    why_dense: str | None = None
    unchecked: bool = False
    is_tensor: bool = True
    shape: tuple[int, ...] | None = None
    index: Callable[[], Tensor] | None = None


def weights_of(source: nn.Module | Mapping[str, Any]) -> list[Weight]:
    """Every entry of a model or a state dict, as the model computes with it. Masks of torch.nn.utils.prune are multiplied in,
    parametrizations are evaluated, semi-structured and quantized tensors are unpacked. Buffers of a module have the kind "other"; a state
    dict does not tell them from weights.

    Raises:
        TypeError: neither, or a state dict without any tensor.
    """
    if isinstance(source, nn.Module):
        buffers: dict[str, tuple[Kind, int | None]] = {name: ("other", None) for name, _ in source.named_buffers(remove_duplicate=False)}
        return _of_tensors(_computed(source), dict(_uses(source)) | buffers, unknown)
    if not isinstance(source, Mapping):
        raise TypeError(f"check_nm: model must be a torch.nn.Module or a state dict, got {type(source).__name__}")
    if source and not any(isinstance(t, Tensor) for t in source.values()):
        name, value = next(iter(source.items()))
        raise TypeError(f"state dict: entry {name!r} must be a tensor, got {type(value).__name__}, and no other entry is one")
    return _of_tensors(without_masks(source), {}, guess)


def without_masks(state: Mapping[str, Any]) -> dict[str, Any]:
    """NAME_orig and NAME_mask (torch.nn.utils.prune), or NAME.parametrizations.PART.original and .0.mask (torch.ao.pruning), become the
    product that the layer computes with, under its plain name."""
    found = dict(state)
    for name in state:
        if name.endswith("_orig"):
            plain = name.removesuffix("_orig")
            mask_name = f"{plain}_mask"
        elif PARAMETRIZED in name and name.endswith(".original"):
            plain = name.removesuffix(".original").replace(PARAMETRIZED, ".", 1)
            mask_name = f"{name.removesuffix('original')}0.mask"
        else:
            continue
        t, mask = state[name], state.get(mask_name)
        if isinstance(t, Tensor) and isinstance(mask, Tensor) and mask.shape == t.shape and plain not in state:
            del found[mask_name]
            found = {plain if own == name else own: t.detach() * mask.to(t.dtype) if own == name else value for own, value in found.items()}
    return found


def _computed(model: nn.Module) -> dict[str, Any]:
    """The state dict with the weight that each parametrized layer computes in place of what it is computed from."""
    state = without_masks(model.state_dict())
    for prefix, module in model.named_modules(remove_duplicate=False):
        if not parametrize.is_parametrized(module):
            continue
        for part, parametrization in module.parametrizations.items():
            own = f"{prefix}{PARAMETRIZED}{part}.".removeprefix(".")
            if not any(name.startswith(own) for name in state):
                continue
            state = {name: t for name, t in state.items() if not name.startswith(own)}
            # a copy in eval mode: spectral norm, for one, changes its buffers in training mode
            state[f"{prefix}.{part}".removeprefix(".")] = copy.deepcopy(parametrization).eval()().detach()
    return state


def is_masked(model: nn.Module) -> str | None:
    """The name of a weight that the model computes from other tensors, as with a mask or a parametrization; None if there is none."""
    own, computed = model.state_dict(), _computed(model)
    return next((name for name in computed if name not in own), None)


def _of_tensors(entries: Mapping[str, Any], uses: dict[str, tuple[Kind, int | None]], otherwise: Callable[[Tensor], Kind]) -> list[Weight]:
    names: dict[object, list[str]] = {}
    for name, t in entries.items():
        names.setdefault(_identity(name, t), []).append(name)
    found = []
    for own in names.values():
        t, why, unchecked = _plain(own[0], entries[own[0]])
        # a linear layer tied to an embedding is both: as an embedding it must stay what it is
        kinds = [uses.get(name, (otherwise(t), None)) for name in own]
        kind, groups = next((use for use in kinds if use[0] == "embedding"), next((use for use in kinds if use[0] != "other"), kinds[0]))
        is_tensor = isinstance(entries[own[0]], Tensor)
        shape = tuple(entries[own[0]].shape) if t is NO_DATA and is_tensor and not is_lazy(entries[own[0]]) else None
        found.append(Weight(own[0], t, kind, groups, tuple(own[1:]), why, unchecked, is_tensor, shape))
    return found


def _plain(name: str, value: Any) -> tuple[Tensor, str | None, bool]:
    """The numbers of an entry as a plain tensor; where there are none: why, and whether a weight may hide in it."""
    if not isinstance(value, Tensor):
        leaves = torch.utils._pytree.tree_leaves(value)
        hides = not all(isinstance(leaf, PLAIN) or (isinstance(leaf, Tensor) and leaf.dim() < 2) for leaf in leaves)
        hides = hides and not name.endswith("_extra_state")  # by torch's convention no weight
        return NO_DATA, f"not a tensor: {type(value).__name__}" + (", in which there may be weights" if hides else ""), hides
    t = value.detach()
    if is_lazy(value):
        return NO_DATA, "not initialized: run the model once", True
    if is_spread(t):
        return NO_DATA, "the shard of one rank (DTensor): gather the model first", True
    if PARAMETRIZED in name and name.endswith(".original"):
        return t, "parametrized in a way that a state dict does not tell: check the module", True
    if type(t).__torch_dispatch__ is Tensor.__torch_dispatch__ and not t.is_quantized:
        return t if type(t) is Tensor else t.as_subclass(Tensor), None, False
    for unpack in ("to_dense",) if isinstance(t, SparseSemiStructuredTensor) else ("dequantize", "to_dense"):
        try:
            plain = getattr(t, unpack)()
        except Exception:  # whatever a class of somebody else raises
            continue
        if type(plain) is Tensor and plain.shape == t.shape:
            return plain, None, False
    return NO_DATA, f"numbers of the class {type(t).__name__} cannot be read: check the model before it is converted", t.dim() > 1


def is_plain(value: Tensor) -> bool:
    """Whether a file can hold this tensor as it is, or a semi-structured one unpacked."""
    t = value.detach()
    return isinstance(t, SparseSemiStructuredTensor) or (type(t).__torch_dispatch__ is Tensor.__torch_dispatch__ and not t.is_quantized)


def _identity(name: str, t: Any) -> object:
    """The same for tied names."""
    if not isinstance(t, Tensor) or is_lazy(t):
        return name
    if isinstance(t, SparseSemiStructuredTensor):
        return id(t)
    if not is_plain(t) or t.layout != torch.strided or t.is_meta or t.numel() == 0:
        return name
    return t.device, t.data_ptr(), t.dtype, t.shape, t.stride()


def guess(t: Tensor) -> Kind:
    """What uses a tensor of this shape, as far as the shape tells. [1, tokens, width] is the parameter of a transformer."""
    return "conv" if 3 <= t.dim() <= 5 and t.shape[0] > 1 else unknown(t)


def unknown(t: Tensor) -> Kind:
    return "other" if t.dim() < 2 else "matrix" if t.dim() == 2 else "parameter"


def _uses(model: nn.Module) -> Iterator[tuple[str, tuple[Kind, int | None]]]:
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        if isinstance(module, nn.Linear):
            yield f"{prefix}weight", ("linear", None)
        elif isinstance(module, CONVOLUTIONS):
            yield f"{prefix}weight", ("conv", module.groups)
        elif isinstance(module, TRANSPOSED):
            yield f"{prefix}weight", ("conv transpose", module.groups)
        elif isinstance(module, nn.RNNBase):
            for part, p in module.named_parameters(recurse=False):
                yield f"{prefix}{part}", ("recurrent" if p.dim() > 1 else "other", None)
        elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
            yield f"{prefix}weight", ("embedding", None)
        elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers', of GPT-2
            yield f"{prefix}weight", ("transposed linear", None)
