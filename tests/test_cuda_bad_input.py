"""Bad input to the CUDA library is refused by the checks that every backend shares, before anything is launched."""

import pytest
import torch
from calls import perturb
from capture import nodes
from cases import Drawn, Spec
from compare import check, compare_all, map_tensors
from executor import CudaOps, Memory
from test_bad_input import assert_refused, mistakes_of
from test_schema import SAMPLES
from torch import Tensor

from cram_kernels import backend


@pytest.mark.parametrize("op", SAMPLES)
def test_wrong(executed, monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    """Lengths, dtypes, shapes, strides, other devices ... of each argument in turn, while a stream is captured that stays empty."""
    monkeypatch.setattr(backend, "select", lambda tensors: CudaOps())
    tried = 0
    with executed.stream() as stream, executed.captured(stream) as graph:
        for argument, value in SAMPLES[op]().items():
            for wrong in mistakes_of(op, argument, value).values():
                assert_refused(op, argument, SAMPLES[op]() | {argument: wrong})
                tried += 1
    assert tried > 5 and nodes(executed, graph) == 0


@pytest.mark.parametrize("op", SAMPLES)
def test_right(executed, op: str) -> None:
    """The call that the mistakes are made in."""
    check(executed, op, SAMPLES[op]())


@pytest.mark.parametrize("op", ["perturb_topk_", "prune_topk_", "perturb_nm_", "prune_nm_", "grad_norm"])
def test_out_of_memory_changes_nothing(executed, monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    """Each allocation fails in turn: nothing has been changed then, the flag and the weights neither."""
    far = Drawn("normal", [Spec((64, 64)), Spec((4096, 16), order=(1, 0))])  # N:M with large tiles, which takes memory
    made = perturb(far)
    weights = {"weights": made["params"], "masks": made["masks"]}
    pattern, chosen = {"prune": [1, 1], "n": 2, "m": 4}, {"sets": [0, 0], "k": torch.tensor([20_000])}
    arguments = {
        "perturb_topk_": made | chosen,
        "prune_topk_": weights | chosen,
        "perturb_nm_": made | pattern,
        "prune_nm_": weights | pattern,
        "grad_norm": {"grads": made["grads"]},
    }[op]
    before = map_tensors(arguments, Tensor.clone)
    for left in range(100):
        monkeypatch.setattr(executed, "memory", Memory(executed, left))
        try:
            executed(op, arguments)
        except RuntimeError as error:
            assert "API call failed" in str(error)  # all that the stable ABI says
        else:
            break
        compare_all(op, arguments, before)
    assert 0 < left < 99


def test_the_norm_of_nothing(executed) -> None:
    """By a call below the public op, which takes no such list to a backend."""
    inv_scale = torch.tensor(0.5)
    with executed.known([inv_scale]), executed.memory:
        norm = CudaOps().grad_norm([], inv_scale=inv_scale)
        executed.cudart.synchronize()
    executed.memory.forget()
    assert norm.item() == 0
