// Vocabulary types: what crosses a boundary between folders, processes or languages.
#pragma once

#include <array>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <string_view>

namespace quarry {

// Tokens per canonical block. Engine blocks of 16 tokens compose into one.
inline constexpr uint32_t kBlockTokens = 256;

// A 32-byte SHA-256 digest; Tag keeps the kinds of digest apart at compile time.
template <typename Tag>
struct Digest {
  std::array<uint8_t, 32> bytes{};

  friend auto operator<=>(const Digest&, const Digest&) = default;
  bool IsZero() const { return *this == Digest{}; }
  std::string Hex() const {
    static constexpr char kDigits[] = "0123456789abcdef";
    std::string out;
    out.reserve(64);
    for (uint8_t b : bytes) {
      out.push_back(kDigits[b >> 4]);
      out.push_back(kDigits[b & 15]);
    }
    return out;
  }
  // For Abseil's hash containers.
  template <typename H>
  friend H AbslHashValue(H h, const Digest& d) {
    return H::combine_contiguous(std::move(h), d.bytes.data(), d.bytes.size());
  }
};

using BlockId = Digest<struct BlockIdTag>;                  // what a block's bytes mean
using NamespaceDigest = Digest<struct NamespaceDigestTag>;  // who computed them, and how
using WeightsDigest = Digest<struct WeightsDigestTag>;
using TokenizerDigest = Digest<struct TokenizerDigestTag>;
using AdapterDigest = Digest<struct AdapterDigestTag>;
using InputDigest = Digest<struct InputDigestTag>;          // of a multimodal input
using RopeSignature = Digest<struct RopeSignatureTag>;
using RecipeDigest = Digest<struct RecipeDigestTag>;        // all zero = dense
using StretchId = Digest<struct StretchIdTag>;  // of a block's tokens, whatever precedes them

// XXH3-128 of a buffer, as two little-endian halves.
struct ByteDigest {
  uint64_t low = 0;
  uint64_t high = 0;
  friend bool operator==(const ByteDigest&, const ByteDigest&) = default;
};

template <typename Tag>
struct Id {
  uint64_t value = 0;
  friend auto operator<=>(const Id&, const Id&) = default;
  template <typename H>
  friend H AbslHashValue(H h, const Id& id) {
    return H::combine(std::move(h), id.value);
  }
};
using ContextId = Id<struct ContextIdTag>;  // never reused while a daemon runs; 0 is none
using SessionId = Id<struct SessionIdTag>;  // one attached client; dies with its socket
using LeaseId = Id<struct LeaseIdTag>;

enum class DType : uint8_t { kBf16 = 1, kFp16 = 2, kFp32 = 3 };

constexpr uint32_t DTypeBytes(DType t) { return t == DType::kFp32 ? 4 : 2; }
constexpr bool IsValid(DType t) { return t >= DType::kBf16 && t <= DType::kFp32; }
constexpr std::string_view DTypeName(DType t) {
  switch (t) {
    case DType::kBf16: return "bf16";
    case DType::kFp16: return "fp16";
    case DType::kFp32: return "fp32";
  }
  return "invalid";
}

// Tokens [lo, hi) of a sequence.
struct TokenRange {
  uint32_t lo = 0;
  uint32_t hi = 0;
  uint32_t size() const { return hi > lo ? hi - lo : 0; }
  bool empty() const { return hi <= lo; }
  friend bool operator==(const TokenRange&, const TokenRange&) = default;
};

constexpr TokenRange Intersect(TokenRange a, TokenRange b) {
  TokenRange r{a.lo > b.lo ? a.lo : b.lo, a.hi < b.hi ? a.hi : b.hi};
  return r.lo < r.hi ? r : TokenRange{r.lo, r.lo};
}

enum class KvPart : uint8_t { kKey = 0, kValue = 1 };

// Shape of one model's KV cache. A canonical block holds, for kBlockTokens tokens,
// [layer][K|V][kv_head][token][head_dim] elements of dtype, without padding.
struct KvShape {
  uint32_t layers = 0;
  uint32_t heads = 0;  // query heads; a multiple of kv_heads
  uint32_t kv_heads = 0;
  uint32_t head_dim = 0;  // a multiple of 16, at most 512
  DType dtype = DType::kBf16;

  friend bool operator==(const KvShape&, const KvShape&) = default;
  uint32_t group() const { return heads / kv_heads; }
  uint64_t vector_bytes() const { return uint64_t{head_dim} * DTypeBytes(dtype); }
  uint64_t bytes_per_token() const { return 2ull * layers * kv_heads * vector_bytes(); }
  uint64_t block_bytes() const { return bytes_per_token() * kBlockTokens; }
  // One strip: kBlockTokens vectors of one (layer, part, kv_head), contiguous.
  uint64_t strip_bytes() const { return vector_bytes() * kBlockTokens; }
  uint64_t strip_offset(uint32_t layer, KvPart part, uint32_t kv_head) const {
    return ((uint64_t{layer} * 2 + static_cast<uint8_t>(part)) * kv_heads + kv_head) * strip_bytes();
  }
};

}  // namespace quarry
