"""`make cuda-static` reads what compilers made, and fails on what must not be."""

import json
import re
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))

from benchmarks.cuda_static import __main__ as command  # noqa: E402
from benchmarks.cuda_static import cubin, gpus, report, traffic  # noqa: E402
from benchmarks.cuda_static.traffic import OPS, VECTORS, Op, Vectors  # noqa: E402
from cram_kernels import _native  # noqa: E402

SOURCE = ROOT / "tests" / "native" / "static.cu"
COPY = Op("copy", ("copy16",), ("from",), ("to",), 0, 1)
INDEXED = """
__global__ void __launch_bounds__(256) indexed(const float* x, float* y, int k) {
  float a[200];
  for (int i = 0; i < 200; ++i) a[i] = x[i * 256 + threadIdx.x];
  for (int j = 0; j < 100; ++j) y[threadIdx.x + 256 * j] = a[(k * j) % 200], a[(k + j * j) % 200] += 1;
}
"""


def why_not() -> str | None:
    if shutil.which("nvcc") is None:
        return "nvcc is not on PATH; a machine with the CUDA toolkit runs this, no GPU needed"
    try:
        cubin.tool("cuobjdump")
    except cubin.ToolMissing as missing:
        return str(missing)
    return None


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, cubin.Kernel]:
    """Of static.cu, for the oldest and the newest arch: "copy16 80" -> kernel."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    return {f"{k.name} {k.arch}": k for k in cubin.compiled([SOURCE], ["80", "120"], tmp_path_factory.mktemp("cubins"))}


@pytest.mark.parametrize("arch", ["80", "120"])
def test_kernels_are_read(kernels: dict[str, cubin.Kernel], arch: str) -> None:
    assert len(kernels) == 6
    wide, narrow, spilling = (kernels[f"{name} {arch}"] for name in ("copy16", "copy4", "spills"))
    assert wide.vectors("load") >= 1 and wide.vectors("store") >= 1 and wide.narrow("load") == wide.narrow("store") == 0
    assert narrow.vectors("load") == narrow.vectors("store") == 0 and narrow.narrow("load") == narrow.narrow("store") == 1
    assert wide.local == narrow.local == wide.stack == narrow.stack == wide.shared == 0 and narrow.shared == 512
    assert spilling.local > 0 and spilling.stack > 0 and spilling.registers <= 64
    assert report.kernel_row(wide)["occupancy"] == "100%"
    assert report.kernel_row(spilling, 1024)["occupancy"] == {"80": "50%", "120": "67%"}[arch]


def kernel(name: str, arch: str, load: int, store: int, stack: int = 0) -> cubin.Kernel:
    counts = Counter({"load.16": load, "store.16": store, "load.4": 100})
    return cubin.Kernel(name, arch, 64, stack, 0, counts)


def test_faults(kernels: dict[str, cubin.Kernel]) -> None:
    good, narrow, spilling = [kernels["copy16 80"], kernels["copy16 120"]], kernels["copy4 80"], kernels["spills 80"]
    exact = {"copy16": Vectors(good[0].vectors("load"), good[0].vectors("store"))}
    assert report.faults([*good, narrow], exact) == []  # nothing is said of copy4
    assert report.faults([spilling], {}) == [
        f"spills on sm_80: {spilling.stack} bytes of local memory a thread, {spilling.local} loads and stores of it"
    ]
    lost = report.faults([narrow], {"copy4": Vectors(1, 1)})
    assert lost == [f"copy4 on sm_80: wants 1 {kind}s of 16 bytes, the machine code has 0" for kind in ("load", "store")]
    assert report.faults([narrow, kernels["copy16 120"]], exact) == ["no copy16 was compiled for sm_80"]


def test_an_indexed_array_is_a_fault(tmp_path: Path) -> None:
    """Local memory without a spilled register, of which ptxas reports 0 bytes of spills."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    source = tmp_path / "indexed.cu"
    source.write_text(INDEXED)
    (own,) = cubin.compiled([source], ["80"], tmp_path / "cubins")
    assert own.stack == 800 and own.local >= 200
    (fault,) = report.faults([own], {})
    assert fault.startswith("indexed on sm_80: 800 bytes of local memory a thread, ")


@pytest.mark.parametrize("arch", ["80", "100"])
@pytest.mark.parametrize("name", VECTORS)
def test_one_access_fewer_is_a_fault(name: str, arch: str) -> None:
    wanted = {kind: VECTORS[name].wanted(kind, arch) for kind in ("load", "store")}
    only, exact = {name: VECTORS[name]}, kernel(name, arch, **wanted)
    assert wanted["load"] > 0 and report.faults([exact], only) == report.surplus([exact], only) == []
    for kind in (kind for kind in wanted if wanted[kind] > 0):
        said = f"{name} on sm_{arch}: wants {wanted[kind]} {kind}s of 16 bytes, the machine code has"
        fewer, more = (kernel(name, arch, **wanted | {kind: wanted[kind] + change}) for change in (-1, 1))
        assert report.faults([fewer], only) == [f"{said} {wanted[kind] - 1}"] and report.surplus([fewer], only) == []
        (note,) = report.surplus([more], only)
        assert note.startswith(f"{said} {wanted[kind] + 1}") and "VECTORS" in note and report.faults([more], only) == []


def test_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Sabotaged kernels, one that spills and one whose accesses are narrow, make the command end with a fault that names them."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    monkeypatch.setattr(command, "OPS", (COPY,))
    monkeypatch.setattr(command, "VECTORS", {"copy4": Vectors(1, 1), "copy16": Vectors(0, 1)})
    monkeypatch.setattr(command.native_build, "cuda_sources", lambda: [SOURCE])
    assert command.main(["--archs", "90", "--out", str(tmp_path)]) == command.FAULT
    printed = capsys.readouterr().out
    assert "FAULT: spills on sm_90:" in printed and "FAULT: copy4 on sm_90: wants 1 loads of 16 bytes" in printed
    assert "NOTE: copy16 on sm_90: wants 0 loads of 16 bytes" in printed
    assert "PREDICTION, not a measurement" in printed
    record = json.loads((tmp_path / "cuda_static.json").read_text())
    assert {row["name"] for row in record["kernels"]} == {"copy16", "copy4", "spills"} and record["faults"] and record["surplus"]


def test_the_library_that_was_built() -> None:
    """The kernels themselves, for the archs that the library has: no local memory, as many vector accesses as stated.
    `make cuda-static` does it for all."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    library = Path(_native.__file__).parent / "libcram_kernels_cuda.so"
    archs = [arch.removeprefix("sm_") for arch in _native.host.gpu_archs.split()]
    assert library.exists() and archs, "nvcc is on PATH, but the CUDA library was not built: `make setup` does"
    kernels = cubin.kernels_of(library, archs[0], "-arch", f"sm_{archs[0]}")
    assert len(kernels) > len(VECTORS) and report.faults(kernels, VECTORS) == report.surplus(kernels, VECTORS) == []


def test_in_flight() -> None:
    """Little's law, by hand: 1 TB/s and 0.8 us on 100 SMs are 8 kB each; half of 2048 threads with two vectors on their way are 32 KiB."""
    card = gpus.Card("80", 100, 1000, 1000, 40)
    assert gpus.needed_in_flight(card, 1.0) == pytest.approx(8000)
    own = replace(kernel("copy16", "80", 1, 1), waits=[cubin.Wait(20, 2)])
    assert report.in_flight(replace(COPY, ahead=2), [own], card) == f"32 / {8000 * 0.85 / 2 / 1024:.0f} KiB"
    assert report.in_flight(COPY, [], card) is None
    serial = replace(own, waits=[cubin.Wait(5, 1), cubin.Wait(3, 1)])
    assert report.in_flight(replace(COPY, ahead=2), [serial], card) == f"16 / {8000 * 0.85 / 2 / 1024:.0f} KiB"
    assert report.serialized([own, serial], (replace(COPY, ahead=2),)) == [
        "copy16 on sm_80: copy wants 2 loads of 16 bytes on their way at once, the machine code has 1"
    ]


def test_without_tools_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(cubin.shutil, "which", lambda name: None)
    monkeypatch.setattr(cubin, "find_spec", lambda name: None)
    assert command.main(["--out", str(tmp_path)]) == command.CANNOT_RUN
    assert "nvcc is not on PATH" in capsys.readouterr().out
    with pytest.raises(cubin.ToolMissing, match="cuobjdump is neither on PATH"):
        cubin.tool("cuobjdump")


@pytest.mark.parametrize(
    "line, kind",
    [
        ("        /*0070*/              @!P0 LDG.E.128.CONSTANT R4, [R2] ;  /* 0x00 */", "load.16"),
        ("        /*0070*/                   LDG.E.EF.128 R4, desc[UR4][R2.64] ;", "load.16"),
        ("        /*0070*/                   LDG.E.ENL2.256 R4, R8, desc[UR4][R2.64] ;", "load.32"),
        ("        /*0070*/                   LDG.E.U8 R4, [R2] ;", "load.1"),
        ("        /*0070*/              @UP0 STG.E.U16 [R2], R4 ;", "store.2"),
        ("        /*0070*/                   STG.E [R2.64], R4 ;", "store.4"),
        ("        /*0070*/                   STL.64 [R1], R4 ;", "local_store.8"),
        ("        /*0070*/                   REDG.E.ADD.STRONG.GPU [R2], R4 ;", "global_atomic"),
        ("        /*0070*/                   LDGSTS.E.BYPASS.128 [R2], [R4] ;", "load.16"),
    ],
)
def test_instructions(line: str, kind: str) -> None:
    assert cubin.instructions(
        ["\t\tFunction : f", line, "        /*0080*/   LDS.128 R4, [R2] ;", "        /*0090*/  LDC R1, c[0x0] ;"]
    ) == {"f": Counter({kind: 1})}


# By hand: what each 16-byte load brings is first needed so many instructions later, with so many such loads sent until then.
LISTING = """
		Function : _Z5first
        /*0000*/                   MOV R1, c[0x0][0x28] ;                 /* 0x00 */
        /*0010*/                   LDG.E.128 R4, [R2.64] ;                /* 0x00: R4-R7, needed at 0070 */
        /*0020*/               @P0 BRA 0x50 ;
        /*0030*/                   LDG.E.128.CONSTANT R8, [R2.64+0x10] ;  /* needed at 0060 */
        /*0040*/                   LDG.E R12, [R2.64+0x20] ;              /* 4 bytes */
        /*0050*/                   IADD3 R13, R14, 0x7, RZ ;
        /*0060*/                   FADD R13, R13, R11 ;
        /*0070*/                   STG.E.128 [R2.64], R4 ;
        /*0080*/                   LDG.E.ENL2.256 R20, R40, desc[UR4][R2.64] ;  /* R20-R23 and R40-R43, needed behind the jump */
        /*0090*/                   BRA 0xc0 ;
        /*00a0*/                   FADD R43, R43, R43 ;                   /* nothing comes here */
        /*00b0*/                   EXIT ;
        /*00c0*/                   FADD R0, R42, R24 ;
        /*00d0*/               @P1 LDG.E.128 R52, [R2.64] ;               /* nothing needs it */
        /*00e0*/                   EXIT ;
        /*00f0*/                   FADD R0, R52, R52 ;
		Function : _Z6second
        /*0000*/                   LDG.E.64 R4, [R2.64] ;
        /*0010*/                   FADD R0, R4, R5 ;
"""


def test_distance_to_the_first_use() -> None:
    found = cubin.waits(LISTING.splitlines())
    assert found == {"_Z5first": [cubin.Wait(4, 2), cubin.Wait(3, 1), cubin.Wait(2, 1)], "_Z6second": []}
    own = replace(kernel("copy16", "80", 1, 1), waits=found["_Z5first"])
    assert (own.soonest, own.at_once) == (2, 2) and report.kernel_row(own)["load to use"] == 2
    assert (kernel("copy16", "80", 1, 1).soonest, kernel("copy16", "80", 1, 1).at_once) == (0, 0)


@pytest.mark.parametrize(
    "arch, threads, registers, shared, expected",
    [
        ("80", 256, 32, 0, 1.0),
        ("80", 256, 40, 0, 0.75),  # 6 blocks of 8 warps
        ("80", 1024, 64, 0, 0.5),
        ("90", 256, 32, 48 * 1024, 0.5),  # 4 blocks by shared memory
        ("86", 256, 32, 0, 1.0),
        ("89", 32, 16, 0, 0.5),  # 24 blocks
        ("120", 512, 255, 0, 0.0),  # does not fit
    ],
)
def test_occupancy(arch: str, threads: int, registers: int, shared: int, expected: float) -> None:
    assert gpus.occupancy(arch, threads, registers, shared) == expected


def test_names() -> None:
    assert cubin.short("void cram::(anonymous namespace)::update_kernel<cram::Sgd>(cram::Table)") == "update_kernel<Sgd>"
    assert cubin.short("plain") == "plain"


def test_threads_of_a_block_are_those_of_the_kernels() -> None:
    assert f"#define CRAM_BLOCK_THREADS {traffic.THREADS}\n" in (ROOT / "csrc" / "cuda" / "tuning.h").read_text()
    sources = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cu*"))
    bounds = re.findall(r"__launch_bounds__\((\w+).*?\)\s+(\w+)\(", sources)
    assert {name: int(threads) for threads, name in bounds if threads != "kThreads"} == traffic.OTHER_THREADS


def test_traffic_is_that_of_ops() -> None:
    from cram_kernels import ops

    for op in OPS:
        assert hasattr(ops, op.name) and op.kernels and op.bytes > 0, op
        assert VECTORS.keys() >= set(op.kernels), op
    bytes_of = {op.name: op.bytes for op in OPS}
    assert bytes_of["prune_topk_"] == 4 + 4 + 4 + 1 / 8 and bytes_of["prune_nm_"] == 4 + 4 + 1 / 8


def test_prediction() -> None:
    assert COPY.bytes == 8 and COPY.formula == "from in + to out"
    assert report.predicted_us(COPY, 10**9, 1000) == pytest.approx(8000 / 0.85)
