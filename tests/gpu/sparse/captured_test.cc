#include "gpu/sparse/captured.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "tests/gpu/sparse/sparse_case.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

using testing::Attends;
using testing::SparseCase;

TEST(CapturedTest, MassAndErrorAreThoseOfTheMask) {
  std::mt19937_64 random(SteadySeed());
  ThreadTeam team(2);
  const SparseCase c({DType::kBf16, 5, 1, 64, 100, 1200}, &random);
  const std::vector<HeadPattern> patterns = {{DensePattern{}},
                                             {AShapePattern{64, 100}},
                                             {VerticalSlashPattern{60, 150}},
                                             {BlockSparsePattern{6}},
                                             {BlockScoredPattern{0.9}}};
  const auto plans =
      PlanHeads({c.layer(), c.prefill(), patterns, c.last_q(), DenseFallback::kNever}, &team);
  const SparseIndex index =
      BuildIndex(plans, {c.layer(), 100, 1200, c.q().data(), DenseFallback::kNever}, &team);
  std::vector<uint32_t> tokens;
  std::vector<float> q;
  for (uint32_t row = static_cast<uint32_t>(random() % 50); row < 1200;
       row += 1 + static_cast<uint32_t>(random() % 100)) {
    tokens.push_back(100 + row);
    q.insert(q.end(), c.Query(row, 0), c.Query(row, 0) + 5 * 64);
  }
  const CaptureMeter meter(c.layer(), c.prefill(), tokens, q.data(), &team);
  const std::vector<Captured> got = meter.Measure(index, &team);
  ASSERT_EQ(got.size(), 5u);
  for (uint32_t h = 0; h < 5; ++h) {
    double mass = 0, least = 1, error = 0, length = 0;
    for (const uint32_t token : tokens) {
      const auto sparse =
          c.Attend(token - 100, h, [&](uint32_t j) { return Attends(index, h, token, j); });
      const auto dense = c.Attend(token - 100, h, [](uint32_t) { return true; });
      mass += sparse.mass / static_cast<double>(tokens.size());
      least = std::min(least, sparse.mass);
      for (size_t i = 0; i < 64; ++i) {
        error += std::pow(sparse.o[i] - dense.o[i], 2);
        length += std::pow(dense.o[i], 2);
      }
    }
    EXPECT_NEAR(got[h].mass, mass, 1e-4) << h;
    EXPECT_NEAR(got[h].least_mass, least, 1e-4) << h;
    EXPECT_NEAR(got[h].error, std::sqrt(error / length), 1e-4) << h;
  }
  EXPECT_EQ(got[0].error, 0);
  EXPECT_LT(got[1].mass, 0.9);
}

}  // namespace
}  // namespace quarry
