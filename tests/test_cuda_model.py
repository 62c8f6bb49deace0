"""`make gpu-model`: what it counts of a kernel that can be counted by hand, its arithmetic with a card of round numbers, its bars."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent.parent))

from benchmarks.cuda_static import cubin
from benchmarks.cuda_static.gpus import Card
from benchmarks.gpu_model import __main__ as command
from benchmarks.gpu_model import counting, machine, model
from benchmarks.gpu_model.counting import Counts

# 25 instructions, no branch: load 16 bytes, exchange one number with the neighbour through every other bank, store, count up.
TOY = """
.version 8.0
.target sm_80
.address_size 64

.visible .entry toy(.param .u64 toy_from, .param .u64 toy_to, .param .u64 toy_sum)
.maxntid 64, 1, 1
{
.reg .f32 %f<6>;
.reg .b32 %r<11>;
.reg .b64 %rd<10>;
.shared .align 4 .b8 column[512];
ld.param.u64 %rd1, [toy_from];
ld.param.u64 %rd2, [toy_to];
ld.param.u64 %rd3, [toy_sum];
cvta.to.global.u64 %rd4, %rd3;
cvta.to.global.u64 %rd5, %rd2;
cvta.to.global.u64 %rd6, %rd1;
mov.u32 %r1, %ctaid.x;
shl.b32 %r2, %r1, 6;
mov.u32 %r3, %tid.x;
add.s32 %r4, %r2, %r3;
mul.wide.u32 %rd7, %r4, 16;
add.s64 %rd8, %rd6, %rd7;
ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%rd8];
shl.b32 %r5, %r3, 3;
mov.u32 %r6, column;
add.s32 %r7, %r6, %r5;
st.shared.f32 [%r7], %f1;
bar.sync 0;
xor.b32 %r8, %r5, 8;
add.s32 %r9, %r6, %r8;
add.s64 %rd9, %rd5, %rd7;
ld.shared.f32 %f5, [%r9];
st.global.v4.f32 [%rd9], {%f5, %f2, %f3, %f4};
atom.global.add.u32 %r10, [%rd4], 1;
ret;
}
"""
BLOCKS, WARPS, WEIGHTS = 3, 6, 3 * 64 * 4


@pytest.fixture
def toy(executed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Counts:
    """The toy's counts, and a check that it computed what it should."""
    import ptxemu

    room = np.zeros(2 * WEIGHTS + 64, np.float32)
    begin = -room.ctypes.data % 128 // 4  # sectors begin where the arrays do
    source, target = room[begin : begin + WEIGHTS], room[begin + WEIGHTS : begin + 2 * WEIGHTS]
    source[:] = np.arange(WEIGHTS)
    total = np.zeros(1, np.uint32)
    monkeypatch.setenv("PTXEMU_COUNTERS", str(tmp_path / "counters.jsonl"))
    ptxemu.Module(TOY).launch("toy", BLOCKS, 64, [source, target, total])
    expected = source.reshape(-1, 2, 4).copy()
    expected[:, :, 0] = expected[:, ::-1, 0]
    assert np.array_equal(target, expected.ravel()) and total[0] == 64 * BLOCKS
    return Counts("perturb_nm_", "fp32", WEIGHTS, WEIGHTS, counting.read(tmp_path / "counters.jsonl"))


def test_counts_by_hand(toy: Counts) -> None:
    assert len(toy.launches) == 1
    assert toy.total("warp_instructions", "all") == WARPS * 25 and toy.total("barriers") == BLOCKS
    # 32 lanes of 16 bytes side by side are 16 sectors; the counter is one more of each request, and one sector of the launch.
    assert [toy.total("global", kind, "sectors") for kind in ("load", "store", "atomic")] == [WARPS * 16, WARPS * 16, WARPS]
    assert toy.accesses("global", "requests") == 3 * WARPS and toy.total("atomics", "global") == 64 * BLOCKS
    assert toy.bytes == 32 * 2 * (WARPS * 16 + 1) / WEIGHTS
    # Of 32 banks every other one is used, by two lanes: two wavefronts, of which one is a conflict.
    assert toy.accesses("shared", "wavefronts") == 2 * 2 * WARPS and toy.conflicts == 0.5


@pytest.mark.parametrize("arch", ["80", "86", "89", "90"])
def test_machine_code_by_hand(toy: Counts, arch: str, tmp_path: Path) -> None:
    """Without branches every warp executes the whole machine code once; cuobjdump's listing of it is read here on its own."""
    source, binary = tmp_path / "toy.ptx", tmp_path / "toy.cubin"
    source.write_text(TOY)
    subprocess.run(["ptxas", f"-arch=sm_{arch}", "-O3", str(source), "-o", str(binary)], check=True)
    listed = Counter(
        found.group(1) for line in cubin.dump(binary, "-sass") if (found := re.match(r"\s+/\*[0-9a-f]{4}\*/\s+(?:@!?U?P\d\s+)?(\w+)", line))
    )
    del listed["NOP"]
    code = machine.Library(source).of(toy.launches[0], arch)
    executed: Counter[str] = Counter()
    for opcode, count in code.executed(toy.launches[0]["blocks"]).items():
        executed[opcode.split(".")[0]] += count
    assert executed == {opcode: WARPS * count for opcode, count in listed.items()}
    assert [executed[opcode] for opcode in ("LDG", "STG", "LDS", "STS", "BAR")] == [WARPS] * 5
    pipes = machine.Library(source).pipes(toy.launches, arch)
    assert sum(pipes.values()) == sum(executed.values()) and pipes["memory"] >= 5 * WARPS


CARD = Card("80", 10, 100, 1000, 1)  # 10 SMs, 100 GB/s, 1 GHz: 10^10 cycles of an SM a second; a cache of 1 MB


def made(**more) -> Counts:
    """1,000 weights of perturb_nm_, 16 1/8 bytes each, and what else a launch counted."""
    record = {"warp_instructions": {"all": 1}, "sectors_read": 1000 / 4, "sectors_written": 1000 / 4 + 1000 / 8 / 32}
    return Counts("perturb_nm_", "fp32", 1000, 1000, [record | more])


def test_bound_by_hand() -> None:
    """For 10^7 weights, ten thousand times what was counted, the card has 10^6 cycles a second for it."""
    own = model.bound(made(), {"alu": 2000, "fp32": 500, "heavy": 300, "special": 10, "fp64": 5, "memory": 100}, CARD, 10**7)
    expected = {
        "memory": 16.125e7 / 1e11,
        "issue": 2915 / 4e6,
        "ALU": 2000 / 2e6,
        "fp32": 800 / 2e6,
        "special": 10 / 0.5e6,
        "fp64": 5e-6,
        "L1": 0,
    }
    assert own.parts == pytest.approx(expected) and own.by == "memory"
    assert own.launches == 2.5e-6 and own.serial == pytest.approx(0.7e-6)
    assert own.seconds == pytest.approx(1612.5e-6 + 2.5e-6 + 0.7e-6) and own.share == pytest.approx(1612.5 / 1615.7)
    slow = model.bound(made(), {"alu": 4000}, CARD, 10**7)
    assert slow.by == "ALU" and slow.share == pytest.approx(1612.5 / (2000 + 3.2))
    wide = model.bound(made(**{"global": {"load": {"sectors": 8000}}, "shared": {"store": {"wavefronts": 500}}}), {}, CARD, 10**7)
    assert wide.parts["L1"] == pytest.approx(8000 / 4 / 1e6 + 500 / 1e6) and wide.by == "L1"
    assert model.formula(made()) == 16.125
    assert model.formula(Counts("restore_adam_", "bf16", 100, 50, [])) == 2 * 8 + 50 / 8 / 100


def test_a_sample_does_not_grow_with_the_list() -> None:
    """Of 1,000 weights that stand for 4,000, a launch that samples moves what it would for all of them."""
    sampling = {"kernel": "_ZN12start_kernelE", "sectors_read": 500, "sectors_written": 0}
    counts = dataclasses.replace(made(), stands_for=4000)
    assert counts.bytes == 16.125
    assert dataclasses.replace(counts, launches=[*counts.launches, sampling]).bytes == 16.125 + 32 * 500 / 4000


def test_bars() -> None:
    good = model.bound(made(), {}, CARD, 10**7)
    poor = model.bound(made(), {"alu": 3600}, CARD, 10**7)  # 89 %
    assert 0.85 < poor.share < 0.90
    assert model.missed(made(), {"80": 80}, {"A100 80GB SXM": good, "H100 SXM": poor}) == []
    assert model.missed(made(), {"80": 80.6}, {"RTX 3090": poor}) == [
        "perturb_nm_ fp32 on sm_80: 81 warp instructions for 32 weights; the bar is 80",
        "perturb_nm_ fp32: 89% of a copy at the most on RTX 3090; the bar is 90%",
    ]
    conflicts = made(shared={"load": {"wavefronts": 100, "conflicts": 6}})
    assert model.missed(conflicts, {}, {}) == ["perturb_nm_ fp32: bank conflicts add 6% of the wavefronts to shared memory; the bar is 5%"]
    many = Counts("restore_", "bf16", 1000, 0, made().launches * 2)
    assert model.missed(many, {}, {}) == ["restore_ bf16: 2 launches; the bar is 1"]


def test_serial_phases_depend_on_the_type() -> None:
    """In float32 alone global top-k counts a second digit, and waits for another block's threshold: five of fifteen accesses."""
    assert model.serial("perturb_topk_", "fp32") == pytest.approx(15 * 0.7e-6)
    assert model.serial("perturb_topk_", "bf16") == pytest.approx(10 * 0.7e-6)
    assert model.serial("perturb_nm_", "fp32") == model.serial("perturb_nm_", "bf16")


def test_memory_is_not_idle_while_the_bracket_is_found() -> None:
    """Seven accesses of 0.7 us; a third of a cache of 1 MB takes 3.5 us at 100 GB/s, of a large one longer than they last."""
    counts = Counts("perturb_topk_", "fp32", 1000, 1000, made().launches)
    own = model.bound(counts, {}, CARD, 10**7)
    assert own.parts["memory"] == pytest.approx(16.125e7 / 1e11 - 2**20 / 3 / 1e11) and own.serial == pytest.approx(15 * 0.7e-6)
    large = model.bound(counts, {}, dataclasses.replace(CARD, cache=100), 10**7)
    assert large.parts["memory"] == pytest.approx(16.125e7 / 1e11 - 7 * 0.7e-6)


def test_command(executed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """On one layer: the bytes are the formula's and two sectors, and a bar that is missed is named and fails the command where asked."""
    monkeypatch.setattr(counting, "executor", lambda: executed)
    monkeypatch.setattr(counting, "resnet50", lambda quarter: [(64, 64)])
    arguments = ["--ops", "perturb_nm_", "--dtypes", "fp32", "--out", str(tmp_path)]
    monkeypatch.setitem(model.BARS, "perturb_nm_", model.Bars(instructions=1))
    assert command.main(arguments) == command.OK
    assert command.main([*arguments, "--check"]) == command.MISSED
    printed = capsys.readouterr().out
    assert "MODEL, not a measurement" in printed and "MISSED: perturb_nm_ fp32 on sm_80:" in printed
    (row,) = json.loads((tmp_path / "gpu_model.json").read_text())["counted"]
    assert row["formula"] == "16.125" and row["launches"] == 1
    assert row["B/weight"] == f"{16.125 + 2 * 32 / 64**2:.3f}"  # a sector each of rho and of the flag
    assert "PTXEMU_COUNTERS" not in os.environ


def test_without_an_executor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    import executor

    monkeypatch.setattr(executor, "FOLDER", None)
    assert command.main([]) == command.CANNOT_RUN
    assert capsys.readouterr().out == "gpu-model: CRAM_KERNELS_PTXEMU does not name a PTX executor\n"
