"""What an optimizer does with every tensor, as rows that print as a table."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Row:
    name: str
    shape: tuple[int, ...]
    structure: str  # of the mini-blocks, or "diagonal"
    count: int  # matrices kept
    size: int  # n of each
    bytes: int  # of optimizer state
    skipped: int  # bad mini-blocks left as they were, so far


class Report(list[Row]):
    """A list of ``Row`` whose ``str()`` is a table."""

    def __str__(self) -> str:
        header = [field.name for field in fields(Row)]
        cells = [header] + [[str(getattr(row, name)) for name in header] for row in self]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)
