"""How the ops become ``torch.ops.mbf_kernels.*``."""

from __future__ import annotations

from collections.abc import Callable

import torch

_library = torch.library.Library("mbf_kernels", "DEF")


def register(name: str, schema: str, check: Callable, empty: Callable, run: Callable, has_work: Callable) -> None:
    """``check`` raises for bad arguments, ``empty`` makes what the op returns (all that a trace needs to know), and
    ``run`` calls the backend, where ``has_work`` finds something to do."""

    def checked(*args):
        check(*args)
        return run(*args) if has_work(*args) else empty(*args)

    def fake(*args):
        check(*args)
        return empty(*args)

    _library.define(name + schema, tags=[torch.Tag.pt2_compliant_tag])
    _library.impl(name, checked, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mbf_kernels::{name}", fake, lib=_library)
