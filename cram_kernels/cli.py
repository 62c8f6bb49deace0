"""The command line: `python -m cram_kernels info`, `check` and `export`."""

import argparse
import platform
import sys
from typing import Any

import torch

from . import _native, backend
from .export import cli as export_cli
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
    parser = argparse.ArgumentParser(prog="cram-kernels", description="CrAM kernels.")
    parser.add_argument("--version", action="version", version=f"cram_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    own = commands.add_parser("info", help="what is installed, built and chosen here, and why a backend is missing")
    own.set_defaults(run=lambda options: print(info()) or 0)
    export_cli.add_commands(commands)
    options = parser.parse_args(argv)
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
