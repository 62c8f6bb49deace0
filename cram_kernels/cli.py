"""The command line: `python -m cram_kernels info`."""

import argparse
import platform
import sys

import torch

from . import _native, backend
from .version import __version__


def info() -> str:
    """Version, torch, backends with the reason why one is missing, compiler, SIMD level, GPU archs; one fact a line."""
    host = _native.host
    rows = [
        ("cram_kernels", __version__),
        ("python", platform.python_version()),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
    ]
    for name, reason in backend.available().items():
        rows.append((f"backend {name}", "available" if reason is None else f"missing: {reason}"))
    if host is not None:
        rows += [
            ("compiler", host.compiler),
            ("built against torch", host.torch_built_with),
            ("SIMD level", f"{host.simd_level()} (this CPU has {', '.join(host.simd_levels())})"),
            ("GPU archs built", host.gpu_archs or "none"),
        ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cram_kernels", description="CrAM kernels.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what is installed, built and chosen here, and why a backend is missing")
    parser.parse_args(argv)
    print(info())
    return 0


if __name__ == "__main__":
    sys.exit(main())
