"""A goal that is a ratio compares two rows of one run, found by their facts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Ratio:
    what: str
    of: dict  # facts of the row whose median is divided ...
    by: dict  # ... by this one's
    at_most: float | None = None
    at_least: float | None = None

    def goal(self) -> str:
        return f"<= {self.at_most:g}" if self.at_most is not None else f">= {self.at_least:g}"

    def met(self, value: float) -> bool:
        return value <= self.at_most if self.at_most is not None else value >= self.at_least


def find(rows: Iterable[dict], facts: dict) -> dict | None:
    """The row that has all these facts and a measurement."""
    return next((row for row in rows if "median_us" in row and facts.items() <= row.items()), None)
