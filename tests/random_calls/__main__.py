"""Makes random calls and checks each: python -m random_calls ops 10000 log.txt, and a seed if others are wanted

A call is written to the log before it is made, so that it is known where the process dies. One that is valid has to
give what float64 arithmetic gives and to change nothing else; one that is not has to be refused with an exception whose
message names the function or the argument, and to change nothing.
"""

import faulthandler
import itertools
import os
import re
import sys
from contextlib import nullcontext

import torch
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st

from mbf_kernels import SymmetricBlocks, backends, use_backend

from . import ops, optimizer, steps, storage
from .arguments import Call, Choices

GROUPS = {group.__name__.rpartition(".")[2]: group.FUNCTIONS for group in (storage, ops, steps, optimizer)}
BYTES = {"storage": 32, "ops": 48, "steps": 96, "optimizer": 256}  # that decide on a call, or calls that follow
BYTES_OF_AN_EXAMPLE, EXAMPLES_OF_A_ROUND = 1024, 40
BACKENDS = [None, None, *(name for name in ("reference", "emulated") if backends()[name] == "available")]


class Caller:
    def __init__(self, group, log):
        self.functions, self.bytes, self.calls = GROUPS[group], BYTES[group], 0
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def example(self, data: bytes) -> None:
        for start in range(0, len(data), self.bytes):
            choices = Choices(data[start : start + self.bytes])
            backend = choices.of(BACKENDS)
            with use_backend(backend) if backend else nullcontext():
                for call in choices.of(self.functions)(choices):
                    if choices.one_in(3):
                        call.spoil(choices)
                    self.make(call, backend)

    def make(self, call: Call, backend: str | None) -> None:
        self.calls += 1
        text = f"{call.name} on {backend}, {'to be refused' if call.refused else 'valid'}: {describe(call.arguments)}"
        os.pwrite(self._log, text.encode()[:4000].ljust(4000), 0)
        memory = Memory([call.arguments, call.written, call.touched])
        try:
            self._make(call, memory)
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error}\nin the call of {text}") from error

    @staticmethod
    def _make(call: Call, memory: "Memory") -> None:
        try:
            with torch.set_grad_enabled(call.with_grad):
                result = call.function(**call.arguments)
        except Exception as error:
            assert call.refused, f"a valid call raised {type(error).__name__}: {error}"
            assert isinstance(error, (TypeError, ValueError, RuntimeError)), f"raised {type(error).__name__}: {error}"
            assert any(re.search(rf"\b{name}\b", str(error)) for name in call.names), f"it names nothing: {error}"
            memory.check()
            return
        assert not call.refused, "a call that is not valid was taken"
        call.check(result)
        memory.check(call.written)


class Memory:
    """All bytes that the tensors of arguments lie in, as they were."""

    def __init__(self, arguments):
        self._storages = {}
        for tensor in tensors_in(arguments):
            storage = tensor.untyped_storage()
            self._storages[storage.data_ptr()] = (storage, bytes_of(storage).clone())

    @torch.no_grad()
    def check(self, written=()) -> None:
        """Nothing has changed but the elements of ``written``."""
        for tensor in tensors_in(written):
            _, before = self._storages[tensor.untyped_storage().data_ptr()]
            before.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(tensor)
        for here, before in self._storages.values():
            changed = bytes_of(here) != before
            assert not changed.any(), f"{int(changed.sum())} bytes changed that are not the call's to change"


def bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def tensors_in(thing):
    """Tensors with memory."""
    if isinstance(thing, SymmetricBlocks):
        thing = thing.data
    if isinstance(thing, torch.Tensor):
        if thing.layout == torch.strided and not thing.is_meta:
            yield thing
    elif isinstance(thing, (list, tuple, dict)):
        for part in thing.values() if isinstance(thing, dict) else thing:
            yield from tensors_in(part)


def describe(thing) -> str:
    if isinstance(thing, torch.Tensor) and thing.layout == torch.strided:
        kind = f"{type(thing).__name__} {thing.dtype} on {thing.device} {list(thing.shape)}"
        value = f" {thing.item()}" if not thing.ndim and not thing.is_meta else ""
        return f"{kind} strides {thing.stride()}{' requires grad' if thing.requires_grad else ''}{value}"
    if isinstance(thing, SymmetricBlocks):
        return f"SymmetricBlocks({thing.count!r}, {thing.size!r}, {describe(thing.data)})"
    if isinstance(thing, dict):
        return ", ".join(f"{name}={describe(value)}" for name, value in thing.items())
    if isinstance(thing, (list, tuple)):
        return f"{type(thing).__name__}({', '.join(map(describe, thing))})"
    return repr(thing)


def main(group: str, calls: int, log: str, first_seed: int = 0) -> None:
    torch.set_num_threads(1)
    faulthandler.enable()
    caller = Caller(group, log)
    seeds = itertools.count(first_seed)
    while caller.calls < calls:
        make_examples(caller, next(seeds))
    print(caller.calls)


def make_examples(caller: Caller, number: int) -> None:
    size = BYTES_OF_AN_EXAMPLE

    @settings(
        max_examples=EXAMPLES_OF_A_ROUND, deadline=None, database=None, verbosity=Verbosity.quiet,
        phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
    )  # fmt: skip
    @seed(number)
    @given(st.binary(min_size=size, max_size=size))
    def make(data):
        caller.example(data)

    make()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:]))
