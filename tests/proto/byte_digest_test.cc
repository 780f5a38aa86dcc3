#include "proto/byte_digest.h"

#include <algorithm>
#include <cstring>
#include <random>
#include <string_view>
#include <vector>

#include <gtest/gtest.h>

#include "tests/support/seed.h"

namespace quarry {
namespace {

std::span<const std::byte> BytesOf(std::string_view text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

std::vector<std::byte> RandomBytes(size_t n, std::mt19937& random) {
  std::vector<std::byte> bytes(n);
  for (std::byte& b : bytes) b = static_cast<std::byte>(random());
  return bytes;
}

// Published values of XXH3-128 with seed 0, as `xxh128sum` prints them (high half first).
TEST(ByteDigestTest, IsXxh3Of128Bits) {
  EXPECT_EQ(DigestOf({}), (ByteDigest{0x6001c324468d497full, 0x99aa06d3014798d8ull}));
  EXPECT_EQ(DigestOf(BytesOf("abc")), (ByteDigest{0x78af5f94892f3950ull, 0x06b05ab6733a6185ull}));
}

// Around the algorithm's own boundaries (16, 128, 240 bytes, its 256-byte buffer) and the copy's
// 64 KiB pieces.
TEST(ByteDigestTest, StreamedAndCopiedDigestsEqualTheOneShotDigest) {
  std::mt19937 random(Seed());
  for (const size_t n : {0, 1, 2, 3, 8, 9, 15, 16, 17, 127, 128, 129, 239, 240, 241, 255, 256, 257,
                         1023, 1025, 65535, 65536, 65537, 131071, 131072, 200003}) {
    const std::vector<std::byte> bytes = RandomBytes(n, random);
    const ByteDigest want = DigestOf(bytes);

    std::vector<std::byte> copy(n + 1, std::byte{0x5a});
    EXPECT_EQ(CopyAndDigest(copy.data(), bytes.data(), n), want) << n;
    EXPECT_TRUE(std::equal(bytes.begin(), bytes.end(), copy.begin())) << n;
    EXPECT_EQ(copy[n], std::byte{0x5a}) << n;

    StreamingDigest stream, copying;
    std::vector<std::byte> copied(n);
    for (size_t at = 0; at < n;) {
      const size_t piece = std::min<size_t>(n - at, random() % 5000);  // 0 too
      stream.Update(std::span(bytes).subspan(at, piece));
      copying.CopyAndUpdate(copied.data() + at, bytes.data() + at, piece);
      at += piece;
    }
    EXPECT_EQ(stream.Finish(), want) << n;
    EXPECT_EQ(copying.Finish(), want) << n;
    EXPECT_EQ(copied, bytes) << n;
  }
}

// Large copies take another way, which depends on the destination's alignment.
TEST(ByteDigestTest, LargeCopiesAreExactAtEveryAlignment) {
  std::mt19937 random(7);
  for (const size_t n : {65536, 65536 + 4095, 300001}) {
    const std::vector<std::byte> bytes = RandomBytes(n + 64, random);
    std::vector<std::byte> copy(n + 128);
    for (const size_t from : {0, 1, 8, 33}) {
      for (const size_t to : {0, 1, 15, 16, 40, 64}) {
        std::fill(copy.begin(), copy.end(), std::byte{0x5a});
        const auto source = std::span(bytes).subspan(from, n);
        StreamingDigest digest;
        digest.Update(source.first(100));  // leaves a part in the digest's own buffer
        digest.CopyAndUpdate(copy.data() + to, source.data() + 100, n - 100);
        ASSERT_EQ(digest.Finish(), DigestOf(source)) << n << " " << from << " " << to;
        ASSERT_TRUE(std::equal(source.begin() + 100, source.end(), copy.data() + to));
        ASSERT_EQ(std::count(copy.begin(), copy.begin() + static_cast<ptrdiff_t>(to),
                             std::byte{0x5a}),
                  static_cast<ptrdiff_t>(to));
        ASSERT_EQ(copy[to + n - 100], std::byte{0x5a});
      }
    }
  }
}

TEST(ByteDigestTest, FinishDoesNotEndTheStream) {
  StreamingDigest stream;
  stream.Update(BytesOf("a"));
  EXPECT_EQ(stream.Finish(), DigestOf(BytesOf("a")));
  stream.Update(BytesOf("bc"));
  EXPECT_EQ(stream.Finish(), DigestOf(BytesOf("abc")));
}

TEST(ByteDigestTest, EveryFlippedBitShows) {
  std::mt19937 random(1);
  for (const size_t n : {1, 16, 100, 300}) {
    std::vector<std::byte> bytes = RandomBytes(n, random);
    const ByteDigest want = DigestOf(bytes);
    for (size_t bit = 0; bit < 8 * n; ++bit) {
      bytes[bit / 8] ^= std::byte{1} << (bit % 8);
      EXPECT_NE(DigestOf(bytes), want) << "bit " << bit << " of " << n << " bytes";
      bytes[bit / 8] ^= std::byte{1} << (bit % 8);
    }
  }
}

}  // namespace
}  // namespace quarry
