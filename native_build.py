"""Compiles the native libraries: writes a build.ninja and runs it. Used by setup.py; importable without torch.

By hand: python native_build.py FOLDER [address | undefined | thread]; before FOLDER, --harness for tests/native/harness.cpp alone,
--executed for the CUDA library as an executor of PTX runs it; behind its FOLDER, threads of a block: 128 | 256 | 512.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"

FLAGS = "-std=c++17 -g1 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-psabi"
# Every operation is rounded on its own, in every library: no contraction, no fast math.
NUMERIC_FLAGS = "-ffp-contract=off -fno-math-errno -fno-trapping-math -fwrapv"
AVX2 = "-mavx2 -mf16c -mbmi -mbmi2 -mpopcnt"
ISA_FLAGS = {
    "isa_portable": "",
    "isa_avx2": AVX2,
    "isa_avx512": f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
    " -Wno-unknown-warning-option -Wno-uninitialized -Wno-maybe-uninitialized",  # g++ 12 warns about its own AVX-512 header
}
# Sparse inference promises an error bound, not bits: there multiplications and additions may fuse.
FUSED = " -ffp-contract=fast"
ISA_FLAGS |= {
    f"sparse_{level}": ISA_FLAGS[f"isa_{level}"] + (FUSED if level == "portable" else f" -mfma{FUSED}")
    for level in ("portable", "avx2", "avx512")
}
ISA_FLAGS["dot_avx512"] = f"{ISA_FLAGS['sparse_avx512']} -mavx512vbmi"
GPU_ARCHS = ("80", "86", "89", "90", "100", "120")  # Ampere to Blackwell, and PTX of the last
CUDA_FLAGS = "-std=c++17 -O3 -fmad=false -Xcompiler -fPIC,-fvisibility=hidden"
# What the harness links.
TORCH_FREE = (
    *("adam", "nm", "norm", "perturb", "perturb_masked", "restore", "sgd", "simd", "topk", "topk_histogram", "topk_sample", "topk_select"),
    *("convolution", "product", *ISA_FLAGS),
)


class BuildError(Exception):
    """What is missing, in one sentence."""


def torch_folder() -> Path | None:
    """The folder of the installed torch, also from inside pip's isolated build environment; None where it is not there, or before 2.10."""
    for place in map(Path, [*sys.path, sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]):
        torch = place / "torch"
        if (torch / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
            return torch if tuple(map(int, torch_version(torch).split(".")[:2])) >= (2, 10) else None
    return None


def torch_facts(folder: Path) -> dict[str, str]:
    facts: dict[str, str] = {}
    exec((folder / "version.py").read_text(), facts)
    return facts


def torch_version(folder: Path) -> str:
    return torch_facts(folder)["__version__"]


def compiler() -> str:
    """$CXX, or else g++ or clang++.

    Raises:
        BuildError: $CXX is not there, or none is installed.
    """
    if cxx := os.environ.get("CXX"):
        if shutil.which(cxx.split()[0]) is None:  # it may hold options
            raise BuildError(f"CXX names no compiler that is installed: {cxx!r}")
        return cxx
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return name
    raise BuildError("cram_kernels needs a C++17 compiler: install g++ (Debian and Ubuntu: `apt install g++`) or clang++, or set CXX")


def option(flag: str, value: object) -> str:
    """An option for the shell that ninja starts."""
    return shlex.quote(f"{flag}{value}").replace("$", "$$")


def escaped(path: object) -> str:
    """A path as a build line of ninja wants it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class Ninja:
    """A build.ninja in the making."""

    def __init__(self, cxx: str, sanitize: str = "", gpu: str = "") -> None:
        self.cxx = cxx
        launcher, host = host_compiler(cxx)
        self.sanitize = sanitize
        mode = f"-O1 -fsanitize={sanitize} -fno-sanitize-recover=all -fno-omit-frame-pointer" if sanitize else "-O3"
        self.lines = [
            "rule cxx",
            f"  command = {cxx} -MMD -MF $out.d {FLAGS} {NUMERIC_FLAGS} {mode} $extra -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule cuda",
            f"  command = {launcher}nvcc {host} {CUDA_FLAGS} {gpu} -MMD -MF $out.d $extra -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {cxx} {mode} $in -o $out $extra",
            "rule link_cuda",
            f"  command = nvcc {host} -shared -cudart shared {gpu} $in -o $out $extra",
        ]
        self.objects: set[str] = set()
        self.targets: list[str] = []

    def compile(self, source: Path, extra: str = "") -> str:
        """An object file; libraries may share it."""
        out = f"{source.parent.name}_{source.stem}.o"
        if out in self.objects:
            return out
        self.objects.add(out)
        # Where it optimizes, g++ 12 takes more than six minutes for the portable kernels with every lane checked, half a minute without.
        level = "-O0 " if self.sanitize == "undefined" and source.stem == "isa_portable" else ""
        self.lines += [
            f"build {out}: {'cuda' if source.suffix == '.cu' else 'cxx'} {escaped(source)}",
            f"  extra = {ISA_FLAGS.get(source.stem, '')} {level}{extra}",
        ]
        return out

    def link(self, out: Path, objects: list[str], extra: str, after: str = "", rule: str = "link") -> str:
        target = escaped(out)
        self.lines += [f"build {target}: {rule} {' '.join(objects)}{' | ' + after if after else ''}", f"  extra = {extra}"]
        self.targets.append(target)
        return target

    def run(self, name: str) -> None:
        import ninja

        python = f"{sys.version_info.major}{sys.version_info.minor}"
        work = ROOT / "build" / "-".join(filter(None, [name, sysconfig.get_platform(), python, self.sanitize]))
        work.mkdir(parents=True, exist_ok=True)
        (work / "build.ninja").write_text("\n".join([*self.lines, f"default {' '.join(self.targets)}", ""]))
        subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(work)], check=True)


def gpu_archs(torch: Path) -> list[str]:
    """$CRAM_KERNELS_GPU_ARCHS ("80 90"), or else those of GPU_ARCHS that this nvcc knows; the first alone where this torch has no CUDA: it
    shows that the kernels compile. Empty: nothing is built for GPUs.

    Raises:
        BuildError: nvcc does not know a chosen arch, or is of another CUDA than this torch.
    """
    chosen, cuda = os.environ.get("CRAM_KERNELS_GPU_ARCHS", "").split(), torch_facts(torch).get("cuda")
    if not cuda_sources() or chosen == ["none"]:
        return []
    release = re.search(r"release (\d+)\.", nvcc("--version"))
    if cuda and release and release[1] != cuda.split(".")[0]:
        raise BuildError(
            f"nvcc on PATH is of CUDA {release[1]}, and this torch of CUDA {cuda}, so that the library could not be loaded: put an nvcc of "
            f"CUDA {cuda.split('.')[0]} first on PATH, or build without CUDA kernels: CRAM_KERNELS_GPU_ARCHS=none"
        )
    known = [arch.removeprefix("compute_") for arch in nvcc("--list-gpu-arch").split()]
    if unknown := [arch for arch in chosen if arch not in known]:
        raise BuildError(f"CRAM_KERNELS_GPU_ARCHS must name archs that nvcc knows ({' '.join(known)}), got {' '.join(unknown)}")
    return chosen or [arch for arch in GPU_ARCHS if arch in known][: None if cuda else 1]


def nvcc(*options: str) -> str:
    return subprocess.run(["nvcc", *options], check=True, capture_output=True, text=True).stdout


def host_compiler(cxx: str) -> tuple[str, str]:
    """What goes before nvcc (ccache), and its option for the host compiler: the one that compiles the rest."""
    launcher, *rest = cxx.split()
    if Path(launcher).name in ("ccache", "sccache"):
        return f"{launcher} ", option("-ccbin=", rest[0] if rest else "g++")
    return "", option("-ccbin=", launcher)


def machine_code(archs: list[str]) -> str:
    """nvcc's options for machine code of these archs, and PTX of the last for those to come."""
    codes = [f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return " ".join([*codes, f"-gencode arch=compute_{archs[-1]},code=compute_{archs[-1]}", "-lineinfo"])


def cuda_sources() -> list[Path]:
    """Empty where there is no nvcc, or nothing for it to compile."""
    return sorted((CSRC / "cuda").glob("*.cu")) if shutil.which("nvcc") else []


def require_torch() -> Path:
    torch = torch_folder()
    if torch is None:
        raise BuildError("cram_kernels is built against the headers of torch >= 2.10: `pip install torch` first")
    return torch


def stable_abi_flags(torch: Path) -> str:
    headers = [option("-isystem", torch / folder) for folder in ("include", "include/torch/csrc/api/include")]
    return " ".join(["-DTORCH_TARGET_VERSION=0x020a000000000000", *headers])


def libtorch_flags(torch: Path) -> str:
    return f"{option('-L', torch / 'lib')} -ltorch -ltorch_cpu -lc10"


def sources() -> list[Path]:
    x86 = platform.machine() in ("x86_64", "AMD64")
    found = sorted([*CSRC.glob("*.cpp"), *(CSRC / "cpu").glob("*.cpp"), *(CSRC / "sparse").glob("*.cpp")])
    return [source for source in found if x86 or not source.stem.endswith(("_avx2", "_avx512"))]


def build(package: Path, sanitize: str = "") -> None:
    """Compile the libraries into the folder `package`. sanitize: "", "address", "undefined".

    Raises:
        BuildError: torch or a compiler is missing.
        subprocess.CalledProcessError: a compilation failed.
    """
    torch = require_torch()
    archs = gpu_archs(torch)
    ninja = Ninja(compiler(), sanitize, machine_code(archs) if archs else "")
    package.mkdir(parents=True, exist_ok=True)
    version = subprocess.run([*ninja.cxx.split(), "--version"], check=True, capture_output=True, text=True).stdout.splitlines()[0]
    facts = {
        "CRAM_COMPILER": version,
        "CRAM_TORCH_VERSION": torch_version(torch),
        "CRAM_GPU_ARCHS": " ".join(f"sm_{arch}" for arch in archs),
    }
    defines = " ".join(option(f"-D{name}=", f'"{value}"') for name, value in facts.items())
    stable_abi = stable_abi_flags(torch)
    libtorch = libtorch_flags(torch)

    objects = [ninja.compile(source, defines if source.stem == "host" else stable_abi) for source in sources()]
    ninja.link(package / "libcram_kernels_cpu.so", objects, f"-shared {libtorch}")
    if archs:
        link_cuda(ninja, package, stable_abi, libtorch)
    else:
        (package / "libcram_kernels_cuda.so").unlink(missing_ok=True)  # of an earlier build
    ninja.run("native")


def link_cuda(ninja: Ninja, folder: Path, stable_abi: str, libtorch: str, defines: str = "") -> str:
    """Kernels and launchers, their registration, and the checks that every backend shares."""
    glue = [*sorted((CSRC / "cuda").glob("*.cpp")), *(CSRC / f"{name}.cpp" for name in ("check", "facts", "overlap", "signature"))]
    objects = [ninja.compile(source, defines) for source in cuda_sources()] + [
        ninja.compile(source, f"{stable_abi} {defines}") for source in glue
    ]
    # A torch without CUDA has nothing in libtorch.so, which the linker would leave out; in one with CUDA it brings libtorch_cuda.so.
    return ninja.link(folder / "libcram_kernels_cuda.so", objects, f"-Xlinker --no-as-needed {libtorch}", rule="link_cuda")


def build_executed(folder: Path, threads: str = "256") -> None:
    """Compile into `folder` the CUDA library as PTX alone and a stand-in for libtorch_cuda, for tests that execute the PTX on the CPU.

    threads: of a block; other sizes than the package's are for tests alone.

    Raises:
        BuildError: torch, a compiler or nvcc is missing.
        subprocess.CalledProcessError: a compilation failed.
    """
    if not cuda_sources():
        raise BuildError("the CUDA library needs nvcc on PATH")
    ninja = Ninja(compiler(), gpu="-arch=compute_80 -code=compute_80 --no-compress")
    torch = require_torch()
    folder.mkdir(parents=True, exist_ok=True)
    link_cuda(ninja, folder, stable_abi_flags(torch), libtorch_flags(torch), f"-DCRAM_BLOCK_THREADS={threads}")
    stand_in = ninja.compile(ROOT / "tests" / "native" / "libtorch_cuda.cpp", stable_abi_flags(torch))
    ninja.link(folder / "libtorch_cuda_stand_in.so", [stand_in], "-shared")
    ninja.run(f"executed-{threads}")


def build_harness(folder: Path, sanitize: str = "") -> None:
    """Compile tests/native/harness.cpp and sparse.cpp into `folder`: the CPU kernels without torch and Python."""
    ninja = Ninja(compiler(), sanitize)
    folder.mkdir(parents=True, exist_ok=True)
    kernels = [ninja.compile(source) for source in sources() if source.stem in TORCH_FREE]
    own = [ninja.compile(ROOT / "tests" / "native" / name) for name in ("harness.cpp", "sparse.cpp")]
    ninja.link(folder / "harness", [*own, *kernels], "-lpthread")
    ninja.run("harness")


if __name__ == "__main__":
    targets = {"--harness": build_harness, "--executed": build_executed}
    arguments = [a for a in sys.argv[1:] if a not in targets]
    target = next((targets[a] for a in sys.argv if a in targets), build)
    target(Path(arguments[0]).resolve(), *arguments[1:])
