"""optimizer.last: what the last perturb did, for logs."""

import pickle

import torch
from optim_cases import random_tensors, set_gradients
from torch import nn

from cram_kernels import NM, CrAM, TopK

SHAPES = [(64, 64), (64,), (32, 64)]


def perturbed(pattern, **options) -> CrAM:
    params = [nn.Parameter(t) for t in random_tensors(SHAPES, 0)]
    set_gradients(params, random_tensors(SHAPES, 1))
    optimizer = CrAM(params, lr=0.1, compression=[pattern], **options)
    optimizer.perturb()
    return optimizer


def test_of_a_topk() -> None:
    optimizer = perturbed(TopK(0.9))
    pruned = torch.cat([p.detach().flatten() for p in optimizer.param_groups[0]["params"] if p.dim() > 1])
    last = optimizer.last
    assert last.pattern_index == 0 and last.pattern == TopK(0.9)
    assert last.kept_share.item() == (pruned != 0).float().mean().item()
    assert 0 < last.magnitudes.item() < pruned[pruned != 0].abs().min()
    assert 0 <= last.candidate_share.item() <= 1 and not last.fallback
    found = last.to_dict()
    assert list(found) == ["pattern_index", "pattern", "threshold", "kept", "candidates", "fallback"]
    assert found["kept"] == last.kept_share.item() and found["fallback"] == 0.0


def test_it_prints_its_numbers() -> None:
    last = perturbed(TopK(0.9)).last
    assert str(last) == (
        f"StepInfo(pattern_index=0, pattern='90 %', threshold={last.magnitudes.item()}, kept={last.kept_share.item()}, "
        f"candidates={last.candidate_share.item()}, fallback=0.0)"
    )


def test_of_several_sets_and_of_none() -> None:
    several = perturbed(TopK(0.5, "tensor")).last
    assert several.magnitudes.shape == (2,) and several.to_dict()["threshold"] == several.magnitudes.max().item()
    assert perturbed(TopK(0)).last.to_dict()["threshold"] == -1.0
    assert perturbed(NM(2, 4)).last.to_dict() == {"pattern_index": 0, "pattern": str(NM(2, 4))}


def test_a_pickle_whose_index_has_the_old_name() -> None:
    last = perturbed(TopK(0.9)).last
    written = pickle.dumps(last, protocol=3)
    found = pickle.loads(written.replace(b"\x0d\0\0\0pattern_index", b"\x05\0\0\0level"))
    assert found.pattern_index == last.pattern_index == 0 and not hasattr(found, "level")
    assert found.to_dict() == last.to_dict()


def test_a_writer_gets_the_numbers() -> None:
    calls = []

    class Writer:
        def add_scalar(self, tag: str, value: float, step: int) -> None:
            calls.append((tag, value, step))

    last = perturbed(TopK(0.9)).last
    last.log(Writer(), 7)
    assert calls == [(f"cram/{name}", value, 7) for name, value in last.to_dict().items() if name != "pattern"]
