"""What must be right before a time is printed: to the bit on a small input, and as far as it takes no full sort on the one that is timed.

Every function raises AssertionError where something is wrong.
"""

import math
from collections.abc import Callable
from typing import Any

import compare
import torch
from torch import Tensor

from cram_kernels import ops, reference
from cram_kernels.reference.key import NAN_KEY, entry, flat, magnitude_key, pack_bits
from cram_kernels.reference.perturb import uphill, write_

Arguments = dict[str, Any]


def run(op: str, arguments: Arguments) -> Any:
    return getattr(ops, op)(**arguments)


def small(op: str, arguments: Arguments) -> None:
    """All arguments and results equal the reference's, to the bit."""
    expected = compare.clone(arguments)  # on the CPU
    results = compare.contract_part(run(op, arguments)), compare.contract_part(run_reference(op, expected))
    for name, actual, wanted in [("", arguments, expected), ("result", *results)]:
        for (place, a), (_, e) in zip(compare.named_tensors(actual, name), compare.named_tensors(wanted), strict=True):
            compare.assert_bitwise_equal(a, e, f"{op}: {place}")


def run_reference(op: str, arguments: Arguments) -> Any:
    return getattr(reference, op)(**arguments)


def require(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(what)


def sample(tensors: list[Tensor]) -> list[int]:
    """About a dozen tensors of all sizes, the largest among them."""
    by_size = sorted(range(len(tensors)), key=lambda i: -tensors[i].numel())
    return by_size[:: max(1, len(tensors) // 12)]


def of_sample(op: str, arguments: Arguments) -> None:
    """Run an op that treats each tensor by itself; a dozen tensors then equal the reference's to the bit."""
    tensors = arguments["params"] if "params" in arguments else arguments["weights"]
    n, chosen = len(tensors), sample(tensors)
    part = {name: [v[i] for i in chosen] if isinstance(v, list) and len(v) == n else v for name, v in arguments.items()}
    expected = compare.clone(part)
    run_reference(op, expected)
    run(op, arguments)
    for (name, a), (_, e) in zip(compare.named_tensors(part), compare.named_tensors(expected), strict=True):
        compare.assert_bitwise_equal(a, e, f"{op}: {name} of the tensors {chosen}")


class Ranks:
    """Counts keys against a threshold: it is the k-th largest key if and only if fewer than k are larger, and k or more are not smaller."""

    def __init__(self, threshold: int) -> None:
        self.threshold, self.larger, self.not_smaller, self.kept = threshold, 0, 0, 0

    def keep(self, u: Tensor) -> Tensor:
        """bool [numel], in memory order."""
        keys = magnitude_key(flat(u))
        keep = (keys > self.threshold) & (keys < NAN_KEY)
        self.larger += int((keys > self.threshold).sum())
        self.not_smaller += int((keys >= self.threshold).sum())
        self.kept += int(keep.sum())
        return keep

    def check(self, k: int, what: str) -> None:
        found = f"{self.larger} keys are larger and {self.not_smaller} not smaller"
        require(self.larger < k <= self.not_smaller, f"{what}: threshold {self.threshold} is not the {k}-th largest key: {found}")


def topk(op: str, arguments: Arguments) -> None:
    """perturb_topk_ or prune_topk_, with one selection set: the threshold is the k-th largest key of all u, and every weight, saved weight
    and mask follows from it."""
    a = arguments
    name = "params" if "params" in a else "weights"
    before = [w.clone() for w in a[name]]
    thresholds, stats = run(op, a)
    ranks = Ranks(int(thresholds))
    for i, w in enumerate(a[name]):
        u = before[i]
        if "grads" in a:
            (u,) = uphill([u], [a["grads"][i]], a["rho"], None, None, a.get("masters", [])[i : i + 1])
        keep = ranks.keep(u) if a["sets"][i] >= 0 else None
        write_(expected := torch.empty_like(w), u, keep)
        compare.assert_bitwise_equal(w, expected, f"{op}: {name}[{i}]")
        if (saved := entry(a.get("saved", []), i)) is not None:
            compare.assert_bitwise_equal(saved, before[i], f"{op}: saved[{i}]")
        if keep is not None and (mask := entry(a["masks"], i)) is not None:
            compare.assert_bitwise_equal(mask, pack_bits(keep), f"{op}: masks[{i}]")
    ranks.check(int(a["k"]), op)
    require(int(stats[0, 0]) == ranks.kept, f"{op}: says that {int(stats[0, 0])} weights were kept, and kept {ranks.kept}")


def topk_threshold(op: str, arguments: Arguments) -> None:
    """The threshold is the k-th largest key."""
    ranks = Ranks(int(run(op, arguments)))
    for w in arguments["weights"]:
        ranks.keep(w)
    ranks.check(int(arguments["k"]), op)


def grad_norm(op: str, arguments: Arguments) -> None:
    """Within one unit in the last place of a float64 sum in another order."""
    expected = math.sqrt(sum(float(g.double().square().sum()) for g in arguments["grads"]))
    found = float(run(op, arguments))
    require(abs(found - expected) <= 2**-23 * expected, f"{op}: must be {expected}, got {found}")


REAL: dict[str, Callable[[str, Arguments], None]] = {
    "topk_threshold": topk_threshold,
    "prune_topk_": topk,
    "perturb_topk_": topk,
    "grad_norm": grad_norm,
}


def real(op: str, arguments: Arguments) -> None:
    """The check of the input that is timed; the op runs once on it."""
    REAL.get(op, of_sample)(op, arguments)
