"""What random calls are made of: choices, tensors of any layout, numbers of any type, matrices."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import torch

from mbf_kernels import SymmetricBlocks
from mbf_kernels.testing import randn

DTYPES = (torch.float32, torch.float64)
SIZES = (1, 2, 3, 4, 9, 16, 20, 21, 25, 33, 64)


class Choices:
    """One for each byte. A zero takes the first option: what hypothesis shrinks to is the plainest call."""

    def __init__(self, data: bytes):
        self._bytes = iter(data)

    def byte(self) -> int:
        return next(self._bytes, 0)

    def of(self, options: Sequence):
        return options[self.byte() % len(options)]

    def one_in(self, n: int) -> bool:
        return self.byte() % n == n - 1

    def randn(self, *shape: int, dtype=torch.float64) -> torch.Tensor:
        return randn(*shape, dtype=dtype, seed=self.byte() + 256 * self.byte())


@dataclass
class Call:
    name: str
    function: Callable
    arguments: dict
    written: list = field(default_factory=list)  # what the function changes
    touched: list = field(default_factory=list)  # what else it knows beside its arguments
    optional: bool = False  # it can be called with less
    check: Callable = lambda result: None  # compares the result and what was written with the truth
    bad: dict[str, Sequence[Callable]] = field(default_factory=dict)  # by argument: what makes it one to be refused
    overlaps: Sequence[tuple[str, Callable]] = ()  # likewise, with memory that another argument has, too
    refused: bool = False
    names: tuple[str, ...] = ()  # one of these stands in the message of a refusal
    with_grad: bool = True  # in grad mode

    def spoil(self, choices: Choices) -> None:
        """Makes one argument, or the number of them, such that the call has to be refused."""
        self.refused, self.with_grad, self.names = True, True, (self.name, *self.arguments, *self.bad, *self.names)
        missing = self.arguments and not self.optional
        name = choices.of([*self.bad, "unknown", *["missing"] * bool(missing), *["overlap"] * bool(self.overlaps)])
        if name == "missing":
            del self.arguments[next(iter(self.arguments))]
        elif name == "unknown":
            self.arguments["unknown"] = 1
        else:
            name, spoilt = choices.of(self.overlaps if name == "overlap" else [(name, s) for s in self.bad[name]])
            self.arguments[name] = spoilt(self.arguments.get(name))


class Subclass(torch.Tensor):
    pass


def tensor(choices: Choices, values: torch.Tensor, call: Call | None = None, read_only: bool = False) -> torch.Tensor:
    """The values in memory of any order, with gaps and room around; now and then a special kind of tensor."""
    placed = _placed(choices, values)
    kind = choices.byte() % 16
    if kind == 1:
        return placed.as_subclass(Subclass)
    if read_only and kind == 2:
        with torch.inference_mode():
            return placed.clone()
    if kind == 3 and call is not None:
        call.with_grad = False
        return torch.nn.Parameter(placed)
    if read_only and kind == 4 and values.ndim:
        return torch.complex(torch.zeros_like(values), -values).conj().imag  # a lazy minus
    if read_only and kind == 5 and values.ndim and values.shape[0]:
        values[1:] = values[:1]
        return values[:1].expand(values.shape)
    return placed


def _placed(choices: Choices, values: torch.Tensor) -> torch.Tensor:
    dimensions = list(range(values.ndim))
    order = choices.of([dimensions, dimensions, dimensions[::-1], dimensions[1:] + dimensions[:1]])
    step, room = choices.of([1, 1, 1, 2, 3]), choices.of([0, 0, 1])
    steps = [step if d == order[-1] else 1 for d in dimensions]
    memory = torch.empty([(values.shape[d] + 2 * room) * steps[d] for d in order], dtype=values.dtype)
    memory.untyped_storage().fill_(0x5A)
    view = memory.permute([order.index(d) for d in dimensions])
    for d in dimensions:
        first = room * steps[d]
        view = view[(slice(None),) * d + (slice(first, first + values.shape[d] * steps[d], steps[d]),)]
    return view.copy_(values)


def number(choices: Choices, values: Sequence[float], on_device: bool = False):
    """One of the values, as something that is a number."""
    value = choices.of(values)
    forms = [float, float, np.float64, Fraction, lambda v: int(v) if v == int(v) else v]
    if on_device:
        forms += [lambda v: torch.tensor(v, dtype=torch.float64), lambda v: torch.tensor(v, dtype=torch.float32)]
    return choices.of(forms)(value)


def flag(choices: Choices):
    return choices.of([False, True, 0, 1, np.True_, None, "yes"])


def matrices(choices: Choices, count: int, size: int, dtype: torch.dtype, scales=(1.0, 1e-3, 1e3)) -> torch.Tensor:
    """[B, n, n], symmetric and positive semidefinite: of full rank, of rank one, zero."""
    rank = choices.of([size + 2, size + 2, 1, 0])
    g = choices.of(scales) * choices.randn(count, size, rank)
    dense = (g @ g.mT).tril() / max(rank, 1)
    return (dense + dense.tril(-1).mT).to(dtype)


def blocks(dense: torch.Tensor) -> SymmetricBlocks:
    row, column = torch.tril_indices(*dense.shape[1:])
    return SymmetricBlocks.from_packed(dense[:, row, column])
