"""Where the cost curves bend, in words, from the measured points."""

from __future__ import annotations

from itertools import groupby, pairwise

from benchmarks.cpu.tables import timed
from benchmarks.markdown import number
from benchmarks.ops import FUSED, OPS, triangle

PAYS = 1.25  # so many times faster, and a second thread is worth its start
FLAT = 1.5  # so many times the least cost, and a call's fixed cost no longer matters


def knees(rows: list[dict], caches: dict[str, int]) -> list[str]:
    """A sentence or two for every n of the curves against the number of blocks, and for the curve against n."""
    points = timed(rows, part="against count")
    by_size = [(n, list(group)) for n, group in groupby(points, key=lambda row: row["n"])]
    return [*(against_count(n, group, caches) for n, group in by_size), against_size(rows)]


def against_size(rows: list[dict]) -> str:
    """Where flops become dearer than bytes, how near the op comes to each roof, and where it jumps."""
    (copy,) = timed(rows, part="roofs", what="copy")
    (product,) = timed(rows, part="roofs", what="matrix product", dtype="float32")
    cost = {point["n"]: point["ns_per_block"] for point in timed(rows, part="against size")}
    moving = {n: OPS[FUSED].moved(n, 4) / copy["gbps"] for n in cost}
    computing = {n: OPS[FUSED].flops(n) / product["gflops"] for n in cost}
    parts = []
    for roof, other, what in (
        (moving, computing, "a copy of its bytes"),
        (computing, moving, "its flops at full rate"),
    ):
        ratios = {n: cost[n] / roof[n] for n in cost if roof[n] >= other[n]}
        if ratios:
            span = f"{number(min(ratios.values()))} to {number(max(ratios.values()))} times {what}"
            parts.append(f"from n = {min(ratios)} to {max(ratios)} a block costs {span}")
    rises = {(one, other): cost[other] / cost[one] for one, other in pairwise(cost)}
    if rises:
        one, other = max(rises, key=lambda pair: rises[pair] * triangle(pair[0]) / triangle(pair[1]))
        parts.append(f"the sharpest rise, beside that of F's size, is {number(rises[one, other])} times at n = {other}")
    return f"Against n: {'; '.join(parts)}."


def against_count(n: int, points: list[dict], caches: dict[str, int]) -> str:
    most = max(point["threads"] for point in points)
    alone, together = ({p["count"]: p for p in points if p["threads"] == threads} for threads in (1, most))
    fewest = min(together)
    least = min(together.values(), key=lambda point: point["ns_per_block"])
    flat = min(b for b, point in together.items() if point["ns_per_block"] <= FLAT * least["ns_per_block"])
    parts = [f"n = {n}: a call with {fewest:,} blocks takes {number(together[fewest]['median_us'])} us"]
    parts.append(
        f"from {flat:,} blocks on a block costs at most {FLAT} times the least, {number(least['ns_per_block'])} ns"
    )
    if most > 1:
        ratios = {b: alone[b]["median_us"] / together[b]["median_us"] for b in together}
        pays = [b for b in sorted(ratios) if all(ratios[more] >= PAYS for more in ratios if more >= b)]
        parts.append(f"{most} threads pay from {pays[0]:,} blocks on" if pays else f"{most} threads do not pay")
    places = [f"{number(cost)} ns {place}" for place, cost in by_cache(n, alone, caches, flat).items()]
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
