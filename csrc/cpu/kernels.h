// The CPU kernels as the dispatcher sees them: one entry point per instruction set and scalar type.
#pragma once

#include <stddef.h>

#include "../layout.h"
#include "../types.h"

namespace mbf::cpu {

// What one thread works in: two triangles and six vectors of packs, each of two registers for the compiled sizes.
static inline size_t scratch_bytes(int n) {
    constexpr size_t kRegisterBytes = 64;  // the widest
    return kRegisterBytes * (is_tiled(n) ? 2 : 1) * (2 * triangle_size(n) + 6 * n);
}

// Runs `op` on blocks [first, last) of `problem`; `first` is a multiple of 32. Scratch: scratch_bytes(n),
// 64-byte aligned.
using Kernel = void (*)(Op op, const Problem& problem, const Parameters& parameters, int n, int64_t first, int64_t last,
                        void* scratch);

#define MBF_DECLARE_KERNELS(isa)                                                                 \
    void run_##isa##_float(Op, const Problem&, const Parameters&, int, int64_t, int64_t, void*); \
    void run_##isa##_double(Op, const Problem&, const Parameters&, int, int64_t, int64_t, void*);
MBF_DECLARE_KERNELS(baseline)
MBF_DECLARE_KERNELS(avx2)
MBF_DECLARE_KERNELS(avx512)
#undef MBF_DECLARE_KERNELS

}  // namespace mbf::cpu
