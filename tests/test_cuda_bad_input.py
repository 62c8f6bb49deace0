"""Bad input to the CUDA library is refused by the checks that every backend shares, before anything is launched."""

import pytest
from capture import nodes
from compare import check
from executor import CudaOps
from test_bad_input import assert_refused, mistakes_of
from test_schema import SAMPLES

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
