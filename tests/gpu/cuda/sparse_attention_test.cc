// The sparse kernel's own source, run on an imitation of a card, against the host's attention over
// the same index: which keys are read in which order, and what of them is masked.
#include <gtest/gtest.h>

#include <cmath>
#include <numbers>
#include <random>
#include <string>
#include <vector>

#include "gpu/sparse/sparse_attention.h"
#include "tests/gpu/cuda/imitated_sparse_kernels.h"
#include "tests/gpu/cuda/packed_index.h"
#include "tests/gpu/sparse/sparse_case.h"
#include "tests/support/seed.h"

namespace quarry::cuda {
namespace {

using testing::CaseShape;
using testing::SparseCase;

class SparseKernelTest : public ::testing::Test {
 protected:
  uint32_t Below(uint32_t n) { return static_cast<uint32_t>(random_() % n); }

  // Columns and slashes anywhere, about as far apart as said.
  HeadPlan Lines(uint32_t tokens, uint32_t columns_apart, uint32_t slashes_apart) {
    HeadPlan plan;
    plan.kind = HeadKind::kRanges;
    std::vector<uint32_t> slashes;
    for (uint32_t s = Below(slashes_apart); s < tokens; s += 1 + Below(2 * slashes_apart)) {
      slashes.push_back(s);
    }
    plan.ranges = RangesOfSlashes(slashes);
    for (uint32_t j = Below(columns_apart); j < tokens; j += 1 + Below(2 * columns_apart)) {
      plan.columns.push_back(j);
    }
    return plan;
  }
  static HeadPlan Blocks(const Pattern& pattern) {
    HeadPlan plan;
    plan.kind = HeadKind::kBlocks;
    plan.pattern = pattern;
    return plan;
  }
  // All kinds of heads, from any one on.
  std::vector<HeadPlan> Mixed(uint32_t heads, uint32_t tokens) {
    std::vector<HeadPlan> out;
    const uint32_t first = Below(6);
    for (uint32_t h = 0; h < heads; ++h) {
      switch ((first + h) % 6) {
        case 0:
          out.emplace_back();
          break;
        case 1:  // an A-shape: sinks and a window
          out.push_back(Lines(tokens, 1, tokens));
          out.back().columns.resize(std::min<size_t>(out.back().columns.size(), 1 + Below(100)));
          break;
        case 2:
          out.push_back(Lines(tokens, 4, 200));  // many columns, also inside the ranges
          break;
        case 3:
          out.push_back(Lines(tokens, 40, 300));
          break;
        case 4:
          out.push_back(Blocks(BlockSparsePattern{1 + Below(6)}));
          break;
        default:
          out.push_back(Blocks(BlockScoredPattern{0.8}));
      }
    }
    return out;
  }

  void Run(const CaseShape& shape) {
    SCOPED_TRACE(std::string(DTypeName(shape.dtype)) + ", " + std::to_string(shape.heads) + "/" +
                 std::to_string(shape.kv_heads) + " heads of " + std::to_string(shape.head_dim) +
                 ", rows [" + std::to_string(shape.first_token) + ", +" +
                 std::to_string(shape.rows) + ")");
    SparseCase c(shape, &random_);
    c.RoundQueries();  // as the kernel does
    const std::vector<HeadPlan> plans = Mixed(shape.heads, c.tokens());
    const auto fallback = Below(2) == 0 ? DenseFallback::kNever : DenseFallback::kWhereCheaper;
    const SparseIndex index = BuildIndex(
        plans, {c.layer(), shape.first_token, shape.rows, c.q().data(), fallback}, &team_);
    std::vector<float> want_o(c.q().size()), want_lse(size_t{shape.rows} * shape.heads);
    quarry::AttendSparse({c.layer(), &index, {}, c.q().data(), want_o.data(), want_lse.data()},
                         &team_);

    SparseArgs args = {};
    const PackedIndex packed(index);
    AlignedMemory memory(packed.bytes());
    packed.Describe(memory.data(), &args);
    const AlignedMemory q(std::as_bytes(std::span(c.q())));
    AlignedMemory o(c.q().size() * sizeof(float));  // NaNs where nothing is written, as all memory
    std::vector<float> lse(want_lse.size(), NAN);
    args.q = q.floats();
    args.o = o.floats();
    args.lse = lse.data();
    const LayerKv layer = c.layer();
    args.k = layer.Keys(0);
    args.v = layer.Values(0);
    args.head_stride = layer.kv.head_stride;
    args.group = shape.heads / shape.kv_heads;
    args.head_dim = shape.head_dim;
    args.scale_log2 = std::numbers::log2e_v<float> / std::sqrt(static_cast<float>(shape.head_dim));
    args.dtype = shape.dtype;
    const size_t column_bytes = packed.columns() * layer.row_bytes();
    AlignedMemory columns(2 * column_bytes), masks(packed.masks() * sizeof(uint64_t));
    args.column_k = columns.data();
    args.column_v = columns.data() + column_bytes;
    args.column_masks = reinterpret_cast<uint64_t*>(masks.data());
    ASSERT_TRUE(kernels_.Attend(args).ok());

    const double limit = shape.dtype == DType::kBf16 ? 1e-2 : 1.5e-3;
    for (size_t i = 0; i < lse.size(); ++i) {
      ASSERT_NEAR(lse[i], want_lse[i], 1e-4)
          << "row " << i / shape.heads << " head " << i % shape.heads;
      double error = 0, size = 0;
      for (size_t at = i * shape.head_dim; at < (i + 1) * shape.head_dim; ++at) {
        error += std::pow(args.o[at] - want_o[at], 2);
        size += std::pow(want_o[at], 2);
      }
      ASSERT_LE(std::sqrt(error / size), limit)
          << "row " << i / shape.heads << " head " << i % shape.heads;
    }
  }

  void RunAll(CaseShape shape) {
    for (shape.head_dim = 64; shape.head_dim <= 128; shape.head_dim += 32) {
      for (const DType dtype : {DType::kBf16, DType::kFp16}) {
        shape.dtype = dtype;
        Run(shape);
      }
    }
  }

  std::mt19937_64 random_{Seed()};
  ThreadTeam team_{2};
  ImitatedSparseKernels kernels_{random_()};
};

TEST_F(SparseKernelTest, ShortPrefills) {
  for (const uint32_t rows : {1u, 63u, 64u, 65u, 127u, 128u, 129u}) {
    RunAll({.heads = 2, .kv_heads = 1, .rows = rows});
  }
}

TEST_F(SparseKernelTest, AllKindsOfHeadsInOneLaunch) {
  RunAll({.heads = 6, .kv_heads = 2, .rows = 333 + Below(200)});
  RunAll({.heads = 6, .kv_heads = 6, .first_token = 256, .rows = 200 + Below(60)});
}

TEST_F(SparseKernelTest, RowsThatBeginAnywhere) {
  for (int i = 0; i < 2; ++i) {
    RunAll({.heads = 6, .kv_heads = 1, .first_token = 1 + Below(700), .rows = 1 + Below(300)});
  }
}

}  // namespace
}  // namespace quarry::cuda
