// AES-256-GCM over pieces of memory.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <span>

#include "storage/log/secret.h"

namespace quarry {

using SealTag = std::array<uint8_t, 16>;
// Never twice with one key.
using SealNonce = std::array<uint8_t, 12>;

// Bytes that are encrypted, and where they go: as many, the same memory or apart from it.
struct SealPiece {
  std::span<const std::byte> in;
  std::byte* out = nullptr;
};
using SealPieces = std::initializer_list<SealPiece>;
// What the tag covers beside them.
using SealContext = std::initializer_list<std::span<const std::byte>>;

SealTag Seal(const Secret& key, const SealNonce& nonce, SealContext context, SealPieces pieces);
// False: anything of it is not what was sealed; what was put out is to be used by nobody.
bool Unseal(const Secret& key, const SealNonce& nonce, SealContext context, SealPieces pieces,
            const SealTag& tag);

}  // namespace quarry
