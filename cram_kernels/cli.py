"""The program `cram-kernels`, also `python -m cram_kernels`: info, check, prune, export, bench."""

import argparse
import contextlib
import importlib
import json
import os
import platform
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from . import _native, backend
from .export import cli as export_cli
from .terminal import Help, Parser, say, show
from .version import __version__

OK, REFUSED, CANNOT, UNCHECKED = 0, 1, 2, 3
INTERRUPTED, CLOSED = 130, 141  # as shells have it: 128 + SIGINT, 128 + SIGPIPE
DESCRIPTION = "Train networks that can be pruned in one shot: look at what is installed, prune a checkpoint, check and export it, measure."
STATUSES = """
Exit status:
  0  done; what was checked is right
  1  checked and refused: a tensor violates the pattern or none has it, a result
     is wrong, a figure is worse than before
  2  cannot: a file cannot be read or written, an argument is wrong, something
     that is needed is missing
  3  check only: something that may be a weight could not be checked
  130  interrupted by Ctrl-C; no file was changed
  141  the reader of the output closed it, as `head` does

Colours only on a terminal, and not where NO_COLOR is set.
"""


def facts() -> dict[str, str]:
    """Version, torch, backends with the reason why one is missing, compiler, SIMD level, GPU archs."""
    host = _native.host
    found = {
        "cram_kernels": __version__,
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
    }
    for name, reason in backend.available().items():
        found[f"backend {name}"] = "available" if reason is None else f"missing: {reason}"
    found["backend chosen"] = _chosen_backend()
    if host is not None:
        found |= {
            "compiler": host.compiler,
            "built against torch": host.torch_built_with,
            "SIMD level": _simd_level(host),
            "GPU archs built": host.gpu_archs or "none",
        }
    return found


def info(options: argparse.Namespace) -> int:
    found = facts()
    width = max(map(len, found))
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        show("\n".join(f"{name:{width}}  {value}" for name, value in found.items()))
    return OK


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


def bench(argv: list[str]) -> int:
    """The benchmarks of a checkout, where they lie beside the package; a wheel does not have them."""
    checkout = Path(__file__).resolve().parent.parent
    if not (checkout / "benchmarks" / "suite.py").is_file():
        raise ValueError("benchmarks are part of a checkout, not of the installed package: clone the repository, then `make bench`")
    sys.path.insert(0, str(checkout))
    return importlib.import_module("benchmarks.suite").main(argv, prog="cram-kernels bench")


def parser() -> argparse.ArgumentParser:
    made = Parser(prog="cram-kernels", description=DESCRIPTION, epilog=STATUSES, formatter_class=Help)
    made.add_argument("--version", action="version", version=f"cram_kernels {__version__}")
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    own = commands.add_parser(
        "info",
        help="what is installed, built and chosen here",
        description="Versions, which backends run here and why one is missing, the compiler, the SIMD level, the GPU archs.",
        epilog="Example:\n  cram-kernels info --json",
        formatter_class=Help,
    )
    own.add_argument("--json", action="store_true", help="as a JSON object")
    own.set_defaults(run=info)
    export_cli.add_commands(commands)
    commands.add_parser("bench", add_help=False, help="measure ops and whole steps here (in a checkout)")
    return made


def main(argv: list[str] | None = None) -> int:
    """Run a command. Returns the exit status, see STATUSES."""
    argv = sys.argv[1:] if argv is None else argv
    command, before = argv[0] if argv and not argv[0].startswith("-") else "cram-kernels", warnings.showwarning
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    try:
        with _written_output():
            if command == "bench":
                return bench(argv[1:])
            options = parser().parse_args(argv)
            return options.run(options)
    except BrokenPipeError:  # the reader, `head` for one, has enough
        return CLOSED
    except KeyboardInterrupt:
        say(f"{command}: interrupted")
        return INTERRUPTED
    except Exception as error:
        return _cannot(command, error)
    finally:
        warnings.showwarning = before
        try:
            sys.stderr.flush()
        except OSError:
            _give_up(sys.stderr)


@contextlib.contextmanager
def _written_output() -> Iterator[None]:
    """What was printed is written when the block ends, help texts too; an OSError where it cannot be. Python itself would find that out at
    its exit, with a status of its own."""
    try:
        yield
    finally:
        try:
            sys.stdout.flush()
        except OSError as error:
            _give_up(sys.stdout)
            if isinstance(error, BrokenPipeError):
                raise
            raise OSError(f"standard output must take what is printed, got {error.strerror}") from error


def _give_up(stream: Any) -> None:
    """Nobody takes what is left in the stream: at its exit Python would try again, and end with a status of its own."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _cannot(command: str, error: Exception) -> int:
    """Whatever it was: Python's own exit status for an exception, 1, would say that a tensor violates the pattern."""
    if not isinstance(error, OSError | ValueError | ImportError | TypeError):
        traceback.print_exception(error)
    say(f"{command}: {str(error).removeprefix(f'{command}: ')}")
    return CANNOT


def _show_warning(message: Warning | str, *where: Any) -> None:
    """Without the line of our code, which tells a user of the program nothing."""
    say(f"warning: {message}")


if __name__ == "__main__":
    sys.exit(main())
