"""Prune the weights in a file, without the model."""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..atomic import replacing, target
from ..patterns import Pattern
from ..prune import prune
from ..report import Report
from ..warning import CrAMWarning
from . import container, files
from .weights import PARAMETRIZED
from .write import same_bits, storable

TABLE = re.compile(r"(^|\.)(emb|wte|wpe|shared|(?!\w*proj)\w*embed\w*)\.weight$")
CHECKPOINTS = (".pt", ".pth", ".ckpt", ".bin", ".tar", ".pkl", "")
# what torch stores for a layer whose weight it computes: the end of a part's name -> the ends of the others
PARTS = {"_orig": ("_mask", "_u"), "_mask": ("_orig",), "_v": ("_g",), "_g": ("_v",)}


def prune_file(
    path: str | Path,
    out: str | Path,
    pattern: Pattern,
    exclude: Iterable[str] = (),
    *,
    key: str | None = None,
    prune_embeddings: bool = False,
    progress: Callable[[str], AbstractContextManager[None]] = lambda stage: nullcontext(),
) -> Report:
    """Prune the weights in a file by the rule of `cram_kernels.prune`, and write them to another, or the same.

    A file tells tensors, not layers. So every tensor of 2 or more dims and of floating dtype counts as a weight, buffers too. A matrix
    whose name is that of an embedding table (`...embed....weight`, `wte.weight`, `wpe.weight`, `shared.weight`) stays dense. The report
    names every tensor. Batch-norm statistics are not measured anew: that takes data (`tune_batchnorm`).

    Args:
        path: as in `cram_kernels.export.read`.
        out: NAME.safetensors holds the state dict. NAME.pt, .pth, .ckpt, .bin, .tar, .pkl and a name without a dot are torch checkpoints,
            and so is the suffix of a checkpoint at `path`; made from one, it keeps all that is beside the state dict (step, optimizer,
            averages). It is replaced in one step after it was written and read back.
        pattern: `TopK(sparsity=0.9)`, ranked over all tensors or with `scope="tensor"` over each, or `NM(2, 4)`.
        exclude: patterns of names that stay dense, as in `fnmatch`.
        key: where a torch checkpoint has its state dict, as in `read`.
        prune_embeddings: prune what has the name of an embedding table too.
        progress: makes a context for each stage, which takes its time; gets its name.

    Returns:
        The report of `cram_kernels.prune`.

    Raises:
        FileNotFoundError, ValueError: as `read` and `prune`; a weight is computed from parts (masks, weight norm); nothing would be pruned;
            the file does not give back what was written. Nothing at `out` was changed.
        OSError: the file cannot be written. The old one is as it was.

    Example:
        >>> print(prune_file("model.pt", "pruned.safetensors", TopK(sparsity=0.9), exclude=["head.*"]))
    """
    path, out = Path(path), Path(out)
    if not target("prune", out).parent.is_dir():
        raise ValueError(f"prune: out must be in a folder that is there, got {str(out)!r}")
    if out.suffix not in (".safetensors", *CHECKPOINTS, *([path.suffix] if _is_checkpoint(path) else [])):
        raise ValueError(
            f"prune: out must end in .safetensors, or as a torch checkpoint in {', '.join(CHECKPOINTS[:-1])}, got {str(out)!r}"
        )
    with progress(f"reading {path}"):
        content: Any = files.checkpoint(path) if _is_checkpoint(path) else files.read(path, key)
        state = files.state_in(path, content, key) if _is_checkpoint(path) else content
    with progress(f"pruning {len(state)} tensors"), warnings.catch_warnings():
        warnings.simplefilter("ignore", CrAMWarning)  # the report has them as remarks
        report = prune(_Layers(state), pattern, exclude, prune_embeddings=prune_embeddings)
    if not report.pruned:
        raise ValueError(f"prune: path must hold weights that {pattern} prunes, got none: {'; '.join(report.remarks)}")
    with progress(f"writing {out}"), replacing("prune", out) as partial:
        if out.suffix == ".safetensors":
            _write_safetensors(partial, state, _metadata(path), out)
        else:
            torch.save(content, partial)
            found = files.checkpoint(partial)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CrAMWarning)  # reading path has said them
                found = files.state_in(partial, found, key) if _is_checkpoint(path) else found
            _same(state, found, out)
    return report


def _is_checkpoint(path: Path) -> bool:
    return path.is_file() and path.suffix not in (".safetensors", ".json", ".onnx")


class _Layers(nn.Module):
    """A state dict as `prune` wants it: parameters by name, and modules of those that are known to be tables."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        super().__init__()
        self.entries: dict[str, Tensor] = {}
        for name, t in state.items():
            if not isinstance(t, Tensor):
                continue
            if t.dim() > 1 and (other := _other_part(name, state)) is not None:
                raise ValueError(
                    f"prune: tensor {name!r} must be a weight itself, got a part of one beside {other!r}: remove the masks or norms"
                )
            self.entries[name] = nn.Parameter(t, requires_grad=False)
            if t.dim() == 2 and TABLE.search(name):
                self.add_module(f"table {len(self._modules)}", _table(self.entries[name]))

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        yield from self.entries.items()


def _table(weight: Tensor) -> nn.Module:
    table = nn.Embedding(1, 1, device="meta")
    table.weight = weight  # type: ignore[assignment]
    return table


def _other_part(name: str, state: Mapping[str, Any]) -> str | None:
    """The entry from which, together with this one, torch computes a weight; None where this one is a weight."""
    if PARAMETRIZED in f".{name}":
        return name.rpartition(".")[0]
    names = (name.removesuffix(end) + other for end, others in PARTS.items() if name.endswith(end) for other in others)
    return next((other for other in names if other in state), None)


def _metadata(path: Path) -> dict[str, str]:
    """Of a safetensors file, without our description of how its tensors are packed."""
    found = container.read_metadata(path) if path.suffix == ".safetensors" else {}
    return {name: text for name, text in found.items() if name != container.KEY}


def _write_safetensors(partial: Path, state: Mapping[str, Any], metadata: Mapping[str, str], out: Path) -> None:
    weights = storable("prune", state)
    tensors = {weight.name: weight.tensor for weight in weights}
    tensors |= {alias: weight.tensor.clone() for weight in weights for alias in weight.aliases}
    container.save(partial, tensors, metadata)
    _same(tensors, files.read_safetensors(partial), out)


def _same(state: Mapping[str, Any], found: Mapping[str, Any], out: Path) -> None:
    for name, t in state.items():
        if isinstance(t, Tensor) and t.layout == torch.strided and not t.is_quantized and not same_bits(found[name], t):
            raise ValueError(f"prune: {out} must give back {name!r}, got another tensor")
