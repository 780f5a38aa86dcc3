#include "cpu_index/key_rows.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <random>
#include <vector>

#include "proto/half.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

// Rows of normal coordinates whose variance falls as in trained heads.
struct Case {
  explicit Case(uint32_t coordinates, uint32_t rows = 500) : random(Seed()) {
    std::normal_distribution<float> normal;
    for (uint32_t c = 0; c < coordinates; ++c) {
      variance.push_back(c == 3 ? 0.0f : 1.0f / (1.0f + 0.2f * c));
      total += variance[c];
    }
    for (uint32_t at = 0; at < rows * coordinates; ++at) {
      values.push_back(normal(random) * std::sqrt(variance[at % coordinates]));
    }
    keys.emplace(rows, variance);
    // The later half first, some at a time.
    for (const uint32_t lo : {rows / 2, 0u}) {
      for (uint32_t r = lo, some = 1; r < lo + rows / 2; r += some, some = 1 + (r + 5) % 9) {
        some = std::min(some, lo + rows / 2 - r);
        keys->Store(r, std::span(values).subspan(r * coordinates, some * coordinates));
      }
    }
  }
  std::mt19937 random;
  std::vector<float> variance, values;
  float total = 0;
  std::optional<KeyRows> keys;
};

TEST(KeyRowsTest, FourBitsACoordinateMissAsLittleAsIsPromised) {
  for (const uint32_t coordinates : {16u, 64u, 96u, 128u, 256u}) {
    const Case c(coordinates);
    double missed = 0;
    std::vector<float> row(coordinates);
    for (uint32_t r = 0; r < 500; ++r) {
      c.keys->Decode(r, row);
      for (uint32_t at = 0; at < coordinates; ++at) {
        const double by = row[at] - c.values[r * coordinates + at];
        missed += by * by / 500;
      }
    }
    EXPECT_NEAR(missed / c.keys->error_variance(), 1, 0.25) << coordinates;
    // Better than 4 bits for each alike.
    EXPECT_LT(c.keys->error_variance(), 0.01155f * c.total) << coordinates;
  }
}

TEST(KeyRowsTest, ScoresAreTheProductsWithWhatIsStored) {
  for (const uint32_t coordinates : {16u, 64u, 96u, 256u}) {
    Case c(coordinates);
    std::normal_distribution<float> normal;
    constexpr uint32_t kQueries = 5;
    std::vector<float> q(kQueries * coordinates);
    for (float& x : q) x = normal(c.random);
    std::vector<uint32_t> which;
    for (uint32_t r = 0; r < 500; r += 1 + c.random() % 5) which.push_back(r);
    const size_t ld = which.size() + 3;
    std::vector<float> scores(kQueries * ld, -7.0f), row(coordinates);
    std::vector<uint16_t> row_scale;
    for (uint32_t r = 0; r < 500; ++r) {
      row_scale.push_back(FloatToBf16(0.25f + 0.01f * static_cast<float>(c.random() % 75)));
    }
    c.keys->Score(c.keys->Prepare(q, kQueries), which, row_scale, scores.data(), ld);
    for (uint32_t i = 0; i < kQueries; ++i) {
      for (size_t r = 0; r < which.size(); ++r) {
        c.keys->Decode(which[r], row);
        double wanted = 0;
        for (uint32_t d = 0; d < coordinates; ++d) {
          wanted += double{q[i * coordinates + d]} * row[d];
        }
        wanted *= Bf16ToFloat(row_scale[which[r]]);
        // Weights are rounded to a 127th of the largest: half of that by each coordinate's part.
        ASSERT_NEAR(scores[i * ld + r], wanted, 0.06 * std::sqrt(c.total)) << coordinates;
      }
      for (size_t r = which.size(); r < ld; ++r) ASSERT_EQ(scores[i * ld + r], -7.0f);
    }
  }
}

TEST(KeyRowsTest, LinesThatRowsShareCountOnce) {
  const Case c(64);  // rows of 32 bytes
  EXPECT_EQ(c.keys->BytesOf(std::vector<uint32_t>{}), 0u);
  EXPECT_EQ(c.keys->BytesOf(std::vector<uint32_t>{0, 1}), 64u);
  EXPECT_EQ(c.keys->BytesOf(std::vector<uint32_t>{1, 2, 7, 8}), 4 * 64u);
  const Case wide(96);  // of 48: the second one lies across two lines
  EXPECT_EQ(wide.keys->BytesOf(std::vector<uint32_t>{1}), 128u);
  EXPECT_EQ(wide.keys->BytesOf(std::vector<uint32_t>{0, 1, 2, 3}), 192u);
}

TEST(KeyRowsTest, RowsOfTheSameVarianceTakeTheSameQueries) {
  const std::vector<float> variance(64, 0.5f);
  std::vector<float> other = variance;
  other[5] = 4;
  const KeyRows keys(3, variance);
  EXPECT_TRUE(keys.SameSteps(KeyRows(0, variance)));
  EXPECT_FALSE(keys.SameSteps(KeyRows(3, other)));
  EXPECT_FALSE(keys.SameSteps(KeyRows(3, std::vector<float>(32, 0.5f))));
}

// The rows' form: their error, a byte for each group's width, a step for each coordinate, the rows.
absl::StatusOr<KeyRows> ReadBack(const std::vector<uint8_t>& widths, float step, uint32_t rows,
                                 uint32_t coordinates) {
  IndexWriter writer("rows", 1);
  writer.Put(0.5f);
  writer.PutAll(std::span<const uint8_t>(widths));
  const std::vector<float> steps(coordinates, step);
  writer.PutAll(std::span<const float>(steps));
  const std::vector<uint8_t> bytes(size_t{rows} * coordinates / 2, 0x5a);
  writer.PutAll(std::span<const uint8_t>(bytes));
  const std::vector<std::byte> form = std::move(writer).Finish();
  absl::StatusOr<IndexReader> reader = IndexReader::Open("rows", 1, form);
  EXPECT_TRUE(reader.ok()) << reader.status();
  return KeyRows::Read(&*reader, rows, coordinates);
}

TEST(KeyRowsTest, RowsThatWereWrittenAreReadAndWrongOnesRefused) {
  const Case c(96);
  IndexWriter writer("rows", 1);
  c.keys->Write(&writer);
  const std::vector<std::byte> form = std::move(writer).Finish();
  absl::StatusOr<IndexReader> reader = IndexReader::Open("rows", 1, form);
  ASSERT_TRUE(reader.ok()) << reader.status();
  const absl::StatusOr<KeyRows> again = KeyRows::Read(&*reader, 500, 96);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(reader->left(), 0u);
  EXPECT_EQ(again->error_variance(), c.keys->error_variance());
  std::vector<float> one(96), other(96);
  for (uint32_t r = 0; r < 500; ++r) {
    c.keys->Decode(r, one);
    again->Decode(r, other);
    ASSERT_EQ(one, other) << r;
  }

  EXPECT_TRUE(ReadBack({8, 8, 0, 0}, 1, 3, 32).ok());
  EXPECT_TRUE(ReadBack({0, 0, 0, 0}, 0, 3, 32).ok());
  for (const auto& widths : {std::vector<uint8_t>{8, 8, 1, 0}, std::vector<uint8_t>{9, 0, 0, 0},
                             std::vector<uint8_t>{0, 0, 0, 255}}) {
    EXPECT_EQ(ReadBack(widths, 1, 3, 32).status().code(), absl::StatusCode::kDataLoss);
  }
  EXPECT_EQ(ReadBack({4, 4, 4, 4}, -1, 3, 32).status().code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(ReadBack({4, 4, 4}, 1, 3, 28).status().code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(ReadBack(std::vector<uint8_t>(65, 4), 1, 3, 520).status().code(),
            absl::StatusCode::kDataLoss);
}

TEST(KeyRowsTest, KeysThatDoNotVaryScoreNothing) {
  KeyRows keys(3, std::vector<float>(64, 0.0f));
  keys.Store(1, std::vector<float>(64, 5.0f));
  const std::vector<float> q(64, 1.0f);
  const std::vector<uint32_t> which{0, 1, 2};
  const std::vector<uint16_t> row_scale(3, FloatToBf16(2.0f));
  std::vector<float> scores(3, -1.0f);
  keys.Score(keys.Prepare(q, 1), which, row_scale, scores.data(), 3);
  EXPECT_EQ(scores, std::vector<float>(3, 0.0f));
}

}  // namespace
}  // namespace quarry
