"""Tables and cells in Markdown."""

from __future__ import annotations

from collections.abc import Iterable


def time_text(microseconds: float) -> str:
    return f"{microseconds:.1f} us" if microseconds < 1e4 else f"{microseconds / 1e3:.2f} ms"


def one_line(text: str) -> str:
    return " ".join(text.split())


def table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
