"""The goals on a GPU as numbers."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.goals import Ratio
from benchmarks.gpu.ops import TRITON_SIZES
from benchmarks.ops import FUSED


def percent_of_copy(n: int) -> int:
    """What the fused op should reach of the device's copy bandwidth, in float32."""
    return 85 if n <= 16 else 70 if n <= 32 else 50 if n <= 64 else 35


def step(what: str, method: str, layout: str = "contiguous", mode: str = "eager") -> dict:
    return {"op": "step", "what": what, "method": method, "layout": layout, "mode": mode}


def ratios() -> Iterable[Ratio]:
    for mode in ("eager", "graph"):
        for layout in ("contiguous", "channels_last"):
            for method in ("mbf", "mbf-paper"):
                yield Ratio(
                    f"ResNet-50's 3x3 convolutions, {layout}, {mode}: {method} / fused Adam",
                    step("resnet50 3x3", method, layout, mode),
                    step("resnet50 3x3", "adam", layout, mode),
                    at_most=2.4,
                )
    million = {"n": 9, "count": 10**6, "dtype": "float32"}
    for mode in ("eager", "graph"):
        yield Ratio(
            f"a million 9x9 blocks, {mode}: torch.linalg / fused op",
            million | {"op": "linalg step", "mode": mode},
            million | {"op": FUSED, "backend": "cuda", "full": False, "mode": mode},
            at_least=40,
        )
    for mode in ("eager", "graph"):
        yield Ratio(
            f"matrices of a 12-layer transformer of width 768, {mode}: mbf / fused Adam",
            step("transformer", "mbf", mode=mode),
            step("transformer", "adam", mode=mode),
            at_most=3,
        )
    yield Ratio(
        "matrices of a 12-layer transformer of width 768: mbf / torch.optim.Muon",
        step("transformer", "mbf"),
        step("transformer", "muon"),
        at_most=1 / 5,
    )
    for precision in ("bfloat16", "float32"):
        training = {"op": "training", "precision": precision}
        yield Ratio(
            f"training iteration of ResNet-18, batch 128, {precision}: mbf / fused Adam",
            training | {"method": "mbf"},
            training | {"method": "adam"},
            at_most=1.10,
        )
    for layout in ("contiguous", "channels_last"):
        for n in TRITON_SIZES:
            full = {"op": FUSED, "n": n, "full": True, "dtype": "float32", "mapping": "default", "layout": layout}
            yield Ratio(
                f"fused op, n = {n}, {layout}: Triton / CUDA",
                full | {"backend": "triton"},
                full | {"backend": "cuda"},
                at_most=1.15,
            )


HOST_MICROSECONDS = (step("resnet50", "mbf", mode="host"), 100)
