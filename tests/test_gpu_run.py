"""`make gpu`, rehearsed: every part but the build and the suite on a CPU, and the pure functions of all."""

import json
import subprocess
import sys
import time
from math import prod
from pathlib import Path

import pytest
import torch

from benchmarks import methods, shapes, timing
from benchmarks.goals import find
from benchmarks.gpu import __main__ as command_line
from benchmarks.gpu import (
    build,
    copies,
    goals,
    ops,
    report,
    rows,
    sanitize,
    sanitize_cases,
    steps,
    suite,
)
from benchmarks.gpu.results import ROOT, Results, child_environment, digest
from benchmarks.gpu.setting import GIB, Setting
from benchmarks.ops import FUSED

GPU = Setting("cuda", "cuda", True, True, 2 * GIB, 50 * 2**20, 0.3)


def rehearse(folder, *options):
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--out", str(folder), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150, env=child_environment())


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """The folder of a rehearsal, and what it printed."""
    folder = tmp_path_factory.mktemp("gpu")
    done = rehearse(folder, "--parts", "environment,bench,sanitize")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


# the rehearsal


def test_a_rehearsal_measures_every_row_of_every_part(rehearsed):
    folder, _ = rehearsed
    parts = json.loads((folder / "results.json").read_text())["parts"]
    assert set(parts) == {"environment", "bench_copy", "bench_ops", "bench_step", "sanitize"}
    assert all(part["done"] and part["problem"] is None for part in parts.values())
    for name in ("bench_copy", "bench_ops", "bench_step"):
        assert parts[name]["rows"] and len(parts[name]["rows"]) == parts[name]["total"]
        assert all(0 < row["p20_us"] <= row["median_us"] <= row["p80_us"] for row in parts[name]["rows"])


def test_the_results_are_a_few_flat_files(rehearsed):
    folder, _ = rehearsed
    assert {path.name for path in folder.iterdir()} == {"results.json", "table.md", "log.txt"}
    table = (folder / "table.md").read_text()
    assert table.startswith("# Rehearsal") and "## Failed" not in table
    assert "accumulate_factor_solve_ n=9" in table and "step of resnet50 3x3: mbf" in table


def test_a_resumed_run_repeats_nothing_that_is_done(rehearsed):
    folder, _ = rehearsed
    before = (folder / "results.json").read_text()
    again = rehearse(folder, "--parts", "bench,sanitize", "--resume")
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("done before") == 4
    assert (folder / "results.json").read_text() == before


def test_the_table_can_be_written_anew(rehearsed, capsys):
    folder, _ = rehearsed
    table = (folder / "table.md").read_text()
    (folder / "table.md").unlink()
    assert command_line.main(["--parts", "report", "--out", str(folder)]) == 0
    assert (folder / "table.md").read_text() == table


# rows


def a_row(name, run=lambda: {"median_us": 1.0}, limit=60.0):
    return rows.Row(name, run, {"op": name}, limit)


def broken():
    raise ValueError("no such mapping")


def test_a_row_that_raises_is_recorded_and_the_next_one_runs(tmp_path):
    results = Results(tmp_path, "sources")
    status = rows.measure_rows(results, "bench_ops", [a_row("a"), a_row("b", broken), a_row("c")], 60)
    record = results.part("bench_ops")
    assert status == 0 and record["done"]
    assert [row.get("error") for row in record["rows"]] == [None, "ValueError: no such mapping", None]
    assert rows.problem(record) == "1 rows failed"


def test_rows_go_on_where_they_were_cut_off(tmp_path):
    results = Results(tmp_path, "sources")
    plan = [a_row("a"), a_row("b"), a_row("c")]
    assert rows.measure_rows(results, "bench_ops", plan, seconds=-1) == 0
    assert rows.problem(results.part("bench_ops")) == "only 0 of 0 rows were reached"
    results.save("bench_ops", {"rows": [{"name": "a", "median_us": 7.0}]})
    rows.measure_rows(results, "bench_ops", plan, 60)
    record = results.part("bench_ops")
    assert [row["name"] for row in record["rows"]] == ["a", "b", "c"] and record["rows"][0]["median_us"] == 7.0


def test_a_row_that_breaks_the_device_ends_its_process(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "tidy", lambda: False)
    results = Results(tmp_path, "sources")
    assert rows.measure_rows(results, "bench_ops", [a_row("a", broken), a_row("b")], 60) == rows.LOST
    record = results.part("bench_ops")
    assert [row["name"] for row in record["rows"]] == ["a"] and not record["done"]


def test_a_hung_row_takes_its_process_down_and_is_recorded(tmp_path):
    """What the parent does: start, record the row that ended the process, start again after it."""
    script = (
        "import sys, time; from pathlib import Path; from benchmarks.gpu import rows;"
        "from benchmarks.gpu.results import Results;"
        "plan = [rows.Row('hangs', lambda: time.sleep(60), {}, 0.5), rows.Row('runs', lambda: {'median_us': 1.0}, {})];"
        "sys.exit(rows.measure_rows(Results(Path(sys.argv[1]), 'sources'), 'bench_ops', plan, 60))"
    )
    results = Results(tmp_path, "sources")
    command = [sys.executable, "-c", script, str(tmp_path)]
    status, _ = results.run(command, 60)
    assert status not in (0, 124)
    record = rows.after(results.part("bench_ops"), status)
    assert [row["name"] for row in record["rows"]] == ["hangs"] and "died" in record["rows"][0]["error"]
    results.save("bench_ops", record)
    assert results.run(command, 60)[0] == 0
    assert [row["name"] for row in results.part("bench_ops")["rows"]] == ["hangs", "runs"]


def test_a_row_that_ran_out_of_time_is_no_failure():
    record = {"done": False, "total": 2, "rows": [], "running": "a"}
    assert rows.after(record, 124)["rows"] == []
    assert rows.after({}, 1) == {"done": False, "total": 0, "rows": []}


def test_rows_have_names_of_their_own():
    for module in (copies, ops, steps):
        names = [row.name for row in module.rows(GPU)]
        assert len(names) == len(set(names)) and names


def test_every_goal_compares_two_rows_that_are_measured():
    measured = [{**row.facts, "median_us": 1.0} for module in (ops, steps) for row in module.rows(GPU)]
    for ratio in goals.ratios():
        if "muon" in ratio.by.values() and "muon" not in methods.METHODS:
            continue
        of, by = find(measured, ratio.of), find(measured, ratio.by)
        assert of and by and of != by, ratio.what
    assert find(measured, goals.HOST_MICROSECONDS[0])


# results


def test_results_of_other_sources_do_not_count(tmp_path):
    Results(tmp_path, "old").save("build", {"done": True})
    assert Results(tmp_path, "old").part("build")["done"]
    assert Results(tmp_path, "new").part("build") == {}
    Results(tmp_path, "new").save("test", {"done": True})
    assert set(Results(tmp_path, "new").load()["parts"]) == {"build", "test"}


def test_the_digest_knows_every_source(tmp_path):
    for name in ("CMakeLists.txt", "setup.py", "pyproject.toml"):
        (tmp_path / name).write_text("")
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    kernel = tmp_path / "csrc" / "cuda" / "thread.cuh"
    kernel.write_text("one")
    first = digest(tmp_path)
    (tmp_path / "csrc" / "notes.md").write_text("no source")
    assert digest(tmp_path) == first
    kernel.write_text("two")
    assert digest(tmp_path) != first


def test_a_command_is_stopped_when_its_time_is_up(tmp_path):
    """With what it started: the child of the shell would go on otherwise."""
    marker = tmp_path / "late"
    results = Results(tmp_path, "sources")
    start = time.monotonic()
    status, output = results.run(["sh", "-c", f"echo begun; (sleep 3; touch {marker}) & wait"], 1)
    assert status == 124 and output == "begun\n" and time.monotonic() - start < 3
    time.sleep(max(0.0, start + 3.5 - time.monotonic()))
    assert not marker.exists()
    assert "begun" in results.log.read_text()


def test_children_find_the_packages_and_not_the_network(monkeypatch):
    monkeypatch.setenv("MBF_BACKEND", "reference")
    environment = child_environment()
    assert environment["PIP_NO_INDEX"] == "1" and "MBF_BACKEND" not in environment
    assert environment["PATH"].split(":")[0] == str(Path(sys.executable).parent)
    assert environment["PYTHONPATH"].startswith(f"{ROOT}:{ROOT / 'python'}")


# the build


class Stub(Results):
    """Records the commands and answers them in turn."""

    def __init__(self, folder, answers):
        super().__init__(folder, "sources")
        self.answers, self.commands = list(answers), []

    def run(self, command, seconds, env=None, **options):
        self.commands.append((command, env))
        return self.answers.pop(0)


AVAILABLE = (0, 'a warning\n{"cuda": "available"}\n')


def test_the_build_is_for_this_gpu_and_needs_no_network(tmp_path):
    results = Stub(tmp_path, [(0, "ptxas info : Used 72 registers\n    0 bytes spill stores"), AVAILABLE])
    results.save("environment", {"gpu": {"capability": "9.0"}})
    record = build.run(results, 60, rehearse=False)
    assert record["done"] and record["problem"] is None
    assert record["printed"] == {"kernels": 1, "most_registers": 72, "spilled": 0}
    _, env = results.commands[0]
    assert env == {"MBF_NATIVE": "1", "MBF_CUDA": "ON", "MBF_CUDA_ARCHITECTURES": "90"}


@pytest.mark.parametrize("answer", ["error: externally-managed-environment", "No module named 'setuptools'"])
def test_where_pip_cannot_install_the_build_is_in_place(tmp_path, monkeypatch, answer):
    monkeypatch.setattr(build, "pip_may_install", lambda: True)
    results = Stub(tmp_path, [(1, answer), (0, ""), AVAILABLE])
    assert build.run(results, 60, rehearse=False)["done"]
    assert [command for command, _ in results.commands] == [build.EDITABLE, build.IN_PLACE, build.BACKENDS]
    assert {"--no-build-isolation", "--no-deps"} <= set(build.EDITABLE)


def test_what_does_not_compile_is_not_tried_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "pip_may_install", lambda: True)
    results = Stub(tmp_path, [(1, "ninja: build stopped: subcommand failed.")])
    record = build.run(results, 60, rehearse=False)
    assert not record["done"] and "failed with status 1" in record["problem"]


def test_a_build_without_cuda_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "pip_may_install", lambda: False)
    results = Stub(tmp_path, [(0, ""), (0, '{"cuda": "no driver"}')])
    assert build.run(results, 60, rehearse=False)["problem"] == "backend cuda: no driver"


def test_a_system_python_is_not_altered(monkeypatch):
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    assert build.commands() == [build.IN_PLACE]


# the suite

JUNIT = """<testsuites><testsuite tests="5">
<testcase classname="tests.test_ops" name="test_fused[dtype0-4-9-cuda]"/>
<testcase classname="tests.test_ops" name="test_fused[triton-4-9]"/>
<testcase classname="tests.test_ops" name="test_solve[cuda-21]"><failure message="ratio: nan">...</failure></testcase>
<testcase classname="tests.test_triton" name="test_triton_compiles"><skipped message="no GPU"/></testcase>
<testcase classname="tests.test_blocks" name="test_cat"/>
</testsuite></testsuites>"""


def test_junit_counts_by_backend(tmp_path):
    file = tmp_path / "report.xml"
    file.write_text(JUNIT)
    counts, failures = suite.parse(file)
    assert counts == {
        "cuda": {"passed": 1, "failure": 1},
        "no backend": {"passed": 1, "skipped": 1},
        "triton": {"passed": 1},
    }
    assert failures == [{"test": "tests.test_ops::test_solve[cuda-21]", "message": "ratio: nan"}]


class Suite(Stub):
    """Writes a JUnit file as pytest would."""

    def run(self, command, seconds, env=None, **options):
        report_file = next(word.split("=", 1)[1] for word in command if word.startswith("--junitxml="))
        status, xml = self.answers.pop(0)
        if xml:
            Path(report_file).write_text(xml)
        self.commands.append((command, env))
        return status, "= 1 passed ="


def junit(name):
    return f'<testsuite><testcase classname="t" name="{name}"/></testsuite>'


def test_the_suite_must_run_on_cuda_and_triton(tmp_path):
    answers = [(0, junit("t[cuda]")), (5, junit("t[reference]")), (0, junit("t[cpu]"))]
    record = suite.run(Suite(tmp_path, answers), 600, rehearse=False)
    assert record["done"] and record["problem"] == "no triton test passed"
    assert record["counts"]["cuda"] == {"passed": 1}
    assert not list(tmp_path.glob("*.xml"))


def test_a_suite_that_was_cut_off_goes_on(tmp_path):
    first = Suite(tmp_path, [(0, junit("t[cuda]")), (124, None), (124, None)])
    record = suite.run(first, 600, rehearse=False)
    assert not record["done"] and record["problem"] == "no triton test passed, not all of the suite was run"
    first.save("test", record)
    second = Suite(tmp_path, [(0, junit("t[triton]")), (0, junit("t[cpu]"))])
    record = suite.run(second, 600, rehearse=False)
    assert record["done"] and record["problem"] is None and len(second.commands) == 2


def test_the_steps_of_the_suite_are_all_of_it():
    """Whatever a test is called, exactly one of the three expressions selects it."""
    for name in ("test_a", "test_cuda", "test_triton", "test_cuda_triton"):
        words = {"cuda": "cuda" in name, "triton": "triton" in name}
        assert sum(bool(eval(expression, {}, words)) for expression in suite.STEPS.values()) == 1


# the sanitizers

CLEAN = """========= COMPUTE-SANITIZER
cases 100 of 120
cases 120 of 120
========= ERROR SUMMARY: 0 errors
"""
OUT_OF_BOUNDS = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at void mbf::step<float>(mbf::Problem)+0x2f0
=========     by thread (31,0,0) in block (0,0,0)
cases 120 of 120
========= ERROR SUMMARY: 1 error
"""
RACE = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at mbf::block+0x10 and Read access at mbf::block+0x20 [16 hazards]
cases 120 of 120
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
NOT_SUPPORTED = """========= COMPUTE-SANITIZER
========= Error: Device not supported. Please refer to the "Supported Devices" section
wrong: check_step(1,) thread: RuntimeError: CUDA error 999
cases 20 of 120
========= ERROR SUMMARY: 1 error
"""


@pytest.mark.parametrize(
    "text, status, state",
    [
        (CLEAN, 0, "clean"),
        (
            CLEAN.replace("ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"),
            0,
            "clean",
        ),
        (CLEAN.replace("cases 120", "cases 110"), 0, "clean so far"),
        (OUT_OF_BOUNDS, 9, "errors"),
        (RACE, 9, "errors"),
        (NOT_SUPPORTED, 1, "unsupported"),
        (CLEAN.replace("cases 120", "wrong: check_fused(9,): AssertionError: nan\ncases 120"), 1, "errors"),
        ("cases 100 of 120\n", 124, "unfinished"),
        ("cases 120 of 120\n", 0, "broken"),  # the tool said nothing
        ("Traceback (most recent call last):\n", 1, "broken"),
        ("", -11, "broken"),
    ],
)
def test_what_a_sanitizer_says(text, status, state):
    assert sanitize.verdict(text, status)["state"] == state


def test_a_sanitizer_s_findings_are_kept():
    found = sanitize.verdict(OUT_OF_BOUNDS, 9)
    assert found["errors"] == 1 and "Invalid __global__ read" in found["first"][0]
    assert (
        sanitize.problem({"memcheck": [found], "racecheck": [sanitize.verdict(NOT_SUPPORTED, 1)]}) == "memcheck: errors"
    )


def test_a_machine_without_the_sanitizer_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sanitize.shutil, "which", lambda *_, **__: None)
    record = sanitize.run(Results(tmp_path, "sources"), 60, rehearse=False)
    assert record["problem"] is None and record["note"] == "compute-sanitizer is not installed"


def test_every_tool_is_run_and_heard(tmp_path, monkeypatch):
    """With a stand-in for compute-sanitizer, in which racecheck finds a race."""
    (tmp_path / "clean").write_text(CLEAN)
    (tmp_path / "race").write_text(RACE)
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        "#!/bin/sh\ncd $(dirname $0)\n"
        'case "$*" in *"--tool racecheck"*) cat race; exit 9;; *"-m benchmarks.gpu.sanitize_cases"*) cat clean;; esac\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    record = sanitize.run(Results(tmp_path, "sources"), 60, rehearse=False)
    states = {name: [shard["state"] for shard in shards] for name, shards in record["tools"].items()}
    assert states == {tool: ["errors" if tool == "racecheck" else "clean"] * 2 for tool in sanitize.TOOLS}
    assert record["problem"] == "racecheck: errors" and record["done"]


def test_the_sanitized_cases_reach_every_mapping_s_ends():
    todo = list(sanitize_cases.cases(sanitize_cases.SIZES, sanitize_cases.COUNTS, forced=True))
    for mapping, largest in sanitize_cases.MAPPINGS.items():
        sizes = {arguments[0] for _, arguments, forced in todo if forced == mapping and torch.float32 in arguments}
        assert {1, largest} <= sizes and max(sizes) == largest
    assert {arguments[1] for _, arguments, _ in todo} == {1, 31, 32, 33}


@pytest.mark.parametrize("form", sanitize_cases.FORMS)
def test_a_step_that_does_nothing_is_found(monkeypatch, form):
    """The cases' own check bites: here only the float64 reference moves."""
    real = sanitize_cases.mbf_step_

    def lazy(weights, grads, momenta, fishers, **options):
        if weights[0].dtype == torch.float64:
            return real(weights, grads, momenta, fishers, **options)
        return [torch.zeros(fisher.count, dtype=torch.int32) for fisher in fishers]

    monkeypatch.setattr(sanitize_cases, "mbf_step_", lazy)
    with pytest.raises(AssertionError, match="error of the momenta"):
        sanitize_cases.check_step("cpu", 9, 33, torch.float32, "contiguous", form)


def test_a_step_of_rank_one_that_does_nothing_is_found(monkeypatch):
    real = sanitize_cases.rank_one_step_
    monkeypatch.setattr(
        sanitize_cases, "rank_one_step_", lambda w, *rest, **step: w[0].dtype != torch.float64 or real(w, *rest, **step)
    )
    with pytest.raises(AssertionError, match="error of the momenta"):
        sanitize_cases.check_rank_one("cpu", 9, 33, torch.float32, "contiguous")


def test_a_wrong_case_is_reported(capsys):
    def wrong(device, n):
        raise AssertionError("error of F: nan")

    done, failed = sanitize_cases.run([(wrong, (9,), None), (lambda device, n: None, (9,), None)], "cpu", float("inf"))
    assert (done, failed) == (2, 1)
    assert sanitize.verdict(capsys.readouterr().out, 1)["first"] == [
        "wrong: wrong(9,) None: AssertionError: error of F: nan"
    ]


# timing, shapes, report, command line


def test_calls_are_taken_in_turn():
    seen = []
    result = timing.measure([lambda: seen.append("a"), lambda: seen.append("b")], "cpu", 0.001)
    assert seen[:4] == ["a", "b", "a", "b"]
    assert 0 < result.p20 <= result.median <= result.p80


def test_percentiles_are_interpolated():
    found = timing.Timing.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (found.p20, found.median, found.p80) == (1.8, 3.0, 4.2)
    assert found.record(6_000_000_000)["gbps"] == pytest.approx(2.0)


def test_the_networks_have_their_known_sizes():
    assert (len(shapes.resnet50()), sum(map(prod, shapes.resnet50().values()))) == (161, 25_557_032)
    assert sum(map(prod, shapes.filters(shapes.resnet50()).values())) == 9 * 1_257_472
    known = {shapes.resnet18: 11_689_512, shapes.resnet32: 464_154, shapes.vgg16: 14_719_818}
    for network, count in known.items():
        assert sum(map(prod, network().values())) == count
    assert sum(map(prod, shapes.transformer().values())) == 12 * 7_087_872
    assert sum(map(prod, shapes.autoencoder(784, 1000, 500, 250, 30).values())) == 2_837_314


def test_a_check_does_not_pass_nan_or_a_wrong_step():
    start = torch.zeros(4, 4, 3, 3, dtype=torch.float64)
    truth = start + 1
    methods.check_step(truth.float(), truth, start, 9, 10)
    for wrong in (float("nan"), 2.0):
        with pytest.raises(AssertionError):
            methods.check_step(torch.full_like(truth, wrong).float(), truth, start, 9, 10)


def kernel(**facts):
    row = {"name": "fused n=9", "op": FUSED, "n": 9, "dtype": "float32", "mapping": "default", "full": True}
    timed = {"backend": "cuda", "median_us": 10.0, "p20_us": 9.0, "p80_us": 20_000.0, "gbps": 2550.0}
    return row | timed | facts


def test_a_row_stands_beside_its_goal_and_its_prediction():
    predictions = {
        "accumulate_factor_solve_ n=9 float32 thread": {"percent_of_copy": 92, "limit": "memory"},
        "accumulate_factor_solve_ n=9 float32 group": {"percent_of_copy": 60, "limit": "issue"},
    }
    expected = ("fused n=9", "10.0 us", "9.00 us", "20.0 ms", "2550", "85", "85", "1.00", "92 (memory)")
    assert report.cells(kernel(), 3000.0, predictions) == expected
    assert report.cells(kernel(mapping="group"), 3000.0, predictions)[6:] == ("", "", "60 (issue)")
    assert report.cells(kernel(backend="triton"), 3000.0, predictions)[6:] == ("", "", "")


def test_the_table_says_what_failed_and_what_was_reached():
    table = report.report(
        {
            "parts": {
                "environment": {"device": "a GPU", "done": True},
                "test": {"done": True, "problem": "2 tests failed", "counts": {"cuda": {"passed": 5, "failure": 2}}},
                "bench_copy": {"done": True, "rows": [{"name": "copy", "op": "copy", "gbps": 3000.0, **TIMES}]},
                "bench_step": {
                    "done": False,
                    "rows": [
                        {"name": "mbf", **goals.step("resnet50 3x3", "mbf"), **TIMES, "median_us": 30.0},
                        {"name": "adam", **goals.step("resnet50 3x3", "adam"), **TIMES},
                        {"name": "broken", "op": "step", "error": "ValueError: two\nlines"},
                    ],
                },
            }
        },
        {},
    )
    assert "| test | 2 tests failed | cuda: 5 passed, 2 failure | 0 s |" in table
    assert "contiguous, eager: mbf / fused Adam | 3 | <= 2.4 | no |" in table
    assert "- broken: ValueError: two lines" in table
    assert "| bench_step | not finished | 3 rows | 0 s |" in table


TIMES = {"median_us": 10.0, "p20_us": 9.0, "p80_us": 11.0}


def test_parts_are_chosen_by_the_beginnings_of_their_names():
    assert command_line.chosen_parts("test, bench") == ["test", "bench_copy", "bench_ops", "bench_step"]
    for wrong in ("tests", ""):
        with pytest.raises(Exception, match="expected some of environment, build"):
            command_line.chosen_parts(wrong)


def test_a_part_that_raises_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(command_line.PARTS, "build", command_line.Part(lambda *_: broken(), 60))
    results = Results(tmp_path, "sources")
    command_line.run(results, "build", 60, rehearse=False)
    assert results.part("build")["problem"] == "ValueError: no such mapping"
    command_line.run(results, "test", 1, rehearse=False)
    assert results.part("test")["problem"] == "not reached: the time was up"


def test_the_folder_is_named_after_gpu_date_and_commit():
    here = {"gpu": {"name": "NVIDIA H100 80GB HBM3"}, "made": "2026-11-21", "commit": "19b7787-dirty", "sources": "ab"}
    assert command_line.folder_name(here) == "nvidia-h100-80gb-hbm3-2026-11-21-19b7787-dirty"
    assert command_line.folder_name(here | {"gpu": None, "commit": None}) == "cpu-2026-11-21-ab"
