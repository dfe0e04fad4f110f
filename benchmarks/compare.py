"""Compare all optimizers as tuned, over several seeds: python -m benchmarks.compare

Every run takes the problem's epochs, and goes on until its seconds are over where those are more, so that losses are
known after equal epochs and after equal time. Every run is saved in runs.json of --out as soon as it ends; --resume
goes on with those that are there, of the same settings. A picture per problem is drawn beside it, a table printed;
--publish writes the tables into docs/comparison.md too.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.compare_plot import plot
from benchmarks.compare_table import table
from benchmarks.demo import attempt, plain
from benchmarks.environment import environment
from benchmarks.markdown import between
from benchmarks.optimizers import OPTIMIZERS
from benchmarks.problems import PROBLEMS, Problem
from benchmarks.tuned import settings

SECONDS = {"curves": 30.0, "digits": 3.0}  # twice what Adam takes for all epochs, or more
RESULTS = Path(__file__).with_name("results") / "comparison"
PAGE = Path(__file__).parents[1] / "docs" / "comparison.md"
BEGIN, END = "<!-- tables: written by `python -m benchmarks.compare --publish` -->\n", "<!-- end of tables -->\n"


def missing(
    names: list[str], optimizers: list[str], seeds: list[int], done: list[dict]
) -> Iterator[tuple[Problem, str, int]]:
    """The runs that are not there yet with today's settings. Seeds outside optimizers, so that what slows the machine
    for a while does not hit one optimizer alone."""
    there = [(run["problem"], run["optimizer"], run["seed"], run["options"]) for run in done]
    for name in names:
        problem = PROBLEMS[name]()
        for seed in seeds:
            for optimizer in optimizers:
                if (name, optimizer, seed, settings(name, optimizer)) not in there:
                    yield problem, optimizer, seed


def draw(results: dict, out: Path) -> None:
    for problem, runs in _by_problem(results):
        plot(problem, runs, SECONDS[problem.name], out / f"{problem.name}.png")


def tables(results: dict) -> str:
    return "\n\n".join(table(problem, runs, SECONDS[problem.name]) for problem, runs in _by_problem(results)) + "\n"


def _by_problem(results: dict) -> Iterator[tuple[Problem, list[dict]]]:
    for name in dict.fromkeys(run["problem"] for run in results["runs"]):
        yield PROBLEMS[name](), [run for run in results["runs"] if run["problem"] == name]


def page(text: str, results: dict) -> str:
    """The text of the page, its tables those of the results."""
    return between(text, BEGIN, END, tables(results))


def save(results: dict, file: Path) -> None:
    """A run a line."""
    runs = ",\n".join(json.dumps(run, allow_nan=False) for run in results["runs"])
    file.write_text(f'{{"environment": {json.dumps(results["environment"])},\n"runs": [\n{runs}\n]}}\n')


def rounded(value):
    """Numbers to five digits: of losses and seconds the rest is noise."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", choices=SECONDS, nargs="+", default=list(SECONDS))
    parser.add_argument("--optimizer", choices=OPTIMIZERS, nargs="+", default=list(OPTIMIZERS))
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--publish", action="store_true")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "runs.json"
    results = {"environment": environment("cpu"), "runs": []}
    if args.resume and file.exists():
        found = json.loads(file.read_text())["runs"]
        results["runs"] = [run for run in found if run["options"] == settings(run["problem"], run["optimizer"])]
    for problem, optimizer, seed in missing(args.problem, args.optimizer, args.seed, results["runs"]):
        how = {"epochs": problem.epochs, "seconds": SECONDS[problem.name], "seed": seed}
        results["runs"].append(rounded(plain(attempt(problem, optimizer, **how))))
        save(results, file)
    draw(results, args.out)
    print(tables(results))
    if args.publish:
        PAGE.write_text(page(PAGE.read_text(), results))


if __name__ == "__main__":
    main()
