"""`make triton-static`: every Triton kernel compiled ahead of time, without a GPU.

The folder of cubins is what `python -m benchmarks.cuda_static --cubins` reads.

The ops run on CPU tensors; instead of launching a kernel, what it would be launched with is written down and compiled for each arch.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import cram_kernels.triton as kernels
from cram_kernels.patterns import TopK

ARCHS = ("80", "86", "89", "90", "100", "120")
AMD = ("gfx90a", "gfx942")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TYPES = {torch.float32: "*fp32", torch.float64: "*fp64", torch.int64: "*i64", torch.int32: "*i32", torch.int16: "*i16", torch.uint8: "*u8"}
OPTIONS = ("num_warps", "enable_fp_fusion")
SIZE = 2**15  # elements: whole chunks


class Launch:
    """A kernel and what one launch of it makes the compiler know."""

    def __init__(self, name: str, kernel: JITFunction, args: tuple, kwargs: dict[str, Any]) -> None:
        self.name, self.kernel = name, kernel
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
            else:
                self.signature[parameter.name] = "i32"

    def compile(self, target: GPUTarget) -> Any:
        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        return triton.compile(source, target=target, options=self.options)

    def key(self) -> str:
        return str((self.kernel.__name__, self.signature, self.constants, self.options, self.attributes))


def record(run: Callable[[], Any], label: str) -> Iterator[Launch]:
    """The launches of a call, none of which happens."""
    launches: list[Launch] = []

    def take(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(Launch(f"{self.__name__}<{label}>", self, args, dict(kwargs)))

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
        return [torch.zeros(SIZE + 1, dtype=t)[first : first + SIZE].view(8, -1)]

    def one(value: float, t: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(value, dtype=t)

    state = torch.float32 if masters else dtype
    params = make()
    shared: dict[str, Any] = {"masters": make(torch.float32) if masters else []}
    saved = [p[:0] for p in params] if masters else make()
    mask = [torch.zeros(-(-p.numel() // 8), dtype=torch.uint8) for p in params]
    amp = {"inv_scale": one(1), "found_inf": one(0)}

    def perturbation() -> tuple:
        return params, make(), saved, mask, one(0, torch.int32), one(0.05)

    def update() -> tuple:
        return params, saved, make(), make(), mask, one(1, torch.int32)

    top = ([0], torch.tensor([TopK(0.9).k(params[0].numel())]))
    yield "perturb_masked_", lambda: kernels.perturb_masked_(*perturbation(), **amp, **shared)
    yield "perturb_topk_", lambda: kernels.perturb_topk_(*perturbation(), *top, **amp, **shared)
    yield "prune_topk_", lambda: kernels.prune_topk_(params, mask, *top)
    for n, m in ((2, 4), (4, 8), (16, 32)):
        yield f"perturb_nm_ {n}:{m}", lambda n=n, m=m: kernels.perturb_nm_(*perturbation(), [1], n, m, **amp, **shared)
    convolution = [torch.zeros(8, 32, 3, 3, dtype=dtype)]
    yield "prune_nm_ convolution", lambda: kernels.prune_nm_(convolution, [torch.zeros(288, dtype=torch.uint8)], [1], 2, 4)
    yield "restore_", lambda: kernels.restore_(params, saved, one(1, torch.int32), **shared)
    yield "restore_combine_", lambda: kernels.restore_combine_(*update(), **amp, **shared)
    yield "restore_sgd_", lambda: kernels.restore_sgd_(*update(), make(state), [0], one(0.1), **amp, **shared)
    states = [make(state), make(state), make(state)]
    yield "restore_adam_", lambda: kernels.restore_adam_(*update(), *states, [one(0)], one(0.1), decoupled=True, **amp, **shared)
    yield "grad_norm", lambda: kernels.grad_norm(params, inv_scale=one(1))


def all_launches(dtypes: list[str]) -> list[Launch]:
    """Of every dtype, with and without masters, aligned and not; each compilation once."""
    found: dict[str, Launch] = {}
    for name in dtypes:
        for masters in (False, True)[: 1 if name == "fp32" else 2]:
            for aligned in (True, False):
                label = name + " masters" * masters + " unaligned" * (not aligned)
                for op, call in calls(DTYPES[name], masters, aligned):
                    for launch in record(call, f"{label}{op[op.index(' ') :] if ' ' in op else ''}"):
                        found.setdefault(launch.key(), launch)
    return list(found.values())


def nvidia(launches: list[Launch], archs: list[str], folder: Path) -> None:
    """A cubin and a sidecar a launch and arch."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in [*folder.glob("*.cubin"), *folder.glob("*.json")]:
        stale.unlink()
    for arch in archs:
        for number, launch in enumerate(launches):
            compiled = launch.compile(GPUTarget("cuda", int(arch), 32))
            path = folder / f"{number:03}_{launch.kernel.__name__}_sm_{arch}.cubin"
            path.write_bytes(compiled.asm["cubin"])
            facts = {"threads": 32 * compiled.metadata.num_warps, "dynamic_shared": compiled.metadata.shared}
            sidecar = {"origin": "triton", "arch": arch, "source": launch.name, "kernels": {compiled.metadata.name: facts}}
            path.with_suffix(".json").write_text(json.dumps(sidecar, indent=1) + "\n")


def amd(launches: list[Launch], archs: list[str], folder: Path) -> list[str]:
    """A line an arch: how many kernels compiled, and what their assembly says of registers, spills and 16-byte accesses."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for arch in archs:
        counts: Counter[str] = Counter()
        registers = 0
        for number, launch in enumerate(launches):
            text = launch.compile(GPUTarget("hip", arch, 64)).asm["amdgcn"]
            (folder / f"{number:03}_{launch.kernel.__name__}_{arch}.s").write_text(text)
            counts["kernels"] += 1
            counts["spilled"] += sum(int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", text))
            counts["16-byte loads"] += len(re.findall(r"(?:global|buffer)_load_dwordx4", text))
            counts["fused multiply-adds"] += len(re.findall(r"v_(?:fma|mad|fmac|mac)_f32", text))
            registers = max(registers, *(int(n) for n in re.findall(r"\.vgpr_count:\s*(\d+)", text)))
        lines.append(
            f"{arch}: " + ", ".join(f"{value} {name}" for name, value in counts.items()) + f", at most {registers} vector registers"
        )
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.triton_static")
    parser.add_argument("--archs", nargs="*", choices=ARCHS, default=list(ARCHS))
    parser.add_argument("--amd", nargs="*", choices=AMD, default=list(AMD))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--out", type=Path, default=Path("build/triton_static"))
    options = parser.parse_args(argv)
    launches = all_launches(options.dtypes)
    nvidia(launches, options.archs, options.out)
    print(f"{len(launches)} kernels for {', '.join('sm_' + arch for arch in options.archs)} in {options.out}")
    for line in amd(launches, options.amd, options.out / "amd"):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
