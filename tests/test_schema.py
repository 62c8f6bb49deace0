"""The ops as torch sees them: schemas, fakes, torch.compile, version counters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from calls import f32, flag, samples
from cases import Drawn, Spec, mixed
from compare import MUTATED, clone, compare_all, contract_part, map_tensors, named_tensors
from conftest import SIMD_LEVELS
from optim_cases import same_bits
from test_optim_every_line import Trace

from cram_kernels import _native, _registration, backend, ops, reference

CASE = Drawn("normal", mixed([Spec((6, 8)), Spec((4, 8, 3, 3), order=(0, 2, 3, 1)), Spec((5, 4, 2)), Spec((7,))]))
SAMPLES = samples(CASE)
OP = pytest.mark.parametrize("op", SAMPLES)


def native(op: str) -> Any:
    return getattr(torch.ops.cram_kernels, op).default


def positional(op: str, arguments: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Arguments as the schema has them: positional, and by keyword."""
    schema = native(op)._schema.arguments
    by_place = tuple(arguments[a.name] for a in schema if not a.kwarg_only)
    return by_place, {a.name: arguments[a.name] for a in schema if a.kwarg_only and a.name in arguments}


def test_the_cpu_backend_is_built() -> None:
    """Everything else is skipped where a backend is missing; this one must be there."""
    assert backend.why_missing("cpu") is None, backend.why_missing("cpu")


@pytest.mark.parametrize("level", SIMD_LEVELS)
def test_simd_level(level: str) -> None:
    if level not in _native.host.simd_levels():
        pytest.skip(f"this CPU has no {level}: run on one that has")
    chosen = _native.host.simd_level()
    _native.host.set_simd_level(level)
    assert _native.host.simd_level() == level
    _native.host.set_simd_level(chosen)


def test_the_best_simd_level_is_last_and_an_unknown_one_is_refused() -> None:
    levels = _native.host.simd_levels()
    assert levels == [level for level in SIMD_LEVELS if level in levels] and levels[0] == "portable"
    with pytest.raises((ValueError, RuntimeError), match="sse9"):
        _native.host.set_simd_level("sse9")
    assert _native.host.simd_level() in levels


@OP
def test_the_schema_says_what_is_mutated(op: str) -> None:
    written = tuple(a.name for a in native(op)._schema.arguments if a.alias_info is not None and a.alias_info.is_write)
    assert written == MUTATED[op]


@OP
def test_opcheck(op: str) -> None:
    args, kwargs = positional(op, SAMPLES[op]())
    torch.library.opcheck(native(op), args, kwargs)


@OP
def test_a_fake_call_has_the_results_of_a_real_one(op: str) -> None:
    with torch._subclasses.FakeTensorMode() as mode:
        fake = getattr(ops, op)(**map_tensors(SAMPLES[op](), mode.from_tensor))
    real = getattr(ops, op)(**SAMPLES[op]())
    for (_, f), (_, r) in zip(named_tensors(fake, "result"), named_tensors(real, "result"), strict=True):
        assert (f.shape, f.dtype, f.stride(), f.device) == (r.shape, r.dtype, r.stride(), r.device)


# inductor takes seconds an op: two stand for all
@pytest.mark.parametrize(
    "compiler, op", [*(("aot_eager", op) for op in SAMPLES), ("inductor", "perturb_topk_"), ("inductor", "restore_sgd_")]
)
def test_compiled_equals_eager(op: str, compiler: str) -> None:
    torch._dynamo.reset()
    arguments, expected_arguments = SAMPLES[op](), SAMPLES[op]()
    expected = getattr(ops, op)(**expected_arguments)
    compiled = torch.compile(getattr(ops, op), fullgraph=True, backend=compiler)
    actual = compiled(**arguments)
    compare_all(op, arguments, expected_arguments)
    compare_all(op, contract_part(actual), contract_part(expected))


@OP
def test_version_counters(op: str) -> None:
    """Bumped where the op mutates, and nowhere else."""
    arguments = SAMPLES[op]()
    before = [t._version for _, t in named_tensors(arguments)]
    getattr(ops, op)(**arguments)
    for (name, t), version in zip(named_tensors(arguments), before, strict=True):
        if t.numel() > 0:
            assert (t._version > version) == (name.split("[")[0] in MUTATED[op]), f"{op}: {name}"


@pytest.mark.parametrize("through", ["cram_kernels.ops", "torch.ops"])
@pytest.mark.parametrize("op", ["prune_topk_", "perturb_nm_", "restore_sgd_"])
def test_interrupted_at_every_line(op: str, through: str) -> None:
    """Whatever a call has written when an interrupt ends it, its version counter was bumped."""

    def call(arguments: dict[str, Any]) -> Any:
        if through == "cram_kernels.ops":
            return getattr(ops, op)(**arguments)
        by_place, by_name = positional(op, arguments)
        return native(op)(*by_place, **by_name)

    arguments, source = SAMPLES[op](), str(Path(_registration.__file__).parent)
    with Trace(source=source) as clean:
        call(arguments)
    written = set()
    for n in range(1, len(clean.lines) + 1):
        arguments, before = SAMPLES[op](), [t for _, t in named_tensors(SAMPLES[op]())]
        versions = [t._version for _, t in named_tensors(arguments)]
        with Trace(n, source) as trace:
            call(arguments)
        assert trace.interrupted
        changed = [not same_bits([t], [old]) for (_, t), old in zip(named_tensors(arguments), before, strict=True)]
        for (name, t), version, written_to in zip(named_tensors(arguments), versions, changed, strict=True):
            assert t._version > version or not written_to, f"{name}, interrupted at {trace.lines[-1]}"
        written.add(any(changed))
    assert written == ({False, True} if through == "cram_kernels.ops" else {False})


@pytest.mark.parametrize("op", ["prune_topk_", "perturb_nm_", "restore_", "restore_sgd_"])
def test_a_stale_backward_raises(op: str) -> None:
    """A graph that saved the old weights must not be run with the new ones."""
    arguments = SAMPLES[op]()
    name = "params" if "params" in arguments else "weights"
    w = arguments[name][0].requires_grad_()
    loss = (w * w).sum()
    getattr(ops, op)(**arguments)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_parameter_stays_what_it_is() -> None:
    """In place: same object, same storage, still a leaf, and nothing is recorded."""
    p = torch.nn.Parameter(torch.randn(6, 8))
    pointer = p.data_ptr()
    ops.perturb_masked_([p], [torch.ones(6, 8)], [torch.empty(6, 8)], [], flag(0), f32(0.1))
    assert p.data_ptr() == pointer and p.is_leaf and p.requires_grad and p.grad_fn is None


def test_strides_of_single_elements_mean_nothing() -> None:
    """A 1x1 convolution in channels_last has other strides than its contiguous gradient, and the same memory order."""
    p = torch.randn(8, 4, 1, 1).to(memory_format=torch.channels_last)
    g = torch.randn(8, 4, 1, 1).as_strided(p.shape, (4, 1, 1, 1))
    assert p.stride() != g.stride()
    expected, saved = p.clone(), torch.empty_like(p)
    ops.perturb_masked_([p], [g], [saved], [], flag(0), f32(0.5))
    assert torch.equal(saved, expected) and torch.equal(p, expected + 0.5 * g)


@OP
def test_empty_lists(op: str) -> None:
    """Nothing to do is no error; a perturbation of nothing still raises the flag."""
    arguments = {name: [] if isinstance(value, list) else value for name, value in SAMPLES[op]().items()}
    arguments |= {name: [0.0] for name in ("momentum", "dampening", "weight_decay", "beta1", "beta2", "eps") if name in arguments}
    arguments |= {name: [0] for name in ("nesterov", "maximize", "amsgrad", "fresh") if name in arguments}
    arguments |= {name: f32(0.1) for name in ("rho", "lr") if name in arguments}
    expected_arguments = clone(arguments)
    actual = getattr(ops, op)(**arguments)
    expected = getattr(reference, op)(**expected_arguments)
    compare_all(op, contract_part(actual), contract_part(expected))
    compare_all(op, arguments, expected_arguments)
