"""The compile gate's parts that need no compiler: what it reads, and that its table is whole and clean."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import cuda_gate  # noqa: E402
import cuda_objects  # noqa: E402

THREAD = (
    "_ZN3mbf50_GLOBAL__N__e9e4fcfa_17_thread_kernels_cu_499105689"
    "op_kernelINS0_12ThreadKernelIfLi17EEEEEvNS_5TableILi1EEENS_2OpE"
)
TEAM = (
    "_ZN3mbf48_GLOBAL__N__094baa8e_15_team_kernels_cu_9c8285a811"
    "step_kernelINS0_10TeamKernelIdLi64ELi8ELi8ELi1EEEEEvNS_5TableILi100EEE"
)
RANK_ONE = "_ZN3mbf55_GLOBAL__N__00000000_19_rank_one_kernels_cu_0123456715rank_one_kernelIdEEvNS_12RankOneTableE"
LOG = f"""ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{THREAD}' for 'sm_90'
ptxas info    : Function properties for {THREAD}
    32 bytes stack frame, 24 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 32 bytes cumulative stack size
ptxas info    : Compile time = 14997.259 ms
ptxas info    : Compiling entry function '{TEAM}' for 'sm_90'
ptxas info    : Function properties for {TEAM}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 184 registers, used 1 barriers, 48 bytes smem, 724 bytes cmem[0]
"""
SASS = f"""
\tcode for sm_90
\t\tFunction : {THREAD}
\t.headerflags\t@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                   /* 0x00000a00ff017b82 */
                                                                            /* 0x000ff00000000800 */
        /*0010*/              @!P0 BRA 0x10 ;                               /* 0x0000000000000947 */
        /*0020*/              @!UPT UIADD3 URZ, URZ, URZ, URZ ;             /* 0x0000000000000947 */
        /*0030*/                   EXIT ;                                   /* 0x000000000000794d */
        /*0040*/                   BRA 0x40;                                /* 0xfffffffc00fc7947 */
        /*0050*/                   NOP;                                     /* 0x0000000000007918 */
\t\tFunction : {TEAM}
        /*10000*/                  EXIT ;                                   /* 0x000000000000794d */
"""
COMMAND = (
    "/usr/local/bin/nvcc -forward-unknown-to-host-compiler -DMBF_ENTRY=group_float -DMBF_SCALAR=float -O3 "
    "--generate-code=arch=compute_80,code=[compute_80,sm_80] --generate-code=arch=compute_90,code=[compute_90,sm_90] "
    "-prec-div=false -std=c++17 -x cu -c /x/csrc/cuda/team_kernels.cu -o CMakeFiles/cuda_group_float.dir/team_kernels.o"
)


def test_names_are_made_readable():
    assert cuda_objects.readable(THREAD) == "op thread float n=17"
    assert cuda_objects.readable(TEAM) == "step block double N=64 8x8x1"
    group = TEAM.replace("IdLi64ELi8ELi8ELi1E", "IfLi32ELi4ELi2ELi8E")
    assert cuda_objects.readable(group) == "step group float N=32 4x2x8"
    assert cuda_objects.readable(group.replace("Li8E", "Li1E")) == "step block float N=32 4x2x1"
    assert cuda_objects.readable(RANK_ONE) == "rank_one double"
    assert cuda_objects.readable("_Z6kernelPf") is None


def test_what_ptxas_says():
    assert cuda_gate.resources(LOG) == {
        "op thread float n=17": [168, 32, 32, 0],
        "step block double N=64 8x8x1": [184, 0, 0, 48],
    }


def test_what_cuobjdump_says_of_a_built_module():
    usage = (
        f" Function {THREAD}:\n  REG:168 STACK:32 SHARED:1024 LOCAL:0 CONSTANT[0]:724 TEXTURE:0 SURFACE:0 SAMPLER:0\n"
    )
    usage += f" Function {TEAM}:\n  REG:184 STACK:0 SHARED:1072 LOCAL:0 CONSTANT[0]:724 TEXTURE:0 SURFACE:0 SAMPLER:0\n"
    assert cuda_gate.built_resources(usage) == cuda_gate.resources(LOG)


def test_a_module_spares_the_compiling_of_what_it_holds_alone(monkeypatch):
    monkeypatch.setattr(cuda_objects, "disassemble", lambda path: SASS)
    monkeypatch.setattr(cuda_objects, "resource_usage", lambda path: f"Function {THREAD}:\n REG:9 STACK:0 SHARED:0\n")
    for held, taken in (([90, 90], True), ([80, 90], False), ([75], False), ([], False)):
        monkeypatch.setattr(cuda_objects, "machine_code", lambda path, held=held: held)
        monkeypatch.setattr(cuda_gate, "instruction_counts", lambda sass: {"op thread float n=17": 5})
        expected = {"90": {"op thread float n=17": [9, 0, 0, 0, 5]}} if taken else {}
        assert cuda_gate.table_of_built(Path("_C.so"), (80, 90)) == expected


def test_instructions_are_counted_without_padding():
    assert cuda_gate.instruction_counts(SASS) == {"op thread float n=17": 5, "step block double N=64 8x8x1": 1}


def test_commands_are_cmakes_for_one_architecture():
    """What CMake compiles, word by word, but for the other architectures and the object's name."""
    entries = [{"file": "/x/csrc/cuda/team_kernels.cu", "command": COMMAND}, {"file": "a.cpp", "command": "c++ a.cpp"}]
    commands = cuda_objects.kernels_of(entries)
    assert list(commands) == ["group float"]
    words = cuda_objects.for_architecture(commands["group float"], 90, Path("/to/object.o"))
    dropped = "--generate-code=arch=compute_80,code=[compute_80,sm_80]"
    expected = [word for word in COMMAND.split() if word != dropped]
    assert words == [*expected[:-1], "/to/object.o", "-Xptxas", "-v"]


def test_spills_stacks_and_differences_are_found():
    clean, spilled = [72, 0, 0, 0, 566], [72, 8, 16, 0, 570]
    assert cuda_gate.broken_rules({"90": {"a": clean}}) == []
    assert cuda_gate.broken_rules({"90": {"a": spilled}}) == ["sm_90 a: 8 spill bytes", "sm_90 a: 16 stack bytes"]
    assert cuda_gate.differences({"90": {"a": clean}}, {"90": {"a": clean}, "80": {"a": spilled}}) == []
    changed = cuda_gate.differences({"90": {"a": clean, "b": clean}}, {"90": {"a": spilled, "c": clean}})
    assert [line.split(":")[0] for line in changed] == ["sm_90 a", "sm_90 b", "sm_90 c"]


@pytest.mark.parametrize("version", ["13.0.88", "99.0.1"])
@pytest.mark.parametrize("row, problems", [([72, 0, 0, 0, 566], False), ([72, 0, 8, 0, 566], True)])
def test_check_fails_on_problems_alone(monkeypatch, capsys, version, row, problems):
    """A version of nvcc without a table is held to the rules, and that is said."""
    monkeypatch.setattr(cuda_gate, "pinned_tables", lambda: {"13.0.88": {"90": {"a": row}}})
    assert cuda_gate.check(version, {"90": {"a": row}}) == int(problems)
    assert ("rules alone" in capsys.readouterr().out) == (version != "13.0.88")


def test_what_has_not_changed_is_what_its_table_says(monkeypatch):
    """An architecture without a digest, or with another one, is to be compiled."""
    tables = {"80": {"a": [1]}, "90": {"a": [2]}, "100": {"a": [3]}}
    held = {"nvcc": {"13.0.88": tables}, "digests": {"13.0.88": {"80": "digest 80", "90": "of other sources"}}}
    monkeypatch.setattr(cuda_gate, "pinned", lambda: held)
    monkeypatch.setattr(cuda_objects, "digest", lambda architecture: f"digest {architecture}")
    assert cuda_gate.unchanged("13.0.88", [80, 90, 100]) == {"80": {"a": [1]}}
    assert cuda_gate.unchanged("13.0.88", [90, 100]) == cuda_gate.unchanged("13.1.1", [80]) == {}


def test_a_digest_covers_every_object(monkeypatch):
    commands = {"thread float": COMMAND.split(), "group float": COMMAND.replace("group_float", "x").split()}
    monkeypatch.setattr(cuda_objects, "nvcc_version", lambda: "13.0.88")
    found = set()
    for kept in (commands, {"thread float": commands["thread float"]}, {"group float": commands["group float"]}):
        monkeypatch.setattr(cuda_objects, "commands", lambda kept=kept: kept)
        found |= {cuda_objects.digest(80), cuda_objects.digest(90)}
    assert len(found) == 6


def test_without_nvcc_nothing_is_checked_and_that_is_said(monkeypatch, capsys):
    monkeypatch.setattr(cuda_objects, "nvcc", lambda: None)
    assert cuda_gate.main(["--check"]) == 0 and cuda_gate.main([]) == 1
    assert "nothing is checked" in capsys.readouterr().out


def test_content_key_covers_sources_command_and_compiler(monkeypatch, tmp_path):
    (tmp_path / "cuda").mkdir()
    header, kernel = tmp_path / "numerics.h", tmp_path / "cuda" / "kernel.cu"
    header.write_text("1")
    kernel.write_text("2")
    monkeypatch.setattr(cuda_objects, "CSRC", tmp_path)
    keys = [cuda_objects.content_key(["nvcc", "-O3"], "13.0.88"), cuda_objects.content_key(["nvcc"], "13.0.88")]
    keys.append(cuda_objects.content_key(["nvcc", "-O3"], "13.1.1"))
    for path in (header, kernel):
        path.write_text(path.read_text() + " ")
        keys.append(cuda_objects.content_key(["nvcc", "-O3"], "13.0.88"))
    assert len(set(keys)) == len(keys)


def kernels_of_the_lists() -> set[str]:
    """What csrc's lists say is compiled, by its readable name."""
    sizes = (ROOT / "csrc" / "block_sizes.def").read_text()
    mappings = (ROOT / "csrc" / "cuda" / "mappings.def").read_text().replace("\\\n", " ")
    every = [int(n) for n in re.findall(r"X\((\d+)\)", sizes)]
    names = set()
    for scalar in ("float", "double"):
        most = int(re.search(rf"MBF_MAX_THREAD_{scalar.upper()} (\d+)", mappings)[1])
        names |= {f"thread {scalar} n={n}" for n in every if n <= most}
        for mapping in ("group", "block"):
            listed = re.search(rf"MBF_FOR_EACH_{mapping.upper()}_{scalar.upper()}\(X\) (.*)", mappings)[1]
            for n, rows, columns, teams in re.findall(r"X\((\d+), (\d+), (\d+), (\d+)\)", listed):
                names.add(f"{mapping} {scalar} N={n} {rows}x{columns}x{teams}")
    return {f"{entry} {name}" for entry in ("op", "step") for name in names} | {"rank_one float", "rank_one double"}


def test_table_is_whole_and_clean():
    table = json.loads(cuda_gate.PINNED.read_text())
    assert table["columns"] == cuda_gate.COLUMNS and table["nvcc"]
    expected = kernels_of_the_lists()
    assert len(expected) > 80
    for version, architectures in table["nvcc"].items():
        assert architectures.keys() == {str(a) for a in cuda_objects.ARCHITECTURES}, version
        for architecture, kernels in architectures.items():
            assert kernels.keys() == expected, f"nvcc {version}, sm_{architecture}"
            assert all(row[0] <= 255 and row[4] > 0 for row in kernels.values())
        assert cuda_gate.broken_rules(architectures) == [], version
