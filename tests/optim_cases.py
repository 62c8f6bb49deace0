"""What the optimizer tests share: a small network and its data, bitwise comparison, and CrAM spelled out with the reference ops."""

from collections.abc import Iterator, Sequence

import torch
from compare import assert_bitwise_equal, bits
from torch import Tensor, nn

from cram_kernels import reference
from cram_kernels.patterns import NM, Pattern, TopK


def assert_same_bits(actual: Sequence[Tensor], expected: Sequence[Tensor], what: str = "weights") -> None:
    """Equal to the bit, element by element, whatever their memory formats."""
    assert len(actual) == len(expected), f"{what}: {len(actual)} tensors, expected {len(expected)}"
    for i, (a, e) in enumerate(zip(clones(actual), clones(expected), strict=True)):
        assert_bitwise_equal(a, e, f"{what}[{i}]")


def same_bits(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(torch.equal(bits(a), bits(e)) for a, e in zip(actual, expected, strict=True))


def network(seed: int = 0) -> nn.Sequential:
    """3 x 8 x 8 images -> 8 classes; conv and batch norm, a head with a bias; every axis 1 but the stem's is a multiple of 8."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 8),
    )


def batches(count: int, seed: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield torch.randn(8, 3, 8, 8, generator=generator), torch.randint(8, (8,), generator=generator)


def backward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """One forward and backward pass; the loss."""
    loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    return loss.detach()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach() for p in model.parameters()]


def clones(tensors) -> list[Tensor]:
    """Contiguous copies."""
    return [t.detach().clone(memory_format=torch.contiguous_format) for t in tensors]


def random_tensors(shapes, seed: int, dtype=torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def two_halves(optimizer, params: Sequence[Tensor], first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> None:
    """One step of perturb() and step() with these gradients; None: the parameter is not used in that pass."""
    set_gradients(params, first)
    optimizer.perturb()
    set_gradients(params, second)
    optimizer.step()


def set_gradients(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else g.clone(memory_format=torch.preserve_format)


EMPTY = torch.empty(0)


class PlainCrAM:
    """The optimizer restated with the reference ops, one group, nothing cached: the judge of CrAM's bits.

    `base` is "sgd", "adam" or "adamw", and `options` are the keywords of the reference op; the pattern of each step is handed in.
    """

    def __init__(
        self,
        params,
        base: str = "sgd",
        *,
        lr: float,
        rho: float = 0.05,
        plus: bool = True,
        sparse_grad: bool = True,
        normalize_grad: bool = False,
        **options,
    ):
        self.params = list(params)
        self.base, self.options, self.plus, self.sparse_grad, self.normalize_grad = base, options, plus, sparse_grad, normalize_grad
        self.lr, self.rho = torch.tensor(lr, dtype=torch.float32), torch.tensor(rho, dtype=torch.float32)
        self.perturbed = torch.zeros((), dtype=torch.int32)
        self.momentum_buffers = [torch.zeros_like(p) for p in self.params]
        self.exp_avgs, self.exp_avg_sqs, self.max_exp_avg_sqs = ([torch.zeros_like(p) for p in self.params] for _ in range(3))
        self.steps = [torch.tensor(0.0) for _ in self.params]
        self.fresh = [1] * len(self.params)
        self.nothing_saved()

    def nothing_saved(self) -> None:
        self.saved, self.first, self.masks = ([EMPTY] * len(self.params) for _ in range(3))

    def perturb(self, pattern: Pattern, exclude: Sequence[int] = ()) -> None:
        """Everything with a gradient goes uphill; what has 2 or more dims is pruned, but for the indices in `exclude`."""
        have = [i for i, p in enumerate(self.params) if p.grad is not None]
        params, grads = [self.params[i].detach() for i in have], [self.params[i].grad for i in have]
        prune = [int(i not in exclude and pattern.why_dense(p.shape) is None) for i, p in zip(have, params, strict=True)]
        saved = [torch.empty_like(p) for p in params]
        masks = [torch.zeros(-(-p.numel() // 8), dtype=torch.uint8) if yes else EMPTY.byte() for p, yes in zip(params, prune, strict=True)]
        rho = self.rho / (reference.grad_norm(grads) + 1e-12) if self.normalize_grad else self.rho
        if isinstance(pattern, TopK):
            sets = [(i if pattern.scope == "tensor" else 0) if yes else -1 for i, yes in enumerate(prune)]
            own = [sum(p.numel() for p, s in zip(params, sets, strict=True) if s == j) for j in range(len(params))]
            k = torch.tensor([pattern.k(n) for n in own])
            reference.perturb_topk_(params, grads, saved, masks, self.perturbed, rho, sets, k)
        else:
            assert isinstance(pattern, NM)
            reference.perturb_nm_(params, grads, saved, masks, self.perturbed, rho, prune, pattern.n, pattern.m)
        for j, i in enumerate(have):
            self.saved[i], self.masks[i] = saved[j], masks[j]
            if self.plus:
                self.first[i] = grads[j]
            self.params[i].grad = None

    def undo(self) -> None:
        """Back to the weights before perturb(), without an update. The first gradients are gone."""
        reference.restore_([p.detach() for p in self.params], self.saved, self.perturbed)
        self.nothing_saved()

    def step(self) -> None:
        params = [p.detach() for p in self.params]
        grads = [EMPTY if p.grad is None else p.grad for p in self.params]
        masks = self.masks if self.sparse_grad else [EMPTY] * len(params)
        common = (params, self.saved, grads, self.first, masks, self.perturbed)
        if self.base == "sgd":
            reference.restore_sgd_(*common, self.momentum_buffers, self.fresh, self.lr, **self.options)
        else:
            state = (self.exp_avgs, self.exp_avg_sqs, self.max_exp_avg_sqs, self.steps)
            reference.restore_adam_(*common, *state, self.lr, decoupled=self.base == "adamw", **self.options)
        for i, (g, first) in enumerate(zip(grads, self.first, strict=True)):
            if g.numel() + first.numel() > 0:
                self.fresh[i] = 0
            self.params[i].grad = None
        self.nothing_saved()


def seen_pattern(plain: PlainCrAM, patterns: Sequence[Pattern], perturbed: Sequence[Tensor], **options) -> Pattern:
    """Which of the patterns leads to these perturbed weights, to the bit; leaves `plain` perturbed with it. None: an error."""
    grads = [p.grad for p in plain.params]
    for pattern in patterns:
        for p, g in zip(plain.params, grads, strict=True):
            p.grad = g
        plain.perturb(pattern, **options)
        if same_bits(perturbed, plain.params):
            return pattern
        plain.undo()
    raise AssertionError(f"the perturbed weights are those of none of {[str(p) for p in patterns]}")
