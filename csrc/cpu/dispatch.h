// Chooses the instruction set and splits a launch over threads.
#pragma once

#include <string>
#include <vector>

#include "../types.h"

namespace mbf::cpu {

// Instruction sets compiled in and supported by this processor, best first.
std::vector<std::string> supported_isas();

// The one in use: the best, unless the environment variable MBF_CPU_ISA or set_isa names another.
// Both throw std::invalid_argument for a name that is not supported here.
std::string isa();
void set_isa(const std::string& name);

// Runs `op` on all problems, each a tensor's blocks of size n (1 .. MBF_MAX_SIZE), on at most `threads` threads.
void launch(Op op, DType dtype, int n, const std::vector<Problem>& problems, const Parameters& parameters, int threads);

// The step of mini-blocks that share averaged matrices, likewise.
void launch_shared(DType dtype, int n, const std::vector<SharedProblem>& problems, const MomentParameters& parameters,
                   int threads);

// The step of tensors without blocks, likewise.
void launch_diagonal(DType dtype, const std::vector<DiagonalProblem>& problems, const MomentParameters& parameters,
                     int threads);

// The step of tensors whose F has rank one, likewise.
void launch_rank_one(DType dtype, const std::vector<RankOneProblem>& problems, const RankOneParameters& parameters,
                     int threads);

}  // namespace mbf::cpu
