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

// Where a block's elements are contiguous.
MBF_FN bool has_rows(const BlockView& view, int n) {
    return view.element.inner == 1 && view.element.inner_count >= n;
}

// What kThreads threads together move for kBlocks blocks of size n <= N. Trip counts are bounded by the template's
// numbers, so that loops unroll into accesses at fixed distances.
template <class S, int N, int kBlocks, int kThreads>
struct Staging {
    // Starts a copy; await_copies ends it.
    static MBF_FN void fetch_vectors(S* to, const BlockView& view, int n, int64_t first, int active) {
        for_each_element(threadIdx.x, view, n, first, active,
                         [=](int at, const S* from) { __pipeline_memcpy_async(to + at, from, sizeof(S)); });
    }

    // The other way round, so that the addresses of the fetch take no registers until then.
    static MBF_FN void store_vectors(const S* from, const BlockView& view, int n, int64_t first, int active) {
        for_each_element(kThreads - 1 - static_cast<int>(threadIdx.x), view, n, first, active,
                         [=](int at, S* to) { *to = from[at]; });
    }

    // Of contiguous scalars, a multiple of 16 bytes and at most kMaxCount: starts their copy; stores them.
    template <int kMaxCount>
    static MBF_FN void fetch_contiguous(S* to, const S* from, int count) {
        for_each_chunk<kMaxCount>(count, [=](int e) { __pipeline_memcpy_async(to + e, from + e, 16); });
    }

    template <int kMaxCount>
    static MBF_FN void store_contiguous(S* to, const S* from, int count) {
        for_each_chunk<kMaxCount>(
            count, [=](int e) { *reinterpret_cast<uint4*>(to + e) = *reinterpret_cast<const uint4*>(from + e); });
    }

private:
    template <int kMaxCount, class Move>
    static MBF_FN void for_each_chunk(int count, Move move) {
        constexpr int kChunk = 16 / sizeof(S), kStep = kChunk * kThreads;
        MBF_UNROLL
        for (int done = 0; done < kMaxCount; done += kStep) {
            const int e = done + static_cast<int>(threadIdx.x) * kChunk;
            if (e < count) move(e);
        }
    }

    // Calls move(index in shared memory, address in global memory) for n elements of `active` blocks. Neighbouring
    // threads take neighbouring addresses: of one block where its elements are contiguous, of consecutive blocks
    // otherwise (channels_last).
    template <class Move>
    static MBF_FN void for_each_element(int thread, const BlockView& view, int n, int64_t first, int active,
                                        Move move) {
        const BlockCursor blocks(view.block, first);
        S* base = static_cast<S*>(view.base);
        const int pitch = vector_pitch(n);
        const bool one_run = blocks.is_one_run(active);
        if (!has_rows(view, n)) {
            for (int e = thread; e < kBlocks * n; e += kThreads) {
                const int k = e / kBlocks, i = e % kBlocks;
                if (i < active) move(i * pitch + k, base + blocks[i] + element_offset(view.element, k));
            }
        } else if (kBlocks < kThreads && one_run) {  // block by block
            S* block = base + blocks[0];
            MBF_UNROLL
            for (int i = 0; i < kBlocks; ++i) {
                MBF_UNROLL
                for (int done = 0; done < N; done += kThreads) {
                    const int k = done + thread;
                    if (i < active && k < n) move(i * pitch + k, block + k);
                }
                block += view.block.inner;
            }
        } else if (kBlocks == kThreads && one_run && view.block.inner == n) {  // a run of scalars
            S* first_element = base + blocks[0];
            MBF_UNROLL
            for (int done = 0; done < kBlocks * N; done += kThreads) {
                const int e = done + thread;
                if (e < active * n) move(pitch == n ? e : e + e / n, first_element + e);
            }
        } else {
            for (int e = thread; e < active * n; e += kThreads) {
                const int i = e / n, k = e - i * n;
                move(i * pitch + k, base + blocks[i] + k);
            }
        }
    }
};

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
