"""The sanitized driver (`make sanitize-address`, `make sanitize-thread`) bites: a kernel with one barrier, one index or
one wait wrong is caught, and the kernel as it is passes in the same build.

Only the emulated group kernel for n = 24, one thread block kernel and that of rank one, and of the CPU's the steps
without a matrix to a mini-block, in float, compiled without optimization: seconds, not minutes.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CXX = shutil.which("g++")
FLAGS = {
    "plain": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}


def emulated(mapping: str, teams: str) -> dict[str, list[str]]:
    flags = ["-DMBF_GPU=emulated", "-DMBF_SCALAR=float", f"-DMBF_ENTRY={mapping}_float"]
    return {"emulator/team_kernels.cpp": [*flags, f"-DMBF_FOR_EACH_TEAM(X)={teams}"]}


CPU = ["-msse4.2", "-fno-math-errno", "-DMBF_SCALAR=float"]
MOMENTS = {
    "cpu/dispatch.cpp": [],  # without MBF_X86: the baseline alone
    "cpu/shared_step.cpp": [*CPU, "-DMBF_SHARED_KERNEL=shared_baseline_float"],
    "cpu/diagonal_step.cpp": [*CPU, "-DMBF_DIAGONAL_KERNEL=diagonal_baseline_float"],
    "cpu/rank_one_step.cpp": [*CPU, "-DMBF_RANK_ONE_KERNEL=rank_one_baseline_float"],
}
RANK_ONE = {"emulator/rank_one_kernels.cpp": [
    "-DMBF_GPU=emulated", "-DMBF_SCALAR=float", "-DMBF_ENTRY=rank_one_float",
]}  # fmt: skip
# What is compiled of a mapping, and the driver's cases for it.
KERNELS = {
    "group": (emulated("group", "X(24, 4, 1, 8)"), ["emulated", "group", "float", "n=24"]),
    "block": (emulated("block", "X(64, 8, 8, 1)"), ["emulated", "block", "float", "n=21"]),
    "shared": (MOMENTS, ["cpu", "float", "n=33", "S=65", "shared"]),
    "diagonal": (MOMENTS, ["cpu", "float", "diagonal"]),
    "rank_one": (MOMENTS, ["cpu", "float", "rank_one"]),
    "rank_one, emulated": (RANK_ONE, ["emulated", "float", "rank_one"]),
}

TEAM, ROWS, PANELS, STAGING = (f"cuda/{name}.cuh" for name in ("team_kernel", "row_team", "panel_team", "staging"))
# Name -> mapping, file, what stands there, what stands there instead.
MUTATIONS = {
    "no barrier in the sweep": ("group", ROWS, "sync();\n        const S root", "const S root"),
    "no barrier before the stores": ("group", TEAM, "op_block(op);\n        __syncthreads();", "op_block(op);"),
    "no barrier after the copies": ("group", STAGING, "wait_prior(0);\n    __syncthreads();", "wait_prior(0);"),
    "no wait for the copies": ("group", STAGING, "    __pipeline_wait_prior(0);\n", ""),
    "no wait for the right-hand side": (
        "group",
        TEAM,
        "fetch(0, rhs);\n            await_copies",
        "fetch(0, rhs); __syncthreads",
    ),
    "index of a global store": (
        "group",
        STAGING,
        "reinterpret_cast<uint4*>(to + e) =",
        "reinterpret_cast<uint4*>(to + e + 4) =",
    ),
    "index of a shared store": ("group", ROWS, "shown[row_of(a)] = entries_", "shown[row_of(a) + 1] = entries_"),
    "index past shared memory": ("group", TEAM, "(vectors(3)) + team_;", "(vectors(3)) + team_ + 1;"),
    "no barrier before the tile": ("block", PANELS, "sync();\n        Tile tile", "Tile tile"),
    "no barrier after the rows": ("block", PANELS, "(b + 1) * PC);\n        sync();", "(b + 1) * PC);"),
    "no barrier after the update": ("block", PANELS, "update(b);\n        sync();", "update(b);"),
    "no barrier before the sum": ("block", PANELS, "sync();\n        if (r_ == 0) left", "if (r_ == 0) left"),
    "no barrier after the sum": ("block", PANELS, "sync();\n        S x[PC]", "S x[PC]"),
    "a whole register read": (
        "shared",
        "cpu/shared_step.cpp",
        "else if (k + W <= run) {\n            v.part",
        "else if (k < run) {\n            v.part",
    ),
    "a whole tile moved": (
        "shared",
        "cpu/shared_step.cpp",
        "static_cast<int>(problem.samples - first < kTileRows ? problem.samples - first : kTileRows)",
        "kTileRows",
    ),
    "the last chunk forgotten": ("shared", "cpu/shared_step.cpp", "gram(statistic, s > 0,", "gram(statistic, false,"),
    "a counter that is not atomic": (
        "shared",
        "cpu/dispatch.cpp",
        "std::atomic<int64_t> next{0};",
        "int64_t next = 0;",
    ),
    "a tail written whole": (
        "diagonal",
        "cpu/diagonal_step.cpp",
        "store_part(param + i, w.part[0], rest);",
        "store(param + i, w);",
    ),
    "an element of two threads": (
        "diagonal",
        "cpu/dispatch.cpp",
        "last = std::min(end, problem.count)",
        "last = std::min(end + 1, problem.count)",
    ),
    "a row's tail written whole": (
        "rank_one",
        "cpu/rank_one_step.cpp",
        "store_part(run.param + k, w.part[0], rest);",
        "store(run.param + k, w);",
    ),
    "a register of h read whole": (
        "rank_one",
        "cpu/rank_one_step.cpp",
        "s * part(run.column + k, rest)",
        "s * load<V>(run.column + k)",
    ),
    "h in the order of a contiguous row": (
        "rank_one",
        "cpu/rank_one_step.cpp",
        "if (!is_permuted(problem)) return",
        "return",
    ),
    "the next row": ("rank_one, emulated", "cuda/rank_one_kernels.cu", "1 + over / period_", "1"),
    "an element past the last": (
        "rank_one, emulated",
        "cuda/rank_one_kernels.cu",
        "if (i < problem.count) g[k]",
        "if (i <= problem.count) g[k]",
    ),
    "a second table like the first": (
        "rank_one, emulated",
        "cuda/rank_one_kernels.cu",
        "problems + done, count - done",
        "problems, count - done",
    ),
    "index into the tile": ("block", PANELS, "rest - tile_column(b, k)[i] *", "rest - tile_column(b, i)[k] *"),
}


def run(*command: object) -> subprocess.CompletedProcess:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, errors="replace")


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    """build(flavour, mutation or None) -> the driver's path. What no mutation touches is compiled once per flavour."""
    if not CXX:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("sanitizers")

    def compile(flavour, source, tree, target, *flags):
        common = ["-std=gnu++17", "-O0", "-g", "-Wno-psabi", "-Wno-unknown-pragmas", "-ffp-contract=fast"]
        done = run(CXX, *common, *flags, "-c", tree / source, "-o", target)
        assert done.returncode == 0, done.stderr
        return target

    def check_flavour(flavour):
        (folder / "empty.cpp").write_text("int main() {}")
        empty = folder / "empty"
        if run(CXX, *FLAGS[flavour], folder / "empty.cpp", "-o", empty).returncode or run(empty).returncode:
            pytest.skip(f"g++ has no working {' '.join(FLAGS[flavour])} here")

    unchanged = {}  # by flavour, and of kernels of several sources by (flavour, sources, source)

    def unchanged_objects(flavour):
        if flavour not in unchanged:
            check_flavour(flavour)
            flags, gpu = FLAGS[flavour], ["-DMBF_GPU=emulated", f"-I{ROOT}/csrc/emulator"]
            fibers = ["-DMBF_FIND_RACES"] if flavour == "thread" else flags
            unchanged[flavour] = [
                compile(flavour, "tests/native/driver.cpp", ROOT, folder / f"{flavour}_driver.o", *flags),
                compile(flavour, "csrc/emulator/fibers.cpp", ROOT, folder / f"{flavour}_fibers.o", *fibers),
                compile(flavour, "csrc/cuda/launch.cpp", ROOT, folder / f"{flavour}_launch.o", *flags, *gpu),
            ]
        return unchanged[flavour]

    def kernel(flavour, tree, name, flags):
        include = f"-I{tree}/csrc/emulator"
        return compile(flavour, f"csrc/{name}", tree, tree / f"{Path(name).stem}.o", *FLAGS[flavour], include, *flags)

    def build(flavour, mapping, mutation=None):
        objects = unchanged_objects(flavour)
        sources, _ = KERNELS[mapping]
        tree = folder / f"{flavour} {mapping} {mutation}"
        shutil.copytree(ROOT / "csrc", tree / "csrc")
        if mutation:
            _, changed, old, new = MUTATIONS[mutation]
            text = (tree / "csrc" / changed).read_text()
            assert text.count(old) == 1, f"{changed} no longer has exactly one {old!r}: adapt the mutation"
            (tree / "csrc" / changed).write_text(text.replace(old, new))
        for name, flags in sources.items():
            kept = (flavour, id(sources), name)
            if mutation and (name == changed or changed not in sources):  # a source, or what sources include
                objects = [*objects, kernel(flavour, tree, name, flags)]
                continue
            if kept not in unchanged:
                unchanged[kept] = kernel(flavour, tree, name, flags)
            objects = [*objects, unchanged[kept]]
        # The driver knows kernels that are not there; these cases do not call them.
        lenient = ["-no-pie", "-Wl,--unresolved-symbols=ignore-all"]
        done = run(CXX, *FLAGS[flavour], *lenient, *objects, "-o", tree / "driver", "-lpthread")
        assert done.returncode == 0, done.stderr
        return tree / "driver"

    return build


@pytest.mark.parametrize("mapping", KERNELS)
@pytest.mark.parametrize("flavour", FLAGS)
def test_the_kernel_as_it_is(builds, flavour, mapping):
    done = run(builds(flavour, mapping), *KERNELS[mapping][1])
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^[1-9]\d* cases, 0 failures", done.stdout, re.M), done.stdout


@pytest.mark.parametrize("flavour, mutation, report", [
    ("thread", "no barrier in the sweep", "ThreadSanitizer: data race"),
    ("thread", "no barrier before the stores", "ThreadSanitizer: data race"),
    ("thread", "no barrier after the copies", "ThreadSanitizer: data race"),
    ("thread", "no barrier before the tile", "ThreadSanitizer: data race"),
    ("thread", "no barrier after the rows", "ThreadSanitizer: data race"),
    ("thread", "no barrier after the update", "ThreadSanitizer: data race"),
    ("thread", "no barrier before the sum", "ThreadSanitizer: data race"),
    ("thread", "no barrier after the sum", "ThreadSanitizer: data race"),
    ("plain", "index into the tile", "FAILED"),
    ("plain", "no barrier in the sweep", "FAILED"),
    ("plain", "no barrier before the stores", "FAILED"),
    ("plain", "no barrier after the copies", "FAILED"),
    ("plain", "no wait for the copies", "FAILED"),
    ("plain", "no wait for the right-hand side", "FAILED"),
    ("plain", "index of a global store", "wrote outside of its memory"),
    ("plain", "index of a shared store", "FAILED"),
    ("address", "index of a global store", "AddressSanitizer: use-after-poison"),
    ("thread", "a counter that is not atomic", "ThreadSanitizer: data race"),
    ("thread", "an element of two threads", "ThreadSanitizer: data race"),
    ("address", "a whole tile moved", "AddressSanitizer: use-after-poison"),
    ("plain", "the last chunk forgotten", "FAILED"),
    ("plain", "a tail written whole", "wrote outside of its memory"),
    ("plain", "a row's tail written whole", "FAILED"),
    ("plain", "h in the order of a contiguous row", "FAILED"),
    ("plain", "the next row", "FAILED"),
    ("plain", "a second table like the first", "FAILED"),
    ("address", "a register of h read whole", "ERROR: AddressSanitizer"),
    ("address", "an element past the last", "AddressSanitizer: use-after-poison"),
    ("address", "a whole register read", "AddressSanitizer: use-after-poison"),
    ("address", "index past shared memory", "AddressSanitizer: use-after-poison"),
])  # fmt: skip
def test_a_mutation_is_caught(builds, flavour, mutation, report):
    mapping = MUTATIONS[mutation][0]
    done = run(builds(flavour, mapping, mutation), *KERNELS[mapping][1])
    assert done.returncode != 0 and report in done.stderr, done.stdout + done.stderr
