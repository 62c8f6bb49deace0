"""Order of magnitudes, canonical NaN, memory order and mask bits (contract: Lists, Order, Masks)."""

import torch
from torch import Tensor

NAN_KEY = 0x7FC00000  # the key of every NaN: above Inf (0x7f800000)
KEEP_ALL = -1  # the threshold below every key


def magnitude_key(u: Tensor) -> Tensor:
    """Keys of u, int32, the shape of u: the bits of float32(u) without the sign; all NaNs share NAN_KEY."""
    wide = u.to(torch.float32)
    return torch.where(wide.isnan(), NAN_KEY, wide.view(torch.int32) & 0x7FFFFFFF)


def canonical(u: Tensor) -> Tensor:
    """u with every NaN replaced by the canonical NaN of its dtype."""
    return torch.where(u.isnan(), torch.full((), float("nan"), dtype=u.dtype, device=u.device), u)


def flat(t: Tensor) -> Tensor:
    """A view of the dense tensor t as [numel], in memory order."""
    return t.as_strided((t.numel(),), (1,))


def pack_bits(keep: Tensor) -> Tensor:
    """keep [n] bool -> uint8 [ceil(n / 8)]; bit i % 8 of byte i // 8 is keep[i]."""
    padded = torch.zeros(-(-keep.numel() // 8) * 8, dtype=torch.uint8, device=keep.device)
    padded[: keep.numel()] = keep
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=keep.device)
    return (padded.view(-1, 8) * weights).sum(1, dtype=torch.uint8)


def unpack_bits(mask: Tensor, n: int) -> Tensor:
    """mask uint8 [ceil(n / 8)] -> bool [n]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return ((mask[:, None] >> shifts) & 1).flatten()[:n].bool()


def entry(tensors: list[Tensor], i: int) -> Tensor | None:
    """tensors[i], or None where the list or the entry is absent."""
    return tensors[i] if len(tensors) > 0 and tensors[i].numel() > 0 else None


def value(per_tensor, i: int):
    """per_tensor[i] of a list or a tensor that has one value for all tensors, or one a tensor."""
    if isinstance(per_tensor, Tensor):
        return per_tensor if per_tensor.dim() == 0 else per_tensor[i if per_tensor.numel() > 1 else 0]
    return per_tensor[i if len(per_tensor) > 1 else 0]


def fp32(x: float, like: Tensor) -> Tensor:
    """A Python number rounded once to float32, on the device of `like`."""
    return torch.tensor(x, dtype=torch.float32, device=like.device)
