#include "cpu_index/node_level.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "cpu_index/index_form.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

constexpr uint32_t kWidth = KeyCodes::kCoordinates, kRows = 1003, kPerNode = 16, kQueries = 3;
constexpr float kNone = -std::numeric_limits<float>::infinity();

class NodeLevelTest : public ::testing::Test {
 protected:
  NodeLevelTest() {
    std::mt19937 random(static_cast<uint32_t>(Seed()));
    std::normal_distribution<float> normal;
    for (uint32_t at = 0; at < kRows * kWidth; ++at) {
      rows_.push_back(at % kWidth == 5 ? 0 : normal(random) / (1 + 0.1f * (at % kWidth)));
    }
    step_ = NodeLevel::StepFor(rows_, kWidth, kPerNode);
    for (uint32_t at = 0; at < kQueries * kWidth; ++at) q_.push_back(normal(random));
  }
  NodeLevel Level(const std::vector<float>& rows, float lost_variance) const {
    NodeLevel level(kRows, kPerNode);
    for (uint32_t node = 0; node < level.nodes(); ++node) {
      level.Store(node, rows.data() + size_t{node} * kPerNode * kWidth, kWidth, step_,
                  lost_variance);
    }
    return level;
  }
  // The mean of a node's rows, and the sum of their variances around it.
  std::vector<double> Mean(uint32_t node) const {
    const uint32_t lo = node * kPerNode, hi = std::min(kRows, lo + kPerNode);
    std::vector<double> mean(kWidth);
    for (uint32_t at = lo * kWidth; at < hi * kWidth; ++at) {
      mean[at % kWidth] += rows_[at] / (hi - lo);
    }
    return mean;
  }
  double Variance(uint32_t node) const {
    const uint32_t lo = node * kPerNode, hi = std::min(kRows, lo + kPerNode);
    const std::vector<double> mean = Mean(node);
    double sum = 0;
    for (uint32_t at = lo * kWidth; at < hi * kWidth; ++at) {
      sum += std::pow(rows_[at] - mean[at % kWidth], 2) / (hi - lo);
    }
    return sum;
  }

  std::vector<float> rows_, step_, q_;
};

TEST_F(NodeLevelTest, CentresAreTheRowsMeansWithinHalfAStep) {
  const NodeLevel level = Level(rows_, 0);
  EXPECT_EQ(level.nodes(), 63u);
  EXPECT_EQ(level.blocks(), 4u);
  EXPECT_EQ(level.count(0), kPerNode);
  EXPECT_EQ(level.count(62), kRows - 62 * kPerNode);
  std::vector<float> centre(kWidth);
  for (uint32_t node = 0; node < level.nodes(); ++node) {
    level.Centre(node, step_, centre);
    const std::vector<double> mean = Mean(node);
    for (uint32_t c = 0; c < kWidth; ++c) ASSERT_NEAR(centre[c], mean[c], 0.501 * step_[c] + 1e-6);
  }
}

TEST_F(NodeLevelTest, CentresBeyondTheStepAreCutOff) {
  std::vector<float> far = rows_;
  for (float& x : far) x = 100;
  const NodeLevel level = Level(far, 0);
  std::vector<float> centre(kWidth);
  level.Centre(7, step_, centre);
  for (uint32_t c = 0; c < kWidth; ++c) EXPECT_FLOAT_EQ(centre[c], 127 * step_[c]);
}

TEST_F(NodeLevelTest, ScoresAreOfCentresAndSpreadAndPlacesBehindTheLastNodeHaveNone) {
  constexpr float kLost = 0.3f;
  const NodeLevel level = Level(rows_, kLost);
  const std::vector<float> mean_score = {1, -2, 0.5f}, breadth = {0.01f, 1e-30f, 50};
  const CodedQueries queries = NodeLevel::Prepare(q_, kWidth, kWidth, mean_score, step_);
  std::vector<float> centre(kWidth);
  for (const std::vector<uint32_t>& which : {std::vector<uint32_t>{0, 1, 2, 3}, {3}, {2, 0}}) {
    const size_t row = which.size() * 16, ld = row + 3;
    std::vector<float> out(kQueries * ld, -1.0f);
    level.Score(queries, breadth, which.data(), static_cast<uint32_t>(which.size()), out.data(),
                ld);
    for (uint32_t i = 0; i < kQueries; ++i) {
      for (size_t at = 0; at < row; ++at) {
        const uint32_t node = which[at / 16] * 16 + static_cast<uint32_t>(at % 16);
        if (node >= level.nodes()) {
          ASSERT_EQ(out[i * ld + at], kNone);
          continue;
        }
        level.Centre(node, step_, centre);
        const double wanted =
            std::inner_product(centre.begin(), centre.end(), q_.begin() + i * kWidth, 0.0) +
            mean_score[i];
        const double lift = 0.5 * std::min(6.0, (Variance(node) + kLost) * breadth[i]);
        ASSERT_NEAR(level.Lift(node, breadth[i]), lift, 1e-3);
        ASSERT_NEAR(out[i * ld + at], wanted + lift, 0.06);  // weights are bytes
      }
      ASSERT_EQ(out[i * ld + row], -1.0f);
    }
  }
}

TEST_F(NodeLevelTest, WhatWasWrittenIsReadAndWhatIsCutOffRefused) {
  const NodeLevel level = Level(rows_, 0.3f);
  IndexWriter writer("nodes", 1);
  level.Write(&writer);
  const std::vector<std::byte> form = std::move(writer).Finish();
  const auto read = [&](uint32_t rows) {
    absl::StatusOr<IndexReader> reader = IndexReader::Open("nodes", 1, form);
    EXPECT_TRUE(reader.ok()) << reader.status();
    return NodeLevel::Read(&*reader, rows, kPerNode);
  };
  const auto again = read(kRows);
  ASSERT_TRUE(again.ok()) << again.status();
  std::vector<float> one(kWidth), other(kWidth);
  for (uint32_t node = 0; node < level.nodes(); ++node) {
    level.Centre(node, step_, one);
    again->Centre(node, step_, other);
    ASSERT_EQ(one, other);
    ASSERT_EQ(level.Lift(node, 0.1f), again->Lift(node, 0.1f));
  }
  EXPECT_EQ(read(kRows + 1000).status().code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(read(~0u).status().code(), absl::StatusCode::kDataLoss);
}

}  // namespace
}  // namespace quarry
