// A team of several columns of lanes, by panels of PC columns of the matrix, one to a column of lanes. A panel is shown
// to the team in shared memory. Every lane factors its diagonal tile for itself, in registers; the rows below are
// shared out, a whole row of the panel to a lane; then every lane updates the entries that it owns. A panel costs three
// meetings of the team where column by column would cost PC, and as much less waiting for square roots and quotients.
#pragma once

#include "team.cuh"

namespace mbf {
namespace {

template <class S, int N, int PR, int PC, int kTeams>
class PanelTeam : protected Team<S, N, PR, PC, kTeams> {
    using Base = Team<S, N, PR, PC, kTeams>;

protected:
    using Base::c_;
    using Base::entries_;
    using Base::kCols;
    using Base::kFold;
    using Base::kLanes;
    using Base::kRows;
    using Base::lane_;
    using Base::n_;
    using Base::r_;
    using Base::rhs_;
    using Base::row_of;
    using Base::sync;
    using Base::team_;
    using Base::x_;

    // Scalars of a team in shared memory: a panel, column after column; what is left of the right-hand side; what each
    // pivot leaves for the backward substitution, an entry of L^-1 rhs and the pivot's inverse; two tiles in turn.
    static constexpr int kPitch = Base::spread_pitch(N);
    static constexpr int kTile = PC * PC;
    static constexpr int kExchange = PC * kPitch + 3 * N + 2 * kTile;

    explicit MBF_FN PanelTeam(int n) : Base(n) {}

    // Goes through the panels. kFactor: entries become those of L with L L^T = A; otherwise they are L already.
    // Leaves L^-1 rhs_ to substitute_back. Returns the first bad pivot.
    template <bool kFactor>
    MBF_FN int sweep() {
        S info = 0;
        sync();  // what the place was used for before
        MBF_UNROLL
        for (int a = 0; a < kRows; ++a)
            if (c_ == 0) left()[row_of(a)] = rhs_[a];
        MBF_UNROLL
        for (int b = 0; b < kCols; ++b) {
            if (b * PC >= n_) break;
            sweep_panel<kFactor>(b, info);
        }
        return static_cast<int>(info);
    }

    // x_ <- L^-T y, from the last panel to the first. Of entries above the diagonal nothing is seen: they meet elements
    // of x that are still zero.
    MBF_FN void substitute_back() {
        MBF_UNROLL
        for (int a = 0; a < kRows; ++a) x_[a] = 0;
        MBF_UNROLL
        for (int b = kCols - 1; b >= 0; --b)
            if (b * PC < n_) substitute_panel(b);
    }

    // Of a team, for PR scalars, while it neither sweeps nor substitutes.
    MBF_FN S* exchange() const { return panel(0); }

private:
    // The diagonal tile of L, the inverses of its diagonal, and L^-1 rhs.
    struct Tile {
        S l[PC][PC], inverse[PC], y[PC];
    };

    template <bool kFactor>
    MBF_FN void sweep_panel(int b, S& info) {
        MBF_UNROLL
        for (int a = 0; a < kRows; ++a)
            if (a >= b / kFold) panel(c_)[row_of(a)] = entries_[a][b];
        sync();
        Tile tile = read_tile(b * PC);
        factor_tile<kFactor>(tile, b * PC, info);
        if (lane_ == 0) keep_tile<kFactor>(tile, b);
        finish_rows<kFactor>(tile, (b + 1) * PC);
        sync();
        if (!kFactor) return;
        take_panel(b);
        update(b);
        sync();
    }

    MBF_FN Tile read_tile(int j0) const {
        Tile tile;
        MBF_UNROLL
        for (int k = 0; k < PC; ++k) {
            tile.y[k] = left()[j0 + k];
            MBF_UNROLL
            for (int i = 0; i < PC; ++i)
                if (i >= k) tile.l[i][k] = panel(k)[j0 + i];
        }
        return tile;
    }

    // Beyond n it is the identity's.
    template <bool kFactor>
    MBF_FN void factor_tile(Tile& tile, int j0, S& info) const {
        auto& l = tile.l;
        MBF_UNROLL
        for (int k = 0; k < PC; ++k) {
            const S pivot = j0 + k < n_ ? l[k][k] : S(1);
            l[k][k] = kFactor ? square_root(pivot) : pivot;
            tile.inverse[k] = 1 / l[k][k];
            const S one = l[k][k] * tile.inverse[k];
            info = flag(info, one == one, j0 + k + 1);
            tile.y[k] = tile.y[k] * tile.inverse[k];
            MBF_UNROLL
            for (int i = 0; i < PC; ++i) {
                if (i <= k) continue;
                if (kFactor) l[i][k] = l[i][k] * tile.inverse[k];
                tile.y[i] = tile.y[i] - l[i][k] * tile.y[k];
                MBF_UNROLL
                for (int p = 0; p < PC; ++p)
                    if (kFactor && k < p && p <= i) l[i][p] = l[i][p] - l[i][k] * l[p][k];
            }
        }
    }

    template <bool kFactor>
    MBF_FN void keep_tile(const Tile& tile, int b) const {
        MBF_UNROLL
        for (int k = 0; k < PC; ++k) {
            solved()[2 * (b * PC + k)] = tile.y[k];
            solved()[2 * (b * PC + k) + 1] = tile.inverse[k];
            MBF_UNROLL
            for (int i = 0; i < PC; ++i)
                if (kFactor && i >= k) tile_column(b, k)[i] = tile.l[i][k];
        }
    }

    // Of rows from i0 on, their part of the panel and what is left of the right-hand side.
    template <bool kFactor>
    MBF_FN void finish_rows(const Tile& tile, int i0) const {
        MBF_DO_NOT_UNROLL
        for (int i = i0 + lane_; i < n_; i += kLanes) {
            S l[PC], rest = left()[i];
            MBF_UNROLL
            for (int k = 0; k < PC; ++k) l[k] = panel(k)[i];
            MBF_UNROLL
            for (int k = 0; k < PC; ++k) {
                if (kFactor) panel(k)[i] = l[k] = l[k] * tile.inverse[k];
                rest = rest - l[k] * tile.y[k];
                MBF_UNROLL
                for (int p = 0; p < PC; ++p)
                    if (kFactor && p > k) l[p] = l[p] - l[k] * tile.l[p][k];
            }
            left()[i] = rest;
        }
    }

    // This lane's entries of the finished panel.
    MBF_FN void take_panel(int b) {
        const int a0 = b / kFold, i = row_in_tile(b);
        MBF_UNROLL
        for (int a = 0; a < kRows; ++a)
            if (a >= a0) entries_[a][b] = panel(c_)[row_of(a)];
        if (is_in_tile(i)) entries_[a0][b] = i < c_ ? S(0) : tile_column(b, c_)[i];
    }

    // Inner loops have the same trip count for every panel, without which not every compiler unrolls them.
    MBF_FN void update(int b) {
        const S *rows = panel(0) + r_, *columns = panel(0) + c_;
        MBF_DO_NOT_UNROLL
        for (int k = 0; k < PC; ++k) {
            S down[kRows];
            MBF_UNROLL
            for (int a = 0; a < kRows; ++a)
                if (a >= (b + 1) / kFold) down[a] = rows[a * PR];
            MBF_UNROLL
            for (int b2 = 0; b2 < kCols; ++b2) {
                if (b2 <= b) continue;
                const S across = columns[b2 * PC];
                MBF_UNROLL
                for (int a = 0; a < kRows; ++a)
                    if (a >= b2 / kFold) entries_[a][b2] = entries_[a][b2] - down[a] * across;
            }
            rows += kPitch;
            columns += kPitch;
        }
    }

    // Each lane sums what its own rows below the tile contribute to its column; each column of lanes then adds up its
    // column; every lane solves with the tile for itself.
    MBF_FN void substitute_panel(int b) {
        const int a0 = b / kFold, i_own = row_in_tile(b);
        S mine = 0;
        MBF_UNROLL
        for (int a = kRows - 1; a >= 0; --a)
            if (a >= a0) mine = mine + entries_[a][b] * x_[a];
        panel(c_)[r_] = mine;
        if (is_in_tile(i_own)) tile_column(b, c_)[i_own] = entries_[a0][b];
        sync();
        if (r_ == 0) left()[b * PC + c_] = Base::total(panel(c_));
        sync();
        S x[PC];
        MBF_UNROLL
        for (int k = PC - 1; k >= 0; --k) {
            const int j = b * PC + k;
            S rest = solved()[2 * j] - left()[j];
            MBF_UNROLL
            for (int i = PC - 1; i >= 0; --i)
                if (i > k) rest = rest - tile_column(b, k)[i] * x[i];
            x[k] = rest * solved()[2 * j + 1];
            x_[a0] = i_own == k ? x[k] : x_[a0];
        }
    }

    // Where this lane's row in the slot of the panel's diagonal tile is in that tile.
    MBF_FN int row_in_tile(int b) const { return r_ - b % kFold * PC; }
    static MBF_FN bool is_in_tile(int i) { return 0 <= i && i < PC; }

    MBF_FN S* panel(int k) const { return reinterpret_cast<S*>(shared_memory) + team_ * kExchange + k * kPitch; }
    MBF_FN S* left() const { return panel(PC); }
    MBF_FN S* solved() const { return left() + N; }
    MBF_FN S* tile_column(int b, int k) const { return solved() + 2 * N + b % 2 * kTile + k * PC; }
};

}  // namespace
}  // namespace mbf
