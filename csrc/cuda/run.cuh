// From a kernel class to launches: fills the tables and starts one grid per table.
#pragma once

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

template <class Kernel>
cudaError_t run(Op op, int n, const Problem* problems, int count, const Parameters& parameters, cudaStream_t stream) {
    for (int done = 0; done < count;) {
        cudaError_t error;
        int taken;
        if (op == Op::kStep) {
            StepTable table;
            table.parameters = parameters, table.n = n;
            taken = fill(table, Kernel::kBlocks, problems + done, count - done);
            if (!taken) return cudaErrorInvalidConfiguration;
            error = start<Kernel>(step_kernel<Kernel>, table.first_unit[taken], n, stream, table);
        } else {
            OpTable table;
            table.parameters = parameters, table.n = n;
            taken = fill(table, Kernel::kBlocks, problems + done, 1);
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
