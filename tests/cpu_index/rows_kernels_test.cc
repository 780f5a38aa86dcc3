// Kernels over rows of coded keys and values: every level against the layout's own words.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "cpu_index/kernels.h"
#include "cpu_index/simd.h"
#include "proto/half.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

constexpr uint32_t kRows = 200, kTaken = 77;

class RowsKernelsTest : public ::testing::Test {
 protected:
  RowsKernelsTest() {
    for (uint32_t r = 0; r < kTaken; ++r) which_.push_back(random_() % kRows);
    for (uint32_t r = 0; r < kRows; ++r) {
      row_scale_.push_back(FloatToBf16(0.25f + 0.01f * static_cast<float>(random_() % 99)));
    }
  }
  double RowScale(uint32_t row) const { return Bf16ToFloat(row_scale_[row]); }
  void MakeRows(size_t stride) {
    stride_ = stride;
    bytes_.resize(kRows * stride + 64);
    for (uint8_t& b : bytes_) b = static_cast<uint8_t>(random_());
  }

  std::mt19937 random_{Seed()};
  size_t stride_ = 0;
  std::vector<uint8_t> bytes_;
  std::vector<uint32_t> which_;
  std::vector<uint16_t> row_scale_;  // bf16
};

TEST_F(RowsKernelsTest, FieldsOfAnyWidthAreTakenApartAndWeighted) {
  for (const uint32_t parts : {1u, 2u, 3u}) {
    for (const uint32_t queries : {1u, 4u, 16u, 21u}) {
      // Eight groups a part, of 0 to 8 bits; the last part's last groups hold nothing.
      const uint32_t padded = parts * 64;
      std::vector<uint8_t> from(padded), shift(padded), mask(padded);
      std::vector<uint16_t> part;
      std::vector<uint32_t> first_bit(padded);
      uint32_t at = 0;
      for (uint32_t c = 0; c < padded; c += 8) {
        if (c % 64 == 0) part.push_back(static_cast<uint16_t>(at));
        const uint32_t bits = c + 24 >= padded ? 0 : random_() % 9;
        for (uint32_t j = 0; j < 8; ++j) {
          from[c + j] = static_cast<uint8_t>(at - part.back() + std::min(j, bits - (bits > 0)));
          shift[c + j] = static_cast<uint8_t>(j * bits);
          mask[c + j] = static_cast<uint8_t>((1u << bits) - 1);
          first_bit[c + j] = at * 8 + j * bits;
        }
        at += bits;
      }
      MakeRows(at + 3);
      std::vector<int8_t> weights(queries * padded);
      for (int8_t& w : weights) w = static_cast<int8_t>(random_() % 255 - 127);
      std::vector<float> scale, offset;
      std::vector<double> wanted, most;
      for (uint32_t i = 0; i < queries; ++i) {
        scale.push_back(0.001f * static_cast<float>(1 + random_() % 99));
        offset.push_back(static_cast<float>(random_() % 199) - 99.0f);
        for (uint32_t row : which_) {
          int32_t sum = 0;
          for (uint32_t c = 0; c < padded; ++c) {
            int code = 0;
            for (uint32_t bit = 0; mask[c] >> bit != 0; ++bit) {
              const uint32_t b = first_bit[c] + bit;
              code |= (bytes_[row * stride_ + b / 8] >> b % 8 & 1) << bit;
            }
            sum += weights[i * padded + c] * code;
          }
          const double product = double{scale.back()} * sum;
          wanted.push_back((product + offset.back()) * RowScale(row));
          most.push_back((std::abs(product) + std::abs(offset.back())) * RowScale(row));
        }
      }
      for (const SimdLevel level : SupportedSimdLevels()) {
        std::vector<float> out(wanted.size(), -1.0f);
        KernelsOf(level).score_key_rows({bytes_.data(), stride_, row_scale_.data(), which_.data(),
                                         kTaken, parts, part.data(), from.data(), shift.data(),
                                         mask.data(), weights.data(), scale.data(), offset.data(),
                                         queries, out.data(), kTaken});
        for (size_t at = 0; at < out.size(); ++at) {
          ASSERT_NEAR(out[at], wanted[at], 1e-6 * most[at])
              << SimdLevelName(level) << ", " << queries << " queries";
        }
      }
    }
  }
}

TEST_F(RowsKernelsTest, WeightedValuesFollowTheLayout) {
  for (const uint32_t dims : {32u, 64u, 96u, 128u}) {
    MakeRows(dims / 2);
    for (const uint32_t queries : {1u, 4u, 7u}) {
      std::vector<float> weights(queries * kTaken);
      for (float& w : weights) w = random_() % 4 == 0 ? 0.0f : 0.01f * (random_() % 99);
      std::vector<double> wanted(queries * dims, 1.0);
      for (uint32_t i = 0; i < queries; ++i) {
        for (uint32_t r = 0; r < kTaken; ++r) {
          for (uint32_t d = 0; d < dims; ++d) {
            const uint8_t two = bytes_[which_[r] * stride_ + d / 32 * 16 + d % 16];
            const int code = d % 32 < 16 ? two & 15 : two >> 4;
            wanted[i * dims + d] +=
                double{weights[i * kTaken + r]} * RowScale(which_[r]) * (code - 7.5);
          }
        }
      }
      for (const SimdLevel level : SupportedSimdLevels()) {
        std::vector<float> acc(queries * dims, 1.0f);
        KernelsOf(level).add_value_rows({bytes_.data(), stride_, row_scale_.data(), which_.data(),
                                         kTaken, dims, weights.data(), kTaken, queries,
                                         acc.data()});
        for (size_t at = 0; at < acc.size(); ++at) {
          ASSERT_NEAR(acc[at], wanted[at], 1e-2) << SimdLevelName(level) << " dims " << dims;
        }
      }
    }
  }
}

TEST_F(RowsKernelsTest, LengthsAreThoseOfWeightedRows) {
  for (const uint32_t width : {1u, 7u, 8u, 13u, 16u, 48u, 72u, 128u}) {
    std::vector<float> x(kRows * width), weight(width);
    for (float& w : weight) w = 0.1f * static_cast<float>(random_() % 20);
    for (float& number : x) number = 0.1f * (static_cast<float>(random_() % 199) - 99.0f);
    for (const SimdLevel level : SupportedSimdLevels()) {
      std::vector<float> squares(kRows + 1, -1.0f), most(kRows + 1, -1.0f);
      KernelsOf(level).measure_rows(
          {x.data(), kRows, width, weight.data(), squares.data(), most.data()});
      for (uint32_t r = 0; r < kRows; ++r) {
        double sum = 0, largest = 0;
        for (uint32_t c = 0; c < width; ++c) {
          const double square = std::pow(double{x[r * width + c]} * weight[c], 2);
          sum += square;
          largest = std::max(largest, square);
        }
        ASSERT_NEAR(squares[r], sum, 1e-5 * sum) << SimdLevelName(level) << " width " << width;
        ASSERT_NEAR(most[r], largest, 1e-5 * largest) << SimdLevelName(level) << " width " << width;
      }
      EXPECT_EQ(squares.back(), -1.0f);
      EXPECT_EQ(most.back(), -1.0f);
    }
  }
}

TEST_F(RowsKernelsTest, LevelsAreRoundedDownAndHeldWhereverTheNumbersLie) {
  constexpr float kNoNumber = std::numeric_limits<float>::quiet_NaN();
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (const uint32_t width : {1u, 7u, 8u, 13u, 16u, 48u, 72u, 128u}) {
    const size_t ld_x = width + 5, ld_out = width + 3;
    std::vector<float> x(kRows * ld_x), inverse_step, half, factor;
    for (uint32_t c = 0; c < width; ++c) {
      half.push_back(0.5f * static_cast<float>(1u << c % 9));
      inverse_step.push_back(c % 9 == 0 ? 0.0f : 0.5f * static_cast<float>(1 + random_() % 8));
    }
    for (uint32_t r = 0; r < kRows; ++r) factor.push_back(0.25f * static_cast<float>(1 + r % 7));
    for (float& number : x) {
      // Products of these are exact, so all levels agree at edges, too.
      number = 0.125f * (static_cast<float>(random_() % 1999) - 999.0f);
      const uint32_t odd = random_() % 64;
      if (odd < 3) number = odd == 0 ? kNoNumber : odd == 1 ? kInfinity : -kInfinity;
    }
    for (const SimdLevel level : SupportedSimdLevels()) {
      for (const bool scaled : {false, true}) {
        const float* const factors = scaled ? factor.data() : nullptr;
        std::vector<uint8_t> out(kRows * ld_out, 200);
        KernelsOf(level).quantise({x.data(), ld_x, kRows, width, inverse_step.data(), half.data(),
                                   factors, out.data(), ld_out});
        for (uint32_t r = 0; r < kRows; ++r) {
          for (uint32_t c = 0; c < width; ++c) {
            double y = double{x[r * ld_x + c]} * inverse_step[c];
            if (scaled) y *= factor[r];
            const double held = std::isnan(y) ? 0 : std::clamp(y + half[c], 0.0, 2.0 * half[c] - 0.5);
            ASSERT_EQ(out[r * ld_out + c], std::floor(held))
                << SimdLevelName(level) << ", " << x[r * ld_x + c] << " of coordinate " << c;
          }
          for (size_t c = width; c < ld_out; ++c) ASSERT_EQ(out[r * ld_out + c], 200);
        }
      }
    }
  }
}

}  // namespace
}  // namespace quarry
