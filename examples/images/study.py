"""Train every method with every seed, then evaluate all of them together: the table of docs/results.md.

    python examples/images/study.py --config examples/images/configs/mnist5k_resnet8_multi.yaml --epochs 10 --out study

Runs that are finished (results.json is there) are not trained again, an interrupted one goes on after its last epoch.
"""

import argparse
import dataclasses

import torch
from config import Config, parse
from evaluate import Evaluation, evaluate
from train import train

METHODS = {  # name: what it changes in the configuration
    "sgd": {"method": "sgd"},
    "sgd-twice": {"method": "sgd", "epochs": 2, "warmup_epochs": 2},
    "cram": {"method": "cram+"},
    "half": {"method": "cram+", "second_pass": "half"},
    "split": {"method": "cram+", "second_pass": "split"},
}


def changed(config: Config, name: str, seed: int) -> Config:
    changes: dict = {"seed": seed, "out": config.out / f"{name}-{seed}", **METHODS[name]}
    for option in ("epochs", "warmup_epochs"):  # factors
        changes[option] = getattr(config, option) * changes.get(option, 1)
    changes["resume"] = (changes["out"] / "last.pt").is_file()
    return dataclasses.replace(config, **changes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train every method with every seed and evaluate them; other options are those of train.py."
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    given, options = parser.parse_known_args()
    torch.set_num_threads(1)  # networks this small are all overhead on more
    config = parse(options)
    for seed in range(given.seeds):
        for name in given.methods:
            one = changed(config, name, seed)
            if not (one.out / "results.json").is_file():
                print(one.out, flush=True)
                train(one)
    runs = [changed(config, name, seed).out for name in given.methods for seed in range(given.seeds)]
    evaluate(Evaluation(runs, out=config.out, checkpoint="last.pt"))  # the best one would be chosen on the test images


if __name__ == "__main__":
    main()
