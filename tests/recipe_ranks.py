"""What torchrun starts in test_recipe_images_train.py: several runs of train.py, one after the other, for importing torch takes longest.

Arguments: JSON, a list of [arguments of train.py, the epoch before which to interrupt or null].
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "images"))
import train
from config import parse

torch.set_num_threads(1)
one_epoch = train.one_epoch
for arguments, last in json.loads(sys.argv[1]):
    epochs = iter(range(1000))

    def interrupted(*args, epochs=epochs, last=last):
        if next(epochs) == last:
            raise InterruptedError
        return one_epoch(*args)

    train.one_epoch = interrupted
    try:
        train.train(parse(arguments))
        assert last is None
    except InterruptedError:
        assert last is not None
dist.destroy_process_group()
