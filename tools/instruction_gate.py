"""Counts the instructions that the CPU kernels take per mini-block, and holds them to instruction_gate.json: a slower
kernel shows on a busy machine too. Needs x86-64 Linux, cmake and a C++ compiler.

    python tools/instruction_gate.py            builds, counts, and prints instructions per block
    python tools/instruction_gate.py --check    likewise; fails where a count is not within 2 % of the pinned one
    python tools/instruction_gate.py --write    likewise; pins the counts of this compiler

Counts belong to the version of a compiler. For one without pins nothing is compared, and that is said: pin before a
change there, and check after it. What this processor does not have (AVX-512) is neither compared nor written.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "instructions"
PINNED = Path(__file__).with_suffix(".json")
TOLERANCE = 0.02  # a change of the sources that does not touch a kernel moves it by less

Counts = dict[str, dict[str, float]]  # "avx2 float32 factor" -> block size -> instructions per block


def unavailable() -> str | None:
    """Why nothing can be counted here; None if it can."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return "instructions are counted on x86-64 Linux alone"
    return None if shutil.which("cmake") else "no cmake here (PATH)"


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}failed: {' '.join(map(str, command))}")
    return done.stdout


def build() -> Path:
    run("cmake", "-S", ROOT, "-B", BUILD, "-DMBF_COUNT=ON")
    run("cmake", "--build", BUILD, "--parallel", str(os.cpu_count()))
    return BUILD / "count"


def count(program: Path) -> tuple[str, Counts]:
    """The compiler, and the counts of every instruction set that this processor has."""
    compiler, *isas = run(program).splitlines()
    with ThreadPoolExecutor() as pool:
        listings = pool.map(lambda isa: run(program, isa), isas)
        return compiler.strip(), read("".join(listings))


def read(listing: str) -> Counts:
    """Of lines such as "68.09 avx512 float32 n=9 factor"."""
    counts: Counts = {}
    for line in listing.splitlines():
        figure, isa, dtype, size, *form = line.split()
        counts.setdefault(" ".join([isa, dtype, *form]), {})[size.removeprefix("n=")] = float(figure)
    return counts


def table(counts: Counts) -> str:
    sizes = sorted({int(n) for row in counts.values() for n in row})
    width = max(map(len, counts))
    lines = ["instructions per block, n =".ljust(width) + "".join(f"{n:>10}" for n in sizes)]
    for name, row in counts.items():
        figures = (f"{row[str(n)]:.2f}" if str(n) in row else "" for n in sizes)
        lines.append((name.ljust(width) + "".join(f"{figure:>10}" for figure in figures)).rstrip())
    return "\n".join(lines)


def isas_of(counts: Counts) -> set[str]:
    return {name.split()[0] for name in counts}


def differences(found: Counts, pinned: Counts) -> list[str]:
    """Of the instruction sets that were counted."""
    problems = []
    for name in sorted(found.keys() | pinned.keys()):
        if name.split()[0] not in isas_of(found):
            continue
        new, old = found.get(name, {}), pinned.get(name, {})
        for n in sorted(new.keys() | old.keys(), key=int):
            if verdict := compared(new.get(n), old.get(n)):
                problems.append(f"{name} n={n}: {verdict}")
    return problems


def compared(new: float | None, old: float | None) -> str | None:
    """What is wrong; None if nothing is."""
    if new is None:
        return f"not counted, pinned: {old:.2f}"
    if old is None:
        return f"{new:.2f} instructions, not pinned"
    change = new / old - 1
    if abs(change) <= TOLERANCE:
        return None
    return f"{new:.2f} instructions, pinned: {old:.2f}: {abs(change):.1%} {'worse' if change > 0 else 'better'}"


def pinned_counts() -> dict[str, Counts]:
    return json.loads(PINNED.read_text()) if PINNED.exists() else {}


def check(compiler: str, found: Counts) -> int:
    pinned = pinned_counts()
    if compiler not in pinned:
        others = ", ".join(sorted(pinned)) or "none"
        print(f"{compiler} has no pinned counts (there are: {others}): nothing is compared")
        return 0
    if left_out := isas_of(pinned[compiler]) - isas_of(found):
        print(f"not compared, for this processor does not have it: {', '.join(sorted(left_out))}")
    problems = differences(found, pinned[compiler])
    print("\n".join(problems))
    if problems:
        print("If that is meant: python tools/instruction_gate.py --write, and commit tools/instruction_gate.json")
    print(f"{compiler}: {sum(map(len, found.values()))} counts, {len(problems)} not within {TOLERANCE:.0%} of the pins")
    return 1 if problems else 0


def write(compiler: str, found: Counts) -> None:
    """One line per kernel, so that a change reads well."""
    pinned = pinned_counts()
    kept = {name: row for name, row in pinned.get(compiler, {}).items() if name.split()[0] not in isas_of(found)}
    pinned[compiler] = kept | found
    text = json.dumps(pinned, indent=1)
    PINNED.write_text(re.sub(r"\{[^{}]*\}", lambda row: " ".join(row[0].split()), text) + "\n")
    print(f"wrote {PINNED}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true")
    what.add_argument("--write", action="store_true")
    options = parser.parse_args(arguments)
    if reason := unavailable():
        print(f"Nothing is counted: {reason}.")
        return 0 if options.check else 1
    compiler, found = count(build())
    print(table(found))
    if options.write:
        write(compiler, found)
    return check(compiler, found) if options.check else 0


if __name__ == "__main__":
    sys.exit(main())
