"""Runs the rows of a measuring part, in a process of its own: `python -m benchmarks.gpu.rows bench_ops --out FOLDER`.

A row that raises is recorded and the next one runs. A row that hangs or breaks the GPU's context takes the process
with it: the parent records that, and a new process goes on after it.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu.results import Results, digest

MODULES = {"bench_copy": "copies", "bench_ops": "ops", "bench_step": "steps"}
LOST = 3  # status of a process whose GPU context is beyond use


class Row(NamedTuple):
    name: str
    run: Callable[[], dict]
    facts: dict  # what is measured, for the report to find it by
    limit: float = 90.0  # seconds after which it counts as hung


def measure_rows(results: Results, part: str, rows: Iterable[Row], seconds: float) -> int:
    """Runs the rows that have no record yet, until the time is up. Returns the process's exit status."""
    deadline = time.monotonic() + seconds
    rows = list(rows)
    record = {"done": False, "total": len(rows), "rows": results.part(part).get("rows", [])}
    taken = {row["name"] for row in record["rows"]}
    for row in rows:
        if row.name in taken:
            continue
        if time.monotonic() > deadline:
            print(f"{part}: time is up, {len(rows) - len(record['rows'])} of {len(rows)} rows left", flush=True)
            return 0
        results.save(part, record | {"running": row.name})
        measured, usable = attempt(row)
        record["rows"].append(measured)
        results.save(part, record)
        print(line(measured), flush=True)
        if not usable:
            return LOST
    results.save(part, record | {"done": True})
    return 0


def attempt(row: Row) -> tuple[dict, bool]:
    """The row's record, and whether the device can be used further."""
    faulthandler.dump_traceback_later(row.limit, exit=True)
    start = time.perf_counter()
    try:
        measured = row.run()
    except Exception as error:  # whatever a row raises belongs in its record
        measured = {"error": f"{type(error).__name__}: {error}"[:500], "traceback": traceback.format_exc()[-2000:]}
    finally:
        faulthandler.cancel_dump_traceback_later()
    usable = tidy()
    return {"name": row.name, **row.facts, **measured, "seconds": round(time.perf_counter() - start, 2)}, usable


def tidy() -> bool:
    """Frees the device's memory; False if the device no longer answers."""
    import torch

    gc.collect()
    if not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def line(row: dict) -> str:
    if "error" in row:
        return f"{row['name']:78} FAILED {row['error'].splitlines()[0]}"
    rate = f"{row['gbps']:8.0f} GB/s" if "gbps" in row else ""
    return f"{row['name']:78} {row['median_us']:12.1f} us {rate}"


def run_part(results: Results, part: str, seconds: float, rehearse: bool) -> dict:
    """The parent's side: starts the process, and starts it again after a row that took it down."""
    deadline = time.monotonic() + seconds
    command = [sys.executable, "-m", "benchmarks.gpu.rows", part, "--out", str(results.folder)]
    command += ["--sources", results.sources]
    command += ["--rehearse"] * rehearse
    record, status = {}, LOST
    while status not in (0, 124) and deadline - time.monotonic() > 5:
        before = len(results.part(part).get("rows", []))
        left = deadline - time.monotonic()
        status, _ = results.run([*command, "--seconds", f"{left - 3:.0f}"], left, echo=True)
        record = after(results.part(part), status)
        results.save(part, record)
        if len(record["rows"]) == before:  # it cannot even start
            break
    return record | {"problem": problem(record)}


def problem(record: dict) -> str | None:
    """What is missing of the part, if anything."""
    rows, total = record.get("rows", []), record.get("total", 0)
    failed = sum("error" in row for row in rows)
    parts = [f"{failed} rows failed"] if failed else []
    parts += [] if record.get("done") else [f"only {len(rows)} of {total} rows were reached"]
    return ", ".join(parts) or None


def after(record: dict, status: int) -> dict:
    """The record once the process has ended: a row that took it down is a failure, one that ran out of time is not."""
    running = record.get("running")
    record = {"done": record.get("done", False), "total": record.get("total", 0), "rows": record.get("rows", [])}
    if running and status != 124:
        record["rows"].append({"name": running, "error": f"its process died with status {status}"})
    return record


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=MODULES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sources", default=digest(), help="the name of what is measured")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args(arguments)
    import torch

    from benchmarks.gpu.setting import Setting

    if options.rehearse:
        torch.set_num_threads(1)  # on tiny sizes threads only wait for each other
    module = importlib.import_module(f"benchmarks.gpu.{MODULES[options.part]}")
    rows = module.rows(Setting.here(options.rehearse))
    status = measure_rows(Results(options.out, options.sources), options.part, rows, options.seconds)
    sys.stdout.flush()
    if status:
        os._exit(status)  # no clean-up that would wait for a broken device
    return 0


if __name__ == "__main__":
    sys.exit(main())
