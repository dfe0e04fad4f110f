// A team of PR x PC lanes shares one block: a group of lanes within a warp, or a whole thread block.
//
// The lanes form a grid; lane (r, c) owns the entries (i, j) with i = r mod PR and j = c mod PC, in registers: entry
// [a][b] is (a PR + r, b PC + c). Blocks are padded to N with zeros.
#pragma once

#include "staging.cuh"

namespace mbf {
namespace {

template <class S, int N, int PR, int PC, int kTeams>
class Team {
protected:
    static constexpr int kLanes = PR * PC;
    static constexpr int kRows = N / PR, kCols = N / PC;  // row and column slots of a lane
    static constexpr int kFold = PR / PC;                 // column slots per row slot
    static_assert(N % PR == 0 && PR % PC == 0 && (kLanes < 32 ? 32 % kLanes : kLanes % 32) == 0);
    static_assert(kLanes <= 32 || kTeams == 1);

    explicit MBF_FN Team(int n)
        : n_(n), team_(threadIdx.x / kLanes), lane_(threadIdx.x % kLanes), r_(lane_ % PR), c_(lane_ / PR) {}

    MBF_FN int row_of(int a) const { return a * PR + r_; }

    MBF_FN void sync() const {
        if (kLanes > 32)
            __syncthreads();
        else
            __syncwarp();
    }

    // `length` or a little more, PR modulo the banks of shared memory: arrays this far apart, of which PR neighbouring
    // lanes read neighbouring scalars, are on banks of their own.
    static MBF_HOST_DEVICE constexpr int spread_pitch(int length) {
        constexpr int kBanks = 128 / sizeof(S);
        return length + (PR % kBanks + kBanks - length % kBanks) % kBanks;
    }

    // Of the PR partial sums of a column: a few side by side, then pairwise.
    static MBF_FN S total(const S* partial) {
        constexpr int kSums = PR < 8 ? PR : 8;
        S sum[kSums];
        MBF_UNROLL
        for (int r = 0; r < PR; ++r) sum[r % kSums] = r < kSums ? partial[r] : sum[r % kSums] + partial[r];
        MBF_UNROLL
        for (int half = kSums / 2; half > 0; half /= 2) {
            MBF_UNROLL
            for (int r = 0; r < kSums / 2; ++r)
                if (r < half) sum[r] = sum[r] + sum[r + half];
        }
        return sum[0];
    }

    const int n_;
    const int team_, lane_, r_, c_;
    S entries_[kRows][kCols];
    S rhs_[kRows], x_[kRows];  // of the same rows, the same in all lanes (r, *)
};

}  // namespace
}  // namespace mbf
