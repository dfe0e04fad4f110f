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
    mean: float
    worst: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        ordered = sorted(samples)
        middle, low, high = (percentile(ordered, percent) for percent in (50, 20, 80))
        return cls(middle, low, high, sum(ordered) / len(ordered), ordered[-1], len(ordered))

    def __truediv__(self, calls: int) -> Timing:
        """Of a sample that was so many calls, the time of one."""
        times = (self.median, self.p20, self.p80, self.mean, self.worst)
        return Timing(*(seconds / calls for seconds in times), self.samples)

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

    clock = _clock(device)
    batch(max(2, len(calls)))
    once = min(clock(batch, 1, 3))
    size = _batch_size(once)
    samples = max(3, min(200, int(seconds / (once * size))))
    return Timing.of([elapsed / size for elapsed in clock(batch, size, samples)])


def race(
    calls: dict[str, Call], device: str, seconds: float, periods: dict[str, int] | None = None
) -> dict[str, Timing]:
    """Times calls side by side: each gets `seconds`, its samples spread evenly over the whole stretch of time, so that
    what slows the machine down slows all of them.

    A call with a period does its rare work every so many calls: whole periods are sampled, call by call, as many as fit
    into `seconds` and at least one.
    """
    clock, sizes, turns = _clock(device), {}, []
    for name, call in calls.items():
        period = (periods or {}).get(name, 1)
        once = min(clock(_repeat(call), 1, 3))
        sizes[name] = _batch_size(once) if period == 1 else 1
        samples = max(3, min(200, int(seconds / (once * sizes[name]))))
        samples = samples if period == 1 else period * max(1, round(seconds / (once * period)))
        turns += [((index + 0.5) / samples, name) for index in range(samples)]
    elapsed: dict[str, list[float]] = {name: [] for name in calls}
    for _, name in sorted(turns):
        batch, size = _repeat(calls[name]), sizes[name]
        if size > 1:
            batch(1)  # finds the caches as the others left them
        elapsed[name] += [sample / size for sample in clock(batch, size, 1)]
    return {name: Timing.of(samples) for name, samples in elapsed.items()}


def _repeat(call: Call) -> Callable[[int], None]:
    def batch(size: int) -> None:
        for _ in range(size):
            call()

    return batch


def _clock(device: str) -> Callable[[Callable[[int], None], int, int], list[float]]:
    return _events if torch.device(device).type == "cuda" else _wall


def _batch_size(once: float) -> int:
    return min(1000, ceil(BATCH / once))


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
    return measure([graph.replay], device, seconds) / len(calls)


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
