#include "proto/half.h"

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include <gtest/gtest.h>

#include "tests/support/seed.h"

namespace quarry {
namespace {

// A 16-bit format with `mantissa_bits` below the exponent, decoded in double from its definition.
struct Format {
  int mantissa_bits;
  int bias;
  uint16_t infinity;

  double Value(uint16_t magnitude) const {
    const int exponent = magnitude >> mantissa_bits;
    const int mantissa = magnitude & ((1 << mantissa_bits) - 1);
    if (exponent == 0) return std::ldexp(mantissa, 1 - bias - mantissa_bits);
    return std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
  }
  bool IsNan(uint16_t h) const { return (h & 0x7fff) > infinity; }

  // Round to nearest even by comparing distances: finds the neighbours by bisection. The value
  // one step above the largest finite one stands for infinity, as IEEE 754 rounds.
  uint16_t Nearest(float f) const {
    const uint16_t sign = std::signbit(f) ? 0x8000 : 0;
    const double x = std::fabs(static_cast<double>(f));
    if (x >= Value(infinity)) return sign | infinity;
    uint16_t low = 0, high = infinity;  // Value(low) <= x < Value(high)
    while (high - low > 1) {
      const uint16_t middle = static_cast<uint16_t>((low + high) / 2);
      (Value(middle) <= x ? low : high) = middle;
    }
    const double below = x - Value(low), above = Value(high) - x;
    const bool up = above < below || (above == below && (low & 1) != 0);
    return sign | (up ? high : low);
  }
};
constexpr Format kBf16{7, 127, 0x7f80};
constexpr Format kFp16{10, 15, 0x7c00};

TEST(HalfTest, EveryBf16PatternSurvivesARoundTrip) {
  for (uint32_t h = 0; h < 65536; ++h) {
    const uint16_t back = FloatToBf16(Bf16ToFloat(static_cast<uint16_t>(h)));
    if (kBf16.IsNan(static_cast<uint16_t>(h))) {
      ASSERT_TRUE(kBf16.IsNan(back)) << h;
      ASSERT_EQ(back & 0x8000, h & 0x8000) << h;
    } else {
      ASSERT_EQ(back, h);
    }
  }
}

TEST(HalfTest, EveryFp16PatternSurvivesARoundTrip) {
  for (uint32_t h = 0; h < 65536; ++h) {
    const uint16_t back = FloatToFp16(Fp16ToFloat(static_cast<uint16_t>(h)));
    if (kFp16.IsNan(static_cast<uint16_t>(h))) {
      ASSERT_TRUE(kFp16.IsNan(back)) << h;
      ASSERT_EQ(back & 0x8000, h & 0x8000) << h;
    } else {
      ASSERT_EQ(back, h);
    }
  }
}

TEST(HalfTest, FinitePatternsHaveTheirDefinedValue) {
  for (uint32_t h = 0; h < 65536; ++h) {
    const uint16_t magnitude = h & 0x7fff;
    const double sign = (h & 0x8000) != 0 ? -1 : 1;
    if (magnitude < kBf16.infinity) {
      ASSERT_EQ(Bf16ToFloat(static_cast<uint16_t>(h)), sign * kBf16.Value(magnitude)) << h;
    }
    if (magnitude < kFp16.infinity) {
      ASSERT_EQ(Fp16ToFloat(static_cast<uint16_t>(h)), sign * kFp16.Value(magnitude)) << h;
    }
  }
  EXPECT_EQ(Bf16ToFloat(0x7f80), std::numeric_limits<float>::infinity());
  EXPECT_EQ(Fp16ToFloat(0xfc00), -std::numeric_limits<float>::infinity());
}

void ExpectNearest(float f) {
  ASSERT_EQ(FloatToBf16(f), kBf16.Nearest(f)) << "bf16 of " << f << " (" << std::hexfloat << f;
  ASSERT_EQ(FloatToFp16(f), kFp16.Nearest(f)) << "fp16 of " << f << " (" << std::hexfloat << f;
}

// Around every representable value and every midpoint: exact, one float below, one above.
TEST(HalfTest, RoundsToNearestEvenAtEveryMidpoint) {
  for (const Format& format : {kBf16, kFp16}) {
    for (uint16_t h = 0; h < format.infinity; ++h) {
      const double value = format.Value(h);
      const double middle = (value + format.Value(h + 1)) / 2;
      for (const double x : {value, middle}) {
        const float f = static_cast<float>(x);
        for (const float g : {f, std::nextafter(f, 0.0f), std::nextafter(f, 1e30f)}) {
          if (!std::isfinite(g)) continue;
          ExpectNearest(g);
          ExpectNearest(-g);
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST(HalfTest, RoundsRandomFloatsToNearestEven) {
  std::mt19937 random(Seed());
  for (int i = 0; i < 500000; ++i) {
    const float f = std::bit_cast<float>(static_cast<uint32_t>(random()));
    if (std::isnan(f)) continue;
    ExpectNearest(f);
    if (HasFatalFailure()) return;
  }
}

TEST(HalfTest, OverflowGivesInfinityOnlyFromTheLastMidpointOn) {
  EXPECT_EQ(FloatToFp16(65504.0f), 0x7bff);
  EXPECT_EQ(FloatToFp16(std::nextafter(65520.0f, 0.0f)), 0x7bff);
  EXPECT_EQ(FloatToFp16(65520.0f), 0x7c00);
  EXPECT_EQ(FloatToFp16(-std::numeric_limits<float>::max()), 0xfc00);
  EXPECT_EQ(FloatToBf16(std::numeric_limits<float>::max()), 0x7f80);
  EXPECT_EQ(FloatToBf16(std::numeric_limits<float>::infinity()), 0x7f80);
}

// Also those whose payload lies only in the bits that are cut off.
TEST(HalfTest, EveryNanStaysANan) {
  for (const uint32_t bits : {0x7f800001u, 0x7fc00000u, 0x7fffffffu, 0xff800001u, 0x7f801fffu,
                              0x7f80ffffu, 0xffffffffu}) {
    const float nan = std::bit_cast<float>(bits);
    EXPECT_TRUE(kBf16.IsNan(FloatToBf16(nan))) << std::hex << bits;
    EXPECT_TRUE(kFp16.IsNan(FloatToFp16(nan))) << std::hex << bits;
  }
}

TEST(HalfTest, ArraysLoadWhatWasStored) {
  for (const DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32}) {
    // One byte off: rows in a message need not be aligned.
    std::vector<char> bytes(1 + 3 * DTypeBytes(dtype), 0x5a);
    const float values[] = {1.5f, -0.0078125f, 0.0f};
    for (size_t i = 0; i < 3; ++i) StoreFromFloat(bytes.data() + 1, i, dtype, values[i]);
    EXPECT_EQ(bytes[0], 0x5a);
    for (size_t i = 0; i < 3; ++i) {
      EXPECT_EQ(LoadAsFloat(bytes.data() + 1, i, dtype), values[i]) << DTypeName(dtype) << i;
    }
  }
}

}  // namespace
}  // namespace quarry
