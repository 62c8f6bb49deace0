"""The reference's selection against brute force: keys from bytes, a full sort in plain Python, groups by counting indices."""

import itertools
import math
import struct
from fractions import Fraction

import pytest
import torch
from calls import SELECTIONS, flag, perturb, poisoned_masks, restore, selection
from cases import DTYPES, SMALL, VALUES, Case, Spec
from compare import assert_bitwise_equal, bits, clone

from cram_kernels import reference
from cram_kernels.patterns import TopK

NAN_KEY = 0x7FC00000
CASE = pytest.mark.parametrize("case", SMALL, ids=str)


def keys(t: torch.Tensor) -> list[int]:
    """In memory order, from the bytes of each number as a float32."""
    values = t.as_strided((t.numel(),), (1,)).double().tolist()
    return [NAN_KEY if math.isnan(x) else struct.unpack("<I", struct.pack("<f", x))[0] & 0x7FFFFFFF for x in values]


def pruned(t: torch.Tensor, keep: list[bool]) -> torch.Tensor:
    """t with +0 where not kept; a NaN is never hidden, and a prune, which computes nothing, leaves its bits."""
    out = t.clone()
    flat = out.as_strided((t.numel(),), (1,))
    for i, kept in enumerate(keep):
        if not kept and not math.isnan(flat[i]):
            flat[i] = 0.0
    return out


def mask_of(keep: list[bool]) -> torch.Tensor:
    return torch.tensor(
        [sum(keep[byte + bit] << bit for bit in range(8) if byte + bit < len(keep)) for byte in range(0, len(keep), 8)], dtype=torch.uint8
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_key_of_every_16_bit_number(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    assert reference.magnitude_key(every).tolist() == keys(every)


def test_keys_order_numbers_by_magnitude_and_put_nan_last() -> None:
    x = torch.cat([VALUES["bits"](3000, torch.float32, torch.Generator().manual_seed(0)), torch.tensor([0.0, -0.0, math.inf])])
    values, own = x.double().abs().tolist(), reference.magnitude_key(x).tolist()
    assert own == keys(x)
    by_key = sorted(range(len(own)), key=own.__getitem__)
    for i, j in itertools.pairwise(by_key):
        assert math.isnan(values[j]) or values[i] <= values[j]
        assert (own[i] == own[j]) == (values[i] == values[j] or (math.isnan(values[i]) and math.isnan(values[j])))


@CASE
@pytest.mark.parametrize("name", SELECTIONS)
def test_topk(case: Case, name: str) -> None:
    weights, masks = case.tensors("params"), poisoned_masks(case)
    before, untouched = [w.clone() for w in weights], [m.clone() for m in masks]
    chosen = selection(name, weights)
    own = [keys(w) for w in weights]
    thresholds = []
    for s, k in enumerate(chosen["k"].tolist()):
        ranked = sorted((key for i, ks in enumerate(own) if chosen["sets"][i] == s for key in ks), reverse=True)
        thresholds.append(NAN_KEY if k < 1 else -1 if k > len(ranked) else ranked[k - 1])
    expected = torch.tensor(thresholds, dtype=torch.int32)
    assert_bitwise_equal(reference.topk_threshold(weights, **chosen), expected, "topk_threshold")
    actual, stats = reference.prune_topk_(weights, masks, **chosen)
    assert_bitwise_equal(actual, expected, "thresholds")
    kept = [0] * len(thresholds)
    for i, s in enumerate(chosen["sets"]):
        if s < 0:
            assert_bitwise_equal(weights[i], before[i], f"dense weights[{i}]")
            assert_bitwise_equal(masks[i], untouched[i], f"dense masks[{i}]")
            continue
        keep = [thresholds[s] < key < NAN_KEY for key in own[i]]
        kept[s] += sum(keep)
        assert_bitwise_equal(weights[i], pruned(before[i], keep), f"weights[{i}]")
        assert_bitwise_equal(masks[i], mask_of(keep), f"masks[{i}]")
    assert stats[:, 0].tolist() == kept


@pytest.mark.parametrize("n", [1, 2, 3, 10, 1000, 25_557_032])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.7, 0.9, 0.99, 1 - 2**-53])
def test_k_is_the_published_expression(n: int, sparsity: float) -> None:
    """k = ceil(n * (1 - s)) with every step in float64, written out exactly; 0 keeps all."""
    share = float(Fraction(1) - Fraction(sparsity))
    expected = n + 1 if sparsity == 0 else math.ceil(Fraction(float(Fraction(n) * Fraction(share))))
    assert TopK(sparsity).k(n) == expected


SHAPES_NM = [  # shape with axis 1 in units of m, order in memory
    ((3, 2), (0, 1)),
    ((3, 2), (1, 0)),
    ((2, 3, 5), (0, 1, 2)),
    ((2, 2, 3, 3), (0, 1, 2, 3)),
    ((2, 2, 3, 3), (0, 2, 3, 1)),
    ((2, 1, 2, 2, 2), (4, 1, 3, 0, 2)),
    ((0, 1), (0, 1)),
    ((4, 0), (0, 1)),
]


@pytest.mark.parametrize("n, m", [(2, 4), (1, 2), (4, 8), (3, 4), (1, 5), (15, 16)])
@pytest.mark.parametrize("values", ["normal", "ties", "zeros", "nonfinite", "equal", "denormal"])
def test_nm(n: int, m: int, values: str) -> None:
    for dtype in DTYPES.values():
        for shape, order in SHAPES_NM:
            spec = Spec((shape[0], shape[1] * m, *shape[2:]), dtype, order)
            w = spec.place(VALUES[values](spec.numel, dtype, torch.Generator().manual_seed(n + m)))
            own = keys(w)
            keep = [True] * spec.numel
            others = [range(size) for dim, size in enumerate(spec.shape) if dim != 1]
            for start, *rest in itertools.product(range(0, spec.shape[1], m), *others):
                places = []  # of the group, in memory
                for c in range(start, start + m):
                    index = (rest[0], c, *rest[1:])
                    places.append(sum(i * stride for i, stride in zip(index, spec.strides, strict=True)))
                for place in sorted(places, key=own.__getitem__)[: m - n]:  # sorted() is stable: on a tie the earlier index goes
                    keep[place] = False
            keep = [kept and key < NAN_KEY for kept, key in zip(keep, own, strict=True)]
            expected, mask = pruned(w, keep), torch.full((-(-spec.numel // 8),), 0x5A, dtype=torch.uint8)
            reference.prune_nm_([w], [mask], [1], n, m)
            assert_bitwise_equal(w, expected, f"{n}:{m} of {spec}")
            assert_bitwise_equal(mask, mask_of(keep), f"mask of {spec}")


@CASE
def test_perturbing_and_pruning_at_once_is_one_after_the_other(case: Case) -> None:
    arguments = perturb(case, "amp")
    chosen = selection("groups", arguments["params"])
    once, twice = clone(arguments | chosen), clone(arguments)
    results = reference.perturb_topk_(**once)
    reference.perturb_masked_(**twice | {"masks": []})
    for (thresholds, stats), other in zip([results], [reference.prune_topk_(twice["params"], twice["masks"], **chosen)], strict=True):
        assert_bitwise_equal(thresholds, other[0], "thresholds")
        assert_bitwise_equal(stats, other[1], "stats")
    for name in ("params", "masks", "saved"):
        for i, (a, b) in enumerate(zip(once[name], twice[name], strict=True)):
            assert_bitwise_equal(a, b, f"{name}[{i}]")


@CASE
def test_restoring_brings_back_every_bit_and_only_once(case: Case) -> None:
    arguments = perturb(case)
    before = [bits(p).clone() for p in arguments["params"]]
    arguments |= selection("half", arguments["params"])
    reference.perturb_topk_(**arguments)
    saved, perturbed = arguments["saved"], arguments["perturbed"]
    reference.restore_(arguments["params"], saved, perturbed)
    for own, p in zip(before, arguments["params"], strict=True):
        assert torch.equal(own, bits(p)) and int(perturbed) == 0
    other = restore(case)
    reference.restore_(arguments["params"], other["saved"], perturbed)  # the flag is down: nothing happens
    for own, p in zip(before, arguments["params"], strict=True):
        assert torch.equal(own, bits(p))


def test_found_inf_is_set_and_never_cleared() -> None:
    def found(g: torch.Tensor, before: float, inv_scale: float) -> float:
        found_inf = torch.tensor(before)
        scale = torch.tensor(inv_scale)
        p = torch.zeros_like(g)
        reference.perturb_masked_([p], [g], [p.clone()], [], flag(0), torch.tensor(0.1), inv_scale=scale, found_inf=found_inf)
        return float(found_inf)

    big = torch.tensor([1.0, 3e38])
    assert found(big, 0, 1) == 0 and found(big, 1, 1) == 1
    assert found(big, 0, 10) == 1  # finite as it comes, not after unscaling
    assert found(torch.tensor([math.nan]), 0, 1) == 1 and found(torch.tensor([-math.inf], dtype=torch.float16), 0, 0.5) == 1
