// Keys in memory.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace quarry {

// 32 bytes that are overwritten when it ends, and never copied.
class Secret {
 public:
  static constexpr size_t kBytes = 32;

  explicit Secret(std::span<const uint8_t, kBytes> bytes);
  ~Secret();
  Secret(Secret&& other) noexcept;
  Secret& operator=(Secret&& other) noexcept;

  // Unavailable: the system has no random numbers.
  static absl::StatusOr<Secret> Random();
  // Another for this purpose: HMAC-SHA256 of both. It tells nothing of this one, nor of what is
  // derived for other purposes.
  Secret Derive(std::string_view purpose, std::span<const uint8_t> context) const;

  const uint8_t* data() const { return bytes_.data(); }
  std::span<const uint8_t, kBytes> bytes() const { return bytes_; }

 private:
  std::array<uint8_t, kBytes> bytes_;
};

// Of the system, for keys and what must not repeat.
absl::Status FillWithRandom(std::span<uint8_t> out);
// Overwrites what was a secret.
void Wipe(std::span<std::byte> bytes);

}  // namespace quarry
