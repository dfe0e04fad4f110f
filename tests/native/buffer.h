// Memory that a kernel is given: exactly as large as it may be touched, with canaries on both sides, and what each of
// its scalars has to be afterwards.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes)
#endif

// `count` scalars, NaN (or -1) at first, that start `offset` bytes after a multiple of 64 bytes. Unless expected to
// change, each has to keep its bits.
template <class T>
class Buffer {
public:
    Buffer() = default;
    Buffer(int64_t count, size_t offset) : offset_(kZone + offset), initial_(count), wanted_(count) {
        if (posix_memalign(reinterpret_cast<void**>(&memory_), 64, total())) abort();
        memset(memory_, kCanary, total());
        if (count) memset(static_cast<void*>(initial_.data()), 0xff, bytes());
        guard(true);
    }
    ~Buffer() {
        guard(false);
        free(memory_);
    }
    Buffer(Buffer&& other) { swap(other); }
    Buffer& operator=(Buffer&& other) {
        swap(other);
        return *this;
    }

    T* data() const { return memory_ ? reinterpret_cast<T*>(memory_ + offset_) : nullptr; }

    // What the kernel is given.
    T& initial(int64_t i) { return initial_[i]; }
    void reset() {
        if (bytes()) memcpy(data(), initial_.data(), bytes());
    }

    void expect(int64_t i, double value, double margin) { wanted_[i] = {true, value, margin}; }

    // Keeps what the kernel left, to compare other runs with it.
    void remember() { first_run_.assign(data(), data() + initial_.size()); }
    bool differs_from_first_run() const { return memory_ && memcmp(first_run_.data(), data(), bytes()); }

    // What is wrong; empty if nothing is.
    std::string complaint() {
        guard(false);
        const std::string found = canaries_intact() ? wrong_value() : "wrote outside of its memory";
        guard(true);
        return found;
    }

private:
    static constexpr size_t kZone = 256;
    static constexpr unsigned char kCanary = 0xa5;

    struct Wanted {
        bool changed;
        double value, margin;
    };

    size_t bytes() const { return initial_.size() * sizeof(T); }
    size_t total() const { return offset_ + bytes() + kZone; }

    void guard([[maybe_unused]] bool on) {
        if (!memory_) return;
        ASAN_UNPOISON_MEMORY_REGION(memory_, total());
        if (!on) return;
        ASAN_POISON_MEMORY_REGION(memory_, offset_);
        ASAN_POISON_MEMORY_REGION(memory_ + offset_ + bytes(), kZone);
    }

    bool canaries_intact() const {
        bool intact = true;
        for (size_t i = 0; i < total() && memory_; ++i)
            intact &= (i >= offset_ && i < offset_ + bytes()) || memory_[i] == kCanary;
        return intact;
    }

    std::string wrong_value() const {
        for (size_t i = 0; i < initial_.size(); ++i) {
            const T got = data()[i];
            const Wanted& wanted = wanted_[i];
            if (wanted.changed ? fabs(got - wanted.value) <= wanted.margin : !memcmp(&got, &initial_[i], sizeof(T)))
                continue;
            return "element " + std::to_string(i) + " is " + std::to_string(got) + " instead of " +
                   std::to_string(wanted.changed ? wanted.value : double(initial_[i])) +
                   (wanted.changed ? "" : ", which it should have kept");
        }
        return "";
    }

    void swap(Buffer& other) {
        std::swap(memory_, other.memory_);
        std::swap(offset_, other.offset_);
        initial_.swap(other.initial_);
        first_run_.swap(other.first_run_);
        wanted_.swap(other.wanted_);
    }

    unsigned char* memory_ = nullptr;
    size_t offset_ = 0;
    std::vector<T> initial_, first_run_;
    std::vector<Wanted> wanted_;
};
