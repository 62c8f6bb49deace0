"""Train every method with every seed, then evaluate all of them together: the tables of docs/results.md.

    python examples/images/study.py --config examples/images/configs/mnist5k_resnet8_multi.yaml --epochs 10 --out study

Runs that are finished (results.json is there) are not trained again, an interrupted one goes on after its last epoch.
--patterns and --repairs say what is evaluated, as in evaluate.py.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from checkpoints import read
from config import parse
from evaluate import REPAIRS, Evaluation, evaluate
from train import PLACES, train

sys.path.append(str(Path(__file__).parent.parent))
from comparison import arguments, in_one_word, runs_of, told

METHODS = {  # name: what it changes in the configuration
    "sgd": {"method": "sgd", "second_pass": "all"},
    "sgd-twice": {"method": "sgd", "second_pass": "all", "epochs": 2, "warmup_epochs": 2},
    "cram": {"method": "cram+"},
    "half": {"method": "cram+", "second_pass": "half"},
    "split": {"method": "cram+", "second_pass": "split"},
    "split-twice": {"method": "cram+", "second_pass": "split", "epochs": 2, "warmup_epochs": 2},
    "drawn": {"method": "cram+", "second_pass": "drawn"},
}


def begun(folder: Path) -> dict[str, Any] | None:
    path = folder / "last.pt"
    return read(path, "config")["config"] if path.is_file() else None


def main() -> None:
    given, options = arguments("Train every method with every seed and evaluate them.", METHODS)
    evaluated = argparse.ArgumentParser(usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    evaluated.add_argument("--patterns", type=json.loads, default=Evaluation([]).patterns, help="to prune to (0.9, 2:4)", metavar="A B ...")
    repairs = f"which states to test: {', '.join(map(repr, REPAIRS))}"
    evaluated.add_argument("--repairs", type=json.loads, default=list(REPAIRS), help=repairs, metavar="A B ...")
    what, options = evaluated.parse_known_args(in_one_word(options, {"--patterns", "--repairs"}))
    if unknown := [name for name in what.repairs if name not in REPAIRS]:
        raise ValueError(f"repairs must be some of {', '.join(map(repr, REPAIRS))}, got {unknown[0]!r}")
    if {"-h", "--help"} & set(options):
        print(evaluated.format_help().strip().replace("options:", "of the evaluation:"), end="\n\n")
    torch.set_num_threads(1)  # networks this small are all overhead on more
    config = parse(options)
    # Not the best epoch, which would be chosen on the test images.
    evaluation = Evaluation([], out=config.out, checkpoint="last.pt", patterns=what.patterns, repairs=what.repairs)
    runs = runs_of(config, METHODS, given, begun, train, PLACES - {"data_path"})
    evaluate(dataclasses.replace(evaluation, runs=[one.out for one in runs]))


if __name__ == "__main__":
    told(main)
