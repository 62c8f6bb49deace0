"""Several processes that talk through gloo: DDP, FSDP2 and DTensor, checkpoints between numbers of ranks. The checks are in ranks.py."""

from pathlib import Path

import forked
import pytest
import ranks
import torch.distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for all: the first saves a checkpoint that the others load."""
    return tmp_path_factory.mktemp("ranks")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("count", [2, 1, 3, 4])
def test_ranks(count: int, folder: Path) -> None:
    forked.spawn(ranks.run, (count, str(folder), str(folder / f"store{count}")), count)
