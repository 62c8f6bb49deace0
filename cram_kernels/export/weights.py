"""The weights of a model, a state dict or a file as the checker sees them: axis 1 is the input channels."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensor

from ..distributed import is_spread

# "transposed linear": the weight is [inputs, outputs]; "matrix", "parameter": 2, or more, dims, user unknown; "other": no product's
Kind = Literal["linear", "transposed linear", "conv", "conv transpose", "embedding", "recurrent", "matrix", "parameter", "other"]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Weight:
    """One tensor. Tied names share one entry.

    name, aliases: its names in the model or file.
    tensor: [K, C, ...], axis 1 the input channels; a view, in any memory order.
    kind: what uses it.
    axis: the input channels in the tensor as it is stored: 1, or 0 where an ONNX file has it transposed.
    groups: of the convolution, where known.
    why_dense: why it cannot be checked, where its use says so.
    """

    name: str
    tensor: Tensor
    kind: Kind
    axis: int = 1
    groups: int | None = None
    aliases: tuple[str, ...] = ()
    why_dense: str | None = None


def weights_of(source: nn.Module | Mapping[str, Any]) -> list[Weight]:
    """Every tensor of a model or a state dict. A semi-structured one is unpacked. Buffers, which a state dict does not tell, are "other".

    Raises:
        TypeError: neither, or a value of the state dict is no tensor.
        ValueError: a tensor is the shard of one rank.
    """
    if isinstance(source, nn.Module):
        buffers: dict[str, tuple[Kind, int | None]] = {name: ("other", None) for name, _ in source.named_buffers(remove_duplicate=False)}
        return _of_tensors(source.state_dict(), dict(_uses(source)) | buffers, unknown)
    if not isinstance(source, Mapping):
        raise TypeError(f"check_nm: model must be a torch.nn.Module or a state dict, got {type(source).__name__}")
    return _of_tensors(source, {}, guess)


def _of_tensors(tensors: Mapping[str, Any], uses: dict[str, tuple[Kind, int | None]], otherwise: Callable[[Tensor], Kind]) -> list[Weight]:
    names: dict[object, list[str]] = {}
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"state dict: entry {name!r} must be a tensor, got {type(t).__name__}")
        if is_spread(t):
            raise ValueError(f"state dict: entry {name!r} must be whole, got a shard (DTensor): gather the model first")
        names.setdefault(_identity(name, t), []).append(name)
    found = []
    for own in names.values():
        t = tensors[own[0]].detach()
        t = t.to_dense() if isinstance(t, SparseSemiStructuredTensor) else t
        # a linear layer tied to an embedding is both: as an embedding it must stay what it is
        kinds = [uses.get(name, (otherwise(t), None)) for name in own]
        kind, groups = next((use for use in kinds if use[0] == "embedding"), next((use for use in kinds if use[0] != "other"), kinds[0]))
        found.append(Weight(own[0], t, kind, groups=groups, aliases=tuple(own[1:])))
    return found


def _identity(name: str, t: Tensor) -> object:
    """The same for tied names."""
    if isinstance(t, SparseSemiStructuredTensor):
        return id(t)
    if t.layout != torch.strided or t.is_meta or t.numel() == 0:
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
