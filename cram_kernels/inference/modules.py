"""nn.Linear and nn.Conv2d on sparse weights, for inference on a CPU."""

import copy
from collections.abc import Callable
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..params import check_unperturbed
from ..warning import warn
from . import ops
from .view import ReadOnly
from .weights import best_layout, check_weight, elements, from_bitmask, pack, stored, to_bitmask, unpack

VALUES = (torch.float32, torch.bfloat16)  # dtypes of what is stored


class Tie:
    """A Parameter from which sparse layers were made, which they do not keep alive: those of one tie share one again."""


TIES = WeakTensorKeyDictionary()  # Parameter -> its Tie


class Held:
    """A Parameter from which a layer was made, or none, which this does not keep alive. A deep copy means the copy of that Parameter, if it
    is copied along, as that of a tied embedding is; a pickle means none."""

    def __init__(self, p: nn.Parameter | None = None, written: bool = False) -> None:
        self._parameter: Callable[[], nn.Parameter | None] = (lambda: None) if p is None else ref(p)
        self._version = -1 if p is None or written else p._version

    def __call__(self) -> nn.Parameter | None:
        return self._parameter()

    @property
    def written(self) -> bool:
        """Whether the Parameter was written to since the layer was made."""
        p = self()
        return p is not None and p._version != self._version

    def __deepcopy__(self, memo: dict[int, Any]) -> "Held":
        return Held(copy.deepcopy(self(), memo), self.written)  # the memo keeps the copy while others may ask for it

    def __reduce__(self) -> Any:
        return Held, ()


class SparseLayer(nn.Module):
    """What both layers share. The weight is held packed, about 5.4 bytes a non-zero, 3.4 in bfloat16, with no dense copy.

    The state dict has `weight.values` and `weight.bitmask`, as files of the export format "bitmask" have them, in place of `weight`;
    a state dict with a dense `weight` is loaded too.

    Args:
        dense: the layer whose weight and bias are taken; it is not changed.
        values: the dtype of what is stored, torch.float32 or torch.bfloat16.

    Raises:
        ValueError: `values` is another dtype, or the weight is not float32.

    Example:
        [m for m in model.modules() if isinstance(m, SparseLayer)]
    """

    packed: Tensor
    bias: Tensor | None
    form: Tensor  # the layout of `packed` and the plan, as the ops want them
    no_bias: Tensor | None  # zeros, where there is none

    def __init__(self, dense: Any, values: torch.dtype = torch.float32) -> None:
        super().__init__()
        if values not in VALUES:
            raise ValueError(f"{type(self).__name__}: values must be torch.float32 or torch.bfloat16, got {values!r}")
        self._values = values
        weight, bias = dense.weight, dense.bias
        check_weight(weight)
        self.weight_shape = tuple(weight.shape)
        self.register_buffer("packed", None, persistent=False)
        self.register_buffer("form", None, persistent=False)
        self._hold(weight.detach())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.register_buffer("no_bias", torch.zeros(len(weight), dtype=torch.float32) if bias is None else None, persistent=False)
        # For the way back. Weakly: the dense weight is freed unless something else holds it, whose memory is not ours to empty.
        given = {name: p for name, p in (("weight", weight), ("bias", bias)) if isinstance(p, nn.Parameter)}
        self._trained = {name: p.requires_grad for name, p in given.items()}
        self._dense = {name: Held(p) for name, p in given.items() if not p.is_inference()}
        self._ties = {name: TIES.setdefault(p, Tie()) for name, p in given.items()}
        self._hooks_of_dense = dense._state_dict_hooks  # of an optimizer that is attached to the model

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle belongs to no optimizer."""
        return {**self.__dict__, "_hooks_of_dense": {}}

    def parameters_of_dense(self) -> dict[str, nn.Parameter]:
        """The Parameters from which the layer was made, of those that an optimizer or another layer still holds."""
        sizes = {"weight": self.weight_shape, "bias": self.weight_shape[:1]}
        found = {name: p for name, held in self._dense.items() if (p := held()) is not None}
        return {name: p for name, p in found.items() if (p.shape, p.dtype, p.is_cpu) == (sizes[name], torch.float32, True)}

    def _hold(self, weight: Tensor) -> None:
        layout = best_layout(weight, self._values)
        self.packed, self.layout, self.form = pack(weight, layout), layout, layout.form(self.plan if hasattr(self, "layout") else [])

    @property
    def plan(self) -> list[int]:
        """(largest number of columns, tile), ...: how many columns of the product are handled together."""
        return self.form[len(self.layout.numbers()) :].tolist()

    @plan.setter
    def plan(self, plan: list[int]) -> None:
        self.form = self.layout.form(plan)

    @property
    def weight(self) -> Tensor:
        """The dense weight, made anew at every access, so that it refuses to be written to: for code that asks for its shape or dtype."""
        return self._unpacked().as_subclass(ReadOnly)

    def _unpacked(self) -> Tensor:
        return unpack(self.packed, self.layout, self.weight_shape)

    @property
    def nonzeros(self) -> int:
        """Elements that are stored."""
        return elements(self.packed, self.layout)[1].numel()

    @property
    def density(self) -> float:
        """Share of the elements that are stored."""
        return self.nonzeros / max(1, torch.Size(self.weight_shape).numel())

    @property
    def weight_bytes(self) -> int:
        """Memory of the weight."""
        return self.packed.nbytes

    def to_dense(self) -> nn.Module:
        """The dense layer, with the same bits, and with the Parameters that it had where something still holds them. A weight that was
        rounded to bfloat16 stays so, unless its Parameter is still held, which was not rounded."""
        return self.to_dense_with({})

    @torch.inference_mode(False)  # Parameters that are made in this mode could not be trained
    def to_dense_with(self, made: dict[Tie, nn.Parameter]) -> nn.Module:
        """As `to_dense`, for one layer of several that are tied.

        Args:
            made: the Parameters of layers that are dense again, for those that are tied to them; new ones are added.
        """
        dense, values = self._dense_layer(), {"weight": self._unpacked(), "bias": self.bias}
        if self._hooks_of_dense:
            dense._state_dict_hooks = self._hooks_of_dense
        held = self.parameters_of_dense()
        check_unperturbed("to_dense", held.items())
        for name, t in values.items():
            if t is None:
                continue
            if name in held and self._dense[name].written and not torch.equal(held[name], t):
                shape = tuple(t.shape)
                warn(f"to_dense: a {name} of shape {shape} is a new Parameter: the old one was written to since, and stays as it is")
                del held[name]
            tie = self._ties.get(name, Tie())
            p = held[name] if name in held else made.get(tie)
            if p is None or (name not in held and not torch.equal(p, t)):  # loaded since then, each with values of its own
                p = nn.Parameter(torch.empty_like(t), self._trained.get(name, True))
            unrounded = self._values != torch.float32 and name in held and torch.equal(p.detach().to(self._values).float(), t)
            if not unrounded:
                with torch.no_grad():
                    p.copy_(t)
            dense._parameters[name] = made[tie] = p
        return dense.train(self.training)

    def _dense_layer(self) -> nn.Module:
        """On the meta device."""
        raise NotImplementedError

    def _multiply(self, op: Any, input: Tensor, *sizes: list[int]) -> Tensor:
        if input.requires_grad and torch.is_grad_enabled():
            ops.refuse_autograd(type(self).__name__)
        own = self._buffers  # attribute access through nn.Module takes longer than small products
        bias = own["bias"]
        x = input if input.is_contiguous() else input.contiguous()
        arguments = (x, own["packed"], own["no_bias"] if bias is None else bias, own["form"], *sizes)
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return op(*arguments)
        with torch._C._AutoDispatchBelowAutograd():  # whose kernel, which could only refuse, takes 10 us
            return op(*arguments)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        values, mask = to_bitmask(self.packed, self.layout)
        destination[f"{prefix}weight.values"], destination[f"{prefix}weight.bitmask"] = values, mask

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], unexpected: list[str], errors: list[str]
    ) -> None:
        dense, values, mask = (f"{prefix}weight{part}" for part in ("", ".values", ".bitmask"))
        weight, wrong, bias = None, len(errors), self.bias
        before = None if bias is None else bias.clone()
        try:
            if dense in state_dict:
                given = stored("weight", state_dict[dense])
                if tuple(given.shape) != self.weight_shape:
                    raise ValueError(f"weight must have the shape {list(self.weight_shape)}, got {list(given.shape)}")
                check_weight(given)
                weight = given
            elif values in state_dict and mask in state_dict:
                weight = from_bitmask(stored("values", state_dict[values]), stored("bitmask", state_dict[mask]), self.weight_shape)
            else:
                missing.extend(name for name in (values, mask) if name not in state_dict)
        except ValueError as error:
            errors.append(f"{prefix}weight: {error}")
        rest = {name: value for name, value in state_dict.items() if name not in (dense, values, mask)}
        super()._load_from_state_dict(rest, prefix, metadata, strict, missing, unexpected, errors)
        if len(errors) == wrong:
            if weight is not None:
                self._hold(weight)
        elif bias is not None and before is not None:  # neither, where one does not fit
            with torch.no_grad():
                bias.copy_(before)
            self.bias = bias

    def _describe(self) -> str:
        return f"bias={self.bias is not None}, density={self.density:.3g}"


def load_sparse_weight(
    module: Any, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], unexpected: list[str], errors: list[str]
) -> None:
    """A hook of a dense layer, before it loads a state dict: what a sparse layer of this name saved is its weight."""
    values, mask = (f"{prefix}weight.{part}" for part in ("values", "bitmask"))
    if f"{prefix}weight" not in state_dict and values in state_dict and mask in state_dict:
        try:
            parts = stored("values", state_dict.pop(values)), stored("bitmask", state_dict.pop(mask))
            state_dict[f"{prefix}weight"] = from_bitmask(*parts, tuple(module.weight.shape))
        except ValueError as error:
            errors.append(f"{prefix}weight: {error}")


class SparseLinear(SparseLayer):
    """nn.Linear with a sparse weight: y = x W^T + b, float32, on a CPU, without gradients.

    Args:
        linear: a dense float32 layer; it is not changed.
        values: torch.bfloat16 rounds what is stored of the weight, and saves 2 bytes a non-zero; sums stay float32.

    Input [..., in_features], output [..., out_features]. A weight that is zero is skipped: 0 * Inf makes no NaN there.

    Raises:
        ValueError: the weight is not float32, or values is another dtype.

    Example:
        >>> layer = SparseLinear(pruned_linear)
        >>> with torch.inference_mode():
        ...     y = layer(x)
    """

    def __init__(self, linear: nn.Linear, values: torch.dtype = torch.float32) -> None:
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"SparseLinear: linear must be an nn.Linear, got {type(linear).__name__}")
        super().__init__(linear, values)
        self.out_features, self.in_features = self.weight_shape

    def forward(self, input: Tensor) -> Tensor:
        """The product with the sparse weight, plus the bias.

        Args:
            input: float32 [..., in_features], on the CPU. It is copied where it is not contiguous.

        Returns:
            float32 [..., out_features], contiguous.

        Raises:
            RuntimeError: the input has another dtype or last dim, or needs a gradient.
            ValueError: it is on another device than the layer.

        Example:
            with torch.inference_mode():
                y = SparseLinear(pruned_linear)(x)
        """
        return self._multiply(ops.sparse_linear, input)

    def _dense_layer(self) -> nn.Linear:
        return nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._describe()}"


class SparseConv2d(SparseLayer):
    """nn.Conv2d with a sparse weight: groups 1, zero padding, any kernel, stride and dilation; float32, on a CPU, without gradients.

    Args:
        conv: a dense float32 layer; it is not changed.
        values: as for SparseLinear.

    Input [B, C, H, W] or [C, H, W] in any memory format; the output is contiguous.
    A weight that is zero is skipped: 0 * Inf makes no NaN there.

    Raises:
        ValueError: groups, another padding than zeros, a padding that differs between two sides; or as for SparseLinear.

    Example:
        sparse = SparseConv2d(model.conv)
    """

    def __init__(self, conv: nn.Conv2d, values: torch.dtype = torch.float32) -> None:
        if not isinstance(conv, nn.Conv2d):
            raise ValueError(f"SparseConv2d: conv must be an nn.Conv2d, got {type(conv).__name__}")
        if (why := why_no_convolution(conv)) is not None:
            raise ValueError(f"SparseConv2d: conv must {why}")
        super().__init__(conv, values)
        self.out_channels, self.in_channels, *kernel = self.weight_shape
        self.kernel_size, self.stride, self.dilation = kernel, list(conv.stride), list(conv.dilation)
        self.padding = _padding(conv)

    def forward(self, input: Tensor) -> Tensor:
        """The convolution with the sparse weight, plus the bias.

        Args:
            input: float32 [B, C, H, W] or [C, H, W], on the CPU. It is copied where it is not contiguous, as in channels_last.

        Returns:
            float32 [B, out_channels, H', W'] or [out_channels, H', W'], contiguous, of nn.Conv2d's sizes.

        Raises:
            RuntimeError: the input has another dtype or number of channels, is smaller than the kernel, or needs a gradient.
            ValueError: it is on another device than the layer.

        Example:
            with torch.inference_mode():
                y = SparseConv2d(model.conv)(images)
        """
        batch = input if input.dim() == 4 else input.unsqueeze(0)
        output = self._multiply(ops.sparse_conv2d, batch, self.kernel_size, self.stride, self.padding, self.dilation)
        return output if input.dim() == 4 else output.squeeze(0)

    def _dense_layer(self) -> nn.Conv2d:
        pairs: dict[str, Any] = {name: tuple(getattr(self, name)) for name in ("kernel_size", "stride", "padding", "dilation")}
        return nn.Conv2d(self.in_channels, self.out_channels, bias=self.bias is not None, device="meta", **pairs)

    def extra_repr(self) -> str:
        pairs = ", ".join(f"{name}={tuple(getattr(self, name))}" for name in ("kernel_size", "stride", "padding", "dilation"))
        return f"{self.in_channels}, {self.out_channels}, {pairs}, {self._describe()}"


def _padding(conv: nn.Conv2d) -> list[int]:
    left_right = conv._reversed_padding_repeated_twice  # of the last axis first; what "same" and "valid" mean
    return [left_right[2], left_right[0]]


def why_no_convolution(conv: nn.Conv2d) -> str | None:
    """What a convolution must be to be a SparseConv2d and is not; None where it can be one."""
    if conv.groups != 1:
        return f"have groups=1, got {conv.groups}"
    if conv.padding_mode != "zeros":
        return f"be padded with zeros, got padding_mode={conv.padding_mode!r}"
    left, right, top, bottom = conv._reversed_padding_repeated_twice
    return None if (left, top) == (right, bottom) else f"be padded alike on both sides, got {(left, right, top, bottom)}"
