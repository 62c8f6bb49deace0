"""Compiles the native libraries: writes a build.ninja and runs it. Used by setup.py; importable without torch."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"

BASE_FLAGS = "-std=c++17 -O3 -g1 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-psabi"
# Every operation is rounded on its own, in every library: no contraction, no fast math.
NUMERIC_FLAGS = "-ffp-contract=off -fno-math-errno -fno-trapping-math -fwrapv"
ISA_FLAGS = {
    "isa_portable": "",
    "isa_avx2": "-mavx2 -mf16c -mbmi -mbmi2 -mpopcnt",
    # g++ 12 warns about its own AVX-512 header
    "isa_avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mf16c -mbmi -mbmi2 -mpopcnt -mprefer-vector-width=512"
    " -Wno-uninitialized -Wno-maybe-uninitialized",
}


class BuildError(Exception):
    """What is missing, in one sentence."""


def torch_folder() -> Path | None:
    """The folder of the installed torch, also from inside pip's isolated build environment; None where there is none."""
    places = [*sys.path, sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
    for place in map(Path, places):
        if (place / "torch" / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
            return place / "torch"
    return None


def torch_version(folder: Path) -> str:
    facts: dict[str, str] = {}
    exec((folder / "version.py").read_text(), facts)
    return facts["__version__"]


def compiler() -> str:
    """$CXX, g++ or clang++.

    Raises:
        BuildError: none is installed.
    """
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and shutil.which(name):
            return name
    raise BuildError("cram_kernels needs a C++17 compiler: install g++ (Debian and Ubuntu: `apt install g++`) or clang++, or set CXX")


def build(package: Path, sanitize: str = "") -> None:
    """Compile everything into the folder `package`. sanitize: "", "address", "undefined".

    Raises:
        BuildError: torch or a compiler is missing.
        subprocess.CalledProcessError: a compilation failed.
    """
    cxx = compiler()
    torch = torch_folder()
    if torch is None:
        raise BuildError("cram_kernels is built against the headers of torch >= 2.10: `pip install torch` first")
    work = ROOT / "build" / f"native-{sysconfig.get_platform()}-{sys.version_info.major}{sys.version_info.minor}{'-' + sanitize if sanitize else ''}"
    work.mkdir(parents=True, exist_ok=True)
    (work / "build.ninja").write_text(ninja_file(cxx, torch, package, sanitize))
    import ninja

    subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(work)], check=True)


def ninja_file(cxx: str, torch: Path, package: Path, sanitize: str) -> str:
    """The text of build.ninja."""
    import pybind11

    x86 = sysconfig.get_platform().endswith("x86_64")
    sanitizer = f"-fsanitize={sanitize} -fno-sanitize-recover=all -fno-omit-frame-pointer" if sanitize else ""
    flags = f"{BASE_FLAGS} {NUMERIC_FLAGS} {sanitizer} -DTORCH_TARGET_VERSION=0x020a000000000000"
    includes = f"-isystem {torch / 'include'} -isystem {torch / 'include/torch/csrc/api/include'}"
    version = subprocess.run([cxx, "--version"], check=True, capture_output=True, text=True).stdout.splitlines()[0]
    facts = {"CRAM_COMPILER": version, "CRAM_TORCH_VERSION": torch_version(torch), "CRAM_GPU_ARCHS": ""}
    defines = " ".join(f"'-D{name}=\"{value}\"'" for name, value in facts.items())
    python = f"-isystem {sysconfig.get_path('include')} -isystem {pybind11.get_include()}"

    lines = [
        "rule cxx",
        f"  command = {cxx} -MMD -MF $out.d {flags} $extra -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {cxx} -shared {sanitizer} $in -o $out $extra",
    ]

    def compile_(source: Path, extra: str) -> str:
        out = f"{source.parent.name}_{source.stem}.o"
        lines.extend([f"build {out}: cxx {source}", f"  extra = {extra}"])
        return out

    def link(name: str, objects: list[str], extra: str, after: str = "") -> str:
        out = str(package / name)
        lines.extend([f"build {out}: link {' '.join(objects)} {'| ' + after if after else ''}", f"  extra = {extra}"])
        return out

    sources = sorted([*CSRC.glob("*.cpp"), *(CSRC / "cpu").glob("*.cpp")])
    libraries = f"-L{torch / 'lib'} -ltorch -ltorch_cpu -lc10"
    objects = [
        compile_(source, includes + " " + ISA_FLAGS.get(source.stem, ""))
        for source in sources
        if source.stem != "host" and (x86 or source.stem not in ("isa_avx2", "isa_avx512"))
    ]
    library = link("libcram_kernels_cpu.so", objects, libraries)
    host = compile_(CSRC / "host.cpp", f"{python} {defines}")
    module = link("_host" + sysconfig.get_config_var("EXT_SUFFIX"), [host], f"-L{package} -l:libcram_kernels_cpu.so '-Wl,-rpath,$$ORIGIN'", library)
    return "\n".join([*lines, f"default {library} {module}", ""])
