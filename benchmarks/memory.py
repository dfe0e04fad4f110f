"""What an optimizer keeps between steps, and what a step allocates besides."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable

from torch import Tensor
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile


def state_bytes(optimizer) -> int:
    """Bytes of all storages that the optimizer's state holds, each counted once."""
    parts = getattr(optimizer, "optimizers", [optimizer])
    storages = {}
    for tensor in _tensors([part.state for part in parts], set()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(value: object, seen: set[int]) -> Iterable[Tensor]:
    """Every tensor in dictionaries, lists and the attributes of objects. Parameters are keys there: not entered."""
    if isinstance(value, Tensor):
        yield value
    elif id(value) not in seen:
        seen.add(id(value))
        members = value if isinstance(value, (list, tuple, set)) else getattr(value, "__dict__", {}).values()
        for member in value.values() if isinstance(value, dict) else members:
            yield from _tensors(member, seen)


def with_peak_bytes(make: Callable[[], Optimizer], steps: int) -> tuple[Optimizer, int]:
    """An optimizer that has taken so many steps, and the most that it held at once on the way through torch's CPU
    allocator, its state included.

    That sees every tensor, those inside torch's operators too; scratch that native code takes from elsewhere (a
    thread's stack, LAPACK's own buffers) it does not.
    """
    gc.collect()  # what dies later would be counted as freed here
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        optimizer = make()
        for _ in range(steps):
            optimizer.step()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return optimizer, most
