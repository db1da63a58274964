"""What the machine code of a streaming kernel says: the instructions of its loops, on their fast path.

A loop is what a backward branch encloses, and streams where it loads 16 bytes at a time. Its fast path is the
longest way from its first instruction to that branch that passes no call and no atomic operation: with active
entries in the chunk, without the slow path of a division, and without a candidate. Instructions that a
predicate switches off count, since they are issued. Where the longest way leads past candidates that are not
counted, as in the kernel that collects them, the numbers are upper bounds.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?\w+)\s+)?([A-Z][\w.]*)([^;]*);")
_COLD = re.compile(r"CALL|ATOM|RED\b|RED\.|RET")  # REDUX, a maximum over the warp, is none
_DIVIDES = re.compile(_COLD.pattern + "|FCHK")  # by IEEE's rules: cold beside quick divisions
_FMA = re.compile(r"FADD|FMUL|FFMA|IMAD|HADD|HFMA|HMUL")
_OTHER = re.compile(r"MUFU|LD|ST|BRA|BSSY|BSYNC|REDUX|CREDUX|WARPSYNC|NOP|EXIT|BAR|CALL|R2UR|S2|U[A-Z]")


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str | None
    op: str
    operands: str

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"(0x[0-9a-f]+)\s*$", self.operands) if self.op.startswith("BRA") else None
        return int(found[1], 16) if found else None

    @property
    def ends(self) -> bool:
        """Whether the next instruction is not reached from this one."""
        always = self.predicate is None and "," not in self.operands  # BRA.U UP0, 0x10: a predicate
        return always and self.op.startswith(("BRA", "EXIT", "RET"))


@dataclass(frozen=True)
class Loop:
    """path: the instructions of one round on the fast path. wide: how many of all load 16 bytes.

    dtype: of θ and g; "mixed": bfloat16 and float32.
    """

    path: Counter
    wide: int
    dtype: str

    @property
    def lane_bytes(self) -> int:
        """Bytes that a thread loads ahead in one round."""
        return 16 * self.wide

    @property
    def issued(self) -> int:
        return sum(self.path.values())

    def on(self, pipe: str) -> int:
        """Instructions of one round on a pipe: fma, alu (integers, logic, comparisons, maxima) or mufu."""
        return sum(n for op, n in self.path.items() if _pipe(op) == pipe)


def _pipe(op: str) -> str:
    if op.startswith("MUFU"):
        return "mufu"
    return "fma" if _FMA.match(op) else "other" if _OTHER.match(op) else "alu"


def instructions(code: str) -> list[Instruction]:
    """The instructions of one kernel, of what cuobjdump or nvdisasm prints."""
    found = []
    for address, predicate, op, operands in _LINE.findall(code):
        found.append(Instruction(int(address, 16), predicate or None, op, operands.strip()))
    return found


def kernels(cubin: Path) -> dict[str, list[Instruction]]:
    """Kernel -> its instructions. Triton's package has the disassembler."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"Function : (\w+)", text)[1:]
    return {name: instructions(code) for name, code in zip(parts[::2], parts[1::2], strict=True)}


def streaming_loops(code: list[Instruction]) -> list[Loop]:
    """The innermost loops that load 16 bytes at a time."""
    at = {instruction.address: i for i, instruction in enumerate(code)}
    spans = [(at[i.target], n) for n, i in enumerate(code) if i.target in at and at[i.target] < n]
    spans = [(a, b) for a, b in spans if any(_is_wide(i) for i in code[a : b + 1])]
    paths = {(a, b): _fast_path(code[a : b + 1]) for a, b in spans}
    loops = [span for span, path in paths.items() if path]  # else only a cold block branches back
    inner = [(a, b) for a, b in loops if not any((a, b) != s and a <= s[0] and s[1] <= b for s in loops)]
    return [_loop(code[a : b + 1], paths[a, b]) for a, b in inner]


def _is_wide(instruction: Instruction) -> bool:
    return instruction.op.startswith("LDG") and "128" in instruction.op


def _loop(code: list[Instruction], path: Counter) -> Loop:
    wide = sum(map(_is_wide, code))
    return Loop(path, wide, "mixed" if wide % 3 == 0 else _dtype(code))  # one load of θ for two of g


def _fast_path(code: list[Instruction]) -> Counter:
    return _longest_path(code, _DIVIDES) or _longest_path(code, _COLD)


def _longest_path(code: list[Instruction], cold: re.Pattern) -> Counter:
    """The instructions from a loop's first to its last, by branches forward, past `cold`; empty: no way."""
    at = {instruction.address: i for i, instruction in enumerate(code)}
    length, before = [0] + [-1] * (len(code) - 1), [-1] * len(code)
    for i, instruction in enumerate(code[:-1]):
        # With a predicate a call is the way out of the loop, as sm_80's code has it.
        if length[i] < 0 or (instruction.predicate is None and cold.match(instruction.op)):
            continue
        ways = [] if instruction.ends else [i + 1]
        ways += [at[instruction.target]] if instruction.target in at else []
        for way in ways:
            if way > i and length[way] < length[i] + 1:
                length[way], before[way] = length[i] + 1, i
    if length[-1] < 0:
        return Counter()
    path, i = [], len(code) - 1
    while i >= 0:
        path.append(code[i].op)
        i = before[i]
    return Counter(path)


def _dtype(code: list[Instruction]) -> str:
    """By the instructions that widen: none for float32, a shift for bfloat16, a conversion for float16."""
    text = [(i.op, i.operands) for i in code]
    if any(op.startswith(("HADD2.F32", "F2F", "HADD2")) for op, _ in text):
        return "float16"
    high = ("0xffff0000", "0x7fff0000", "0x10000")
    if any(mask in operands for _, operands in text for mask in high):
        return "bfloat16"
    return "float32"
