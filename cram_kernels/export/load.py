"""Load pruned weights into a model, and give the layers that can use them torch's semi-structured tensors."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensor, SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

from ..params import check_module
from ..patterns import NM
from ..report import table
from . import container, cutlass
from .check import check_weights
from .consumers import CUSPARSELT, CUTLASS, Consumer
from .files import read
from .report import Row
from .weights import is_masked, weights_of, without_masks

Backend = Literal["auto", "cusparselt", "cutlass", "dense"]
BACKENDS = ("auto", "cusparselt", "cutlass", "dense")
CONSUMER: dict[str, Consumer] = {"cutlass": CUTLASS, "cusparselt": CUSPARSELT}
PREFIXES = ("module.", "_orig_mod.")  # of names in a DataParallel, and of a compiled model
FUSED = {nn.MultiheadAttention: ("out_proj",), nn.TransformerEncoderLayer: ("linear1", "linear2")}


@dataclass(frozen=True)
class Loaded:
    """One tensor of the model after loading."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    backend: str  # "cusparselt", "cutlass" or "dense"
    why_dense: str | None


@dataclass(frozen=True)
class LoadReport:
    """What became of each tensor of the model; `str()` is a table.

    Attributes:
        rows: a tensor each: name, shape, dtype, the backend, or why it stayed dense.
        sparse: the rows that are semi-structured.

    Example:
        print(load_sparse(model, "model.safetensors"))
    """

    rows: tuple[Loaded, ...]

    @property
    def sparse(self) -> tuple[Loaded, ...]:
        """The rows of the tensors that are semi-structured now."""
        return tuple(row for row in self.rows if row.backend != "dense")

    def __str__(self) -> str:
        shown = [row for row in self.rows if len(row.shape) > 1]
        cells = [(r.name, " x ".join(map(str, r.shape)), r.dtype, r.backend, r.why_dense or "") for r in shown]
        head = table(("tensor", "shape", "dtype", "backend", "why dense"), cells, "<<<<<")
        return f"{head}\n{len(self.sparse)} of {len(self.rows)} tensors are semi-structured"


@torch.no_grad()
def load_sparse(model: nn.Module, path: str | Path, backend: Backend = "auto", key: str | None = None) -> LoadReport:
    """Load a file into a model and compress the weights of its Linear layers that are 2:4 and eligible, each checked anew.

    Move the model to its device and dtype first: weights are converted to the model's dtype as by `load_state_dict`.

    Args:
        model: on one device. Its Linear weights become parameters that need no gradient.
        path: whatever `read` reads; the names must be the model's, but for the prefix of a DataParallel or of a compiled model. Of tied
            names the file may have one.
        backend: "cusparselt", "cutlass" (compute capability 8.x only), "dense", or "auto": the first of these that this GPU and this torch
            have. On the CPU "auto" stays dense, and the others are refused.
        key: where the state dict lies in a torch checkpoint, as in `read`.

    Returns:
        A `LoadReport`: what every tensor became, and why.

    Raises:
        ValueError: an unknown backend, one that cannot run here, a model that has semi-structured weights already, or a file whose tensors
            do not hold the pattern of its manifest, or whose names or shapes are not the model's. Nothing was changed.

    Example:
        print(load_sparse(model, "model.safetensors"))
    """
    check_module("load_sparse", model)
    if backend not in BACKENDS:
        raise ValueError(f"load_sparse: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if sparse := [name for name, p in model.named_parameters() if isinstance(p, SparseSemiStructuredTensor)]:
        raise ValueError(f"load_sparse: model must have dense weights, got {sparse[0]!r}, which is semi-structured: make the model anew")
    if masked := is_masked(model):
        raise ValueError(f"load_sparse: model must be without masks and parametrizations, got {masked!r}: remove them first")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    chosen, why = _choose(backend, device)
    state = read(path, key)
    _recheck(Path(path), state)
    model.load_state_dict(fitting("load_sparse", model, state))
    report = check_weights(weights_of(model), NM(2, 4))
    fused = fused_weights(model)
    rows = []
    for row in report.rows:
        reason = why or fused.get(row.name) or why_dense(row, chosen)
        if reason is None:
            _compress(model, row, chosen)
        rows.append(Loaded(row.name, row.shape, row.dtype, chosen if reason is None else "dense", reason))
    return LoadReport(tuple(rows))


def why_dense(row: Row, backend: str) -> str | None:
    """None where a weight of the model can be compressed, else the reason why it stays dense."""
    if row.why_dense is not None:
        return row.why_dense
    if row.kind == "matrix":
        return "not the weight of a Linear module"
    if row.aliases:
        return f"shared with {', '.join(row.aliases)}"
    if row.dtype.startswith("float8"):
        return f"{row.dtype} runs in torch._scaled_mm only, not in a Linear"
    verdict = row.verdicts[CONSUMER[backend].name]
    if verdict.runs != "yes":
        return row.describe() if row.violations else verdict.why
    return None


def fused_weights(model: nn.Module) -> dict[str, str]:
    """Name -> why it stays dense, of the Linear weights that torch gives to a fused kernel in inference."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        for kind, parts in FUSED.items():
            if isinstance(module, kind) and torch.backends.mha.get_fastpath_enabled():
                why = f"torch's fused {kind.__name__} does not read it: torch.backends.mha.set_fastpath_enabled(False) makes it sparse"
                found |= {f"{name}.{part}.weight".removeprefix("."): why for part in parts}
    return found


def under_names_of(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict for load_state_dict: without the prefix of a wrapper, and with all names of tied weights where it has one."""
    wanted = model.state_dict().keys()
    for prefix in PREFIXES:
        if state and all(name.startswith(prefix) for name in state) and not any(name.startswith(prefix) for name in wanted):
            state = {name.removeprefix(prefix): t for name, t in state.items()}
    state = dict(state) if any(name.endswith(("_orig", ".original")) for name in wanted) else without_masks(state)
    state |= {name: t for name, t in model.state_dict().items() if name.endswith("_extra_state") and name not in state}  # files may lack it
    for weight in weights_of(model):
        names = (weight.name, *weight.aliases)
        given = [name for name in names if name in state]
        for name in names if given else ():
            state.setdefault(name, state[given[0]])
    return state


def fitting(op: str, model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`under_names_of`, of which every name and shape is the model's: load_state_dict finds that out when it has changed the others.

    Raises:
        ValueError: one is not; op names who asks.
    """
    state, own = under_names_of(model, state), model.state_dict()
    # load_state_dict fills in batch norm's counters, which old checkpoints lack
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    more = [name for name in state if name not in own]
    shapes = {name: getattr(t, "shape", None) for name, t in state.items()}
    other = [name for name in state if name in own and shapes[name] != getattr(own[name], "shape", None)]
    wrong = []
    if missing:
        wrong.append(f"no {missing[0]!r}" + _and_more(missing))
    if more:
        wrong.append(f"{more[0]!r}, which the model has not" + _and_more(more))
    if other:
        name = other[0]
        wrong.append(f"{name!r} of shape {list(state[name].shape)} where the model has {list(own[name].shape)}" + _and_more(other))
    if wrong:
        raise ValueError(f"{op}: names and shapes in the file must be the model's, got {'; '.join(wrong)}")
    return state


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _choose(backend: str, device: torch.device) -> tuple[str, str | None]:
    """The backend, or "dense" and why."""
    if backend == "dense":
        return "dense", "backend 'dense'"
    if device.type != "cuda":
        if backend != "auto":
            raise ValueError(f"load_sparse: backend {backend!r} needs a model on an NVIDIA GPU, got one on {str(device)!r}")
        return "dense", f"on {device.type}: semi-structured matrix products need an NVIDIA GPU"
    missing = {name: _why_missing(name, device) for name in CONSUMER}
    if backend == "auto":
        name = next((name for name in ("cusparselt", "cutlass") if missing[name] is None), None)
        return (name, None) if name is not None else ("dense", "; ".join(f"{name}: {why}" for name, why in missing.items()))
    if missing[backend] is not None:
        raise ValueError(f"load_sparse: backend {backend!r} must be able to run here, got: {missing[backend]}")
    return backend, None


def _why_missing(backend: str, device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    if backend == "cutlass":
        return None if major == 8 else f"torch's CUTLASS kernels run on compute capability 8.x only, got {major}.{minor}"
    if not torch.backends.cusparselt.is_available():
        return "this torch has no cuSPARSELt"
    return None if major >= 8 else f"sparse tensor cores need compute capability 8.0 or later, got {major}.{minor}"


def _recheck(path: Path, state: dict[str, Tensor]) -> None:
    """The tensors that the manifest calls n:m are."""
    own = container.read_manifest(path) if path.suffix == ".safetensors" else None
    if own is None:
        return
    pattern = NM(**own["pattern"])
    for row in check_weights(weights_of(state), pattern).rows:
        if own["tensors"][row.name]["pattern"] is not None and not row.holds:
            raise ValueError(
                f"load_sparse: {path}: {row.name!r} must be {pattern}, as its manifest says, got violations in {row.describe()}"
            )


def _compress(model: nn.Module, row: Row, backend: str) -> None:
    """The weight of a Linear becomes a semi-structured tensor."""
    module = model.get_submodule(row.name.rpartition(".")[0])
    weight = module.weight
    assert isinstance(weight, Tensor)
    module.weight = nn.Parameter(COMPRESS[backend](weight.detach().contiguous()), requires_grad=False)


def cutlass_tensor(w: Tensor) -> Any:
    """w as torch's CUTLASS tensor."""
    return _cutlass(w.shape, *cutlass.pack(w))


def cusparselt_tensor(w: Tensor) -> Any:
    with _prototype():
        return SparseSemiStructuredTensorCUSPARSELT.from_dense(w)


def _cutlass(shape: torch.Size, packed: Tensor, meta: Tensor) -> Any:
    with _prototype():
        return SparseSemiStructuredTensorCUTLASS(shape, packed, meta, None, None, None)


@contextmanager
def _prototype() -> Iterator[None]:
    """torch says once that its semi-structured tensors are a prototype; docs/inference.md says so too."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The PyTorch API of SparseSemiStructuredTensor is in prototype stage")
        yield


def read_cutlass(path: str | Path) -> dict[str, Any]:
    """The packed tensors of a "cutlass-sm80" file, for code that multiplies with them itself.

    Args:
        path: a file that `export` wrote with the format "cutlass-sm80".

    Returns:
        Name -> tensor on the CPU, in the dtype of the file. 2:4 matrices are torch's SparseSemiStructuredTensorCUTLASS, others are dense.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has another format, or is damaged.

    Example:
        prune(model, NM(2, 4))
        export(model.half(), "packed.safetensors", "cutlass-sm80")
        weights = read_cutlass("packed.safetensors")
    """
    path = Path(path)
    own, tensors = container.opened("read_cutlass", path)
    if own is None or own["format"] != cutlass.NAME:
        raise ValueError(f"read_cutlass: path must be a {cutlass.NAME!r} file, got {str(path)!r}, which is {own and own['format']!r}")
    found: dict[str, Any] = {}
    for name, entry in own["tensors"].items():
        shape = tuple(entry["shape"])
        if entry["stored"] == cutlass.NAME:
            packed, meta = cutlass.parts(name, tensors, entry["dtype"], shape, path)
            found[name] = _cutlass(torch.Size(shape), packed, meta)
        else:
            found[name] = container.take(name, tensors, entry["dtype"], shape, path)
    return found | {alias: found[name] for alias, name in own["aliases"].items()}


COMPRESS: dict[str, Callable[[Tensor], Any]] = {
    "cutlass": cutlass_tensor,
    "cusparselt": cusparselt_tensor,
}
