"""What the instructions of sm_90 do that the float kernels are made of. An instruction not known here raises."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from sass import Instruction, read_addend, read_bits, read_float, read_integer, read_predicate, read_wide, row

Execute = Callable[[object, np.ndarray], None]  # state, lanes that take part
COMPARE = {
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
    "EQ": np.equal,
    "NE": np.not_equal,
}
U32 = np.uint64(32)


def write(text: str, words: int = 1) -> Callable[[object, np.ndarray, np.ndarray], None]:
    """Stores words [words, lanes] (or one of them) in a register; predicates likewise."""
    array, number = row(text)
    if number == -1:
        return lambda s, value, lanes: None
    shared = array in ("U", "UP")

    def store(s, value, lanes):
        to = getattr(s, array)[number : number + words]
        if shared:
            to[...] = value if value.shape[-1] == 1 else value[..., np.flatnonzero(lanes)[:1]]
        else:
            np.copyto(to, value, where=lanes)

    return store


def halves(value: np.ndarray) -> np.ndarray:
    """uint64 as two words."""
    return np.stack([value.astype(np.uint32), (value >> U32).astype(np.uint32)])


def lut3(table: int, a, b, c):
    """The bitwise function of three inputs whose truth table is given."""
    result = a & 0 if a.dtype != bool else np.zeros_like(a)
    for index in range(8):
        if table >> index & 1:
            result = result | (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
    return result


def integer(value: int) -> np.ndarray:
    return np.array([value], np.uint32)


def signed(value: np.ndarray) -> np.ndarray:
    return value.view(np.int32).astype(np.int64)


def one_result(i: Instruction, compute: Callable, words: int = 1) -> Execute:
    store = write(i.operands[0], words)
    return lambda s, lanes: store(s, compute(s), lanes)


def add3(i: Instruction) -> Execute:
    results, sources = i.results(), i.sources()
    reads = [read_addend(text) for text in sources[:3]]
    carries = [read_predicate(text) for text in sources[3:]] if "X" in i.modifiers else []
    return with_carry(results, lambda s: sum((read(s) for read in (*reads, *carries)), np.zeros(1, np.uint64)))


def with_carry(results: list[str], compute: Callable) -> Execute:
    store, *flags = [write(text) for text in results]

    def execute(s, lanes):
        total = compute(s)
        store(s, total.astype(np.uint32), lanes)
        for level, flag in enumerate(flags, 1):
            flag(s, total >> U32 >= np.uint64(level), lanes)

    return execute


def multiply_add(i: Instruction) -> Execute:
    _, a, b, c, *carry = i.operands
    unsigned = "U32" in i.modifiers
    if "WIDE" in i.modifiers or "HI" in i.modifiers:
        x, y, z = read_integer(a), read_integer(b), read_wide(c)
        wide = (lambda v: v.astype(np.uint64)) if unsigned else (lambda v: signed(v).astype(np.uint64))
        if "WIDE" in i.modifiers:
            return one_result(i, lambda s: halves(wide(x(s)) * wide(y(s)) + z(s)), 2)
        return one_result(i, lambda s: halves(wide(x(s)) * wide(y(s)) + z(s))[1])
    x, y, z = map(read_integer, (a, b, c))
    if "X" in i.modifiers:
        p = read_predicate(carry[0])
        return one_result(i, lambda s: x(s) * y(s) + z(s) + p(s))
    return one_result(i, lambda s: x(s) * y(s) + z(s))


def shift_add(i: Instruction) -> Execute:
    """LEA: (a << s) + b; HI: the upper word of a two-word a, or of a sign-extended one."""
    results, sources = i.results(), i.sources()
    carry = read_predicate(sources.pop()) if "X" in i.modifiers else None
    amount = np.uint64(int(sources.pop(), 0))
    if "SX32" in i.modifiers:
        a, b = read_integer(sources[0]), read_addend(sources[1])
        shifted = lambda s: (signed(a(s)).astype(np.uint64) << amount) >> U32  # noqa: E731
    elif "HI" in i.modifiers:
        a, b, upper = read_integer(sources[0]), read_addend(sources[1]), read_integer(sources[2])
        shifted = lambda s: ((a(s).astype(np.uint64) | upper(s).astype(np.uint64) << U32) << amount) >> U32  # noqa: E731
    else:
        a, b = read_integer(sources[0]), read_addend(sources[1])
        shifted = lambda s: a(s).astype(np.uint64) << amount & np.uint64(0xFFFFFFFF)  # noqa: E731
    return with_carry(results, lambda s: shifted(s) + b(s) + (carry(s).astype(np.uint64) if carry else np.uint64(0)))


def shift(i: Instruction) -> Execute:
    _, low, amount, high = i.operands
    x, n, y = read_integer(low), read_integer(amount), read_integer(high)
    left, arithmetic, upper = i.modifiers[0] == "L", i.modifiers[1][0] == "S", "HI" in i.modifiers

    def compute(s):
        lo, hi, by = x(s).astype(np.uint64), y(s).astype(np.uint64), np.minimum(n(s), 63).astype(np.uint64)
        if left:
            pair = (hi << U32 | lo) << by
        elif upper and arithmetic:
            return (signed(y(s)) >> by.astype(np.int64)).astype(np.uint32)
        elif upper:
            return (hi >> by).astype(np.uint32)
        else:
            pair = (hi << U32 | lo) >> by
        return (pair >> U32 if upper else pair).astype(np.uint32)

    return one_result(i, compute)


def logic(i: Instruction) -> Execute:
    results, sources = i.results(), i.sources()
    a, b, c = map(read_integer, sources[:3])
    table = int(sources[3], 0)
    flag, register = (results[0], results[1]) if len(results) == 2 else (None, results[0])
    store, raised = write(register), write(flag) if flag else None

    def execute(s, lanes):
        value = lut3(table, a(s), b(s), c(s))
        store(s, value, lanes)
        if raised:
            raised(s, value != 0, lanes)

    return execute


def predicate_logic(i: Instruction) -> Execute:
    store, other = write(i.operands[0]), write(i.operands[1])
    a, b, c = map(read_predicate, i.operands[2:5])
    tables = [int(text, 0) for text in i.operands[5:7]]

    def execute(s, lanes):
        inputs = np.broadcast_arrays(a(s), b(s), c(s))
        store(s, lut3(tables[0], *inputs), lanes)
        other(s, lut3(tables[1], *inputs), lanes)

    return execute


def set_predicates(i: Instruction, compare: Callable) -> Execute:
    """P, Q <- compare combined with a third predicate, and its opposite likewise."""
    store, other = write(i.operands[0]), write(i.operands[1])
    third = read_predicate(i.operands[4])
    combine = {"AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor}[
        next(m for m in i.modifiers if m in ("AND", "OR", "XOR"))
    ]

    def execute(s, lanes):
        outcome, with_ = compare(s), third(s)
        store(s, combine(outcome, with_), lanes)
        other(s, combine(~outcome, with_), lanes)

    return execute


def compare_integers(i: Instruction) -> Execute:
    a, b = read_integer(i.operands[2]), read_integer(i.operands[3])
    relation, name = COMPARE[i.modifiers[0]], i.modifiers[0]
    view = (lambda v: v) if "U32" in i.modifiers else (lambda v: v.view(np.int32))
    if "EX" not in i.modifiers:
        return set_predicates(i, lambda s: relation(view(a(s)), view(b(s))))
    lower = read_predicate(i.operands[5])  # what the lower words said

    def compare(s):
        x, y = view(a(s)), view(b(s))
        if name == "NE":
            return (x != y) | lower(s)
        strict = np.zeros(1, bool) if name == "EQ" else (x < y if name[0] == "L" else x > y)
        return strict | (x == y) & lower(s)

    return set_predicates(i, compare)


def float_relation(name: str, a: str, b: str) -> Callable:
    """LT and so on; NEU, GEU and so on also hold where a number is none; NAN, NUM ask for that alone."""
    x, y = read_float(a), read_float(b)

    def compare(s):
        broken = np.isnan(x(s)) | np.isnan(y(s))
        if name in ("NAN", "NUM"):
            return broken ^ (name == "NUM")
        holds = COMPARE[name[:2]](x(s), y(s))
        return holds | broken if name.endswith("U") else holds & ~broken

    return compare


def compare_floats(i: Instruction) -> Execute:
    return set_predicates(i, float_relation(i.modifiers[0], *i.operands[2:4]))


def compared_as_float(i: Instruction) -> Execute:
    """1 or 0 as a float."""
    compare, also = float_relation(i.modifiers[1], *i.operands[1:3]), read_predicate(i.operands[3])
    if (i.modifiers[0], i.modifiers[2]) != ("BF", "AND"):
        raise NotImplementedError(i)
    return one_result(i, lambda s: (compare(s) & also(s)).astype(np.float32).view(np.uint32))


def choose(read: Callable) -> Callable[[Instruction], Execute]:
    def build(i: Instruction) -> Execute:
        _, yes, no, predicate = i.operands
        a, b, p = read(yes), read(no), read_predicate(predicate)
        return one_result(i, lambda s: bits(np.where(p(s), a(s), b(s))))

    return build


def extreme(i: Instruction, value: Callable, other: Callable, view: Callable) -> Execute:
    smaller = read_predicate(i.operands[-1])

    def compute(s):
        a, b = view(value(s)), view(other(s))
        return bits(np.where(smaller(s), np.minimum(a, b), np.maximum(a, b)))

    return one_result(i, compute)


def integer_extreme(i: Instruction) -> Execute:
    view = (lambda v: v) if "U32" in i.modifiers else (lambda v: v.view(np.int32))
    reads = [read_integer(text) for text in i.operands[1:-1]]
    first = reads[0] if i.name == "VIMNMX" else lambda s: reads[0](s) + reads[1](s)
    return extreme(i, first, reads[-1], view)


def bits(value: np.ndarray) -> np.ndarray:
    return value if value.dtype == np.uint32 else value.view(np.uint32)


def float_operation(compute: Callable) -> Callable[[Instruction], Execute]:
    """Computed in double, rounded once: products are exact in it."""

    def build(i: Instruction) -> Execute:
        reads = [read_float(text) for text in i.operands[1:]]
        return one_result(
            i, lambda s: compute(*(read(s).astype(np.float64) for read in reads)).astype(np.float32).view(np.uint32)
        )

    return build


def double_operation(compute: Callable) -> Callable[[Instruction], Execute]:
    def build(i: Instruction) -> Execute:
        reads = [read_float(text, np.float64) for text in i.operands[1:]]
        return one_result(i, lambda s: halves(compute(*(read(s) for read in reads)).view(np.uint64)), 2)

    return build


SPECIAL_FUNCTIONS = {"RCP": lambda x: 1 / x, "RSQ": lambda x: 1 / np.sqrt(x), "SQRT": np.sqrt}


def special_function(i: Instruction) -> Execute:
    return float_operation(SPECIAL_FUNCTIONS[i.modifiers[0]])(i)


def half_constant(i: Instruction) -> Execute:
    """HFMA2 serves to load a constant: two half-precision numbers, the upper one first."""
    _, a, b, upper, lower = i.operands
    if a.strip("-") != "RZ" or b != "RZ":
        raise NotImplementedError(i)
    high, low = (int(np.float16(float(text)).view(np.uint16)) for text in (upper, lower))
    value = integer(high << 16 | low)
    return one_result(i, lambda s: value)


def float_from_integer(i: Instruction) -> Execute:
    read = read_integer(i.operands[1])
    convert = (lambda v: v.astype(np.float64)) if "U32" in i.modifiers else (lambda v: signed(v).astype(np.float64))
    if not {"U32", "S32", "RP", "F32"} >= set(i.modifiers):
        raise NotImplementedError(i)

    def compute(s):
        exact = convert(read(s))
        rounded = exact.astype(np.float32)
        if "RP" in i.modifiers:
            rounded = np.where(rounded < exact, np.nextafter(rounded, np.float32(np.inf)), rounded)
        return rounded.view(np.uint32)

    return one_result(i, compute)


def integer_from_float(i: Instruction) -> Execute:
    read = read_float(i.operands[1])
    if "TRUNC" not in i.modifiers or "U64" in i.modifiers:
        raise NotImplementedError(i)
    low, high = (0, 2**32 - 1) if "U32" in i.modifiers else (-(2**31), 2**31 - 1)

    def compute(s):
        whole = np.trunc(np.nan_to_num(read(s).astype(np.float64), nan=0.0))
        return np.clip(whole, low, high).astype(np.int64).astype(np.uint32)

    return one_result(i, compute)


def convert_float(i: Instruction) -> Execute:
    if i.modifiers == ("F32", "F64"):
        read = read_float(i.operands[1], np.float64)
        return one_result(i, lambda s: read(s).astype(np.float32).view(np.uint32))
    if i.modifiers == ("F64", "F32"):
        read = read_float(i.operands[1])
        return one_result(i, lambda s: halves(read(s).astype(np.float64).view(np.uint64)), 2)
    raise NotImplementedError(i)


def special_register(i: Instruction) -> Execute:
    name = i.operands[1]
    if name == "SRZ":
        words = 1 if "32" in i.modifiers else 2
        return one_result(i, lambda s: np.zeros((words, 1), np.uint32), words)
    return one_result(i, lambda s: s.special[name])


def load_constant(i: Instruction) -> Execute:
    if "U8" in i.modifiers:
        offset = int(i.operands[1].split("[")[-1].strip("]"), 16)
        return one_result(i, lambda s: s.constants[offset : offset + 1].astype(np.uint32))
    if "R" in i.operands[1]:
        return load_indexed_constant(i)
    read = read_bits(i.operands[1], i.width)
    return one_result(i, read, i.width)


def load_indexed_constant(i: Instruction) -> Execute:
    index, _, offset = i.operands[1].split("[")[-1].strip("]").partition("+")
    register, start = read_integer(index), int(offset or "0", 16)

    def compute(s):
        words = (register(s) + np.uint32(start)) // 4
        every = s.constants[: len(s.constants) // 4 * 4].view(np.uint32)
        return np.stack([every[np.minimum(words + w, len(every) - 1)] for w in range(i.width)])

    return one_result(i, compute, i.width)


def predicates_to_register(i: Instruction) -> Execute:
    keep, mask = read_integer(i.operands[2]), np.uint32(int(i.operands[3], 0))

    def compute(s):
        packed = sum((s.P[k].astype(np.uint32) << np.uint32(k) for k in range(7)), np.zeros(1, np.uint32))
        return keep(s) & ~mask | packed & mask

    return one_result(i, compute)


def register_to_predicates(i: Instruction) -> Execute:
    read, mask = read_integer(i.operands[1]), int(i.operands[2], 0)
    stores = {k: write(f"P{k}") for k in range(7) if mask >> k & 1}

    def execute(s, lanes):
        value = read(s)
        for k, store in stores.items():
            store(s, (value >> np.uint32(k) & np.uint32(1)) != 0, lanes)

    return execute


def permute_bytes(i: Instruction) -> Execute:
    a, selector, b = map(read_integer, i.operands[1:4])

    def compute(s):
        pair, chosen = a(s).astype(np.uint64) | b(s).astype(np.uint64) << U32, selector(s).astype(np.uint64)
        result = np.zeros(1, np.uint64)
        for k in range(4):
            nibble = chosen >> np.uint64(4 * k) & np.uint64(15)
            byte = pair >> (nibble & np.uint64(7)) * np.uint64(8) & np.uint64(255)
            byte = np.where(nibble >= 8, np.where(byte >= 128, np.uint64(255), np.uint64(0)), byte)
            result = result | byte << np.uint64(8 * k)
        return result.astype(np.uint32)

    return one_result(i, compute)


def ballot(lanes: np.ndarray) -> int:
    return int(np.packbits(lanes, bitorder="little").view(np.uint32)[0])


def vote(i: Instruction) -> Execute:
    store, read = write(i.operands[0]), read_predicate(i.operands[-1])

    def execute(s, lanes):
        store(s, integer(ballot(np.broadcast_to(read(s), lanes.shape) & lanes)), lanes)

    return execute


def match_any(i: Instruction) -> Execute:
    store, read = write(i.operands[0]), read_integer(i.operands[1])

    def execute(s, lanes):
        value = np.broadcast_to(read(s), lanes.shape)
        store(s, np.array([ballot((value == v) & lanes) for v in value], np.uint32), lanes)

    return execute


def reduce_or(i: Instruction) -> Execute:
    store, read = write(i.operands[0]), read_integer(i.operands[1])
    return lambda s, lanes: store(
        s, np.bitwise_or.reduce(np.broadcast_to(read(s), lanes.shape)[lanes], keepdims=True), lanes
    )


def copy(i: Instruction) -> Execute:
    return one_result(i, read_integer(i.operands[1]))


def absolute(i: Instruction) -> Execute:
    read = read_integer(i.operands[1])
    return one_result(i, lambda s: np.abs(signed(read(s))).astype(np.uint32))


def float_extreme(i: Instruction) -> Execute:
    return extreme(i, read_float(i.operands[1]), read_float(i.operands[2]), lambda v: v)


def add(i: Instruction) -> Execute:
    a, b = read_integer(i.operands[1]), read_integer(i.operands[2])
    return one_result(i, lambda s: a(s) + b(s))


# By name, without the U of those on shared registers.
OPERATIONS: dict[str, Callable[[Instruction], Execute]] = {
    "IADD3": add3, "IMAD": multiply_add, "LEA": shift_add, "SHF": shift, "LOP3": logic, "PLOP3": predicate_logic,
    "ISETP": compare_integers, "FSETP": compare_floats, "FSET": compared_as_float,
    "SEL": choose(read_integer), "FSEL": choose(read_float),
    "VIADD": add, "VIMNMX": integer_extreme, "VIADDMNMX": integer_extreme, "IABS": absolute, "MOV": copy, "R2UR": copy,
    "FMNMX": float_extreme, "FADD": float_operation(lambda a, b: a + b), "FMUL": float_operation(lambda a, b: a * b),
    "FFMA": float_operation(lambda a, b, c: a * b + c), "MUFU": special_function, "HFMA2": half_constant,
    "DADD": double_operation(lambda a, b: a + b), "DMUL": double_operation(lambda a, b: a * b),
    "DFMA": double_operation(lambda a, b, c: a * b + c), "I2F": float_from_integer, "I2FP": float_from_integer,
    "F2I": integer_from_float, "F2F": convert_float, "S2R": special_register, "S2UR": special_register,
    "CS2R": special_register, "LDC": load_constant, "P2R": predicates_to_register, "R2P": register_to_predicates,
    "PRMT": permute_bytes, "VOTE": vote, "MATCH": match_any, "REDUX": reduce_or,
}  # fmt: skip
SHARED_NAMES = {"ULDC": "LDC", "VOTEU": "VOTE", "UMOV": "MOV"}
# Ordering that running a warp at a time gives anyway.
NOTHING = {"NOP", "YIELD", "WARPSYNC", "LDGDEPBAR", "DEPBAR", "MEMBAR", "ERRBAR", "CCTL", "ENDCOLLECTIVE"}


def executable(i: Instruction) -> Execute:
    name = SHARED_NAMES.get(i.name, i.name[1:] if i.uniform and i.name != "UMOV" else i.name)
    if i.name in NOTHING:
        return lambda s, lanes: None
    if name not in OPERATIONS:
        raise NotImplementedError(f"{i.address:#x}: {i.name} {i.modifiers} {i.operands}")
    return OPERATIONS[name](i)
