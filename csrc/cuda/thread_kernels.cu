// One thread per block. Compiled once per scalar type: MBF_SCALAR, with MBF_ENTRY the entry point's name and
// MBF_MAX_THREAD the largest n.
#include "mappings.def"
#include "run.cuh"
#include "thread_kernel.cuh"

namespace mbf::MBF_GPU {

cudaError_t MBF_ENTRY(Op op, int n, const Problem* problems, int count, const Parameters& parameters,
                      cudaStream_t stream) {
    switch (n) {
#define MBF_CASE(N)                                                                              \
    case N:                                                                                      \
        if constexpr (N <= MBF_MAX_THREAD)                                                       \
            return run<ThreadKernel<MBF_SCALAR, N>>(op, n, problems, count, parameters, stream); \
        break;
        MBF_FOR_EACH_SIZE(MBF_CASE)
#undef MBF_CASE
    }
    return cudaErrorInvalidValue;
}

}  // namespace mbf::MBF_GPU
