// Sparse prefill by the kernels for sm_80 and later, where the card has better ones: what other
// cards run is checked on any.
#include "tests/gpu/cuda/sparse_fixture.h"

namespace quarry {
namespace {

class CudaPortableSparseCheck : public CudaSparseFixture {
 protected:
  CudaPortableSparseCheck() : CudaSparseFixture(cuda::AttentionPath::kPortable) {}
};

TEST_F(CudaPortableSparseCheck, FewRowsOfEachHeadDim) { RunFewRowsOfEachHeadDim(); }

TEST_F(CudaPortableSparseCheck, Prefills) {
  for (const DType dtype : {DType::kBf16, DType::kFp16}) {
    for (const uint32_t head_dim : {64u, 96u, 128u}) {
      for (const uint32_t rows : {1u, 129u, 777u}) {
        Run({dtype, 8, 1u << Below(4), head_dim, Below(2) * Below(1000), rows});
      }
    }
  }
  Run({DType::kBf16, 8, 2, 128, 777, 9001});
}

}  // namespace
}  // namespace quarry
