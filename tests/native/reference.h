// The ops on one block in double precision, as plainly as can be.
#pragma once

#include <math.h>

#include <vector>

#include "../../csrc/types.h"

using Vector = std::vector<double>;  // [n]
using Matrix = std::vector<Vector>;  // [n][n], lower triangle

struct Numbers {
    double lr, damping, momentum_weight, fisher_weight;
};

// In: what the kernel is given. Out: what it has to leave where info is 0; x is also the solution of a solve.
struct Block {
    Matrix f, l;
    Vector g, rhs, w, x;
    int info = 0;
};

inline void accumulate(Block& block, double decay) {
    for (size_t i = 0; i < block.g.size(); ++i)
        for (size_t j = 0; j <= i; ++j) block.f[i][j] = decay * block.f[i][j] + (1 - decay) * block.g[i] * block.g[j];
}

// L with L L^T = F + lambda I; the first bad pivot, from 1.
inline int factor(Block& block, bool relative, double damping, double zero_block_lambda) {
    const int n = block.f.size();
    double trace = 0;
    for (int i = 0; i < n; ++i) trace += block.f[i][i];
    const double lambda = !relative ? damping : trace > 0 ? damping * trace / n : zero_block_lambda;
    Matrix l = block.f;
    for (int j = 0; j < n; ++j) {
        l[j][j] += lambda;
        for (int k = 0; k < j; ++k) l[j][j] -= l[j][k] * l[j][k];
        if (!(l[j][j] > 0 && isfinite(l[j][j]))) return j + 1;
        l[j][j] = sqrt(l[j][j]);
        for (int i = j + 1; i < n; ++i) {
            for (int k = 0; k < j; ++k) l[i][j] -= l[i][k] * l[j][k];
            l[i][j] /= l[j][j];
        }
    }
    block.l = l;
    return 0;
}

// (L L^T)^-1 x; the first pivot that is zero.
inline int solve(const Matrix& l, Vector& x) {
    const int n = l.size();
    for (int i = 0; i < n; ++i) {
        if (l[i][i] == 0) return i + 1;
        for (int k = 0; k < i; ++k) x[i] -= l[i][k] * x[k];
        x[i] /= l[i][i];
    }
    for (int i = n - 1; i >= 0; --i) {
        for (int k = i + 1; k < n; ++k) x[i] -= l[k][i] * x[k];
        x[i] /= l[i][i];
    }
    return 0;
}

inline int first_nonfinite(const Vector& x) {
    for (size_t k = 0; k < x.size(); ++k)
        if (!isfinite(x[k])) return k + 1;
    return 0;
}

inline double norm(const Vector& x) {
    double sum = 0;
    for (double x_k : x) sum += x_k * x_k;
    return sqrt(sum);
}

inline void fused(Block& block, const mbf::Parameters& q, const Numbers& numbers) {
    accumulate(block, q.decay);
    block.info = factor(block, q.relative, numbers.damping, 0);
    if (!block.info) block.info = first_nonfinite(block.g);
    if (block.info) return;
    block.x = block.rhs;
    solve(block.l, block.x);
}

inline void step(Block& block, const mbf::Parameters& q, const Numbers& numbers) {
    const int n = block.g.size();
    for (double& g_k : block.g) g_k = q.maximize ? -g_k : g_k;
    if (q.update) accumulate(block, q.decay);
    if (q.refactor) block.info = factor(block, q.relative, numbers.damping, 1);
    Vector d(n);
    for (int k = 0; k < n; ++k) {
        block.rhs[k] = q.momentum * block.rhs[k] + block.g[k];
        d[k] = q.nesterov ? q.momentum * block.rhs[k] + block.g[k] : block.rhs[k];
    }
    block.x = d;
    if (!block.info) block.info = solve(block.l, block.x);
    if (!block.info) block.info = first_nonfinite(block.g);
    if (block.info) return;
    double rate = numbers.lr;
    if (q.graft) {
        Vector u(n);
        for (int k = 0; k < n; ++k)
            u[k] = (1 - q.momentum) / numbers.momentum_weight * d[k] /
                   (sqrt(block.f[k][k] / numbers.fisher_weight) + q.eps);
        rate *= norm(u) / norm(block.x);
    }
    for (int k = 0; k < n; ++k) block.w[k] = (1 - numbers.lr * q.weight_decay) * block.w[k] - rate * block.x[k];
}

// One matrix and the mini-blocks that share it, likewise.
struct Shared {
    Matrix f, l;
    std::vector<Vector> g, m, v, w;  // [S][n]
    std::vector<bool> bad;           // [S]
    int info = 0;
};

// F <- decay F + (1 - decay) mean_s g_s g_s^T, unless its diagonal would not be finite.
inline void accumulate_mean(Shared& shared, double decay) {
    Matrix updated = shared.f;
    bool finite = true;
    for (size_t i = 0; i < updated.size(); ++i)
        for (size_t j = 0; j <= i; ++j) {
            double sum = 0;
            for (const Vector& g : shared.g) sum += g[i] * g[j];
            updated[i][j] = decay * updated[i][j] + (1 - decay) * sum / shared.g.size();
            finite &= i != j || isfinite(updated[i][i]);
        }
    if (finite) shared.f = updated;
}

inline void shared_step(Shared& shared, const mbf::MomentParameters& parameters, const Numbers& numbers) {
    const mbf::Parameters& q = parameters.step;
    const size_t n = shared.f.size();
    if (q.update) accumulate_mean(shared, q.decay);
    Block block = {shared.f, shared.l, {}, {}, {}, {}};
    if (q.refactor) shared.info = factor(block, q.relative, numbers.damping, 1);
    for (size_t s = 0; s < shared.g.size(); ++s) {
        Vector m(n), v(n), d(n), u(n);
        for (size_t k = 0; k < n; ++k) {
            const double g = q.maximize ? -shared.g[s][k] : shared.g[s][k];
            m[k] = q.momentum * shared.m[s][k] + g;
            d[k] = q.nesterov ? q.momentum * m[k] + g : m[k];
            v[k] = parameters.square_decay * shared.v[s][k] + (1 - parameters.square_decay) * g * g;
            u[k] = (1 - q.momentum) / numbers.momentum_weight * d[k] / (sqrt(v[k] / numbers.fisher_weight) + q.eps);
        }
        Vector x = d;
        if (!shared.info) shared.info = solve(block.l, x);
        shared.bad.push_back(shared.info || first_nonfinite(d));
        if (shared.bad[s]) continue;
        const double rate = numbers.lr * (q.graft ? norm(u) / norm(x) : 1);
        for (size_t k = 0; k < n; ++k)
            shared.w[s][k] = (1 - numbers.lr * q.weight_decay) * shared.w[s][k] - rate * x[k];
        shared.m[s] = m;
        if (q.graft) shared.v[s] = v;
    }
    if (!shared.info) shared.l = block.l;
}

// f: F without lambda.
inline void rank_one_step(double g, double f, double& m, double& w, const mbf::RankOneParameters& parameters,
                          const Numbers& numbers) {
    const mbf::Parameters& q = parameters.step;
    m = q.momentum * m + (1 - q.momentum) * (parameters.decoupled ? g : g + q.weight_decay * w);
    w = (parameters.decoupled ? 1 - numbers.lr * q.weight_decay : 1) * w -
        numbers.lr / numbers.momentum_weight * m / (f + numbers.damping);
}

inline void diagonal_step(double g, double& m, double& v, double& w, const mbf::MomentParameters& parameters,
                          const Numbers& numbers) {
    const mbf::Parameters& q = parameters.step;
    m = q.momentum * m + g;
    const double mean = (1 - q.momentum) * m, squared = q.graft ? g : mean;
    v = parameters.square_decay * v + (1 - parameters.square_decay) * squared * squared;
    const double length = sqrt(v / numbers.fisher_weight) + q.eps;
    w = (1 - numbers.lr * q.weight_decay) * w - numbers.lr * mean / (q.graft ? numbers.momentum_weight : 1) / length;
}
