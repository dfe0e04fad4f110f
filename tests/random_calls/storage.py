"""Calls of SymmetricBlocks and its methods, of backends and of use_backend."""

import torch

import mbf_kernels
from mbf_kernels import SymmetricBlocks, backends, use_backend
from mbf_kernels.testing import assert_bitwise, assert_padding_zero

from . import bad
from .arguments import DTYPES, SIZES, Call, Choices, blocks, matrices, tensor
from .ops import plain

NO_INTEGERS = [None, "3", 1.5, -1, 1j, [1], torch.tensor(2.0), 2**62]
NO_DTYPES = [torch.float16, torch.int32, torch.complex64, "float", 3]
NO_DEVICES = ["nowhere", 1j, ["cpu"], torch.ones(2)]


def same(f: SymmetricBlocks, dense: torch.Tensor) -> None:
    """Every bit of the blocks, and the zeros around them."""
    assert (f.count, f.size, f.dtype) == (len(dense), dense.shape[1], dense.dtype)
    row, column = torch.tril_indices(*dense.shape[1:])
    packed = f.data.transpose(1, 2).reshape(-1, len(row))[: f.count] if f.size <= 20 else f.data[:, : len(row)]
    assert_bitwise(packed, dense[:, row, column])
    assert_padding_zero(f)


def drawn(choices: Choices, dtype=None, size=None) -> torch.Tensor:
    return matrices(choices, choices.of([2, 1, 0, 5, 33]), size or choices.of(SIZES[:-2]), dtype or choices.of(DTYPES))


def zeros(choices: Choices):
    dense = torch.zeros_like(drawn(choices))
    arguments = {"count": len(dense), "size": dense.shape[1], "dtype": dense.dtype, "device": choices.of([None, "cpu"])}
    call = Call("SymmetricBlocks.zeros", SymmetricBlocks.zeros, arguments, check=lambda f: same(f, dense))
    call.bad = {
        "count": bad.constants(NO_INTEGERS), "size": bad.constants([*NO_INTEGERS, 0]),
        "dtype": bad.constants([*NO_DTYPES, None]), "device": bad.constants(NO_DEVICES),
    }  # fmt: skip
    yield call


def construct(choices: Choices):
    dense = drawn(choices)
    f = blocks(dense)
    arguments = {"data": f.data, "count": f.count, "size": f.size}
    call = Call("SymmetricBlocks", SymmetricBlocks, arguments, check=lambda f: same(f, dense))
    call.bad = {
        "data": bad.constants([None, 3, "text", [1.0]]) + [
            lambda data: data.flatten(), lambda data: data.half(), lambda data: data.long(), lambda data: data[None],
            lambda data: torch.zeros(data.shape).to_sparse(), lambda data: torch.zeros(*data.shape, 2)[..., 0],
        ],
        "count": bad.constants([n for n in NO_INTEGERS if n != 2**62]) + [lambda count: count + 32],
        "size": bad.constants([*NO_INTEGERS, 0]) + [lambda size: size + 1],
    }  # fmt: skip
    if not f.count:  # nothing, of any strides
        del call.bad["data"]
    yield call


def from_packed(choices: Choices):
    dense = drawn(choices)
    row, column = torch.tril_indices(*dense.shape[1:])
    call = Call("SymmetricBlocks.from_packed", SymmetricBlocks.from_packed, {})
    packed = tensor(choices, dense[:, row, column], call, read_only=True)
    values = torch.zeros_like(dense)
    values[:, row, column] = values[:, column, row] = plain(packed)
    call.arguments["packed"], call.check = packed, lambda f: same(f, values)
    call.bad["packed"] = bad.constants([None, 3, "text", [[1.0]]]) + [
        lambda t: t[None], lambda t: t[:, 0], lambda t: t.half(), lambda t: t.bool(), lambda t: t[:, :0],
        lambda t: torch.zeros(t.shape).to_sparse(),
        lambda t: torch.cat([t, t[:, :1]], 1),
    ]  # fmt: skip
    yield call


def from_dense(choices: Choices):
    dense = drawn(choices)
    call = Call("SymmetricBlocks.from_dense", SymmetricBlocks.from_dense, {})
    given = tensor(choices, dense.clone(), call, read_only=True)
    values = plain(given).clone()
    call.arguments["dense"], call.check = given, lambda f: same(f, values)

    def asymmetric(t):
        t = plain(t).clone()
        if t.shape[0] == 0 or t.shape[1] == 1:
            return None
        t[-1, -1, 0] += 1 + t.abs().max()
        return t

    call.bad["dense"] = bad.constants([None, 3, "text", [[[1.0]]]]) + [
        lambda t: t[None], lambda t: t[:, 0], lambda t: t.half(), lambda t: t.long(), lambda t: t[:, :, :0],
        lambda t: torch.zeros(t.shape).to_sparse(), lambda t: t.to("meta"), asymmetric,
        lambda t: torch.cat([t, t], 1),
    ]  # fmt: skip
    yield call


def method(choices: Choices):
    """What takes nothing."""
    dense = drawn(choices)
    f, name = blocks(dense), choices.of(["to_packed", "to_dense", "diagonal", "clone", "__len__", "__repr__"])
    row, column = torch.tril_indices(*dense.shape[1:])
    check = {
        "to_packed": lambda result: assert_bitwise(result, dense[:, row, column]),
        "to_dense": lambda result: assert_bitwise(result, dense),
        "diagonal": lambda result: assert_bitwise(result, dense.diagonal(dim1=1, dim2=2)),
        "clone": lambda result: same(result, dense),
        "__len__": lambda result: result == len(dense),
        "__repr__": lambda result: f"count={len(dense)}, size={dense.shape[1]}" in result,
    }[name]

    def checked(result):
        assert check(result) is not False
        shares = isinstance(result, SymmetricBlocks) and result.data.data_ptr() == f.data.data_ptr() and f.count
        assert not shares, "a clone that shares memory"
        assert (f.nbytes, f.dtype, f.device) == (f.data.nbytes, dense.dtype, dense.device)

    yield Call(name, getattr(f, name), {}, check=checked, touched=[f])


def cat(choices: Choices):
    first = drawn(choices)
    parts = [first, *(drawn(choices, first.dtype, first.shape[1]) for _ in range(choices.of([1, 0, 2])))]
    call = Call("SymmetricBlocks.cat", SymmetricBlocks.cat, {"parts": choices.of([list, tuple])(map(blocks, parts))})
    call.check = lambda f: same(f, torch.cat(parts))
    other = SymmetricBlocks.zeros(1, first.shape[1] + 1)
    call.bad["parts"] = bad.constants([None, 3, "text", [], (), [None], {}]) + [
        lambda good: [*good, other], lambda good: [*good, good[0].data], lambda good: iter(good), lambda good: good[0],
    ]  # fmt: skip
    yield call


def split(choices: Choices):
    dense = drawn(choices)
    f = blocks(dense)
    some = choices.byte() % (f.count + 1)
    counts = choices.of([[some, f.count - some], [f.count], [0, some, f.count - some], (f.count, 0)])

    def check(runs):
        assert [run.count for run in runs] == list(counts)
        for run, expected in zip(runs, dense.split(list(counts)), strict=True):
            same(run, expected)

    call = Call("SymmetricBlocks.split", f.split, {"counts": counts}, check=check, touched=[f])
    wrong = [[-1, f.count + 1], [f.count + 1], [f.count - 0.5, 0.5]]
    call.bad["counts"] = bad.constants([None, 3, "text", [None], *wrong])
    yield call


def to(choices: Choices):
    dense = drawn(choices)
    f, dtype, device = (
        blocks(dense),
        choices.of([None, *DTYPES]),
        choices.of([None, "cpu", torch.device("cpu"), "meta"]),
    )

    def check(moved):
        assert moved.device.type == torch.device(device or "cpu").type
        if device == "meta":
            assert (moved.count, moved.size, moved.dtype) == (f.count, f.size, dtype or f.dtype)
        else:
            same(moved, dense.to(dtype or dense.dtype))

    call = Call("SymmetricBlocks.to", f.to, {"device": device, "dtype": dtype}, check=check, touched=[f], optional=True)
    call.bad = {"device": bad.constants(NO_DEVICES), "dtype": bad.constants(NO_DTYPES)}
    yield call


def ask_backends(choices: Choices):
    def check(found):
        assert list(found) == ["reference", "cpu", "cuda", "triton", "emulated"]
        assert found["reference"] == "available" and all(isinstance(reason, str) for reason in found.values())

    yield Call("backends", mbf_kernels.backends, {}, check=check)


def choose_backend(choices: Choices):
    status = backends()
    available = [name for name in status if status[name] == "available"]

    def use(**arguments):
        with use_backend(**arguments):
            return mbf_kernels.backend.asked_for()

    before = mbf_kernels.backend.asked_for()
    name = choices.of(available)

    def check(used):
        assert used == name and mbf_kernels.backend.asked_for() == before

    call = Call("use_backend", use, {"name": name}, check=check)
    others = [other for other in status if other not in available]
    call.bad["name"] = bad.constants([None, 3, "", "gpu", ["cpu"], {}, torch.ones(2), *others])
    yield call


FUNCTIONS = (
    zeros, construct, from_packed, from_dense, method, cat, split, to, ask_backends, choose_backend,
)  # fmt: skip
