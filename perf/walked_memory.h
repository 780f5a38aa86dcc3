// Memory too large for any cache, and the time of threads that walk through it, for benchmarks that
// are held against the machine's read bandwidth.
#pragma once

#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <span>
#include <thread>
#include <vector>

#include "cpu_index/simd.h"

namespace quarry::perf {

// Pages that are there, walked through piece by piece and then again from the start, so that no
// pass finds in a cache what it reads. Ends the process where there is no memory.
class WalkedMemory {
 public:
  explicit WalkedMemory(size_t bytes) : bytes_(bytes) {
    void* at = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (at == MAP_FAILED) {
      std::fprintf(stderr, "no %zu bytes of memory\n", bytes_);
      std::exit(1);
    }
    data_ = static_cast<std::byte*>(at);
  }
  ~WalkedMemory() { munmap(data_, bytes_); }
  WalkedMemory(const WalkedMemory&) = delete;
  WalkedMemory& operator=(const WalkedMemory&) = delete;

  // The pattern everywhere, one behind another from the start.
  void Fill(std::span<const std::byte> pattern) {
    for (size_t at = 0; at < bytes_; at += pattern.size()) {
      std::copy_n(pattern.data(), std::min(pattern.size(), bytes_ - at), data_ + at);
    }
    at_ = 0;
  }
  // The next piece, of at most the whole.
  std::byte* Next(size_t bytes) {
    if (at_ + bytes > bytes_) at_ = 0;
    at_ += bytes;
    return data_ + at_ - bytes;
  }

 private:
  const size_t bytes_;
  std::byte* data_;
  size_t at_ = 0;
};

inline double ThreadMicroseconds() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) * 1e6 + static_cast<double>(t.tv_nsec) / 1e3;
}

// Processor time of the slowest of f(0) to f(threads - 1), microseconds, so that other work on the
// machine's cores does not count.
inline double OnThreads(uint32_t threads, const std::function<void(uint32_t)>& f) {
  std::vector<double> us(threads);
  const auto timed = [&](uint32_t i) {
    const double start = ThreadMicroseconds();
    f(i);
    us[i] = ThreadMicroseconds() - start;
  };
  std::vector<std::thread> others;
  for (uint32_t i = 1; i < threads; ++i) others.emplace_back(timed, i);
  timed(0);
  for (std::thread& t : others) t.join();
  return *std::max_element(us.begin(), us.end());
}

// Reads all of it, 64 bytes a load where the machine can: its roof. What is found goes to *sink.
inline void ReadAll(const void* data, size_t bytes, float* sink) {
  *sink = std::max(*sink, KernelsOf(SupportedSimdLevels().back())
                              .max(static_cast<const float*>(data), bytes / sizeof(float)));
}

}  // namespace quarry::perf
