#include "daemon/finite.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "proto/half.h"

namespace quarry {
namespace {

TEST(FiniteTest, EverySixteenBitPatternIsJudgedAndWidenedExactly) {
  for (const DType dtype : {DType::kBf16, DType::kFp16}) {
    for (uint32_t bits = 0; bits < 65536; ++bits) {
      std::vector<uint16_t> data(16, 0);
      data[bits % 16] = static_cast<uint16_t>(bits);
      const float wanted = LoadAsFloat(data.data(), bits % 16, dtype);
      ASSERT_EQ(AllFinite(dtype, data.data(), 16), std::isfinite(wanted)) << bits;
      float wide[16];
      ASSERT_EQ(WidenFinite(dtype, data.data(), 16, wide), std::isfinite(wanted)) << bits;
      if (!std::isfinite(wanted)) continue;
      ASSERT_EQ(wide[bits % 16], wanted) << bits;
      ASSERT_EQ(std::signbit(wide[bits % 16]), std::signbit(wanted)) << bits;
    }
  }
}

TEST(FiniteTest, ABadElementIsFoundAnywhereAlsoUnaligned) {
  for (const DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32}) {
    constexpr size_t kCount = 160;
    std::string bytes(kCount * 4 + 1, '\0');
    for (size_t i = 0; i < kCount; ++i) {
      std::string changed = bytes;
      StoreFromFloat(changed.data() + 1, i, dtype, i % 2 == 0 ? INFINITY : std::nanf(""));
      std::vector<float> wide(kCount);
      EXPECT_FALSE(AllFinite(dtype, changed.data() + 1, kCount)) << i;
      EXPECT_FALSE(WidenFinite(dtype, changed.data() + 1, kCount, wide.data())) << i;
    }
    EXPECT_TRUE(AllFinite(dtype, bytes.data() + 1, kCount));
  }
}

}  // namespace
}  // namespace quarry
