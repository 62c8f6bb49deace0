"""`make cuda-static`: compile, read, judge, print. No GPU is used, and no figure here comes from one."""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import native_build

from .. import report as text
from . import cubin, report
from .traffic import OPS, VECTORS

OK, FAULT, CANNOT_RUN = 0, 1, 2


def main(argv: list[str] | None = None) -> int:
    """Returns 0; 1 where a kernel uses local memory or has lost vector accesses; 2 where a tool is missing or nvcc fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda_static")
    parser.add_argument("--archs", nargs="+", choices=native_build.GPU_ARCHS, default=list(native_build.GPU_ARCHS))
    parser.add_argument("--out", type=Path, default=Path("build/cuda_static"), help="folder of the cubins and of cuda_static.json")
    options = parser.parse_args(argv)
    if shutil.which("nvcc") is None:
        print("cuda-static: nvcc is not on PATH; install the CUDA toolkit 12.1 or later")
        return CANNOT_RUN
    try:
        cubin.tool("cuobjdump")
        kernels = cubin.compiled(native_build.cuda_sources(), options.archs, options.out / "cubins")
    except (cubin.ToolMissing, subprocess.CalledProcessError) as error:
        print(f"cuda-static: {error}")
        return CANNOT_RUN
    rows, costs = report.kernel_rows(kernels), report.op_rows(kernels, OPS)
    faults, surplus = report.faults(kernels, VECTORS), report.surplus(kernels, VECTORS)
    serialized = report.serialized(kernels, OPS)
    print("From the compiler's report and the machine code:")
    print(text.table(rows))
    print(
        f"\nPREDICTION, not a measurement: ResNet-50's {report.RESNET50:,} float32 weights at {report.GOAL:.0%} of the published bandwidth:"
    )
    print(text.table(costs))
    for note in surplus + serialized:
        print(f"NOTE: {note}")
    for fault in faults:
        print(f"FAULT: {fault}")
    record = {
        "kernels": rows,
        "prediction": {"weights": report.RESNET50, "share_of_bandwidth": report.GOAL, "ops": costs},
        "faults": faults,
        "surplus": surplus,
        "serialized": serialized,
    }
    text.write_json(options.out / "cuda_static.json", record)
    print(f"{len(rows)} kernels, {len(faults)} faults; {options.out / 'cuda_static.json'}")
    return FAULT if faults else OK


if __name__ == "__main__":
    sys.exit(main())
