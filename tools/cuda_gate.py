"""Compiles the CUDA kernels for three architectures on any machine with nvcc, and holds every kernel to cuda_gate.json.

    python tools/cuda_gate.py            compiles, and writes the table of this nvcc version into cuda_gate.json
    python tools/cuda_gate.py --check    compiles; fails where a kernel spills, has a stack or differs from its table
    --arch 90                            only that architecture
    --built mbf_kernels/_C.so            an architecture that a built module holds is not compiled again
    --unchanged                          nor one whose sources, commands and compiler are those of its table

A version of nvcc without a table is held to the rules alone: no spills, no stack, machine code of every architecture.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cuda_objects
from cuda_objects import ARCHITECTURES, Object, Problem, readable

PINNED = Path(__file__).with_suffix(".json")
COLUMNS = ["registers", "spill bytes", "stack bytes", "static shared bytes", "instructions"]
RESERVED_SHARED_BYTES = 1024  # by the system, of every thread block
MUST_BE_ZERO = ("spill bytes", "stack bytes")

PROPERTIES = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\s.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>.*?)$",
    re.DOTALL | re.MULTILINE,
)
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(?!NOP)[A-Z]", re.MULTILINE)

Table = dict[str, dict[str, list[int]]]  # architecture -> kernel -> COLUMNS


def resources(log: str) -> dict[str, list[int]]:
    """What `ptxas -v` says of every kernel: all of COLUMNS but the instructions."""
    found = {}
    for match in PROPERTIES.finditer(log):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        spills = int(match["stores"]) + int(match["loads"])
        figures = [int(match["registers"]), spills, int(match["stack"]), int(shared[1]) if shared else 0]
        found[readable(match["name"]) or match["name"]] = figures
    return found


def built_resources(usage: str) -> dict[str, list[int]]:
    """What `cuobjdump -res-usage` says of a finished module, the system's shared memory included. Whatever has a stack
    is taken to spill."""
    found = {}
    for name, text in re.findall(r"Function (\w+):\s+(.*)", usage):
        number = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", text)}
        found[readable(name) or name] = [
            number["REG"],
            number["STACK"],
            number["STACK"],
            max(number["SHARED"] - RESERVED_SHARED_BYTES, 0),
        ]
    return found


def instruction_counts(sass: str) -> dict[str, int]:
    """Instructions of every kernel in cuobjdump's listing, padding aside."""
    _, *functions = re.split(r"^\s*Function : (?=\w)", sass, flags=re.MULTILINE)
    return {readable(text) or text.split()[0]: len(INSTRUCTION.findall(text)) for text in functions}


def figures(one: Object) -> dict[str, list[int]]:
    held = cuda_objects.machine_code(one.path)
    if held != [one.architecture]:
        raise Problem(f"{one.name}: machine code for {held or 'nothing'}, not for sm_{one.architecture}")
    compiled, counts = resources(one.log), instruction_counts(cuda_objects.disassemble(one.path))
    if compiled.keys() != counts.keys():
        raise Problem(f"{one.name}: ptxas and cuobjdump disagree on {sorted(compiled.keys() ^ counts.keys())}")
    return {name: [*compiled[name], counts[name]] for name in compiled}


def table_of_built(module: Path, architectures: Iterable[int]) -> Table:
    """Of the one architecture of a module, if it is asked for."""
    held = set(cuda_objects.machine_code(module))
    if len(held) != 1 or not held <= set(architectures):
        return {}
    counts = instruction_counts(cuda_objects.disassemble(module))
    resources = built_resources(cuda_objects.resource_usage(module))
    return {str(*held): {name: [*resources[name], counts[name]] for name in counts}}


def table_of(objects: Iterable[Object]) -> Table:
    objects = list(objects)
    with ThreadPoolExecutor() as pool:
        every = list(pool.map(figures, objects))
    table: Table = {}
    for one, found in zip(objects, every, strict=True):
        table.setdefault(str(one.architecture), {}).update(found)
    return table


def broken_rules(table: Table) -> list[str]:
    return [
        f"sm_{architecture} {kernel}: {row[COLUMNS.index(rule)]} {rule}"
        for architecture, kernels in table.items()
        for kernel, row in kernels.items()
        for rule in MUST_BE_ZERO
        if row[COLUMNS.index(rule)]
    ]


def differences(table: Table, pinned: Table) -> list[str]:
    found = []
    for architecture, kernels in table.items():
        expected = pinned.get(architecture, {})
        for kernel in sorted(kernels.keys() | expected.keys()):
            new, old = kernels.get(kernel), expected.get(kernel)
            if new != old:
                found.append(f"sm_{architecture} {kernel}: {described(new)}, pinned: {described(old)}")
    return found


def described(row: list[int] | None) -> str:
    return "none" if row is None else ", ".join(f"{n} {column}" for n, column in zip(row, COLUMNS, strict=True))


def pinned() -> dict[str, dict]:
    """ "nvcc": the tables by its version; "digests": of what each of their architectures was compiled from."""
    return json.loads(PINNED.read_text()) if PINNED.exists() else {"nvcc": {}, "digests": {}}


def pinned_tables() -> dict[str, Table]:
    return pinned()["nvcc"]


def unchanged(version: str, architectures: Iterable[int]) -> Table:
    """The pinned tables of architectures that the same compiler would make the same machine code for."""
    digests, tables = (pinned()[kind].get(version, {}) for kind in ("digests", "nvcc"))
    same = [str(a) for a in architectures if str(a) in digests and digests[str(a)] == cuda_objects.digest(a)]
    if same:
        print(f"sm_{', sm_'.join(same)}: sources, commands and compiler are those of the table")
    return {architecture: tables[architecture] for architecture in same}


def write(tables: dict[str, Table], digests: dict[str, dict[str, str]]) -> None:
    """One line per kernel, so that a change reads well."""
    rows = json.dumps({"columns": COLUMNS, "digests": digests, "nvcc": tables}, indent=1, sort_keys=True)
    PINNED.write_text(re.sub(r"\[[^\[\]]*\]", lambda row: " ".join(row[0].split()), rows) + "\n")


def check(version: str, table: Table) -> int:
    problems, tables = broken_rules(table), pinned_tables()
    if version in tables:
        problems += differences(table, tables[version])
    else:
        print(
            f"nvcc {version} has no table (there are: {', '.join(sorted(tables)) or 'none'}): rules alone are checked"
        )
    print("\n".join(problems))
    if problems:
        print("If that is meant: python tools/cuda_gate.py, and commit tools/cuda_gate.json")
    print(f"{sum(map(len, table.values()))} kernels of sm_{', sm_'.join(table)}: {len(problems)} problems")
    return 1 if problems else 0


def update(version: str, table: Table) -> int:
    tables, digests = (pinned()[kind] for kind in ("nvcc", "digests"))
    tables[version] = tables.get(version, {}) | table
    digests[version] = digests.get(version, {}) | {a: cuda_objects.digest(int(a)) for a in table}
    write(tables, digests)
    problems = broken_rules(table)
    print("\n".join([f"wrote {PINNED}", *problems]))
    return 1 if problems else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--built", type=Path)
    parser.add_argument("--unchanged", action="store_true")
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, action="append")
    options = parser.parse_args(arguments)
    if not cuda_objects.nvcc():
        print("No nvcc here (PATH, CUDACXX): the CUDA kernels are not compiled, and nothing is checked.")
        return 0 if options.check else 1
    try:
        version = cuda_objects.nvcc_version()
        wanted = options.arch or ARCHITECTURES
        table = table_of_built(options.built, wanted) if options.built else {}
        if options.unchanged:
            table |= unchanged(version, [a for a in wanted if str(a) not in table])
        table |= table_of(cuda_objects.compile_kernels([a for a in wanted if str(a) not in table]))
    except Problem as problem:
        print(problem)
        return 1
    return check(version, table) if options.check else update(version, table)


if __name__ == "__main__":
    sys.exit(main())
