// Moves the blocks of a thread block between global and shared memory, coalesced whatever the layout.
#pragma once

#include "lanes.cuh"

namespace mbf {

extern __shared__ __align__(16) unsigned char shared_memory[];

namespace {

// Vectors in shared memory: element k of block i at [i * pitch + k]. Threads that read a block each are on different
// banks where the pitch is odd.
MBF_HOST_DEVICE constexpr int vector_pitch(int n) {
    return n | 1;
}

MBF_FN int64_t quotient(int64_t a, int64_t b) {
    if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);  // five times faster
    return a / b;
}

// Where consecutive blocks from `first` on lie in a tensor.
class BlockCursor {
public:
    MBF_FN BlockCursor(const Strides& block, int64_t first)
        : block_(block), run_(quotient(first, block.inner_count)), at_(first - run_ * block.inner_count) {}

    // Whether `count` blocks from the first on are at equal distances.
    MBF_FN bool is_one_run(int count) const { return at_ + count <= block_.inner_count; }

    // Offset of block first + i.
    MBF_FN int64_t operator[](int i) const {
        int64_t run = run_, at = at_ + i;
        if (at >= block_.inner_count) {
            const int64_t further = quotient(at, block_.inner_count);
            run += further;
            at -= further * block_.inner_count;
        }
        return run * block_.outer + at * block_.inner;
    }

private:
    const Strides& block_;
    const int64_t run_, at_;
};

MBF_FN int64_t element_offset(const Strides& element, int k) {
    const unsigned count = static_cast<unsigned>(element.inner_count);  // at most n
    return k / count * element.outer + k % count * element.inner;
}

// Calls move(index in shared memory, address in global memory) for n elements of `active` <= kBlocks blocks, all
// threads together. Neighbouring threads take neighbouring addresses: of one block where its elements are contiguous,
// of consecutive blocks otherwise (channels_last).
template <class S, int kBlocks, class Move>
MBF_FN void for_each_element(const BlockView& view, int n, int64_t first, int active, Move move) {
    const BlockCursor blocks(view.block, first);
    S* base = static_cast<S*>(view.base);
    const int pitch = vector_pitch(n), thread = threadIdx.x, threads = blockDim.x;
    const bool rows = view.element.inner == 1 && view.element.inner_count >= n;
    if (rows && view.block.inner == n && blocks.is_one_run(active)) {  // one block after the other
        S* first_element = base + blocks[0];
        for (int e = thread; e < active * n; e += threads) move(pitch == n ? e : e + e / n, first_element + e);
    } else if (rows) {
        for (int e = thread; e < active * n; e += threads) {
            const int i = e / n, k = e - i * n;
            move(i * pitch + k, base + blocks[i] + k);
        }
    } else {
        for (int e = thread; e < kBlocks * n; e += threads) {
            const int k = e / kBlocks, i = e % kBlocks;
            if (i < active) move(i * pitch + k, base + blocks[i] + element_offset(view.element, k));
        }
    }
}

// Starts a copy; __pipeline_wait_prior(0) and a barrier end it.
template <class S, int kBlocks>
MBF_FN void fetch_vectors(S* to, const BlockView& view, int n, int64_t first, int active) {
    for_each_element<S, kBlocks>(view, n, first, active,
                                 [=](int at, const S* from) { __pipeline_memcpy_async(to + at, from, sizeof(S)); });
}

template <class S, int kBlocks>
MBF_FN void store_vectors(const S* from, const BlockView& view, int n, int64_t first, int active) {
    for_each_element<S, kBlocks>(view, n, first, active, [=](int at, S* to) { *to = from[at]; });
}

// Starts the copy of `count` contiguous scalars, a multiple of 16 bytes.
template <class S>
MBF_FN void fetch_contiguous(S* to, const S* from, int count) {
    constexpr int kChunk = 16 / sizeof(S);
    for (int e = threadIdx.x * kChunk; e < count; e += blockDim.x * kChunk)
        __pipeline_memcpy_async(to + e, from + e, 16);
}

MBF_FN void await_copies() {
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
}

// One more bad block: its info, and the tensor's counter.
MBF_FN void report(const Problem& problem, int64_t block, int info) {
    problem.info[block] = info;
    if (info && problem.skipped) atomicAdd(reinterpret_cast<unsigned long long*>(problem.skipped), 1ull);
}

}  // namespace
}  // namespace mbf
