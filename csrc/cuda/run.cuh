// From a kernel class to launches: fills the tables and starts one grid per table.
#pragma once

#include <limits.h>

#include "kernels.h"
#include "lanes.cuh"
#include "table.h"

namespace mbf {
namespace {

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kMinBlocks)
    op_kernel(const __grid_constant__ OpTable table, Op op) {
    Kernel(table.problems[0], table.parameters, table.n, blockIdx.x).run_op(op);
}

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kMinBlocks)
    step_kernel(const __grid_constant__ StepTable table) {
    const int p = problem_of(table, blockIdx.x);
    Kernel(table.problems[p], table.parameters, table.n, blockIdx.x - table.first_unit[p]).run_step();
}

// Shared memory beyond what every device grants has to be asked for.
constexpr size_t kGrantedSharedBytes = 49152;

template <class Kernel, class Function, class... Arguments>
cudaError_t start(Function function, int units, int n, cudaStream_t stream, const Arguments&... arguments) {
    const size_t shared = Kernel::shared_bytes(n);
    if (shared > kGrantedSharedBytes) {
        const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(function),
                                                       cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
        if (error != cudaSuccess) return error;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(units);
    config.blockDim = dim3(Kernel::kThreads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    return cudaLaunchKernelEx(&config, function, arguments...);
}

// Takes the first problems that fit; returns how many, and none where a single one has too many blocks for a grid.
template <class Kernel, int kMaxProblems>
int fill(Table<kMaxProblems>& table, int n, const Problem* problems, int count, const Parameters& parameters) {
    table.parameters = parameters;
    table.n = n;
    table.problem_count = 0;
    int64_t units = 0;
    while (table.problem_count < kMaxProblems && table.problem_count < count) {
        const Problem& problem = problems[table.problem_count];
        const int64_t more = (problem.count + Kernel::kBlocks - 1) / Kernel::kBlocks;
        if (units + more > INT_MAX) break;
        table.first_unit[table.problem_count] = static_cast<int>(units);
        table.problems[table.problem_count++] = problem;
        units += more;
    }
    table.first_unit[table.problem_count] = static_cast<int>(units);
    return table.problem_count;
}

template <class Kernel>
cudaError_t run(Op op, int n, const Problem* problems, int count, const Parameters& parameters, cudaStream_t stream) {
    for (int done = 0; done < count;) {
        cudaError_t error;
        int taken;
        if (op == Op::kStep) {
            StepTable table;
            taken = fill<Kernel>(table, n, problems + done, count - done, parameters);
            if (!taken) return cudaErrorInvalidConfiguration;
            error = start<Kernel>(step_kernel<Kernel>, table.first_unit[taken], n, stream, table);
        } else {
            OpTable table;
            taken = fill<Kernel>(table, n, problems + done, 1, parameters);
            if (!taken) return cudaErrorInvalidConfiguration;
            error = start<Kernel>(op_kernel<Kernel>, table.first_unit[taken], n, stream, table, op);
        }
        if (error != cudaSuccess) return error;
        done += taken;
    }
    return cudaSuccess;
}

}  // namespace
}  // namespace mbf
