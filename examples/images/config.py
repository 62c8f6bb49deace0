"""What a run is: a dataclass, filled from YAML and the command line by jsonargparse; the published YAML files are read too."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from cram_kernels import NM, Pattern, TopK

sys.path.append(str(Path(__file__).parent.parent))
from comparison import parser_of


@dataclass
class Config:
    """A training run.

    Args:
        data: the data set.
        data_path: its folder, as unpacked from what its publisher distributes (see data.py); not needed for mnist5k.
        model: see models.py.
        optimizer: the base optimizer.
        method: sgd takes plain steps of the base optimizer; sam perturbs and does not prune; cram and cram+ prune in the second pass.
        compression: the patterns of cram and cram+, one of which each step draws: shares of zeros (0.9) and N:M ("2:4").
        rho: how far uphill the second pass looks: rho times the gradients, which normalize_grad divides by their norm.
        uniform: each layer has the sparsity, instead of the whole model; the first and last layer stay dense, as in the published code.
        mask_period: compute the masks of a pattern at every mask_period-th use of it.
        sparse_grad: mask the second gradient.
        normalize_grad: divide rho by the norm of the gradients; SAM's own form.
        second_pass: the samples of the second pass: all of a batch, half of it, or split, where each pass has its own half; or drawn: one
            pass a step, at the dense or at the pruned weights (one_pass.py), which has no use for rho.
        lr: the highest learning rate; see epochs for how it changes.
        momentum: of SGD.
        weight_decay: of the base optimizer.
        batch: images a step, over all processes.
        epochs: of training. The rate changes once an epoch: it rises over warmup_epochs, then falls as a cosine that would be 0 one epoch
            after the last. Without warmup_epochs the last of 10 epochs has 2.4 percent of lr, the last of 200 has 0.006 percent.
        warmup_epochs: epochs in which the rate rises by equal parts, up to lr in the last of them.
        validation: the share of the training images that is held back to choose the best checkpoint, such as 0.1; of emoji, with their
            skin tones. With 0 the test images choose it, as in the published code, and results.json says so.
        train_images: use so many of the training images only, drawn once, the same for every seed; 0 uses all.
        workers: processes that load images.
        precision: fp32, or autocast to bf16 or fp16 (with a gradient scaler).
        channels_last: keep images and convolutions in that order of memory, which is often faster; the last bits differ.
        parallel: under torchrun: ddp, or fsdp2 with sharded parameters.
        seed: of the first weights, the order of the images, their augmentation, and the patterns that are drawn.
        start: begin with the weights of this checkpoint; layers of another shape, such as a head for other classes, keep their new ones.
        start_pattern: prune the weights of `start` to this pattern ("0.9" or "2:4"), and tune its batch norms on 1,000 training images.
        hold_zeros: weights that are zero at the start stay zero.
        train_only: "head" trains the last linear layer alone.
        out: the folder to write: last.pt, best.pt, results.json, and TensorBoard's events.
        resume: go on after the last epoch in out/last.pt; the end is that of an uninterrupted run, to the bit.
        eval_only: test out/best.pt and do not train.
        tensorboard: write events.
        device: cuda where there is one, else cpu.
    """

    data: Literal["cifar10", "cifar100", "imagefolder", "mnist5k", "fashion_mnist", "emoji"] = "mnist5k"
    data_path: Path = Path("data")
    model: str = "resnet8"
    optimizer: Literal["SGD", "AdamW"] = "SGD"
    method: Literal["sgd", "sam", "cram", "cram+"] = "cram+"
    compression: list[str | float] = field(default_factory=lambda: [0.5, 0.7, 0.9])
    rho: float = 0.05
    uniform: bool = False
    mask_period: int = 1
    sparse_grad: bool = True
    normalize_grad: bool = False
    second_pass: Literal["all", "half", "split", "drawn"] = "all"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch: int = 128
    epochs: int = 200
    warmup_epochs: int = 5
    validation: float = 0.0
    train_images: int = 0
    workers: int = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    seed: int = 0
    start: Path | None = None
    start_pattern: str | float | None = None
    hold_zeros: bool = False
    train_only: Literal["all", "head"] = "all"
    out: Path = Path("run")
    resume: bool = False
    eval_only: bool = False
    tensorboard: bool = True
    device: str | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "epochs", "mask_period"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.validation < 1:
            raise ValueError(f"validation must be a share in [0, 1), got {self.validation}")
        for name in ("warmup_epochs", "train_images", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if abs(self.seed) >= 2**23:
            raise ValueError(f"seed must be below 2**23, for other seeds are made of it, got {self.seed}")
        if self.second_pass == "drawn" and self.method in ("sgd", "sam"):
            raise ValueError(f"method must be cram or cram+ with second_pass drawn, which prunes in half of the steps, got {self.method}")
        if self.second_pass != "all" and self.method == "sgd":
            raise ValueError(f"second_pass must be all with method sgd, which takes one pass a step, got {self.second_pass}")
        if self.parallel == "fsdp2" and self.channels_last:
            raise ValueError("channels_last must be false with parallel fsdp2, whose parts of a weight have no such order, got true")
        if self.start_pattern is not None and self.start is None:
            raise ValueError(f"start must name a checkpoint with start_pattern {self.start_pattern}, got none")
        if self.start_pattern is not None:
            pattern(self.start_pattern)
        if self.second_pass == "drawn" and self.precision == "fp16":
            raise ValueError("precision must be fp32 or bf16 with second_pass drawn, which has no gradient scaler, got fp16")
        self.patterns()

    def patterns(self) -> list[Pattern]:
        if self.method in ("sgd", "sam"):
            return []
        if not self.compression:
            raise ValueError("compression must have a pattern for cram and cram+, got an empty list; method sam does not prune")
        return [pattern(text, self.uniform) for text in self.compression]


# In the types of options str comes before float: YAML 1.1 reads 2:4 as a number of base 60, 124.


def pattern(text: str | float, uniform: bool = False) -> Pattern:
    """`0.9` or "0.9" is a share of zeros, "2:4" keeps 2 of 4."""
    n, colon, m = str(text).partition(":")
    try:
        return NM(int(n), int(m)) if colon else TopK(float(n), "tensor" if uniform else "model")
    except ValueError as error:
        raise ValueError(f"a pattern must be a share of zeros in [0, 1) such as 0.9, or N:M such as 2:4, got {text!r}") from error


# The published repository (IST-DASLab/CrAM): class names, and its option -> ours. Its scripts give rho, batch size and data as arguments.
METHODS = {"SAM": "sam", "TopkCrAM": "cram", "TopkCrAMPeriod": "cram", "NMTopkCrAM": "cram"}
OPTIONS = {"rho": "rho", "sparsities": "compression", "sparse_grad": "sparse_grad", "grad_norm": "normalize_grad", "unif_prune": "uniform"}
PLUS, PERIOD = "plus_version", "mask_freq"


def published(path: Path) -> dict[str, Any]:
    """The options that a YAML file of the published repository sets, under our names; ValueError for what has no counterpart."""
    training = yaml.safe_load(path.read_text())["training"]
    sections = {name: dict(training[name]) for name in training}
    unknown = sections.keys() - {"optimizer", "SAM", "lr_scheduler"}
    base, sam, schedule = (sections.get(name, {}) for name in ("optimizer", "SAM", "lr_scheduler"))
    kind = sam.pop("class", None)
    found: dict[str, Any] = {"optimizer": base.pop("class"), "method": "sgd" if kind is None else METHODS.get(kind)}
    shape = schedule.pop("class", "CosineLR")
    if unknown:
        raise ValueError(f"{path}: sections must be optimizer, SAM and lr_scheduler, got {min(unknown)!r}")
    if found["method"] is None or shape != "CosineLR":
        raise ValueError(f"{path}: class must be CosineLR and one of {', '.join(METHODS)}, got {shape!r} and {kind!r}")
    if found["method"] == "cram" and sam.pop(PLUS, True):
        found["method"] = "cram+"
    if kind == "NMTopkCrAM":
        found["compression"] = ["2:4", "4:8"]
    if kind == "SAM":
        found["normalize_grad"] = True
    if kind == "TopkCrAMPeriod":
        found["mask_period"] = sam.pop(PERIOD, 1)
    names = {("SAM", key): ours for key, ours in OPTIONS.items()}
    names |= {("optimizer", key): key for key in ("lr", "momentum", "weight_decay")}
    names |= {("lr_scheduler", "warmup_length"): "warmup_epochs", ("lr_scheduler", "end_epoch"): "epochs"}
    for section, options in (("optimizer", base), ("SAM", sam), ("lr_scheduler", schedule)):
        for key, value in options.items():
            if (section, key) not in names:
                raise ValueError(f"{path}: {section} must have options of the published files, got {key!r}")
            found[names[section, key]] = value
    return found


def parse(arguments: list[str] | None = None) -> Config:
    """From the command line: --config FILE (ours) or --published FILE (the published form), then single options, the last one counts."""
    parser = parser_of(Config, "Train an image classifier with CrAM.")
    parser.add_argument("--config", action="config", help="a YAML file of these options")
    parser.add_argument("--published", type=Path | None, default=None, help="a YAML file of the published repository, read unchanged")
    given = parser.parse_args(arguments)
    if given.published is not None:
        parser.set_defaults(published(given.published))
        given = parser.parse_args(arguments)
    values = given.as_dict()
    return Config(**{name: values[name] for name in Config.__dataclass_fields__})
