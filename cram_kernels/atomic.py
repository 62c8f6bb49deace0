"""A file that is there whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(op: str, path: Path) -> Iterator[Path]:
    """A new file beside `path` to write to; at the end of the block it takes the place of `path` in one step. Links are followed.

    Whatever is raised, or kills the process, leaves the old file, or none; a killed process also leaves the unfinished `.NAME.*.partial`.

    Raises:
        ValueError: `path` is a folder or a device; op names who asks.
    """
    path = target(op, path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        with open(partial, "r+b") as file:
            os.fsync(file.fileno())
        partial.chmod(_mode(path))  # mkstemp's are private
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _flush(path.parent)


def target(op: str, path: Path) -> Path:
    """The file that writing to `path` makes or replaces: links are followed."""
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        kind = "folder" if path.is_dir() else "device"
        raise ValueError(f"{op}: path must be a file, or not there yet, got {str(path)!r}, which is a {kind}")
    return path


def _mode(path: Path) -> int:
    """The permissions of the old file, or else those of any new one."""
    if path.exists():
        return path.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _flush(folder: Path) -> None:
    """The new name survives a power cut too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
