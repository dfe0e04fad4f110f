#include "dispatch.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <stdexcept>

#include "../layout.h"
#include "kernels.h"
#include "parallel.h"

namespace mbf::cpu {
namespace {

struct Isa {
    std::string name;
    int vector_bytes;
    Kernel kernels[2];  // by DType
    SharedKernel shared[2];
    DiagonalKernel diagonal[2];
    RankOneKernel rank_one[2];
};

std::vector<Isa> detect_isas() {
    std::vector<Isa> found;
#ifdef MBF_X86
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw"))
        found.push_back({"avx512",
                         64,
                         {run_avx512_float, run_avx512_double},
                         {shared_avx512_float, shared_avx512_double},
                         {diagonal_avx512_float, diagonal_avx512_double},
                         {rank_one_avx512_float, rank_one_avx512_double}});
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        found.push_back({"avx2",
                         32,
                         {run_avx2_float, run_avx2_double},
                         {shared_avx2_float, shared_avx2_double},
                         {diagonal_avx2_float, diagonal_avx2_double},
                         {rank_one_avx2_float, rank_one_avx2_double}});
#endif
    found.push_back({"baseline",
                     16,
                     {run_baseline_float, run_baseline_double},
                     {shared_baseline_float, shared_baseline_double},
                     {diagonal_baseline_float, diagonal_baseline_double},
                     {rank_one_baseline_float, rank_one_baseline_double}});
    return found;
}

const std::vector<Isa>& isas() {
    static const std::vector<Isa> all = detect_isas();
    return all;
}

const Isa* find_isa(const std::string& name) {
    for (const Isa& candidate : isas())
        if (candidate.name == name) return &candidate;
    std::string known;
    for (const Isa& candidate : isas()) known += (known.empty() ? "" : ", ") + candidate.name;
    throw std::invalid_argument("CPU instruction set '" + name + "' is not supported here; supported: " + known);
}

const Isa*& current_isa() {
    static const Isa* current = [] {
        const char* forced = std::getenv("MBF_CPU_ISA");
        return forced && *forced ? find_isa(forced) : &isas().front();
    }();
    return current;
}

// Work below this many multiply-adds (about 20 microseconds) is not worth another thread.
constexpr double kGrain = 2e5;

double multiply_adds(Op op, int n, const Parameters& parameters, int64_t blocks) {
    const double square = double(n) * n;
    const double per_block = op == Op::kSolve ? square * parameters.rhs_count : square * (n / 6.0 + 4);
    return per_block * blocks;
}

// Blocks that one thread takes at a time: a tile, a vector, or one block whose lanes are right-hand sides.
int64_t blocks_per_unit(Op op, DType dtype, int n, const Parameters& parameters) {
    const int lanes = current_isa()->vector_bytes / (dtype == DType::kFloat32 ? 4 : 8);
    if (op == Op::kSolve && parameters.rhs_count >= lanes) return 1;
    return is_tiled(n) ? kTileBlocks : lanes;
}

// At least one thread, at most one per unit of work, each with enough to do.
int useful_threads(int threads, int64_t units, double multiply_adds) {
    return static_cast<int>(std::max(1.0, std::min({double(threads), double(units), multiply_adds / kGrain})));
}

// Kept between launches.
void* thread_scratch(size_t bytes) {
    constexpr size_t kAlignment = 64;
    static thread_local std::vector<char> buffer;
    if (buffer.size() < bytes + kAlignment) buffer.resize(bytes + kAlignment);
    const uintptr_t address = reinterpret_cast<uintptr_t>(buffer.data());
    return reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
}

// Shares the elements of all problems among threads, which call body(problem, first, last).
template <class Problem, class Body>
void for_elements(const std::vector<Problem>& problems, int threads, const Body& body) {
    int64_t elements = 0;
    for (const Problem& problem : problems) elements += problem.count;
    constexpr int kLine = 16;  // elements: threads never write to one cache line
    parallel_for(elements / kLine + 1, useful_threads(threads, elements / kLine, 8.0 * elements),
                 [&](int64_t begin, int64_t end) {
                     begin *= kLine, end *= kLine;
                     for (const Problem& problem : problems) {
                         const int64_t first = std::max<int64_t>(begin, 0), last = std::min(end, problem.count);
                         if (first < last) body(problem, first, last);
                         begin -= problem.count, end -= problem.count;
                     }
                 });
}

}  // namespace

std::vector<std::string> supported_isas() {
    std::vector<std::string> names;
    for (const Isa& candidate : isas()) names.push_back(candidate.name);
    return names;
}

std::string isa() {
    return current_isa()->name;
}

void set_isa(const std::string& name) {
    current_isa() = find_isa(name);
}

void launch(Op op, DType dtype, int n, const std::vector<Problem>& problems, const Parameters& parameters,
            int threads) {
    const int64_t unit = blocks_per_unit(op, dtype, n, parameters);
    std::vector<int64_t> first_unit{0};  // of each problem, and one past the last
    int64_t blocks = 0;
    for (const Problem& problem : problems) {
        first_unit.push_back(first_unit.back() + (problem.count + unit - 1) / unit);
        blocks += problem.count;
    }
    const int64_t units = first_unit.back();
    threads = useful_threads(threads, units, multiply_adds(op, n, parameters, blocks));

    const Kernel kernel = current_isa()->kernels[static_cast<int>(dtype)];
    parallel_for(units, threads, [&](int64_t begin, int64_t end) {
        void* scratch = thread_scratch(scratch_bytes(n));
        for (size_t i = 0; i < problems.size(); ++i) {
            const int64_t first = std::max(begin, first_unit[i]) - first_unit[i];
            const int64_t last = std::min(end, first_unit[i + 1]) - first_unit[i];
            if (first >= last) continue;
            kernel(op, problems[i], parameters, n, first * unit, std::min(last * unit, problems[i].count), scratch);
        }
    });
}

void launch_shared(DType dtype, int n, const std::vector<SharedProblem>& problems, const MomentParameters& parameters,
                   int threads) {
    int64_t matrices = 0;
    double work = 0;
    for (const SharedProblem& problem : problems) {
        matrices += problem.count;
        work += 2.0 * n * n * problem.count * (problem.samples + n);
    }
    const SharedKernel kernel = current_isa()->shared[static_cast<int>(dtype)];
    // Matrices differ in their numbers of mini-blocks: threads take the next one as they get free.
    std::atomic<int64_t> next{0};
    threads = useful_threads(threads, matrices, work);
    parallel_for(threads, threads, [&](int64_t, int64_t) {
        void* scratch = thread_scratch(shared_scratch_bytes(n));
        int64_t first = 0, matrix = next++;
        for (const SharedProblem& problem : problems) {
            for (; matrix < first + problem.count; matrix = next++)
                kernel(problem, parameters, n, matrix - first, scratch);
            first += problem.count;
        }
    });
}

void launch_diagonal(DType dtype, const std::vector<DiagonalProblem>& problems, const MomentParameters& parameters,
                     int threads) {
    const DiagonalKernel kernel = current_isa()->diagonal[static_cast<int>(dtype)];
    for_elements(problems, threads, [&](const DiagonalProblem& problem, int64_t first, int64_t last) {
        kernel(problem, parameters, first, last);
    });
}

void launch_rank_one(DType dtype, const std::vector<RankOneProblem>& problems, const RankOneParameters& parameters,
                     int threads) {
    const RankOneKernel kernel = current_isa()->rank_one[static_cast<int>(dtype)];
    for_elements(problems, threads, [&](const RankOneProblem& problem, int64_t first, int64_t last) {
        kernel(problem, parameters, first, last, thread_scratch(rank_one_scratch_bytes(problem)));
    });
}

}  // namespace mbf::cpu
