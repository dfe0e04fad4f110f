"""Times calls on a device: CUDA events on a GPU, the wall clock on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise
from math import ceil

import torch

Call = Callable[[], object]
BATCH = 1e-3  # seconds of work between two readings of the clock, far above its resolution


@dataclass(frozen=True)
class Timing:
    """Seconds per call."""

    median: float
    p20: float
    p80: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        ordered = sorted(samples)
        return cls(percentile(ordered, 50), percentile(ordered, 20), percentile(ordered, 80), len(ordered))

    def record(self, moved: int | None = None) -> dict:
        """Microseconds, and GB/s where the bytes that the call must move are known."""
        record = {"median_us": self.median * 1e6, "p20_us": self.p20 * 1e6, "p80_us": self.p80 * 1e6}
        record |= {"samples": self.samples}
        return record | {"bytes": moved, "gbps": moved / self.median * 1e-9} if moved else record


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Interpolated between the two nearest of sorted values."""
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def measure(calls: Sequence[Call], device: str, seconds: float) -> Timing:
    """Takes the calls in turn: several sets of inputs keep the data out of the caches."""
    turn = cycle(calls)

    def batch(size: int) -> None:
        for _ in range(size):
            next(turn)()

    clock = _events if torch.device(device).type == "cuda" else _wall
    batch(max(2, len(calls)))
    once = min(clock(batch, 1, 3))
    size = min(1000, ceil(BATCH / once))
    samples = max(3, min(200, int(seconds / (once * size))))
    return Timing.of([elapsed / size for elapsed in clock(batch, size, samples)])


def measure_graph(calls: Sequence[Call], device: str, seconds: float) -> Timing:
    """The calls captured into one CUDA graph: the device's time without the host's."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    timing = measure([graph.replay], device, seconds)
    share = 1 / len(calls)
    return Timing(timing.median * share, timing.p20 * share, timing.p80 * share, timing.samples)


def measure_host(call: Call, device: str, samples: int) -> Timing:
    """The host's time per call, Python and launches, while the device has nothing else to do."""
    elapsed = []
    for _ in range(samples):
        synchronize(device)
        start = time.perf_counter()
        call()
        elapsed.append(time.perf_counter() - start)
    synchronize(device)
    return Timing.of(elapsed[samples // 5 :])  # the first ones warm up


def synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def _events(batch: Callable[[int], None], size: int, samples: int) -> list[float]:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(samples + 1)]
    torch.cuda.synchronize()
    marks[0].record()
    for mark in marks[1:]:
        batch(size)
        mark.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e-3 for start, end in pairwise(marks)]


def _wall(batch: Callable[[int], None], size: int, samples: int) -> list[float]:
    marks = [time.perf_counter()]
    for _ in range(samples):
        batch(size)
        marks.append(time.perf_counter())
    return [max(end - start, 1e-9) for start, end in pairwise(marks)]
