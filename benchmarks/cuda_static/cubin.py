"""Makes and reads machine code: resources and memory instructions of every kernel."""

import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import product
from pathlib import Path

from native_build import CUDA_FLAGS

from .gpus import SHARED_RESERVED

FUNCTION = re.compile(r"^\s*Function :?\s*(?P<symbol>[^\s:]+)")
RESOURCES = re.compile(r"REG:(?P<registers>\d+) STACK:(?P<stack>\d+) SHARED:(?P<shared>\d+)")
INSTRUCTION = re.compile(
    r"^\s*/\*(?P<address>[0-9a-f]+)\*/\s+(?P<guard>@!?U?P\w+\s+)?(?P<name>[A-Z][A-Z0-9_]*)(?P<modifiers>[.\w]*)(?P<operands>[^;]*)"
)
REGISTER = re.compile(r"\bR(\d+)\b")
TARGET = re.compile(r"\b0x([0-9a-f]+)\s*$")
KIND = {"LD": "load", "LDG": "load", "LDGSTS": "load", "ST": "store", "STG": "store", "LDL": "local_load", "STL": "local_store"}
KIND |= dict.fromkeys(("ATOM", "ATOMG", "RED", "REDG"), "global_atomic")


class ToolMissing(Exception):
    """What is not installed, and what brings it."""


@dataclass
class Kernel:
    """One kernel on one arch."""

    name: str  # demangled, without namespaces and arguments
    arch: str
    registers: int
    stack: int  # bytes of local memory a thread
    shared: int  # bytes a block, without what a launch adds
    instructions: Counter[str] = field(default_factory=Counter)  # "load.16": bytes a thread; "global_atomic"
    waits: list["Wait"] = field(default_factory=list)

    def vectors(self, kind: str) -> int:
        """Loads or stores of 16 bytes and more."""
        return sum(count for key, count in self.instructions.items() if key in (f"{kind}.16", f"{kind}.32"))

    def narrow(self, kind: str) -> int:
        return sum(count for key, count in self.instructions.items() if key.startswith(f"{kind}.")) - self.vectors(kind)

    @property
    def local(self) -> int:
        """Loads and stores of local memory: spilled registers, and arrays that registers cannot hold."""
        return sum(count for key, count in self.instructions.items() if key.startswith("local_"))

    @property
    def soonest(self) -> int:
        """Instructions from a global load of 16 bytes to the first that needs it, the fewest of all; 0: there is no such load."""
        return min((wait.distance for wait in self.waits), default=0)

    @property
    def at_once(self) -> int:
        """Global loads of 16 bytes on their way when a thread first waits for one of them, the most."""
        return max((wait.loads for wait in self.waits), default=0)


@dataclass(frozen=True)
class Wait:
    """From a global load of 16 bytes or more to the first instruction that reads or overwrites what it loads."""

    distance: int  # instructions, on the shortest way
    loads: int  # such loads on the way that takes no jump with a condition, itself among them


def tool(name: str) -> str:
    """cuobjdump from PATH, else from the triton wheel, which ships it.

    Raises:
        ToolMissing: neither is there.
    """
    if found := shutil.which(name):
        return found
    if (spec := find_spec("triton")) is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
        if path.exists():
            return str(path)
    raise ToolMissing(f"{name} is neither on PATH (CUDA toolkit) nor in an installed triton: `pip install triton` brings it")


def dump(binary: Path, *options: str) -> list[str]:
    # nvdisasm, which cuobjdump starts, lies beside it
    objdump = tool("cuobjdump")
    path = os.pathsep.join([str(Path(objdump).parent), os.environ.get("PATH", "")])
    command = [objdump, *options, str(binary)]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"PATH": path}).stdout.splitlines()


def functions(lines: list[str]) -> Iterator[tuple[str, str]]:
    """(symbol, line) for every line below a `Function` line."""
    symbol = ""
    for line in lines:
        if found := FUNCTION.match(line):
            symbol = found["symbol"]
        elif symbol:
            yield symbol, line


def instructions(lines: list[str]) -> dict[str, Counter[str]]:
    """Symbol -> how many memory instructions of each kind and width its machine code has."""
    counts: dict[str, Counter[str]] = {}
    for symbol, line in functions(lines):
        own = counts.setdefault(symbol, Counter())
        if (found := INSTRUCTION.match(line)) is None or (kind := KIND.get(found["name"])) is None:
            continue
        own[kind if kind == "global_atomic" else f"{kind}.{width(found['modifiers'])}"] += 1
    return counts


def waits(lines: list[str]) -> dict[str, list[Wait]]:
    """Symbol -> a Wait for each global load of 16 bytes or more that something needs."""
    code: dict[str, list[re.Match[str]]] = {}
    for symbol, line in functions(lines):
        if (found := INSTRUCTION.match(line)) is not None:
            code.setdefault(symbol, []).append(found)
    return {symbol: [wait for i in range(len(own)) if loads_vector(own[i]) and (wait := wait_of(own, i))] for symbol, own in code.items()}


def loads_vector(instruction: re.Match[str]) -> bool:
    return KIND.get(instruction["name"]) == "load" and instruction["name"] != "LDGSTS" and width(instruction["modifiers"]) >= 16


def registers(operands: str) -> list[int]:
    return [int(number) for number in REGISTER.findall(operands)]


def wait_of(code: list[re.Match[str]], load: int) -> Wait | None:
    place = {int(instruction["address"], 16): i for i, instruction in enumerate(code)}
    into = {first + i for first in registers(code[load]["operands"].split("[")[0]) for i in range(4)}  # 32 bytes have two destinations

    def needs(i: int) -> bool:
        return not into.isdisjoint(registers(code[i]["operands"]))

    seen, front, distance = {load}, {load}, 1
    while front := {following for i in front for following in successors(code, i, place)} - seen:
        if any(map(needs, front)):
            break
        seen.update(front)
        distance += 1
    else:
        return None
    loads, i, passed = 1, load, {load}
    while (straight := successors(code, i, place)[:1]) and not needs(i := straight[0]) and i not in passed:
        passed.add(i)
        loads += loads_vector(code[i])
    return Wait(distance, loads)


def successors(code: list[re.Match[str]], i: int, place: dict[int, int]) -> list[int]:
    instruction, following = code[i], [i + 1] if i + 1 < len(code) else []
    if instruction["name"] in ("BRA", "EXIT", "RET", "BRX", "JMP"):
        target = TARGET.search(instruction["operands"]) if instruction["name"] in ("BRA", "JMP") else None
        jump = [place[int(target[1], 16)]] if target and int(target[1], 16) in place else []
        return jump if instruction["guard"] is None and "P" not in instruction["operands"] else following + jump
    return following


def width(modifiers: str) -> int:
    """Bytes a thread: LDG.E.128.CONSTANT, LDG.E.EF.128 and LDG.E.ENL2.256 name their bits, LDG.E.U8 its type, LDG.E none: 4."""
    for part in modifiers.split("."):
        if part in ("256", "128", "64"):
            return int(part) // 8
        if part in ("U8", "S8"):
            return 1
        if part in ("U16", "S16"):
            return 2
    return 4


def demangled(symbols: list[str]) -> list[str]:
    """Names without namespaces and arguments; the symbols themselves where c++filt is missing."""
    if shutil.which("c++filt") is None:
        return symbols
    full = subprocess.run(["c++filt", *symbols], check=True, capture_output=True, text=True).stdout.splitlines()
    return [short(name) for name in full]


def short(name: str) -> str:
    """void cram::(anonymous namespace)::update_kernel<cram::Sgd>(cram::Table) -> update_kernel<Sgd>"""
    name = re.sub(r"\(anonymous namespace\)::|\b\w+::", "", name)
    return re.sub(r"^void ", "", re.sub(r"\(.*", "", name))


def compiled(sources: list[Path], archs: list[str], folder: Path) -> list[Kernel]:
    """All kernels of CUDA sources, through a cubin for each source and arch in `folder`.

    Raises:
        ToolMissing: no cuobjdump.
        subprocess.CalledProcessError: nvcc refused a source; its words are printed.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def kernels(job: tuple[Path, str]) -> list[Kernel]:
        source, arch = job
        cubin = folder / f"{source.stem}_sm_{arch}.cubin"
        subprocess.run(["nvcc", *CUDA_FLAGS.split(), f"-arch=sm_{arch}", "-cubin", str(source), "-o", str(cubin)], check=True)
        return kernels_of(cubin, arch)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [kernel for found in pool.map(kernels, product(sources, archs)) for kernel in found]


def kernels_of(binary: Path, arch: str, *options: str) -> list[Kernel]:
    """Of a cubin, or with the options `-arch sm_80` of a library that has several."""
    listing = dump(binary, "-sass", *options)
    counts, used = instructions(listing), waits(listing)
    resources = {s: found for s, line in functions(dump(binary, "-res-usage", *options)) if (found := RESOURCES.search(line))}
    return [
        Kernel(
            name,
            arch,
            int(resources[symbol]["registers"]),
            int(resources[symbol]["stack"]),
            own_shared(int(resources[symbol]["shared"]), arch),
            counts.get(symbol, Counter()),
            used.get(symbol, []),
        )
        for symbol, name in zip(resources, demangled(list(resources)), strict=True)
    ]


def own_shared(reported: int, arch: str) -> int:
    """Bytes a block asks for: from sm_90 on the report of a kernel that uses shared memory includes the system's share."""
    return reported - SHARED_RESERVED if int(arch) >= 90 and reported > 0 else reported
