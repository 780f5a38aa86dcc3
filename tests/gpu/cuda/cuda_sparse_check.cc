// Sparse prefill of the CUDA device against the host's plans, and its attention by the same ones.
#include "tests/gpu/cuda/sparse_fixture.h"

namespace quarry {
namespace {

using testing::CaseShape;
using testing::SparseCase;

class CudaSparseCheck : public CudaSparseFixture {
 protected:
  CudaSparseCheck() : CudaSparseFixture(cuda::AttentionPath::kBest) {}
};

// Small enough for racecheck, which slows a kernel down a thousandfold.
TEST_F(CudaSparseCheck, FewRowsOfEachHeadDim) { RunFewRowsOfEachHeadDim(); }

TEST_F(CudaSparseCheck, ShortPrefills) {
  for (const DType dtype : {DType::kBf16, DType::kFp16}) {
    for (const uint32_t head_dim : {64u, 96u, 128u}) {
      for (const uint32_t rows : {1u, 63u, 64u, 65u, 127u, 128u, 129u, 777u}) {
        Run({dtype, 8, 1u << Below(4), head_dim, Below(2) * Below(1000), rows});
      }
    }
  }
}

TEST_F(CudaSparseCheck, LongPrefills) {
  Run({DType::kBf16, 8, 2, 128, 0, 8192});
  Run({DType::kFp16, 8, 4, 64, 3001, 5003});
  Run({DType::kBf16, 8, 1, 96, 777, 9001});
  Run({DType::kBf16, 8, 2, 128, 1, 20011});
  Run({DType::kFp16, 8, 8, 128, 513, 4999});
  Run({DType::kFp16, 8, 2, 96, 130, 4001});
  Run({DType::kBf16, 8, 1, 64, 0, 6007});
}

TEST_F(CudaSparseCheck, AsTheDeviceDoesIt) {
  for (const uint32_t rows : {1u, 500u, 8000u, 12345u}) {
    RunOnDevice({DType::kBf16, 8, 2, 128, Below(2) * Below(1000), rows});
  }
}

// Of all tokens there are more than a block of threads has at a time, of tries too.
TEST_F(CudaSparseCheck, PlansOfManyTokens) {
  for (const DType dtype : {DType::kBf16, DType::kFp16}) {
    const SparseCase c = Made({dtype, 8, 2, 128, 0, 40000 + Below(5000)});
    const OnDevice at = PutCase(c);
    std::vector<HeadPattern> patterns = Patterns(c.tokens());
    CheckPlans(c, at, patterns);
    for (HeadPattern& pattern : patterns) {
      pattern.pattern = VerticalSlashMassPattern{0.1 + 0.01 * Below(60), 0.02 * (1 + Below(40))};
    }
    CheckPlans(c, at, patterns);
  }
}

TEST_F(CudaSparseCheck, OtherShapesAreUnimplemented) {
  const SparseCase c(CaseShape{DType::kFp32, 8, 2, 64, 0, 200}, &random_);
  const OnDevice at = PutCase(c);
  const std::vector<HeadPattern> patterns(8, {AShapePattern{1, 10}});
  EXPECT_TRUE(absl::IsUnimplemented(
      device_->PlanSparse(patterns, c.prefill(), AttentionOf(c, at, 136, 64)).status()));
}

}  // namespace
}  // namespace quarry
