"""The optimizer inside: whose memory a first gradient is, what a step is undone from, what is cached, shared, copied."""

import copy
import pickle

import pytest
import torch
from optim_cases import assert_same_bits, backward, batches, clones, network, random_tensors, set_gradients, two_halves, weights
from torch import nn

from cram_kernels import NM, CrAM, TopK, TopkCrAM, ops
from cram_kernels.optim.bucket import new_masks
from cram_kernels.optim.columns import Slot
from cram_kernels.optim.workspace import Workspace
from cram_kernels.schedule import _mix, draw

SHAPES = [(8, 16), (16,), (4, 8, 3, 3)]


def fresh(shapes=SHAPES) -> list[nn.Parameter]:
    return [nn.Parameter(t) for t in random_tensors(shapes, 0)]


def gradients(seed: int, shapes=SHAPES) -> list[torch.Tensor]:
    return random_tensors(shapes, seed)


# --- first gradients ---


def test_a_first_gradient_is_taken_over_without_a_copy():
    param = fresh()[0]
    optimizer = CrAM([param], lr=0.1)
    param.grad = torch.ones_like(param)
    pointer = param.grad.data_ptr()
    optimizer.perturb()
    assert [g.data_ptr() for g in optimizer.open_step.parts[0].first] == [pointer]


@pytest.mark.parametrize("alone", [True, False])
def test_gradients_in_a_bucket_are_copied(alone):
    """DDP with gradient_as_bucket_view writes the second gradient where the first one is, also where the bucket holds that one only."""
    params, judge = fresh([(8, 16)]), fresh([(8, 16)])
    bucket = torch.empty(8 * 16 + (0 if alone else 8))
    ours, theirs = CrAM(params, lr=0.1), CrAM(judge, lr=0.1)
    for seed in (1, 3):
        first, second = gradients(seed, [(8, 16)]), gradients(seed + 1, [(8, 16)])
        two_halves(theirs, judge, first, second)
        for g, half in ((first[0], ours.perturb), (second[0], ours.step)):
            params[0].grad = bucket[: 8 * 16].view(8, 16)
            params[0].grad.copy_(g)
            half()
    assert_same_bits(params, judge)


def test_strides_of_an_axis_of_size_1_cost_no_copy():
    """What cuDNN and oneDNN hand over for the weights of 1x1 convolutions."""
    param = nn.Parameter(torch.randn(8, 4, 1, 1))
    param.grad = torch.randn(8, 4).as_strided((8, 4, 1, 1), (4, 1, 4, 4))
    assert param.grad.stride() != param.stride()
    grad = Slot(param, 0, 0).fitted(param.grad)
    assert grad.stride() == param.stride() and grad.data_ptr() == param.grad.data_ptr()


# --- what a step is undone from ---


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("attached", [True, False])
def test_an_interrupt_at_the_perturbing_op(monkeypatch, when, attached):
    """Before the op nothing is saved, and a restore must not bring that back; after it the gradients are still the parameter's."""
    model = network()
    optimizer = CrAM(model.parameters(), compression=[TopK(0.5)], lr=0.1)
    if attached:
        optimizer.attach(model)
    perturb_topk_ = ops.perturb_topk_

    def interrupted(*args, **options):
        if when == "after":
            perturb_topk_(*args, **options)
        if attached:
            assert_same_bits([model.state_dict()["3.weight"]], before[3:4])
        raise KeyboardInterrupt

    backward(model, next(batches(1)))
    before, grads = clones(model.parameters()), [p.grad for p in model.parameters()]
    monkeypatch.setattr(ops, "perturb_topk_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.perturb()
    assert_same_bits(weights(model), before)
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert all(m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_a_group_that_goes_between_the_halves_is_restored():
    """The step is given up, and the next one is whole again."""
    params = fresh()
    optimizer = CrAM([{"params": params[:2]}, {"params": params[2:]}], lr=0.1, compression=[TopK(0.5)])
    before = clones(params)
    set_gradients(params, gradients(1))
    optimizer.perturb()
    del optimizer.param_groups[1]
    set_gradients(params, gradients(2))
    with pytest.raises(RuntimeError, match="must be the same in both halves"):
        optimizer.step()
    assert_same_bits(params, before)
    two_halves(optimizer, params[:2], gradients(1)[:2], gradients(2)[:2])
    assert_same_bits(params[2:], before[2:])
    assert not torch.equal(params[0], before[0])


def test_a_model_that_is_moved_between_steps_gets_new_memory():
    """To another memory format and dtype: saved weights, masks and momentum follow."""
    params, judge = fresh([(4, 8, 3, 3)]), fresh([(4, 8, 3, 3)])
    ours, theirs = (CrAM(p, lr=0.1, momentum=0.5, compression=[NM(2, 4)], mask_period=4) for p in (params, judge))
    for seed in (1, 3, 5):
        grads = gradients(seed, [(4, 8, 3, 3)]), gradients(seed + 1, [(4, 8, 3, 3)])
        two_halves(ours, params, *grads)
        two_halves(theirs, judge, *grads)
        if seed == 1:
            params[0].data = params[0].data.to(memory_format=torch.channels_last)
            theirs.load_state_dict({k: v for k, v in theirs.state_dict().items() if k != "cram_masks"})  # no mask: computed anew
    assert params[0].is_contiguous(memory_format=torch.channels_last)
    assert_same_bits([params[0].contiguous()], judge)


# --- what is drawn, and cached ---


def test_splitmix64():
    """The first outputs of the generator with seed 1234567, as published with it."""
    state, outputs = 1234567, []
    for _ in range(3):
        state += 0x9E3779B97F4A7C15
        outputs.append(_mix(state))
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("seed", [0, -1, 2**64, 2**200])
def test_any_seed_draws(seed):
    drawn = [draw(seed, step, 3) for step in range(300)]
    assert all(70 <= drawn.count(level) <= 130 for level in range(3))


def test_a_step_that_was_given_up_draws_the_same_pattern():
    params = fresh()
    optimizer = CrAM(params, lr=0.1, compression=[TopK(s / 10) for s in range(10)])
    for seed in range(6):
        drawn = []
        for _ in range(3):
            optimizer.restore()
            set_gradients(params, gradients(seed))
            optimizer.perturb()
            drawn.append(optimizer.last.pattern)
        assert len(set(drawn)) == 1
        set_gradients(params, gradients(seed + 1))
        optimizer.step()


def test_numbers_stay_on_the_device_until_they_change():
    params = fresh()
    work, cpu = Workspace(), torch.device("cpu")
    slots = work.follow([{"params": params[:1]}, {"params": params[1:]}])
    rate = work.option("lr", [0.1, 0.1], slots, cpu)
    assert rate.shape == () and work.option("lr", [0.1, 0.1], slots, cpu) is rate
    assert work.option("lr", [0.1, 0.5], slots, cpu).tolist() == torch.tensor([0.1, 0.5, 0.5]).tolist()
    on_device = torch.tensor(0.25)
    assert work.option("lr", [on_device, 0.5], slots, cpu).tolist() == [0.25, 0.5, 0.5]
    assert work.option("lr", [on_device], slots[:1], cpu).data_ptr() == on_device.data_ptr()


@pytest.mark.filterwarnings("ignore:CrAM. .* prunes none")
def test_buckets_are_kept_while_they_hold():
    params, pattern = fresh(), TopK(0.5)
    groups = [{"params": params, "prune": True}]
    work = Workspace()
    slots = work.follow(groups)

    def buckets(slots):
        return work.buckets((pattern,), slots, groups, lambda slot, pattern: pattern.why_dense(slot.shape) if groups[0]["prune"] else "off")

    first = buckets(slots)
    assert first[0].sets == [0, -1, 0] and first[0].k.tolist() == [pattern.k(128 + 288)]
    assert buckets(list(slots)) is first
    assert buckets(slots[:2])[0].k.tolist() == [pattern.k(128)]
    groups[0]["prune"] = False
    assert buckets(slots)[0].pruned == []


def test_weights_of_two_devices_are_not_ranked_together():
    work = Workspace()
    slots = work.follow([{"params": [nn.Parameter(torch.empty(4, 4, device=device)) for device in ("cpu", "meta")]}])
    with pytest.raises(RuntimeError, match="one device, got cpu and meta"):
        work.make_buckets((TopK(0.5),), slots, lambda *_: None)
    assert [b.numels for b in work.make_buckets((TopK(0.5, "tensor"),), slots, lambda *_: None)] == [(16,), (16,)]
    assert [b.sets for b in work.make_buckets((TopK(0.5),), slots, lambda slot, _: None if slot is slots[0] else "other")] == [[0], [-1]]


def test_masks_are_aligned_slices_of_one_buffer():
    work = Workspace()
    slots = work.follow([{"params": fresh([(3, 3), (16, 16), (2, 5)])}])
    there = torch.zeros(32, dtype=torch.uint8)
    bits = list(new_masks(slots, [None] * 3).values())
    assert [b.numel() for b in bits] == [2, 32, 2] and all(b.data_ptr() % 16 == 0 for b in bits)
    assert len({b.untyped_storage().data_ptr() for b in bits}) == 1
    assert new_masks(slots, [bits[0], there, None])[slots[1]] is there


# --- what is shared, and copied ---


def test_masks_are_in_the_state_dict_only_where_they_last():
    for period, there in ((1, False), (2, True)):
        params = fresh()
        optimizer = CrAM(params, lr=0.1, mask_period=period)
        two_halves(optimizer, params, gradients(1), gradients(2))
        assert ("cram_masks" in optimizer.state_dict()) is there


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_an_attached_model_is_copied(copied):
    """With its optimizer: the copies are attached to each other. Without: to nothing. In the middle of a step: not at all."""
    model = network()
    optimizer = CrAM(model.parameters(), lr=0.1, rho=1.0).attach(model)
    batch = next(batches(1))
    backward(model, batch)
    alone, (twin, its_optimizer) = copied(model), copied((model, optimizer))
    backward(twin, batch)
    before, statistics = clones(weights(twin)), clones(twin.buffers())
    its_optimizer.perturb()
    assert_same_bits([twin.state_dict()["3.weight"]], before[3:4])
    twin(batch[0])
    assert_same_bits(list(twin.buffers()), statistics, "batch-norm statistics")
    optimizer.perturb()
    assert_same_bits(weights(alone), list(alone.state_dict(keep_vars=True)[k] for k, _ in alone.named_parameters()))
    for inside in (optimizer, model):
        with pytest.raises(RuntimeError, match="between perturb"):
            copied(inside)
    optimizer.restore()
    copied(model)
    optimizer.detach()
    assert not any(m._state_dict_hooks for m in model.modules())


def test_groups_and_state_are_those_of_the_base():
    params = fresh()
    optimizer = CrAM(params[:2], torch.optim.Adam, lr=0.1)

    def linked(o: CrAM) -> bool:
        return o.state is o.base_optimizer.state and o.param_groups is o.base_optimizer.param_groups

    optimizer.add_param_group({"params": params[2:]})
    two_halves(optimizer, params, gradients(1), gradients(2))
    assert linked(optimizer) and optimizer.param_groups[1]["cram_step"] == 1
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert linked(optimizer) and linked(copy.deepcopy(optimizer)) and linked(pickle.loads(pickle.dumps(optimizer)))


def test_an_instance_may_get_names():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = CrAM(model.named_parameters(), base, exclude=["1.*"])
    assert [(c.name, c.why_dense) for c in optimizer.coverage(TopK(0.5))] == [
        ("0.weight", None),
        ("0.bias", "fewer than 2 dims"),
        ("1.weight", "excluded by '1.*'"),
        ("1.bias", "excluded by '1.*'"),
    ]


@pytest.mark.parametrize(
    "make, word",
    [
        (lambda p: CrAM(torch.optim.SGD(p, lr=0.1), momentum=0.9), "momentum"),
        (lambda p: CrAM(p[:1], torch.optim.SGD(p, lr=0.1)), "3 parameters of the base optimizer, got 1"),
        (lambda p: CrAM([{"params": p, "rho": 1.0}], torch.optim.SGD(p, lr=0.1)), "rho"),
        (lambda p: CrAM(p, torch.optim.LBFGS), "LBFGS"),
        (lambda p: CrAM(CrAM(p, lr=0.1)), "CrAM"),
        (lambda p: CrAM(lr=0.1), "params"),
        (lambda p: CrAM([p[0], p[0]], lr=0.1), "twice"),
        (lambda p: CrAM([nn.Parameter(torch.empty(4, 8)[:, ::2])], lr=0.1), "dense"),
    ],
)
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_base_or_parameter_that_does_not_fit_is_refused(make, word):
    with pytest.raises(ValueError, match=word):
        make(fresh())


def test_add_param_group_that_is_refused_leaves_no_trace():
    params = fresh()
    optimizer = CrAM(params[:1], lr=0.1)
    with pytest.raises(ValueError, match="float64"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, dtype=torch.float64))]})
    assert len(optimizer.param_groups) == len(optimizer.base_optimizer.param_groups) == 1
    optimizer.add_param_group({"params": params[1:]})


def test_adam_step_counter_is_where_torch_has_it():
    for options in ({}, {"capturable": True}, {"fused": True}, {"foreach": True}):
        params = fresh()
        optimizer = CrAM(params, torch.optim.Adam, lr=0.1, **options)
        two_halves(optimizer, params, gradients(1), gradients(2))
        step = optimizer.state[params[0]]["step"]
        assert (step.dtype, step.shape, step.device.type, float(step)) == (torch.float32, (), "cpu", 1.0)


def test_published_uniform_pruning_goes_with_a_copy():
    params = fresh([(8, 16), (8, 16), (8, 16), (16,), (8, 16)])
    optimizer = TopkCrAM(params, torch.optim.SGD, unif_prune=True, lr=0.1)
    expected = [True, False, False, True, True]
    for o in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert [c.why_dense is not None for c in o.coverage(o.compression[0])] == expected
