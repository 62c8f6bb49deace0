"""Reading weights from files: safetensors (ours of every format, and others'), torch checkpoints, ONNX."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import bitmask, container, cutlass
from .weights import Weight, weights_of

DECODERS = {"dense": container.take, bitmask.NAME: bitmask.decode, cutlass.NAME: cutlass.decode}
NESTED = ("state_dict", "model_state_dict", "model")  # where checkpoints keep the state dict of their model


def read(path: str | Path) -> dict[str, Tensor]:
    """The dense state dict in a file: one that `export` wrote, any other safetensors file, or a torch checkpoint (weights_only).

    In a checkpoint it may lie under "state_dict", "model_state_dict" or "model".

    Raises:
        FileNotFoundError, ValueError: no such file, or not one of these.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"read: path must be a file, got {str(path)!r}, which is not there")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if path.suffix == ".onnx":
        raise ValueError(f"read: path must be a safetensors file or a torch checkpoint, got the ONNX model {str(path)!r}")
    return _checkpoint(path)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """`read` of a safetensors file, whatever its name."""
    container.safetensors()
    try:
        own, tensors = container.read_manifest(path), container.load(path)
    except Exception as error:  # safetensors has an exception of its own for a broken file
        raise ValueError(f"read: path must be a safetensors file that this version knows, got {str(path)!r}: {error}") from error
    if own is None:
        return tensors
    state = {}
    for name, entry in own["tensors"].items():
        decode = DECODERS[entry["stored"]]
        state[name] = decode(name, tensors, entry["dtype"], tuple(entry["shape"]), path)
    return state | {alias: state[name] for alias, name in own["aliases"].items()}


def _checkpoint(path: Path) -> dict[str, Tensor]:
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"read: path must be a torch checkpoint that weights_only loads, got {str(path)!r}: {error}") from error
    for key in NESTED:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict) or not state or not all(isinstance(t, Tensor) for t in state.values()):
        where = ", ".join(map(repr, NESTED))
        raise ValueError(f"read: path must hold a state dict (at the top, or under {where}), got {str(path)!r}, which holds none")
    return state


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
