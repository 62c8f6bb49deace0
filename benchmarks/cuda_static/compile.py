"""Compiles every CUDA source for every arch into a folder of cubins with sidecars (cubin.py)."""

import json
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import native_build

ENTRY = re.compile(r"\.entry (?P<symbol>\w+)\(.*?\)(?P<directives>[^{]*)\{", re.S)
BLOCK = re.compile(r"\.(?:reqntid|maxntid) (\d+)(?:, (\d+), (\d+))?")
PTXAS = re.compile(r"Function properties for (?P<symbol>\w+)\s+\d+ bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+)")


def compile_all(sources: list[Path], archs: list[str], folder: Path, jobs: int) -> None:
    """One cubin and sidecar a source and arch; what the folder held of earlier runs goes.

    Raises:
        subprocess.CalledProcessError: nvcc refused a source; its words are printed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stale in [*folder.glob("*.cubin"), *folder.glob("*.json")]:
        stale.unlink()
    with ThreadPoolExecutor(jobs) as pool:
        for _ in pool.map(lambda job: compile_one(*job, folder), product(sources, archs)):
            pass


def compile_one(source: Path, arch: str, folder: Path) -> None:
    stem = f"{source.stem}_sm_{arch}"
    ptx, cubin = folder / f"{stem}.ptx", folder / f"{stem}.cubin"
    flags = [*native_build.CUDA_FLAGS.split(), f"-arch=sm_{arch}"]
    nvcc(*flags, "-ptx", source, "-o", ptx)
    report = nvcc(*flags, "-cubin", "-Xptxas", "-v", ptx, "-o", cubin)
    sidecar = {"origin": "cuda", "arch": arch, "source": source.name, "kernels": facts(ptx.read_text(), report)}
    cubin.with_suffix(".json").write_text(json.dumps(sidecar, indent=1) + "\n")


def nvcc(*arguments: object) -> str:
    result = subprocess.run(["nvcc", *map(str, arguments)], capture_output=True, text=True)
    if result.returncode != 0:
        print(result.stdout + result.stderr)
    result.check_returncode()
    return result.stderr


def facts(ptx: str, report: str) -> dict[str, dict[str, Any]]:
    """Symbol -> threads a block (its launch bounds) and bytes spilled, from the PTX and from the words of ptxas."""
    spilled = {found["symbol"]: int(found["stores"]) + int(found["loads"]) for found in PTXAS.finditer(report)}
    kernels: dict[str, dict[str, Any]] = {}
    for entry in ENTRY.finditer(ptx):
        own: dict[str, Any] = {"spill_bytes": spilled[entry["symbol"]]}
        if block := BLOCK.search(entry["directives"]):
            x, y, z = (int(size or 1) for size in block.groups())
            own["threads"] = x * y * z
        kernels[entry["symbol"]] = own
    return kernels
