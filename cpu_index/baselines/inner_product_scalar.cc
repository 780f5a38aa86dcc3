#include "cpu_index/baselines/inner_product.h"

namespace quarry::baselines {

float InnerProductScalar(const float* a, const float* b, size_t n) {
  float sum[4] = {};
  for (size_t i = 0; i < n; i += 4) {
    for (size_t j = 0; j < 4; ++j) sum[j] += a[i + j] * b[i + j];
  }
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

}  // namespace quarry::baselines
