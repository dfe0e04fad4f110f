#include "dispatch.h"

#include <algorithm>
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
};

std::vector<Isa> detect_isas() {
    std::vector<Isa> found;
#ifdef MBF_X86
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw"))
        found.push_back({"avx512", 64, {run_avx512_float, run_avx512_double}});
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        found.push_back({"avx2", 32, {run_avx2_float, run_avx2_double}});
#endif
    found.push_back({"baseline", 16, {run_baseline_float, run_baseline_double}});
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

// Kept between launches.
void* thread_scratch(int n) {
    constexpr size_t kAlignment = 64;
    static thread_local std::vector<char> buffer;
    const size_t bytes = scratch_bytes(n) + kAlignment;
    if (buffer.size() < bytes) buffer.resize(bytes);
    const uintptr_t address = reinterpret_cast<uintptr_t>(buffer.data());
    return reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
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
    const double useful = multiply_adds(op, n, parameters, blocks) / kGrain;
    threads = static_cast<int>(std::max(1.0, std::min({double(threads), double(units), useful})));

    const Kernel kernel = current_isa()->kernels[static_cast<int>(dtype)];
    parallel_for(units, threads, [&](int64_t begin, int64_t end) {
        void* scratch = thread_scratch(n);
        for (size_t i = 0; i < problems.size(); ++i) {
            const int64_t first = std::max(begin, first_unit[i]) - first_unit[i];
            const int64_t last = std::min(end, first_unit[i + 1]) - first_unit[i];
            if (first >= last) continue;
            kernel(op, problems[i], parameters, n, first * unit, std::min(last * unit, problems[i].count), scratch);
        }
    });
}

}  // namespace mbf::cpu
