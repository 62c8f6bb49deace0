"""A pruned model, layer by layer, onto sparse weights where they are faster, and back."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..params import check_module, check_unperturbed
from ..schedule import is_number
from .modules import VALUES, SparseConv2d, SparseLayer, SparseLinear, Tie, load_sparse_weight, why_no_convolution
from .trial import Input, Trial, plan_from, try_layer

Inputs = dict[nn.Module, set[Input]]  # the shapes and strides of what each layer gets

MAX_DENSITY = 0.75  # above, no layer was ever faster: not tried
DEFAULT_ROWS = (1, 32)  # rows of input that a Linear is tried with where no example says more


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Example:
        [layer.name for layer in sparsify(model.eval(), (images,)).rows]
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    density: float
    trials: tuple[Trial, ...]
    why_dense: str | None  # None: it is sparse now
    weight_bytes: int  # of the weight, as it is now

    @property
    def speedup(self) -> float | None:
        """Of the slowest trial; None where none was made."""
        return min((trial.speedup for trial in self.trials), default=None)


@dataclass(frozen=True)
class SparsifyReport:
    """One row a layer, in the order of the model.

    Example:
        report = sparsify(model.eval(), (images,))
        print(report)
    """

    rows: list[LayerReport] = field(default_factory=list)

    @property
    def sparse(self) -> list[LayerReport]:
        """The rows of the layers that are sparse now."""
        return [row for row in self.rows if row.why_dense is None]

    def __str__(self) -> str:
        lines = []
        for row in self.rows:
            state = "sparse" if row.why_dense is None else f"dense: {row.why_dense}"
            lines.append(f"{row.name}  {row.kind} {list(row.shape)}  density {row.density:.3f}  {state}")
            lines += [f"    {trial}" for trial in row.trials]
        dense_bytes = sum(4 * torch.Size(row.shape).numel() for row in self.rows)
        own = sum(row.weight_bytes for row in self.rows)
        lines.append(
            f"{len(self.sparse)} of {len(self.rows)} layers are sparse; weights {own / 1e6:.1f} MB, dense {dense_bytes / 1e6:.1f} MB"
        )
        return "\n".join(lines)


def sparsify(
    model: nn.Module,
    example_inputs: Sequence[Any] | None = None,
    *,
    example_kwargs: dict[str, Any] | None = None,
    min_speedup: float = 1.1,
    values: torch.dtype = torch.float32,
) -> SparsifyReport:
    """Put the Linear and Conv2d layers of a pruned model on sparse weights, in place, where that is faster on this CPU.

    Every layer is timed beside its dense self, on inputs of the shapes that it gets when the model runs on `example_inputs`, with the
    present number of threads. It becomes a `SparseLinear` or `SparseConv2d` where it is at least `min_speedup` times as fast for all of
    these shapes and takes no more memory. All others keep their dense weight. Dense weights of sparse layers are freed, unless something
    else holds them, such as an optimizer.

    Args:
        model: in eval mode, on the CPU. Layers of type nn.Linear or nn.Conv2d (groups 1) in float32 take part; subclasses stay dense.
        example_inputs: positional arguments of the model, such as `(images,)`. Without them Linear layers are tried with 1 and 32 rows
            and convolutions stay dense, since their speed depends on the size of the image.
        example_kwargs: keyword arguments of the model.
        min_speedup: at least 1.
        values: torch.bfloat16 rounds the weights of sparse layers, which then take 2 bytes a non-zero less. Inputs, sums and outputs stay
            float32.

    Raises:
        ValueError: min_speedup is below 1, values is another dtype, or the model is in training mode.
        RuntimeError: weights are perturbed, within a step of an optimizer. The model is as it was.

    Example:
        >>> prune(model, TopK(sparsity=0.9))
        >>> print(sparsify(model.eval(), (images,)))
    """
    check_module("sparsify", model)
    if not is_number(min_speedup) or min_speedup < 1:
        raise ValueError(f"sparsify: min_speedup must be at least 1, got {min_speedup!r}")
    if values not in VALUES:
        raise ValueError(f"sparsify: values must be torch.float32 or torch.bfloat16, got {values!r}")
    if model.training:
        raise ValueError("sparsify: model must be in eval mode, got training mode: sparse layers have no backward")
    check_unperturbed("sparsify", model.named_parameters())
    seen = _seen_inputs(model, example_inputs, example_kwargs)
    replacements: dict[nn.Module, nn.Module] = {}
    rows = []
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, nn.Conv2d)) or isinstance(module, SparseLayer):
            continue
        row, layer = _decide(name, module, _why_left_out(model, name, module), seen, min_speedup, values)
        rows.append(row)
        if layer is not None:
            replacements[module] = layer
        elif all(getattr(hook, "hook", None) is not load_sparse_weight for hook in module._load_state_dict_pre_hooks.values()):
            module.register_load_state_dict_pre_hook(load_sparse_weight)
    _replace(model, replacements)
    return SparsifyReport(rows)


def to_dense(model: nn.Module) -> nn.Module:
    """Put every sparse layer of a model back on a dense weight, in place, with the same bits.

    A Parameter that something still holds since `sparsify`, such as an optimizer or a tied layer, is the layer's again, so the same
    optimizer goes on. All others are new ones, which layers share that shared one before. A model that is a sparse layer itself is not
    changed.

    Args:
        model: with layers that `sparsify` made, or without any. Weights that were rounded to bfloat16 stay rounded.

    Returns:
        The same model; of a single sparse layer its dense one. Weights are float32.

    Raises:
        ValueError: not a module.
        RuntimeError: an optimizer that holds such a Parameter is within a step. Nothing was changed.

    Example:
        sparsify(model.eval(), (images,))
        to_dense(model)
    """
    check_module("to_dense", model)
    if isinstance(model, SparseLayer):
        return model.to_dense()
    sparse = {name: module for name, module in model.named_modules() if isinstance(module, SparseLayer)}
    check_unperturbed("to_dense", ((f"{name}.{own}", p) for name, m in sparse.items() for own, p in m.parameters_of_dense().items()))
    made: dict[Tie, nn.Parameter] = {}
    _replace(model, {module: module.to_dense_with(made) for module in sparse.values()})
    return model


def _replace(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Under all names, also where a layer has several."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replacements:
                parent._modules[name] = replacements[child]


def _seen_inputs(model: nn.Module, args: Sequence[Any] | None, kwargs: dict[str, Any] | None) -> Inputs | None:
    """What each layer gets while the model runs on the examples; None without examples."""
    if args is None and kwargs is None:
        return None
    if not isinstance(args, (tuple, list, type(None))):
        raise TypeError(f"sparsify: example_inputs must be a tuple of the model's arguments, got {type(args).__name__}: write (x,)")
    seen: Inputs = {}

    def note(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = inputs[0] if inputs else named.get("input")
        if isinstance(x, Tensor):
            like = torch.empty_like(x, device="meta")  # of the same memory format, where x has no gaps
            seen.setdefault(module, set()).add((tuple(x.shape), None if like.is_contiguous() else like.stride()))

    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in layers]
    try:
        # What was compiled before would not call the hooks.
        with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
            model(*(args or ()), **(kwargs or {}))
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _why_left_out(model: nn.Module, name: str, module: nn.Linear | nn.Conv2d) -> str | None:
    weight = module.weight
    if name == "":
        return "the model is this layer itself: use SparseLinear or SparseConv2d"
    if type(module) not in (nn.Linear, nn.Conv2d):
        return f"{type(module).__name__} is a subclass, whose own code may read the weight"
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        return f"the weight is {weight.dtype} on {weight.device}, not float32 on the CPU"
    if isinstance(module, nn.Conv2d) and (why := why_no_convolution(module)) is not None:
        return f"the convolution would have to {why}"
    if weight.numel() == 0:
        return "the weight is empty"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has hooks, which a new layer would lose"
    if "forward" in vars(module):  # as accelerate's hooks do
        return "its forward was replaced, which a new layer would lose"
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        return "torch's fused kernel of nn.TransformerEncoderLayer reads dense weights: torch.backends.mha.set_fastpath_enabled(False)"
    return None


def _decide(
    name: str, module: nn.Linear | nn.Conv2d, why: str | None, seen: Inputs | None, min_speedup: float, values: torch.dtype
) -> tuple[LayerReport, SparseLayer | None]:
    weight = module.weight
    known = weight.device.type == "cpu" and not weight.is_complex()
    density = weight.count_nonzero().item() / max(1, weight.numel()) if known else 1.0
    trials: list[Trial] = []
    layer: SparseLayer | None = None
    if why is None and density > MAX_DENSITY:
        why = f"density above {MAX_DENSITY} does not pay"
    if why is None:
        inputs = _inputs(module, seen)
        timed = [own for own in inputs if 0 not in own[0]]
        if not inputs:
            why = "no example input reached it" if seen is not None else "without example_inputs the size of its input is unknown"
        elif not timed:
            why = f"the example input that reached it is empty, {list(inputs[0][0])}: there is nothing to time"
        else:
            layer = SparseLinear(module, values) if isinstance(module, nn.Linear) else SparseConv2d(module, values)
            layer.train(module.training)
            if layer.weight_bytes > weight.nbytes:  # fewer than 16 outputs, which are stored as 16
                why = f"sparse it would take {layer.weight_bytes:,} bytes, dense it takes {weight.nbytes:,}"
            else:
                trials = [try_layer(module, layer, *own) for own in timed]
                layer.plan = plan_from(trials)
                slowest = min(trials, key=lambda trial: trial.speedup)
                if slowest.speedup < min_speedup:
                    why = f"{slowest.speedup:.2f}x on {list(slowest.input_shape)}, less than {min_speedup:g}x"
    layer = layer if why is None else None
    weight_bytes = weight.nbytes if layer is None else layer.weight_bytes
    return LayerReport(name, type(module).__name__, tuple(weight.shape), density, tuple(trials), why, weight_bytes), layer


def _inputs(module: nn.Module, seen: Inputs | None) -> list[Input]:
    """What to try."""
    if seen is not None:
        return sorted(seen.get(module, set()), key=lambda own: (own[0], own[1] or ()))
    if isinstance(module, nn.Linear):
        return [((rows, module.in_features), None) for rows in DEFAULT_ROWS]
    return []
