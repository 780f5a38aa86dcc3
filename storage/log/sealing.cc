#include "storage/log/sealing.h"

#include <memory>

#include <openssl/evp.h>

#include "proto/check.h"

namespace quarry {
namespace {

struct FreeContext {
  void operator()(EVP_CIPHER_CTX* context) const { EVP_CIPHER_CTX_free(context); }  // and wipe
};
using Context = std::unique_ptr<EVP_CIPHER_CTX, FreeContext>;

enum Direction { kDecrypt = 0, kEncrypt = 1 };

const unsigned char* Raw(const std::byte* bytes) {
  return reinterpret_cast<const unsigned char*>(bytes);
}

// All but the tag.
Context Run(Direction direction, const Secret& key, const SealNonce& nonce, SealContext context,
            SealPieces pieces) {
  Context cipher(EVP_CIPHER_CTX_new());
  QUARRY_CHECK(cipher != nullptr && EVP_CipherInit_ex(cipher.get(), EVP_aes_256_gcm(), nullptr,
                                                      key.data(), nonce.data(), direction) == 1);
  const auto update = [&](unsigned char* out, std::span<const std::byte> in) {
    int n = 0;
    if (in.empty()) return;
    QUARRY_CHECK(
        EVP_CipherUpdate(cipher.get(), out, &n, Raw(in.data()), static_cast<int>(in.size())) == 1 &&
        n == static_cast<int>(in.size()));
  };
  for (const std::span<const std::byte> bytes : context) update(nullptr, bytes);
  for (const SealPiece& piece : pieces) {
    update(reinterpret_cast<unsigned char*>(piece.out), piece.in);
  }
  return cipher;
}

}  // namespace

SealTag Seal(const Secret& key, const SealNonce& nonce, SealContext context, SealPieces pieces) {
  const Context cipher = Run(kEncrypt, key, nonce, context, pieces);
  SealTag tag;
  int n = 0;
  QUARRY_CHECK(EVP_CipherFinal_ex(cipher.get(), tag.data(), &n) == 1 && n == 0 &&
               EVP_CIPHER_CTX_ctrl(cipher.get(), EVP_CTRL_GCM_GET_TAG, static_cast<int>(tag.size()),
                                   tag.data()) == 1);
  return tag;
}

bool Unseal(const Secret& key, const SealNonce& nonce, SealContext context, SealPieces pieces,
            const SealTag& tag) {
  const Context cipher = Run(kDecrypt, key, nonce, context, pieces);
  SealTag expected = tag;  // the call takes no const
  QUARRY_CHECK(EVP_CIPHER_CTX_ctrl(cipher.get(), EVP_CTRL_GCM_SET_TAG,
                                   static_cast<int>(expected.size()), expected.data()) == 1);
  unsigned char none[16];
  int n = 0;
  return EVP_CipherFinal_ex(cipher.get(), none, &n) == 1;
}

}  // namespace quarry
