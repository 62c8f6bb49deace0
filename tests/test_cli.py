"""The program `cram-kernels`, in processes of its own, in a terminal of 80 columns and behind pipes; and what `prune` writes to files."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm
from torch.nn.utils import prune as masks

from cram_kernels import TopK, __version__, cli
from cram_kernels.export import cli as export_cli
from cram_kernels.export import prune_file as module
from cram_kernels.export.files import read
from cram_kernels.export.prune_file import prune_file

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
COMMANDS = ("info", "check", "prune", "export")
BENCH = ("bench", "bench compare")
ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
NAMES = ("encoder.a_rather_long_name_for_a_layer.attention.output.dense.weight", "head.weight", "stem.conv.weight", "norm.weight")


def state_dict() -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = ((64, 128), (10, 64), (32, 16, 3, 3), (64,))
    return {name: torch.randn(shape) for name, shape in zip(NAMES, shapes, strict=True)}


def program(*arguments: object, **environment: str) -> list[Any]:
    return [[*forked.python(), "-m", "cram_kernels", *map(str, arguments)], os.environ | {"NO_COLOR": "", "TERM": "xterm"} | environment]


def in_pipes(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command, env = program(*arguments, **environment)
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def in_terminal(*arguments: object, **environment: str) -> tuple[int, str]:
    """Exit status, and all that a terminal of 80 columns got."""
    command, env = program(*arguments, **environment)
    env.pop("COLUMNS", None)
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    child = subprocess.Popen(command, env=env, stdin=follower, stdout=follower, stderr=follower)
    os.close(follower)
    parts = []
    while True:
        try:
            part = os.read(leader, 4096)
        except OSError:  # Linux, when the last writer is gone
            break
        if not part:
            break
        parts.append(part)
    os.close(leader)
    return child.wait(120), b"".join(parts).decode().replace("\r\n", "\n")


def seen(text: str) -> list[str]:
    """The lines that are left on the screen: a carriage return and "erase to the end" begin a line anew."""
    return [ESCAPE.sub("", line.rpartition("\r\x1b[K")[2]) for line in text.split("\n")]


def largest(tensors: list[Tensor], sparsity: float) -> list[Tensor]:
    """The published rule by a full sort: what is larger in magnitude than the k-th largest stays."""
    magnitudes = torch.cat([t.flatten() for t in tensors]).abs().sort(descending=True).values
    threshold = magnitudes[-int(-len(magnitudes) * (1 - sparsity) // 1) - 1]
    return [torch.where(t.abs() > threshold, t, 0.0) for t in tensors]


@pytest.mark.parametrize("command", ["", *COMMANDS, *BENCH])
def test_help_fits_80_columns_and_has_an_example(command: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        cli.main([*command.split(), "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert f":\n  cram-kernels {command} " in text if command else all(f"\n    {name} " in text for name in (*COMMANDS, "bench"))
    assert "Exit status" in text or command == "info"
    if command not in ("", *BENCH):  # the example is a command line that the parser takes
        example = text.partition("Example:\n")[2].replace("\\\n", " ").splitlines()[0].replace("'", "").split()
        assert example[0] == "cram-kernels" and cli.parser().parse_args(example[1:]).command == command


def test_reports_fit_a_terminal(tmp_path: Path) -> None:
    source, out = tmp_path / "model.pt", tmp_path / "pruned.pt"
    torch.save(state_dict(), source)
    status, text = in_terminal("prune", source, out, "--pattern", "2:4", "--exclude", "head.*")
    assert status == 0 and all(f"{stage} " in text for stage in ("reading", "pruning", "writing"))  # progress, which is erased
    assert max(map(len, seen(text))) <= 80 and not any("reading" in line for line in seen(text))
    assert NAMES[0] in text and "all parameters" in text
    status, text = in_terminal("check", out)
    assert status == 1 and max(map(len, seen(text))) <= 80
    assert "\x1b[31mVIOLATED\x1b[0m" in text and "1 of 4 tensors violate 2:4" in text
    status, text = in_terminal("check", out, NO_COLOR="1")
    assert status == 1 and "VIOLATED" in text and "\x1b[3" not in text
    status, text = in_terminal("check", out, "--json", TERM="dumb")
    assert status == 1 and "\x1b" not in text and json.loads(text)["ok"] is False


def test_a_warning_takes_the_place_of_progress(tmp_path: Path) -> None:
    """Once: what `prune` reads back is its own file, which nobody has named."""
    source = tmp_path / "model.pt"
    torch.save({"model": state_dict(), "ema": state_dict()}, source)
    status, text = in_terminal("prune", source, tmp_path / "pruned.pt", "--sparsity", "0.5")
    lines = seen(text)
    assert status == 0 and max(map(len, lines)) <= 80 and lines[0].startswith("warning: read:"), lines
    assert text.count("warning:") == 1 and "partial" not in text and not any("reading" in line for line in lines)
    assert re.search(r"chooses\n\r\x1b\[Kreading [^\n]* \.\.\.\r\x1b\[K", text)  # which is shown again until it is done


def test_behind_pipes_nothing_is_cut_or_coloured(tmp_path: Path) -> None:
    torch.save(state_dict(), tmp_path / "model.pt")
    done = in_pipes("check", tmp_path / "model.pt", COLUMNS="80")
    assert done.returncode == 1 and done.stderr == "" and "\x1b" not in done.stdout
    (row,) = [line for line in done.stdout.splitlines() if line.startswith(NAMES[0])]
    assert row.endswith("groups, the first [0, 0:4]")
    command, env = program("info", "--json")
    done = subprocess.run([sys.executable, *command[-4:]], env=env, capture_output=True, text=True, timeout=120)  # Python from its start
    found = json.loads(done.stdout)
    assert found["cram_kernels"] == __version__ and found["backend reference"] == "available"


def test_a_reader_that_has_enough_is_no_error(tmp_path: Path) -> None:
    torch.save(state_dict(), tmp_path / "model.pt")
    command, env = program("check", tmp_path / "model.pt")
    child = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stderr is not None
    child.stdout.close()
    assert child.stderr.read() == "" and child.wait(120) == cli.CLOSED
    child.stderr.close()


@pytest.mark.parametrize("arguments", [("info",), ("--help",), ("prune", "--help"), ("bench", "compare", "--help")], ids=" ".join)
def test_output_that_nobody_takes(arguments: tuple[str, ...]) -> None:
    """Of a full disk and of a reader that is gone: an exit status of ours and one sentence, not Python's 0, 1 or 120."""
    name = "cram-kernels" if arguments[0] == "--help" else arguments[0]
    command, env = program(*arguments, PYTHONUNBUFFERED="")
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, env=env, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.stderr == f"{name}: standard output must take what is printed, got No space left on device\n"
    assert done.returncode == cli.CANNOT
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, env=env, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert (done.returncode, done.stderr) == (cli.CLOSED, "")


@pytest.mark.parametrize("arguments", [("check", "none.pt"), ("check",)], ids=" ".join)
def test_a_message_that_nobody_takes_keeps_the_exit_status(arguments: tuple[str, ...]) -> None:
    command, env = program(*arguments)
    with open("/dev/full", "w") as full:
        assert subprocess.run(command, env=env, stdout=subprocess.DEVNULL, stderr=full, timeout=120).returncode == cli.CANNOT


@pytest.mark.parametrize("suffixes", [(".pt", ".pt"), (".pt", ".safetensors"), (".safetensors", ".safetensors"), (".safetensors", ".pth")])
def test_prune_keeps_the_largest(suffixes: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, out = (tmp_path / f"{name}{suffix}" for name, suffix in zip(("a", "b"), suffixes, strict=True))
    state = state_dict()
    if source.suffix == ".pt":
        torch.save(state, source)
    else:
        safetensors.save_file(state, source, metadata={"format": "pt", "author": "me"})
    before = source.read_bytes()
    assert cli.main(["prune", str(source), str(out), "--sparsity", "0.8", "--exclude", "head.*", "--json"]) == cli.OK
    report = json.loads(capsys.readouterr().out)
    assert source.read_bytes() == before and [p.name for p in tmp_path.iterdir() if p not in (source, out)] == []
    expected = dict(state)
    expected[NAMES[0]], expected[NAMES[2]] = largest([state[NAMES[0]], state[NAMES[2]]], 0.8)
    found = read(out)
    assert found.keys() == state.keys() and all(torch.equal(found[name], expected[name]) for name in state)
    assert report["pruned"]["zeros"] == sum(int((expected[name] == 0).sum()) for name in (NAMES[0], NAMES[2]))
    if suffixes == (".safetensors", ".safetensors"):
        from safetensors import safe_open

        with safe_open(str(out), framework="pt") as file:
            assert file.metadata() == {"format": "pt", "author": "me"}


def test_a_checkpoint_keeps_all_else(tmp_path: Path) -> None:
    state = state_dict()
    averages = {name: t.clone() for name, t in state.items()}
    content = {"model": state, "ema": averages, "epoch": 3, "optimizer": {"state": {0: {"momentum": torch.ones(3)}}, "lr": 0.1}}
    path = tmp_path / "checkpoint.pt"
    torch.save(content, path)
    assert cli.main(["prune", str(path), str(path), "--sparsity", "0.5", "--scope", "tensor", "--key", "model"]) == cli.OK  # in place
    found = torch.load(path, weights_only=True)
    assert (
        found["epoch"] == 3 and found["optimizer"]["lr"] == 0.1 and torch.equal(found["optimizer"]["state"][0]["momentum"], torch.ones(3))
    )
    assert all(torch.equal(found["ema"][name], t) for name, t in averages.items())
    for name, t in state.items():
        assert torch.equal(found["model"][name], largest([t], 0.5)[0] if t.dim() > 1 else t), name


def test_tables_and_what_is_tied_to_them_stay_dense(tmp_path: Path) -> None:
    model = nn.ModuleDict({"embed_tokens": nn.Embedding(50, 16), "embed_proj": nn.Linear(16, 16), "head": nn.Linear(16, 50, bias=False)})
    model["head"].weight = model["embed_tokens"].weight
    torch.save(model.state_dict(), tmp_path / "m.pt")
    report = prune_file(tmp_path / "m.pt", tmp_path / "p.pt", TopK(sparsity=0.5))
    assert [layer.name for layer in report.pruned] == ["embed_proj.weight"]
    found = read(tmp_path / "p.pt")
    assert found["head.weight"].data_ptr() == found["embed_tokens.weight"].data_ptr() and int((found["head.weight"] == 0).sum()) == 0
    report = prune_file(tmp_path / "m.pt", tmp_path / "p.safetensors", TopK(sparsity=0.5), prune_embeddings=True)
    assert [layer.name for layer in report.pruned] == ["embed_tokens.weight", "embed_proj.weight"]
    found = read(tmp_path / "p.safetensors")
    expected, _ = largest([model["embed_tokens"].weight.detach(), model["embed_proj"].weight.detach()], 0.5)
    assert torch.equal(found["head.weight"], expected) and torch.equal(found["embed_tokens.weight"], expected)


def test_the_report_names_options_of_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The same facts as `prune_file` gives, in the words that the reader of this report can use."""
    state = {"embed_tokens.weight": torch.randn(50, 16), "large.weight": torch.randn(32, 16), "small.weight": 1e-6 * torch.randn(8, 8)}
    torch.save(state, tmp_path / "m.pt")
    told = prune_file(tmp_path / "m.pt", tmp_path / "p.pt", TopK(sparsity=0.5))
    for shape in ([], ["--json"]):
        assert cli.main(["prune", str(tmp_path / "m.pt"), str(tmp_path / "p.pt"), "--sparsity", "0.5", *shape]) == cli.OK
        text = capsys.readouterr().out
        assert (
            "--prune-embeddings prunes it" in text and "; --scope tensor ranks each layer on its own, --exclude keeps a layer dense" in text
        )
        assert not any(argument in text for argument in export_cli.OPTIONS)
    assert all(argument in str(told) for argument in export_cli.OPTIONS)


@pytest.mark.parametrize("kind", ["masks", "weight norm", "weight norm of old", "parametrization"])
def test_parts_of_a_weight_are_refused(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    layer = nn.Linear(8, 8)
    if kind == "masks":
        masks.l1_unstructured(layer, "weight", 0.5)
    elif kind == "weight norm of old":
        with pytest.warns(FutureWarning):
            weight_norm(layer)
    elif kind == "weight norm":
        parametrizations.weight_norm(layer)
    else:
        parametrizations.orthogonal(layer)
    torch.save(layer.state_dict(), tmp_path / "m.pt")
    assert cli.main(["prune", str(tmp_path / "m.pt"), str(tmp_path / "p.pt"), "--sparsity", "0.5"]) == cli.CANNOT
    error = capsys.readouterr().err
    assert "prune: tensor 'weight" in error or "prune: tensor 'parametrizations.weight" in error
    assert "must be a weight itself, got a part of one" in error and not (tmp_path / "p.pt").exists()


@pytest.mark.parametrize(
    "raised, status", [(KeyboardInterrupt(), cli.INTERRUPTED), (OSError("no space"), cli.CANNOT)], ids=["Ctrl-C", "disk"]
)
def test_nothing_is_lost_on_failure(
    raised: BaseException, status: int, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.pt"
    torch.save(state_dict(), path)
    before = path.read_bytes()

    def fail(content: object, partial: Path) -> None:
        Path(partial).write_bytes(b"half of it")
        raise raised

    monkeypatch.setattr(module.torch, "save", fail)
    assert cli.main(["prune", str(path), str(path), "--sparsity", "0.5"]) == status
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    assert capsys.readouterr().err in ("prune: interrupted\n", "prune: no space\n")


def test_a_file_that_gives_back_something_else_is_not_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, right = tmp_path / "m.pt", torch.save
    torch.save(state_dict(), path)
    monkeypatch.setattr(module.torch, "save", lambda content, partial: right({name: t + 1 for name, t in content.items()}, partial))
    assert cli.main(["prune", str(path), str(tmp_path / "p.pt"), "--sparsity", "0.5"]) == cli.CANNOT
    assert "must give back" in capsys.readouterr().err and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["none.pt", "p.pt", "--sparsity", "0.5"], "is not there"),
        (["m.pt", "no/p.pt", "--sparsity", "0.5"], "out must be in a folder that is there"),
        *(
            (["m.pt", name, "--sparsity", "0.5"], "out must end in .safetensors, or as a torch checkpoint in .pt, ")
            for name in ("m.onnx", "m.json", "p.txt", "p.safetensor")
        ),
        (["m.pt", "p.pt", "--sparsity", "0.5", "--exclude", "*"], "prunes, got none: 50 % prunes nothing"),
        (["m.pt", "p.pt", "--sparsity", "0.5", "--exclude", "nothing"], "exclude must match the name of a parameter"),
        (["m.pt", "p.pt", "--pattern", "2:4", "--scope", "tensor"], "--scope must be absent for --pattern"),
    ],
)
def test_prune_refuses(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(state_dict(), "m.pt")
    assert cli.main(["prune", *arguments]) == cli.CANNOT
    assert message in capsys.readouterr().err and [p.name for p in tmp_path.iterdir()] == ["m.pt"]


@pytest.mark.parametrize(
    "rule", [["--sparsity", "1"], ["--sparsity", "90%"], ["--pattern", "4:2"], [], ["--sparsity", "0.5", "--pattern", "2:4"]]
)
def test_prune_wants_one_rule(rule: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["prune", "m.pt", "p.pt", *rule])
    assert end.value.code == cli.CANNOT and "usage: cram-kernels prune" in capsys.readouterr().err


@pytest.mark.filterwarnings("default::cram_kernels.CrAMWarning")
def test_a_warning_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    state = state_dict()
    torch.save({"model": state, "ema": state_dict()}, tmp_path / "m.pt")
    assert cli.main(["check", str(tmp_path / "m.pt")]) == cli.REFUSED
    assert re.fullmatch(r"warning: read: .*: read the state dict under 'model'; there is also 'ema': .*\n", capsys.readouterr().err)


def test_a_checkpoint_may_keep_its_suffix(tmp_path: Path) -> None:
    torch.save(state_dict(), tmp_path / "m.pyth")
    for name in ("p.pyth", "p.ckpt", "p"):
        prune_file(tmp_path / "m.pyth", tmp_path / name, TopK(sparsity=0.5))
        assert torch.load(tmp_path / name, weights_only=True).keys() == state_dict().keys()


@pytest.mark.parametrize("option", ["--rounds", "--threads"])
@pytest.mark.parametrize("number", ["0", "-1", "2.5"])
def test_bench_counts_from_one(option: str, number: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", "--quick", option, number])
    assert end.value.code == cli.CANNOT and f"argument {option}: must be a whole number from 1, got '{number}'" in capsys.readouterr().err


def test_bench_of_an_installed_package_says_what_it_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "cram_kernels" / "cli.py"))
    assert cli.main(["bench", "--quick"]) == cli.CANNOT
    assert "bench: benchmarks are part of a checkout" in capsys.readouterr().err


def test_errors_fit_a_terminal() -> None:
    name = "a_folder_with_a_long_name/that_is_not_there/none.json"
    for arguments, start in {
        ("bench", "compare", name, name): f"compare: must be able to read both files, got No such file or directory for {name}",
        ("a_command_that_there_is_not",): "usage: cram-kernels",
    }.items():
        status, text = in_terminal(*arguments)
        lines = seen(text)
        assert status == cli.CANNOT and len(lines) > 2 and max(map(len, lines)) <= 80, lines
        assert " ".join(text.split()).startswith(start), text
