"""`make triton-static`: every Triton kernel compiled ahead of time for every arch, without a GPU, and what the machine code says.

The ops run on CPU tensors; instead of launching a kernel, what it would be launched with is written down and compiled. Spilled registers
are faults, and so are 16-byte accesses that a kernel on aligned chunks should have and has not.
"""

import argparse
import contextlib
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "0")  # as every launch asks for
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import cram_kernels.triton as kernels
from cram_kernels.patterns import TopK
from cram_kernels.triton import tuning
from native_build import GPU_ARCHS

from . import report
from .cuda_static import cubin
from .cuda_static.report import kernel_row
from .inputs import DTYPES

AMD = ("gfx90a", "gfx942")
TYPES = {torch.float32: "*fp32", torch.float64: "*fp64", torch.int64: "*i64", torch.int32: "*i32", torch.int16: "*i16", torch.uint8: "*u8"}
OPTIONS = ("num_warps", "enable_fp_fusion", "maxnreg")
SIZE = 2**15  # elements: whole chunks
STREAMS = {  # kernel, and constants as `name=value` -> what it reads and writes of each weight, a letter a number (`stream_bytes`)
    "perturb_masked_kernel": ("TTM", "TT"),
    "stream_kernel PERTURB=True": ("TTM", "TT"),
    "stream_kernel PERTURB=False": ("T", ""),
    "count_kernel PERTURB=True": ("PMT", ""),
    "count_kernel PERTURB=False": ("T", ""),
    "finish_kernel": ("PMT", "T"),
    "prune_kernel": ("T", "T"),
    "histogram_kernel PERTURB=True": ("PMT", ""),
    "histogram_kernel PERTURB=False": ("T", ""),
    "nm_kernel FORM=single": ("", ""),  # group by group: no number lies beside the next
    "nm_kernel PERTURB=True": ("TTM", "TT"),
    "nm_kernel PERTURB=False": ("T", "T"),
    "restore_kernel": ("PM", "T"),
    "restore_combine_kernel": ("PMTT", "TT"),
    "restore_sgd_kernel": ("PMTTS", "TMS"),
    "restore_adam_kernel": ("PMTTSSS", "TMSSS"),
    "chunk_sums_kernel": ("T", ""),
}


def stream_bytes(letters: str, constants: dict[str, Any]) -> float:
    """T: a stored number, S: one of the state; M: a float32 where there are masters, P: a T where there are none."""
    number, state, masters = constants["T"].primitive_bitwidth // 8, constants["S"].primitive_bitwidth // 8, constants["MASTERS"]
    sizes = {"T": number, "S": state, "M": 4 * masters, "P": number * (not masters)}
    return sum(sizes[letter] for letter in letters)


class Launch:
    """A kernel and what one launch of it makes the compiler know. `alone`: without a perturbation."""

    def __init__(self, label: str, kernel: JITFunction, args: tuple, kwargs: dict[str, Any]) -> None:
        alone = ", alone" if kwargs.get("PERTURB") is False else ""
        self.name, self.kernel = f"{kernel.__name__}<{label}{alone}>", kernel
        self.options = {key: kwargs.pop(key) for key in OPTIONS if key in kwargs}
        self.signature: dict[str, str] = {}
        self.constants: dict[tuple[int], Any] = {}
        self.attributes: dict[tuple[int], list] = {}
        given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        for i, parameter in enumerate(kernel.params):
            value = given[parameter.name]
            if parameter.is_constexpr or value is None:
                self.signature[parameter.name], self.constants[(i,)] = "constexpr", value
            elif isinstance(value, Tensor):
                self.signature[parameter.name] = TYPES[value.dtype]
                if value.data_ptr() % 16 == 0:
                    self.attributes[(i,)] = [["tt.divisibility", 16]]
            elif value == 1:  # as at run time: a constant
                self.signature[parameter.name], self.constants[(i,)] = "constexpr", value
            else:
                self.signature[parameter.name] = "i32"
                if value % 16 == 0:
                    self.attributes[(i,)] = [["tt.divisibility", 16]]

    def compile(self, target: GPUTarget) -> Any:
        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        return triton.compile(source, target=target, options=self.options)

    def key(self) -> str:
        return str((self.kernel.__name__, self.signature, self.constants, self.options, self.attributes))

    def wanted(self) -> tuple[int, int]:
        """16-byte loads and stores that the machine code must have: all of the streams' bytes, of an aligned chunk."""
        names = [parameter.name for parameter in self.kernel.params]
        constants = {names[i]: value for (i,), value in self.constants.items()}
        if not constants.get("ALIGNED"):
            return 0, 0
        of_this = [key for key in STREAMS if all(part in self.forms(constants) for part in key.split())]
        if not of_this:
            return 0, 0
        elements = constants["BLOCK"] if "BLOCK" in constants else constants["GROUPS"] * constants["LANES"]
        threads = 32 * self.options["num_warps"]
        loads, stores = (int(elements * stream_bytes(letters, constants) / (16 * threads)) for letters in STREAMS[of_this[0]])
        return loads, stores

    def forms(self, constants: dict[str, Any]) -> set[str]:
        return {self.kernel.__name__, *(f"{name}={value}" for name, value in constants.items())}


def record(run: Callable[[], Any], label: str) -> Iterator[Launch]:
    """The launches of a call, none of which happens."""
    launches: list[Launch] = []

    def take(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> dict[Any, Callable[..., None]]:
        launches.append(Launch(label, self, args, dict(kwargs)))
        return defaultdict(lambda: lambda *args: None)  # a compiled kernel: grid -> launcher

    launch, JITFunction.run = JITFunction.run, take
    try:
        run()
    finally:
        JITFunction.run = launch
    return iter(launches)


def calls(dtype: torch.dtype, masters: bool, aligned: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """One call of each op on a matrix: what a model's weights make of it."""

    def make(t: torch.dtype = dtype) -> list[Tensor]:
        first = 0 if aligned else 1
        return [torch.zeros(SIZE + 1, dtype=t)[first : first + SIZE].view(64, -1)]

    def one(value: float, t: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(value, dtype=t)

    state = torch.float32 if masters else dtype
    params = make()
    shared: dict[str, Any] = {"masters": make(torch.float32) if masters else []}
    amp = {"inv_scale": one(1), "found_inf": one(0)}

    def perturbation(weights: list[Tensor] = params) -> tuple:
        others = [[torch.empty_like(w) for w in weights] for _ in range(2)]
        return weights, others[0], [] if masters else others[1], masks(weights), one(0, torch.int32), one(0.05)

    def update() -> tuple:
        return params, [] if masters else make(), make(), make(), masks(params), one(1, torch.int32)

    top = ([0], torch.tensor([TopK(0.9).k(params[0].numel())]))
    digits = ([0], torch.zeros(1, dtype=torch.int64), 20, 11)
    yield "topk_histogram", lambda: kernels.topk_histogram(params, make(), one(0.05), *digits, inv_scale=one(1), **shared)
    yield "restore_", lambda: kernels.restore_(params, update()[1], one(1, torch.int32), **shared)
    states = [make(state), make(state), make(state)]
    for label, scaling in (("", amp), (" no AMP", {})):
        yield f"perturb_masked_{label}", lambda a=scaling: kernels.perturb_masked_(*perturbation(), **a, **shared)
        yield f"perturb_topk_{label}", lambda a=scaling: kernels.perturb_topk_(*perturbation(), *top, **a, **shared)
        yield f"perturb_nm_{label} 2:4", lambda a=scaling: kernels.perturb_nm_(*perturbation(), [1], 2, 4, **a, **shared)
        yield f"restore_combine_{label}", lambda a=scaling: kernels.restore_combine_(*update(), **a, **shared)
        yield f"restore_sgd_{label}", lambda a=scaling: kernels.restore_sgd_(*update(), make(state), [0], one(0.1), **a, **shared)
        for decoupled in (True, False):
            options = {"decoupled": decoupled, **scaling, **shared}
            name = f"restore_adam_{label}" + " decoupled" * decoupled
            yield name, lambda o=options: kernels.restore_adam_(*update(), *states, [one(0)], one(0.1), **o)
    for lie, (weights, patterns) in layouts(params[0]).items():
        own = {"masters": [w.float() for w in weights] if masters else []}
        for n, m in patterns if not masters else patterns[:1]:
            label = f"{lie} {n}:{m}"
            yield f"perturb_nm_ {label}", lambda w=weights, n=n, m=m, o=own: kernels.perturb_nm_(*perturbation(w), [1], n, m, **amp, **o)
            if not masters:
                yield f"prune_nm_ {label}", lambda w=weights, n=n, m=m: kernels.prune_nm_(w, masks(w), [1], n, m)
    if masters:
        return  # what has no masters is compiled without
    yield "prune_topk_", lambda: kernels.prune_topk_(params, masks(params), *top)
    yield "grad_norm", lambda: kernels.grad_norm(params, inv_scale=one(1))


def masks(weights: list[Tensor]) -> list[Tensor]:
    return [torch.zeros(-(-w.numel() // 8), dtype=torch.uint8) for w in weights]


def layouts(w: Tensor) -> dict[str, tuple[list[Tensor], list[tuple[int, int]]]]:
    """How groups can lie in memory, with the patterns that are compiled for it; of elements of w."""
    flat = w.view(-1)
    return {
        "rows": ([w], [(2, 4), (1, 2), (4, 8), (8, 16), (16, 32), (32, 64), (256, 512)]),
        "6 in a row": ([flat[: 64 * 504].view(64, 504)], [(3, 6)]),
        "convolution": ([flat[: 64 * 288].view(64, 32, 3, 3)], [(2, 4), (4, 8), (8, 16), (16, 32)]),
        "convolution of 48": ([flat[: 64 * 432].view(64, 48, 3, 3)], [(6, 12), (24, 48)]),
        "transposed": ([flat.view(32, -1).t()], [(2, 4), (4, 8), (16, 32)]),
        "odd distance": ([flat[: 32 * 1023].view(32, 1023).t()], [(2, 4), (16, 32)]),
    }


def all_launches(dtypes: list[str]) -> list[Launch]:
    """Of every dtype, with and without masters, aligned and not; each compilation once."""
    variants = []
    for name in dtypes:
        for masters in (False, True)[: 1 if name == "fp32" else 2]:
            for aligned in (True, False):
                label = name + " masters" * masters + " unaligned" * (not aligned)
                variants.append((label, calls(DTYPES[name], masters, aligned)))
    found: dict[str, Launch] = {}
    for label, ops in variants:
        for op, call in ops:
            for launch in record(call, f"{label}{op[op.index(' ') :] if ' ' in op else ''}"):
                found.setdefault(launch.key(), launch)
    return list(found.values())


def launches_for(maker: str, arch: Any, dtypes: list[str], only: str) -> list[Launch]:
    """As `cram_kernels/triton/tuning.py` tunes them for an arch."""
    chosen, tuning.target = tuning.target, lambda: (maker, arch)
    try:
        return [launch for launch in all_launches(dtypes) if only in launch.name]
    finally:
        tuning.target = chosen


class Compiled(NamedTuple):
    """A launch on one arch."""

    row: report.Row
    faults: list[str]


LAUNCHES: dict[str, list[Launch]] = {}  # arch -> its kernels, of this process and of those that it forks


def nvidia(job: tuple[int, str, Path]) -> Compiled:
    """A cubin, read."""
    number, arch, folder = job
    launch = LAUNCHES[arch][number]
    compiled = launch.compile(GPUTarget("cuda", int(arch), 32))
    path = folder / f"{number:03}_{launch.kernel.__name__}_sm_{arch}.cubin"
    path.write_bytes(compiled.asm["cubin"])
    (kernel,) = cubin.kernels_of(path, arch)
    kernel.name, kernel.shared = launch.name, kernel.shared + compiled.metadata.shared
    faults = [f"{launch.name} on sm_{arch} spills"] if kernel.local else []
    for kind, wanted in zip(("load", "store"), launch.wanted(), strict=True):
        if kernel.vectors(kind) < wanted:
            faults.append(f"{launch.name} on sm_{arch}: wants {wanted} {kind}s of 16 bytes, the machine code has {kernel.vectors(kind)}")
    return Compiled(kernel_row(kernel, 32 * compiled.metadata.num_warps), faults)


def amd(job: tuple[int, str, Path]) -> Compiled:
    """Assembly, searched. There is no machine code of a whole kernel to run or to check here."""
    number, arch, folder = job
    launch = LAUNCHES[arch][number]
    text = launch.compile(GPUTarget("hip", arch, 64)).asm["amdgcn"]
    (folder / f"{number:03}_{launch.kernel.__name__}_{arch}.s").write_text(text)
    spilled = sum(int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", text))
    row: report.Row = {"name": launch.name, "arch": arch, "registers": max(int(n) for n in re.findall(r"\.vgpr_count:\s*(\d+)", text))}
    row |= {"spills": spilled, "shared": int(re.findall(r"\.group_segment_fixed_size:\s*(\d+)", text)[0])}
    row |= {f"{kind}s 16 B": len(re.findall(rf"(?:global|buffer)_{kind}_dwordx4", text)) for kind in ("load", "store")}
    return Compiled(row, [f"{launch.name} on {arch} spills {spilled} registers"] if spilled else [])


def spread(rows: list[report.Row]) -> list[report.Row]:
    """One row a kernel; a number that differs between archs as `least-most`."""
    names = dict.fromkeys(row["name"] for row in rows)
    return [{key: span([row[key] for row in rows if row["name"] == name]) for key in rows[0] if key != "arch"} for name in names]


def span(values: list[Any]) -> Any:
    return values[0] if len(set(values)) == 1 else f"{min(values)}-{max(values)}"


def main(argv: list[str] | None = None) -> int:
    """Returns 0; 1 where registers spill or vector accesses were lost."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.triton_static")
    parser.add_argument("--archs", nargs="*", choices=GPU_ARCHS, default=list(GPU_ARCHS), help="of NVIDIA; none after it: none")
    parser.add_argument("--amd", nargs="*", choices=AMD, default=list(AMD), help="of AMD; none after it: none")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--only", default="", help="kernels whose name has this in it")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("build/triton_static"))
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    for stale in (path for path in options.out.iterdir() if path.suffix in (".cubin", ".s")):
        stale.unlink()
    for maker, archs in (("cuda", options.archs), ("hip", options.amd)):
        for arch in archs:
            LAUNCHES[arch] = launches_for(maker, int(arch) if maker == "cuda" else arch, options.dtypes, options.only)
    if not any(LAUNCHES[arch] for arch in (*options.archs, *options.amd)):
        parser.error(f"--only: no kernel of {', '.join((*options.archs, *options.amd)) or 'no arch'} has {options.only!r} in its name")
    faults: list[str] = []
    record: report.Row = {}
    with get_context("fork").Pool(options.jobs) if options.jobs > 1 else contextlib.nullcontext() as pool:
        for maker, compile_one, archs in (("nvidia", nvidia, options.archs), ("amd", amd, options.amd)):
            jobs = [(number, arch, options.out) for arch in archs for number in range(len(LAUNCHES[arch]))]
            done = list(map(compile_one, jobs)) if pool is None else pool.map(compile_one, jobs, chunksize=1)
            record[maker] = [compiled.row for compiled in done]
            if jobs:
                print(f"{len(LAUNCHES[archs[0]])} kernels for {', '.join(archs)}:\n{report.table(spread(record[maker]))}\n", flush=True)
            faults += [fault for compiled in done for fault in compiled.faults]
    for fault in faults:
        print(f"FAULT: {fault}")
    report.write_json(options.out / "triton_static.json", record | {"faults": faults})
    print(f"{sum(map(len, record.values()))} compilations, {len(faults)} faults; {options.out / 'triton_static.json'}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
