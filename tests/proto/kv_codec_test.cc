#include "proto/kv_codec.h"

#include <gtest/gtest.h>

#include <vector>

#include "proto/half.h"
#include "proto/head_dim.h"

namespace quarry {
namespace {

constexpr KvCodec kCodecs[] = {KvCodec::kFp8, KvCodec::kInt8, KvCodec::kInt4};

TEST(KvCodecTest, NamesNameTheirCodec) {
  for (KvCodec codec : kCodecs) EXPECT_EQ(KvCodecNamed(KvCodecName(codec)), codec);
  EXPECT_EQ(KvCodecNamed("none"), KvCodec::kNone);
  EXPECT_EQ(KvCodecNamed("int5"), std::nullopt);
  EXPECT_EQ(KvCodecNamed(""), std::nullopt);
}

// The table of storage/CODECS.md.
TEST(KvCodecTest, ABlockTakesWhatTheFormatSays) {
  const auto per_token = [](KvCodec codec, KvPart part) {
    return static_cast<double>(CodedStrip{codec, part, 128, kBlockTokens}.bytes()) / kBlockTokens;
  };
  EXPECT_EQ(per_token(KvCodec::kFp8, KvPart::kKey), 130);
  EXPECT_EQ(per_token(KvCodec::kInt8, KvPart::kValue), 130);
  EXPECT_EQ(per_token(KvCodec::kInt4, KvPart::kKey), 72);
  EXPECT_EQ(per_token(KvCodec::kInt4, KvPart::kValue), 80);
}

TEST(KvCodecTest, TilesAreWholeCacheLinesAndStripsTheirSum) {
  for (KvCodec codec : kCodecs) {
    for (KvPart part : {KvPart::kKey, KvPart::kValue}) {
      for (uint32_t d = kHeadDimStep; d <= kMaxHeadDim; d += kHeadDimStep) {
        const auto bytes = [&](uint32_t tokens) {
          return CodedStrip{codec, part, d, tokens}.bytes();
        };
        EXPECT_EQ(bytes(0), 0);
        for (uint32_t tokens = 1; tokens <= 64; ++tokens) {
          EXPECT_EQ(bytes(tokens) % 64, 0);
          EXPECT_EQ(bytes(tokens), bytes((tokens + 15) / 16 * 16));
          EXPECT_EQ(bytes(192 + tokens), 3 * bytes(64) + bytes(tokens));
        }
      }
    }
  }
}

class CheckCodedStripTest : public ::testing::Test {
 protected:
  static std::vector<std::byte> Zeros(const CodedStrip& strip) {
    return std::vector<std::byte>(strip.bytes());
  }
  static void SetScale(std::vector<std::byte>* bytes, size_t at, float x) {
    const uint16_t bits = FloatToBf16(x);
    std::memcpy(bytes->data() + at * 2, &bits, sizeof(bits));
  }
};

TEST_F(CheckCodedStripTest, AnotherLengthIsDataLoss) {
  for (KvCodec codec : kCodecs) {
    const CodedStrip strip{codec, KvPart::kValue, 48, 100};
    std::vector<std::byte> bytes = Zeros(strip);
    EXPECT_TRUE(CheckCodedStrip(strip, bytes).ok());
    bytes.push_back({});
    EXPECT_EQ(CheckCodedStrip(strip, bytes).code(), absl::StatusCode::kDataLoss);
    EXPECT_EQ(CheckCodedStrip(strip, std::span(bytes).first(bytes.size() - 2)).code(),
              absl::StatusCode::kDataLoss);
    EXPECT_EQ(CheckCodedStrip(strip, {}).code(), absl::StatusCode::kDataLoss);
  }
}

TEST_F(CheckCodedStripTest, WhatIsNoStripIsInvalid) {
  for (CodedStrip strip : {CodedStrip{KvCodec::kNone, KvPart::kKey, 64, 16},
                           CodedStrip{static_cast<KvCodec>(4), KvPart::kKey, 64, 16},
                           CodedStrip{KvCodec::kInt8, KvPart::kKey, 0, 16},
                           CodedStrip{KvCodec::kInt8, KvPart::kKey, 40, 16},
                           CodedStrip{KvCodec::kInt8, KvPart::kKey, 528, 16}}) {
    EXPECT_EQ(CheckCodedStrip(strip, {}).code(), absl::StatusCode::kInvalidArgument);
  }
}

TEST_F(CheckCodedStripTest, AScaleThatNoEncoderWritesIsDataLossWhereverItLies) {
  for (KvCodec codec : kCodecs) {
    for (KvPart part : {KvPart::kKey, KvPart::kValue}) {
      const CodedStrip strip{codec, part, 80, 64 + 30};
      const uint64_t second = strip.whole_tile_bytes() / 2;
      // Of a tile: the first and the last step.
      const size_t last = codec != KvCodec::kInt4 ? 29 : part == KvPart::kKey ? 79 : 2 * 64 + 31;
      for (size_t at : {size_t{0}, second, second + last}) {
        for (float bad : {-1.0f, 0x1p122f, 0x1p-103f, __builtin_inff(), __builtin_nanf("")}) {
          std::vector<std::byte> bytes = Zeros(strip);
          SetScale(&bytes, at, bad);
          EXPECT_EQ(CheckCodedStrip(strip, bytes).code(), absl::StatusCode::kDataLoss)
              << KvCodecName(codec) << " " << at << " " << bad;
        }
        std::vector<std::byte> bytes = Zeros(strip);
        SetScale(&bytes, at, 0.5f);
        EXPECT_TRUE(CheckCodedStrip(strip, bytes).ok());
      }
    }
  }
}

TEST_F(CheckCodedStripTest, ZeroPointsMayBeNegativeButNotUnbounded) {
  for (KvPart part : {KvPart::kKey, KvPart::kValue}) {
    const CodedStrip strip{KvCodec::kInt4, part, 80, 30};
    const size_t zero = part == KvPart::kKey ? 80 : 32;
    for (float good : {-3.0f, 0.0f, -0.0f, 0x1p-120f, -0x1p120f}) {
      std::vector<std::byte> bytes = Zeros(strip);
      SetScale(&bytes, zero, good);
      EXPECT_TRUE(CheckCodedStrip(strip, bytes).ok()) << good;
    }
    for (float bad : {-0x1p122f, __builtin_inff(), -__builtin_inff(), __builtin_nanf("")}) {
      std::vector<std::byte> bytes = Zeros(strip);
      SetScale(&bytes, zero, bad);
      EXPECT_EQ(CheckCodedStrip(strip, bytes).code(), absl::StatusCode::kDataLoss) << bad;
    }
  }
}

TEST(KvCodingTest, WholeBlocksBetweenTheEndsAreCoded) {
  const KvCoding coding{KvCodec::kInt8, 128, 512};
  EXPECT_EQ(coding.CodedTokens(0), TokenRange{});
  EXPECT_EQ(coding.CodedTokens(512), TokenRange{});
  EXPECT_EQ(coding.CodedTokens(1023), TokenRange{});
  EXPECT_EQ(coding.CodedTokens(1024), (TokenRange{256, 512}));
  EXPECT_EQ(coding.CodedTokens(1279), (TokenRange{256, 512}));
  EXPECT_EQ(coding.CodedTokens(4096), (TokenRange{256, 3584}));
  EXPECT_EQ((KvCoding{KvCodec::kInt8, 0, 0}).CodedTokens(600), (TokenRange{0, 512}));
  EXPECT_EQ((KvCoding{KvCodec::kInt8, ~0u, 0}).CodedTokens(~0u), TokenRange{});
  EXPECT_EQ((KvCoding{KvCodec::kNone, 0, 0}).CodedTokens(600), TokenRange{});
}

TEST(KvCodingTest, WhatIsCodedStaysCoded) {
  for (uint32_t first : {0u, 1u, 128u, 256u, 300u}) {
    for (uint32_t last : {0u, 1u, 512u, 700u}) {
      TokenRange before;
      for (uint32_t tokens = 0; tokens < 5000; tokens += 37) {
        const TokenRange now = KvCoding{KvCodec::kInt4, first, last}.CodedTokens(tokens);
        EXPECT_TRUE(before.empty() || (now.lo == before.lo && now.hi >= before.hi));
        EXPECT_TRUE(now.empty() || (now.lo >= first && now.hi + last <= tokens));
        before = now;
      }
    }
  }
}

}  // namespace
}  // namespace quarry
