"""Runs a thread block of machine code on a CPU, warp by warp, and counts what it would cost a GPU.

Lanes of a warp that part run one path after the other, the lower address first, and meet again where the code says so
(BSSY, BSYNC). The clock of a warp is a scoreboard's: an instruction issues once its operands are there, one at most per
clock. Contention between warps is not in it; who asks for throughput adds up the counts instead.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from sass import PREDICATE, Instruction, read_address, read_bits, read_integer, read_predicate, registers_of
from sass_operations import executable, write

LANES = 32
# Clocks from issue until a result can be used, rounded from published measurements of recent NVIDIA GPUs.
LATENCY = {
    "alu": 5, "fma": 4, "imad": 5, "double": 8, "uniform": 6, "special": 18, "shared": 29, "global": 600, "constant": 8,
}  # fmt: skip
RESERVED_WORDS = 256  # of shared memory, for the system
BRANCH_CLOCKS, BARRIER_CLOCKS = 8, 20


class Memory:
    """Device memory: arrays one after the other, each from a multiple of 256 bytes on."""

    def __init__(self, scalars: int = 1 << 22):
        self.words = np.zeros(scalars, np.uint32)
        self.base, self.used = 1 << 32, 0

    def place(self, values: np.ndarray) -> int:
        """The address of a copy of values."""
        words = np.ascontiguousarray(values).view(np.uint32).ravel()
        start = self.used
        self.words[start : start + words.size] = words
        self.used = (start + words.size + 63) // 64 * 64
        if self.used > self.words.size:
            raise MemoryError("the machine's memory is too small")
        return self.base + 4 * start

    def array(self, address: int, count: int, dtype: type) -> np.ndarray:
        start = (address - self.base) // 4
        return self.words[start : start + count * np.dtype(dtype).itemsize // 4].view(dtype)

    def indices(self, addresses: np.ndarray) -> np.ndarray:
        index = (addresses.astype(np.int64) - self.base) // 4
        if (index < 0).any() or (index >= self.used).any():
            raise IndexError("access outside device memory")
        return index


@dataclass
class Counts:
    """Of one thread block."""

    issued: Counter = field(default_factory=Counter)  # instructions by pipe
    names: Counter = field(default_factory=Counter)  # by name
    shared_wavefronts: int = 0  # of 128 bytes
    global_wavefronts: int = 0  # 128-byte lines touched, per instruction
    sectors_moved: int = 0  # of 32 bytes, per instruction
    sectors_read: set[int] = field(default_factory=set)
    sectors_written: set[int] = field(default_factory=set)
    clocks: int = 0  # until the last warp ends


class Warp:
    def __init__(self, block: Block, number: int):
        self.block = block
        self.R, self.U = np.zeros((260, LANES), np.uint32), np.zeros((68, 1), np.uint32)
        self.P, self.UP = np.zeros((8, LANES), bool), np.zeros((8, 1), bool)
        self.P[-1] = self.UP[-1] = True
        self.constants, self.memory, self.shared = block.constants, block.memory, block.shared
        threads = np.arange(LANES, dtype=np.uint32) + np.uint32(LANES * number)
        self.special = {name: np.zeros(1, np.uint32) for name in ("SR_CTAID.X", "SR_CgaCtaId", "SR_TID.Y", "SR_TID.Z")}
        self.special |= {"SR_TID.X": threads, "SR_LANEID": np.arange(LANES, dtype=np.uint32)}
        self.paths: list[tuple[int, np.ndarray]] = [(0, np.ones(LANES, bool))]  # (instruction, lanes), lanes disjoint
        self.meeting = np.zeros((16, LANES, LANES), bool)  # for each barrier and lane: the lanes it meets
        self.waiting: list[tuple[int, int, np.ndarray]] = []  # (barrier, instruction, lanes)
        self.at_block_barrier: list[tuple[int, np.ndarray]] = []
        self.ended = np.zeros(LANES, bool)
        self.clock, self.ready = 0, {}

    def run(self) -> None:
        """Until every lane has ended or waits for the thread block."""
        while self.paths:
            self.paths.sort(key=lambda path: path[0])
            at, lanes = self.paths.pop(0)
            while self.paths and self.paths[0][0] == at:
                lanes = lanes | self.paths.pop(0)[1]
            limit = self.paths[0][0] if self.paths else len(self.block.code)
            while at is not None and at < limit:
                at, lanes = self.step(at, lanes)
            if at is not None:
                self.paths.append((at, lanes))

    def step(self, at: int, lanes: np.ndarray) -> tuple[int | None, np.ndarray]:
        """One instruction; where these lanes go on, or None if others decide that."""
        prepared = self.block.code[at]
        self.time(prepared)
        taking = lanes & prepared.guard(self) if prepared.guard else lanes
        if prepared.control:
            return prepared.control(self, at, lanes, taking)
        if taking.any():
            prepared.execute(self, taking)
        return at + 1, lanes

    def time(self, prepared: Prepared) -> None:
        ready = self.ready
        start = self.clock
        for key in prepared.reads:
            start = max(start, ready.get(key, 0))
        for key in prepared.writes:
            ready[key] = start + prepared.latency
        self.clock = start + prepared.clocks
        counts = self.block.counts
        counts.issued[prepared.pipe] += 1
        counts.names[prepared.name] += 1

    def part(self, at: int, lanes: np.ndarray, target: int, taking: np.ndarray):
        """A branch that the lanes `taking` take."""
        staying = lanes & ~taking
        if not taking.any():
            return at + 1, lanes
        if not staying.any():
            return target, lanes
        self.paths += [(target, taking), (at + 1, staying)]
        return None, lanes

    def end(self, at: int, lanes: np.ndarray, taking: np.ndarray):
        self.ended |= taking
        self.release()
        staying = lanes & ~taking
        return (at + 1, staying) if staying.any() else (None, lanes)

    def await_lanes(self, barrier: int, at: int, lanes: np.ndarray):
        self.waiting.append((barrier, at, lanes))
        self.release()
        return None, lanes

    def release(self) -> None:
        """Lets go who has met everybody he waits for."""
        still = []
        for barrier, at, lanes in self.waiting:
            here = np.logical_or.reduce([others for number, _, others in self.waiting if number == barrier])
            expected = np.logical_or.reduce(self.meeting[barrier, lanes]) & ~self.ended
            if (expected & ~here).any():
                still.append((barrier, at, lanes))
            else:
                self.paths.append((at + 1, lanes))
        self.waiting = still


@dataclass
class Prepared:
    """An instruction made ready to run many times."""

    name: str
    pipe: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    latency: int
    clocks: int  # until the next one may issue
    guard: object
    execute: object = None
    control: object = None


class Block:
    """A thread block: `code` of one kernel, its parameters in `constants`."""

    def __init__(self, code: list[Instruction], constants: np.ndarray, memory: Memory, threads: int, shared_bytes: int):
        self.constants, self.memory, self.counts = constants, memory, Counts()
        self.shared = np.zeros(RESERVED_WORDS + shared_bytes // 4, np.uint32)
        self.index_of = {instruction.address: k for k, instruction in enumerate(code)}
        self.source = code
        self.code = Lazily(code, self.prepare)
        self.threads = threads

    def run(self) -> Counts:
        warps = [Warp(self, number) for number in range(self.threads // LANES)]
        with np.errstate(all="ignore"):
            while True:
                for warp in warps:
                    warp.run()
                arrived = [warp for warp in warps if warp.at_block_barrier]
                if not arrived:
                    break
                clock = max(warp.clock for warp in arrived) + BARRIER_CLOCKS
                for warp in arrived:
                    warp.paths, warp.at_block_barrier, warp.clock = warp.at_block_barrier, [], clock
        if not all(warp.ended.all() for warp in warps):
            raise RuntimeError("lanes wait for each other for ever")
        self.counts.clocks = max(warp.clock for warp in warps)
        return self.counts

    def prepare(self, i: Instruction) -> Prepared:
        wide = i.width if i.name in ("STS", "STG") else 2 if i.pipe == "double" else 1
        reads = {key for text in i.sources() for key in registers_of(text, wide)}
        reads |= set(registers_of(i.guard)) if i.guard else set()
        if i.name == "P2R":
            reads |= {f"P{k}" for k in range(7)}
        writes = {key for text in i.results() for key in registers_of(text, 1 if PREDICATE.match(text) else i.width)}
        if i.name == "DEPBAR":
            reads |= {"copies"}
        if i.name == "LDGSTS":
            writes |= {"copies"}
        clocks = BRANCH_CLOCKS if i.name in ("BRA", "CALL", "RET", "BSYNC") else 1
        guard = read_predicate(i.guard) if i.guard else None
        prepared = Prepared(i.name, i.pipe, tuple(reads), tuple(writes), LATENCY.get(i.pipe, 1), clocks, guard)
        if i.name in CONTROL:
            prepared.control = CONTROL[i.name](self, i)
        elif i.name in ACCESSES:
            prepared.execute = ACCESSES[i.name](i)
        else:
            prepared.execute = executable(i)
        return prepared


class Lazily:
    """Only what is reached is prepared: the rest may hold instructions that are not known."""

    def __init__(self, code, prepare):
        self.code, self.prepare, self.prepared = code, prepare, [None] * len(code)

    def __len__(self):
        return len(self.code)

    def __getitem__(self, at):
        if self.prepared[at] is None:
            self.prepared[at] = self.prepare(self.code[at])
        return self.prepared[at]


# Control: functions of (warp, index of the instruction, lanes, lanes that its guard lets take part).


def branch(block: Block, i: Instruction):
    target = block.index_of[int(i.operands[-1], 0)]
    if "DIV" in i.modifiers:
        together = read_integer(i.operands[0])
        return lambda w, at, lanes, taking: w.part(
            at, lanes, target, taking & (np.packbits(lanes, bitorder="little").view(np.uint32)[0] != together(w)[0])
        )
    if len(i.operands) == 2:
        also = read_predicate(i.operands[0])
        return lambda w, at, lanes, taking: w.part(at, lanes, target, taking & also(w))
    return lambda w, at, lanes, taking: w.part(at, lanes, target, taking)


def call(block: Block, i: Instruction):
    return lambda w, at, lanes, taking: w.part(at, lanes, block.index_of[int(i.operands[-1], 0)], taking)


def return_(block: Block, i: Instruction):
    to = read_bits(i.operands[0].split()[0])

    def control(w, at, lanes, taking):
        address = int(np.broadcast_to(to(w)[0], lanes.shape)[taking][0])
        return w.part(at, lanes, block.index_of[address], taking)

    return control


def barrier_number(text: str) -> int:
    return int(text.removeprefix("B"))


def begin_meeting(block: Block, i: Instruction):
    number = barrier_number(i.operands[0])

    def control(w, at, lanes, taking):
        w.meeting[number, taking] = taking
        return at + 1, lanes

    return control


def leave_meeting(block: Block, i: Instruction):
    number = barrier_number(i.operands[-1])

    def control(w, at, lanes, taking):
        w.meeting[number][:, taking] = False
        w.release()
        return at + 1, lanes

    return control


def meet(block: Block, i: Instruction):
    number = barrier_number(i.operands[0])
    return lambda w, at, lanes, taking: w.await_lanes(number, at, lanes)


def block_barrier(block: Block, i: Instruction):
    def control(w, at, lanes, taking):
        w.at_block_barrier.append((at + 1, lanes))
        return None, lanes

    return control


CONTROL = {
    "BRA": branch, "CALL": call, "RET": return_, "BSSY": begin_meeting, "BREAK": leave_meeting, "BSYNC": meet,
    "BAR": block_barrier, "EXIT": lambda block, i: lambda w, at, lanes, taking: w.end(at, lanes, taking),
}  # fmt: skip


# Memory accesses, counted as they happen.


def load_shared(i: Instruction):
    address, store, words = read_address(i.operands[1]), write(i.operands[0], i.width), i.width

    def execute(w, lanes):
        index = shared_index(w, address(w), lanes, words)
        store(w, w.shared[index + np.arange(words)[:, None]], lanes)

    return execute


def store_shared(i: Instruction):
    address, value, words = read_address(i.operands[0]), read_bits(i.operands[1], i.width), i.width

    def execute(w, lanes):
        index = shared_index(w, address(w), lanes, words)[lanes]
        w.shared[index + np.arange(words)[:, None]] = np.broadcast_to(value(w), (words, LANES))[:, lanes]

    return execute


def shared_index(w: Warp, addresses: np.ndarray, lanes: np.ndarray, words: int) -> np.ndarray:
    index = np.where(lanes, (addresses & np.uint64(0xFFFFFFFF)).astype(np.int64) // 4, RESERVED_WORDS)
    if index.max() + words > w.shared.size or index.min() < RESERVED_WORDS:
        raise IndexError("access outside shared memory")
    w.block.counts.shared_wavefronts += wavefronts(index[lanes], words)
    return index


def wavefronts(index: np.ndarray, words: int) -> int:
    """Clocks of the 32 banks: as many as the busiest one has different words to move."""
    touched = np.unique(index + np.arange(words)[:, None])
    return int(np.bincount(touched % 32).max())


def count_global(w: Warp, addresses: np.ndarray, bytes_each: int, kind: str) -> None:
    counts = w.block.counts
    sectors = np.unique((addresses[:, None] + np.arange(0, bytes_each, 4)).ravel() // 32)
    counts.sectors_moved += sectors.size
    counts.global_wavefronts += np.unique(sectors // 4).size
    getattr(counts, f"sectors_{kind}").update(sectors.tolist())


def global_address(text: str):
    address = read_address(text)
    return lambda w: np.broadcast_to(address(w), (LANES,)).astype(np.int64)


def load_global(i: Instruction):
    address, store, words = global_address(i.operands[1]), write(i.operands[0], i.width), i.width

    def execute(w, lanes):
        where = address(w)
        count_global(w, where[lanes], 4 * words, "read")
        value = np.zeros((words, LANES), np.uint32)
        value[:, lanes] = w.memory.words[w.memory.indices(where[lanes]) + np.arange(words)[:, None]]
        store(w, value, lanes)

    return execute


def store_global(i: Instruction):
    address, value, words = global_address(i.operands[0]), read_bits(i.operands[1], i.width), i.width

    def execute(w, lanes):
        where = address(w)[lanes]
        count_global(w, where, 4 * words, "written")
        to = w.memory.indices(where) + np.arange(words)[:, None]
        w.memory.words[to] = np.broadcast_to(value(w), (words, LANES))[:, lanes]

    return execute


def copy_to_shared(i: Instruction):
    to, source, words = read_address(i.operands[0]), global_address(i.operands[1]), i.width

    def execute(w, lanes):
        where = source(w)[lanes]
        count_global(w, where, 4 * words, "read")
        index = shared_index(w, np.broadcast_to(to(w), (LANES,)), lanes, words)[lanes]
        span = np.arange(words)[:, None]
        w.shared[index + span] = w.memory.words[w.memory.indices(where) + span]

    return execute


ACCESSES = {
    "LDS": load_shared, "STS": store_shared, "LDG": load_global, "STG": store_global, "LDGSTS": copy_to_shared,
}  # fmt: skip
