// AVX-512 with BF16.
#include "cpu_index/vector_avx512.h"

namespace quarry::kernels {

const Table& Avx512Table() {
  static constexpr Table kTable = {"avx512",    ScoreAvx512,    Accumulate<Vector>,
                                   Max<Vector>, ExpSum<Vector>, Scale<Vector>};
  return kTable;
}

}  // namespace quarry::kernels
