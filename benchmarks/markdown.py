"""Tables and cells in Markdown."""

from __future__ import annotations

from collections.abc import Iterable


def number(value: float | None) -> str:
    """Three digits or all before the point, and no exponent."""
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def time_text(microseconds: float) -> str:
    if microseconds < 999.5:
        return f"{number(microseconds)} us"
    milliseconds = microseconds / 1e3
    return f"{number(milliseconds)} ms" if milliseconds < 999.5 else f"{number(milliseconds / 1e3)} s"


def one_line(text: str) -> str:
    return " ".join(text.split())


def table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def between(text: str, begin: str, end: str, new: str) -> str:
    """The text with what stands between two marks replaced."""
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return before + begin + new + end + after
