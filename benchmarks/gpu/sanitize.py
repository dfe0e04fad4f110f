"""The part that sanitizes: compute-sanitizer over every op at the boundary sizes of every mapping."""

from __future__ import annotations

import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from benchmarks.gpu.results import Results, child_environment

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
PLAIN = "no tool"  # a rehearsal's
SHARDS = 2  # processes per tool; nothing is timed, so they share the GPU
# every tensor its own allocation, so that the tools see where it ends; modules loaded as they are needed
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_MODULE_LOADING": "LAZY"}


def run(results: Results, seconds: float, rehearse: bool) -> dict:
    """All tools at once. A tool that this machine does not support is no problem of ours; an error it finds is."""
    start = time.monotonic()
    path = shutil.which("compute-sanitizer", path=child_environment()["PATH"])
    if not rehearse and not path:
        return {"done": True, "tools": {}, "problem": None, "note": "compute-sanitizer is not installed"}
    until = time.time() + seconds - 20  # the tools need a while to sum up
    runs = [(tool, shard) for tool in (TOOLS if not rehearse else (PLAIN,)) for shard in range(SHARDS)]

    def one(job: tuple[str, int]) -> dict:
        tool, shard = job
        status, text = results.run(
            command(path, tool, shard, until, rehearse), seconds, ENVIRONMENT, tag=f"[{tool} {shard}] "
        )
        return verdict(text, status, checked=tool != PLAIN) | {"shard": shard}

    with ThreadPoolExecutor(len(runs)) as pool:
        records = list(pool.map(one, runs))
    tools: dict[str, list[dict]] = {}
    for (tool, _), record in zip(runs, records, strict=True):
        tools.setdefault(tool, []).append(record)
    for tool, shards in tools.items():
        print(f"{tool}: {summary(shards)}", flush=True)
    return {
        "done": all(record["state"] != "unfinished" for record in records),
        "tools": tools,
        "seconds": round(time.monotonic() - start, 1),
        "problem": problem(tools),
    }


def summary(shards: list[dict]) -> str:
    cases, total = (sum(shard[key] for shard in shards) for key in ("cases", "total"))
    return f"{', '.join(sorted({shard['state'] for shard in shards}))}, {cases} of {total} cases"


def command(path: str | None, tool: str, shard: int, until: float, rehearse: bool) -> list[str]:
    cases = [sys.executable, "-m", "benchmarks.gpu.sanitize_cases", "--shard", f"{shard}/{SHARDS}"]
    cases += ["--until", f"{until:.0f}"] + ["--rehearse"] * rehearse
    if rehearse:
        return cases
    # API errors would be torch's own probing of the driver; ours are raised as exceptions
    return [path, "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9", *cases]


def verdict(text: str, status: int, checked: bool = True) -> dict:
    """What a run's output says. Clean needs the tool's summary with no error in it, and every case right."""
    reached = re.findall(r"^cases (\d+) of (\d+)", text, re.MULTILINE)
    cases, total = map(int, reached[-1]) if reached else (0, 0)
    found = re.findall(r"^========= .*SUMMARY: (\d+) (?:errors?|hazards? displayed)", text, re.MULTILINE)
    errors = sum(map(int, found)) if found else None
    lines = [line for line in text.splitlines() if line.startswith("=========") and line.strip("= ")]
    unsupported = any("Device not supported" in line or "not supported on" in line for line in lines)
    wrong = re.findall(r"^wrong: .*", text, re.MULTILINE)
    if unsupported:
        state = "unsupported"
    elif errors or wrong:
        state = "errors"
    elif status == 0 and (errors == 0 or not checked) and cases:
        state = "clean" if cases == total else "clean so far"
    else:
        state = "unfinished" if status == 124 else "broken"
    first = [line for line in lines if "COMPUTE-SANITIZER" not in line][:12] if not state.startswith("clean") else []
    return {
        "state": state, "cases": cases, "total": total, "errors": errors, "status": status,
        "first": [*wrong[:5], *first],
    }  # fmt: skip


def problem(tools: dict[str, list[dict]]) -> str | None:
    bad = [
        f"{tool}: {record['state']}"
        for tool, shards in tools.items()
        for record in shards
        if record["state"] not in ("clean", "clean so far", "unsupported")
    ]
    return ", ".join(dict.fromkeys(bad)) or None
