#include "perf/retrieval/head_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <set>
#include <string>
#include <system_error>

#include "absl/strings/numbers.h"
#include "absl/strings/strip.h"
#include "cpu_index/simd.h"
#include "proto/check.h"

namespace quarry::perf {
namespace {

// What a machine has that does not tell.
constexpr size_t kUnknownCache = size_t{64} << 20;

std::string FirstLine(const std::filesystem::path& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// Of all processors' together; one that several share counts once. From the system's files: on
// AMD's processors sysconf() gives what a whole socket has, also to a virtual machine that sees an
// eighth of it.
size_t LastLevelCacheBytes() {
  size_t bytes = 0;
  std::set<std::string> seen;
  std::error_code error;  // no such directory: nothing to go through
  for (const auto& cpu : std::filesystem::directory_iterator("/sys/devices/system/cpu", error)) {
    const std::filesystem::path cache = cpu.path() / "cache/index3";
    const std::string size = FirstLine(cache / "size");  // "32768K"
    uint64_t kib = 0;
    if (!absl::SimpleAtoi(absl::StripSuffix(size, "K"), &kib)) continue;
    if (seen.insert(FirstLine(cache / "shared_cpu_list")).second) bytes += kib << 10;
  }
  return bytes > 0 ? bytes : kUnknownCache;
}

}  // namespace

Pages::Pages(size_t bytes) : bytes_(bytes) {
  void* const data = mmap(nullptr, std::max<size_t>(bytes, 1), PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  if (data == MAP_FAILED) {
    std::fprintf(stderr, "no %zu bytes of memory\n", bytes);
    std::exit(1);
  }
  data_ = static_cast<std::byte*>(data);
}

Pages::~Pages() {
  if (data_ != nullptr) munmap(data_, std::max<size_t>(bytes_, 1));
}

HeadMemory::HeadMemory(const Trace& trace, uint32_t kv_head)
    : head_dim_(trace.head_dim),
      dtype_(trace.dtype),
      tokens_(trace.tokens),
      pages_((trace.tokens + kBlockTokens - 1) / size_t{kBlockTokens} * kBlockTokens * 2 *
             trace.head_dim * DTypeBytes(trace.dtype)) {
  const size_t row = size_t{head_dim_} * DTypeBytes(dtype_);
  const size_t strip = kBlockTokens * row;
  for (uint32_t lo = 0; lo < tokens_; lo += kBlockTokens) {
    const size_t bytes = std::min(kBlockTokens, tokens_ - lo) * row;
    std::byte* const at = pages_.data() + lo / kBlockTokens * 2 * strip;
    std::memcpy(at, trace.Keys(kv_head).data() + lo * row, bytes);
    std::memcpy(at + strip, trace.Values(kv_head).data() + lo * row, bytes);
  }
}

std::vector<KvSegment> HeadMemory::Segments(TokenRange tokens) const {
  QUARRY_CHECK(tokens.hi <= tokens_);
  const size_t row = size_t{head_dim_} * DTypeBytes(dtype_);
  const size_t strip = kBlockTokens * row;
  std::vector<KvSegment> out;
  for (uint32_t lo = tokens.lo; lo < tokens.hi;) {
    const uint32_t block = lo / kBlockTokens;
    const uint32_t hi = std::min(tokens.hi, (block + 1) * kBlockTokens);
    const std::byte* const k = pages_.data() + block * 2 * strip + lo % kBlockTokens * row;
    out.push_back({k, k + strip, {lo, hi}});
    lo = hi;
  }
  return out;
}

WorkingSet::WorkingSet(size_t head_bytes, size_t total_bytes)
    : push_bytes_(2 * LastLevelCacheBytes()),
      memory_(std::max(total_bytes - std::min(total_bytes, head_bytes), push_bytes_)) {
  std::memset(memory_.data(), 1, memory_.size());  // pages of their own, not the zero page
}

float WorkingSet::PushOut(uint32_t thread, uint32_t threads, uint64_t round) const {
  constexpr size_t kLine = 64;
  const size_t share = push_bytes_ / threads / kLine * kLine;
  const size_t stretches = memory_.size() / share;
  const size_t at = (round * threads + thread) % stretches * share;
  return Kernels().max(reinterpret_cast<const float*>(memory_.data() + at),
                       share / sizeof(float));
}

}  // namespace quarry::perf
