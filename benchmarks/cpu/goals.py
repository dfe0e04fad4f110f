"""The goals on a CPU as numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from benchmarks.cpu.host import WITHOUT_KERNELS
from benchmarks.cpu.plan import CONVOLUTIONS, LINEAR
from benchmarks.goals import Ratio, find
from benchmarks.markdown import time_text
from benchmarks.ops import FUSED
from benchmarks.peers import CHOLESKY

TIMES_FASTER = {9: 50, 16: 40, 25: 40, 32: 25, 64: 15, 128: 8}  # than torch.linalg, by n
STEP = 2.6  # of Adam's time; the floor is 60 bytes a parameter over 28
HOST = 100  # microseconds of Python and dispatch in a step of ResNet-50


def ratios() -> Iterator[Ratio]:
    fused = {"part": "kernels", "op": FUSED, "dtype": "float32"}
    for n, times in TIMES_FASTER.items():
        of, by = (fused | {"n": n, "by": name} for name in (CHOLESKY, "cpu"))
        yield Ratio(f"{CHOLESKY} / fused op, n = {n}", of, by, at_least=times)
    for what in (CONVOLUTIONS, f"{CONVOLUTIONS}, channels_last"):
        for method, label in (("mbf", "MBF (grafted)"), ("mbf-paper", "MBF (paper)")):
            yield Ratio(f"{label} / Adam, {what}", step(what, method), step(what, "adam"), at_most=STEP)
    yield Ratio(f"MBF / Adam, {LINEAR}", step(LINEAR, "mbf"), step(LINEAR, "adam"), at_most=8)
    yield Ratio(f"MBF / Muon, {LINEAR}", step(LINEAR, "mbf"), step(LINEAR, "muon"), at_most=1 / 10)


def step(what: str, method: str) -> dict:
    return {"part": "steps", "what": what, "method": method}


def measured(rows: Iterable[dict]) -> Iterator[tuple[str, str, str, str]]:
    """What, goal, measured, met: for each goal whose rows are there."""
    rows = list(rows)
    for ratio in ratios():
        of, by = find(rows, ratio.of), find(rows, ratio.by)
        if of and by:
            value = of["median_us"] / by["median_us"]
            yield ratio.what, ratio.goal(), f"{value:.3g}", "yes" if ratio.met(value) else "no"
    if host := find(rows, {"part": "host", "what": "ResNet-50", "work": WITHOUT_KERNELS}):
        met = "yes" if host["median_us"] <= HOST else "no"
        what = f"Python and dispatch of MBF.step, the {host['tensors']} tensors of ResNet-50"
        yield what, f"<= {HOST} us", time_text(host["median_us"]), met
