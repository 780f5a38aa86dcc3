// How fast sparse prefill is on a card. Not a check; asked for by
//   cuda_device_check --gtest_also_run_disabled_tests --gtest_filter='*SparseTiming*'
// An 8B-shaped layer, 32/8 heads of 128, bf16, all of a prefill's rows in one call; of vertical
// slashes heads of 64 and 96 too. A tile is 64 keys for 128 queries, 4 * 64 * 128 * head_dim
// operations, as the kernels compute them. Attention is timed by the card's own kernel and by the
// one for sm_80 and later, which are the same on other cards than Hopper's.
// - dense: the device's dense attention; dense heads: the same heads in an index
// - a_shape: 1,024 sinks and a window of 4,096
// - vertical_slash: made plans, half of the tiles columns, half slashes anywhere
// - block_sparse: 100 blocks for each row tile; block_scored: those within a half of the largest
// "index" is what a call does besides attention: row tiles counted and ordered, and blocks chosen.
// Planned layers are timed as the device does them: the plan, with its kernels one by one; a call
// of attention by it, and what of that makes the index; both together; and how they stand to dense
// attention. Keys and queries are noise: which lines are chosen is chance, and how far apart.
#include "gpu/cuda/sparse_prefill.h"
#include "gpu/sparse/head_cost.h"
#include "tests/gpu/cuda/timed_kernels.h"
#include "tests/gpu/cuda/timing_fixture.h"

namespace quarry {
namespace {

// Sparse prefill whose kernels are timed.
struct TimedPrefill {
  TimedPrefill(Device* device, cuda::AttentionPath path)
      : kernels(path), prefill(device, &kernels, {}) {}

  struct Times {
    double attend = INFINITY, index = 0;  // seconds
  };
  // Of the call that attends fastest, of some behind the first.
  Times Attend(const cuda::DevicePlan& plan, const DeviceAttention& a) {
    Times best;
    for (int i = 0; i < 4; ++i) {
      kernels.Reset();
      const absl::Status status = prefill.Attend(plan, a);
      EXPECT_TRUE(status.ok()) << status;
      if (i > 0 && kernels.attend < best.attend) {
        best = {kernels.attend, kernels.choose + kernels.index};
      }
    }
    return best;
  }

  TimedKernels kernels;
  cuda::SparsePrefill prefill;
};

class DISABLED_CudaSparseTiming : public CudaTimingFixture {
 protected:
  static constexpr uint32_t kHeads = 32, kKvHeads = 8;
  static double TileFlops(uint32_t head_dim) { return 4.0 * kKeyTile * kRowTile * head_dim; }

  // A layer's tensors on the card.
  struct Layer {
    DeviceBuffer k, v, q, o, lse;
    DeviceKv part;
    DeviceAttention a;
  };
  std::unique_ptr<Layer> Made(uint32_t tokens, uint32_t head_dim) {
    const size_t stride = size_t{tokens} * head_dim;
    auto out = std::make_unique<Layer>();
    out->k = Noise(stride * kKvHeads, 1, false);
    out->v = Noise(stride * kKvHeads, 1, false);
    out->q = Noise(stride * kHeads, 1, true);
    out->o = Allocate(out->q.bytes());
    out->lse = Allocate(size_t{tokens} * kHeads * 4);
    out->part = {out->k.raw(), out->v.raw(), stride * 2, {0, tokens}};
    out->a = {std::span(&out->part, 1),
              DType::kBf16,
              kHeads,
              kKvHeads,
              head_dim,
              0,
              tokens,
              0,
              out->q.floats(),
              out->o.floats(),
              out->lse.floats()};
    return out;
  }
  std::unique_ptr<cuda::DevicePlan> OnCard(const std::vector<HeadPlan>& plans) {
    auto plan = cuda::DevicePlan::Copy(device_, plans);
    EXPECT_TRUE(plan.ok()) << plan.status();
    return *std::move(plan);
  }
  static double DenseTiles(uint32_t tokens) {
    double tiles = 0;
    for (uint32_t hi = kRowTile; hi <= tokens; hi += kRowTile) tiles += kHeads * KeyTilesOf(hi);
    return tiles;
  }

  // Prints how long both paths take, and the first one's rate.
  TimedPrefill::Times Compare(const char* what, const std::vector<HeadPlan>& plans,
                              const DeviceAttention& a) {
    TimedPrefill best(device_, cuda::AttentionPath::kBest);
    TimedPrefill portable(device_, cuda::AttentionPath::kPortable);
    const std::unique_ptr<cuda::DevicePlan> plan = OnCard(plans);
    const TimedPrefill::Times times = best.Attend(*plan, a), others = portable.Attend(*plan, a);
    const double flops = best.kernels.tiles * TileFlops(a.head_dim);
    std::printf(
        "%6u tokens, heads of %3u, %-14s %5.1f%% of the tiles: attention %8.2f ms, %5.1f TFLOP/s; "
        "by the portable kernel %8.2f ms, %5.1f TFLOP/s",
        a.rows, a.head_dim, what, 100 * best.kernels.tiles / DenseTiles(a.rows), times.attend * 1e3,
        flops / times.attend * 1e-12, others.attend * 1e3, flops / others.attend * 1e-12);
    return times;
  }

  ThreadTeam team_{std::max(1u, std::thread::hardware_concurrency())};

  // A head of about this share of the dense tiles.
  HeadPlan Lines(uint32_t tokens, double share) {
    const auto cost = [&](const HeadPlan& plan) {
      const HeadCost c = CostOf(plan.ranges, plan.columns, {0, tokens}, DenseFallback::kNever);
      return static_cast<double>(c.tiles) / static_cast<double>(c.dense_tiles);
    };
    HeadPlan plan;
    plan.kind = HeadKind::kRanges;
    std::vector<uint32_t> slashes{0};
    while (true) {
      plan.ranges = RangesOfSlashes(slashes);
      if (cost(plan) >= share / 2) break;
      slashes.insert(slashes.end(), 1 + slashes.size() / 20, 0);
      for (uint32_t& s : slashes) {
        if (s == 0) s = Below(tokens);
      }
      slashes[0] = 0;
      std::sort(slashes.begin(), slashes.end());
      slashes.erase(std::unique(slashes.begin(), slashes.end()), slashes.end());
    }
    for (uint32_t apart = tokens / 64; apart > 0 && cost(plan) < share; apart = apart * 9 / 10) {
      plan.columns.clear();
      for (uint32_t c = Below(apart); c < tokens; c += apart) plan.columns.push_back(c);
    }
    return plan;
  }
};

TEST_F(DISABLED_CudaSparseTiming, Layer) {
  constexpr uint32_t kHeadDim = 128;
  for (const uint32_t tokens : {8192u, 32768u, 131072u}) {
    const std::unique_ptr<Layer> layer = Made(tokens, kHeadDim);
    const DeviceAttention& a = layer->a;
    const double dense_seconds = Time([&] { device_->Attend(a); });
    std::printf("%6u tokens, dense: %9.2f ms, %6.1f TFLOP/s\n", tokens, dense_seconds * 1e3,
                DenseTiles(tokens) * TileFlops(kHeadDim) / dense_seconds * 1e-12);
    const auto attend = [&](const char* what, const std::vector<HeadPlan>& plans) {
      const TimedPrefill::Times times = Compare(what, plans, a);
      // The device's own, whose kernels nobody waits for.
      const std::unique_ptr<cuda::DevicePlan> plan = OnCard(plans);
      const double whole = Time([&] { ASSERT_TRUE(device_->AttendSparse(*plan, a).ok()); });
      std::printf(
          "; index %.3f ms, %.1f%% of attention; a call %.3f ms, %.2f times dense's speed\n",
          times.index * 1e3, 100 * times.index / times.attend, whole * 1e3, dense_seconds / whole);
    };
    const auto planned = [&](const Pattern& pattern) {
      return PlanHeads({{layer->part, DType::kBf16, kHeads, kKvHeads, kHeadDim},
                        {0, tokens},
                        std::vector<HeadPattern>(kHeads, {pattern}),
                        nullptr,
                        DenseFallback::kNever},
                       &team_);
    };
    attend("dense heads", std::vector<HeadPlan>(kHeads));
    attend("a_shape", planned(AShapePattern{1024, 4096}));
    for (const double share : {0.05, 0.1, 0.25, 0.5}) {
      std::vector<HeadPlan> plans;
      for (uint32_t h = 0; h < kHeads; ++h) plans.push_back(Lines(tokens, share));
      attend("vertical_slash", plans);
    }
    attend("block_sparse", planned(BlockSparsePattern{100}));
    attend("block_scored", planned(BlockScoredPattern{0.5}));
  }
}

TEST_F(DISABLED_CudaSparseTiming, PlannedLayer) {
  constexpr uint32_t kHeadDim = 128;
  for (const uint32_t tokens : {1024u, 2048u, 4096u, 8192u, 16384u, 32768u, 131072u}) {
    const std::unique_ptr<Layer> layer = Made(tokens, kHeadDim);
    const DeviceAttention& a = layer->a;
    DeviceAttention last = a;
    last.first_token = tokens - kLastQueries;
    last.rows = kLastQueries;
    last.q += size_t{last.first_token} * kHeads * kHeadDim;
    const double dense = Time([&] { device_->Attend(a); });
    const uint32_t part = tokens / 128;
    const std::pair<const char*, Pattern> all[] = {
        {"lines, few", VerticalSlashPattern{part, 100 + tokens / 4096}},
        {"lines, more", VerticalSlashPattern{4 * part, 100 + tokens / 1024}},
        {"lines by mass", VerticalSlashMassPattern{0.3, 0.5}},
        {"block_sparse", BlockSparsePattern{100}},
        {"block_scored", BlockScoredPattern{0.5}},
        {"a_shape", AShapePattern{1024, 4096}}};
    for (const auto& [what, pattern] : all) {
      const std::vector<HeadPattern> patterns(kHeads, {pattern});
      const auto make = [&] {
        auto plan = device_->PlanSparse(patterns, {0, tokens}, last);
        EXPECT_TRUE(plan.ok()) << plan.status();
        return *std::move(plan);
      };
      const std::unique_ptr<SparsePlan> plan = make();
      const double planning = Time([&] { make(); });
      const double attending = Time([&] { ASSERT_TRUE(device_->AttendSparse(*plan, a).ok()); });
      const double both = Time([&] { ASSERT_TRUE(device_->AttendSparse(*make(), a).ok()); });
      TimedPrefill timed(device_, cuda::AttentionPath::kBest);
      for (int i = 0; i < 3; ++i) {
        timed.kernels.Reset();
        ASSERT_TRUE(timed.prefill.Plan(patterns, {0, tokens}, last).ok());
      }
      const double sums = timed.kernels.sum, choice = timed.kernels.choose;
      const double lists = timed.kernels.index;
      const auto& on_card = static_cast<const cuda::DevicePlan&>(*plan);
      double share = 1;
      TimedPrefill::Times times;
      if (!on_card.AllDense()) {
        times = timed.Attend(on_card, a);
        share = timed.kernels.tiles / DenseTiles(tokens);
      }
      const double index = planning + times.index;
      std::printf(
          "%6u tokens, %-13s %5.1f%% of the tiles: plan %.3f ms (sums %.3f, choice %.3f, lists "
          "%.3f), a call %.3f ms (index %.3f), both %.3f; dense %.3f: %.2f times its speed, plan "
          "and "
          "index %.1f%% of attention\n",
          tokens, what, 100 * share, planning * 1e3, sums * 1e3, choice * 1e3, lists * 1e3,
          attending * 1e3, times.index * 1e3, both * 1e3, dense * 1e3, dense / both,
          100 * index / std::max(1e-9, attending - times.index));
    }
  }
}

TEST_F(DISABLED_CudaSparseTiming, OtherHeadDims) {
  for (const uint32_t head_dim : {64u, 96u}) {
    for (const uint32_t tokens : {32768u, 131072u}) {
      const std::unique_ptr<Layer> layer = Made(tokens, head_dim);
      const auto attend = [&](const char* what, const std::vector<HeadPlan>& plans) {
        Compare(what, plans, layer->a);
        std::printf("\n");
      };
      attend("dense heads", std::vector<HeadPlan>(kHeads));
      std::vector<HeadPlan> plans;
      for (uint32_t h = 0; h < kHeads; ++h) plans.push_back(Lines(tokens, 0.05));
      attend("vertical_slash", plans);
    }
  }
}

}  // namespace
}  // namespace quarry
