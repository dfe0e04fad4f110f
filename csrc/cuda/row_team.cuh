// A team of one column of lanes (PC = 1), column by column of the matrix: a lane owns whole rows, so the number of a
// column is known to the compiler, the lane's own part of it is in registers, and the rest is read from shared memory
// four scalars at a time. Every lane shows its part of the column to the team and updates the entries that it owns. A
// right-hand side rides along as one more row, so the forward substitution is done with the last column.
#pragma once

#include "team.cuh"

namespace mbf {
namespace {

template <class S, int N, int PR, int kTeams>
class RowTeam : protected Team<S, N, PR, 1, kTeams> {
    using Base = Team<S, N, PR, 1, kTeams>;

protected:
    using Base::entries_;
    using Base::kRows;
    using Base::lane_;
    using Base::n_;
    using Base::r_;
    using Base::rhs_;
    using Base::row_of;
    using Base::sync;
    using Base::team_;
    using Base::x_;

    // Scalars of a team in shared memory: two columns in turn, each with its entry of the right-hand side; what each
    // pivot leaves for the backward substitution, an entry of L^-1 rhs and the pivot's inverse.
    static constexpr int kColumn = Base::spread_pitch(N + 4);
    static constexpr int kSolved = 2 * N;
    static constexpr int kExchange = 2 * kColumn + kSolved;

    explicit MBF_FN RowTeam(int n) : Base(n) {}

    // Goes through the columns. kFactor: entries become those of L with L L^T = A; otherwise they are L already.
    // rhs_ becomes L^-1 rhs. Returns the first bad pivot.
    template <bool kFactor>
    MBF_FN int sweep() {
        S info = 0;
        sync();  // what the columns' place was used for before
        MBF_UNROLL
        for (int j = 0; j < N; ++j) {
            if (j >= n_) break;
            sweep_column<kFactor>(j, info);
        }
        return static_cast<int>(info);
    }

    // x_ <- L^-T y, from the last row to the first. Each lane sums what its own rows contribute to a column. Of entries
    // above the diagonal nothing is seen: they meet elements of x that are still zero.
    MBF_FN void substitute_back() {
        MBF_UNROLL
        for (int a = 0; a < kRows; ++a) x_[a] = 0;
        sync();
        MBF_UNROLL
        for (int j = N - 1; j >= 0; --j)
            if (j < n_) substitute_column(j);
    }

    // Of a team, for PR scalars, while it neither sweeps nor substitutes.
    MBF_FN S* exchange() const { return column(0); }

private:
    // Inner loops have the same trip count for every column, without which not every compiler unrolls them.
    template <bool kFactor>
    MBF_FN void sweep_column(int j, S& info) {
        const int a0 = j / PR;  // the row slot of the pivot
        S* shown = column(j);
        MBF_UNROLL
        for (int a = 0; a < kRows; ++a)
            if (a >= a0) shown[row_of(a)] = entries_[a][j];
        if (r_ == j % PR) shown[N] = rhs_[a0];
        sync();
        const S root = kFactor ? square_root(shown[j]) : shown[j];
        const S inverse = 1 / root;
        const S one = root * inverse;
        info = flag(info, one == one, j + 1);

        S scaled[kRows];  // the column of L over its pivot in this lane's rows below it
        MBF_UNROLL
        for (int a = 0; a < kRows; ++a) {
            if (a < a0) continue;
            const S l = kFactor ? entries_[a][j] * inverse : entries_[a][j];
            scaled[a] = l * inverse;
            if (kFactor) entries_[a][j] = a == a0 && r_ == j % PR ? root : l;
        }
        if (r_ <= j % PR) scaled[a0] = 0;
        const S s = shown[N];
        if (lane_ == 0) {
            solved()[2 * j] = s * inverse;
            solved()[2 * j + 1] = inverse;
        }
        MBF_UNROLL
        for (int a = 0; a < kRows; ++a)
            if (a >= a0) rhs_[a] = rhs_[a] - scaled[a] * s;
        MBF_UNROLL
        for (int j2 = 0; j2 < N; ++j2) {
            if (!kFactor || j2 <= j) continue;
            const S across = shown[j2];
            MBF_UNROLL
            for (int a = 0; a < kRows; ++a)
                if (a >= j2 / PR) entries_[a][j2] = entries_[a][j2] - scaled[a] * across;
        }
    }

    MBF_FN void substitute_column(int j) {
        const int a0 = j / PR;
        S mine = 0;
        MBF_UNROLL
        for (int a = kRows - 1; a >= 0; --a)
            if (a >= a0) mine = mine + entries_[a][j] * x_[a];
        S* partial = column(j);
        partial[r_] = mine;
        sync();
        const S x_j = (solved()[2 * j] - Base::total(partial)) * solved()[2 * j + 1];
        x_[a0] = r_ == j % PR ? x_j : x_[a0];
    }

    MBF_FN S* column(int j) const { return reinterpret_cast<S*>(shared_memory) + ((j & 1) * kTeams + team_) * kColumn; }
    MBF_FN S* solved() const { return reinterpret_cast<S*>(shared_memory) + 2 * kTeams * kColumn + team_ * kSolved; }
};

}  // namespace
}  // namespace mbf
