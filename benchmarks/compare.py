"""Compare all optimizers as tuned, over several seeds: python -m benchmarks.compare

Every run takes the problem's epochs, and goes on until its seconds are over where those are more, so that losses are
known after equal epochs and after equal time. Writes runs.json, a table in Markdown and a picture per problem into
--out; --redraw makes those anew from the runs.json that is there.
"""

import argparse
import json
from pathlib import Path

import torch

from benchmarks.compare_plot import plot
from benchmarks.compare_table import table
from benchmarks.demo import attempt, plain
from benchmarks.environment import environment
from benchmarks.optimizers import OPTIMIZERS
from benchmarks.problems import PROBLEMS

SECONDS = {"curves": 30.0, "digits": 3.0}  # twice what Adam takes for all epochs, or more
RESULTS = Path(__file__).with_name("results") / "comparison"


def runs(names: list[str], optimizers: list[str], seeds: list[int]) -> list[dict]:
    """Seeds on the outside, so that what slows the machine for a while does not hit one optimizer alone."""
    done = []
    for name in names:
        problem = PROBLEMS[name]()
        for seed in seeds:
            for optimizer in optimizers:
                done.append(attempt(problem, optimizer, epochs=problem.epochs, seconds=SECONDS[name], seed=seed))
    return done


def write(results: dict, out: Path) -> None:
    """The pictures and the tables."""
    tables = []
    for name in dict.fromkeys(run["problem"] for run in results["runs"]):
        problem, own = PROBLEMS[name](), [run for run in results["runs"] if run["problem"] == name]
        plot(problem, own, SECONDS[name], out / f"{name}.png")
        tables.append(table(problem, own, SECONDS[name]))
    (out / "tables.md").write_text("\n\n".join(tables) + "\n")


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
    parser.add_argument("--redraw", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "runs.json"
    if not args.redraw:
        done = runs(args.problem, args.optimizer, args.seed)
        results = {"environment": environment("cpu"), "seconds": SECONDS, "runs": done}
        file.write_text(json.dumps(rounded(plain(results)), allow_nan=False) + "\n")
    write(json.loads(file.read_text()), args.out)


if __name__ == "__main__":
    main()
