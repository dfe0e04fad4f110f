"""The comparison's table and picture, of runs made up."""

import itertools
import json

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from benchmarks import compare, compare_table  # noqa: E402
from benchmarks.compare_plot import EVERYWHERE, FAMILIES  # noqa: E402
from benchmarks.optimizers import OPTIMIZERS  # noqa: E402
from benchmarks.problems import digits  # noqa: E402
from benchmarks.tuned import settings  # noqa: E402


def run(optimizer, seed, losses, note="", seconds_per_epoch=1.0):
    history = [
        {"epoch": epoch, "seconds": epoch * seconds_per_epoch, "train_loss": loss, "test_accuracy": 0.9, "test_loss": 1}
        for epoch, loss in enumerate(losses)
    ]
    options = {"lr": 0.1, "damping": 0.03}
    return {"problem": "digits", "optimizer": optimizer, "options": options, "seed": seed, "note": note,
            "iteration_ms": 5.0, "history": history}  # fmt: skip


@pytest.fixture(scope="module")
def problem():
    return digits()


def test_the_table_has_medians_and_ranges_at_equal_epochs_and_equal_seconds(problem):
    after = [2.0 - 0.1 * epoch for epoch in range(problem.epochs + 1)]  # 2.0 - 0.1 epoch
    fast = [run("kfac", seed, [scale * loss for loss in after]) for seed, scale in enumerate((1.0, 3.0, 2.0))]
    slow = [run("adam", seed, after, seconds_per_epoch=2.0) for seed in range(3)]
    text = compare_table.table(problem, fast + slow, seconds=5.0)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    adam, kfac = rows[2:]  # the lowest median after all epochs first
    assert [adam[0], kfac[0]] == ["Adam", "K-FAC"] and kfac[1] == "lr 0.1, damping 0.03"
    assert kfac[4] == "1.6 (0.8 to 2.4)" and kfac[6] == "3 (1.5 to 4.5)" and kfac[7] == "5"
    assert adam[4] == "0.8 (0.8 to 0.8)" and adam[6] == "1.8 (1.8 to 1.8)" and adam[7] == "2"


def test_what_a_method_reaches_untuned(problem, monkeypatch):
    found = {"kfac": [({"lr": 1e-2, "damping": 1e-2}, 0.25), ({"lr": 1.0, "damping": 1e-2}, None)],
             "adam": [({"lr": 1e-3}, None)], "muon": [({"lr": 1e-4}, 1.0)]}  # fmt: skip
    trials = {name: [{"options": o, "loss": loss} for o, loss in tried] for name, tried in found.items()}
    monkeypatch.setattr(compare_table, "load", lambda: {"digits": trials})
    cells = [compare_table.untuned(problem, name) for name in ("kfac", "adam", "muon", "mbf")]
    assert cells == ["0.25", "failed", "", ""]


def test_a_method_without_results_says_why_and_comes_last(problem):
    good = [run("sgd", 0, [1.0] * (problem.epochs + 1))]
    absent = [run("muon", 0, [], "does not apply: no matrices")]
    diverged = [run("kbfgs", 0, [1.0, None], "diverged in epoch 1")]
    text = compare_table.table(problem, absent + diverged + good, seconds=5.0)
    lines = text.splitlines()[4:]
    assert lines[0].startswith("| SGD") and "no matrices" in text and "diverged in epoch 1" in text


def test_every_method_has_a_place_in_the_picture():
    placed = [name for members in FAMILIES.values() for name in members]
    assert sorted([*placed, *EVERYWHERE]) == sorted(OPTIMIZERS)


def test_pictures_and_a_page_are_written(problem, tmp_path):
    runs = [run("adam", seed, [2.0] * (problem.epochs + 1)) for seed in range(2)]
    runs += [run("kfac", 0, [2.0, None], "diverged in epoch 1"), run("muon", 0, [], "does not apply")]
    compare.save({"environment": {}, "runs": runs}, tmp_path / "runs.json")
    results = json.loads((tmp_path / "runs.json").read_text())
    assert results["runs"] == runs
    compare.draw(results, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"digits.png", "runs.json"}
    once = compare.page(f"before\n{compare.BEGIN}{compare.END}after\n", results)
    assert "diverged in epoch 1" in once and once.startswith("before") and once.endswith("after\n")
    assert compare.page(once, results) == once


def test_what_is_missing():
    """Runs with other settings, of other seeds or methods; seeds on the outside."""
    done = [
        run("adam", 0, []) | {"options": settings("digits", "adam")},
        run("kfac", 0, []) | {"options": settings("digits", "kfac") | {"lr": -1}},
    ]
    left = [(problem.name, *rest) for problem, *rest in compare.missing(["digits"], ["adam", "kfac"], [0, 1], done)]
    assert left == [("digits", "kfac", 0), ("digits", "adam", 1), ("digits", "kfac", 1)]


def test_the_page_shows_the_results_that_are_committed():
    results = json.loads((compare.RESULTS / "runs.json").read_text())
    text = compare.PAGE.read_text()
    assert compare.BEGIN in text and text == compare.page(text, results)
    runs = {(run["problem"], run["optimizer"], run["seed"]): run["options"] for run in results["runs"]}
    assert set(runs) == set(itertools.product(compare.SECONDS, OPTIMIZERS, range(3)))
    assert all(options == settings(problem, name) for (problem, name, _), options in runs.items())


def test_numbers_are_rounded_to_five_digits():
    assert compare.rounded({"a": [1.23456789, 7, "x", None]}) == {"a": [1.2346, 7, "x", None]}
