// Several lanes per block. Compiled once per mapping and scalar type: MBF_SCALAR, with MBF_ENTRY the entry point's name
// and MBF_FOR_EACH_TEAM the list of mappings.def.
#include "mappings.def"
#include "run.cuh"
#include "team_kernel.cuh"

namespace mbf::MBF_GPU {

cudaError_t MBF_ENTRY(Op op, int n, const Problem* problems, int count, const Parameters& parameters,
                      cudaStream_t stream) {
#define MBF_CASE(N, PR, PC, teams) \
    if (n <= N) return run<TeamKernel<MBF_SCALAR, N, PR, PC, teams>>(op, n, problems, count, parameters, stream);
    MBF_FOR_EACH_TEAM(MBF_CASE)
#undef MBF_CASE
    return cudaErrorInvalidValue;
}

}  // namespace mbf::MBF_GPU
