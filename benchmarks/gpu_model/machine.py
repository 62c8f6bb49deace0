"""Machine instructions that a counted launch executes.

The executor counts PTX, by block of instructions. Each instruction's number is written into the PTX as its source line, so that ptxas says
for every machine instruction which PTX instruction it belongs to; it is taken to be executed as often as that one.
"""

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from ..cuda_static.cubin import tool
from .counting import Record

PIPES = {  # opcode -> the part of an SM that executes it; others: the integer ALU
    **dict.fromkeys("FADD FMUL FFMA FADD32I FMUL32I FFMA32I FSWZADD".split(), "fp32"),
    **dict.fromkeys("IMAD HADD2 HMUL2 HFMA2 IDP IMUL".split(), "heavy"),  # the half of the fp32 lanes that multiplies integers too
    **dict.fromkeys("MUFU F2F I2F F2I FLO POPC BREV FRND I2I FCHK".split(), "special"),
    **dict.fromkeys("DADD DMUL DFMA DSETP DMNMX".split(), "fp64"),
    **dict.fromkeys("LDG STG LD ST LDS STS LDL STL LDC LDSM ATOM ATOMG ATOMS RED REDG CCTL ERRBAR MEMBAR".split(), "memory"),
    **dict.fromkeys("SHFL MATCH REDUX VOTE".split(), "memory"),
    **dict.fromkeys("BRA BSSY BSYNC BREAK EXIT CALL RET JMP BRX WARPSYNC BAR BMOV DEPBAR YIELD NANOSLEEP B2R".split(), "control"),
}
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
SMALL = 0.01  # of an op's instructions: launches below are taken to be mixed as the others are


def pipe_of(opcode: str) -> str:
    name = opcode.split(".")[0]
    if name in PIPES:
        return PIPES[name]
    return "uniform" if name.startswith("U") or name in ("R2UR", "S2UR") else "alu"


class Code:
    """A kernel's machine code on one arch, by number of the PTX instruction that it comes from."""

    def __init__(self, text: str, kernel: str, arch: str) -> None:
        from ptx_parse import parse
        from ptx_translate import Translator

        variables, kernels, functions = parse(text)
        translator = Translator(variables, functions, kernels[kernel], counted=True)
        if translator.used:
            raise ValueError(f"{kernel}: calls device functions, whose instructions are numbered apart")
        self.ends = dict(zip(translator.blocks, [*translator.blocks[1:], len(translator.opcodes)], strict=True))
        self.of_instruction: list[Counter[str]] = [Counter() for _ in translator.opcodes]
        for line, opcode in disassembled(numbered(text, kernels[kernel]), arch):
            self.of_instruction[max(line, 1) - 1][opcode] += 1

    def has(self, blocks: list[tuple[int, int]]) -> bool:
        return all(begin in self.ends for begin, _ in blocks)

    def executed(self, blocks: list[tuple[int, int]]) -> Counter[str]:
        """Opcode -> how often warps execute it; blocks: first instruction, warps, of each block that ran."""
        found: Counter[str] = Counter()
        for begin, warps in blocks:
            for i in range(begin, self.ends[begin]):
                for opcode, count in self.of_instruction[i].items():
                    found[opcode] += count * warps
        return found


def numbered(text: str, kernel) -> str:
    """The PTX of one kernel, the number of each instruction (from 1) as its source line."""
    from ptx_parse import strip_comments, tokenize

    clean = strip_comments(text)
    head = re.findall(r"^\s*\.(?:version|target|address_size)[^\n]*", clean, re.M)
    outside = re.findall(r"(?:\.extern\s+|\.visible\s+)*\.(?:shared|global|const)\b[^;{]*;", clean.split(".entry")[0])
    lines = [*head, '.file 1 "kernel.ptx"', *outside, f".visible .entry {kernel.name}({kernel.parameters}){kernel.attributes}", "{"]
    count = 0
    for kind, *rest in tokenize(kernel.body):
        if kind in "{}":
            lines.append(kind)
        elif kind == "label":
            lines.append(f"{rest[0]}:")
        else:
            if not rest[0].startswith("."):
                count += 1
                lines.append(f".loc 1 {count} 0")
            lines.append(f"{rest[0]};")
    return "\n".join([*lines, "}", ""])


def disassembled(ptx: str, arch: str) -> Iterator[tuple[int, str]]:
    """(source line, opcode) of each machine instruction; what fills the end of a function is left out."""
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        ptxas = shutil.which("ptxas") or tool("ptxas")
        subprocess.run([ptxas, f"-arch=sm_{arch}", "-O3", "-lineinfo", str(source), "-o", str(cubin)], check=True)
        command = [tool("nvdisasm"), "-g", "-c", str(cubin)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    line = 0
    for row in text.splitlines():
        if mark := re.search(r'//## File ".*?", line (\d+)', row):
            line = int(mark.group(1))
        elif (found := INSTRUCTION.match(row)) and found.group(1) != "NOP":
            yield line, found.group(1)


class Library:
    """The kernels of a library whose PTX is not compressed, or of PTX files."""

    def __init__(self, *files: Path) -> None:
        self.texts: dict[str, list[str]] = {}
        for path in files:
            for text in re.findall(rb"\.version \d+\.\d+\s+\.target[^\x00]*", path.read_bytes()):
                for kernel in re.findall(r"\.entry\s+([\w$]+)", text.decode()):
                    self.texts.setdefault(kernel, []).append(text.decode())
        self.code = cache(Code)

    def of(self, launch: Record, arch: str) -> Code:
        for text in self.texts[launch["kernel"]]:
            code = self.code(text, launch["kernel"], arch)
            if code.has(launch["blocks"]):
                return code
        raise ValueError(f"no PTX of {launch['kernel']} has the blocks that were counted")

    def pipes(self, launches: list[Record], arch: str) -> Counter[str]:
        """Pipe -> warp instructions of all launches together."""
        everything = sum(launch["warp_instructions"]["all"] for launch in launches)
        found: Counter[str] = Counter()
        covered = 0
        for launch in launches:
            if launch["warp_instructions"]["all"] < SMALL * everything:
                continue
            covered += launch["warp_instructions"]["all"]
            for opcode, count in self.of(launch, arch).executed(launch["blocks"]).items():
                found[pipe_of(opcode)] += count
        return Counter({pipe: round(count * everything / covered) for pipe, count in found.items()})
