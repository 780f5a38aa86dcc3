#include "cpu_index/simd.h"

#include "proto/types.h"

namespace quarry {

static_assert(kernels::kBf16 == static_cast<uint8_t>(DType::kBf16) &&
              kernels::kFp16 == static_cast<uint8_t>(DType::kFp16) &&
              kernels::kFp32 == static_cast<uint8_t>(DType::kFp32));

const kernels::Table& KernelsOf(SimdLevel level) {
  switch (level) {
    case SimdLevel::kScalar:
      return kernels::ScalarTable();
    case SimdLevel::kAvx2:
      return kernels::Avx2Table();
    case SimdLevel::kAvx512:
      return kernels::Avx512Table();
    case SimdLevel::kAmx:
      return kernels::AmxTable();
  }
  return kernels::ScalarTable();
}

const kernels::Table& Kernels() {
  static const kernels::Table& table = KernelsOf(SimdLevelInUse());
  return table;
}

}  // namespace quarry
