"""Storage of SymmetricBlocks: the documented layout, conversions, and what from_dense refuses."""

import pytest
import torch

from mbf_kernels import SymmetricBlocks
from mbf_kernels.testing import assert_bitwise, assert_padding_zero, padding, randn, spd_blocks

COUNTS = (0, 1, 31, 32, 33, 65)
SIZES = (1, 2, 9, 20, 21, 22, 32, 129)  # both sides of the change of layout (20) and of the padding to 4
DTYPES = (torch.float32, torch.float64)

over_shapes = pytest.mark.parametrize("count", COUNTS)
over_sizes = pytest.mark.parametrize("size", SIZES)
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def numbered(count, size, dtype=torch.float32):
    """Packed blocks whose every element is different: [count, T]."""
    length = size * (size + 1) // 2
    return torch.arange(1, count * length + 1, dtype=dtype).reshape(count, length)


@over_shapes
@over_sizes
@over_dtypes
def test_the_layout_is_the_documented_one(count, size, dtype):
    packed = numbered(count, size, dtype)
    length = packed.shape[1]
    blocks = SymmetricBlocks.from_packed(packed)
    if size <= 20:
        expected = torch.zeros(-(-count // 32), length, 32, dtype=dtype)
        for b in range(count):
            expected[b // 32, :, b % 32] = packed[b]
    else:
        expected = torch.zeros(count, -(-length // 4) * 4, dtype=dtype)
        expected[:, :length] = packed
    assert_bitwise(blocks.data, expected)
    assert (blocks.count, blocks.size, blocks.dtype, blocks.device) == (
        count,
        size,
        dtype,
        torch.device("cpu"),
    )
    assert blocks.nbytes == expected.numel() * expected.element_size()
    assert padding(blocks).numel() == expected.numel() - packed.numel()


@over_shapes
@over_sizes
def test_conversions_round_trip(count, size):
    packed = numbered(count, size)
    blocks = SymmetricBlocks.from_packed(packed)
    dense = blocks.to_dense()
    row, column = torch.tril_indices(size, size)  # row-major lower triangle: (0,0), (1,0), (1,1), (2,0), ...
    assert_bitwise(dense[:, row, column], packed)
    assert_bitwise(dense, dense.mT)
    assert_bitwise(blocks.to_packed(), packed)
    assert_bitwise(SymmetricBlocks.from_dense(dense).data, blocks.data)
    assert_padding_zero(SymmetricBlocks.from_dense(dense))


def test_zeros_and_clone_own_their_storage():
    zeros = SymmetricBlocks.zeros(33, 9, dtype=torch.float64)
    assert zeros.dtype == torch.float64 and zeros.to_dense().shape == (33, 9, 9) and not zeros.data.any()
    copy = zeros.clone()
    copy.data.fill_(1)
    assert not zeros.data.any()
    assert SymmetricBlocks.zeros(2, 3).dtype == torch.float32


def test_to_changes_dtype_and_device():
    blocks = SymmetricBlocks.from_packed(numbered(33, 9))
    double = blocks.to(dtype=torch.float64)
    assert_bitwise(double.to_packed(), numbered(33, 9, torch.float64))
    assert_bitwise(double.to(dtype=torch.float32).data, blocks.data)
    meta = blocks.to(device="meta")
    assert meta.device.type == "meta" and (meta.count, meta.size) == (33, 9)


def test_input_may_have_any_strides():
    dense = spd_blocks("well", 5, 9)
    assert_bitwise(SymmetricBlocks.from_dense(dense.mT).to_dense(), dense)
    assert_bitwise(SymmetricBlocks.from_dense(dense.flip(0)[::2]).to_dense(), dense.flip(0)[::2])
    packed = numbered(4, 3)
    assert_bitwise(SymmetricBlocks.from_packed(packed.t().contiguous().t()).to_packed(), packed)


@pytest.mark.parametrize("size", [2, 20, 33])
@over_dtypes
def test_from_dense_symmetry_tolerance(size, dtype):
    """A block is symmetric when |A - A^T| <= n eps max|A|, each block against its own magnitude."""
    dense = spd_blocks("well", 3, size, dtype)
    tolerance = size * torch.finfo(dtype).eps * dense[1].abs().max()
    nearly, wrong = dense.clone(), dense.clone()
    nearly[1, 1, 0] += tolerance / 2
    wrong[1, 1, 0] += tolerance * 3
    wrong[0] *= 1e6  # a large neighbour hides nothing
    assert SymmetricBlocks.from_dense(nearly).count == 3
    with pytest.raises(ValueError, match="symmetric"):
        SymmetricBlocks.from_dense(wrong)


def test_from_dense_accepts_nan_and_keeps_it():
    dense = spd_blocks("well", 3, 4)
    dense[1, 2, 2] = torch.nan
    dense[2, 3, 0] = dense[2, 0, 3] = torch.nan
    assert_bitwise(SymmetricBlocks.from_dense(dense).to_dense(), dense)


@pytest.mark.parametrize("bad, error", [
    (torch.zeros(3, 3), ValueError),
    (torch.zeros(2, 3, 4), ValueError),
    (torch.zeros(2, 3, 3, 3), ValueError),
    (randn(2, 3, 3), ValueError),  # not symmetric
    (torch.zeros(2, 3, 3, dtype=torch.float16), TypeError),
    (torch.zeros(2, 3, 3, dtype=torch.int64), TypeError),
    (torch.zeros(2, 3, 3, dtype=torch.complex64), TypeError),
    (torch.zeros(2, 3, 3).to_sparse(), (TypeError, ValueError)),
    ([[1.0]], (TypeError, ValueError)),
])  # fmt: skip
def test_from_dense_refuses(bad, error):
    with pytest.raises(error, match="from_dense"):
        SymmetricBlocks.from_dense(bad)


@pytest.mark.parametrize("bad, error", [
    (torch.zeros(2, 5), ValueError),  # 5 is not triangular
    (torch.zeros(6), ValueError),
    (torch.zeros(2, 3, 3), ValueError),
    (torch.zeros(2, 6, dtype=torch.bfloat16), TypeError),
])  # fmt: skip
def test_from_packed_refuses(bad, error):
    with pytest.raises(error, match="from_packed"):
        SymmetricBlocks.from_packed(bad)


@pytest.mark.parametrize("count, size, dtype", [
    (-1, 3, torch.float32), (2, 0, torch.float32), (2, -3, torch.float32), (2, 3, torch.float16),
    (2, 3, torch.int32),
])  # fmt: skip
def test_zeros_refuses(count, size, dtype):
    with pytest.raises((ValueError, TypeError)):
        SymmetricBlocks.zeros(count, size, dtype=dtype)
