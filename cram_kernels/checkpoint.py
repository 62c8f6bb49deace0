"""Checkpoints that a kill cannot spoil."""

import os
from pathlib import Path
from typing import Any

import torch

from .atomic import replacing


def save(obj: Any, path: str | os.PathLike[str]) -> None:
    """torch.save to a new file beside `path`, which then takes its place in one step.

    Whatever is raised, or kills the process, `path` (or what a link there points to) holds the old checkpoint or the new one. The folder
    must exist. A process that is killed meanwhile leaves an unfinished `.NAME.*.partial` there.

    Args:
        obj: what `torch.save` can write, such as a dict of state dicts.
        path: a file, or the name of a new one.

    Raises:
        TypeError: `path` is no path, as when both arguments are swapped.
        ValueError: `path` is a folder or a device.
        OSError: the folder does not exist, or the file cannot be written. The old file is unharmed.

    Example:
        save({"model": model.state_dict(), "optimizer": opt.state_dict()}, "checkpoint.pt")
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"save: path, the second argument, must be a path, got {type(path).__name__}")
    with replacing("save", Path(path)) as partial:
        torch.save(obj, partial)
