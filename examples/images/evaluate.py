"""Prune trained networks in one shot, repair them in two ways, and test them; mean and spread over runs that differ by their seed alone.

    python examples/images/evaluate.py runs/sgd-0 runs/sgd-1 runs/cram-0 runs/cram-1 --out results
    python examples/images/evaluate.py runs/cram-0 --patterns 0.8 2:4 --corruptions all --out results

A run is a folder that train.py has written. For each pattern: the network as pruned, after `tune_batchnorm` on 1,000 fixed training images,
and, from the pruned one anew, after `reconstruct` on the same images: towards the dense network as trained, and towards the dense network
after `tune_batchnorm`. Writes evaluation.json, table.md and picture.png,
and measured.json, from which it goes on.
"""

import copy
import hashlib
import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import corruptions
import torch
from checkpoints import check_fits, read
from config import Config, pattern
from data import Batches, Images, Memory, calibration, some
from models import make
from torch import nn
from train import PLACES, accuracy, data_of, device_of, versions

from cram_kernels import TopK, prune, reconstruct, tune_batchnorm

sys.path.append(str(Path(__file__).parent.parent))
from comparison import Summary, check_seeds, counted, parser_of, plain, summarise, table, told, without_seed, write_json

REPAIRS = ("as pruned", "batch norm tuned", "reconstructed", "dense tuned, reconstructed")
LINES = dict(zip(REPAIRS[1:], ("-", "--", ":"), strict=True))


@dataclass
class Evaluation:
    """What to evaluate.

    Args:
        runs: folders that train.py has written; those whose options differ by the seed alone are averaged.
        out: the folder to write.
        patterns: to prune to: shares of zeros (0.9) and N:M (2:4).
        checkpoint: the best epoch, or the last one. The best is chosen on the validation images, or else on the test images themselves.
        test_path: test on the images of this folder instead, such as drawings in another style. The repairs see the runs' own images.
        calibration: how many training images the repairs may see.
        repairs: which states to test.
        corruptions: "all" 15 of ImageNet-C, or names; of the dense network, as trained and with batch norms tuned, and of all repairs.
        severities: of the corruptions, 1 to 5.
        corrupted_images: corrupt so many of the test images only, drawn once, the same for every run; 0 uses all.
        device: cuda or cpu.
    """

    runs: list[Path]
    out: Path = Path("evaluation")
    patterns: list[str | float] = field(default_factory=lambda: [0.5, 0.7, 0.8, 0.9, 0.95, "2:4"])
    checkpoint: Literal["best.pt", "last.pt"] = "best.pt"
    test_path: Path | None = None
    calibration: int = 1000
    repairs: list[Literal["as pruned", "batch norm tuned", "reconstructed", "dense tuned, reconstructed"]] = field(
        default_factory=lambda: list(REPAIRS)
    )
    corruptions: str | list[str] = field(default_factory=list)
    severities: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5])
    corrupted_images: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        for text in self.patterns:
            pattern(text)
        if self.calibration < 2 or self.corrupted_images < 0:
            got = f"{self.calibration} and {self.corrupted_images}"
            raise ValueError(f"calibration must be at least 2 images and corrupted_images at least 0, got {got}")
        if self.corruptions and (not self.severities or set(self.severities) - {1, 2, 3, 4, 5}):
            raise ValueError(f"severities must be some of 1 to 5, got {self.severities}")
        if self.corruptions:
            corruptions.names(self.corrupted_by())

    def corrupted_by(self) -> list[str]:
        return [self.corruptions] if isinstance(self.corruptions, str) else self.corruptions


def label(config: dict[str, Any]) -> str:
    """What sets a run apart in a table."""
    if config["method"] == "sgd":
        name = config["optimizer"]
    else:
        patterns = ", ".join(str(pattern(text)) for text in config["compression"])
        name = {"sam": "SAM", "cram": f"CrAM {{{patterns}}}", "cram+": f"CrAM+ {{{patterns}}}"}[config["method"]]
    parts = [name, "uniform" * config["uniform"], f"masks every {config['mask_period']}" if config["mask_period"] > 1 else ""]
    passes = {"all": "", "drawn": "one pass, drawn"}.get(config["second_pass"], f"second pass {config['second_pass']}")
    parts += [passes if config["method"] != "sgd" else ""]
    if config.get("start"):
        pruned = config["start_pattern"]
        start = Path(config["start"])
        source = without_seed(start.parent.name, config["seed"]) if start.name in ("best.pt", "last.pt") else start.stem
        parts += [f"from {source}" + (f" at {pattern(pruned)}" if pruned is not None else "")]
        parts += ["zeros held" * config["hold_zeros"], "head alone" * (config["train_only"] == "head")]
    return ", ".join([part for part in parts if part] + [counted(config["epochs"], "epoch")])


def repaired(model: nn.Module, what: str, dense: nn.Module, tuned: nn.Module, images: Batches) -> nn.Module:
    """A copy of a pruned model, in the state that `what` names; `tuned` is `dense` with batch norms tuned."""
    model = copy.deepcopy(model)
    if what == "batch norm tuned":
        tune_batchnorm(model, images, len(images))
    elif what != "as pruned":
        reconstruct(model, dense if what == "reconstructed" else tuned, images, samples=len(images.images))
    return model


def config_of(saved: dict[str, Any], path: Path) -> Config:
    """Of a run; ValueError for options that are no run's."""
    try:
        return Config(**{name: Path(v) if name in ("data_path", "out", "start") and v else v for name, v in saved["config"].items()})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} must be a checkpoint of train.py, got options that are not its own: {error}") from error


def evaluate_run(folder: Path, given: Evaluation, kept: dict[Any, Any]) -> dict[str, Any]:
    """All accuracies of one run, in percent. `kept` has corrupted images of earlier runs."""
    path, device = folder / given.checkpoint, torch.device(given.device)
    saved = read(path, "config", "model")
    config = config_of(saved, path)
    training, _, test, classes = data_of(config)
    if given.test_path is not None:
        test = data_of(replace(config, data_path=given.test_path))[2]
    model = make(config.model, classes, training.take(torch.tensor([0]), None).shape[1])
    check_fits(model, saved["model"], path)
    model.load_state_dict(saved["model"])
    model.to(device).eval()
    images, judged = calibration(training, given.calibration), Batches(test, config.batch, shuffle=False)
    tuned = copy.deepcopy(model)
    tune_batchnorm(tuned, images, len(images))
    options = {name: value for name, value in plain(config).items() if name not in PLACES}
    result: dict[str, Any] = {"run": folder.name, "label": label(options), "seed": config.seed, "config": options}
    result |= {"dense": accuracy(model, judged, device), "dense_tuned": accuracy(tuned, judged, device), "pruned": {}, "zeros": {}}
    names = given.corrupted_by()
    models = {"dense": model, "dense, batch norm tuned": tuned}
    print(f"{folder}: dense {result['dense']:.2f} %, with batch norms tuned {result['dense_tuned']:.2f} %", flush=True)
    for text in given.patterns:
        pruned = copy.deepcopy(model)
        report = prune(pruned, pattern(text))
        name = str(pattern(text))
        result["zeros"][name] = report.to_dict()["pruned"]["sparsity"]
        states = {what: repaired(pruned, what, model, tuned, images) for what in given.repairs}
        found = result["pruned"][name] = {what: accuracy(m, judged, device) for what, m in states.items()}
        print(f"{folder}, {name}: " + ", ".join(f"{what} {value:.2f} %" for what, value in found.items()), flush=True)
        if names:
            models |= {f"{name}, {what}": m for what, m in states.items()}
    if names:
        same = kept.setdefault((config.data, given.test_path or config.data_path), {}) if isinstance(test, Memory) else None
        result["corrupted"] = corrupted(models, test, names, given, device, same)
    result["images"] = {"test": len(test)} | ({"corrupted": len(some(test, given.corrupted_images))} if names else {})
    return result


def images_of(results: list[dict[str, Any]]) -> str:
    """A sentence below the table, where accuracies are of corrupted images: of how many, and of how many the others are."""
    counts = sorted({(r["images"]["corrupted"], r["images"]["test"]) for r in results if "corrupted" in r})
    parts = (f"{some:,} of the {every:,} test images, drawn" if some < every else f"all {every:,} test images" for some, every in counts)
    return f"\nCorrupted: {' or '.join(parts)}; all other columns and lines: all test images, as they are.\n" if counts else ""


def corrupted(
    models: dict[str, nn.Module], test: Images, names: list[str], given: Evaluation, device: torch.device, kept: dict[Any, Any] | None
) -> dict[str, dict[str, dict[str, float]]]:
    """Accuracy by model, corruption and severity."""
    images = some(test, given.corrupted_images)
    found: dict[str, dict[str, dict[str, float]]] = {which: {} for which in models}
    for name in corruptions.names(names):
        for severity in given.severities:
            shares = corruptions.shares_right(list(models.values()), images, name, severity, device, kept=kept)
            for which, share in zip(models, shares, strict=True):
                found[which].setdefault(name, {})[str(severity)] = 100 * share
        print(f"{name}: dense " + ", ".join(f"{value:.2f} % at {severity}" for severity, value in found["dense"][name].items()), flush=True)
    return found


def draw(summary: Summary, given: Evaluation) -> None:
    """Accuracy over sparsity, a kind of line for each repair."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shares = sorted((p for p in map(pattern, given.patterns) if isinstance(p, TopK)), key=lambda p: p.sparsity)
    figure, axes = plt.subplots(figsize=(8, 5))
    for i, (name, found) in enumerate(summary.items()):
        for what in (w for w in LINES if w in given.repairs):
            start = "dense, batch norm tuned" if what == "dense tuned, reconstructed" else "dense"
            means, spreads, _ = zip(found[start], *(found[f"{p}, {what}"] for p in shares), strict=True)
            x, line = [0.0, *(100 * p.sparsity for p in shares)], {"color": f"C{i % 10}", "linestyle": LINES[what], "capsize": 2}
            axes.errorbar(x, means, spreads, marker="o", markersize=3, label=f"{name}, {what}", **line)
    axes.set(xlabel="weights that are zero, %", ylabel="test accuracy, %")
    axes.grid(alpha=0.3)
    if axes.containers:  # none for repairs that are not drawn
        axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(given.out / "picture.png", dpi=120)
    plt.close(figure)


def key_of(folder: Path, given: Evaluation) -> str:
    """Of a run, and of what its accuracies follow from beside the images: the checkpoint, the options, the versions."""
    options = {name: str(value) for name, value in vars(given).items() if name not in ("runs", "out")}
    checkpoint = folder / given.checkpoint
    content = checkpoint.read_bytes() if checkpoint.is_file() else b""
    return hashlib.sha256(json.dumps([str(folder), options, versions()]).encode() + content).hexdigest()


def evaluate(given: Evaluation) -> dict[str, Any]:
    """Evaluate all runs and write the three files; returns what evaluation.json holds.

    `measured.json` keeps each run's accuracies, by its checkpoint, the options and the versions. So an evaluation that was stopped goes on
    with the next run, and one of other runs in the same folder loses nothing. Remove it where the images have changed.
    """
    if not given.runs:
        raise ValueError("runs must be folders that train.py has written, got none")
    device_of(given.device)
    if given.corruptions:
        corruptions.package()
    paths = [folder / given.checkpoint for folder in given.runs]
    settings = [plain(config_of(read(path, "config", "model"), path)) for path in paths]
    places = PLACES - {"data_path"}
    check_seeds([{"label": label(s), "config": {k: v for k, v in s.items() if k not in places}} for s in settings])
    given.out.mkdir(parents=True, exist_ok=True)
    kept: dict[Any, Any] = {}
    measured = given.out / "measured.json"
    done = json.loads(measured.read_text()) if measured.is_file() else {}
    keys = [key_of(folder, given) for folder in given.runs]
    for key, folder in zip(keys, given.runs, strict=True):
        if key in done:
            print(f"{folder}: evaluated before", flush=True)
            continue
        done[key] = evaluate_run(folder, given, kept)
        write_json(measured, done)
    results = [done[key] for key in keys]
    summary = summarise(results)
    text = table(summary, [str(pattern(p)) for p in given.patterns], list(given.repairs)) + images_of(results)
    found = {"versions": versions(), "checkpoint": given.checkpoint, "calibration": given.calibration, "runs": results, "summary": summary}
    write_json(given.out / "evaluation.json", found)
    (given.out / "table.md").write_text(text)
    draw(summary, given)
    print(text)
    return found


def parse(arguments: list[str] | None = None) -> Evaluation:
    parser = parser_of(Evaluation, "Prune trained networks in one shot, repair and test them.", skip={"runs"})
    parser.add_argument("runs", nargs="+", type=Path, help="folders that train.py has written")
    values = parser.parse_args(arguments).as_dict()
    return Evaluation(**{name: values[name] for name in Evaluation.__dataclass_fields__})


if __name__ == "__main__":
    told(lambda: evaluate(parse()))
