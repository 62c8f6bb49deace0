"""Packed 2:4: pack, unpack and the count of violations, against a copy and torch's own packer (in Python)."""

import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass, sparse_semi_structured_to_dense_cutlass

from cram_kernels import ops

from . import gate, inputs, run
from .inputs import Arguments, OpRun
from .measure import Contest, Contestant, Setup
from .shapes import Shape, shrink

DTYPES = {"fp16": torch.float16, "int8": torch.int8, "fp32": torch.float32}
FASTER_THAN_TORCH = (20.0, math.inf)
WORDS = {torch.float16: 16, torch.int8: 32, torch.float32: 8}  # weights a metadata word


def shapes(setup: Setup) -> list[Shape]:
    """One of 4096 x 4096, and those of a layer of BERT-base."""
    full = [(4096, 4096), *(4 * [(768, 768)]), (3072, 768), (768, 3072)]
    return shrink(full) if setup.quick else full


def weights(shapes: list[Shape], dtype: str, device: str) -> list[Tensor]:
    """2:4 along the rows; float32 1:2. Dims are rounded up to a multiple of 64, which every dtype packs."""
    made = inputs.tensors([(-(-rows // 64) * 64, -(-cols // 64) * 64) for rows, cols in shapes], "params", torch.float32, device)
    m = 2 if dtype == "fp32" else 4
    ops.prune_nm_(made, [], [1] * len(made), m // 2, m)
    return [(w.mul_(40 * math.sqrt(w.shape[1])) if dtype == "int8" else w).to(DTYPES[dtype]) for w in made]


def packing(dtype: str, setup: Setup, shapes: list[Shape]) -> Arguments:
    own = weights(shapes, dtype, setup.device)
    packed = [w.new_zeros(w.shape[0], w.shape[1] // 2) for w in own]
    meta_dtype = torch.int32 if dtype == "int8" else torch.int16
    metas = [torch.zeros(w.shape[0], w.shape[1] // WORDS[w.dtype], dtype=meta_dtype, device=setup.device) for w in own]
    return {"weights": own, "packed": packed, "metas": metas}


def unpacking(dtype: str, setup: Setup, shapes: list[Shape]) -> Arguments:
    arguments = packing(dtype, setup, shapes)
    ops.pack_24_(**arguments)
    return arguments | {"weights": [torch.zeros_like(w) for w in arguments["weights"]]}


def contest(
    op: str, build: Callable[..., Arguments], peer: Callable[[Arguments], Any], same: Callable[..., bool], dtype: str, setup: Setup
) -> Contest:
    own = OpRun(setup, op, shapes(setup), partial(build, dtype, setup), {"weights": 1, "packed": 1, "metas": 1})
    arguments = own.arguments

    def peer_is_right() -> None:
        for i, result in enumerate(peer(arguments)):
            gate.require(same(arguments, i, result), f"torch's packer: weight {i} is not that of {op}")

    rival = Contestant("torch's packer", lambda: peer(arguments), bound=FASTER_THAN_TORCH)
    made = own.contest(rival, rounds=5)
    made.checks.append(peer_is_right)
    return made


def pack(dtype: str, setup: Setup) -> Contest:
    def same(a: Arguments, i: int, result: tuple[Tensor, Tensor]) -> bool:
        return torch.equal(a["packed"][i], result[0]) and torch.equal(a["metas"][i], result[1])

    def peer(a: Arguments) -> list[tuple[Tensor, Tensor]]:
        return [sparse_semi_structured_from_dense_cutlass(w) for w in a["weights"]]

    return contest("pack_24_", packing, peer, same, dtype, setup)


def unpack(dtype: str, setup: Setup) -> Contest:
    def same(a: Arguments, i: int, result: Tensor) -> bool:
        return dtype == "fp32" or torch.equal(a["weights"][i], result)  # torch's unpacker changes some float32

    def peer(a: Arguments) -> list[Tensor]:
        return [sparse_semi_structured_to_dense_cutlass(p, m) for p, m in zip(a["packed"], a["metas"], strict=True)]

    return contest("unpack_24_", unpacking, peer, same, dtype, setup)


def violations(dtype: str, setup: Setup) -> Contest:
    def arguments(shapes: list[Shape]) -> Arguments:
        return {"weights": weights(shapes, dtype, setup.device), "n": 2, "m": 4}

    own = OpRun(setup, "nm_violations", shapes(setup), arguments, {"weights": 1})
    tensors = own.arguments["weights"]
    return own.contest(Contestant("eager torch", lambda: [((w != 0).unflatten(1, (-1, 4)).sum(2) > 2).sum() for w in tensors]), rounds=5)


def cases() -> Iterator[run.Case]:
    for name, case in (("pack_24_", pack), ("unpack_24_", unpack), ("nm_violations", violations)):
        for dtype in DTYPES:
            yield run.Case(f"{name} {dtype}", partial(case, dtype))


def main(argv: list[str] | None = None) -> int:
    return run.main("bench_pack", cases(), argv)


if __name__ == "__main__":
    sys.exit(main())
