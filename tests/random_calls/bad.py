"""What no function takes: by the kind of argument, functions from a good value to a bad one."""

import numpy as np
import torch

from mbf_kernels import SymmetricBlocks

NAN, INF = float("nan"), float("inf")
NO_NUMBERS = [None, "much", "0.5", b"1", 1j, [0.5, "much"], {}, object(), 10**400, NAN, -INF, -1.0, torch.ones(2),
              torch.tensor(1.0, device="meta"), np.ones(2)]  # fmt: skip


def constants(values):
    return [lambda old, value=value: value for value in values]


NUMBERS = constants([*NO_NUMBERS, INF])
DEVICE_NUMBERS = NUMBERS + constants([torch.tensor(1), torch.tensor(0.5, dtype=torch.float16), torch.ones(1)])
UNIT = NUMBERS + constants([1.1, 2, np.float64(3)])
UNIT_OPEN = UNIT + constants([1, 1.0, True])
WEIGHTS = DEVICE_NUMBERS + constants([0, 0.0, 1.5, [1.0] * 9, [torch.tensor(1.0)] * 9, ["much"]])
FLAGS = constants([torch.ones(2), np.zeros(2)])
GRAFTS = constants(["sgd", 1, True, ["adam"], np.array(["adam", "adam"]), torch.ones(2)])


def overlapping(t):
    """Elements that share memory without a stride of zero."""
    return torch.zeros(t.numel() + 8, dtype=t.dtype).as_strided((*t.shape, 2), (1,) * (t.ndim + 1))[..., 0]


@torch.inference_mode()
def inference(t):
    return t.detach().clone()


ANY_TENSOR = constants([None, 3, "text", 0.5, np.ones(3), object()]) + [
    lambda t: t.tolist(),
    lambda t: t.to(torch.float64 if t.dtype == torch.float32 else torch.float32),
    lambda t: t.half(),
    lambda t: t.bfloat16(),
    lambda t: t.long(),
    lambda t: t.bool(),
    lambda t: t.to(torch.complex64),
    lambda t: t.to("meta"),
    lambda t: torch.zeros(t.shape, dtype=t.dtype).to_sparse(),
    lambda t: t.new_zeros([extent + 1 for extent in t.shape]) if t.ndim else None,
    lambda t: t.new_zeros((*t.shape[:-2], t.shape[-2] + 1, t.shape[-1])) if t.ndim > 1 else None,
    lambda t: t[None, None, None],
    lambda t: t.detach().clone().requires_grad_(),
]
WRITTEN = ANY_TENSOR + [
    lambda t: t[:1].expand(t.shape) if t.ndim and len(t) > 1 else None,
    lambda t: overlapping(t) if t.ndim > 1 and min(t.shape) > 1 else None,
    inference,
]


def other_blocks(count=0, size=0, **options):
    """Of another count, size, dtype or device than the good ones."""

    def bad(f):
        like = dict(dtype=f.dtype) | options
        return SymmetricBlocks.zeros(f.count + count, f.size + size, **like)

    return bad


def damaged(attribute, value):
    def bad(f):
        f = f.clone()
        setattr(f, attribute, value(f))
        return f

    return bad


NO_BLOCKS = constants([None, 3, "text", [], torch.ones(2, 2)]) + [
    lambda f: f.data,
    damaged("count", lambda f: f.count + 32),
    damaged("count", lambda f: -1),
    damaged("count", lambda f: "3"),
    damaged("size", lambda f: f.size + 1),
    damaged("size", lambda f: 0),
    damaged("data", lambda f: None),
    damaged("data", lambda f: f.data.flatten()),
    damaged("data", lambda f: f.data.half()),
    damaged("data", lambda f: f.data.to_sparse()),
    damaged("data", lambda f: torch.zeros(*f.data.shape, 2, dtype=f.dtype)[..., 0] if f.data.numel() > 1 else None),
]
UNLIKE_BLOCKS = NO_BLOCKS + [
    other_blocks(count=1),
    other_blocks(size=1),
    other_blocks(device="meta"),
    lambda f: f.to(dtype=torch.float64 if f.dtype == torch.float32 else torch.float32),
]


def lists(bad):
    """Of an argument that is a list: no list, one of another length, or one with a bad element."""

    def with_bad(items, bad):
        first = items[0]
        if isinstance(first, tuple):
            return [(bad(first[0]), *first[1:]), *items[1:]]
        return [bad(first), *items[1:]]

    no_list = constants([5, "ab", {}, iter(()), torch.tensor(1.0)])
    of_another_length = [lambda items: [*items, items[0]], lambda items: items[1:]]
    return no_list + of_another_length + [lambda items, one=one: with_bad(items, one) for one in bad]


NONE = constants([None])
TENSORS, WRITTEN_TENSORS = NONE + lists(ANY_TENSOR), NONE + lists(WRITTEN)
BLOCK_LISTS = NONE + lists(UNLIKE_BLOCKS)
OPTIONAL_BLOCK_LISTS = lists(UNLIKE_BLOCKS)
OPTIONAL_COUNTERS = lists(constants([None, 3, "text", torch.tensor(0.0), torch.zeros(2, dtype=torch.int64),
                            torch.tensor(0, dtype=torch.int32), torch.zeros(1, dtype=torch.int64).to_sparse(),
                            torch.tensor(0, device="meta")]))  # fmt: skip
