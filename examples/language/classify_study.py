r"""Fine-tune with every method and every seed, prune all of them: a table of docs/results.md.

    python examples/language/classify_study.py --config examples/language/configs/bbc_minilm.yaml \
        --train bbc/train.tsv --test bbc/test.tsv --out study

Runs that are finished (results.json is there) are not run again, an interrupted one goes on after its last checkpoint (--save_steps).
What `classify.py --eval_only true --model RUN/model --reconstruct 128 --out RUN/repaired` has reconstructed of a run counts as its own.
"""

import json
import sys
from pathlib import Path
from typing import Any

import recipe
from classify import Classify, classify

sys.path.append(str(Path(__file__).parent.parent))
from comparison import arguments, counted, runs_of, summarise, table, told

METHODS = {  # name: what it changes in the settings; work in passes over a text, AdamW's being 1
    "adamw": {"method": "adamw"},  # 1
    "adamw-twice": {"method": "adamw", "epochs": 2},  # 2
    "cram": {"method": "cram+"},  # 2
    "warmup": {"method": "cram+", "sparsity_warmup": 0.5},  # 2
    "no-rise": {"method": "cram+", "sparsity_warmup": 0.0},  # 2
    "up-to-70": {"method": "cram+", "compression": [0.5, 0.6, 0.7]},  # 2
    "split": {"method": "cram+", "second_pass": "split"},  # 1
    "split-twice": {"method": "cram+", "second_pass": "split", "epochs": 2},  # 2
}
ABLATIONS = ("no-rise", "up-to-70")  # of settings that have a rise and sparsities above 70 %
PLACES = {"out", "train", "test", "resume", "save_steps", "threads", "device"}  # settings that do not change the run


def label(settings: dict[str, Any]) -> str:
    """What sets a run apart in the table."""
    name = "AdamW"
    if settings["method"] != "adamw":
        name = {"cram": "CrAM", "cram+": "CrAM+"}[settings["method"]]
        name += f" {{{', '.join(str(recipe.pattern(text)) for text in settings['compression'])}}}"
        name += f", second pass {settings['second_pass']}" * (settings["second_pass"] != "all")
        name += f", sparsities rise over {100 * settings['sparsity_warmup']:g} %" * (settings["sparsity_warmup"] > 0)
    unit = "epoch" if "epochs" in settings else "step"
    return f"{name}, {counted(settings[unit + 's'], unit)}"


def row(folder: Path) -> dict[str, Any]:
    """A finished run in the form of `comparison.summarise`."""
    found = json.loads((folder / "results.json").read_text())
    later = folder / "repaired" / "results.json"
    repaired = json.loads(later.read_text()) if later.is_file() else found
    for name in ("seed", "length") if later.is_file() else ():
        if repaired["settings"].get(name) != found["settings"][name]:
            raise ValueError(f"{later} must be of its run, with {name} {found['settings'][name]}, got {repaired['settings'].get(name)}")
    states = {"as pruned": found["pruned"], "reconstructed": repaired["reconstructed"]}
    pruned = {name: {what: scores[name]["accuracy"] for what, scores in states.items() if name in scores} for name in found["pruned"]}
    settings = {name: value for name, value in found["settings"].items() if name not in PLACES}
    settings["reconstruct"] = repaired["settings"]["reconstruct"]
    rest = {"settings": settings, "steps": found["training"]["steps"], "zeros": found["zeros"], "versions": found["versions"]}
    return {"label": label(settings), "dense": found["dense"]["accuracy"], "pruned": pruned} | rest


def begun(folder: Path) -> dict[str, Any] | None:
    return recipe.settings_of(folder) if recipe.last_checkpoint(folder) else None


def main() -> None:
    given, options = arguments("Fine-tune with every method and every seed, and prune all of them.", METHODS, ABLATIONS)
    s: Classify = recipe.parse(Classify, "Classify texts, and prune in one shot.", options)
    runs = runs_of(s, METHODS, given, begun, classify, PLACES - {"train", "test"})
    results = [row(one.out) for one in runs]
    patterns = list(results[0]["pruned"])
    text = table(summarise(results), patterns, ["as pruned", "reconstructed"])
    recipe.write_json(s.out / "study.json", {"runs": results})
    (s.out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    told(main)
