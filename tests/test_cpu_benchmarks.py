"""`make bench`, rehearsed with tiny sizes, and the functions that make its report and the documentation."""

import copy
import csv
import json
import re
import shutil

import pytest
import torch

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from benchmarks import methods, peers, timing  # noqa: E402
from benchmarks.cpu import __main__ as command_line  # noqa: E402
from benchmarks.cpu import goals, host, iterations, kernels, plan, publish, report, results, steps, tables  # noqa: E402
from benchmarks.cpu.knees import knees  # noqa: E402
from benchmarks.memory import state_bytes, with_peak_bytes  # noqa: E402
from benchmarks.ops import OPS  # noqa: E402
from benchmarks.problems import Problem  # noqa: E402
from mbf_kernels import backends  # noqa: E402

pytestmark = pytest.mark.skipif(backends()["cpu"] != "available", reason="measures the native CPU kernels")
NOT_HERE = {"scipy", "jax", "pytorch_optimizer", "heavyball"}  # whether they are installed or not


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """The folder of a run without other libraries, in miniature."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        for module in (kernels, steps):
            patch.setattr(module, "missing", lambda library: "not installed" if library in NOT_HERE else None)
        assert command_line.main(["--plan", "rehearsal", "--out", str(folder)]) == 0
    return folder


# the rehearsal


def test_everything_is_measured(rehearsed):
    rows = results.load(rehearsed)["rows"]
    measured = [row for row in rows if "median_us" in row]
    assert all(0 < row["p20_us"] <= row["median_us"] <= row["p80_us"] for row in measured)
    own = {(row["op"], row["n"], row["dtype"], row["layout"]) for row in measured if row.get("by") == "cpu"}
    assert len(own) == len(plan.REHEARSAL.sizes) * 2 * (len(OPS) + 1)
    assert {row["by"] for row in measured if row["part"] == "kernels"} >= {"cpu", "reference", peers.AMORTISED}
    stepped = {(row["what"], row["method"]) for row in measured if row["part"] == "steps"}
    assert stepped >= {
        (what, method) for what in plan.REHEARSAL.cases for method in ("sgd", "adam", "mbf", "mbf-paper")
    }
    hosts = {(row["work"], row["method"]) for row in measured if row["part"] == "host"}
    assert hosts >= {(host.WITHOUT_KERNELS, "mbf"), *((host.TINY, method) for method in ("sgd", "adam", "mbf"))}
    parts = {"roofs", "kernels", "against count", "against size", "steps", "host"}
    assert {row["part"] for row in measured} == parts


def test_a_part_that_is_measured_anew_takes_its_place(rehearsed, tmp_path):
    folder = tmp_path / "results"
    shutil.copytree(rehearsed, folder)
    assert command_line.main(["--plan", "rehearsal", "--out", str(folder), "--only", "roofs"]) == 0
    before, after = results.load(rehearsed), results.load(folder)
    others = [[row for row in found["rows"] if row["part"] != "roofs"] for found in (before, after)]
    assert others[0] == others[1] and len(before["rows"]) == len(after["rows"])
    assert {name: fact for name, fact in after["environment"].items() if name != "anew"} == before["environment"]
    assert after["environment"]["anew"].keys() == {"roofs"}
    assert "roofs measured anew" in report.facts(after["environment"])


def test_iterations_of_every_method():
    """On a network of two layers; the columns beside Adam's are those of the times."""
    layers = torch.nn.Sequential(torch.nn.Linear(4, 200), torch.nn.Tanh(), torch.nn.Linear(200, 100))
    layers.distribution = "categorical"
    data = torch.randn(32, 4), torch.randint(0, 100, (32,))
    problem = Problem(
        "small", "two layers", lambda: copy.deepcopy(layers), torch.nn.functional.cross_entropy, "nats", data, data,
        batch=8, steps=4, epochs=1, fast_epochs=1, judge="train_loss",
    )  # fmt: skip
    rows = list(iterations.rows_of_problem(problem, rounds=1))
    assert [row["method"] for row in rows] == list(iterations.ENTRANTS)
    cells = {row[1]: row for row in tables.iterations(rows).rows}
    assert cells["Adam (fused)"][3] == "1.00" and cells["Adam (fused)"][-2:] == ("8.00", "28.0")
    assert float(cells["K-FAC"][-2]) > 8


def test_an_average_iteration_goes_by_the_default_intervals():
    times = {"every": 10.0, "statistics": 30.0, "inverses": 130.0}
    assert iterations.ENTRANTS["adam"].average(times) == 10
    assert iterations.ENTRANTS["kfac"].average(times) == 10 + 20 / 10 + 100 / 100
    assert iterations.ENTRANTS["adafisher"].average(times) == 10 + 20 / 100
    assert iterations.ENTRANTS["kbfgs"].average(times) == 10


def test_rare_work_is_measured_over_whole_periods(rehearsed):
    (row,) = tables.timed(results.load(rehearsed)["rows"], part="steps", what="autoencoder", method="mbf-paper")
    assert row["period"] == 100 and row["samples"] % 100 == 0 and row["mean_us"] < row["worst_us"]


def test_the_folder_holds_three_files_that_agree(rehearsed):
    assert {path.name for path in rehearsed.iterdir()} == {"results.json", "results.csv", "report.html"}
    rows = results.load(rehearsed)["rows"]
    with (rehearsed / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [float(line["median_us"] or 0) for line in lines] == [row.get("median_us", 0) for row in rows]


def test_the_report_needs_no_other_file(rehearsed):
    text = (rehearsed / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', text) and "<script" not in text
    assert 'name="viewport"' in text and text.count("data:image/svg+xml;base64,") == 5
    here = results.load(rehearsed)["environment"]
    for fact in report.facts(here).values():
        assert fact in text
    for table in tables.tables(results.load(rehearsed)["rows"]).values():
        assert (f"<h2>{table.title}</h2>" in text) == bool(table.rows)


def test_who_is_absent_is_named_with_the_reason(rehearsed):
    absent = tables.absent(results.load(rehearsed)["rows"]).rows
    assert ("JAX cholesky + cho_solve", "accumulate_factor_solve_", "not installed") in absent
    reasons = {who: why for who, _, why in absent}
    assert reasons["SOAP (heavyball)"] == reasons["Shampoo (pytorch_optimizer)"] == "not installed"
    text = (rehearsed / "report.html").read_text()
    assert all(who in text for who in reasons)


def test_an_optimizer_that_fails_is_a_result_and_ours_is_a_failure(monkeypatch):
    def broken(named):
        raise RuntimeError("no kernel image")

    case = plan.Case({"layer.weight": (4, 4)})
    monkeypatch.setitem(methods.METHODS, "other", methods.Method("Other", broken, "numpy"))
    (row,) = steps.rows_of_case(plan.REHEARSAL, "net", case, ["other"])
    assert row["absent"] == "RuntimeError: no kernel image"
    monkeypatch.setitem(methods.METHODS, "other", methods.Method("Other", broken))
    with pytest.raises(RuntimeError, match="no kernel image"):
        list(steps.rows_of_case(plan.REHEARSAL, "net", case, ["other"]))


# times


def test_times_have_a_mean_and_a_worst():
    found = timing.Timing.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (found.p20, found.median, found.p80, found.mean, found.worst) == (1.8, 3.0, 4.2, 3.0, 5.0)
    assert (found / 2).median == 1.5 and (found / 2).samples == 5


def test_a_race_is_interleaved():
    seen = []
    calls = {name: lambda name=name: seen.append(name) for name in "ab"}
    found = timing.race(calls, "cpu", 0.02)
    changes = sum(one != other for one, other in zip(seen, seen[1:], strict=False))
    assert set(found) == {"a", "b"} and changes > 10


def test_an_inverse_is_amortised():
    product, inverse = (timing.Timing(*[seconds] * 5, samples=3) for seconds in (1.0, 100.0))
    found = kernels.amortised(product, inverse)
    assert found.median == 2.0 and found.worst == 100.0


@pytest.mark.parametrize("peer", peers.PEERS, ids=lambda peer: peer.label)
def test_a_peer_gives_what_the_op_gives(peer):
    if reason := peers.missing(peer.library):
        pytest.skip(reason)
    problem = OPS[peer.op].problem("cpu", 64, 5, torch.float32, "contiguous", 0)
    peer.checked_call(problem)()


def test_a_wrong_peer_is_not_timed():
    wrong = peers.Peer("wrong", peers.FUSED, "torch", lambda F, g, rhs: lambda: rhs)
    with pytest.raises(AssertionError, match="solve ratio"):
        wrong.checked_call(OPS[peers.FUSED].problem("cpu", 64, 5, torch.float32, "contiguous", 0))


# memory


def test_a_storage_is_counted_once_wherever_it_is():
    base = torch.zeros(10)

    class Holder:
        def __init__(self):
            self.parts = [base[:5], torch.zeros(2)]

    class Stub:
        state = {torch.zeros(1): {"a": base, "nested": {"holder": Holder()}, "step": 3}}

    assert state_bytes(Stub()) == 4 * 10 + 4 * 2


def test_the_peak_holds_the_state_and_the_temporaries():
    parameter = torch.nn.Parameter(torch.zeros(1000))
    parameter.grad = torch.ones(1000)

    class Doubling(torch.optim.SGD):
        def step(self):
            torch.ones(3000).mul(2)
            super().step()

    optimizer, peak = with_peak_bytes(lambda: Doubling([parameter], lr=1.0, momentum=0.9), 3)
    assert state_bytes(optimizer) == 4000
    assert 4000 + 24_000 <= peak < 4000 + 24_000 + 1000


NETWORKS = {what: case.shapes for what, case in plan.FULL.cases.items() if case.libraries}
TRANSFORMER = "transformer, 12 x 768"  # its layers are alike
NETWORKS[TRANSFORMER] = {name: shape for name, shape in NETWORKS[TRANSFORMER].items() if name.startswith("layer0.")}


@pytest.mark.parametrize("form", ["mbf", "mbf-paper"])
@pytest.mark.parametrize("what", NETWORKS)
def test_the_report_of_mbf_predicts_its_state(what, form):
    """Within one percent, before the first step; what is not predicted are counters."""
    parameters = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in NETWORKS[what].items()}
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer = methods.METHODS[form].make(list(parameters.items()))
    predicted = sum(row.bytes for row in optimizer.report())
    optimizer.step()
    assert predicted == pytest.approx(state_bytes(optimizer), rel=0.01)


# the documentation


def some_results(**facts):
    """The fewest rows from which everything can be made."""
    times = {"median_us": 10.0, "p20_us": 9.0, "p80_us": 11.0, "mean_us": 12.0, "worst_us": 30.0, "samples": 5}
    moved = {"bytes": 1000, "gbps": 10.0, "ns_per_block": 5.0, "times_copy": 2.0}
    kernel = {"part": "kernels", "op": peers.FUSED, "n": 9, "count": 100, "dtype": "float32", "layout": "contiguous"}
    step = {"part": "steps", "layout": "contiguous", "tensors": 1, "parameters": 100, "period": 1}
    step |= {"steady_bytes_per_parameter": 8.0, "peak_bytes_per_parameter": 9.0}
    curve = {"part": "against count", "n": 9, "threads": 2}
    rows = [
        {"part": "roofs", "what": "copy", "gbps": 20.0, **times},
        {"part": "roofs", "what": "matrix product", "dtype": "float32", "gflops": 100.0, **times},
        *(kernel | {"by": by} | times | moved for by in ("cpu", "reference", peers.CHOLESKY)),
        *(curve | {"count": count, **times, **moved} for count in (100, 1000)),
        *(curve | {"count": count, "threads": 1, **times, **moved} for count in (100, 1000)),
        {"part": "against size", "n": 9, "count": 100, "threads": 2, **times, **moved},
        *(
            step
            | {"what": plan.CONVOLUTIONS, "method": method, "label": methods.METHODS[method].label, **times, **moved}
            for method in ("adam", "mbf")
        ),
        {"part": "steps", "what": plan.LINEAR, "method": "muon", "label": "Muon", "absent": "no such thing"},
        {
            "part": "host",
            "what": "ResNet-50",
            "tensors": 161,
            "work": host.WITHOUT_KERNELS,
            "method": "mbf",
            "label": "MBF (grafted)",
            **times,
        },
    ]
    here = {
        "processor": "A processor", "threads": 2, "cores": 4, "load": 0.0, "isa": "avx2", "caches": {"L1": 32768},
        "system": "Linux", "python": "3.11", "torch": "2.13", "packages": {"torch": "2.13", "jax": None},
        "commit": "abc", "command": "make bench", "made": "2026-11-21", "minutes": 3.0,
    }  # fmt: skip
    return {"environment": here | facts, "rows": rows}


def test_report_and_pages_say_what_was_measured_and_what_was_missed():
    found = some_results()
    html, page, figures = report.page(found), publish.page(found), publish.figures(found)
    assert "A processor, 2 of 4 cores" in html and "no such thing" in html
    assert f"| {peers.CHOLESKY} / fused op, n = 9 | >= 50 | 1 | no |" in page and "Missed:" in page
    assert f"MBF (grafted) / Adam, {plan.CONVOLUTIONS} | <= 2.6 | 1 | yes" in page
    assert "| <= 100 us | 10.0 us | yes |" in page and "| 161 of ResNet-50 | kernels left out | MBF (grafted) |" in page
    assert "2 of 3 goals are met" in figures and "| 10.0 us | 10.0 us, 1.00 x | - | - |" in figures


def test_figures_from_a_busy_machine_say_so():
    warning = "provisional: other processes kept 3.6 cores busy"
    assert warning in publish.figures(some_results(load=3.6)) and warning in report.page(some_results(load=3.6))
    assert "provisional" not in publish.figures(some_results()) + report.page(some_results())


def test_rare_work_counts_with_its_mean():
    row = {"period": 10, "mean_us": 12.0, "median_us": 10.0}
    assert tables.step_us(row) == 12.0 and tables.step_us(row | {"period": 1}) == 10.0


def test_every_goal_compares_two_rows_that_are_measured():
    rows = [
        {"part": "kernels", "op": op, "n": n, "dtype": "float32", "by": by, "median_us": 1.0}
        for op in OPS
        for n in plan.FULL.sizes
        for by in ("cpu", peers.CHOLESKY)
    ]
    rows += [{**goals.step(what, name), "median_us": 1.0} for what in plan.FULL.cases for name in ("adam", "muon")]
    rows += [{**goals.step(what, name), "median_us": 1.0} for what in plan.FULL.cases for name in ("mbf", "mbf-paper")]
    assert len(list(goals.measured(rows))) == len(list(goals.ratios()))


def test_the_knees_in_words():
    def points(threads, *times):  # of 10, 100, 1000, 10000 blocks, in microseconds
        return [
            {"part": "against count", "n": 4, "threads": threads, "count": 10**power, "median_us": time,
             "ns_per_block": time / 10**power * 1e3}
            for power, time in enumerate(times, 1)
        ]  # fmt: skip

    rows = points(1, 2, 3, 12, 220) + points(2, 2, 4, 8, 120)
    rows += [{"part": "roofs", "what": "copy", "gbps": 10.0, "median_us": 1.0}]
    rows += [{"part": "roofs", "what": "matrix product", "dtype": "float32", "gflops": 10.0, "median_us": 1.0}]
    costs = {1: 4.8, 2: 40.0, 64: 31200.0}  # a copy of a 1x1 block's 24 bytes takes 2.4 ns
    rows += [{"part": "against size", "n": n, "ns_per_block": cost, "median_us": 1.0} for n, cost in costs.items()]
    by_count, by_size = knees(rows, {"L1": 48_000, "L2": 100_000})
    assert by_size == (
        "Against n: from n = 1 to 2 a block costs 2.00 to 7.69 times a copy of its bytes; from n = 64 to 64 a block "
        "costs 3.00 to 3.00 times its flops at full rate; the sharpest rise, beside that of F's size, is 8.33 times at "
        "n = 2."
    )
    assert by_count == (
        "n = 4: a call with 10 blocks takes 2.00 us; from 1,000 blocks on a block costs at most 1.5 times the least, "
        "8.00 ns; 2 threads pay from 1,000 blocks on. One thread: 12.0 ns in L2, 22.0 ns beyond the caches."
    )


def test_the_documentation_is_what_the_committed_results_make():
    found = results.load(publish.PUBLISHED)
    assert publish.PAGE.read_text() == publish.page(found)
    readme = publish.README.read_text()
    assert publish.BEGIN in readme and readme == publish.with_figures(readme, publish.figures(found))


def test_committed_results_are_small():
    sizes = {path.name: path.stat().st_size for path in publish.PUBLISHED.iterdir()}
    assert sizes["results.json"] < 300_000 and sizes["report.html"] < 1_500_000


def test_a_saved_number_has_four_digits(tmp_path):
    results.save(tmp_path, {"environment": {}, "rows": [{"part": "x", "median_us": 1.234567, "count": 1234567}]})
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == [
        {"part": "x", "median_us": 1.235, "count": 1234567}
    ]


def test_a_folder_is_named_after_the_processor_and_the_plan():
    assert command_line.folder_name("AMD EPYC", "full") == "amd-epyc-cpu"
    assert command_line.folder_name("AMD EPYC", "fast") == "amd-epyc-cpu-fast"
