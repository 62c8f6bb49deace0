"""Sparse inference on a CPU beside torch and ONNX Runtime, both dense in float32: python -m benchmarks.inference.

Each round times every contestant once on the same input. With several threads each has its rounds alone, ONNX Runtime first: its threads
go on waiting in a loop after a call, which would slow the others. Of each the lowest decile over the rounds counts, since the machine may
be shared; a ratio is the faster dense engine's over ours. Tiles come from the trials that `sparsify` makes. Weights are random, pruned by
magnitude.

    linear    the matrices of BERT-base with 1, 8, 32 and 128 rows, and with 1 row of bfloat16 weights
    conv      the distinct convolutions of ResNet-50, stem left out, at batch 1
    bert      all matrices of BERT-base for 128 and 32 tokens: sums over the layers' times, attention and norms left out
    resnet50  the whole network at batch 1, batch norm folded, every layer pruned alike or globally by magnitude
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cram_kernels import NM, TopK, prune
from cram_kernels.inference import SparseConv2d, SparseLinear, sparsify
from cram_kernels.inference.trial import low, rounds_of, try_layer

from . import report
from .onnx_dense import session_of
from .resnet import CONVOLUTIONS, resnet50
from .run import count

MATRICES = {(768, 768): 48, (3072, 768): 12, (768, 3072): 12}  # [out, in] -> how many BERT-base has
ROWS = (1, 8, 32, 128)
SPARSITIES = ("0.7", "0.8", "0.9", "0.95", "2:4")


def pruned(module: nn.Module, sparsity: str) -> nn.Module:
    """In place: a share by magnitude in each weight alike, or 2:4 along the inputs."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.dim() < 2 or name.startswith(("stem", "fc")):
                continue
            if sparsity == "2:4":
                prune(nn.ParameterDict({"weight": p}), NM(2, 4))
            else:
                k = int(p.numel() * float(sparsity))
                p[p.abs() <= p.abs().flatten().kthvalue(k).values] = 0
    return module


def contest(dense: nn.Module, ours: nn.Module, x: Tensor, rounds: int) -> dict[str, Any]:
    """Microseconds of torch, ONNX Runtime and ours; `ratio` over the faster of the first two."""
    onnx, feed = session_of(dense, x)
    with torch.inference_mode():
        expected, actual = dense(x), ours(x)
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
        answer = torch.from_numpy(onnx.run(None, feed)[0])
        torch.testing.assert_close(answer, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
        runs: list[Callable[[], Any]] = [lambda: dense(x), lambda: ours(x)]
        if torch.get_num_threads() == 1:
            torch_times, our_times, onnx_times = rounds_of([*runs, lambda: onnx.run(None, feed)], rounds)
        else:
            (onnx_times,) = rounds_of([lambda: onnx.run(None, feed)], rounds)
            del onnx  # and its threads
            torch_times, our_times = (rounds_of([run], rounds)[0] for run in runs)  # alone, too: in caches that no other filled
    lows = [low(own) for own in (torch_times, onnx_times, our_times)]
    ratio = min(lows[:2]) / lows[2]
    named = zip(("torch_us", "onnxruntime_us", "sparse_us"), lows, strict=True)
    return {name: 1e6 * value for name, value in named} | {"ratio": ratio}


def layer_row(dense: nn.Module, sparse: Any, shape: tuple[int, ...], sparsity: str, rounds: int) -> dict[str, Any]:
    trial = try_layer(dense, sparse, shape)
    sparse.plan = [2**62, trial.tile]
    row = contest(dense, sparse, torch.randn(shape), rounds)
    bytes_each = sparse.weight_bytes / max(1, sparse.nonzeros)
    return {"weight": list(dense.weight.shape), "input": list(shape), "sparsity": sparsity, **row, "tile": trial.tile, "bytes": bytes_each}


def linears(options: argparse.Namespace, rows: tuple[int, ...] = ROWS) -> Iterator[dict[str, Any]]:
    for sparsity in options.sparsity:
        for out_features, in_features in list(MATRICES)[: 1 if options.quick else None]:
            dense = pruned(nn.Linear(in_features, out_features).eval(), sparsity)
            for n in rows[:1] if options.quick else rows:
                yield layer_row(dense, SparseLinear(dense), (n, in_features), sparsity, options.rounds)
            if rows[0] == 1:
                with torch.no_grad():
                    dense.weight.copy_(dense.weight.bfloat16())
                half = SparseLinear(dense, torch.bfloat16)
                yield layer_row(dense, half, (1, in_features), sparsity, options.rounds) | {"values": "bfloat16"}


def berts(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    names = ("torch_us", "onnxruntime_us", "sparse_us")
    found = list(linears(options, (32, 128)))
    for sparsity in options.sparsity:
        for tokens in sorted({row["input"][0] for row in found}):
            mine = [row for row in found if row["sparsity"] == sparsity and row["input"][0] == tokens]
            total = {name: sum(MATRICES[tuple(row["weight"])] * row[name] for row in mine) for name in names}
            fastest = sum(MATRICES[tuple(row["weight"])] * min(row["torch_us"], row["onnxruntime_us"]) for row in mine)
            yield {"weight": "all matrices", "input": [tokens], "sparsity": sparsity, **total, "ratio": fastest / total["sparse_us"]}


def convolutions(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for sparsity in options.sparsity:
        for channels, out_channels, size, kernel, stride in CONVOLUTIONS[: 2 if options.quick else None]:
            conv = nn.Conv2d(channels, out_channels, kernel, stride, kernel // 2).eval()
            dense = pruned(conv, sparsity)
            yield layer_row(dense, SparseConv2d(dense), (1, channels, size, size), sparsity, options.rounds)


def resnets(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for sparsity in options.sparsity:
        if sparsity == "2:4":
            continue
        for how in ("uniform", "global"):
            dense = resnet50()
            if how == "uniform":
                pruned(dense, sparsity)
            else:
                prune(dense, TopK(float(sparsity)), exclude=["stem*", "fc*"])
            sparse = resnet50()
            sparse.load_state_dict(dense.state_dict())
            x = torch.randn(1, 3, 224, 224)
            report = sparsify(sparse, (x,), min_speedup=1.05)
            row = contest(dense, sparse, x, options.rounds)
            yield {"weight": how, "input": list(x.shape), "sparsity": sparsity, **row, "sparse_layers": len(report.sparse)}


CASES: dict[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]]]] = {
    "linear": linears,
    "conv": convolutions,
    "bert": berts,
    "resnet50": resnets,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inference", description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=tuple(CASES), action="append", help="may be given several times; all without it")
    parser.add_argument("--sparsity", nargs="+", default=list(SPARSITIES), choices=SPARSITIES)
    parser.add_argument("--threads", type=count, default=1)
    parser.add_argument("--rounds", type=count, default=31)
    parser.add_argument("--quick", action="store_true", help="a smoke test: the first shapes, not the whole network")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks/inference.json"))
    options = parser.parse_args(argv)
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    result: dict[str, Any] = {"cpu": report.processor(), "threads": options.threads, "torch": torch.__version__, "load": {}, "cases": {}}
    print(f"{result['cpu']}, {options.threads} threads, torch {torch.__version__}")
    try:
        for case in options.only or [name for name in CASES if not (options.quick and name == "resnet50")]:
            result["load"][case] = [report.load_average()]
            print(f"\n{case}: load {report.load_average()}")
            print("| weight | input | sparsity | torch us | onnxruntime us | sparse us | ratio | tile |\n|" + "---|" * 8)
            rows = result["cases"][case] = []
            for row in CASES[case](options):
                rows.append(row)
                times = " | ".join(f"{row[name]:.0f}" for name in ("torch_us", "onnxruntime_us", "sparse_us"))
                print(
                    f"| {row['weight']} | {row['input']} | {row['sparsity']} | {times} | {row['ratio']:.2f} | {row.get('tile', '')} |",
                    flush=True,
                )
            result["load"][case].append(report.load_average())
            for sparsity in options.sparsity:
                ratios = [row["ratio"] for row in rows if row["sparsity"] == sparsity]
                if ratios:
                    print(f"{case} {sparsity}: median {statistics.median(ratios):.2f}, worst {min(ratios):.2f}")
    finally:
        torch.set_num_threads(before)
    report.write_json(options.out, result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
