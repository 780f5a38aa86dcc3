#include "storage/log/sealing.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

#include "absl/strings/escaping.h"

namespace quarry {
namespace {

std::span<const std::byte> Bytes(std::string_view text) { return std::as_bytes(std::span(text)); }
Secret KeyOf(std::string_view hex) {
  const std::string raw = absl::HexStringToBytes({hex.data(), hex.size()});
  return Secret(std::span<const uint8_t, Secret::kBytes>(
      reinterpret_cast<const uint8_t*>(raw.data()), Secret::kBytes));
}
std::string Hex(std::span<const std::byte> bytes) {
  return absl::BytesToHexString({reinterpret_cast<const char*>(bytes.data()), bytes.size()});
}

// Test case 16 of the mode's specification, in one piece and in others.
TEST(SealingTest, IsAes256Gcm) {
  const Secret key = KeyOf("feffe9928665731c6d6a8f9467308308feffe9928665731c6d6a8f9467308308");
  const std::string iv = absl::HexStringToBytes("cafebabefacedbaddecaf888");
  SealNonce nonce;
  std::copy(iv.begin(), iv.end(), nonce.begin());
  const std::string text = absl::HexStringToBytes(
      "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72"
      "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39");
  const std::string context = absl::HexStringToBytes("feedfacedeadbeeffeedfacedeadbeefabaddad2");
  for (const size_t cut : {size_t{0}, size_t{1}, size_t{16}, size_t{33}, text.size()}) {
    std::vector<std::byte> out(text.size());
    const SealTag tag =
        Seal(key, nonce, {Bytes(context).first(7), Bytes(context).subspan(7)},
             {{Bytes(text).first(cut), out.data()}, {Bytes(text).subspan(cut), out.data() + cut}});
    EXPECT_EQ(Hex(out),
              "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa"
              "8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662");
    EXPECT_EQ(Hex(std::as_bytes(std::span(tag))), "76fc6ece0f4e1768cddf8853bb2d551b");
    ASSERT_TRUE(Unseal(key, nonce, {Bytes(context)}, {{out, out.data()}}, tag));
    EXPECT_TRUE(std::equal(out.begin(), out.end(), Bytes(text).begin()));
  }
}

TEST(SealingTest, SecretsAreDerivedForAPurposeAndAContext) {
  const Secret key = KeyOf(std::string(64, '1'));
  const uint8_t a[] = {1}, b[] = {2};
  const auto same = [](const Secret& x, const Secret& y) {
    return std::equal(x.bytes().begin(), x.bytes().end(), y.bytes().begin());
  };
  EXPECT_TRUE(same(key.Derive("p", a), key.Derive("p", a)));
  EXPECT_FALSE(same(key.Derive("p", a), key.Derive("p", b)));
  EXPECT_FALSE(same(key.Derive("p", a), key.Derive("q", a)));
  EXPECT_FALSE(same(key.Derive("p", a), key));
}

TEST(SealingTest, AMovedSecretIsWiped) {
  Secret from = KeyOf(std::string(64, '1'));
  const Secret to = std::move(from);
  EXPECT_EQ(to.data()[0], 0x11);
  for (size_t i = 0; i < Secret::kBytes; ++i) EXPECT_EQ(from.data()[i], 0) << i;  // NOLINT
}

}  // namespace
}  // namespace quarry
