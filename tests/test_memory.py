"""What a kept launch asks of tensors: the native answers and Python's are the same."""

import pytest
import torch

from mbf_kernels import memory, native
from mbf_kernels.memory import _Memory, memory_of


def natively(tensors):
    made = memory_of(tensors)
    assert type(made) is native._C.TensorMemory
    return made


without_table = native.UNAVAILABLE or not hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
MAKERS = [_Memory, pytest.param(natively, marks=pytest.mark.skipif(without_table, reason="no DLPack table or kernels"))]
over_makers = pytest.mark.parametrize("make", MAKERS, ids=["python", "native"])


def tensors():
    image = torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)
    return [image, torch.zeros(5, requires_grad=True), torch.zeros(()), torch.zeros(6, 4)[1:4, ::2]]


@over_makers
def test_addresses_of_tensors_laid_out_alike(make):
    first, second = tensors(), tensors()
    made = make(first)
    assert list(made.addresses(first)) == [tensor.data_ptr() for tensor in first]
    assert list(made.addresses(second)) == [tensor.data_ptr() for tensor in second]


@over_makers
def test_holds_what_stays(make):
    first = tensors()
    made = make(first)
    assert made.holds(first)
    assert made.holds([tensor.detach() for tensor in first])  # the same memory
    for i in range(len(first)):
        assert not made.holds(first[:i] + [tensors()[i]] + first[i + 1 :])


CHANGES = {
    "longer": lambda t: torch.zeros(7),
    "shape": lambda t: t.reshape(5, 1),
    "strides": lambda t: torch.zeros(10)[::2],
    "dtype": lambda t: t.double(),
    "device": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
}


@over_makers
@pytest.mark.parametrize("change", CHANGES)
def test_no_addresses_of_what_is_laid_out_otherwise(make, change):
    first = tensors()
    made = make(first)
    assert made.addresses([None, *first[1:]]) is None  # a gradient that is missing
    changed = [first[0], CHANGES[change](first[1].detach()), *first[2:]]
    assert made.addresses(changed) is None
    assert not made.holds(changed)
    assert made.addresses(first[:-1]) is None
    assert made.holds(first)  # and no error stays behind


def test_tensors_without_memory_are_asked_in_python():
    made = memory_of([torch.zeros(3, device="meta")])
    assert type(made) is memory._Memory


@pytest.mark.skipif(bool(without_table), reason="no DLPack table or kernels")
def test_only_tensors_are_asked():
    made = natively(tensors())
    assert made.addresses([1, 2, 3, 4]) is None
    with pytest.raises(TypeError, match="expected tensors"):
        native._C.TensorMemory(torch.Tensor.__dlpack_c_exchange_api__, torch.Tensor, [1])
