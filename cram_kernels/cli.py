"""The command line: `python -m cram_kernels info`, `python -m cram_kernels verify-gpu`."""

import argparse
import platform
import sys
from typing import Any

import torch

from . import _native, backend
from .verify import command as verify
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
    rows.append(("backend chosen", _chosen_backend()))
    if host is not None:
        rows += [
            ("compiler", host.compiler),
            ("built against torch", host.torch_built_with),
            ("SIMD level", _simd_level(host)),
            ("GPU archs built", host.gpu_archs or "none"),
        ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def _chosen_backend() -> str:
    name = backend.chosen()
    if name is None:
        return f"by device ({backend.ENVIRONMENT} or use_backend() override)"
    try:
        missing = backend.why_missing(name)
    except ValueError as error:
        return f"none: {error}"
    return f"{name} ({backend.ENVIRONMENT})" + (f", which is missing: {missing}" if missing else "")


def _simd_level(host: Any) -> str:
    try:
        return f"{host.simd_level()} (this CPU has {', '.join(host.simd_levels())})"
    except RuntimeError as error:
        return f"none: {error}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cram_kernels", description="CrAM kernels.")
    parser.add_argument("--version", action="version", version=f"cram_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what is installed, built and chosen here, and why a backend is missing")
    verify.add_options(commands.add_parser("verify-gpu", help="everything that only a real GPU can show, in one report"))
    options = parser.parse_args(argv)
    if options.command == "verify-gpu":
        return verify.main(options)
    print(info())
    return 0


if __name__ == "__main__":
    sys.exit(main())
