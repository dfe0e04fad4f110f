"""report.html, one file that needs no other: `python -m benchmarks.cpu.report FOLDER` writes it anew."""

from __future__ import annotations

import base64
import sys
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from benchmarks.cpu.charts import charts
from benchmarks.cpu.knees import knees
from benchmarks.cpu.notes import NOTES
from benchmarks.cpu.results import load
from benchmarks.cpu.tables import tables

TEMPLATE = Path(__file__).with_name("report.html.jinja")


def write(folder: Path) -> Path:
    file = folder / "report.html"
    file.write_text(page(load(folder)))
    return file


def page(results: dict) -> str:
    here, rows = results["environment"], results["rows"]
    engine = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    engine.filters["base64"] = lambda text: base64.b64encode(text.encode()).decode()
    return engine.from_string(TEMPLATE.read_text()).render(
        title=f"mbf-kernels on {machine(here)}",
        facts=facts(here),
        tables=tables(rows),
        charts=charts(rows),
        knees=knees(rows, here["caches"]),
        notes=NOTES,
    )


def machine(here: dict) -> str:
    return f"{here['processor']}, {here['threads']} of {here['cores']} cores"


BUSY = 0.5  # cores: more, and the figures say more of the others


def busy(here: dict) -> str:
    """A warning where the machine was not idle when the run began; else nothing."""
    return f"provisional: other processes kept {here['load']:g} cores busy" if here["load"] > BUSY else ""


def facts(here: dict) -> dict[str, str]:
    """The head of the report."""
    versions = {name: version for name, version in here["packages"].items() if version}
    return {
        "machine": machine(here),
        "load": busy(here) or "idle before the run",
        "instructions": here["isa"] or "no native kernels",
        "caches": ", ".join(f"{name} {size // 1024:,} KB" for name, size in here["caches"].items()) or "unknown",
        "system": here["system"],
        "versions": f"Python {here['python']}, " + ", ".join(f"{name} {text}" for name, text in versions.items()),
        "commit": here["commit"] or "unknown",
        "command": here["command"],
        "made": f"{here['made']}, in {here['minutes']:.3g} minutes",
        **{f"{part} measured anew": when for part, when in here.get("anew", {}).items()},
    }


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
