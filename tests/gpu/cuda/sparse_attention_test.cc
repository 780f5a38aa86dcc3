// The sparse kernel's own source, run on an imitation of a card, against the host's attention over
// the same index: which keys are read in which order, and what of them is masked.
#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <numbers>
#include <random>
#include <string>
#include <vector>

#include "tests/gpu/cuda/imitated_warp.h"
// After the operations that it uses.
#include "gpu/cuda/packed_index.h"
#include "gpu/cuda/sparse_attention.cuh"
#include "gpu/sparse/sparse_attention.h"
#include "tests/gpu/sparse/sparse_case.h"
#include "tests/support/seed.h"

namespace quarry::cuda {
namespace {

using testing::CaseShape;
using testing::SparseCase;

class SparseKernelTest : public ::testing::Test {
 protected:
  struct alignas(16) Chunk {
    std::byte bytes[16];
  };
  template <size_t kBytes>
  struct alignas(128) Shared {
    char bytes[kBytes];
  };

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

  template <typename T, DType kDType, int kHeadDim>
  void Run(CaseShape shape) {
    using Tile = SparseTile<kHeadDim>;
    shape.dtype = kDType;
    shape.head_dim = kHeadDim;
    SCOPED_TRACE(std::string(DTypeName(kDType)) + ", " + std::to_string(shape.heads) + "/" +
                 std::to_string(shape.kv_heads) + " heads of " + std::to_string(kHeadDim) +
                 ", rows [" + std::to_string(shape.first_token) + ", +" +
                 std::to_string(shape.rows) + ")");
    SparseCase c(shape, &random_);
    for (uint32_t row = 0; row < shape.rows; ++row) {  // as the kernel rounds them
      for (uint32_t i = 0; i < shape.heads * shape.head_dim; ++i) {
        std::byte stored[2];
        StoreFromFloat(stored, 0, kDType, c.Query(row, 0)[i]);
        c.Query(row, 0)[i] = LoadAsFloat(stored, 0, kDType);
      }
    }
    const std::vector<HeadPlan> plans = Mixed(shape.heads, c.tokens());
    const auto fallback = Below(2) == 0 ? DenseFallback::kNever : DenseFallback::kWhereCheaper;
    const SparseIndex index = BuildIndex(
        plans, {c.layer(), shape.first_token, shape.rows, c.q().data(), fallback}, &team_);
    std::vector<float> want_o(c.q().size()), want_lse(size_t{shape.rows} * shape.heads);
    quarry::AttendSparse({c.layer(), &index, {}, c.q().data(), want_o.data(), want_lse.data()},
                         &team_);

    SparseArgs args = {};
    const PackedIndex packed(index);
    std::vector<Chunk> memory(packed.bytes().size() / sizeof(Chunk) + 1);
    std::memcpy(memory.data(), packed.bytes().data(), packed.bytes().size());
    packed.Describe(memory.data()->bytes, &args);
    std::vector<float4> q(c.q().size() / 4), o(q.size());
    std::memcpy(q.data(), c.q().data(), c.q().size() * sizeof(float));
    std::memset(o.data(), 0xff, o.size() * sizeof(float4));
    std::vector<float> lse(want_lse.size(), NAN);
    args.q = &q.data()->x;
    args.o = &o.data()->x;
    args.lse = lse.data();
    const LayerKv layer = c.layer();
    args.k = layer.Keys(0);
    args.v = layer.Values(0);
    args.head_stride = layer.kv.head_stride;
    args.group = shape.heads / shape.kv_heads;
    args.head_dim = kHeadDim;
    args.scale_log2 = std::numbers::log2e_v<float> / std::sqrt(static_cast<float>(kHeadDim));
    // NaNs where nothing is written.
    std::vector<Chunk> columns(2 * packed.columns() * Tile::kChunks + 1);
    std::memset(columns.data(), 0xff, columns.size() * sizeof(Chunk));
    args.column_k = columns.data()->bytes;
    args.column_v = args.column_k + packed.columns() * Tile::kVectorBytes;
    std::vector<uint64_t> masks(packed.masks() + 1, 0x5555555555555555);
    args.column_masks = masks.data();
    gridDim = {2, shape.heads, 1};
    ForBlocks(64, [&] { CompactColumns(args, 64); });
    ForBlocks(64, [&] { MaskColumns(args, 64); });
    const auto shared = std::make_unique<Shared<Tile::kSharedBytes>>();
    gridDim = {packed.items(), 1, 1};
    ForBlocks(Tile::kThreads, [&] {
      if (threadIdx.x == 0) std::memset(shared->bytes, 0xff, Tile::kSharedBytes);
      __syncthreads();
      AttendRowTile<T, Tile>(args, shared->bytes);
    });

    const double limit = kDType == DType::kBf16 ? 1e-2 : 1.5e-3;
    for (size_t i = 0; i < lse.size(); ++i) {
      ASSERT_NEAR(lse[i], want_lse[i], 1e-4)
          << "row " << i / shape.heads << " head " << i % shape.heads;
      double error = 0, size = 0;
      for (size_t at = i * kHeadDim; at < (i + 1) * kHeadDim; ++at) {
        error += std::pow(args.o[at] - want_o[at], 2);
        size += std::pow(want_o[at], 2);
      }
      ASSERT_LE(std::sqrt(error / size), limit)
          << "row " << i / shape.heads << " head " << i % shape.heads;
    }
  }

  template <typename F>
  void ForBlocks(int threads, const F& f) {
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
        ImitatedBlock block(threads, random_());
        block.Run(f);
      }
    }
  }

  void RunAll(const CaseShape& shape) {
    Run<Bf16, DType::kBf16, 64>(shape);
    Run<Fp16, DType::kFp16, 64>(shape);
    Run<Bf16, DType::kBf16, 96>(shape);
    Run<Fp16, DType::kFp16, 96>(shape);
    Run<Bf16, DType::kBf16, 128>(shape);
    Run<Fp16, DType::kFp16, 128>(shape);
  }

  std::mt19937_64 random_{Seed()};
  ThreadTeam team_{2};
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
