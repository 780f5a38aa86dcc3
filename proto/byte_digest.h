// XXH3-128 over bytes that cross a boundary: admission, copying reads, tier moves, peers.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string>

#include "proto/types.h"

namespace quarry {

ByteDigest DigestOf(std::span<const std::byte> bytes);
// 32 digits, for messages.
std::string HexOf(const ByteDigest& digest);

// Copies n bytes and returns the digest of what was copied, in one pass over memory: each piece
// is digested while it is in the cache. Ranges must not overlap.
ByteDigest CopyAndDigest(std::byte* destination, const std::byte* source, size_t n);

// The digest of bytes that arrive in pieces.
class StreamingDigest {
 public:
  StreamingDigest();
  ~StreamingDigest();
  StreamingDigest(const StreamingDigest&) = delete;
  StreamingDigest& operator=(const StreamingDigest&) = delete;

  void Update(std::span<const std::byte> bytes);
  // Copies the piece and adds it.
  void CopyAndUpdate(std::byte* destination, const std::byte* source, size_t n);
  ByteDigest Finish() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace quarry
