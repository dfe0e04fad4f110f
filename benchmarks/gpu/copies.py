"""The ceiling: how fast the device copies, counting bytes read and bytes written."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.gpu.rows import Row
from benchmarks.gpu.setting import Setting
from benchmarks.timing import measure


def rows(s: Setting) -> Iterator[Row]:
    for share in (4, 2, 1):
        size = s.state_bytes // share
        name = f"copy of {size / 2**20:.4g} MiB"
        yield Row(name, lambda size=size: copy(s, size), {"op": "copy", "size": size})


def copy(s: Setting, size: int) -> dict:
    source = torch.randn(size // 4, device=s.device)
    target = torch.full_like(source, float("nan"))
    target.copy_(source)
    assert torch.equal(target, source), "the copy differs from its source"
    return measure([lambda: target.copy_(source)], s.device, s.seconds).record(2 * source.nbytes)
