// Where a number lies: packed lower triangles, tiles of 32 blocks, and the padding rule.
//
// A symmetric n x n block is its lower triangle in row-major order, T = n(n+1)/2 scalars.
//   n <= 20: tiles, data[ceil(B/32)][T][32]: the same entry of 32 blocks is contiguous, so that every
//            access of a vector or a warp is; the last tile is padded with zero blocks.
//   n >  20: block-major, data[B][T_pad], T_pad = T rounded up to a multiple of 4 (16-byte rows).
#pragma once

#include <stdint.h>

#include "block_sizes.def"
#include "host_device.h"

namespace mbf {

constexpr int kTileBlocks = 32;

MBF_HOST_DEVICE static constexpr bool is_tiled(int n) {
    return n <= MBF_MAX_TILED_SIZE;
}

MBF_HOST_DEVICE static constexpr int triangle_size(int n) {
    return n * (n + 1) / 2;
}

MBF_HOST_DEVICE static constexpr int padded_triangle_size(int n) {
    return (triangle_size(n) + 3) / 4 * 4;
}

// Scalars between consecutive entries of one block's triangle.
MBF_HOST_DEVICE static constexpr int64_t entry_stride(int n) {
    return is_tiled(n) ? kTileBlocks : 1;
}

// Offset of the first entry of block b.
MBF_HOST_DEVICE static constexpr int64_t block_offset(int n, int64_t b) {
    return is_tiled(n) ? b / kTileBlocks * triangle_size(n) * kTileBlocks + b % kTileBlocks
                       : b * padded_triangle_size(n);
}

}  // namespace mbf
