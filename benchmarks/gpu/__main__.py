"""`make gpu`, or `python -m benchmarks.gpu`: every part in turn, most valuable first, within one time budget."""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu import build, sanitize, suite
from benchmarks.gpu.results import ROOT, Results, digest
from benchmarks.gpu.rows import run_part

HOME = ROOT / "benchmarks" / "results"
BUDGET = 530.0  # seconds in all: under nine minutes
DESCRIBE = [sys.executable, "-m", "benchmarks.gpu.environment"]


class Part(NamedTuple):
    run: Callable[[Results, float, bool], dict]  # (results, seconds, rehearse) -> its record
    seconds: float  # at most


def environment(results: Results, seconds: float, rehearse: bool) -> dict:
    """Already known: without it there would be no name for the folder."""
    return results.part("environment")


PARTS: dict[str, Part] = {
    "environment": Part(environment, 30),
    "build": Part(build.run, 240),
    "test": Part(suite.run, 200),
    "bench_copy": Part(lambda results, *rest: run_part(results, "bench_copy", *rest), 30),
    "bench_ops": Part(lambda results, *rest: run_part(results, "bench_ops", *rest), 130),
    "bench_step": Part(lambda results, *rest: run_part(results, "bench_step", *rest), 100),
    "sanitize": Part(sanitize.run, 180),
}
REPORT = "report"  # the table is written after every part; alone, this writes it anew
PARTS_HELP = f"of {', '.join([*PARTS, REPORT])}; a name stands for all that begin with it (default: all)"


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    deadline = time.monotonic() + options.seconds
    if options.parts == [REPORT]:
        return rewrite(options.out or newest())
    results = open_results(options)
    print(f"results: {results.folder}", flush=True)
    if results.part("environment")["problem"]:
        print(results.part("environment")["problem"])
        return 1
    problems = []
    for name in (name for name in options.parts if name in PARTS):
        if options.resume and results.part(name).get("done"):
            print(f"{name}: done before", flush=True)
        else:
            run(results, name, deadline - time.monotonic(), options.rehearse)
        found = results.part(name).get("problem")
        problems += [f"{name}: {found}"] if found else []
        write_table(results)
        if name == "build" and found:
            break  # nothing of what follows would measure these sources
    print("\n".join(["", *(problems or ["no problem found"]), f"table: {results.folder / 'table.md'}"]), flush=True)
    return int(bool(problems))


def rewrite(folder: Path | None) -> int:
    """The table alone, of what a folder holds: after a change of the goals, the predictions or the report."""
    if folder is None:
        print(f"no results under {HOME}")
        return 1
    write_table(Results(folder, ""))
    print(f"table: {folder / 'table.md'}")
    return 0


def run(results: Results, name: str, left: float, rehearse: bool) -> None:
    """One part, whatever happens in it."""
    print(f"\n== {name}", flush=True)
    part, start = PARTS[name], time.monotonic()
    if left < 5:
        record = results.part(name) | {"done": False, "problem": "not reached: the time was up"}
    else:
        try:
            record = part.run(results, min(part.seconds, left), rehearse)
        except Exception as error:  # the other parts are worth running
            traceback.print_exc()
            record = results.part(name) | {"done": False, "problem": f"{type(error).__name__}: {error}"}
    wall = time.monotonic() - start
    results.save(name, record | {"wall_seconds": round(wall, 1)})
    print(f"{name}: {record.get('problem') or 'done'}, {wall:.0f} s", flush=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=absolute, help="the results folder (default: benchmarks/results/GPU-DATE-COMMIT)")
    parser.add_argument("--parts", type=chosen_parts, default=list(PARTS), help=PARTS_HELP)
    parser.add_argument("--resume", action="store_true", help="skip what is recorded as done for these sources")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU; builds nothing")
    parser.add_argument("--seconds", type=float, default=BUDGET, help="time for everything (default %(default)g)")
    parser.add_argument("--commit", help="what to call the sources where git cannot tell")
    return parser.parse_args(arguments)


def absolute(text: str) -> Path:
    return Path(text).resolve()


def chosen_parts(text: str) -> list[str]:
    """The parts named, in their own order. A name stands for every part that begins with it."""
    wanted = [word for word in re.split(r"[,\s]+", text) if word]
    known = [*PARTS, REPORT]
    unknown = [word for word in wanted if not any(name.startswith(word) for name in known)]
    if unknown or not wanted:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, got {text!r}")
    return [name for name in known if any(name.startswith(word) for word in wanted)]


def open_results(options: argparse.Namespace) -> Results:
    """The folder named, or the last one of these sources to resume, or a new one named after GPU, date and commit."""
    sources = digest()
    folder = options.out or (newest(sources) if options.resume else None)
    if folder and options.resume and Results(folder, sources).part("environment"):
        return Results(folder, sources)
    here = describe(options, sources)
    folder = folder or HOME / folder_name(here)
    results = Results(folder, sources)
    results.save("environment", here)
    return results


def newest(sources: str | None = None) -> Path | None:
    """The results folder written last, of all or of these sources."""
    files = sorted(HOME.glob("*/results.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    good = (file.parent for file in files if sources is None or Results(file.parent, sources).part("environment"))
    return next(good, None)


def describe(options: argparse.Namespace, sources: str) -> dict:
    """The environment part's record."""
    scratch = Results(options.out or ROOT / "build" / "gpu", sources)
    status, text = scratch.run(DESCRIBE, PARTS["environment"].seconds)
    here = json.loads(text.splitlines()[-1]) if status == 0 else {}
    here["commit"] = here.get("commit") or options.commit
    missing = None if here.get("gpu") or options.rehearse else f"no NVIDIA GPU that torch can use: see {scratch.log}"
    return here | {
        "sources": sources, "made": date.today().isoformat(), "rehearsal": options.rehearse,
        "done": missing is None, "problem": missing,
    }  # fmt: skip


def folder_name(here: dict) -> str:
    words = [(here.get("gpu") or {}).get("name", "cpu"), here["made"], here["commit"] or here["sources"]]
    return re.sub(r"[^a-z0-9.]+", "-", "-".join(words).lower()).strip("-")


def write_table(results: Results) -> None:
    from benchmarks.gpu.report import predicted, report  # needs torch, which the parts before it need not

    (results.folder / "table.md").write_text(report(results.load(), predicted()))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started ends too
    sys.exit(main())
