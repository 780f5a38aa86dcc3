#include "storage/log/secret.h"

#include <algorithm>
#include <string>

#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <openssl/rand.h>

#include "proto/check.h"
#include "proto/status_macros.h"

namespace quarry {

Secret::Secret(std::span<const uint8_t, kBytes> bytes) {
  std::copy(bytes.begin(), bytes.end(), bytes_.begin());
}

Secret::Secret(Secret&& other) noexcept : bytes_(other.bytes_) {
  Wipe(std::as_writable_bytes(std::span(other.bytes_)));
}

Secret& Secret::operator=(Secret&& other) noexcept {
  if (this == &other) return *this;
  bytes_ = other.bytes_;
  Wipe(std::as_writable_bytes(std::span(other.bytes_)));
  return *this;
}

Secret::~Secret() { Wipe(std::as_writable_bytes(std::span(bytes_))); }

absl::StatusOr<Secret> Secret::Random() {
  std::array<uint8_t, kBytes> bytes;
  QUARRY_RETURN_IF_ERROR(FillWithRandom(bytes));
  Secret out(bytes);
  Wipe(std::as_writable_bytes(std::span(bytes)));
  return out;
}

Secret Secret::Derive(std::string_view purpose, std::span<const uint8_t> context) const {
  std::string text(purpose);
  text.push_back('\0');
  text.append(reinterpret_cast<const char*>(context.data()), context.size());
  std::array<uint8_t, kBytes> bytes;
  unsigned int n = 0;
  QUARRY_CHECK(HMAC(EVP_sha256(), bytes_.data(), static_cast<int>(kBytes),
                    reinterpret_cast<const unsigned char*>(text.data()), text.size(), bytes.data(),
                    &n) != nullptr &&
               n == kBytes);
  Secret out(bytes);
  Wipe(std::as_writable_bytes(std::span(bytes)));
  return out;
}

absl::Status FillWithRandom(std::span<uint8_t> out) {
  if (RAND_bytes(out.data(), static_cast<int>(out.size())) == 1) return absl::OkStatus();
  return absl::UnavailableError("the system has no random numbers");
}

void Wipe(std::span<std::byte> bytes) { OPENSSL_cleanse(bytes.data(), bytes.size()); }

}  // namespace quarry
