"""What runs in this process: every op against the reference, from a captured graph, on streams of its own, on a second device."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch

from .. import backend
from . import problems
from .machine import Machine
from .problems import LARGE, MANY, PROBLEMS, SMALL, Lists, Shapes
from .report import Section

REPLAYS = 3
SIZES = ("small", "large", "many")
ROUNDS = {"small": 10, "large": 3, "many": 10}
Calls = list[tuple[str, problems.Arguments]]  # on shared tensors, one after the other


def backends(machine: Machine) -> Section:
    """One that cannot run is not verified, whatever the other one does."""
    section = Section(f"backends of {machine.device}")
    missing = {name: backend.why_missing(name) for name in ("cuda", "triton")}
    section.rows = [{"backend": name, "": reason or "available"} for name, reason in missing.items()]
    if reasons := [f"{name}: {reason}" for name, reason in missing.items() if reason is not None]:
        section.not_run("; ".join(reasons))
    return section


def bits(machine: Machine, size: str = "small") -> Section:
    """Every op equals the reference; torch synchronises nowhere in it. Of the small inputs every dtype, and mixed."""
    section = Section(f"bits of the reference, {size}, on {machine.device}")
    for name in machine.backends:
        for op, make in PROBLEMS.items():
            for dtype in (*problems.DTYPES, None) if size == "small" else (None,):
                arguments = make(Lists(shapes_of(machine, size), dtype, machine.device))
                wanted = problems.expected(op, arguments)
                with machine.no_sync():
                    result = problems.call(op, arguments, name)
                what = str(dtype or "mixed") if size == "small" else f"{size}, mixed"
                section.compare(f"{op}, {name}, {what}", problems.differences(together(arguments, result), wanted))
    return section


def shapes_of(machine: Machine, size: str) -> Shapes:
    """large: more chunks than a GPU has warps; many: more tensors than a launch takes. A dry run takes parts of both."""
    large, many = (LARGE[::3], MANY[:60]) if machine.dry else (LARGE, MANY)
    return {"small": SMALL, "large": large, "many": many}[size]


def together(arguments: Any, result: Any) -> list[torch.Tensor]:
    return [*problems.tensors_of(arguments), *problems.tensors_of(result)]


def step(machine: Machine, perturb: str, update: str, seed: int = 0, size: str = "small") -> Calls:
    """A perturb and an update of the same weights."""
    shapes = shapes_of(machine, size)
    first = PROBLEMS[perturb](Lists(shapes, None, machine.device, seed))
    second = PROBLEMS[update](Lists(shapes, None, machine.device, seed + 100))
    return [(perturb, first), (update, second | {role: first[role] for role in ("params", "saved", "masks", "perturbed")})]


def graphs(machine: Machine, size: str = "small") -> Section:
    """A captured perturb and update, replayed with new gradients: the bits of as many calls of the reference."""
    section = Section(f"captured graphs, {size}, on {machine.device}")
    pairs = list(product(("perturb_topk_", "perturb_nm_"), ("restore_sgd_", "restore_adam_")))
    for name in machine.backends:
        for perturb, update in pairs if size == "small" else pairs[::3]:
            wrong = replayed(machine, name, step(machine, perturb, update, size=size))
            section.compare(f"{perturb} + {update}, {name}, {REPLAYS} replays", wrong)
    return section


def replayed(machine: Machine, name: str, calls: Calls) -> int:
    """Elements that differ from the reference's after a warm-up and some replays."""

    def run() -> None:
        for op, arguments in calls:
            problems.call(op, arguments, name)

    model = reference_of(calls)
    before = [problems.clone(arguments) for _, arguments in calls]
    with machine.new_stream()():
        run()  # loads kernels, which a capture must not
    machine.synchronize()
    for (_, arguments), old in zip(calls, before, strict=True):
        put_back(arguments, old)
    replay = machine.capture(run)
    for i in range(REPLAYS):
        for (_, arguments), (_, own) in zip(calls, model, strict=True):
            new_gradients(arguments, own, seed=i)
        replay()
        run_reference(model)
    machine.synchronize()
    return differences(calls, model)


def run_reference(model: Calls) -> None:
    for op, arguments in model:
        getattr(problems.reference, op)(**arguments)


def differences(calls: Calls, model: Calls) -> int:
    pairs = zip(calls, model, strict=True)
    return sum(problems.differences(problems.tensors_of(a), problems.tensors_of(own)) for (_, a), (_, own) in pairs)


def put_back(arguments: problems.Arguments, old: problems.Arguments) -> None:
    for t, was in zip(problems.tensors_of(arguments), problems.tensors_of(old), strict=True):
        t.copy_(was)


def reference_of(calls: Calls) -> Calls:
    """Copies on the CPU that share tensors as the originals do."""
    copies: dict[int, torch.Tensor] = {}

    def copy(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return copies.setdefault(id(x), x.detach().to("cpu", copy=True))
        return [copy(value) for value in x] if isinstance(x, list) else x

    return [(op, {role: copy(value) for role, value in arguments.items()}) for op, arguments in calls]


def new_gradients(arguments: problems.Arguments, own: problems.Arguments, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for t, twin in zip(arguments["grads"], own["grads"], strict=True):
        twin.copy_(torch.randn(twin.shape, generator=generator))
        t.copy_(twin)


def streams(machine: Machine, size: str = "small") -> Section:
    """Two steps on two streams at once, again and again: neither sees the other."""
    section = Section(f"two streams, {size}, on {machine.device}")
    rounds = 2 if machine.dry else ROUNDS[size]
    for name in machine.backends:
        pair = [step(machine, "perturb_topk_", "restore_sgd_", seed, size) for seed in (1, 2)]
        models = [reference_of(calls) for calls in pair]
        own = [machine.new_stream() for _ in pair]
        for _ in range(rounds):
            for calls, stream in zip(pair, own, strict=True):
                with stream():
                    for op, arguments in calls:
                        problems.call(op, arguments, name)
        for _ in range(rounds):  # once the GPU has all its work: between two of its rounds the CPU would leave it idle
            for model in models:
                run_reference(model)
        machine.synchronize()
        wrong = sum(differences(calls, model) for calls, model in zip(pair, models, strict=True))
        section.compare(f"perturb_topk_ + restore_sgd_, {name}, {rounds} rounds", wrong)
    return section


def second_device(found: list[Machine]) -> Section:
    """Every op on tensors of a device that is not the current one."""
    section = Section("a second device")
    if len(found) < 2:
        return section.absent("one GPU in this machine")
    other = max(found, key=lambda machine: machine.device.index or 0)  # device 0 is current
    for name in other.backends:
        for op, make in PROBLEMS.items():
            arguments = make(Lists(SMALL, None, other.device))
            wanted = problems.expected(op, arguments)
            result = problems.call(op, arguments, name)
            section.compare(f"{op}, {name}, on {other.device}", problems.differences(together(arguments, result), wanted))
    return section


def selection(machine: Machine, ops: Sequence[str] = tuple(PROBLEMS)) -> Section:
    """Short enough for compute-sanitizer: each op once, mixed dtypes."""
    section = Section("a short selection")
    for name in machine.backends:
        for op in ops:
            arguments = PROBLEMS[op](Lists(SMALL, None, machine.device))
            wanted = problems.expected(op, arguments)
            result = problems.call(op, arguments, name)
            machine.synchronize()
            section.compare(f"{op}, {name}", problems.differences(together(arguments, result), wanted))
    return section
