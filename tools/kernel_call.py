"""One thread block of a compiled kernel, run by sass_machine.py on random blocks and checked against float64.

The structures are those of csrc/types.h and csrc/cuda/table.h; that they agree shows in the results.
"""

from __future__ import annotations

import ctypes as c
import re
from dataclasses import dataclass

import numpy as np
from sass import Instruction
from sass_machine import Block, Counts, Memory

PARAMETERS_AT = 0x210  # of a kernel's constants, on sm_90
THREADS_AT = 0
TILE = 32  # blocks, see csrc/layout.h
MAX_TILED_SIZE = 20
MOMENTUM, DECAY, LR, DAMPING, WEIGHT_DECAY, EPS = 0.9, 0.95, 0.1, 0.3, 0.01, 1e-8
MOMENTUM_WEIGHT, FISHER_WEIGHT = 0.5, 0.25
FUSED = 3  # of Op
MAX_PROBLEMS = {"op": 1, "step": 100}


class Scalar(c.Structure):
    _fields_ = [("value", c.c_double), ("device", c.c_void_p), ("dtype", c.c_int)]


class Strides(c.Structure):
    _fields_ = [("inner_count", c.c_int64), ("outer", c.c_int64), ("inner", c.c_int64)]


class BlockView(c.Structure):
    _fields_ = [("base", c.c_void_p), ("block", Strides), ("element", Strides)]


class Problem(c.Structure):
    _fields_ = [
        ("count", c.c_int64), ("fisher", c.c_void_p), ("factor", c.c_void_p), ("info", c.c_void_p),
        ("skipped", c.c_void_p), ("momentum_weight", Scalar), ("fisher_weight", Scalar),
        ("grad", BlockView), ("rhs", BlockView), ("out", BlockView),
    ]  # fmt: skip


class Parameters(c.Structure):
    _fields_ = [
        ("lr", Scalar), ("damping", Scalar), ("momentum", c.c_double), ("decay", c.c_double),
        ("weight_decay", c.c_double), ("eps", c.c_double), ("relative", c.c_bool), ("graft", c.c_bool),
        ("nesterov", c.c_bool), ("maximize", c.c_bool), ("update", c.c_bool), ("refactor", c.c_bool),
        ("rhs_count", c.c_int64),
    ]  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """What a readable name says: "step thread float n=9", "op group float N=32 4x2x8"."""

    name: str

    @property
    def entry(self) -> str:
        return self.name.split()[0]

    @property
    def mapping(self) -> str:
        return self.name.split()[1]

    @property
    def size(self) -> int:
        """The largest n that it serves."""
        return int(re.search(r"[nN]=(\d+)", self.name)[1])

    def geometry(self, n: int) -> tuple[int, int, int]:
        """Blocks and threads of a thread block, and its bytes of shared memory, as the kernel classes have them."""
        triangle, pitch = n * (n + 1) // 2, n | 1
        if self.mapping == "thread":
            tile = (triangle + 4 * pitch) * TILE * 4
            tiles = next(count for count in (4, 2, 1) if count * tile <= 49152 or count == 1)
            return tiles * TILE, tiles * TILE, tiles * tile
        rows, columns, teams = map(int, re.search(r"(\d+)x(\d+)x(\d+)", self.name).groups())

        def spread(length: int) -> int:
            return length + (rows - length) % 32

        triangle = spread((triangle + 3) // 4 * 4) if teams > 1 else (triangle + 3) // 4 * 4
        if columns == 1:
            exchange = 2 * spread(self.size + 4) + 2 * self.size
        else:
            exchange = columns * spread(self.size) + 3 * self.size + 2 * columns**2
        scalars = exchange + triangle + 3 * pitch
        return teams, teams * rows * columns, teams * (4 * scalars + 4)


class Data:
    """Random blocks F, gradients, right-hand sides or momenta, and weights, and where they lie in memory."""

    def __init__(self, count: int, n: int):
        rng = np.random.default_rng(n)
        samples = rng.standard_normal((count, n, n))
        self.fisher = (samples @ samples.transpose(0, 2, 1) / n + np.eye(n)).astype(np.float32)
        self.g, self.rhs, self.out = rng.standard_normal((3, count, n)).astype(np.float32)
        self.memory = Memory(2 * (stored(self.fisher).size + 4 * self.g.size) + 4096)
        self.fisher_at = self.memory.place(stored(self.fisher))
        self.info_at = self.memory.place(np.full(count, 7, np.int32))
        self.grad, self.right, self.result = (self.view(values) for values in (self.g, self.rhs, self.out))

    def view(self, values: np.ndarray) -> BlockView:
        count, n = values.shape
        return BlockView(self.memory.place(values), Strides(count, 0, n), Strides(n, 0, 1))

    def problem(self) -> Problem:
        return Problem(
            len(self.g), self.fisher_at, 0, self.info_at, 0, Scalar(MOMENTUM_WEIGHT), Scalar(FISHER_WEIGHT),
            self.grad, self.right, self.result,
        )  # fmt: skip


def stored(fisher: np.ndarray) -> np.ndarray:
    """Packed as csrc/layout.h lays blocks out."""
    count, n, _ = fisher.shape
    rows, columns = np.tril_indices(n)
    packed = fisher[:, rows, columns]
    if n > MAX_TILED_SIZE:
        return np.pad(packed, ((0, 0), (0, -packed.shape[1] % 4)))
    tiles = np.pad(packed, ((0, -count % TILE), (0, 0))).reshape(-1, TILE, packed.shape[1])
    return np.ascontiguousarray(tiles.transpose(0, 2, 1))


def constants(entry: str, problem: Problem, n: int, threads: int) -> np.ndarray:
    class Table(c.Structure):
        _fields_ = [
            ("parameters", Parameters), ("n", c.c_int), ("problem_count", c.c_int),
            ("first_unit", c.c_int * (MAX_PROBLEMS[entry] + 1)), ("problems", Problem * MAX_PROBLEMS[entry]),
        ]  # fmt: skip

    relative = entry == "step"  # the optimizer's default
    parameters = Parameters(
        Scalar(LR), Scalar(DAMPING), MOMENTUM, DECAY, WEIGHT_DECAY, EPS, relative, True, False, False, True, True, 1
    )
    table = Table(parameters, n, 1, (c.c_int * (MAX_PROBLEMS[entry] + 1))(0, 1))
    table.problems[0] = problem
    raw = np.frombuffer(bytes(table) + FUSED.to_bytes(8, "little"), np.uint8)
    found = np.zeros(PARAMETERS_AT + raw.size, np.uint8)
    found[PARAMETERS_AT:] = raw
    found[THREADS_AT : THREADS_AT + 4] = np.array([threads], np.uint32).view(np.uint8)
    return found


def call(kernel: Kernel, code: list[Instruction], n: int) -> Counts:
    """Runs one full thread block; AssertionError where its results are not those of float64."""
    blocks, threads, shared = kernel.geometry(n)
    data = Data(blocks, n)
    counts = Block(code, constants(kernel.entry, data.problem(), n, threads), data.memory, threads, shared).run()
    got = data.memory.array(data.result.base, data.out.size, np.float32).reshape(data.out.shape)
    truth = fused(data) if kernel.entry == "op" else step(data)
    error = np.abs(got - truth).max() / np.abs(truth).max()
    assert error < 32 * n * np.finfo(np.float32).eps, f"{kernel.name}, n = {n}: relative error {error:.2g}"
    assert not data.memory.array(data.info_at, blocks, np.int32).any(), f"{kernel.name}, n = {n}: info"
    return counts


def updated(data: Data) -> np.ndarray:
    g = data.g.astype(np.float64)
    return DECAY * data.fisher + (1 - DECAY) * g[:, :, None] * g[:, None, :]


def solved(matrix: np.ndarray, damping: np.ndarray | float, rhs: np.ndarray) -> np.ndarray:
    identity = np.eye(matrix.shape[1]) * np.reshape(damping, (-1, 1, 1))
    return np.linalg.solve(matrix + identity, rhs[..., None].astype(np.float64))[..., 0]


def fused(data: Data) -> np.ndarray:
    return solved(updated(data), DAMPING, data.rhs)


def step(data: Data) -> np.ndarray:
    """The weights after a grafted step with damping relative to the trace."""
    fisher = updated(data)
    diagonal = fisher.diagonal(axis1=1, axis2=2)
    direction = MOMENTUM * data.rhs + data.g.astype(np.float64)
    p = solved(fisher, DAMPING * diagonal.mean(1), direction)
    u = (1 - MOMENTUM) / MOMENTUM_WEIGHT * direction / (np.sqrt(diagonal / FISHER_WEIGHT) + EPS)
    length = np.linalg.norm(u, axis=1) / np.linalg.norm(p, axis=1)
    return (1 - LR * WEIGHT_DECAY) * data.out - LR * length[:, None] * p
