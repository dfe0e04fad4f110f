"""Reads cuobjdump's listing of sm_90 code: instructions, and their operands as functions of a warp's state."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

LISTED = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?)(U?P\w+) +)?([A-Z][\w.]*) *(.*?) *;", re.MULTILINE)
REGISTER = re.compile(r"(U?R)(\d+|Z)\b")
PREDICATE = re.compile(r"!?(U?P)([0-9T])$")
CONSTANT = re.compile(r"c\[0x0\]\[(?:(U?R\d+)\+?)?(0x[0-9a-f]+)?\]")
ADDRESS = re.compile(r"\[(?P<inside>[^\[\]]*)\]$")

PIPES = {
    "shared": "LDS STS",
    "global": "LDG STG LDGSTS ATOMS ATOMG REDG",
    "constant": "LDC ULDC",
    "special": "MUFU I2F F2I F2F S2R S2UR R2UR MATCH REDUX POPC FLO",
    "fma": "FFMA FADD FMUL HFMA2",
    "imad": "IMAD",
    "double": "DADD DMUL DFMA DSETP",
    "alu": "IADD3 LOP3 ISETP SHF LEA SEL FSEL FSET FSETP FMNMX VIADD VIMNMX VIADDMNMX IABS PLOP3 P2R R2P PRMT MOV I2FP "
    "CS2R",
}
PIPE_OF = {name: pipe for pipe, names in PIPES.items() for name in names.split()}
NO_RESULT = {"STS", "STG", "LDGSTS", "REDG"}


@dataclass
class Instruction:
    address: int
    guard: str  # "!P0", or "" for always
    name: str  # IADD3
    modifiers: tuple[str, ...]  # ("X",)
    operands: list[str]

    @property
    def uniform(self) -> bool:
        """Works on the registers that a warp's lanes share."""
        return self.name[0] == "U"

    @property
    def pipe(self) -> str:
        """The unit that it keeps busy."""
        return PIPE_OF.get(self.name, "uniform" if self.uniform else "control")

    @property
    def width(self) -> int:
        """32-bit words of what is moved or, of a wide result, written."""
        if "128" in self.modifiers:
            return 4
        return 2 if "64" in self.modifiers or "WIDE" in self.modifiers or self.name in ("DADD", "DMUL", "DFMA") else 1

    def results(self) -> list[str]:
        """Registers and predicates written: the first operand and predicates after it, or both of a comparison's."""
        if self.pipe == "control" or self.name in NO_RESULT:
            return []
        count = 1
        if PREDICATE.match(self.operands[0]):
            count = 2  # P and its opposite, or P and the register that it tells of
        else:
            while PREDICATE.match(self.operands[count]):
                count += 1
        return self.operands[:count]

    def sources(self) -> list[str]:
        return self.operands[len(self.results()) :]


def functions(listing: str) -> dict[str, list[Instruction]]:
    """The instructions of every kernel of a listing, by its mangled name."""
    _, *parts = re.split(r"^\s*Function : (?=\w)", listing, flags=re.MULTILINE)
    return {part.split()[0]: [instruction(*found) for found in LISTED.findall(part)] for part in parts}


def instruction(address: str, negated: str, guard: str, opcode: str, operands: str) -> Instruction:
    name, *modifiers = opcode.split(".")
    texts = [text.strip().replace(".reuse", "") for text in operands.split(",")] if operands else []
    return Instruction(int(address, 16), negated + guard, name, tuple(modifiers), texts)


def registers_of(text: str, words: int = 1) -> list[str]:
    """The names that a scoreboard keeps for an operand."""
    found = [f"{kind}{int(n) + w}" for kind, n in REGISTER.findall(text) if n != "Z" for w in range(words)]
    predicate = PREDICATE.match(text)
    return found + ([predicate[1] + predicate[2]] if predicate and predicate[2] != "T" else [])


# Operands. A state has R, U [register, lane] of uint32, P, UP [predicate, lane] of bool and `constants`, bytes.
# U and UP, which lanes share, have one lane and broadcast.

Read = Callable[[object], np.ndarray]


def row(text: str) -> tuple[str, int]:
    """Which array of a state holds a register or predicate, and where."""
    register = REGISTER.search(text)
    if register:
        kind, number = register.groups()
        return ("R" if kind == "R" else "U"), (-1 if number == "Z" else int(number))
    kind, number = PREDICATE.match(text).groups()
    return kind, -1 if number == "T" else int(number)


def read_bits(text: str, words: int = 1) -> Read:
    """An operand as raw words [words, lanes] of uint32, its sign aside."""
    text = text.lstrip("-~!").strip("|")
    constant = CONSTANT.match(text)
    if constant:
        index, offset = constant.groups()
        start = int(offset or "0", 16)
        if index:
            raise NotImplementedError(f"indexed operand {text}")
        return lambda s: s.constants[start : start + 4 * words].view(np.uint32)[:, None]
    array, number = row(text)
    if number == -1:
        return lambda s: np.zeros((words, 1), np.uint32)
    return lambda s: getattr(s, array)[number : number + words]


def read_integer(text: str) -> Read:
    """uint32, as the operations on integers take it."""
    try:
        value = np.array([int(text, 0) & 0xFFFFFFFF], np.uint32)
        return lambda s: value
    except ValueError:
        bits = read_bits(text)
    if text[0] == "-":
        return lambda s: (~bits(s)[0]) + np.uint32(1)
    if text[0] == "~":
        return lambda s: ~bits(s)[0]
    return lambda s: bits(s)[0]


def read_wide(text: str) -> Read:
    """uint64 of a register and the next."""
    try:
        value = np.array([int(text, 0) & 0xFFFFFFFFFFFFFFFF], np.uint64)
        return lambda s: value
    except ValueError:
        bits = read_bits(text, 2)
    return lambda s: bits(s)[0] | bits(s)[1].astype(np.uint64) << np.uint64(32)


def read_addend(text: str) -> Read:
    """uint64 for a sum whose carry counts: -x is ~x + 1, 2^32 for x = 0."""
    if text[0] == "-" and not text[1:].isdigit() and not text.startswith("-0x"):
        bits = read_bits(text)
        return lambda s: (~bits(s)[0]).astype(np.uint64) + np.uint64(1)
    plain = read_integer(text)
    return lambda s: plain(s).astype(np.uint64)


def literal(text: str) -> float | None:
    named = {"+INF": math.inf, "-INF": -math.inf, "+QNAN": math.nan, "-QNAN": math.nan}
    try:
        return named[text] if text in named else float(text)
    except ValueError:
        return None


def read_float(text: str, dtype: type = np.float32) -> Read:
    value = literal(text)
    if value is not None:
        fixed = np.array([value], dtype)
        return lambda s: fixed
    bits = read_bits(text, 1 if dtype is np.float32 else 2)

    def read(s):
        words = bits(s)
        number = (
            words[0].view(np.float32) if dtype is np.float32 else np.ascontiguousarray(words.T).view(np.float64)[:, 0]
        )
        if "|" in text:
            number = np.abs(number)
        return -number if text[0] == "-" else number

    return read


def read_predicate(text: str) -> Read:
    array, number = row(text)
    if text[0] == "!":
        return lambda s: ~getattr(s, array)[number]
    return lambda s: getattr(s, array)[number]


def read_address(text: str) -> Read:
    """uint64 of [R2+UR4+0x10], [R2.64+0x10], desc[UR4][R2.64] ..."""
    parts = ADDRESS.search(text)["inside"].split("+")
    terms, offset = [], 0
    for part in parts:
        if not REGISTER.search(part):
            offset += int(part, 0)
        elif part.endswith(".64"):
            terms.append(read_wide(part[:-3]))
        else:
            terms.append(scaled(part))
    offset = np.uint64(offset % 2**64)
    return lambda s: sum((term(s).astype(np.uint64) for term in terms), np.array([offset]))


def scaled(part: str) -> Read:
    name, _, scale = part.partition(".X")
    plain = read_integer(name)
    return lambda s: plain(s) * np.uint32(scale or 1)
