// Counts the instructions that the CPU kernels take per mini-block, shared matrix or element. The processor's trap flag
// stops the program after every instruction: the counts are exact, whatever else the machine does, and know AVX-512.
//
//   count                   the compiler and the instruction sets that can be counted here
//   count ISA [WORD...]     instructions per block of the kernels whose names have every WORD, as in:
//                           count avx512 float32 n=9 mbf_step_ grafted
//
// Built by MBF_COUNT in CMakeLists.txt; tools/instruction_gate.py compares.
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <x86intrin.h>

#include <algorithm>
#include <iterator>
#include <memory>
#include <set>
#include <sstream>

#include "../../csrc/cpu/dispatch.h"
#include "../../csrc/cpu/kernels.h"

namespace {

using namespace mbf;

#if defined(__clang__)
constexpr char kCompiler[] = "clang " __clang_version__;
#else
constexpr char kCompiler[] = "gcc " __VERSION__;
#endif

struct Isa {
    std::string name;
    int64_t register_bytes;
    cpu::Kernel of_floats, of_doubles;
    cpu::SharedKernel shared;
    cpu::DiagonalKernel diagonal;
    cpu::RankOneKernel rank_one;
    int largest, largest_shared;  // n: a trap takes microseconds
};
const std::vector<Isa> kIsas = {
    {"avx512", 64, cpu::run_avx512_float, cpu::run_avx512_double, cpu::shared_avx512_float, cpu::diagonal_avx512_float,
     cpu::rank_one_avx512_float, 128, 64},
    {"avx2", 32, cpu::run_avx2_float, cpu::run_avx2_double, cpu::shared_avx2_float, cpu::diagonal_avx2_float,
     cpu::rank_one_avx2_float, 64, 64},
    {"baseline", 16, cpu::run_baseline_float, cpu::run_baseline_double, cpu::shared_baseline_float,
     cpu::diagonal_baseline_float, cpu::rank_one_baseline_float, 64, 25},
};

// An op in one of its forms. Steps are those of MBF and of MBF.paper.
struct Form {
    const char* name;
    Op op;
    bool grafted = false, channels_last = false;
    int largest = 32;  // n: from 21 on, the same code serves all
};
const std::vector<Form> kForms = {
    {"accumulate_", Op::kAccumulate},
    {"factor", Op::kFactor},
    {"solve", Op::kSolve},
    {"accumulate_factor_solve_", Op::kFused, false, false, 128},
    {"mbf_step_ grafted contiguous", Op::kStep, true, false},
    {"mbf_step_ grafted channels_last", Op::kStep, true, true},
    {"mbf_step_ paper contiguous", Op::kStep, false, false},
    {"mbf_step_ paper channels_last", Op::kStep, false, true},
};

const std::vector<int> kFloatSizes = {1, 4, 9, 16, 20, 25, 32, 64, 128};
const std::vector<int> kDoubleSizes = {9, 25};

Parameters parameters_of(const Form& form) {
    Parameters q = {};
    q.lr.value = 1e-3;
    q.damping.value = 0.25;
    q.momentum = 0.875;
    q.decay = 0.75;
    q.weight_decay = 0.125;
    q.eps = 1e-8;
    q.relative = q.graft = form.grafted;
    q.update = q.refactor = true;
    q.rhs_count = 1;
    return q;
}

// A tensor of identity matrices and vectors of ones.
template <class S>
class Tensor {
public:
    Tensor(const Form& form, int n)
        : fisher_(identities(n)), factor_(fisher_), grad_(kBlocks * n, 1), rhs_(grad_), out_(grad_), info_(kBlocks) {
        problem.count = kBlocks;
        problem.fisher = fisher_.data();
        problem.factor = form.op == Op::kStep ? nullptr : factor_.data();
        problem.info = info_.data();
        problem.momentum_weight.value = problem.fisher_weight.value = 0.5;
        problem.grad = problem.rhs = problem.out = view(form, n);
        problem.grad.base = grad_.data();
        problem.rhs.base = rhs_.data();
        problem.out.base = out_.data();
    }

    Problem problem = {};

private:
    static constexpr int64_t kBlocks = kTileBlocks;

    static BlockView view(const Form& form, int n) {
        if (form.channels_last) return {nullptr, {kBlocks, n * kBlocks, 1}, {n, 0, kBlocks}};
        return {nullptr, {kBlocks, 0, n}, {n, 0, 1}};
    }

    static std::vector<S> identities(int n) {
        std::vector<S> storage(block_offset(n, kBlocks));
        for (int64_t b = 0; b < kBlocks; ++b)
            for (int k = 0; k < n; ++k) storage[block_offset(n, b) + (triangle_size(k) + k) * entry_stride(n)] = 1;
        return storage;
    }

    std::vector<S> fisher_, factor_, grad_, rhs_, out_;
    std::vector<int32_t> info_;
};

volatile int64_t steps = 0;

void count_step(int) {
    steps = steps + 1;
}

template <class Call>
int64_t steps_of(const Call& call) {
    constexpr unsigned kTrapFlag = 0x100;
    steps = 0;
    __writeeflags(__readeflags() | kTrapFlag);
    call();
    __writeeflags(__readeflags() & ~kTrapFlag);
    return steps;
}

// Of the blocks that a kernel takes at a time, less what it takes for none.
template <class S>
double instructions_per_block(const Isa& isa, cpu::Kernel kernel, const Form& form, int n) {
    const Tensor<S> tensor(form, n);
    const Parameters q = parameters_of(form);
    const std::unique_ptr<void, void (*)(void*)> scratch(aligned_alloc(64, cpu::scratch_bytes(n)), free);
    const auto run = [&](int64_t blocks) { kernel(form.op, tensor.problem, q, n, 0, blocks, scratch.get()); };
    const int64_t pack = isa.register_bytes / sizeof(S) * (is_tiled(n) ? 2 : 1);
    run(pack);  // the linker binds what a kernel calls when it is called first
    return double(steps_of([&] { run(pack); }) - steps_of([&] { run(0); })) / pack;
}

// Likewise of one shared matrix: its inverse, or with twice as many mini-blocks as without, what each of them adds.
double shared_instructions(const Isa& isa, int n, bool per_matrix) {
    constexpr int64_t kSamples = 2 * cpu::kSharedRows;
    std::vector<float> fisher(block_offset(n, kTileBlocks)), grad(kSamples * n, 1), momentum(grad), square(grad),
        param(grad);
    const auto view = [&](std::vector<float>& of) {
        return SharedView{of.data(), n, {kSamples, 0, n}, {n, 0, 1}, nullptr, 0, false};
    };
    SharedProblem problem = {};
    problem.count = 1;
    problem.fisher = fisher.data();
    problem.momentum_weight = problem.square_weight = 0.5;
    problem.grad = view(grad), problem.momentum = view(momentum);
    problem.square = view(square), problem.param = view(param);
    MomentParameters q = {parameters_of({"", Op::kStep, true}), 0.75};
    q.step.nesterov = true;
    q.step.update = !per_matrix;
    const std::unique_ptr<void, void (*)(void*)> scratch(aligned_alloc(64, cpu::shared_scratch_bytes(n)), free);
    const auto steps_with = [&](int64_t samples) {
        problem.samples = samples;
        isa.shared(problem, q, n, 0, scratch.get());
        return steps_of([&] { isa.shared(problem, q, n, 0, scratch.get()); });
    };
    if (per_matrix) return double(steps_with(0));
    return double(steps_with(kSamples) - steps_with(kSamples / 2)) / (kSamples / 2);
}

double diagonal_instructions(const Isa& isa) {
    constexpr int64_t kElements = 256;
    std::vector<float> grad(kElements, 1), momentum(grad), square(grad), param(grad);
    const DiagonalProblem problem = {kElements, 0.5, 0.5, grad.data(), momentum.data(), square.data(), param.data()};
    const MomentParameters q = {parameters_of({"", Op::kStep, true}), 0.75};
    const auto run = [&](int64_t elements) { isa.diagonal(problem, q, 0, elements); };
    run(kElements);
    return double(steps_of([&] { run(kElements); }) - steps_of([&] { run(0); })) / kElements;
}

// Of rows of 128 elements.
double rank_one_instructions(const Isa& isa, bool curved) {
    constexpr int64_t kColumns = 128, kElements = 2 * kColumns;
    std::vector<float> grad(kElements, 1), momentum(grad), param(grad), vectors(grad);
    const float* vector = curved ? vectors.data() : nullptr;
    const RankOneProblem problem = {kElements,   kColumns,        {0.5, nullptr, DType::kFloat64},
                                    grad.data(), momentum.data(), param.data(),
                                    vector,      vector,          {kColumns, 0, 1}};
    const RankOneParameters q = {parameters_of({"", Op::kStep}), true};
    const auto run = [&](int64_t elements) { isa.rank_one(problem, q, 0, elements, nullptr); };
    run(kElements);
    return double(steps_of([&] { run(kElements); }) - steps_of([&] { run(0); })) / kElements;
}

bool has_words(const std::string& name, const std::set<std::string>& words) {
    std::istringstream stream(name);
    const std::set<std::string> found{std::istream_iterator<std::string>(stream), {}};
    return std::includes(found.begin(), found.end(), words.begin(), words.end());
}

template <class S>
void print_counts(const Isa& isa, cpu::Kernel kernel, const char* dtype, const std::vector<int>& sizes,
                  const std::set<std::string>& words) {
    for (const Form& form : kForms)
        for (int n : sizes) {
            const std::string name = isa.name + " " + dtype + " n=" + std::to_string(n) + " " + form.name;
            if (n > std::min(isa.largest, form.largest) || !has_words(name, words)) continue;
            printf("%.2f %s\n", instructions_per_block<S>(isa, kernel, form, n), name.c_str());
        }
}

void print_others(const Isa& isa, const std::set<std::string>& words) {
    const auto print = [&](int n, const char* form, const auto& count) {
        const std::string name = isa.name + " float32 n=" + std::to_string(n) + " " + form;
        if (has_words(name, words)) printf("%.2f %s\n", count(), name.c_str());
    };
    for (int n : {9, 25, 64}) {
        if (n > isa.largest_shared) continue;
        print(n, "mbf_shared_step_ mini-block", [&] { return shared_instructions(isa, n, false); });
        print(n, "mbf_shared_step_ matrix", [&] { return shared_instructions(isa, n, true); });
    }
    print(1, "mbf_diagonal_step_", [&] { return diagonal_instructions(isa); });
    print(1, "rank_one_step_", [&] { return rank_one_instructions(isa, true); });
    print(1, "rank_one_step_ without curvature", [&] { return rank_one_instructions(isa, false); });
}

}  // namespace

int main(int argc, char** argv) {
    if (argc == 1) {
        puts(kCompiler);
        for (const std::string& name : cpu::supported_isas()) puts(name.c_str());
        return 0;
    }
    struct sigaction on_trap = {};
    on_trap.sa_handler = count_step;
    sigaction(SIGTRAP, &on_trap, nullptr);
    const std::set<std::string> words(argv + 2, argv + argc);
    for (const Isa& isa : kIsas) {
        if (isa.name != argv[1]) continue;
        print_counts<float>(isa, isa.of_floats, "float32", kFloatSizes, words);
        print_counts<double>(isa, isa.of_doubles, "float64", kDoubleSizes, words);
        print_others(isa, words);
    }
}
