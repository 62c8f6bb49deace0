"""The arguments of the ops on a model's shapes, and an op on them as a contestant."""

import math
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cram_kernels import ops
from cram_kernels.patterns import NM, Pattern, TopK

from . import gate
from .measure import Contest, Contestant, Row, Setup
from .shapes import Shape, shrink

Arguments = dict[str, Any]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RHO = 0.05


def tensors(shapes: list[Shape], role: str, dtype: torch.dtype, device: str, channels_last: bool = False) -> list[Tensor]:
    """Normal numbers with the scale of an initialisation (1 / sqrt of the fan-in), ten times smaller for what is not a weight."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(role.encode()))
    made = []
    for shape in shapes:
        t = torch.randn(shape, generator=generator, device=device)
        t /= math.sqrt(math.prod(shape[1:])) * (1 if role in ("params", "masters") else 10)
        t = (t.square_() if role == "exp_avg_sqs" else t).to(dtype)
        made.append(t.contiguous(memory_format=torch.channels_last) if channels_last and t.dim() == 4 else t)
    return made


def masks(shapes: list[Shape], pattern: Pattern, device: str) -> list[Tensor]:
    """Random bits where the pattern prunes, else absent."""
    generator = torch.Generator(device).manual_seed(0)
    made = []
    for shape in shapes:
        numel = math.prod(shape) if pattern.why_dense(torch.Size(shape)) is None else 0
        mask = torch.randint(0, 256, (-(-numel // 8),), dtype=torch.uint8, generator=generator, device=device)
        if numel % 8:
            mask[-1] &= (1 << numel % 8) - 1
        made.append(mask)
    return made


def perturb(
    shapes: list[Shape], pattern: Pattern, dtype: str, device: str, *, masters: bool = False, channels_last: bool = False
) -> Arguments:
    """Of perturb_topk_ or perturb_nm_: whichever the pattern is. With masters nothing is saved."""
    params = tensors(shapes, "params", DTYPES[dtype], device, channels_last)
    arguments = {
        "params": params,
        "grads": tensors(shapes, "grads", DTYPES[dtype], device, channels_last),
        "saved": [p.new_empty(0) for p in params] if masters else [torch.empty_like(p) for p in params],
        "masks": masks(shapes, pattern, device),
        "perturbed": torch.zeros((), dtype=torch.int32, device=device),
        "rho": torch.tensor(RHO, device=device),
    }
    if masters:
        arguments["masters"] = tensors(shapes, "params", torch.float32, device, channels_last)
    return arguments | selection(shapes, pattern, device)


def selection(shapes: list[Shape], pattern: Pattern, device: str) -> Arguments:
    """Which tensors are pruned, and to what."""
    pruned = [pattern.why_dense(torch.Size(shape)) is None for shape in shapes]
    if isinstance(pattern, NM):
        return {"prune": [int(own) for own in pruned], "n": pattern.n, "m": pattern.m}
    numel = sum(math.prod(shape) for shape, own in zip(shapes, pruned, strict=True) if own)
    return {"sets": [0 if own else -1 for own in pruned], "k": torch.tensor([pattern.k(numel)], device=device)}


def weights_only(shapes: list[Shape], pattern: Pattern, device: str, with_masks: bool = True) -> Arguments:
    """Of topk_threshold, prune_topk_ and prune_nm_: the tensors that the pattern prunes, in fp32."""
    pruned = [shape for shape in shapes if pattern.why_dense(torch.Size(shape)) is None]
    arguments: Arguments = {"weights": tensors(pruned, "params", torch.float32, device)}
    if with_masks:
        arguments["masks"] = masks(pruned, pattern, device)
    return arguments | selection(pruned, pattern, device)


def update(shapes: list[Shape], dtype: str, device: str, state: tuple[str, ...] = (), *, masters: bool = False) -> Arguments:
    """Of restore_combine_ and the updates; `state`: the lists of the optimizer."""
    state_dtype = torch.float32 if masters else DTYPES[dtype]
    arguments: Arguments = {role: tensors(shapes, role, DTYPES[dtype], device) for role in ("params", "saved", "grads", "first_grads")}
    arguments["masks"] = masks(shapes, TopK(0.9), device)
    arguments["perturbed"] = torch.ones((), dtype=torch.int32, device=device)
    arguments |= {role: tensors(shapes, role, state_dtype, device) for role in state}
    if masters:
        arguments["masters"] = tensors(shapes, "masters", torch.float32, device)
        arguments["saved"] = [p.new_empty(0) for p in arguments["params"]]
    return arguments


def size_of(lists: Any) -> int:
    return sum(t.nbytes for t in lists)


class OpRun:
    """A public op on a model's shapes.

    Args:
        build: shapes -> the op's arguments.
        traffic: argument -> how often each of its bytes moves, at the least: 2 where it is read and written.
        reset: arguments -> None: makes the op repeatable, not timed.
    """

    def __init__(
        self,
        setup: Setup,
        op: str,
        shapes: list[Shape],
        build: Callable[[list[Shape]], Arguments],
        traffic: dict[str, int],
        reset: Callable[[Arguments], Any] = lambda a: None,
    ) -> None:
        self.op, self.shapes, self.build, self.device = op, shapes, build, setup.device
        self.arguments = build(shapes)
        self.reset = lambda: reset(self.arguments)
        moved = {name: times for name, times in traffic.items() if size_of(self.arguments.get(name, ())) > 0}
        self.bytes = sum(times * size_of(self.arguments[name]) for name, times in moved.items())
        self.formula = " + ".join(name if times == 1 else f"{times} {name}" for name, times in moved.items())
        self.weights = sum(t.numel() for t in self.arguments[next(iter(traffic))])
        self.result: Any = None

    def run(self) -> None:
        self.result = getattr(ops, self.op)(**self.arguments)

    def check(self) -> None:
        gate.small(self.op, self.build(shrink(self.shapes)))
        gate.real(self.op, self.arguments)

    def contestant(self, name: str = "cram_kernels", bound: tuple[float, float] = (0.0, math.inf)) -> Contestant:
        return Contestant(name, self.run, self.reset, bound, self.bytes, self.facts, ours=True)

    def facts(self) -> Row:
        """What a top-k tells about its selection."""
        if not isinstance(self.result, tuple):
            return {}
        _, candidates, fallback = self.result[1][0].tolist()
        return {"candidates": candidates / self.weights, "fallback": fallback}

    def contest(self, *peers: Contestant, copy_bound: float = 0.0, rounds: int = 15) -> Contest:
        """The op against its peers."""
        return Contest(
            [self.contestant(), *peers],
            self.bytes,
            self.formula,
            self.weights,
            self.device,
            [self.check],
            copy_bound,
            rounds,
        )


PERTURB_TRAFFIC = {"params": 2, "grads": 1, "saved": 1, "masks": 1}
MASTERS_TRAFFIC = {"params": 1, "grads": 1, "masters": 1, "masks": 1}  # the parameter is only written


def restored(arguments: Arguments) -> None:
    ops.restore_(arguments["params"], arguments["saved"], arguments["perturbed"], masters=arguments.get("masters", ()))


def raise_flag(arguments: Arguments) -> None:
    arguments["perturbed"].fill_(1)


def update_traffic(state: dict[str, int], masters: bool) -> dict[str, int]:
    """Of an update: the old weight is read from `saved`, or from the master, which is written too."""
    weights = {"params": 1, "masters": 2} if masters else {"params": 1, "saved": 1}
    return weights | {"grads": 1, "first_grads": 1, "masks": 1} | state


def perturb_run(
    op: str, shapes: list[Shape], pattern: Pattern, dtype: str, setup: Setup, masters: bool = False, channels_last: bool = False
) -> OpRun:
    """perturb_topk_, perturb_nm_, or perturb_masked_ where the pattern prunes."""

    def arguments(shapes: list[Shape]) -> Arguments:
        made = perturb(shapes, pattern, dtype, setup.device, masters=masters, channels_last=channels_last)
        return {name: value for name, value in made.items() if op != "perturb_masked_" or name not in ("sets", "k")}

    return OpRun(setup, op, shapes, arguments, MASTERS_TRAFFIC if masters else PERTURB_TRAFFIC, restored)


def prune_run(op: str, model: str, pattern: Pattern, setup: Setup) -> OpRun:
    """prune_topk_ or prune_nm_; its weights are put back before every run."""
    pristine: list[Tensor] = []

    def arguments(shapes: list[Shape]) -> Arguments:
        return weights_only(shapes, pattern, setup.device)

    def reset(a: Arguments) -> None:
        torch._foreach_copy_(a["weights"], pristine)

    run = OpRun(setup, op, setup.shapes(model), arguments, {"weights": 2, "masks": 1}, reset)
    pristine += [w.clone() for w in run.arguments["weights"]]
    return run


def side_by_side(runs: dict[str, OpRun], bounds: dict[str, tuple[float, float]]) -> Contest:
    """The same op on several inputs in one run: time per byte beside that of the first."""
    contest = next(iter(runs.values())).contest()
    contest.contestants = [run.contestant(name, bounds.get(name, (0.0, math.inf))) for name, run in runs.items()]
    contest.checks = [run.check for run in runs.values()]
    return contest


def by_dtype(make: Callable[..., OpRun], with_masters: bool = True) -> Callable[[Setup], Contest]:
    """An op, made of shapes, dtype and setup, on ResNet-50 in fp32, bf16, fp16, and bf16 weights with float32 masters."""

    def contest(setup: Setup) -> Contest:
        shapes = setup.shapes("ResNet-50")
        runs = {dtype: make(shapes, dtype, setup) for dtype in DTYPES}
        if with_masters:
            runs["bf16 with masters"] = make(shapes, "bf16", setup, masters=True)
        return side_by_side(runs, {"bf16": (0, 1.3), "fp16": (0, 1.3)})

    return contest


def fused(op: OpRun, kind: Any, **options: float) -> Contestant:
    """An optimizer of torch alone: no restore, one gradient, no mask."""
    params = [torch.nn.Parameter(p.clone()) for p in op.arguments["params"]]
    for p, g in zip(params, op.arguments["grads"], strict=True):
        p.grad = g
    return Contestant(f"torch.optim.{kind.__name__}(fused=True) alone", kind(params, fused=True, **options).step)
