"""The instruction gate's parts that need no compiler: what it reads and finds wrong, and that its table is whole."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import instruction_gate as gate  # noqa: E402

LISTING = """68.09 avx512 float32 n=9 factor
243.66 avx512 float32 n=16 factor
885.00 avx2 float32 n=16 mbf_step_ grafted contiguous
"""
COUNTS = {
    "avx512 float32 factor": {"9": 68.09, "16": 243.66},
    "avx2 float32 mbf_step_ grafted contiguous": {"16": 885.0},
}


@pytest.fixture
def pins(monkeypatch, tmp_path):
    """A file of pins that holds COUNTS for one compiler."""
    monkeypatch.setattr(gate, "PINNED", tmp_path / "pins.json")
    gate.write("gcc 1.0", COUNTS)
    return gate.PINNED


def scaled(factor):
    return {name: {n: figure * factor for n, figure in row.items()} for name, row in COUNTS.items()}


def test_what_the_program_prints():
    assert gate.read(LISTING) == COUNTS


def test_the_table_has_a_row_per_kernel_and_a_column_per_size():
    assert [line.split() for line in gate.table(COUNTS).splitlines()] == [
        ["instructions", "per", "block,", "n", "=", "9", "16"],
        ["avx512", "float32", "factor", "68.09", "243.66"],
        ["avx2", "float32", "mbf_step_", "grafted", "contiguous", "885.00"],
    ]


def test_pins_come_back_as_they_were_written(pins):
    assert gate.pinned_counts() == {"gcc 1.0": COUNTS}
    assert len(pins.read_text().splitlines()) == len(COUNTS) + 4  # one line per kernel


@pytest.mark.parametrize("factor, verdict", [
    (1, None), (1.019, None), (0.981, None),
    (1.021, "2.1% worse"), (2, "100.0% worse"), (0.979, "2.1% better"), (0, "100.0% better"), (float("nan"), "nan"),
])  # fmt: skip
def test_counts_that_move_are_found(pins, capsys, factor, verdict):
    """A slower kernel fails the check, each of its counts by name; so does a faster one, which is to be pinned."""
    assert gate.check("gcc 1.0", scaled(factor)) == int(verdict is not None)
    said = capsys.readouterr().out
    for name in ("avx512 float32 factor n=9", "avx512 float32 factor n=16"):
        assert bool(re.search(rf"^{name}: .*{verdict}", said, re.MULTILINE)) == (verdict is not None)
    assert ("--write" in said) == (verdict is not None)


def test_one_slower_kernel_is_named_alone():
    slower = COUNTS | {"avx512 float32 factor": {"9": 75.0, "16": 243.66}}
    assert gate.differences(slower, COUNTS) == [
        "avx512 float32 factor n=9: 75.00 instructions, pinned: 68.09: 10.1% worse"
    ]


def test_missing_and_new_counts_are_found():
    found = {"avx512 float32 factor": {"9": 68.09, "20": 427.78}, "avx2 float32 solve": {"9": 95.44}}
    assert gate.differences(found, COUNTS) == [
        "avx2 float32 mbf_step_ grafted contiguous n=16: not counted, pinned: 885.00",
        "avx2 float32 solve n=9: 95.44 instructions, not pinned",
        "avx512 float32 factor n=16: not counted, pinned: 243.66",
        "avx512 float32 factor n=20: 427.78 instructions, not pinned",
    ]


def test_another_compiler_is_not_compared_and_that_is_said(pins, capsys):
    assert gate.check("clang 9.0", scaled(2)) == 0
    assert "clang 9.0 has no pinned counts (there are: gcc 1.0): nothing is compared" in capsys.readouterr().out


def test_pins_of_another_compiler_and_of_another_processor_stay(pins, capsys):
    with_avx2_alone = {name: row for name, row in scaled(1).items() if "avx2" in name}
    assert gate.check("gcc 1.0", with_avx2_alone) == 0
    assert "does not have it: avx512" in capsys.readouterr().out
    gate.write("clang 9.0", scaled(2))
    gate.write("gcc 1.0", with_avx2_alone)
    assert gate.pinned_counts() == {"gcc 1.0": COUNTS, "clang 9.0": scaled(2)}


def test_where_nothing_can_be_counted_that_is_said(monkeypatch, capsys):
    monkeypatch.setattr(gate.platform, "machine", lambda: "aarch64")
    assert gate.main(["--check"]) == 0 and gate.main([]) == 1
    assert capsys.readouterr().out.count("x86-64 Linux alone") == 2


def test_a_command_that_fails_shows_what_it_said():
    with pytest.raises(SystemExit, match="the reason\n?failed: "):
        gate.run(sys.executable, "-c", "raise SystemExit('the reason')")


def test_pinned_table_is_whole():
    """Every form of the program, for every instruction set and dtype."""
    source = (ROOT / "tests" / "native" / "count.cpp").read_text()
    forms = re.findall(r'\{"([\w ]+)", Op::', source)
    others = re.findall(r'print\(\w+, "([\w -]+)"', source)  # steps that are no op of those kernels, in float32
    isas = re.findall(r'\{"(\w+)",\s+\d+,\s+cpu::', source)
    assert len(forms) >= 8 and len(others) == 5 and len(isas) == 3
    names = {f"{isa} {dtype} {form}" for isa in isas for dtype in ("float32", "float64") for form in forms}
    names |= {f"{isa} float32 {form}" for isa in isas for form in others}
    pinned = gate.pinned_counts()
    assert pinned
    for compiler, counts in pinned.items():
        assert counts.keys() == names, compiler
        assert all(min(row.values()) > 0 for row in counts.values()), compiler
        blocked = [row for name, row in counts.items() if not re.search("mbf_diagonal_step_|rank_one_step_", name)]
        assert all({"9", "25"} <= row.keys() for row in blocked), compiler
