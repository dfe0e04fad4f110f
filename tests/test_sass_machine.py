"""The machine that runs sm_90 code on a CPU: small programs with known results and known costs."""

import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import predict  # noqa: E402
from kernel_call import Kernel  # noqa: E402
from sass import functions  # noqa: E402
from sass_machine import RESERVED_WORDS, Block, Memory, wavefronts  # noqa: E402

OUT_AT = 0x210  # the kernel's one parameter, the address of its results


def run(text, threads=32, words=64, shared=0, values=()):
    """Runs lines of code that may store at the address in R2:R3; returns the words there and the counts."""
    lines = ["ULDC.64 UR4, c[0x0][0x208]", f"LDC.64 R2, c[0x0][{OUT_AT:#x}]", "S2R R0, SR_TID.X"]
    lines += [*(line.strip() for line in text.splitlines() if line.strip()), "EXIT"]
    listing = "\t\tFunction : kernel\n"
    for k, line in enumerate(lines):
        guard, _, rest = line.partition(" ") if line[0] == "@" else ("", "", line)
        listing += f"        /*{16 * k:04x}*/ {guard:>18} {rest} ;   /* 0x000 */\n"
    memory = Memory(1 << 12)
    out = memory.place(np.array([*values, *[0] * (words - len(values))], np.uint32))
    constants = np.zeros(OUT_AT + 8, np.uint8)
    constants[OUT_AT:] = np.array([out], np.uint64).view(np.uint8)
    counts = Block(functions(listing)["kernel"], constants, memory, threads, shared).run()
    return memory.array(out, words, np.uint32), counts


STORE = """
    IMAD.WIDE.U32 R2, R0, 0x4, R2
    STG.E desc[UR4][R2.64], R5
"""


def computed(text, **options):
    """What a program leaves in R5, per thread."""
    return run(text + STORE, **options)[0][:32]


LANE = np.arange(32, dtype=np.uint32)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("IMAD R5, R0, 0x3, R0", 4 * LANE),
        ("IADD3 R5, R0, 0x5, -R0", 5 + 0 * LANE),
        ("IADD3 R5, ~R0, R0, 0x1", 0 * LANE),
        ("LOP3.LUT R5, R0, 0x6, RZ, 0xc0, !PT", LANE & 6),
        ("LOP3.LUT R5, R0, 0x6, RZ, 0x3c, !PT", LANE ^ 6),
        ("SHF.R.U32.HI R5, RZ, 0x2, R0", LANE >> 2),
        ("SHF.L.U32 R5, R0, 0x3, RZ", LANE << 3),
        ("LEA R5, R0, 0x7, 0x4", 16 * LANE + 7),
        ("IADD3 R5, -R0, RZ, RZ\nSHF.R.S32.HI R5, RZ, 0x1f, R5", np.where(LANE > 0, 0xFFFFFFFF, 0)),
        ("HFMA2.MMA R5, -RZ, RZ, 0, 6.103515625e-05", 1024 + 0 * LANE),
        ("ISETP.GE.AND P1, P2, R0, 0x9, PT\nSEL R5, R0, 0x1, !P1", np.where(LANE >= 9, 1, LANE)),
        (
            "ISETP.GT.U32.AND P1, PT, R0, 0x4, PT\nISETP.LT.OR P2, PT, R0, 0x2, P1\nSEL R5, 0x1, RZ, P2",
            (LANE > 4) | (LANE < 2),
        ),
        ("PLOP3.LUT P1, PT, PT, PT, PT, 0x8, 0x0\nSEL R5, 0x1, RZ, P1", 0 * LANE),
        ("VIMNMX R5, R0, 0x7, PT", np.minimum(LANE, 7)),
        ("IMAD.MOV.U32 R5, RZ, RZ, 0x2\nVIADD R5, R5, 0xffffffff", 1 + 0 * LANE),
        ("PRMT R5, R0, 0x1044, RZ", (LANE & 255) << 16),
        ("MATCH.ANY R5, R0", 1 << LANE),
        ("LOP3.LUT R6, R0, 0x1, RZ, 0xc0, !PT\nMATCH.ANY R5, R6", np.where(LANE & 1, 0xAAAAAAAA, 0x55555555)),
        ("ISETP.GT.AND P3, PT, R0, 0x1d, PT\nVOTEU.ANY UR6, UPT, P3\nIMAD.U32 R5, RZ, RZ, UR6", 3 << 30 | 0 * LANE),
        ("ISETP.GT.AND P3, PT, R0, 0x3, PT\nP2R R5, PR, RZ, 0x8", np.where(LANE > 3, 8, 0)),
    ],
)  # fmt: skip
def test_integers(text, expected):
    np.testing.assert_array_equal(computed(text), np.asarray(expected).astype(np.uint32))


@pytest.mark.parametrize(
    "a, b", [(0, 0), (1, 2**32), (2**32 - 1, 1), (2**63 + 5, 2**32 + 7), (12345678901234, 98765432109)]
)
def test_two_word_sums_and_differences_carry(a, b):
    words = [a % 2**32, a >> 32, b % 2**32, b >> 32]
    text = """
        LDG.E.64 R6, desc[UR4][R2.64]
        LDG.E.64 R8, desc[UR4][R2.64+0x8]
        IADD3 R10, P1, R6, R8, RZ
        IADD3.X R11, R7, R9, RZ, P1, !PT
        IADD3 R12, P2, -R8, R6, RZ
        IADD3.X R13, ~R9, R7, RZ, P2, !PT
        ISETP.GE.U32.AND P3, PT, R6, R8, PT
        ISETP.GE.U32.AND.EX P3, PT, R7, R9, PT, P3
        SEL R14, 0x1, RZ, P3
        STG.E.64 desc[UR4][R2.64+0x10], R10
        STG.E.64 desc[UR4][R2.64+0x18], R12
        STG.E desc[UR4][R2.64+0x20], R14
    """
    got, _ = run(text, values=words)
    assert got[4:6].view(np.uint64)[0] == (a + b) % 2**64
    assert got[6:8].view(np.uint64)[0] == (a - b) % 2**64
    assert got[8] == (a >= b)


@pytest.mark.parametrize("divisor", [1, 3, 9, 24, 31])
def test_the_compilers_division(divisor):
    """Of lane * 1000 + 7, by its sequence of a rounded-up reciprocal and corrections."""
    text = f"""
        IMAD R4, R0, 0x3e8, RZ
        VIADD R4, R4, 0x7
        IMAD.MOV.U32 R6, RZ, RZ, {divisor:#x}
        I2F.U32.RP R7, R6
        MUFU.RCP R7, R7
        VIADD R8, R7, 0xffffffe
        F2I.FTZ.U32.TRUNC.NTZ R9, R8
        IMAD.MOV R10, RZ, RZ, -R9
        IMAD R11, R10, R6, RZ
        IMAD.MOV.U32 R8, RZ, RZ, RZ
        IMAD.HI.U32 R8, R9, R11, R8
        IMAD.HI.U32 R5, R8, R4, RZ
        IMAD.MOV R9, RZ, RZ, -R5
        IMAD R9, R6, R9, R4
        ISETP.GE.U32.AND P0, PT, R9, R6, PT
        @P0 IMAD.IADD R9, R9, 0x1, -R6
        @P0 VIADD R5, R5, 0x1
        ISETP.GE.U32.AND P1, PT, R9, R6, PT
        @P1 VIADD R5, R5, 0x1
    """
    np.testing.assert_array_equal(computed(text), (LANE * 1000 + 7) // divisor)


def test_floats():
    text = """
        I2FP.F32.S32 R6, R0
        FFMA R7, R6, R6, 2
        MUFU.SQRT R8, R7
        FMUL R8, R8, R8
        FADD R9, |R8|, -R7
        FSETP.GT.AND P1, PT, |R9|, 0.0001, PT
        FSETP.NEU.OR P1, PT, R8, R8, P1
        FSEL R5, R6, -1, !P1
    """
    np.testing.assert_array_equal(computed(text).view(np.float32), LANE.astype(np.float32))


def test_doubles():
    text = """
        I2FP.F32.S32 R6, R0
        F2F.F64.F32 R8, R6
        DADD R10, -R8, 1
        F2F.F32.F64 R5, R10
    """
    np.testing.assert_array_equal(computed(text).view(np.float32), 1 - LANE.astype(np.float32))


def test_lanes_part_and_meet_again():
    """Odd lanes go one way, even ones another; what follows their meeting issues once."""
    text = """
        LOP3.LUT P0, RZ, R0, 0x1, RZ, 0xc0, !PT
        BSSY B0, 0xa0
        @P0 BRA 0x80
        IMAD.MOV.U32 R5, RZ, RZ, 0x4
        BRA 0x90
        IMAD.MOV.U32 R5, RZ, RZ, 0x7
        BSYNC B0
        VIADD R5, R5, 0x1
    """
    got, counts = run(text + STORE)
    np.testing.assert_array_equal(got[:32], np.where(LANE % 2, 8, 5))
    assert counts.names["VIADD"] == counts.names["STG"] == 1 and counts.names["BSYNC"] == 1


def test_a_loop_issues_as_often_as_its_longest_lane():
    text = """
        IMAD.MOV.U32 R5, RZ, RZ, RZ
        BSSY B0, 0x90
        VIADD R5, R5, 0x1
        ISETP.GT.AND P0, PT, R0, R5, PT
        @P0 BRA 0x50
        BSYNC B0
    """
    got, counts = run(text + STORE)
    np.testing.assert_array_equal(got[:32], np.maximum(LANE, 1))
    assert counts.names["ISETP"] == 31 and counts.names["STG"] == 1


def test_warps_exchange_through_shared_memory_at_a_barrier():
    text = f"""
        IMAD.SHL.U32 R6, R0, 0x4, RZ
        STS [R6+{4 * RESERVED_WORDS:#x}], R0
        BAR.SYNC.DEFER_BLOCKING 0x0
        LOP3.LUT R7, R6, 0xfc, RZ, 0x3c, !PT
        LDS R5, [R7+{4 * RESERVED_WORDS:#x}]
    """
    got, counts = run(text + STORE, threads=64, shared=256)
    np.testing.assert_array_equal(got, 63 - np.arange(64))
    assert counts.shared_wavefronts == 4 and counts.sectors_moved == 8 and len(counts.sectors_written) == 8


@pytest.mark.parametrize(
    "index, words, clocks",
    [
        (LANE, 1, 1), (2 * LANE, 1, 2), (32 * LANE, 1, 32), (0 * LANE, 1, 1), (4 * LANE, 4, 4),
        (16 * (LANE % 8), 4, 4), (20 * (LANE % 8), 4, 1),
    ],
)  # fmt: skip
def test_bank_conflicts(index, words, clocks):
    assert wavefronts(index.astype(np.int64), words) == clocks


@pytest.mark.parametrize("text", ["LDS R5, [R0+0x0]", "LDG.E R5, desc[UR4][R0.64]"])
def test_accesses_outside_memory_raise(text):
    with pytest.raises(IndexError):
        run(text, shared=64)


def test_unknown_instructions_raise_when_reached():
    with pytest.raises(NotImplementedError):
        run("BFE.U32 R5, R0, R0")


def test_lanes_that_never_meet_are_noticed():
    text = """
        ISETP.GT.AND P0, PT, R0, 0x5, PT
        BSSY B0, 0x70
        BSSY B1, 0x90
        @P0 BRA 0x90
        BSYNC B0
        EXIT
        BSYNC B1
    """
    with pytest.raises(RuntimeError, match="for ever"):
        run(text)


def test_occupancy():
    assert predict.resident(registers=32, shared=0, threads=128) == 16  # 64 warps
    assert predict.resident(registers=128, shared=0, threads=128) == 4
    assert predict.resident(registers=255, shared=0, threads=32) == 8
    assert predict.resident(registers=32, shared=100 * 1024, threads=128) == 2


def test_shared_memory_and_threads_of_a_thread_block():
    assert Kernel("op thread float n=9").geometry(9) == (128, 128, 4 * (45 + 36) * 128)
    assert Kernel("step group float N=32 4x1x8").geometry(32) == (8, 32, 8 * (4 * (2 * 36 + 64 + 548 + 99) + 4))
    panels = 4 * 104 + 3 * 96 + 2 * 16
    assert Kernel("op block float N=96 8x4x1").geometry(65) == (1, 32, 4 * (panels + 2148 + 3 * 65) + 4)
