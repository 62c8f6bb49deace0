"""Where the numbers lie: dtypes, memory formats, views, storage that changes between steps. The values never depend on it."""

import copy
import gc
import weakref

import pytest
import torch
from optim_cases import PlainCrAM, assert_same_bits, clones, random_tensors, set_gradients, two_halves
from torch import Tensor, nn

from cram_kernels import NM, CrAM, TopK

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
SHAPES = [(8, 16), (16,)]
BASES = [(torch.optim.SGD, SGD), (torch.optim.AdamW, {"lr": 0.01}), (torch.optim.RMSprop, {"lr": 0.01})]


def fresh(shapes=SHAPES) -> list[nn.Parameter]:
    return [nn.Parameter(t) for t in random_tensors(shapes, 0)]


def run(optimizer: CrAM, params: list[nn.Parameter], seeds, shapes=SHAPES) -> list[nn.Parameter]:
    for seed in seeds:
        two_halves(optimizer, params, random_tensors(shapes, seed), random_tensors(shapes, seed + 100))
    return params


def usual(seeds, shapes=SHAPES, base=torch.optim.SGD, options=SGD) -> list[nn.Parameter]:
    """The weights after these steps, with contiguous tensors of their own."""
    params = fresh(shapes)
    return run(CrAM(params, base, compression=[TopK(0.5)], **options), params, seeds, shapes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_and_mixed_parameters(dtype):
    shapes = [(8, 16), (16,), (8, 8, 3, 3), (16, 8)]

    def fresh():
        return [nn.Parameter(t if i == 3 else t.to(dtype)) for i, t in enumerate(random_tensors(shapes, 0))]

    params, other = fresh(), fresh()
    optimizer = CrAM(params, compression=[TopK(0.6)], **SGD)
    judge = PlainCrAM(other, lr=0.1, momentum=[0.9], weight_decay=[5e-4])
    for seed in range(5):
        first, second = ([g.to(p.dtype) for g, p in zip(random_tensors(shapes, s), params, strict=True)] for s in (20 + seed, 40 + seed))
        two_halves(optimizer, params, first, second)
        set_gradients(other, first)
        judge.perturb(TopK(0.6))
        set_gradients(other, second)
        judge.step()
        assert_same_bits(params, other)


@pytest.mark.parametrize("pattern", [TopK(0.5), NM(2, 4)], ids=str)
def test_memory_formats(pattern):
    """channels_last and transposed weights, and gradients with other strides than their weights: the values of contiguous ones."""
    shapes = [(8, 8, 3, 3), (8, 16)]
    first, second = random_tensors(shapes, 1), random_tensors(shapes, 2)

    def strided(tensors, which):
        conv, linear = tensors
        return [conv.to(memory_format=torch.channels_last), linear.t().contiguous().t()] if which else [conv, linear]

    results = []
    for of_weights, of_gradients in ((False, False), (True, True), (True, False), (False, True)):
        params = [nn.Parameter(t) for t in strided(random_tensors(shapes, 0), of_weights)]
        strides = [p.stride() for p in params]
        optimizer = CrAM(params, compression=[pattern], **SGD)
        for _ in range(2):
            two_halves(optimizer, params, strided(first, of_gradients), strided(second, of_gradients))
        assert [p.stride() for p in params] == strides
        results.append(params)
    for result in results[1:]:
        assert_same_bits(result, results[0])


def test_expanded_gradients():
    """A gradient that autograd hands over with stride 0."""
    results = []
    for expanded in (True, False):
        p = nn.Parameter(random_tensors([(6, 8)], 0)[0])
        optimizer = CrAM([p], compression=[TopK(0.5)], **SGD)
        g = torch.ones(()).expand(6, 8)
        for half in (optimizer.perturb, optimizer.step):
            p.grad = g if expanded else g.contiguous()
            half()
        results.append(p)
    assert_same_bits(results[:1], results[1:])


def test_weights_that_are_slices_of_one_buffer():
    """Unaligned views side by side, as flat parameters are: right, and nothing around them is written."""
    buffer = torch.full((160,), 7.0)
    params = [nn.Parameter(buffer[1:129].view(8, 16)), nn.Parameter(buffer[129:145])]
    for p, q in zip(params, fresh(), strict=True):
        p.data.copy_(q)
    run(CrAM(params, compression=[TopK(0.5)], **SGD), params, range(3))
    assert_same_bits(params, usual(range(3)))
    assert (buffer[:1] == 7).all() and (buffer[145:] == 7).all()


def test_gradients_that_are_slices_of_one_buffer():
    """DistributedDataParallel with gradient_as_bucket_view writes the second gradients over the first ones."""
    params = fresh()
    bucket = torch.zeros(144)
    views = [bucket[:128].view(8, 16), bucket[128:].view(16)]

    def fill(seed):
        for p, view, g in zip(params, views, random_tensors(SHAPES, seed), strict=True):
            p.grad = view.copy_(g)

    optimizer = CrAM(params, compression=[TopK(0.5)], **SGD)
    for seed in range(3):
        fill(seed)
        optimizer.perturb()
        fill(seed + 100)
        optimizer.step()
    assert_same_bits(params, usual(range(3)))


def test_storage_may_be_swapped_between_steps():
    """`p.data = ...`, as weight averaging does: the optimizer holds no old pointer."""
    params = fresh()
    optimizer = CrAM(params, compression=[TopK(0.5)], **SGD)
    for seed in range(3):
        for p in params:
            p.data = p.data.clone()
        run(optimizer, params, [seed])
    assert_same_bits(params, usual(range(3)))


@pytest.mark.parametrize("base, options", BASES)
def test_memory_format_may_change_between_steps(base, options):
    """model.to(memory_format=channels_last) after some steps: the state follows."""
    shapes = [(8, 8, 3, 3)]
    params = fresh(shapes)
    optimizer = CrAM(params, base, compression=[TopK(0.5)], **options)
    run(optimizer, params, range(2), shapes)
    params[0].data = params[0].data.to(memory_format=torch.channels_last)
    run(optimizer, params, range(2, 4), shapes)
    assert_same_bits(params, usual(range(4), shapes, base, options))


@pytest.mark.parametrize("base, options", BASES)
def test_checkpoint_of_another_memory_format(base, options):
    shapes = [(8, 8, 3, 3)]
    params = fresh(shapes)
    optimizer = CrAM(params, base, compression=[TopK(0.5)], **options)
    run(optimizer, params, range(2), shapes)
    again = [nn.Parameter(params[0].detach().clone(memory_format=torch.channels_last))]
    resumed = CrAM(again, base, compression=[TopK(0.5)], **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(resumed, again, range(2, 4), shapes)
    assert_same_bits(again, usual(range(4), shapes, base, options))


@pytest.mark.parametrize("weight", [torch.randn(8, 16)[:, ::2], torch.randn(8, 1).expand(8, 8)], ids=["holes", "expanded"])
def test_weights_with_holes_or_overlap_are_refused(weight):
    with pytest.raises(ValueError, match="dense"):
        CrAM([nn.Parameter(weight)], lr=0.1)


@pytest.mark.filterwarnings("ignore:CrAM. .* prunes none")
def test_scalar_parameter():
    """0 dims: perturbed, not pruned, updated."""
    p = nn.Parameter(torch.tensor(1.5))
    optimizer = CrAM([p], compression=[TopK(0.5)], rho=0.5, lr=0.25)
    set_gradients([p], [torch.tensor(1.0)])
    with optimizer.perturbed():
        assert p.item() == 2.0
        set_gradients([p], [torch.tensor(3.0)])
    optimizer.step()
    assert p.item() == 0.5


def test_bits_do_not_depend_on_the_threads(set_threads):
    shapes = [(300, 300), (300,)]
    results: list[list[Tensor]] = []
    for count in (1, 2):
        set_threads(count)
        params = fresh(shapes)
        run(CrAM(params, compression=[TopK(0.9), NM(2, 4)], normalize_grad=True, **SGD), params, range(3), shapes)
        results.append(clones(params))
    assert_same_bits(*results)


def test_an_optimizer_that_is_dropped_is_gone_at_once():
    """Without waiting for the garbage collector: its memory is two copies of the weights. The base instance may live on, and works."""
    p = nn.Parameter(torch.ones(4, 4))
    base = torch.optim.SGD([p], lr=0.5)
    optimizer = CrAM(base)
    p.grad = torch.ones(4, 4)
    optimizer.perturb()
    optimizer.restore()
    gone = weakref.ref(optimizer._workspace)
    gc.disable()
    try:
        del optimizer
        assert gone() is None
    finally:
        gc.enable()
    p.grad = torch.ones(4, 4)
    base.step()
    assert torch.equal(p.detach(), torch.full((4, 4), 0.5))
