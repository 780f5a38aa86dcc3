#include "proto/byte_digest.h"

#include <algorithm>
#include <cstring>

#include <xxhash.h>

#include "proto/check.h"

namespace quarry {
namespace {

// A piece stays in the L2 cache between the copy and the digest.
constexpr size_t kPieceBytes = 64 * 1024;

ByteDigest FromHash(XXH128_hash_t hash) { return {hash.low64, hash.high64}; }

}  // namespace

struct StreamingDigest::State {
  XXH3_state_t* xxh = XXH3_createState();
  ~State() { XXH3_freeState(xxh); }
};

ByteDigest DigestOf(std::span<const std::byte> bytes) {
  return FromHash(XXH3_128bits(bytes.data(), bytes.size()));
}

ByteDigest CopyAndDigest(std::byte* destination, const std::byte* source, size_t n) {
  StreamingDigest digest;
  digest.CopyAndUpdate(destination, source, n);
  return digest.Finish();
}

StreamingDigest::StreamingDigest() : state_(std::make_unique<State>()) {
  QUARRY_CHECK(state_->xxh != nullptr && XXH3_128bits_reset(state_->xxh) == XXH_OK);
}
StreamingDigest::~StreamingDigest() = default;

void StreamingDigest::Update(std::span<const std::byte> bytes) {
  QUARRY_CHECK(XXH3_128bits_update(state_->xxh, bytes.data(), bytes.size()) == XXH_OK);
}

void StreamingDigest::CopyAndUpdate(std::byte* destination, const std::byte* source, size_t n) {
  for (size_t done = 0; done < n; done += kPieceBytes) {
    size_t piece = std::min(kPieceBytes, n - done);
    std::memcpy(destination + done, source + done, piece);
    Update({destination + done, piece});
  }
}

ByteDigest StreamingDigest::Finish() const { return FromHash(XXH3_128bits_digest(state_->xxh)); }

}  // namespace quarry
