#include "launch.h"

#include <stdexcept>
#include <string>

#include "kernels.h"
#include "mappings.def"

namespace mbf::MBF_GPU {
namespace {

const char* name_of(Op op) {
    switch (op) {
        case Op::kAccumulate: return "accumulate_";
        case Op::kFactor: return "factor";
        case Op::kSolve: return "solve";
        case Op::kFused: return "accumulate_factor_solve_";
        case Op::kStep: return "mbf_step_";
    }
    return "unknown op";
}

void check(const char* op, cudaError_t error, const char* doing) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // so that the error does not show up in somebody else's call
    throw std::runtime_error(std::string(op) + ": CUDA error " + cudaGetErrorName(error) + " (" +
                             cudaGetErrorString(error) + ") while " + doing);
}

// Makes a device current, and the caller's again afterwards.
class DeviceGuard {
public:
    DeviceGuard(const char* op, int device) {
        check(op, cudaGetDevice(&previous_), "asking for the current device");
        changed_ = device != previous_;
        if (changed_) check(op, cudaSetDevice(device), "making the device current");
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(previous_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

private:
    int previous_ = 0;
    bool changed_ = false;
};

#define MBF_LAST(N, PR, PC, teams) last = N;
int largest_size(DType dtype, Mapping mapping) {
    const bool is_float = dtype == DType::kFloat32;
    if (mapping == Mapping::kThread) return is_float ? MBF_MAX_THREAD_FLOAT : MBF_MAX_THREAD_DOUBLE;
    int last = 0;
    if (mapping == Mapping::kGroup && is_float) {
        MBF_FOR_EACH_GROUP_FLOAT(MBF_LAST)
    }
    if (mapping == Mapping::kGroup && !is_float) {
        MBF_FOR_EACH_GROUP_DOUBLE(MBF_LAST)
    }
    if (mapping == Mapping::kBlock && is_float) {
        MBF_FOR_EACH_BLOCK_FLOAT(MBF_LAST)
    }
    if (mapping == Mapping::kBlock && !is_float) {
        MBF_FOR_EACH_BLOCK_DOUBLE(MBF_LAST)
    }
    return last;
}
#undef MBF_LAST

Entry entry_of(Op op, DType dtype, int n, Mapping wanted) {
    static constexpr Entry kEntries[][2] = {
        {thread_float, thread_double}, {group_float, group_double}, {block_float, block_double}};
    for (const Mapping mapping : {Mapping::kThread, Mapping::kGroup, Mapping::kBlock}) {
        const bool asked = wanted == Mapping::kAuto || wanted == mapping;
        if (asked && n <= largest_size(dtype, mapping))
            return kEntries[static_cast<int>(mapping) - 1][static_cast<int>(dtype)];
    }
    const char* scalar = dtype == DType::kFloat32 ? " of float32" : " of float64";
    throw std::invalid_argument(std::string(name_of(op)) + ": expected a mapping that serves blocks of size " +
                                std::to_string(n) + scalar + ", got one for at most " +
                                std::to_string(largest_size(dtype, wanted)));
}

}  // namespace

void launch(Op op, DType dtype, int n, const std::vector<Problem>& problems, const Parameters& parameters, int device,
            uintptr_t stream, Mapping mapping) {
    const Entry entry = entry_of(op, dtype, n, mapping);
    const DeviceGuard guard(name_of(op), device);
    check(name_of(op),
          entry(op, n, problems.data(), static_cast<int>(problems.size()), parameters,
                reinterpret_cast<cudaStream_t>(stream)),
          "launching the kernel");
}

void launch_rank_one(DType dtype, const std::vector<RankOneProblem>& problems, const RankOneParameters& parameters,
                     int device, uintptr_t stream) {
    static constexpr const char* kName = "rank_one_step_";
    const auto entry = dtype == DType::kFloat32 ? rank_one_float : rank_one_double;
    const DeviceGuard guard(kName, device);
    check(kName,
          entry(problems.data(), static_cast<int>(problems.size()), parameters, reinterpret_cast<cudaStream_t>(stream)),
          "launching the kernel");
}

}  // namespace mbf::MBF_GPU
