// Runs every op on the CPU kernels and on the emulated CUDA kernels at the sizes where something changes, and compares
// with a plain reference: values, untouched memory, and equal bits whatever the order of the emulated threads.
//
//   driver [cpu|emulated [WORD...]]     only cases whose names have every WORD, as in: driver emulated group n=24 solve
//
// Exit status 1, and a line for each of the first failures. Meant to be built with sanitizers: MBF_SANITIZE in
// CMakeLists.txt.
#include <algorithm>
#include <functional>
#include <iterator>
#include <memory>
#include <set>
#include <sstream>

#include "../../csrc/cpu/dispatch.h"
#include "../../csrc/cuda/launch.h"
#include "../../csrc/cuda/mappings.def"
#include "../../csrc/emulator/fibers.h"
#include "common.h"
#include "moments.h"
#include "rank_one.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
extern "C" const char* __tsan_default_options() {
    return "halt_on_error=1";
}
#endif

namespace {

using namespace mbf;

#if defined(__SANITIZE_THREAD__)
constexpr bool kFindsRaces = true;  // whatever the schedule
#else
constexpr bool kFindsRaces = false;
#endif
// An op in one of its forms.
struct Form {
    const char* name;
    Op op;
    int flags = 0;
    int rhs_count = 1;
    int problems = 1;
};
enum Flag {
    kRelative = 1,
    kGraft = 2,
    kNesterov = 4,
    kMaximize = 8,
    kNoUpdate = 16,
    kCached = 32,  // step: L is given
    kKeepL = 64,   // step: L is stored
    kOnDevice = 128,
    kOnlyCpu = 256,
    kOnlyGpu = 512,
};
const std::vector<Form> kForms = {
    {"accumulate", Op::kAccumulate},
    {"factor", Op::kFactor},
    {"factor relative", Op::kFactor, kRelative},
    {"solve", Op::kSolve},
    {"solve several", Op::kSolve, 0, 3},
    {"solve many", Op::kSolve, kOnlyCpu, 19},  // more than there are lanes
    {"fused", Op::kFused},
    {"fused relative", Op::kFused, kRelative},
    {"fused device", Op::kFused, kOnlyGpu | kOnDevice},
    {"step", Op::kStep},
    {"step graft keep", Op::kStep, kRelative | kGraft | kKeepL, 1, 3},
    {"step device", Op::kStep, kRelative | kGraft | kKeepL | kOnlyGpu | kOnDevice, 1, 2},
    {"step nesterov maximize", Op::kStep, kNesterov | kMaximize | kKeepL},
    {"step graft frozen", Op::kStep, kGraft | kNesterov | kNoUpdate},
    {"step cached", Op::kStep, kGraft | kCached},
    {"step cached frozen", Op::kStep, kCached | kNoUpdate, 1, 2},
};
// More than one table of problems.
const Form kManyProblems = {"step problems", Op::kStep, kGraft | kKeepL, 1, 103};

Parameters parameters_of(const Form& form) {
    Parameters q = {};
    q.lr = {kLearningRate, nullptr, DType::kFloat64};
    q.damping = {kDamping, nullptr, DType::kFloat64};
    q.momentum = 0.5;
    q.decay = 0.75;
    q.weight_decay = 0.125;
    q.eps = 1.0 / (1 << 20);
    q.relative = form.flags & kRelative;
    q.graft = form.flags & kGraft;
    q.nesterov = form.flags & kNesterov;
    q.maximize = form.flags & kMaximize;
    q.update = !(form.flags & kNoUpdate);
    q.refactor = !(form.flags & kCached);
    q.rhs_count = form.rhs_count;
    return q;
}

// Ways for n elements of `count` blocks, each of `width` scalars, to lie in memory: one after the other, channels_last
// over 37 channels, gaps everywhere, gaps between blocks.
constexpr int kLayouts = 4;
BlockView view_of(int layout, int64_t count, int n, int64_t width) {
    const int64_t w = width;
    switch (layout % kLayouts) {
        case 0: return {nullptr, {count, 0, n * w}, {n, 0, w}};
        case 1: return {nullptr, {37, 37 * n * w, w}, {n, 0, 37 * w}};
        case 2: return {nullptr, {7, (7 * (3 * n + 3) + 11) * w, (3 * n + 3) * w}, {2, 5 * w, 2 * w}};
        default: return {nullptr, {count, 0, (n + 3) * w}, {n, 0, w}};
    }
}

enum Bad { kGood, kNanGradient, kIndefinite };
Bad bad_of(int64_t b, int64_t count) {
    if (count == 1) return kGood;
    return b == count / 2 ? kNanGradient : b == count - 1 ? kIndefinite : kGood;
}

// One tensor of a launch: its memory, and what has to become of it.
template <class S>
class Tensors {
public:
    Tensors(const Form& form, int64_t count, int n, int layout)
        : form_(form), count_(count), n_(n), numbers_(2, sizeof(float)), doubles_(2, sizeof(double)) {
        const bool solves = form.op == Op::kSolve, steps = form.op == Op::kStep;
        if (!solves) fisher_ = triangles<S>(n_, count_);
        if (solves || form.op == Op::kFactor || form.flags & (kCached | kKeepL)) factor_ = triangles<S>(n_, count_);
        if (form.op != Op::kFactor && !solves) grad_ = vectors(problem.grad, layout, 1);
        if (form.op != Op::kFactor && form.op != Op::kAccumulate) {
            rhs_ = vectors(problem.rhs, layout + 1, form.rhs_count);
            out_ = vectors(problem.out, layout + 2, form.rhs_count);
        }
        if (!solves && form.op != Op::kAccumulate) info_ = Buffer<int32_t>(count, sizeof(int32_t));
        if (steps && layout % 2) {
            skipped_ = Buffer<int64_t>(1, sizeof(int64_t));
            skipped_.initial(0) = 7;
        }
        problem.count = count;
        problem.fisher = fisher_.data();
        problem.factor = factor_.data();
        problem.info = info_.data();
        problem.skipped = skipped_.data();
        problem.grad.base = grad_.data();
        problem.rhs.base = rhs_.data();
        problem.out.base = out_.data();
        numbers_.initial(0) = kMomentumWeight;
        numbers_.initial(1) = kDamping;
        doubles_.initial(0) = kSecondWeight;
        doubles_.initial(1) = kLearningRate;
        problem.momentum_weight = number(kMomentumWeight, numbers_.data(), DType::kFloat32);
        problem.fisher_weight = number(kSecondWeight, doubles_.data(), DType::kFloat64);
        int64_t bad = 0;
        for (int64_t b = 0; b < count; ++b) bad += prepare(b);
        if (skipped_.data()) skipped_.expect(0, 7 + bad, 0);
    }

    // Learning rate and damping belong to the launch: the first tensor holds them.
    void complete(Parameters& q) const {
        q.damping = number(kDamping, numbers_.data() + 1, DType::kFloat32);
        q.lr = number(kLearningRate, doubles_.data() + 1, DType::kFloat64);
    }

    void reset() {
        visit([](const char*, auto& buffer) { buffer.reset(); });
    }
    void remember() {
        visit([](const char*, auto& buffer) { buffer.remember(); });
    }
    void check() {
        visit([](const char* name, auto& buffer) {
            const std::string complaint = buffer.complaint();
            if (!complaint.empty()) fail(std::string(name) + ": " + complaint);
        });
    }
    void check_bits() {
        visit([](const char* name, auto& buffer) {
            if (buffer.differs_from_first_run()) fail(std::string(name) + ": depends on the order of the threads");
        });
    }

    Problem problem = {};

private:
    template <class Visitor>
    void visit(Visitor visitor) {
        visitor("F", fisher_), visitor("L", factor_), visitor("g", grad_), visitor("right-hand side", rhs_);
        visitor("output", out_), visitor("info", info_), visitor("skipped", skipped_);
        visitor("float numbers", numbers_), visitor("double numbers", doubles_);
    }

    Scalar number(double value, const void* device, DType dtype) const {
        if (form_.flags & kOnDevice) return {NAN, device, dtype};
        return {value, nullptr, DType::kFloat64};
    }

    Buffer<S> vectors(BlockView& view, int layout, int width) const {
        view = view_of(layout, count_, n_, width);
        int64_t last = 0;
        for (int64_t b = 0; b < count_; ++b)
            for (int k = 0; k < n_; ++k) last = std::max(last, at(view, b, k));
        return Buffer<S>(last + width, sizeof(S));
    }
    static int64_t at(const BlockView& view, int64_t b, int k) {
        return offset(view.block, b) + offset(view.element, k);
    }

    // Fills in block b and what it has to become; whether it is bad.
    bool prepare(int64_t b) {
        const Bad bad = bad_of(b, count_);
        const bool solves = form_.op == Op::kSolve;
        const Parameters q = parameters_of(form_);
        Block block = random_block(bad);
        if (solves || form_.flags & kCached) {
            if (factor(block, false, kDamping, 0)) block.l = Matrix(n_, Vector(n_));
            fill_triangle(factor_, b, block.l);
        }
        if (fisher_.data()) fill_triangle(fisher_, b, block.f);
        if (grad_.data()) fill(grad_, problem.grad, b, block.g);
        if (solves) return solve_columns(b, block.l), false;
        if (rhs_.data()) fill(rhs_, problem.rhs, b, block.rhs);
        if (form_.op == Op::kStep) fill(out_, problem.out, b, block.w);

        switch (form_.op) {
            case Op::kAccumulate:
                accumulate(block, q.decay);
                if (bad != kNanGradient) expect_triangle(fisher_, b, block.f);
                return false;
            case Op::kFactor:
                block.info = factor(block, q.relative, kDamping, 0);
                if (block.info) block.l = Matrix(n_, Vector(n_));
                expect_triangle(factor_, b, block.l);
                break;
            case Op::kFused:
                fused(block, q, kNumbers);
                if (!block.info) expect_triangle(fisher_, b, block.f);
                expect_vector(out_, problem.out, b, block.info ? Vector(n_) : block.x);
                break;
            default:
                step(block, q, kNumbers);
                if (block.info) break;
                if (q.update) expect_triangle(fisher_, b, block.f);
                if (form_.flags & kKeepL) expect_triangle(factor_, b, block.l);
                expect_vector(rhs_, problem.rhs, b, block.rhs);
                expect_vector(out_, problem.out, b, block.w);
        }
        info_.expect(b, block.info, 0);
        return block.info != 0;
    }

    void solve_columns(int64_t b, const Matrix& l) {
        for (int r = 0; r < form_.rhs_count; ++r) {
            Vector x = random_vector(n_);
            fill(rhs_, problem.rhs, b, x, r);
            expect_vector(out_, problem.out, b, solve(l, x) ? Vector(n_) : x, r);
        }
    }

    Block random_block(Bad bad) const {
        Block block = {
            random_matrix(n_, bad == kIndefinite), {}, random_vector(n_), random_vector(n_), random_vector(n_), {}};
        if (bad == kNanGradient) block.g[n_ / 2] = NAN;
        return block;
    }

    // Rounds x, too.
    void fill(Buffer<S>& buffer, const BlockView& view, int64_t b, Vector& x, int column = 0) {
        for (int k = 0; k < n_; ++k) x[k] = buffer.initial(at(view, b, k) + column) = x[k];
    }

    void expect_vector(Buffer<S>& buffer, const BlockView& view, int64_t b, const Vector& values, int column = 0) {
        double scale = 1;
        for (double value : values) scale = std::max(scale, fabs(value));
        for (int k = 0; k < n_; ++k) buffer.expect(at(view, b, k) + column, values[k], margin<S>(n_, scale));
    }

    const Form form_;
    const int64_t count_;
    const int n_;
    Buffer<S> fisher_, factor_, grad_, rhs_, out_;
    Buffer<int32_t> info_;
    Buffer<int64_t> skipped_;
    Buffer<float> numbers_;   // momentum weight, damping
    Buffer<double> doubles_;  // Fisher weight, learning rate
};

using Launch = std::function<void(Op, DType, int, const std::vector<Problem>&, const Parameters&)>;

template <class S>
void run_case(const Launch& launch, const std::vector<unsigned>& schedules, const Form& form, int64_t count, int n,
              int layout) {
    Parameters q = parameters_of(form);
    std::vector<std::unique_ptr<Tensors<S>>> tensors;
    std::vector<Problem> problems;
    for (int p = 0; p < form.problems; ++p) {  // of count, 1, 2, 3, 1, .. blocks
        tensors.push_back(std::make_unique<Tensors<S>>(form, p ? 1 + (p - 1) % 3 : count, n, layout + p));
        problems.push_back(tensors.back()->problem);
    }
    tensors[0]->complete(q);
    for (unsigned schedule : schedules) {
        for (auto& tensor : tensors) tensor->reset();
        emulator::set_schedule(schedule);
        launch(form.op, sizeof(S) == 4 ? DType::kFloat32 : DType::kFloat64, n, problems, q);
        for (auto& tensor : tensors) {
            tensor->check();
            if (schedule == schedules[0])
                tensor->remember();
            else
                tensor->check_bits();
        }
    }
    ++cases;
}

std::vector<std::string> wanted_words;

bool is_wanted(const std::string& name) {
    std::istringstream stream(name);
    std::set<std::string> words{std::istream_iterator<std::string>(stream), {}};
    return std::all_of(wanted_words.begin(), wanted_words.end(), [&](const auto& word) { return words.count(word); });
}

// What runs the ops: an instruction set, or a mapping of the emulated kernels.
struct Target {
    std::string name;
    bool emulated;
    Launch launch;
    std::vector<int> sizes;
    std::function<std::vector<int64_t>(int n, bool is_double)> counts;  // of blocks; none: n is not served
};

template <class S>
void run_size(const Target& target, int n) {
    const std::vector<int64_t> counts = target.counts(n, sizeof(S) == 8);
    const std::string name = target.name + (sizeof(S) == 4 ? " float" : " double") + " n=" + std::to_string(n);
    const std::vector<unsigned> schedules =
        target.emulated && !kFindsRaces ? std::vector<unsigned>{0, 1, 12345} : std::vector<unsigned>{0};
    const int64_t before = cases;
    const auto run = [&](const Form& form, int64_t count, int layout) {
        if (form.flags & (target.emulated ? kOnlyCpu : kOnlyGpu)) return;
        current_case = name + " B=" + std::to_string(count) + " " + form.name;
        if (!is_wanted(current_case)) return;
        run_case<S>(target.launch, schedules, form, count, n, layout);
    };
    for (size_t c = 0; c < counts.size(); ++c)
        for (size_t f = 0; f < kForms.size(); ++f) run(kForms[f], counts[c], static_cast<int>(c + f));
    if (n == 2 && !counts.empty()) run(kManyProblems, 1, 0);
    if (cases > before) printf("%s: %lld cases\n", name.c_str(), static_cast<long long>(cases - before));
}

void run_target(const Target& target) {
    for (int n : target.sizes) {
        run_size<float>(target, n);
        run_size<double>(target, n);
    }
}

// Where the storage changes (20), at the ends of compiled sizes and, on GPUs, of each mapping's kernels.
const std::vector<int> kCpuSizes = {1, 2, 9, 10, 16, 17, 20, 21, 33, 64, 65, 128};
const std::vector<int> kThreadSizes = {1, 2, 9, 12, 13, 16, 17, 20};
const std::vector<int> kGroupSizes = {1, 2, 16, 17, 20, 21, 24, 25, 28, 29, 32, 33, 40, 41, 48, 49, 64};
const std::vector<int> kBlockSizes = {1, 20, 21, 64, 65, 80, 81, 96, 97, 128};

std::vector<int64_t> around(std::vector<int64_t> counts, int64_t edge) {
    for (int64_t count : {edge - 1, edge, edge + 1})
        if (count > 0 && std::find(counts.begin(), counts.end(), count) == counts.end()) counts.push_back(count);
    return counts;
}

// Around a tile or, where there are none, the lanes of any instruction set; and so many that threads share them, all
// that can race. Below n = 9 those would be too many, and beyond 64 nothing is shared that is not below.
std::vector<int64_t> cpu_counts(int n, bool) {
    if (kFindsRaces && n > 64) return {};
    const int64_t shared = std::max<int64_t>(33, static_cast<int64_t>(6e5 / (n * n * (n / 6.0 + 4))));
    std::vector<int64_t> counts;
    if (!kFindsRaces) counts = around({1}, n <= 33 ? kTileBlocks : kTileBlocks / 2);
    if (n >= 9) counts.push_back(shared);
    return counts;
}

// A thread block holds one, two or four tiles.
std::vector<int64_t> thread_counts(int n, bool is_double) {
    if (n > (is_double ? MBF_MAX_THREAD_DOUBLE : MBF_MAX_THREAD_FLOAT)) return {};
    return around(around(around({1}, kTileBlocks), 2 * kTileBlocks), 4 * kTileBlocks);
}

// The first N that is large enough says how many blocks share a thread block.
#define MBF_TEAMS(N, PR, PC, teams) \
    if (n <= N) return is_tiled(n) ? around(around({1}, teams), kTileBlocks) : around({1}, teams);
std::vector<int64_t> group_counts(int n, bool is_double) {
    if (is_double) {
        MBF_FOR_EACH_GROUP_DOUBLE(MBF_TEAMS)
    } else {
        MBF_FOR_EACH_GROUP_FLOAT(MBF_TEAMS)
    }
    return {};
}
std::vector<int64_t> block_counts(int n, bool is_double) {
    if (is_double) {
        MBF_FOR_EACH_BLOCK_DOUBLE(MBF_TEAMS)
    } else {
        MBF_FOR_EACH_BLOCK_FLOAT(MBF_TEAMS)
    }
    return {};
}
#undef MBF_TEAMS

template <class S>
void run_shared(const std::string& isa, int n, const std::vector<int64_t>& samples) {
    const int64_t before = cases;
    const std::string name = "cpu " + isa + (sizeof(S) == 4 ? " float" : " double") + " n=" + std::to_string(n);
    for (size_t c = 0; c < samples.size(); ++c)
        for (size_t f = 0; f < kSharedForms.size(); ++f) {
            current_case = name + " S=" + std::to_string(samples[c]) + " " + kSharedForms[f].name;
            if (is_wanted(current_case)) run_shared_case<S>(kSharedForms[f], samples[c], n, static_cast<int>(c + f));
        }
    if (cases > before) printf("%s shared: %lld cases\n", name.c_str(), static_cast<long long>(cases - before));
}

template <class S>
void run_diagonal(const std::string& isa) {
    current_case = "cpu " + isa + (sizeof(S) == 4 ? " float" : " double") + " diagonal";
    if (!is_wanted(current_case)) return;
    for (bool graft : {false, true}) run_diagonal_case<S>(graft);
    printf("%s: 2 cases\n", current_case.c_str());
}

template <class S>
void run_rank_one(const std::string& target, const RankOneLaunch& launch, bool on_gpu) {
    current_case = target + (sizeof(S) == 4 ? " float" : " double") + " rank_one";
    if (!is_wanted(current_case)) return;
    for (bool decoupled : {false, true}) run_rank_one_case<S>(launch, decoupled, on_gpu);
    printf("%s: 2 cases\n", current_case.c_str());
}

// The steps of shared matrices and of tensors without blocks. Threads race where there is enough for several.
void run_moments(const std::string& isa) {
    cpu::set_isa(isa);
    for (int n : kFindsRaces ? std::vector<int>{33} : kSharedSizes) {
        const std::vector<int64_t> samples = kFindsRaces ? std::vector<int64_t>{65} : shared_samples(n);
        run_shared<float>(isa, n, samples);
        run_shared<double>(isa, n, samples);
    }
    run_diagonal<float>(isa);
    run_diagonal<double>(isa);
    const RankOneLaunch launch = [](DType dtype, const auto& problems, const auto& parameters) {
        cpu::launch_rank_one(dtype, problems, parameters, 3);
    };
    run_rank_one<float>("cpu " + isa, launch, false);
    run_rank_one<double>("cpu " + isa, launch, false);
}

void run_emulated_rank_one() {
    const RankOneLaunch launch = [](DType dtype, const auto& problems, const auto& parameters) {
        emulated::launch_rank_one(dtype, problems, parameters, 0, 0);
    };
    run_rank_one<float>("emulated", launch, true);
    run_rank_one<double>("emulated", launch, true);
}

std::vector<Target> cpu_targets() {
    std::vector<Target> targets;
    for (const std::string& isa : cpu::supported_isas()) {
        const Launch launch = [isa](Op op, DType dtype, int n, const std::vector<Problem>& problems,
                                    const Parameters& q) {
            cpu::set_isa(isa);
            cpu::launch(op, dtype, n, problems, q, 3);
        };
        targets.push_back({"cpu " + isa, false, launch, kCpuSizes, cpu_counts});
    }
    return targets;
}

Target emulated_target(const char* name, Mapping mapping, const std::vector<int>& sizes,
                       std::function<std::vector<int64_t>(int n, bool is_double)> counts) {
    const Launch launch = [mapping](Op op, DType dtype, int n, const std::vector<Problem>& problems,
                                    const Parameters& q) {
        emulated::launch(op, dtype, n, problems, q, 0, 0, mapping);
    };
    return {std::string("emulated ") + name, true, launch, sizes, counts};
}

[[maybe_unused]] void print_current_case() {
    fprintf(stderr, "while running %s\n", current_case.c_str());
}

}  // namespace

int main(int argc, char** argv) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    __sanitizer_set_death_callback(print_current_case);
#endif
    setvbuf(stdout, nullptr, _IOLBF, 0);
    wanted_words.assign(argv + 1, argv + argc);
    const std::string backend = argc > 1 ? argv[1] : "";
    if (backend != "emulated") {
        for (const Target& target : cpu_targets()) run_target(target);
        for (const std::string& isa : cpu::supported_isas()) run_moments(isa);
    }
    if (backend != "cpu") {
        run_target(emulated_target("thread", Mapping::kThread, kThreadSizes, thread_counts));
        run_target(emulated_target("group", Mapping::kGroup, kGroupSizes, group_counts));
        run_target(emulated_target("block", Mapping::kBlock, kBlockSizes, block_counts));
        run_emulated_rank_one();
    }
    printf("%lld cases, %d failures\n", static_cast<long long>(cases), failures);
    if (!cases) fprintf(stderr, "no case has all of these words\n");
    return failures || !cases;
}
