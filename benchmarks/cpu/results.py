"""The folder of one run: {"environment": facts, "rows": flat dictionaries} as JSON, the rows as CSV, and the report."""

from __future__ import annotations

import csv
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / "benchmarks" / "results"
DIGITS = 4  # that are kept of a measured number


def save(folder: Path, results: dict) -> None:
    """A row a line, so that a reader and a diff see rows."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{key: rounded(value) for key, value in row.items()} for row in results["rows"]]
    lines = ",\n".join(json.dumps(row) for row in rows)
    here = json.dumps(results["environment"], indent=1)
    (folder / "results.json").write_text(f'{{"environment": {here},\n"rows": [\n{lines}\n]}}\n')
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def load(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def rounded(value: object) -> object:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
