// Codes of weights: what comes back, and by how much it may be off.
#include "gpu/weights/codes.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "gpu/weights/matrix_layout.h"
#include "gpu/weights/pack_matrix.h"
#include "proto/half.h"
#include "tests/support/normal_floats.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

struct Coded {
  std::vector<std::byte> codes;
  std::vector<uint16_t> scales;
  std::vector<float> decoded;
};

class CodesTest : public ::testing::Test {
 protected:
  std::vector<float> Random(size_t n, float size = 1.0f) { return NormalFloats(random_, n, size); }
  static Coded Code(WeightForm form, const std::vector<float>& row) {
    const MatrixLayout layout{DType::kBf16, 1, row.size(), form};
    Coded out{std::vector<std::byte>(layout.row_bytes()),
              std::vector<uint16_t>(layout.scales_per_row()), std::vector<float>(row.size())};
    EXPECT_TRUE(EncodeRow(form, row, out.codes.data(), out.scales.data()));
    DecodeRow(form, out.codes.data(), out.scales.data(), out.decoded);
    return out;
  }
  // Of the row's size.
  static double Error(const std::vector<float>& row, const std::vector<float>& decoded) {
    double square = 0, size = 0;
    for (size_t i = 0; i < row.size(); ++i) {
      square += std::pow(double{decoded[i]} - row[i], 2);
      size += double{row[i]} * row[i];
    }
    return std::sqrt(square / size);
  }

  std::mt19937_64 random_{SteadySeed()};
};

TEST_F(CodesTest, Int8IsOffByHalfAStepAtMost) {
  for (const size_t width : {1, 5, 128, 129, 4096}) {
    for (const float size : {1e-38f, 1e-6f, 0.02f, 1.0f, 1e30f}) {
      const std::vector<float> row = Random(width, size);
      const Coded coded = Code(WeightForm::kInt8, row);
      const float scale = Bf16ToFloat(coded.scales[0]);
      float largest = 0;
      for (const float x : row) largest = std::max(largest, std::abs(x));
      EXPECT_GE(scale * 127.0f, largest * 0.999999f);
      EXPECT_LE(scale * 127.0f, largest * 1.008f + 2e-38f);
      for (size_t i = 0; i < width; ++i) {
        ASSERT_LE(std::abs(coded.decoded[i] - row[i]), 0.5001f * scale) << i << " of " << width;
      }
    }
  }
}

TEST_F(CodesTest, Int4IsOffByHalfAStepButForWhatIsCutOff) {
  for (const size_t width : {1, 5, 128, 129, 1000}) {
    for (const float size : {1e-30f, 0.02f, 1e30f}) {
      const std::vector<float> row = Random(width, size);
      const Coded coded = Code(WeightForm::kInt4, row);
      for (size_t i = 0; i < width; ++i) {
        const float scale = Bf16ToFloat(coded.scales[i / kCodeGroup]);
        const float code = row[i] / scale;
        const float off = std::abs(coded.decoded[i] - row[i]);
        const float cut = std::max({0.0f, -8.0f - code, code - 7.0f});
        ASSERT_LE(off, (0.5001f + cut) * std::abs(scale)) << i << " of " << width;
        // By the finest scale that is tried the largest would be code -8 / 0.72.
        ASSERT_LE(cut, 8.0f / 0.72f - 7.0f + 0.1f);
      }
    }
  }
}

// The figures that the choice of form was made by.
TEST_F(CodesTest, ErrorsOfNormalWeightsAreSmall) {
  const std::vector<float> row = Random(size_t{1} << 16, 0.02f);
  const double int8 = Error(row, Code(WeightForm::kInt8, row).decoded);
  const double int4 = Error(row, Code(WeightForm::kInt4, row).decoded);
  EXPECT_LE(int8, 0.0115);
  EXPECT_LE(int4, 0.1);
  RecordProperty("int8", std::to_string(int8));
  RecordProperty("int4", std::to_string(int4));
}

TEST_F(CodesTest, ALargestOfEitherSignIsMet) {
  for (const float sign : {1.0f, -1.0f}) {
    std::vector<float> row(128, 0.0f);
    row[17] = sign * 4.0f;
    for (const WeightForm form : {WeightForm::kInt8, WeightForm::kInt4}) {
      const Coded coded = Code(form, row);
      for (size_t i = 0; i < row.size(); ++i) {
        ASSERT_NEAR(coded.decoded[i], row[i], form == WeightForm::kInt4 ? 0 : 0.02) << i;
      }
    }
  }
}

TEST_F(CodesTest, NothingIsNothingAndRowsAreFilledUp) {
  for (const WeightForm form : {WeightForm::kInt8, WeightForm::kInt4}) {
    const Coded zero = Code(form, std::vector<float>(200, 0.0f));
    for (const float x : zero.decoded) ASSERT_EQ(x, 0.0f);
    // What is behind a row decodes to zero too: products may read it.
    const std::vector<float> row = Random(200);
    const Coded coded = Code(form, row);
    std::vector<float> all(256);
    DecodeRow(form, coded.codes.data(), coded.scales.data(), all);
    for (size_t i = 0; i < 256; ++i) ASSERT_EQ(all[i], i < 200 ? coded.decoded[i] : 0.0f);
  }
}

TEST_F(CodesTest, WhatIsNotFiniteIsRefusedByName) {
  for (const float bad : {INFINITY, -INFINITY, NAN}) {
    std::vector<float> values = Random(3 * 40);
    values[2 * 40 + 7] = bad;
    const HostMatrix stored{std::as_bytes(std::span(values)), DType::kFp32, 3};
    for (const WeightForm form : {WeightForm::kInt8, WeightForm::kInt4}) {
      const MatrixLayout layout{DType::kBf16, 3, 40, form};
      std::vector<std::byte> packed(layout.bytes());
      const absl::Status status =
          PackMatrix(std::span(&stored, 1), layout, "a.weight", packed.data(), nullptr);
      EXPECT_TRUE(absl::IsInvalidArgument(status));
      const std::string message(status.message());
      EXPECT_NE(message.find("a.weight[2][7]"), std::string::npos) << message;
      EXPECT_NE(message.find(WeightFormName(form)), std::string::npos) << message;
    }
  }
}

}  // namespace
}  // namespace quarry
