// The compiled kernels as the dispatcher sees them: one entry point per mapping and scalar type.
#pragma once

#include <cuda_runtime.h>

#include "../types.h"

#ifndef MBF_GPU
#define MBF_GPU cuda  // the emulator's build names itself
#endif

namespace mbf::MBF_GPU {

// Launches `op` on `count` problems of blocks of size n. An n that the mapping does not serve is cudaErrorInvalidValue.
using Entry = cudaError_t (*)(Op op, int n, const Problem* problems, int count, const Parameters& parameters,
                              cudaStream_t stream);

#define MBF_DECLARE_ENTRY(name)                                                                      \
    cudaError_t name(Op op, int n, const Problem* problems, int count, const Parameters& parameters, \
                     cudaStream_t stream);
MBF_DECLARE_ENTRY(thread_float)
MBF_DECLARE_ENTRY(thread_double)
MBF_DECLARE_ENTRY(group_float)
MBF_DECLARE_ENTRY(group_double)
MBF_DECLARE_ENTRY(block_float)
MBF_DECLARE_ENTRY(block_double)
#undef MBF_DECLARE_ENTRY

cudaError_t rank_one_float(const RankOneProblem* problems, int count, const RankOneParameters& parameters,
                           cudaStream_t stream);
cudaError_t rank_one_double(const RankOneProblem* problems, int count, const RankOneParameters& parameters,
                            cudaStream_t stream);

}  // namespace mbf::MBF_GPU
