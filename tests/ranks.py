"""What every rank of a process group checks; test_ranks.py starts the processes. A check is a function (mesh, folder) named check_*."""

import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from optim_cases import assert_same_bits, backward, batches, network, random_tensors, set_gradients
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from cram_kernels import NM, CrAM, TopK

SHAPES = [(5, 8), (3, 8, 3, 3), (7,), (1, 16), (16, 24), (2, 8)]  # uneven, and on some ranks empty
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
BASES = {
    "sgd": (torch.optim.SGD, SGD),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01}),
}


def grads(seed: int) -> list[Tensor]:
    return random_tensors(SHAPES, seed)


def spread(tensors: list[Tensor], mesh: DeviceMesh, placements: Callable[[int], list]) -> list[Tensor]:
    """DTensors; where the placements are None, the tensor itself on all ranks."""
    return [t if placements(i) is None else distribute_tensor(t, mesh, placements(i)) for i, t in enumerate(tensors)]


def whole(tensors: list[Tensor]) -> list[Tensor]:
    return [t.full_tensor() if hasattr(t, "full_tensor") else t.detach() for t in tensors]


def pair(mesh: DeviceMesh, placements: Callable[[int], list], base: str, **options) -> tuple[CrAM, list, CrAM, list]:
    """The same optimizer over the parameters as one process has them, and over their shards."""
    kind, base_options = BASES[base]
    single = [nn.Parameter(t) for t in random_tensors(SHAPES, 0)]
    shards = [nn.Parameter(t) for t in spread(random_tensors(SHAPES, 0), mesh, placements)]
    return CrAM(single, kind, **base_options, **options), single, CrAM(shards, kind, **base_options, **options), shards


def step(optimizer: CrAM, params: list, first: list[Tensor], second: list[Tensor], between: Callable[[], None] = lambda: None) -> None:
    set_gradients(params, first)
    optimizer.perturb()
    between()
    set_gradients(params, second)
    optimizer.step()


def same_as_one_process(mesh: DeviceMesh, placements: Callable[[int], list], base: str = "sgd", **options) -> None:
    """Equal to the bit when the gradients are, at the perturbed weights too, and so are thresholds."""
    one, single, many, shards = pair(mesh, placements, base, **options)

    def between() -> None:
        assert one.last.pattern == many.last.pattern
        if one.last.thresholds is not None:
            assert one.last.thresholds.tolist() == many.last.thresholds.tolist()
        assert_same_bits(whole(shards), whole(single), f"{options} perturbed")

    for seed in range(4):
        step(one, single, grads(seed), grads(seed + 50))
        step(many, shards, *(spread(grads(s), mesh, placements) for s in (seed, seed + 50)), lambda: None)
        assert_same_bits(whole(shards), whole(single), f"{options} {base}")
        set_gradients(single, grads(seed))
        set_gradients(shards, spread(grads(seed), mesh, placements))
        one.perturb()
        many.perturb()
        between()
        one.restore()
        many.restore()
        assert_same_bits(whole(shards), whole(single), f"{options} restored")


def check_sharded_selection_is_exact(mesh: DeviceMesh, folder: Path) -> None:
    for pattern in (TopK(0.5), TopK(0.9), TopK(0), TopK(0.7, "tensor"), TopK(0.7, "group"), NM(2, 4)):
        same_as_one_process(mesh, lambda i: [Shard(0)], compression=[pattern])


def check_bases_and_options(mesh: DeviceMesh, folder: Path) -> None:
    levels = [TopK(0.5), NM(4, 8), TopK(0.9)]
    for base in BASES:
        same_as_one_process(mesh, lambda i: [Shard(0)], base, compression=levels)
    same_as_one_process(mesh, lambda i: [Shard(0)], compression=levels, mask_period=2)
    same_as_one_process(mesh, lambda i: [Shard(0)], compression=levels, plus=False, sparse_grad=False)


def check_replicated_weights_count_once(mesh: DeviceMesh, folder: Path) -> None:
    for placements in ([[Shard(0)], [Replicate()], None], [[Replicate()], None, [Shard(0)]], [[Replicate()]], [[Shard(1)], None]):
        same_as_one_process(mesh, lambda i, p=placements: p[i % len(p)] if len(SHAPES[i]) > 1 else None, compression=[TopK(0.6)])


def check_two_dims_of_a_mesh(mesh: DeviceMesh, folder: Path) -> None:
    """HSDP: replicated over one dim, sharded over the other; and sharded over both."""
    if mesh.size() % 2:
        return  # the run with 4 ranks does this
    grid = init_device_mesh("cpu", (2, mesh.size() // 2), mesh_dim_names=("replicate", "shard"))
    same_as_one_process(grid, lambda i: [Replicate(), Shard(0)], compression=[TopK(0.6), NM(2, 4)])
    same_as_one_process(grid, lambda i: [Shard(0), Replicate()] if i % 2 else [Shard(0), Shard(0)], compression=[TopK(0.6)])


def check_nm_needs_whole_groups_on_a_rank(mesh: DeviceMesh, folder: Path) -> None:
    placed = [nn.Parameter(distribute_tensor(torch.randn(4, columns), mesh, [Shard(1)])) for columns in (4 * mesh.size(), 12)]
    why = [c.why_dense for c in CrAM(placed, lr=0.1).coverage(NM(2, 4))]
    pieces = -(-12 // mesh.size())
    assert why == [None, None if pieces % 4 == 0 else "axis 1 is sharded in pieces that 4 does not divide"], why
    if mesh.size() == 4:
        grid = init_device_mesh("cpu", (2, 2))
        twice = nn.Parameter(distribute_tensor(torch.randn(4, 8), grid, [Shard(1), Shard(1)]))
        assert CrAM([twice], lr=0.1).coverage(NM(2, 4))[0].why_dense == "axis 1 is sharded in pieces that 4 does not divide"


def check_norms_are_those_of_the_whole_gradient(mesh: DeviceMesh, folder: Path) -> None:
    """Within rounding of one process, and the same on all ranks: the shards stay together."""
    for options in ({"normalize_grad": True}, {"max_grad_norm": 0.5}):
        one, single, many, shards = pair(mesh, lambda i: [Shard(0)] if i % 2 else [Replicate()], "sgd", compression=[], **options)
        for seed in range(3):
            step(one, single, grads(seed), grads(seed + 50))
            step(many, shards, *(spread(grads(s), mesh, lambda i: [Shard(0)] if i % 2 else [Replicate()]) for s in (seed, seed + 50)))
        for a, b in zip(whole(shards), whole(single), strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=1e-6)
        for p in shards[::2]:
            assert same_on_all_ranks(p.to_local().detach())


def check_an_overflow_on_one_rank_skips_on_all(mesh: DeviceMesh, folder: Path) -> None:
    for bad in (0, 1):
        params = [nn.Parameter(t) for t in spread(random_tensors(SHAPES, 0), mesh, lambda i: [Shard(0)])]
        optimizer = CrAM(params, compression=[TopK(0.5)], **SGD)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(torch.zeros(()))
        before = [t.clone() for t in whole(params)]
        passes = [[1024.0 * g for g in grads(s)] for s in (1, 2)]
        passes[bad][4][15, 23] = float("inf")  # on the last rank alone
        set_gradients(params, spread(passes[0], mesh, lambda i: [Shard(0)]))
        optimizer.perturb(scaler)
        set_gradients(params, spread(passes[1], mesh, lambda i: [Shard(0)]))
        scaler.step(optimizer)
        scaler.update()
        assert_same_bits(whole(params), before, f"overflow in pass {bad}")
        assert scaler.get_scale() == 512.0


def check_a_second_overflow_is_seen_by_all_whatever_comes_first(mesh: DeviceMesh, folder: Path) -> None:
    """The first parameter is replicated, the overflow in a shard of the second."""
    if mesh.size() == 1:
        return

    def placed(tensors: list[Tensor]) -> list[Tensor]:
        return spread(tensors, mesh, lambda i: [Shard(0)] if i else [Replicate()])

    params = [nn.Parameter(t) for t in placed(random_tensors(SHAPES, 0))]
    optimizer = CrAM(params, compression=[TopK(0.5)], **SGD)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    before = [t.clone() for t in whole(params)]
    set_gradients(params, placed([1024.0 * g for g in grads(1)]))
    optimizer.perturb(scaler)
    second = [1024.0 * g for g in grads(2)]
    second[4][15, 23] = float("inf")
    set_gradients(params, placed(second))
    scaler.step(optimizer)
    scaler.update()
    assert_same_bits(whole(params), before)
    assert scaler.get_scale() == 512.0


def check_masters_of_shards_follow_what_is_loaded(mesh: DeviceMesh, folder: Path) -> None:
    """A write through the DTensor, and a shard that Module.to() has replaced, are seen."""
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)).to(torch.bfloat16)
    fully_shard(model, mesh=mesh)
    optimizer = CrAM(model.parameters(), compression=[TopK(0.5)], master_weights=True, **SGD).attach(model)
    x = torch.ones(2, 8, dtype=torch.bfloat16)

    def train() -> None:
        model(x).square().sum().backward()
        optimizer.perturb()
        model(x).square().sum().backward()
        optimizer.step()

    train()
    wanted = {name: torch.full_like(t, 0.25) for name, t in model.state_dict().items()}
    model.load_state_dict(wanted)
    optimizer.param_groups[0]["lr"] = 0.0
    train()
    assert all(bool((t == 0.25).all()) for t in whole(list(model.parameters())))
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = 0.1
    train()
    for p in model.parameters():
        assert_same_bits([optimizer.state[p]["master"].to_local().to(torch.bfloat16)], [p.to_local().detach()])


def check_training_goes_on_after_a_conversion(mesh: DeviceMesh, folder: Path) -> None:
    model = sharded_network(mesh)
    optimizer = CrAM(model.parameters(), compression=[TopK(0.5)], **SGD).attach(model)
    batch = next(batches(1))
    for conversion in (lambda: None, lambda: model.half().float()):
        conversion()
        before = [t.clone() for t in whole(list(model.parameters()))]
        backward(model, batch)
        optimizer.perturb()
        backward(model, batch)
        optimizer.step()
        assert not any(torch.equal(a, b) for a, b in zip(before, whole(list(model.parameters())), strict=True))


def check_a_failed_second_pass_leaves_no_old_copy(mesh: DeviceMesh, folder: Path) -> None:
    """The root of an FSDP model keeps a whole copy of its weights between passes."""
    torch.manual_seed(0)
    model = fully_shard(nn.Linear(8, 8), mesh=mesh)
    optimizer = CrAM(model.parameters(), compression=[TopK(0.9)], rho=1.0, **SGD).attach(model)
    x = torch.ones(2, 8)
    losses = []
    for fails in (True, False):
        loss = model(x).square().sum()
        losses.append(loss.item())
        loss.backward()
        optimizer.perturb()
        loss = model(x).square().sum()
        assert loss.item() != losses[-1]
        if fails:
            optimizer.restore()
            optimizer.zero_grad()
    assert losses[0] == losses[1]


def check_distributed_state_between_the_halves(mesh: DeviceMesh, folder: Path) -> None:
    """torch takes a dry step to make the state of an optimizer that has none. The open step is not that one, nor saved by halves."""
    model, twin = sharded_network(mesh), sharded_network(mesh)
    options = {"compression": [TopK(0.5)], "lr": 0.1}
    optimizers = [CrAM(m.parameters(), **options).attach(m) for m in (model, twin)]
    batch = next(batches(1))
    for m, optimizer in zip((model, twin), optimizers, strict=True):
        backward(m, batch)
        optimizer.perturb()
        if m is model:
            with pytest.raises(RuntimeError, match="between perturb"):
                get_state_dict(m, optimizer)
            assert optimizer.param_groups[0]["cram_step"] == 0 and optimizer.param_groups[0]["lr"] == 0.1
        backward(m, batch)
        optimizer.step()
    assert_same_bits(whole(list(model.parameters())), whole(list(twin.parameters())))


def check_a_step_sends_little(mesh: DeviceMesh, folder: Path) -> None:
    sent, all_reduce = [], dist.all_reduce

    def counted(t: Tensor, *args, **kwargs):
        sent.append(t.nbytes)
        return all_reduce(t, *args, **kwargs)

    dist.all_reduce = counted
    try:
        for size in (64, 4096):
            sent.clear()
            params = [nn.Parameter(distribute_tensor(torch.randn(size, 64), mesh, [Shard(0)]))]
            set_gradients(params, [distribute_tensor(torch.randn(size, 64), mesh, [Shard(0)])])
            CrAM(params, lr=0.1, compression=[TopK(0.9)]).perturb()
            assert sum(sent) == 32 * 1024, sent
    finally:
        dist.all_reduce = all_reduce


def sharded_network(mesh: DeviceMesh) -> nn.Module:
    model = network()
    for layer in model:
        if list(layer.parameters(recurse=False)):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def check_fsdp_trains_as_one_process_does(mesh: DeviceMesh, folder: Path) -> None:
    """Real backward passes: equal within the rounding of the gradients' reduction. No pruning there, where one bit more moves a weight."""
    model, single = sharded_network(mesh), network()
    optimizers = [CrAM(m.parameters(), compression=[], **SGD).attach(m) for m in (model, single)]
    for batch in batches(4):
        for m, optimizer in zip((model, single), optimizers, strict=True):
            backward(m, batch)
            optimizer.perturb()
            backward(m, batch)
            optimizer.step()
    for a, b in zip(whole(list(model.parameters())), single.parameters(), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-3, atol=1e-4)


def check_fsdp_perturbs_and_gives_unperturbed_state(mesh: DeviceMesh, folder: Path) -> None:
    model = sharded_network(mesh)
    optimizer = CrAM(model.parameters(), compression=[TopK(0.9)], **SGD).attach(model)
    batch = next(batches(1))
    backward(model, batch)
    state = model.state_dict()
    before = dict(zip(state, [t.clone() for t in whole(list(state.values()))], strict=True))
    optimizer.perturb()
    pruned = whole([p for p in model.parameters() if p.dim() > 1])
    zeros, numel = sum(int((t == 0).sum()) for t in pruned), sum(t.numel() for t in pruned)
    assert zeros == numel - TopK(0.9).k(numel) + 1, (zeros, numel)
    state = model.state_dict()
    for name, t in zip(state, whole(list(state.values())), strict=True):
        assert torch.equal(t, before[name]), name
    backward(model, batch)
    optimizer.step()
    assert all(p.grad is None for p in model.parameters())


def check_checkpoint_of_another_number_of_ranks(mesh: DeviceMesh, folder: Path) -> None:
    """torch.distributed.checkpoint: the first number of ranks saves, with what the next step gives; the others load and take that step."""
    path = folder / "checkpoint"
    model = sharded_network(mesh)
    optimizer = CrAM(model.named_parameters(), compression=[TopK(0.5), NM(2, 4), TopK(0.9)], **SGD)
    shapes = [tuple(p.shape) for p in model.parameters()]

    def given(seed: int) -> list[Tensor]:
        return [distribute_tensor(t, mesh, [Shard(0)]) for t in random_tensors(shapes, seed)]

    if not path.exists():
        for seed in range(3):
            step(optimizer, list(model.parameters()), given(seed), given(seed + 50))
        model_state, optimizer_state = get_state_dict(model, optimizer)
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path)
        step(optimizer, list(model.parameters()), given(7), given(8))
        expected = whole(list(model.parameters()))
        if dist.get_rank() == 0:
            torch.save(expected, folder / "expected.pt")
        return
    step(optimizer, list(model.parameters()), given(77), given(78))  # a past of its own
    model_state, optimizer_state = get_state_dict(model, optimizer)
    loaded = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(loaded, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    assert optimizer.param_groups[0]["cram_step"] == 3
    step(optimizer, list(model.parameters()), given(7), given(8))
    assert_same_bits(whole(list(model.parameters())), torch.load(folder / "expected.pt"), "resumed with another number of ranks")


def same_on_all_ranks(t: Tensor) -> bool:
    others = [torch.empty_like(t) for _ in range(dist.get_world_size())]
    dist.all_gather(others, t.contiguous())
    return all(torch.equal(t, other) for other in others)


def check_ddp_keeps_all_ranks_together(mesh: DeviceMesh, folder: Path) -> None:
    """50 steps, each rank with data of its own: the same level and the same weights on all, to the bit."""
    for bucket_view in (False, True):
        model = DistributedDataParallel(network(), gradient_as_bucket_view=bucket_view)
        optimizer = CrAM(model.parameters(), compression=[TopK(0.5), NM(2, 4), TopK(0.9)], **SGD).attach(model)
        for batch in batches(50 if bucket_view else 5, seed=dist.get_rank()):
            backward(model, batch)
            optimizer.perturb()
            backward(model, batch)
            optimizer.step()
        assert all(same_on_all_ranks(p.detach()) for p in model.parameters())
        assert same_on_all_ranks(torch.tensor(optimizer.param_groups[0]["cram_step"]))


def check_zero_steps_as_one_process_does(mesh: DeviceMesh, folder: Path) -> None:
    """ZeroRedundancyOptimizer, whose state is spread over the ranks, around a base: as that base alone, which takes its own step, too."""
    if dist.get_world_size() != 2:
        return  # seconds for each process, to compile what torch makes for it
    from torch.distributed.optim import ZeroRedundancyOptimizer

    options = {"compression": [TopK(0.5), NM(2, 4)]}
    for kind, base_options in BASES.values():
        judge, models = network(), [network() for _ in range(2)]
        one = CrAM(judge, type("Own", (kind,), {}), **base_options, **options)
        zero = ZeroRedundancyOptimizer(models[1].parameters(), kind, **base_options)
        many = [
            CrAM(models[0], ZeroRedundancyOptimizer, optimizer_class=kind, **base_options, **options),
            CrAM(models[1], zero, **options),
        ]
        optimizers = [one, *many]
        schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 2) for optimizer in optimizers]
        for batch in batches(4):
            for model, optimizer in zip([judge, *models], optimizers, strict=True):
                optimizer.step(lambda model=model, batch=batch: backward(model, batch))
            for scheduler in schedulers:
                scheduler.step()
            for model in models:
                assert_same_bits(list(model.state_dict().values()), list(judge.state_dict().values()))
        many[0].consolidate_state_dict()
        if dist.get_rank() == 0:
            saved, expected = many[0].base_optimizer.state_dict()["state"], one.state_dict()["state"]
            assert all(torch.equal(saved[i][key], value) for i, state in expected.items() for key, value in state.items())


def check_gradients_that_ranks_have_not_shared_are_refused(mesh: DeviceMesh, folder: Path) -> None:
    model = DistributedDataParallel(network())
    batch = next(batches(1, seed=dist.get_rank()))
    optimizer = CrAM(model.parameters(), compression=[TopK(0.5)], **SGD).attach(model)
    with model.no_sync():
        backward(model, batch)
    with pytest.raises(RuntimeError, match=r"got those of a pass under no_sync\(\)"):
        optimizer.perturb()
    two = nn.ModuleList([model, DistributedDataParallel(nn.Linear(4, 4))])
    both = CrAM(two.parameters(), compression=[TopK(0.5)], **SGD).attach(two)
    with two[0].no_sync():
        backward(two[0], batch)
    two[1](torch.ones(1, 4)).sum().backward()
    with pytest.raises(RuntimeError, match=r"got those of a pass under no_sync\(\)"):
        both.perturb()
    both.detach()
    backward(model, batch)  # accumulated, and shared by the last pass
    optimizer.perturb()
    with model.no_sync():
        backward(model, batch)
    backward(model, batch)
    optimizer.step()
    assert all(same_on_all_ranks(p.detach()) for p in model.parameters())
    optimizer.detach()
    local = CrAM(model.parameters(), compression=[TopK(0.5)], plus=False, sparse_grad=False, **SGD).attach(model)
    for _ in range(3):
        with model.no_sync():
            backward(model, batch)
        local.perturb()  # each rank uphill on its own; the update is the shared gradient
        backward(model, batch)
        local.step()
    assert all(same_on_all_ranks(p.detach()) for p in model.parameters())


def check_a_model_that_ddp_wraps_later_is_seen(mesh: DeviceMesh, folder: Path) -> None:
    """As Accelerate and Lightning do it: the optimizer is made over the model, which DDP wraps afterwards."""
    inner = network()
    optimizer = CrAM(inner, compression=[TopK(sparsity=0.5)], **SGD)
    model = DistributedDataParallel(inner)
    batch = next(batches(1, seed=dist.get_rank()))
    with model.no_sync():
        backward(model, batch)
    with pytest.raises(RuntimeError, match=r"the first gradients must .* got those of a pass under no_sync\(\)"):
        optimizer.perturb()
    for _ in range(3):
        optimizer.zero_grad()
        backward(model, batch)
        optimizer.perturb()
        backward(model, batch)
        optimizer.step()
        assert all(same_on_all_ranks(p.detach()) for p in inner.parameters())
    before = [p.detach().clone() for p in inner.parameters()]
    backward(model, batch)
    optimizer.perturb()
    with model.no_sync():
        backward(model, batch)
    with pytest.raises(RuntimeError, match=r"the second gradients must .* got those of a pass under no_sync\(\)"):
        optimizer.step()
    assert_same_bits(list(inner.parameters()), before)


def run(rank: int, ranks: int, folder: str, store: str) -> None:
    """One process: all checks in turn, each named where it fails."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            try:
                check(mesh, Path(folder))
            except BaseException:
                print(f"rank {rank} of {ranks}, {name}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
                raise
            dist.barrier()
    dist.destroy_process_group()
