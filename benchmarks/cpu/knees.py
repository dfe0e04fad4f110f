"""Where the curves against the number of blocks bend, in words, from the measured points."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from benchmarks.ops import triangle

PAYS = 1.25  # so many times faster, and a second thread is worth its start
FLAT = 1.5  # so many times the least cost, and a call's fixed cost no longer matters


def knees(rows: Iterable[dict], caches: dict[str, int]) -> list[str]:
    """A sentence or two for every n."""
    points = [row for row in rows if row["part"] == "against count"]
    return [words(n, list(group), caches) for n, group in groupby(points, key=lambda row: row["n"])]


def words(n: int, points: list[dict], caches: dict[str, int]) -> str:
    most = max(point["threads"] for point in points)
    alone, together = ({p["count"]: p for p in points if p["threads"] == threads} for threads in (1, most))
    fewest = min(together)
    least = min(together.values(), key=lambda point: point["ns_per_block"])
    flat = min(b for b, point in together.items() if point["ns_per_block"] <= FLAT * least["ns_per_block"])
    parts = [f"n = {n}: a call with {fewest:,} blocks takes {together[fewest]['median_us']:.3g} us"]
    parts.append(
        f"from {flat:,} blocks on a block costs at most {FLAT} times the least, {least['ns_per_block']:.3g} ns"
    )
    if most > 1:
        ratios = {b: alone[b]["median_us"] / together[b]["median_us"] for b in together}
        pays = [b for b in sorted(ratios) if all(ratios[more] >= PAYS for more in ratios if more >= b)]
        parts.append(f"{most} threads pay from {pays[0]:,} blocks on" if pays else f"{most} threads do not pay")
    places = [f"{cost:.3g} ns {place}" for place, cost in by_cache(n, alone, caches, flat).items()]
    return "; ".join(parts) + (f". One thread: {', '.join(places)}." if len(places) > 1 else ".")


def by_cache(n: int, points: dict[int, dict], caches: dict[str, int], flat: int) -> dict[str, float]:
    """The least cost of a block while F, g, the right-hand side and x fit into a cache, and beyond the last one."""
    costs: dict[str, float] = {}
    for count, point in points.items():
        touched = 4 * count * (triangle(n) + 3 * n)
        place = next((f"in {name}" for name, size in caches.items() if touched <= size), "beyond the caches")
        if count >= flat or place == "beyond the caches":
            costs[place] = min(costs.get(place, float("inf")), point["ns_per_block"])
    return costs
