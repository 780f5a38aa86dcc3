// What the checks of sparse prefill on a card share: plans against the host's, and attention
// against the host's by the same plans.
#pragma once

#include "gpu/cuda/sparse_prefill.h"
#include "gpu/sparse/build_index.h"
#include "gpu/sparse/sparse_attention.h"
#include "tests/gpu/cuda/device_fixture.h"
#include "tests/gpu/cuda/plan_check.h"
#include "tests/gpu/cuda/timed_kernels.h"
#include "tests/gpu/sparse/sparse_case.h"

namespace quarry {

class CudaSparseFixture : public CudaDeviceCheck {
 protected:
  explicit CudaSparseFixture(cuda::AttentionPath path) : kernels_(path) {}

  // A case whose key blocks have exact means, so that device and host choose the same ones: beside
  // dimension 0, which says how much all rows like a block, the keys of two tokens cancel out.
  testing::SparseCase Made(const testing::CaseShape& shape) {
    testing::SparseCase c(shape, &random_);
    c.RoundQueries();
    const uint32_t group = shape.heads / shape.kv_heads;
    for (uint32_t h = 0; h < shape.heads; h += group) {
      for (uint32_t lo = 0; lo < c.tokens(); lo += kKeyTile) {
        const float liked = Below(8) == 0 ? 0.5f * static_cast<float>(1 + Below(12)) : 0.0f;
        for (uint32_t j = lo; j < std::min(lo + kKeyTile, c.tokens()); ++j) {
          c.SetKey(h, j, 0, liked);
          for (uint32_t i = 1; i < shape.head_dim && j % 2 == 1; ++i) {
            c.SetKey(h, j, i, -c.Key(h, j - 1, i));
          }
        }
      }
    }
    for (uint32_t row = 0; row < shape.rows; ++row) {
      for (uint32_t h = 0; h < shape.heads; ++h) c.Query(row, h)[0] = 4;
    }
    return c;
  }

  struct OnDevice {
    DeviceBuffer k, v, q;
    DeviceKv part;
  };
  OnDevice PutCase(const testing::SparseCase& c) {
    const LayerKv layer = c.layer();
    const size_t bytes = layer.kv.head_stride * c.shape().kv_heads;
    OnDevice out{Put(std::span(layer.Keys(0), bytes)), Put(std::span(layer.Values(0), bytes)),
                 Put(c.q()), layer.kv};
    out.part.k = out.k.raw();
    out.part.v = out.v.raw();
    return out;
  }
  static DeviceAttention AttentionOf(const testing::SparseCase& c, const OnDevice& at, uint32_t row,
                                     uint32_t rows) {
    const testing::CaseShape& s = c.shape();
    DeviceAttention a;
    a.parts = std::span(&at.part, 1);
    a.dtype = s.dtype;
    a.heads = s.heads;
    a.kv_heads = s.kv_heads;
    a.head_dim = s.head_dim;
    a.first_token = s.first_token + row;
    a.rows = rows;
    a.q = at.q.floats() + size_t{row} * s.heads * s.head_dim;
    return a;
  }

  void CheckPlans(const testing::SparseCase& c, const OnDevice& at,
                  std::span<const HeadPattern> patterns) {
    const uint32_t last = std::min(kLastQueries, c.shape().rows);
    cuda::SparsePrefill prefill(device_, &kernels_, {.least_saved_tiles = 0});
    const auto plan =
        prefill.Plan(patterns, c.prefill(), AttentionOf(c, at, c.shape().rows - last, last));
    ASSERT_TRUE(plan.ok()) << plan.status();
    const auto got = (*plan)->Heads();
    ASSERT_TRUE(got.ok()) << got.status();
    const std::vector<HeadPlan> want =
        PlanHeads({c.layer(), c.prefill(), patterns, c.last_q()}, &team_);
    ASSERT_EQ(got->size(), want.size());
    for (size_t h = 0; h < want.size(); ++h) {
      SCOPED_TRACE(h);
      testing::ExpectPlan((*got)[h], want[h], patterns[h].pattern, c.prefill());
    }
  }

  // Attends `step` rows at a time by `attend`, and compares with the host's attention of the whole
  // index of `plans`.
  template <typename F>
  void CheckAttention(const testing::SparseCase& c, const OnDevice& at,
                      std::span<const HeadPlan> plans, uint32_t step, const F& attend) {
    const testing::CaseShape& s = c.shape();
    const size_t width = size_t{s.heads} * s.head_dim;
    const DeviceBuffer o_at = Output(c.q().size()), lse_at = Output(size_t{s.rows} * s.heads);
    for (uint32_t row = 0; row < s.rows; row += step) {
      DeviceAttention a = AttentionOf(c, at, row, std::min(step, s.rows - row));
      a.o = o_at.floats() + row * width;
      a.lse = lse_at.floats() + size_t{row} * s.heads;
      const absl::Status status = attend(a);
      ASSERT_TRUE(status.ok()) << status;
    }
    const std::vector<float> o = Get(o_at), lse = Get(lse_at);
    const SparseIndex index =
        BuildIndex(plans, {c.layer(), s.first_token, s.rows, c.q().data()}, &team_);
    std::vector<float> want_o(o.size()), want_lse(lse.size());
    AttendSparse({c.layer(), &index, {}, c.q().data(), want_o.data(), want_lse.data()}, &team_);
    const double limit = s.dtype == DType::kBf16 ? 1e-2 : 2e-3;
    size_t wrong = 0;
    for (size_t i = 0; i < lse.size(); ++i) {
      const double error =
          Error<float>(std::span(o).subspan(i * s.head_dim, s.head_dim),
                       std::span<const float>(want_o).subspan(i * s.head_dim, s.head_dim));
      worst_ = std::max(worst_, error);
      if (error <= limit && std::abs(lse[i] - want_lse[i]) <= 2e-4) continue;
      if (++wrong > 5) continue;
      ADD_FAILURE() << "row " << i / s.heads << " head " << i % s.heads << ": error of o " << error
                    << ", lse " << lse[i] << " for " << want_lse[i];
    }
    EXPECT_EQ(wrong, 0u) << "of " << lse.size() << " answers";
    const double dense = static_cast<double>(index.DenseHeadCost()) * s.heads;
    std::printf("  %u rows at %u: %.0f%% of the dense tiles\n", s.rows, s.first_token,
                100 * static_cast<double>(index.Cost()) / dense);
  }

  static std::vector<HeadPattern> Patterns(uint32_t tokens) {
    return {{VerticalSlashPattern{tokens / 40, tokens / 60}},
            {BlockSparsePattern{tokens / 600 + 1}},
            {AShapePattern{100, tokens / 5}},
            {BlockScoredPattern{0.5}},
            {VerticalSlashMassPattern{0.4, 0.9}},
            {DensePattern{}},
            {VerticalSlashPattern{tokens / 8, 10}},
            {VerticalSlashPattern{31, tokens / 30}}};
  }

  void Run(const testing::CaseShape& shape) {
    SCOPED_TRACE(std::string(DTypeName(shape.dtype)) + ", " + std::to_string(shape.heads) + "/" +
                 std::to_string(shape.kv_heads) + " heads of " + std::to_string(shape.head_dim) +
                 ", rows [" + std::to_string(shape.first_token) + ", +" +
                 std::to_string(shape.rows) + ")");
    const testing::SparseCase c = Made(shape);
    const OnDevice at = PutCase(c);
    std::vector<HeadPattern> patterns = Patterns(c.tokens());
    patterns.resize(shape.heads);
    CheckPlans(c, at, patterns);
    const std::vector<HeadPlan> plans =
        PlanHeads({c.layer(), c.prefill(), patterns, c.last_q(), DenseFallback::kNever}, &team_);
    const auto plan = cuda::DevicePlan::Copy(device_, plans);
    ASSERT_TRUE(plan.ok()) << plan.status();
    cuda::SparsePrefill prefill(device_, &kernels_, {});
    for (const uint32_t step : {shape.rows, kRowTile * (1 + Below(shape.rows / kRowTile + 1))}) {
      CheckAttention(c, at, plans, step,
                     [&](const DeviceAttention& a) { return prefill.Attend(**plan, a); });
    }
  }

  void RunFewRowsOfEachHeadDim() {
    for (const uint32_t head_dim : {64u, 96u, 128u}) Run({DType::kBf16, 8, 2, head_dim, 100, 130});
  }

  // As the device does it: by its own plan, which may be dense.
  void RunOnDevice(const testing::CaseShape& shape) {
    const testing::SparseCase c = Made(shape);
    const OnDevice at = PutCase(c);
    std::vector<HeadPattern> patterns = Patterns(c.tokens());
    patterns.resize(shape.heads);
    const uint32_t last = std::min(kLastQueries, shape.rows);
    const auto plan =
        device_->PlanSparse(patterns, c.prefill(), AttentionOf(c, at, shape.rows - last, last));
    ASSERT_TRUE(plan.ok()) << plan.status();
    const auto heads = (*plan)->Heads();
    ASSERT_TRUE(heads.ok()) << heads.status();
    CheckAttention(c, at, *heads, 4096,
                   [&](const DeviceAttention& a) { return device_->AttendSparse(**plan, a); });
  }

  static void TearDownTestSuite() {
    if (Shared().ok()) std::printf("largest relative error of o: %.2e\n", worst_);
  }
  static inline double worst_ = 0;

  TimedKernels kernels_;
  ThreadTeam team_{std::max(1u, std::thread::hardware_concurrency())};
};

}  // namespace quarry
