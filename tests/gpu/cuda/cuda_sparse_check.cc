// Sparse prefill of the CUDA device against the host's plans, and its attention of the same
// indexes.
#include "tests/gpu/cuda/sparse_fixture.h"

namespace quarry {
namespace {

using testing::CaseShape;
using testing::SparseCase;

class CudaSparseCheck : public CudaSparseFixture {};

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

TEST_F(CudaSparseCheck, OtherShapesAreUnimplemented) {
  const SparseCase c(CaseShape{DType::kFp32, 8, 2, 64, 0, 200}, &random_);
  const OnDevice at = PutCase(c);
  const DeviceAttention a = AttentionOf(c, at, 0, 200);
  EXPECT_TRUE(absl::IsUnimplemented(device_->AttendSparse(std::vector<HeadPlan>(8), a)));
}

}  // namespace
}  // namespace quarry
