"""table.md: every measured row beside its goal and its prediction."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from benchmarks.goals import find
from benchmarks.gpu import goals
from benchmarks.markdown import one_line, table, time_text
from benchmarks.ops import FUSED

# {"OP n=N DTYPE MAPPING": {"percent_of_copy": 92, "limit": "memory"}}, from the compiled instructions
PREDICTIONS = Path(__file__).with_name("predicted.json")
COLUMNS = ("what", "median", "p20", "p80", "GB/s", "% of copy", "goal", "ratio", "predicted")


def report(results: dict, predictions: dict) -> str:
    rows = measured(results)
    ceiling = copy_ceiling(rows)
    parts = [heading(results), states(results), summary(rows, ceiling)]
    for title, op in (("Copy", "copy"), ("Kernels", None), ("Steps", "step"), ("Training", "training")):
        chosen = [row for row in rows if row.get("op") == op or (op is None and "n" in row)]
        if chosen:
            parts.append(f"## {title}\n\n" + table(COLUMNS, (cells(row, ceiling, predictions) for row in chosen)))
    failed = [row for row in rows if "error" in row]
    if failed:
        parts.append("## Failed\n\n" + "\n".join(f"- {row['name']}: {one_line(row['error'])}" for row in failed))
    return "\n\n".join(parts) + "\n"


def predicted() -> dict:
    return json.loads(PREDICTIONS.read_text()) if PREDICTIONS.exists() else {}


def measured(results: dict) -> list[dict]:
    return [
        row
        for part in ("bench_copy", "bench_ops", "bench_step")
        for row in results["parts"].get(part, {}).get("rows", [])
    ]


def copy_ceiling(rows: Iterable[dict]) -> float | None:
    """The device's copy bandwidth: the best of the copies, each larger than any cache."""
    return max((row["gbps"] for row in rows if row.get("op") == "copy" and "gbps" in row), default=None)


def heading(results: dict) -> str:
    here = results["parts"].get("environment", {})
    gpu = here.get("gpu") or {}
    driver = gpu.get("driver", {})
    facts = {
        "device": here.get("device"),
        "compute capability": gpu.get("capability"),
        "multiprocessors": gpu.get("multiprocessors"),
        "driver": driver.get("driver_version"),
        "clocks now / most (SM)": f"{driver.get('clocks.sm')} / {driver.get('clocks.max.sm')}" if driver else None,
        "torch": here.get("torch"),
        "triton": here.get("packages", {}).get("triton"),
        "nvcc": here.get("nvcc"),
        "Python": here.get("python"),
        "commit": here.get("commit"),
        "sources": here.get("sources"),
        "made": here.get("made"),
    }
    lines = [f"- {name}: {value}" for name, value in facts.items() if value is not None]
    title = "# Rehearsal on a CPU: the figures mean nothing" if here.get("rehearsal") else "# GPU results"
    return title + "\n\n" + "\n".join(lines)


def states(results: dict) -> str:
    rows = []
    for name, part in results["parts"].items():
        state = part.get("problem") or ("done" if part.get("done") else "not finished")
        rows.append((name, state, note(name, part), f"{part.get('wall_seconds', 0):.0f} s"))
    return "## Parts\n\n" + table(("part", "state", "what", "time"), rows)


def note(name: str, part: dict) -> str:
    """What a part has to say in one cell."""
    if name == "test":
        return "; ".join(f"{backend}: {outcomes(count)}" for backend, count in part.get("counts", {}).items())
    if name == "sanitize":
        tools = part.get("tools", {})
        said = [f"{tool}: {', '.join(sorted({shard['state'] for shard in tools[tool]}))}" for tool in tools]
        return "; ".join([*said, part.get("note", "")]).strip("; ")
    if name == "build":
        return f"{part.get('seconds', 0):g} s, architectures {part.get('env', {}).get('MBF_CUDA_ARCHITECTURES', '-')}"
    return f"{len(part['rows'])} rows" if "rows" in part else ""


def outcomes(count: dict[str, int]) -> str:
    return ", ".join(f"{number} {outcome}" for outcome, number in count.items())


def summary(rows: list[dict], ceiling: float | None) -> str:
    """The goals that are ratios and times, and how far they are reached."""
    lines = []
    for ratio in goals.ratios():
        of, by = find(rows, ratio.of), find(rows, ratio.by)
        if of and by:
            value = of["median_us"] / by["median_us"]
            lines.append((ratio.what, f"{value:.3g}", ratio.goal(), "yes" if ratio.met(value) else "no"))
    facts, limit = goals.HOST_MICROSECONDS
    host = find(rows, facts)
    if host:
        reached = "yes" if host["median_us"] <= limit else "no"
        lines.append(("host time of MBF.step, ResNet-50", f"{host['median_us']:.0f} us", f"<= {limit} us", reached))
    text = f"Copy ceiling: {ceiling:.0f} GB/s, bytes read and written.\n\n" if ceiling else ""
    return "## Goals\n\n" + text + (table(("what", "measured", "goal", "reached"), lines) if lines else "Nothing yet.")


def cells(row: dict, ceiling: float | None, predictions: dict) -> tuple[str, ...]:
    if "error" in row:
        return (row["name"], "failed", *[""] * 7)
    share = 100 * row["gbps"] / ceiling if "gbps" in row and ceiling else None
    goal = goal_of(row)
    prediction = prediction_of(row, predictions)
    return (
        row["name"],
        *(time_text(row[key]) for key in ("median_us", "p20_us", "p80_us")),
        f"{row['gbps']:.0f}" if "gbps" in row else "",
        f"{share:.0f}" if share else "",
        f"{goal}" if goal else "",
        f"{share / goal:.2f}" if share and goal else "",
        f"{prediction['percent_of_copy']:.0f} ({prediction['limit']})" if prediction else "",
    )


def goal_of(row: dict) -> int | None:
    """Percent of the copy ceiling, for the rows that have such a goal: the fused op as it comes, filling the device."""
    as_it_comes = row.get("mapping") == "default" and row.get("backend") != "triton"
    if row.get("op") != FUSED or not row.get("full") or not as_it_comes or row.get("dtype") != "float32":
        return None
    return goals.percent_of_copy(row["n"])


def prediction_of(row: dict, predictions: dict) -> dict | None:
    """Of the row's mapping; where the library chose the mapping, the best of them, which it is meant to choose."""
    if row.get("backend") == "triton" or "mapping" not in row:
        return None
    prefix = f"{row['op']} n={row['n']} {row['dtype']} "
    if prefix + row["mapping"] in predictions:
        return predictions[prefix + row["mapping"]]
    others = [value for key, value in predictions.items() if key.startswith(prefix) and row["mapping"] == "default"]
    return max(others, key=lambda value: value["percent_of_copy"], default=None)
