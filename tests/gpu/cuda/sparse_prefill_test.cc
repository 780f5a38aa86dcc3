// Sparse prefill as the CUDA device does it, its kernels' own sources on an imitation of a card,
// against the host: the same plans, indexes of the same worth, and the attention of these.
#include "gpu/cuda/sparse_prefill.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "gpu/sparse/choose_blocks.h"
#include "gpu/sparse/sparse_attention.h"
#include "tests/gpu/cuda/imitated_sparse_kernels.h"
#include "tests/gpu/cuda/memory_device.h"
#include "tests/gpu/cuda/plan_check.h"
#include "tests/gpu/sparse/sparse_case.h"
#include "tests/support/seed.h"

namespace quarry::cuda {
namespace {

using testing::CaseShape;
using testing::SparseCase;

// Keeps what is attended.
class RecordedKernels final : public ImitatedSparseKernels {
 public:
  using ImitatedSparseKernels::ImitatedSparseKernels;
  absl::Status Attend(const SparseArgs& a) override {
    SparseIndex& index = attended.emplace_back();
    index.first_token = a.first_token;
    index.rows = a.rows;
    index.heads = a.heads;
    const auto copy = [](const auto* from, size_t n, auto* to) { to->assign(from, from + n); };
    const size_t items = size_t{a.heads} * a.row_tiles;
    copy(a.kind, a.heads, &index.kind);
    copy(a.range_first, a.heads + 1, &index.range_first);
    copy(a.ranges, index.range_first.back(), &index.ranges);
    copy(a.column_first, a.heads + 1, &index.column_first);
    copy(a.columns, index.column_first.back(), &index.columns);
    copy(a.tiles, items, &index.tiles);
    copy(a.columns_seen, items, &index.columns_seen);
    index.block_first = {0};
    for (uint32_t h = 0; h < a.heads; ++h) {
      for (uint32_t t = 0; t < a.row_tiles; ++t) {
        if (index.kind[h] == HeadKind::kBlocks && !index.IsDense(h, t)) {
          const uint32_t* const blocks = a.blocks + a.block_first[index.At(h, t)];
          index.blocks.insert(index.blocks.end(), blocks, blocks + index.tiles[index.At(h, t)]);
        }
        index.block_first.push_back(static_cast<uint32_t>(index.blocks.size()));
      }
    }
    orders.emplace_back(a.order, a.order + items);
    return ImitatedSparseKernels::Attend(a);
  }

  std::vector<SparseIndex> attended;
  std::vector<std::vector<uint32_t>> orders;
};

class SparsePrefillTest : public ::testing::Test {
 protected:
  uint32_t Below(uint32_t n) { return static_cast<uint32_t>(random_() % n); }

  SparseCase Made(const CaseShape& shape) {
    SparseCase c(shape, &random_);
    c.RoundQueries();
    return c;
  }
  // All rows like dimension 0, which sets the blocks that row tiles end in apart: what a row tile
  // takes for its last block shows in all its weights.
  static void SetLastBlocksApart(SparseCase* c) {
    const CaseShape& s = c->shape();
    for (uint32_t row = 0; row < s.rows; ++row) {
      const uint32_t t = row / kRowTile, token = s.first_token + row;
      const uint32_t end = s.first_token + std::min((t + 1) * kRowTile, s.rows);
      for (uint32_t h = 0; h < s.heads; ++h) {
        c->Query(row, h)[0] = 4;
        if (token >= end / kKeyTile * kKeyTile) {
          c->SetKey(h, token, 0, 4.0f * static_cast<float>(t % 3));
        }
      }
    }
  }
  static DeviceAttention AttentionOf(const SparseCase& c, const DeviceKv& part, const float* q,
                                     uint32_t first_token, uint32_t rows) {
    DeviceAttention a;
    a.parts = std::span(&part, 1);
    a.dtype = c.shape().dtype;
    a.heads = c.shape().heads;
    a.kv_heads = c.shape().kv_heads;
    a.head_dim = c.shape().head_dim;
    a.first_token = first_token;
    a.rows = rows;
    a.q = q;
    return a;
  }

  void CheckPlans(const SparseCase& c, std::span<const HeadPattern> patterns,
                  const SparsePrefill::Options& options) {
    const uint32_t last = std::min(kLastQueries, c.shape().rows);
    const size_t width = size_t{c.shape().heads} * c.shape().head_dim;
    const AlignedMemory q(std::as_bytes(std::span(c.last_q(), last * width)));
    const DeviceKv part = c.layer().kv;
    SparsePrefill prefill(&device_, &kernels_, options);
    const auto plan = prefill.Plan(patterns, c.prefill(),
                                   AttentionOf(c, part, q.floats(), c.tokens() - last, last));
    ASSERT_TRUE(plan.ok()) << plan.status();
    const auto got = (*plan)->Heads();
    ASSERT_TRUE(got.ok()) << got.status();
    const std::vector<HeadPlan> want =
        PlanHeads({c.layer(), c.prefill(), patterns, c.last_q()}, &team_);
    ASSERT_EQ(got->size(), want.size());
    for (size_t h = 0; h < want.size(); ++h) {
      testing::ExpectPlan((*got)[h], want[h], patterns[h].pattern, c.prefill());
      sparse_heads_ += want[h].kind == HeadKind::kRanges;
    }
  }

  void CheckAttention(const SparseCase& c, std::span<const HeadPlan> plans,
                      const SparsePrefill::Options& options) {
    const CaseShape& s = c.shape();
    const AlignedMemory q(std::as_bytes(std::span(c.q())));
    AlignedMemory o(c.q().size() * sizeof(float));
    std::vector<float> lse(size_t{s.rows} * s.heads, NAN);
    const DeviceKv part = c.layer().kv;
    DeviceAttention a = AttentionOf(c, part, q.floats(), s.first_token, s.rows);
    a.o = o.floats();
    a.lse = lse.data();
    kernels_.attended.clear();
    kernels_.orders.clear();
    SparsePrefill prefill(&device_, &kernels_, options);
    const auto plan = DevicePlan::Copy(&device_, {plans.begin(), plans.end()});
    ASSERT_TRUE(plan.ok()) << plan.status();
    const absl::Status status = prefill.Attend(**plan, a);
    ASSERT_TRUE(status.ok()) << status;
    uint32_t row = 0;
    for (const SparseIndex& index : kernels_.attended) {
      ASSERT_EQ(index.first_token, s.first_token + row);
      CheckChoice(c, index, row, plans);
      CheckOrder(index, kernels_.orders[static_cast<size_t>(&index - kernels_.attended.data())]);
      std::vector<float> want_o(size_t{index.rows} * s.heads * s.head_dim),
          want_lse(size_t{index.rows} * s.heads);
      AttendSparse({c.layer(), &index, {}, c.Query(row, 0), want_o.data(), want_lse.data()},
                   &team_);
      for (size_t i = 0; i < want_lse.size(); ++i) {
        const size_t at = size_t{row} * s.heads + i;
        ASSERT_NEAR(lse[at], want_lse[i], 1e-4);
        double error = 0, size = 0;
        for (size_t d = 0; d < s.head_dim; ++d) {
          const double want = want_o[i * s.head_dim + d];
          error += std::pow(o.floats()[at * s.head_dim + d] - want, 2);
          size += want * want;
        }
        ASSERT_LE(std::sqrt(error / size), s.dtype == DType::kBf16 ? 1e-2 : 1.5e-3);
      }
      row += index.rows;
    }
    ASSERT_EQ(row, s.rows);
  }

  // Every item once, and none long before another that has many more tiles.
  static void CheckOrder(const SparseIndex& index, std::vector<uint32_t> order) {
    const uint32_t most = KeyTilesOf(index.first_token + index.rows);
    for (size_t i = 1; i < order.size(); ++i) {
      EXPECT_LE(index.tiles[order[i]], index.tiles[order[i - 1]] + most / 255 + 1);
    }
    std::sort(order.begin(), order.end());
    for (size_t i = 0; i < order.size(); ++i) ASSERT_EQ(order[i], i);
  }

  // The blocks that are attended are as good as those that the host would choose.
  void CheckChoice(const SparseCase& c, const SparseIndex& index, uint32_t row,
                   std::span<const HeadPlan> plans) {
    const IndexInputs inputs{c.layer(), index.first_token, index.rows, c.Query(row, 0)};
    for (uint32_t h = 0; h < index.heads; ++h) {
      if (plans[h].kind != HeadKind::kBlocks) continue;
      const Pattern& pattern = plans[h].pattern;
      const BlockMeans means(c.layer(), h, index.first_token + index.rows);
      BlockWeights weights(inputs, h, means, pattern);
      for (uint32_t t = 0; t < index.row_tiles(); ++t) {
        const TokenRange rows = index.RowsOf(t);
        const uint32_t dense = index.DenseTiles(t);
        const auto is_cheaper = [&](size_t blocks) {
          const auto sparse = static_cast<uint32_t>(blocks);
          return sparse < dense && BlockEighths(pattern, sparse, dense) < 8 * uint64_t{dense};
        };
        const std::span<const uint32_t> got = index.BlocksOf(h, t);
        if (std::holds_alternative<BlockSparsePattern>(pattern)) {
          const std::vector<double> all = weights.Of(rows);
          const std::vector<uint32_t> want = ChooseBlocks(pattern, rows, all);
          ASSERT_EQ(index.IsDense(h, t), !is_cheaper(want.size()));
          if (index.IsDense(h, t)) continue;
          ASSERT_EQ(got.size(), want.size());
          double got_mass = 0, want_mass = 0;
          for (const uint32_t b : got) got_mass += all[b];
          for (const uint32_t b : want) want_mass += all[b];
          EXPECT_GE(got_mass, 0.99 * want_mass) << "head " << h << " row tile " << t;
          continue;
        }
        const double threshold = std::get<BlockScoredPattern>(pattern).threshold;
        const auto of = [&](double at) {
          const Pattern other = BlockScoredPattern{at};
          BlockWeights weights_at(inputs, h, means, other);
          return ChooseBlocks(other, rows, weights_at.Of(rows));
        };
        const std::vector<uint32_t> least = of(threshold * 1.02), most = of(threshold * 0.98);
        if (index.IsDense(h, t)) {
          EXPECT_FALSE(is_cheaper(most.size())) << "head " << h << " row tile " << t;
          continue;
        }
        EXPECT_TRUE(std::includes(got.begin(), got.end(), least.begin(), least.end()))
            << "head " << h << " row tile " << t;
        EXPECT_TRUE(std::includes(most.begin(), most.end(), got.begin(), got.end()))
            << "head " << h << " row tile " << t;
        sparse_tiles_ += most.size() < index.DenseTiles(t);
      }
    }
  }

  static HeadPlan Blocks(const Pattern& pattern) {
    HeadPlan plan;
    plan.kind = HeadKind::kBlocks;
    plan.pattern = pattern;
    return plan;
  }

  // Everything at once, however little it may save.
  static constexpr SparsePrefill::Options kAll = {.least_saved_tiles = 0};

  std::mt19937_64 random_{Seed()};
  ThreadTeam team_{2};
  testing::MemoryDevice device_;
  RecordedKernels kernels_{random_()};
  uint32_t sparse_tiles_ = 0, sparse_heads_ = 0;
};

TEST_F(SparsePrefillTest, PlansAreTheHosts) {
  const std::vector<HeadPattern> patterns = {
      {VerticalSlashPattern{60, 110}}, {VerticalSlashMassPattern{0.5, 1}},
      {AShapePattern{70, 200}},        {BlockSparsePattern{6}},
      {VerticalSlashPattern{5, 150}},  {DensePattern{}},
      {VerticalSlashPattern{300, 1}},  {VerticalSlashMassPattern{0.3, 0.9}}};
  uint32_t n = Below(6);
  for (const uint32_t rows : {1u, 63u, 64u, 129u, 700u, 1777u}) {
    for (const uint32_t first : {0u, 1 + Below(900)}) {
      const DType dtype = n % 2 == 0 ? DType::kBf16 : DType::kFp16;
      const SparseCase c = Made({dtype, 8, n % 4 < 2 ? 2u : 8u, 64 + 32 * (n % 3), first, rows});
      SCOPED_TRACE(::testing::Message() << "first " << first << " rows " << rows);
      // Everything at once; two heads at a time; some more.
      const size_t tokens = c.tokens();
      CheckPlans(c, patterns, kAll);
      CheckPlans(c, patterns, {.most_line_bytes = 1, .least_saved_tiles = 0});
      CheckPlans(c, patterns, {.most_line_bytes = 200 * tokens, .least_saved_tiles = 0});
      ++n;
    }
  }
  EXPECT_GT(sparse_heads_, 0u);
}

TEST_F(SparsePrefillTest, AttendsAsItChooses) {
  const std::vector<HeadPattern> patterns = {
      {VerticalSlashPattern{60, 110}}, {BlockSparsePattern{4}}, {BlockSparsePattern{9}},
      {BlockScoredPattern{0.85}},      {DensePattern{}},        {BlockScoredPattern{0.7}},
      {BlockScoredPattern{0.7}},       {AShapePattern{3, 100}}};
  uint32_t n = Below(6);
  for (const uint32_t rows : {1u, 64u, 150u, 400u}) {
    for (const uint32_t first : {0u, 1 + Below(900)}) {
      const DType dtype = n % 2 == 0 ? DType::kBf16 : DType::kFp16;
      SparseCase c = Made({dtype, 8, n % 4 < 2 ? 2u : 8u, 64 + 32 * (n % 3), first, rows});
      SetLastBlocksApart(&c);
      SCOPED_TRACE(::testing::Message() << "first " << first << " rows " << rows);
      const std::vector<HeadPlan> plans =
          PlanHeads({c.layer(), c.prefill(), patterns, c.last_q(), DenseFallback::kNever}, &team_);
      // Everything at once; row tiles in pairs; scores of one or two row tiles.
      CheckAttention(c, plans, kAll);
      CheckAttention(c, plans, {.most_row_tiles = 2});
      CheckAttention(c, plans, {.most_floats = 3000});
      if (HasFatalFailure()) return;
      ++n;
    }
  }
  EXPECT_GT(sparse_tiles_, 0u);
}

TEST_F(SparsePrefillTest, LayersThatSaveLittleAreDense) {
  const SparseCase c = Made({DType::kBf16, 4, 2, 64, 0, 1500});
  const AlignedMemory q(std::as_bytes(std::span(c.last_q(), size_t{64} * 4 * 64)));
  const DeviceKv part = c.layer().kv;
  const DeviceAttention last = AttentionOf(c, part, q.floats(), c.tokens() - 64, 64);
  const std::vector<HeadPattern> patterns = {{VerticalSlashPattern{30, 100}},
                                             {AShapePattern{10, 100}},
                                             {BlockSparsePattern{2}},
                                             {DensePattern{}}};
  uint64_t dense_tiles = 0;
  for (uint32_t hi = 128; hi <= 1536; hi += 128) dense_tiles += KeyTilesOf(std::min(hi, 1500u));
  const auto is_dense = [&](uint64_t least_saved_tiles) {
    SparsePrefill prefill(&device_, &kernels_, {.least_saved_tiles = least_saved_tiles});
    const auto plan = prefill.Plan(patterns, c.prefill(), last);
    EXPECT_TRUE(plan.ok()) << plan.status();
    const auto heads = (*plan)->Heads();
    EXPECT_TRUE(heads.ok()) << heads.status();
    EXPECT_EQ(heads->size(), 4u);
    EXPECT_EQ((*plan)->AllDense(), (*heads)[1].kind == HeadKind::kDense);
    return (*plan)->AllDense();
  };
  EXPECT_FALSE(is_dense(dense_tiles / 10));
  // More than is saved, which shows when lines are chosen; more than there is.
  EXPECT_TRUE(is_dense(3 * dense_tiles - dense_tiles / 10));
  EXPECT_TRUE(is_dense(3 * dense_tiles + 1));
}

TEST_F(SparsePrefillTest, LayersOf32HeadsOf4096TokensAreDenseWithoutAPlan) {
  const SparseCase c = Made({DType::kBf16, 32, 8, 64, 0, 4096});
  const AlignedMemory q(std::as_bytes(std::span(c.last_q(), size_t{64} * 32 * 64)));
  const DeviceKv part = c.layer().kv;
  const DeviceAttention last = AttentionOf(c, part, q.floats(), c.tokens() - 64, 64);
  const std::vector<HeadPattern> patterns(32, HeadPattern{BlockScoredPattern{}});
  for (const bool planned : {false, true}) {
    SparsePrefill::Options options;
    if (planned) options.least_saved_tiles = 0;
    const auto plan = SparsePrefill(&device_, &kernels_, options).Plan(patterns, c.prefill(), last);
    ASSERT_TRUE(plan.ok()) << plan.status();
    EXPECT_EQ((*plan)->AllDense(), !planned);
  }
}

TEST_F(SparsePrefillTest, SaysWhatItDoesNotTake) {
  const SparseCase c = Made({DType::kFp32, 2, 1, 64, 0, 200});
  const DeviceKv part = c.layer().kv;
  SparsePrefill prefill(&device_, &kernels_, {});
  const auto plan = DevicePlan::Copy(&device_, std::vector<HeadPlan>(2));
  ASSERT_TRUE(plan.ok()) << plan.status();
  DeviceAttention a = AttentionOf(c, part, c.q().data(), 0, 200);
  const absl::Status fp32 = prefill.Attend(**plan, a);
  EXPECT_TRUE(absl::IsUnimplemented(fp32)) << fp32;
  EXPECT_NE(fp32.message().find("fp32 heads of 64"), std::string_view::npos) << fp32;
  a.dtype = DType::kBf16;
  a.head_dim = 80;
  EXPECT_TRUE(absl::IsUnimplemented(prefill.Attend(**plan, a)));
  a.head_dim = 64;
  a.q += 1;
  const absl::Status aligned = prefill.Attend(**plan, a);
  EXPECT_TRUE(absl::IsUnimplemented(aligned));
  EXPECT_NE(aligned.message().find("16 bytes"), std::string_view::npos) << aligned;
  const std::vector<HeadPattern> patterns(2, {VerticalSlashPattern{60, 110}});
  EXPECT_TRUE(absl::IsUnimplemented(prefill.Plan(patterns, c.prefill(), a).status()));
}

}  // namespace
}  // namespace quarry::cuda
