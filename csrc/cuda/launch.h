// A launch on a GPU.
#pragma once

#include <stdint.h>

#include <vector>

#include "../types.h"

namespace mbf {

// Runs `op` on all problems, each a tensor's blocks of size n (1 .. MBF_MAX_SIZE), on a stream of a device; returns at
// once. Throws std::invalid_argument where `mapping` does not serve n, std::runtime_error when a launch fails.
// `launch_rank_one`: the step of tensors whose F has rank one, likewise.
// The files of this folder are built twice: for GPUs, and for the CPU threads of the emulator.
#define MBF_DECLARE_LAUNCH(gpu)                                                                                \
    namespace gpu {                                                                                            \
    void launch(Op op, DType dtype, int n, const std::vector<Problem>& problems, const Parameters& parameters, \
                int device, uintptr_t stream, Mapping mapping);                                                \
    void launch_rank_one(DType dtype, const std::vector<RankOneProblem>& problems,                             \
                         const RankOneParameters& parameters, int device, uintptr_t stream);                   \
    }
MBF_DECLARE_LAUNCH(cuda)
MBF_DECLARE_LAUNCH(emulated)
#undef MBF_DECLARE_LAUNCH

}  // namespace mbf
