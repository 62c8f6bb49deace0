"""Parameters that are spread over ranks: DTensor, as FSDP2 (`fully_shard`) and tensor parallelism make them. The ops work on what a rank
holds. Nothing here waits for the device.

The exact global threshold over shards: the keys of all weights have 31 bits; in three rounds the ranks add up how many keys have which next
digit (`ops.topk_histogram`), and each finds the same digit of the k-th largest. With it a rank knows how many of its own weights are above
the threshold, hence the k of its own one-pass selection, which then gives the bits that one process would have given. That is 32 KiB of
all-reduce a selection set and step, whatever its size.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

DIGITS = ((20, 11), (10, 10), (0, 10))  # shift and bits of each round
KEEP_ALL = 2**62  # a rank that is beyond every weight


def is_spread(t: Tensor) -> bool:
    """Whether t is a DTensor. (Importing the class would import all of torch.distributed.tensor.)"""
    return hasattr(t, "device_mesh") and hasattr(t, "placements")


def local_of(t: Tensor) -> Tensor:
    """What this rank holds: t itself, or the shard of a DTensor, in the same storage."""
    if not hasattr(t, "device_mesh"):  # the first half of is_spread, asked of thousands of tensors a step
        return t
    with torch.no_grad():
        return t.to_local()  # type: ignore[attr-defined]


def check_not_fsdp1(where: str, params: Iterable[Tensor]) -> None:
    """FSDP1 makes vectors of many weights, and its own parameters pieces of those: nothing in them has the shape that pruning needs.

    Raises:
        ValueError: one of the parameters is such a vector, or lies in one.
    """
    if any(getattr(p, "_fsdp_flattened", False) for p in params):
        raise ValueError(f"{where}: parameters must be whole or sharded by FSDP2 (fully_shard), got some of FSDP1's flat parameters")


def as_dtensor(param: Tensor, local: Tensor) -> Tensor:
    """The inverse, for something that is spread as `param` is."""
    if not is_spread(param):
        return local
    from torch.distributed.tensor import DTensor

    placed: Any = param
    return DTensor.from_local(local, placed.device_mesh, placed.placements, run_check=False, shape=param.shape, stride=param.stride())


class Spread(NamedTuple):
    """The ranks over which the weights of a selection set lie: those that differ in these dims of the mesh."""

    mesh: Any  # DeviceMesh
    dims: tuple[int, ...]

    def reduce_(self, t: Tensor, op: Any = None) -> Tensor:
        """All-reduce t in place; a sum without `op`."""
        for dim in self.dims:
            dist.all_reduce(t, op or dist.ReduceOp.SUM, group=self.mesh.get_group(dim))
        return t

    def counts_here(self, param: Tensor) -> bool:
        """Of the ranks that hold the same part of a parameter one counts it."""
        here = self.mesh.get_coordinate()
        sharded = _sharded_dims(param) if is_spread(param) else ()
        return all(dim in sharded or here[dim] == 0 for dim in self.dims)


def _sharded_dims(param: Any) -> tuple[int, ...]:
    return tuple(dim for dim, placement in enumerate(param.placements) if not placement.is_replicate())


def spread_of(params: Sequence[Tensor]) -> Spread | None:
    """Over which ranks these parameters lie; None: each rank has all of them.

    Raises:
        RuntimeError: they are on different meshes.
    """
    meshes = [p.device_mesh for p in params if is_spread(p)]  # type: ignore[attr-defined]
    if any(mesh != meshes[0] for mesh in meshes):
        raise RuntimeError(f"CrAM: weights that are ranked together must be on one device mesh, got {meshes[0]} and others")
    dims = sorted({dim for p in params if is_spread(p) for dim in _sharded_dims(p)})
    return Spread(meshes[0], tuple(dims)) if dims else None


def whole_mesh(params: Sequence[Tensor]) -> list[Spread]:
    """All ranks of each mesh."""
    meshes: list[Any] = []
    for p in params:
        if is_spread(p) and p.device_mesh not in meshes:  # type: ignore[attr-defined]
            meshes.append(p.device_mesh)  # type: ignore[attr-defined]
    return [Spread(mesh, tuple(range(mesh.ndim))) for mesh in meshes]


def why_not_nm(param: Any, m: int) -> str | None:
    """None where each rank holds whole groups of m along axis 1."""
    if not is_spread(param):
        return None
    piece = param.shape[1] if len(param.shape) > 1 else 0
    for dim, placement in enumerate(param.placements):
        if placement.is_shard(1):
            piece = -(-piece // param.device_mesh.size(dim))
            if piece % m != 0:
                return f"axis 1 is sharded in pieces that {m} does not divide"
    return None


def local_ranks(
    histogram: Callable[..., Tensor], params: Sequence[Tensor], sets: Sequence[int], k: Tensor, spread: Spread
) -> tuple[Tensor, Tensor]:
    """What k must be on this rank, so that its own selection keeps what the selection over all ranks would.

    Args:
        histogram: (sets, prefix, shift, bits) -> int64 [num_sets, 2**bits], the digits of this rank's keys: `ops.topk_histogram`.
        params: [n], for where they lie.
        sets: [n] the selection set of each, or -1.
        k: int64 [num_sets], over all ranks.

    Returns:
        k for this rank, int64 [num_sets]; the thresholds over all ranks, int32 [num_sets].
    """
    counted = [s if spread.counts_here(p) else -1 for s, p in zip(sets, params, strict=True)]
    prefix, above_here, rank = torch.zeros_like(k), torch.zeros_like(k), k.clone()
    keep_all = torch.zeros_like(k, dtype=torch.bool)
    for shift, bits in DIGITS:
        here = histogram(sets, prefix, shift, bits)
        total = spread.reduce_(here.clone() if counted == list(sets) else histogram(counted, prefix, shift, bits))
        if shift == DIGITS[0][0]:
            keep_all = total.sum(1) < k
        at_least, at_least_here = _at_least(total), _at_least(here)  # [num_sets, 2**bits + 1]: keys whose digit is at least this
        digit = ((at_least >= rank[:, None]).sum(1) - 1).clamp(min=0)
        rank = rank - at_least.gather(1, digit[:, None] + 1)[:, 0]
        above_here = above_here + at_least_here.gather(1, digit[:, None] + 1)[:, 0]
        prefix = (prefix << bits) + digit
    return torch.where(keep_all, KEEP_ALL, above_here + 1), torch.where(keep_all, -1, prefix).int()


def _at_least(bins: Tensor) -> Tensor:
    """[s, b] -> [s, b + 1]: how many are in this bin or a later one; the last is 0."""
    sums = bins.flip(1).cumsum(1).flip(1)
    return torch.cat([sums, sums.new_zeros(sums.shape[0], 1)], 1)
