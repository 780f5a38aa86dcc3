// How fast sparse prefill is on a card. Not a check; asked for by
//   cuda_device_check --gtest_also_run_disabled_tests --gtest_filter='*SparseTiming*'
// An 8B-shaped layer, 32/8 heads of 128, bf16, all of a prefill's rows in one call. A tile is 64
// keys for 128 queries, 4 * 64 * 128 * 128 operations, as the kernels compute them. | dense | the
// device's dense attention                                             | | a_shape        | 1,024
// sinks and a window of 4,096                                        | | vertical_slash | made
// plans: half of the tiles columns, half slashes anywhere             | | block_sparse   | 100
// blocks for each row tile                                             | | planning       |
// vertical_slash 1,000 + 512 of all heads, by its kernels and in all       |
#include <cuda_runtime_api.h>

#include "gpu/cuda/cuda_sparse_kernels.h"
#include "gpu/cuda/sparse_prefill.h"
#include "gpu/sparse/head_cost.h"
#include "tests/gpu/cuda/timing_fixture.h"

namespace quarry {
namespace {

using Clock = std::chrono::steady_clock;

double Since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Waits for each kernel, and adds its time up.
class TimedKernels final : public cuda::SparseKernels {
 public:
  absl::Status Attend(const cuda::SparseArgs& a) override {
    tiles += Tiles(a);
    return Time(&attend, [&] { return kernels_.Attend(a); });
  }
  absl::Status Score(const cuda::ScoreArgs& a) override {
    return Time(&choose, [&] { return kernels_.Score(a); });
  }
  absl::Status Measure(const cuda::ChoiceArgs& a) override {
    return Time(&choose, [&] { return kernels_.Measure(a); });
  }
  absl::Status SumLastQueries(const cuda::ChoiceArgs& a) override {
    return Time(&choose, [&] { return kernels_.SumLastQueries(a); });
  }
  absl::Status WeighBlocks(const cuda::ChoiceArgs& a) override {
    return Time(&choose, [&] { return kernels_.WeighBlocks(a); });
  }
  absl::Status MeanKeys(const cuda::MeanArgs& a) override {
    return Time(&choose, [&] { return kernels_.MeanKeys(a); });
  }
  absl::Status PoolQueries(const cuda::PoolArgs& a) override {
    return Time(&choose, [&] { return kernels_.PoolQueries(a); });
  }
  void Reset() { attend = choose = tiles = 0; }

  double attend = 0, choose = 0;  // seconds
  double tiles = 0;               // attended

 private:
  static double Tiles(const cuda::SparseArgs& a) {
    std::vector<uint32_t> each(size_t{a.heads} * a.row_tiles);
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    EXPECT_EQ(
        cudaMemcpy(each.data(), a.tiles, each.size() * sizeof(uint32_t), cudaMemcpyDeviceToHost),
        cudaSuccess);
    double sum = 0;
    for (const uint32_t n : each) sum += n;
    return sum;
  }
  template <typename F>
  static absl::Status Time(double* seconds, const F& f) {
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    const auto start = Clock::now();
    const absl::Status status = f();
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    *seconds += Since(start);
    return status;
  }

  cuda::CudaSparseKernels kernels_{cudaStreamPerThread};
};

class DISABLED_CudaSparseTiming : public CudaTimingFixture {
 protected:
  static constexpr uint32_t kHeads = 32, kKvHeads = 8, kHeadDim = 128;
  static constexpr double kTileFlops = 4.0 * kKeyTile * kRowTile * kHeadDim;

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
  for (const uint32_t tokens : {8192u, 32768u, 131072u}) {
    const size_t stride = size_t{tokens} * kHeadDim;
    const DeviceBuffer k = Noise(stride * kKvHeads, 1, false),
                       v = Noise(stride * kKvHeads, 1, false);
    const DeviceBuffer q = Noise(stride * kHeads, 1, true);
    const DeviceBuffer o = Allocate(q.bytes()), lse = Allocate(size_t{tokens} * kHeads * 4);
    const DeviceKv part{k.raw(), v.raw(), stride * 2, {0, tokens}};
    const DeviceAttention a{
        std::span(&part, 1), DType::kBf16, kHeads,      kKvHeads, kHeadDim, 0, tokens, 0,
        q.floats(),          o.floats(),   lse.floats()};
    const double dense_seconds = Time([&] { device_->Attend(a); });
    // A block of it has all heads of a group: 128 queries are 32 rows.
    double dense_tiles = 0;
    for (uint32_t hi = 32; hi <= tokens; hi += 32) dense_tiles += kKvHeads * ((hi + 63) / 64);
    const double dense_rate = dense_tiles * kTileFlops / dense_seconds;
    std::printf("%6u tokens, dense: %9.2f ms, %6.1f TFLOP/s\n", tokens, dense_seconds * 1e3,
                dense_rate * 1e-12);

    TimedKernels kernels;
    cuda::SparsePrefill prefill(device_, &kernels, {});
    const auto attend = [&](const char* what, const std::vector<HeadPlan>& plans) {
      double best = INFINITY, all = 0, choose = 0;
      for (int i = 0; i < 4; ++i) {
        kernels.Reset();
        const auto start = Clock::now();
        const absl::Status status = prefill.Attend(plans, a);
        ASSERT_TRUE(status.ok()) << status;
        if (i > 0 && kernels.attend < best) {
          best = kernels.attend;
          all = Since(start);
          choose = kernels.choose;
        }
      }
      const double rate = kernels.tiles * kTileFlops / best;
      // The device's own, whose kernels nobody waits for.
      const double whole = Time([&] { ASSERT_TRUE(device_->AttendSparse(plans, a).ok()); });
      std::printf(
          "%6u tokens, %-18s %4.1f%% of the tiles: attention %9.2f ms, %6.1f TFLOP/s, %4.0f%% of "
          "dense's rate; choosing kernels %.2f ms, host %.2f ms; a call %.2f ms, %.2f "
          "times dense's speed\n",
          tokens, what, 100 * kernels.tiles / dense_tiles, best * 1e3, rate * 1e-12,
          100 * rate / dense_rate, choose * 1e3, (all - best - choose) * 1e3, whole * 1e3,
          dense_seconds / whole);
    };
    const auto planned = [&](const Pattern& pattern) {
      return PlanHeads({{part, DType::kBf16, kHeads, kKvHeads, kHeadDim},
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

    const std::vector<HeadPattern> lines(kHeads, {VerticalSlashPattern{1000, 512}});
    DeviceAttention last = a;
    last.first_token = tokens - 64;
    last.rows = 64;
    last.q += size_t{last.first_token} * kHeads * kHeadDim;
    double all = INFINITY, choose = 0;
    for (int i = 0; i < 4; ++i) {
      kernels.Reset();
      const auto start = Clock::now();
      ASSERT_TRUE(prefill.Plan(lines, {0, tokens}, last).ok());
      if (i == 0 || Since(start) >= all) continue;
      all = Since(start);
      choose = kernels.choose;
    }
    std::printf("%6u tokens, planning: %.2f ms, %.2f ms of it kernels\n", tokens, all * 1e3,
                choose * 1e3);
  }
}

}  // namespace
}  // namespace quarry
