"""Top-k of the CUDA backend, executed on the CPU, equals the reference to the bit."""

import pytest
import torch
from calls import PERTURB_VARIANTS, SELECTIONS, perturb, poisoned_masks, selection
from capture import check_captured, launches
from cases import HOSTILE, LARGE, SMALL, Case, Drawn, Spec, mixed
from compare import check

CASE = pytest.mark.parametrize("case", SMALL, ids=str)
MEDIUM = Drawn(  # a set that is sampled
    "normal", [Spec((160, 250)), Spec((5, 5)), Spec((64, 8, 3, 3), order=(0, 2, 3, 1), offset=3), Spec((20_011,), torch.bfloat16, offset=1)]
)


def arguments_of(case: Case | Drawn, name: str, variant: str = "plain") -> dict:
    arguments = perturb(case, variant)
    return arguments | selection(name, arguments["params"])


def pruning(case: Case | Drawn, name: str) -> dict:
    weights = case.tensors("params")
    return {"weights": weights, "masks": poisoned_masks(case), **selection(name, weights)}


@CASE
def test_perturb_topk(executed, case: Case) -> None:
    for i, name in enumerate(SELECTIONS):
        check(executed, "perturb_topk_", arguments_of(case, name, PERTURB_VARIANTS[i % len(PERTURB_VARIANTS)]))


@CASE
def test_prune_topk(executed, case: Case) -> None:
    for name in ("largest", "half", "smallest", "groups", "all_dense"):
        arguments = pruning(case, name)
        check(executed, "prune_topk_", arguments)
        check(executed, "topk_threshold", {key: arguments[key] for key in ("weights", "sets", "k")})


@pytest.mark.parametrize("variant", PERTURB_VARIANTS)
def test_in_all_ways(executed_in_all_ways, variant: str) -> None:
    """Small sets, whose weights are all candidates, and one that is sampled; ties of one in seven weights make it fall back."""
    for case, name in ((Case("bits", "offsets", "mixed"), "groups"), (Case("ties", "shapes", "mixed"), "half"), (MEDIUM, "tenth")):
        check(executed_in_all_ways, "perturb_topk_", arguments_of(case, name, variant))
    check(executed_in_all_ways, "prune_topk_", pruning(MEDIUM, "half"))


def test_one_set_of_16_bits_in_all_ways(executed_in_all_ways) -> None:
    """Every block finds the threshold itself."""
    case = Drawn("normal", [Spec((300, 200), torch.bfloat16), Spec((3000,), torch.bfloat16)])
    check(executed_in_all_ways, "perturb_topk_", arguments_of(case, "tenth"))
    check(executed_in_all_ways, "prune_topk_", pruning(case, "tenth"))


def test_a_warp_of_many_chunks(executed_in_all_ways) -> None:
    """On a card of one SM, as on any with a large list, a warp that sets wrong guesses right goes from one chunk to the next."""
    executed_in_all_ways.variants = ("one sm", "one block")
    case = Drawn("normal", [Spec((500, 700)), Spec((99,), torch.bfloat16)])
    check(executed_in_all_ways, "perturb_topk_", arguments_of(case, "half"))


def test_nans_of_dense_tensors_are_their_own(executed) -> None:
    """A block that goes from a dense tensor to one of a set leaves behind what it has counted there."""
    executed.variants = ("one block",)
    arguments = perturb(Drawn("nonfinite", [Spec((5000,)), Spec((3000,))]))
    check(executed, "perturb_topk_", arguments | {"sets": [-1, 0], "k": torch.tensor([2000])})


def test_fallback_in_all_ways(executed_in_all_ways) -> None:
    for variant in ("amp", "masters"):
        arguments = perturb(MEDIUM._replace(values="narrow"), variant)
        _, stats = check(executed_in_all_ways, "perturb_topk_", arguments | selection("half", arguments["params"]))
        assert stats[0, 2] == 1, f"no fallback, statistics {stats.tolist()}"


@pytest.mark.parametrize("case", LARGE[1::2] + HOSTILE, ids=str)
def test_large(executed, case: Case) -> None:
    check(executed, "perturb_topk_", arguments_of(case, "tenth", "masters" if case.dtype != "fp32" else "amp"))


@pytest.mark.parametrize("name", ["second", "keep_all", "groups"])
def test_large_selections(executed, name: str) -> None:
    case = Case("normal", "large", "mixed")
    check(executed, "perturb_topk_", arguments_of(case, name))
    check(executed, "prune_topk_", pruning(case, name))


def test_sets_of_ten_thousand(executed) -> None:
    check(executed, "perturb_topk_", arguments_of(Case("normal", "pieces", "mixed"), "per_tensor"))


def test_ordinary_weights_need_no_fallback_and_little_memory(executed) -> None:
    case = Drawn("normal", [Spec((2100, 2000))])
    _, stats = check(executed, "perturb_topk_", arguments_of(case, "half"))
    numel = case.specs[0].numel
    assert 0 < stats[0, 1] < 0.03 * numel and stats[0, 2] == 0
    assert executed.memory.bytes <= 0.2 * numel


def tied(dtype: torch.dtype, value: float, share: float) -> dict:
    """The arguments of 60,000 normal weights, of which a random share has one magnitude and does not move."""
    arguments = perturb(Drawn("normal", [Spec((300, 200), dtype)]), rho=0.0)  # so that no other becomes zero
    param, grad = arguments["params"][0], arguments["grads"][0]
    same = torch.rand(param.shape, generator=torch.Generator().manual_seed(3)) < share
    param[same], grad[same] = value, 0
    param[same & (torch.arange(param.numel()).view(param.shape) % 2 == 0)] = -value
    return arguments | {"sets": [0]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_pruned_model_needs_no_fallback(executed, dtype: torch.dtype) -> None:
    """Half of the weights are zero and stay so. The threshold is the least of the others, the one above it, or zero."""
    arguments = tied(dtype, 0.0, 0.5)
    others = int((arguments["params"][0] != 0).sum())
    for k in (others - 1, others, others + 1, others + 20_000):
        thresholds, stats = check(executed, "perturb_topk_", arguments | {"k": torch.tensor([k])})
        assert (int(thresholds[0]) == 0) == (k > others)
        assert stats[0, 2] == 0 and stats[0, 1] < (40_000 if k > others + 1 else 6000), stats.tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_numbers_that_are_no_halves(executed, dtype: torch.dtype) -> None:
    """Numbers of 16 bits are compared as halves. Bits of bfloat16 from 2^121 on are NaN there, and are told apart all the same."""
    arguments = perturb(Drawn("normal", [Spec((20, 4096), dtype)]), rho=0.0) | {"sets": [0]}
    arguments["params"][0][3:8] *= 2.0**122 if dtype == torch.bfloat16 else 2.0**13
    for k in (5000, 60_000):  # the threshold is among them, or below
        check(executed, "perturb_topk_", arguments | {"k": torch.tensor([k])})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_mask_between_two_words(executed, dtype: torch.dtype) -> None:
    arguments = perturb(Drawn("normal", [Spec((20, 4096), dtype)]))
    arguments["masks"] = [torch.full((20 * 4096 // 8 + 1,), 0x5A, dtype=torch.uint8)[1:]]
    check(executed, "perturb_topk_", arguments | {"sets": [0], "k": torch.tensor([5000])})


def test_a_pruned_model_in_all_ways(executed_in_all_ways) -> None:
    arguments = tied(torch.float32, 0.0, 0.5)
    others = int((arguments["params"][0] != 0).sum())
    for k in (others, others + 1):
        check(executed_in_all_ways, "perturb_topk_", arguments | {"k": torch.tensor([k])})


@pytest.mark.parametrize("rank", [0.25, 0.285, 0.3, 0.33, 0.37, 0.385, 0.42])
def test_keys_that_many_bfloat16_weights_share(executed, rank: float) -> None:
    """A tenth of the weights has the magnitude 1, which are ranks 28 % to 38 %. Well inside and outside of them, no fallback."""
    arguments = tied(torch.bfloat16, 1.0, 0.1)
    _, stats = check(executed, "perturb_topk_", arguments | {"k": torch.tensor([int(rank * 60_000)])})
    assert stats[0, 2] == 0 or rank in (0.285, 0.3, 0.37, 0.385), stats.tolist()


def test_launches(executed) -> None:
    assert launches(executed, "perturb_topk_", arguments_of(Drawn("normal", mixed([Spec((100,))] * 450)), "per_tensor")) == 3
    assert launches(executed, "perturb_topk_", arguments_of(Drawn("normal", mixed([Spec((100,))] * 450)), "half")) <= 3
    assert launches(executed, "perturb_topk_", arguments_of(Case("normal", "large", "fp32"), "half")) == 3


def test_many_tensors_take_several_launches(executed) -> None:
    case = Drawn("normal", mixed([Spec((1 + 71 * i % 331,)) for i in range(901)]))
    check(executed, "perturb_topk_", arguments_of(case, "half", "few_masks"))
    check(executed, "perturb_topk_", arguments_of(case, "groups", "masters"))
    check(executed, "prune_topk_", pruning(case, "per_tensor"))


@pytest.mark.parametrize("rho", [0.0, float("inf"), float("-inf"), float("nan")])
def test_rho(executed, rho: float) -> None:
    for values in ("normal", "zeros"):
        arguments = perturb(Case(values, "shapes", "mixed"), rho=rho)
        check(executed, "perturb_topk_", arguments | selection("half", arguments["params"]))


@pytest.mark.parametrize("values", ["normal", "narrow"])
def test_captured(executed, values: str) -> None:
    """A graph serves every later step: other weights, gradients, rho and k, with and without a fallback."""
    check_captured(executed, "perturb_topk_", arguments_of(MEDIUM._replace(values=values), "half", "amp"))
    check_captured(executed, "prune_topk_", pruning(MEDIUM._replace(values=values), "tenth"))
    check_captured(executed, "topk_threshold", {key: pruning(MEDIUM, "tenth")[key] for key in ("weights", "sets", "k")})
