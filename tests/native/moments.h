// The driver's cases of the steps that keep element-wise second moments: their memory, and what has to become of it.
#pragma once

#include <algorithm>
#include <memory>

#include "../../csrc/cpu/dispatch.h"
#include "common.h"

struct SharedForm {
    const char* name;
    bool joined = false, scattered = false, graft = false, rest = false, keep = false, cached = false;
};
// "rest": the other options of a step.
const std::vector<SharedForm> kSharedForms = {
    {"shared contiguous", false, false, false, true},
    {"shared contiguous graft keep", false, false, true, false, true},
    {"shared joined", true, false, false, false, true},
    {"shared joined graft", true, false, true, true},
    {"shared scattered", false, true, false, true},
    {"shared scattered graft cached", false, true, true, false, false, true},
    {"shared joined scattered graft", true, true, true},
};

// Registers of every instruction set, tiles of products, storage. More mini-blocks than a tile or a chunk has, but not
// of large blocks: unoptimized, they take long.
const std::vector<int> kSharedSizes = {1, 2, 4, 5, 8, 9, 16, 17, 20, 21, 32, 33, 64, 65, 128};
inline std::vector<int64_t> shared_samples(int n) {
    if (n > 33) return {7};
    if (n > 17) return {6, 65};
    return {1, 5, 6, 7, 63, 64, 65, 130};
}

inline mbf::MomentParameters moment_parameters(bool graft, bool rest) {
    mbf::Parameters q = {};
    q.lr = {kLearningRate, nullptr, mbf::DType::kFloat64};
    q.damping = {kDamping, nullptr, mbf::DType::kFloat64};
    q.momentum = 0.5;
    q.decay = 0.75;
    q.weight_decay = 0.125;
    q.eps = 1.0 / (1 << 20);
    q.graft = graft;
    q.relative = q.nesterov = q.maximize = rest;
    q.update = q.refactor = true;
    return {q, 0.75};
}

// Ways for n elements of S mini-blocks of R matrices to lie in memory. In the first three elements are neighbours.
constexpr int kNeighbours = 3, kSharedLayouts = 5;
inline mbf::SharedView shared_view(int layout, int64_t samples, int64_t matrices, int n) {
    const int64_t S = samples, R = matrices;
    switch (layout) {
        case 0: return {nullptr, n, {S, 0, R * n}, {n, 0, 1}, nullptr, 0, false};
        case 1: return {nullptr, n + 3, {S, 0, R * (n + 3)}, {n, 0, 1}, nullptr, 0, false};
        case 2: return {nullptr, n, {3, 3 * R * n + 5, R * n}, {n, 0, 1}, nullptr, 0, false};
        case 3: return {nullptr, 1, {S, 0, R * n}, {n, 0, R}, nullptr, 0, false};
        default:
            return {nullptr, 3 * n + 3, {2, 2 * R * (3 * n + 3) + 1, R * (3 * n + 3)}, {2, 5, 2}, nullptr, 0, false};
    }
}

// The mini-blocks of one tensor: a buffer, and one of the last elements where a bias joins.
template <class S>
class SharedVectors {
public:
    SharedVectors(const SharedForm& form, int64_t samples, int64_t matrices, int n, int layout)
        : run_(form.joined ? n - 1 : n) {
        view = shared_view(layout % (form.scattered ? kSharedLayouts : kNeighbours), samples, matrices, run_);
        main_ = Buffer<S>(at(samples - 1, matrices - 1, std::max(run_ - 1, 0)) + 1, sizeof(S));
        if (form.joined) {
            view.last_sample = 1 + layout % 3;
            last_ = Buffer<S>((samples - 1) * view.last_sample + 1, sizeof(S));
        }
        view.base = main_.data();
        view.last = last_.data();
        view.joined = form.joined;
    }

    // Rounds x, too.
    void fill(int64_t sample, int64_t matrix, Vector& x) {
        for (size_t k = 0; k < x.size(); ++k) x[k] = element(sample, matrix, k).first->initial(index_) = x[k];
    }
    void expect(int64_t sample, int64_t matrix, const Vector& x) {
        double scale = 1;
        for (double x_k : x) scale = std::max(scale, fabs(x_k));
        for (size_t k = 0; k < x.size(); ++k)
            element(sample, matrix, k).first->expect(index_, x[k], margin<S>(x.size(), scale));
    }

    template <class Visitor>
    void visit(const char* name, Visitor visitor) {
        visitor(name, main_), visitor(name, last_);
    }

    mbf::SharedView view;

private:
    int64_t at(int64_t sample, int64_t matrix, int k) const {
        return matrix * view.matrix + mbf::offset(view.sample, sample) + mbf::offset(view.element, k);
    }

    std::pair<Buffer<S>*, int64_t> element(int64_t sample, int64_t matrix, int k) {
        const bool is_last = k == run_;
        index_ = is_last ? sample * view.last_sample : at(sample, matrix, k);
        return {is_last ? &last_ : &main_, index_};
    }

    const int run_;
    int64_t index_ = 0;
    Buffer<S> main_, last_;
};

// One tensor of a launch. One mini-block of the first matrix has a bad gradient; the last of several is indefinite.
template <class S>
class SharedTensors {
public:
    SharedTensors(const SharedForm& form, int64_t matrices, int64_t samples, int n, int layout)
        : form_(form),
          grad_(form, samples, matrices, n, layout),
          momentum_(form, samples, matrices, n, layout + 1),
          square_(form, samples, matrices, n, layout + 2),
          param_(form, samples, matrices, n, layout + 4),
          fisher_(triangles<S>(n, matrices)),
          info_(matrices, sizeof(int32_t)),
          skipped_(1, sizeof(int64_t)) {
        if (form.keep || form.cached) factor_ = triangles<S>(n, matrices);
        skipped_.initial(0) = 7;
        problem = {matrices,
                   samples,
                   fisher_.data(),
                   factor_.data(),
                   layout % 2 ? info_.data() : nullptr,
                   skipped_.data(),
                   kMomentumWeight,
                   kSecondWeight,
                   grad_.view,
                   momentum_.view,
                   form.graft ? square_.view : mbf::SharedView{},
                   param_.view};
        int64_t bad = 0;
        for (int64_t r = 0; r < matrices; ++r) bad += prepare(r, n);
        skipped_.expect(0, 7 + bad, 0);
    }

    template <class Visitor>
    void visit(Visitor visitor) {
        visitor("F", fisher_), visitor("L", factor_), visitor("info", info_), visitor("skipped", skipped_);
        grad_.visit("g", visitor), momentum_.visit("M", visitor), square_.visit("v", visitor);
        param_.visit("W", visitor);
    }

    mbf::SharedProblem problem;

private:
    // Fills in matrix r and what it has to become; how many of its mini-blocks are bad.
    int64_t prepare(int64_t r, int n) {
        mbf::MomentParameters parameters = moment_parameters(form_.graft, form_.rest);
        parameters.step.refactor = !form_.cached;
        Shared shared = random_shared(n, r);
        if (form_.cached) {
            Block block = {shared.f, {}, {}, {}, {}, {}};
            shared.l = factor(block, false, kDamping, 0) ? Matrix(n, Vector(n)) : block.l;
            fill_triangle(factor_, r, shared.l);
        }
        fill_triangle(fisher_, r, shared.f);
        for (int64_t s = 0; s < problem.samples; ++s) {
            grad_.fill(s, r, shared.g[s]), momentum_.fill(s, r, shared.m[s]);
            square_.fill(s, r, shared.v[s]), param_.fill(s, r, shared.w[s]);
        }
        shared_step(shared, parameters, kNumbers);
        expect_triangle(fisher_, r, shared.f);
        if (form_.keep && !shared.info) expect_triangle(factor_, r, shared.l);
        if (problem.info) info_.expect(r, shared.info, 0);
        for (int64_t s = 0; s < problem.samples; ++s) {
            if (shared.bad[s]) continue;
            momentum_.expect(s, r, shared.m[s]), param_.expect(s, r, shared.w[s]);
            if (form_.graft) square_.expect(s, r, shared.v[s]);
        }
        return std::count(shared.bad.begin(), shared.bad.end(), true);
    }

    Shared random_shared(int n, int64_t r) const {
        Shared shared = {random_matrix(n, r > 0 && r == problem.count - 1), {}, {}, {}, {}, {}, {}};
        for (int64_t s = 0; s < problem.samples; ++s) {
            for (auto* vectors : {&shared.g, &shared.m, &shared.v, &shared.w}) vectors->push_back(random_vector(n));
            for (double& v_k : shared.v[s]) v_k = 0.25 + fabs(v_k);
        }
        if (r == 0 && problem.samples > 1) shared.g[problem.samples / 2][n / 2] = NAN;
        return shared;
    }

    const SharedForm form_;
    SharedVectors<S> grad_, momentum_, square_, param_;
    Buffer<S> fisher_, factor_;
    Buffer<int32_t> info_;
    Buffer<int64_t> skipped_;
};

struct Reset {
    template <class T>
    void operator()(const char*, Buffer<T>& buffer) const {
        buffer.reset();
    }
};
struct Check {
    template <class T>
    void operator()(const char* name, Buffer<T>& buffer) const {
        const std::string complaint = buffer.complaint();
        if (!complaint.empty()) fail(std::string(name) + ": " + complaint);
    }
};

template <class S>
constexpr mbf::DType kDType = sizeof(S) == 4 ? mbf::DType::kFloat32 : mbf::DType::kFloat64;

// Two tensors, the first of three matrices or, where a bias joins, of one.
template <class S>
void run_shared_case(const SharedForm& form, int64_t samples, int n, int layout) {
    if (form.joined && n == 1) return;
    std::vector<std::unique_ptr<SharedTensors<S>>> tensors;
    std::vector<mbf::SharedProblem> problems;
    for (int p = 0; p < 2; ++p) {
        const int64_t matrices = form.joined ? 1 : p ? 2 : 3;
        tensors.push_back(std::make_unique<SharedTensors<S>>(form, matrices, p ? 3 : samples, n, layout + p));
        problems.push_back(tensors.back()->problem);
    }
    mbf::MomentParameters parameters = moment_parameters(form.graft, form.rest);
    parameters.step.refactor = !form.cached;
    for (auto& tensor : tensors) tensor->visit(Reset());
    mbf::cpu::launch_shared(kDType<S>, n, problems, parameters, 3);
    for (auto& tensor : tensors) tensor->visit(Check());
    ++cases;
}

template <class S>
class DiagonalTensors {
public:
    DiagonalTensors(int64_t count, const mbf::MomentParameters& parameters) {
        for (Buffer<S>* buffer : {&grad_, &momentum_, &square_, &param_}) *buffer = Buffer<S>(count, sizeof(S));
        problem = {count,          kMomentumWeight, kSecondWeight, grad_.data(), momentum_.data(),
                   square_.data(), param_.data()};
        for (int64_t i = 0; i < count; ++i) prepare(i, parameters);
    }

    template <class Visitor>
    void visit(Visitor visitor) {
        visitor("g", grad_), visitor("M", momentum_), visitor("v", square_), visitor("W", param_);
    }

    mbf::DiagonalProblem problem;

private:
    void prepare(int64_t i, const mbf::MomentParameters& parameters) {
        const double g = grad_.initial(i) = random_number();
        double m = momentum_.initial(i) = random_number();
        double v = square_.initial(i) = 0.25 + fabs(random_number());
        double w = param_.initial(i) = random_number();
        diagonal_step(g, m, v, w, parameters, kNumbers);
        momentum_.expect(i, m, margin<S>(1, 1)), square_.expect(i, v, margin<S>(1, 1));
        param_.expect(i, w, margin<S>(1, 1));
    }

    Buffer<S> grad_, momentum_, square_, param_;
};

// Tails of every register, none, and so many that threads share them, also within one tensor.
template <class S>
void run_diagonal_case(bool graft) {
    const mbf::MomentParameters parameters = moment_parameters(graft, false);
    std::vector<std::unique_ptr<DiagonalTensors<S>>> tensors;
    std::vector<mbf::DiagonalProblem> problems;
    for (int64_t count : {1, 2, 7, 0, 8, 15, 16, 17, 33, 80003, 31}) {
        tensors.push_back(std::make_unique<DiagonalTensors<S>>(count, parameters));
        problems.push_back(tensors.back()->problem);
    }
    for (auto& tensor : tensors) tensor->visit(Reset());
    mbf::cpu::launch_diagonal(kDType<S>, problems, parameters, 3);
    for (auto& tensor : tensors) tensor->visit(Check());
    ++cases;
}
