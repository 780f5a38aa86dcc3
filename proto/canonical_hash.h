// The hash of everything that has an identity.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include <openssl/evp.h>

#include "proto/check.h"
#include "proto/types.h"

namespace quarry {

// SHA-256 over a domain and canonical fields (proto/IDENTITY.md): integers are little-endian,
// byte strings and lists carry their length first.
class CanonicalHash {
 public:
  explicit CanonicalHash(std::string_view domain) : context_(EVP_MD_CTX_new()) {
    QUARRY_CHECK(context_ != nullptr && EVP_DigestInit_ex(context_, EVP_sha256(), nullptr) == 1);
    Bytes(domain.data(), domain.size());
  }
  ~CanonicalHash() { EVP_MD_CTX_free(context_); }
  CanonicalHash(const CanonicalHash&) = delete;
  CanonicalHash& operator=(const CanonicalHash&) = delete;

  void U32(uint32_t x) { Integer(x, 4); }
  void U64(uint64_t x) { Integer(x, 8); }
  void F32(float x) { U32(std::bit_cast<uint32_t>(x)); }
  void F64(double x) { U64(std::bit_cast<uint64_t>(x)); }
  void Bytes(const void* data, size_t n) {
    U64(n);
    Raw(data, n);
  }
  template <typename Tag>
  void Add(const Digest<Tag>& d) {
    Bytes(d.bytes.data(), d.bytes.size());
  }
  template <typename Result>
  Result Finish() {
    Result out;
    unsigned int n = 0;
    QUARRY_CHECK(EVP_DigestFinal_ex(context_, out.bytes.data(), &n) == 1 && n == out.bytes.size());
    return out;
  }

 private:
  void Integer(uint64_t x, int bytes) {
    unsigned char little[8];
    for (int i = 0; i < bytes; ++i) little[i] = static_cast<unsigned char>(x >> (8 * i));
    Raw(little, bytes);
  }
  void Raw(const void* data, size_t n) { QUARRY_CHECK(EVP_DigestUpdate(context_, data, n) == 1); }
  EVP_MD_CTX* context_;
};

}  // namespace quarry
