// Stands in for the CUDA toolkit's header when g++ compiles the files of csrc/cuda: the threads of a thread block are
// fibers on the calling CPU thread, barriers are where they take turns, thread blocks run one after the other.
// Only what those files use.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <utility>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1) : x(x), y(1), z(1) {}
};

// threadIdx.x and its kin.
template <int (*value)()>
struct EmulatedIndex {
    struct {
        operator int() const { return value(); }
    } x;
};
static constexpr EmulatedIndex<emulator::thread_index> threadIdx{};
static constexpr EmulatedIndex<emulator::block_index> blockIdx{};
static constexpr EmulatedIndex<emulator::block_threads> blockDim{};

inline void __syncthreads() {
    emulator::wait_for_block();
}
inline void __syncwarp() {
    emulator::wait_for_warp();
}

struct __attribute__((aligned(16), may_alias)) uint4 {
    unsigned x, y, z, w;
};

// Relaxed, as on a GPU: an atomic orders nothing but itself.
inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
    return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
inline int atomicMin(int* address, int value) {
    int old = __atomic_load_n(address, __ATOMIC_RELAXED);
    while (value < old &&
           !__atomic_compare_exchange_n(address, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return old;
}

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = struct EmulatedStream*;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

inline const char* cudaGetErrorName(cudaError_t error) {
    return error == cudaErrorInvalidConfiguration ? "cudaErrorInvalidConfiguration" : "cudaErrorInvalidValue";
}
inline const char* cudaGetErrorString(cudaError_t) {
    return "emulated";
}
inline cudaError_t cudaGetLastError() {
    return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
    return device == 0 ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
    return static_cast<size_t>(bytes) <= emulator::kSharedBytes ? cudaSuccess : cudaErrorInvalidValue;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    if (config->gridDim.x == 0 || config->dynamicSmemBytes > emulator::kSharedBytes)
        return cudaErrorInvalidConfiguration;
    emulator::run_grid(config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes,
                       [&] { kernel(std::forward<Arguments>(arguments)...); });
    return cudaSuccess;
}
