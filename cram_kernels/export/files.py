"""Reading weights from files: safetensors (ours of every format, and others'), torch checkpoints, ONNX."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import bitmask, container, cutlass
from .weights import Weight, weights_of

DECODERS = {"dense": container.take, bitmask.NAME: bitmask.decode, cutlass.NAME: cutlass.decode}
NESTED = ("state_dict", "model_state_dict", "model")  # where checkpoints keep the state dict of their model


def read(path: str | Path) -> dict[str, Tensor]:
    """The dense state dict in a file.

    Args:
        path: a file that `export` wrote, any other safetensors file, a torch checkpoint (weights_only), in which the state dict may lie
            under "state_dict", "model_state_dict" or "model", or the index of a model in several files (model.safetensors.index.json).

    Raises:
        FileNotFoundError, ValueError: no such file, or not one of these.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if not path.is_file():
        raise FileNotFoundError(f"read: path must be a file, got {str(path)!r}, which is {'a folder' if path.is_dir() else 'not there'}")
    if path.suffix == ".onnx":
        raise ValueError(f"read: path must be a safetensors file or a torch checkpoint, got the ONNX model {str(path)!r}")
    return _parts(path) if path.suffix == ".json" else _checkpoint(path)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """`read` of a safetensors file, whatever its name."""
    own, tensors = container.opened("read", path)
    if own is None:
        return tensors
    state = {
        name: DECODERS[entry["stored"]](name, tensors, entry["dtype"], tuple(entry["shape"]), path)
        for name, entry in own["tensors"].items()
    }
    return state | {alias: state[name] for alias, name in own["aliases"].items()}


def _parts(index: Path) -> dict[str, Tensor]:
    """A model in several files, as Hugging Face's libraries write it: the index says which tensor is where."""
    try:
        places = dict(json.loads(index.read_text())["weight_map"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"read: path must be an index with a weight_map, got {str(index)!r}: {error!r}") from error
    for name, file in places.items():
        if not isinstance(file, str) or Path(file).suffix == ".json":  # an index of indices could name itself
            raise ValueError(f"read: the weight_map of {str(index)!r} must name the file of {name!r}, with tensors, got {file!r}")
    files = {name: read(index.parent / name) for name in sorted(set(places.values()))}
    if lost := [name for name, file in places.items() if name not in files[file]]:
        raise ValueError(f"read: {index.parent / places[lost[0]]} must have the tensor {lost[0]!r}, as {index.name} says, got none")
    return {name: files[file][name] for name, file in places.items()}


def _checkpoint(path: Path) -> dict[str, Tensor]:
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch's unpickler meets in a file that is none
        raise ValueError(f"read: path must be a torch checkpoint that weights_only loads, got {str(path)!r}: {_short(error)}") from error
    where = ""
    for key in NESTED:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state, where = state[key], f" under {key!r}"
            break
    if not isinstance(state, dict) or not state:
        raise ValueError(f"read: path must hold a state dict, got {str(path)!r}, which holds {_kind(state)}{where}")
    if unnamed := [name for name in state if not isinstance(name, str)]:
        raise ValueError(
            f"read: path must hold a state dict, got {str(path)!r}, whose entry {unnamed[0]!r}{where} has no string for a name"
        )
    if strange := [name for name, t in state.items() if not isinstance(t, Tensor)]:
        raise ValueError(
            f"read: path must hold a state dict (at the top, or under {', '.join(map(repr, NESTED))}), got {str(path)!r}, "
            f"whose entry {strange[0]!r}{where} is {_kind(state[strange[0]])}"
        )
    return state


def _kind(x: object) -> str:
    return f"an empty {type(x).__name__}" if x in ({}, [], ()) else f"of type {type(x).__name__}"


def _short(error: Exception) -> str:
    """torch says in a page that one may load with weights_only=False, which nobody should do with a file that he only wants to look at."""
    found = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    if found is None:
        return str(error).partition("\n")[0] or type(error).__name__
    reason = found[1].partition(". Please")[0]
    return f"{reason}; save model.state_dict(), not objects" if "global" in reason.lower() else reason


def weights_in(path: str | Path) -> list[Weight]:
    """The weights in a file, as the checker wants them.

    Raises:
        FileNotFoundError, ValueError: as `read`.
        ImportError: the package that reads this kind of file is not installed.
    """
    path = Path(path)
    if path.suffix == ".onnx" and path.is_file():
        from .onnx_weights import onnx_weights

        return onnx_weights(path)
    return weights_of(read(path))
