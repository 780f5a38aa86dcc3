#include <immintrin.h>

#include "cpu_index/baselines/inner_product.h"

namespace quarry::baselines {

float InnerProductAvx2(const float* a, const float* b, size_t n) {
  __m256 even = _mm256_setzero_ps(), odd = _mm256_setzero_ps();
  for (size_t i = 0; i < n; i += 16) {
    even = _mm256_fmadd_ps(_mm256_loadu_ps(a + i), _mm256_loadu_ps(b + i), even);
    odd = _mm256_fmadd_ps(_mm256_loadu_ps(a + i + 8), _mm256_loadu_ps(b + i + 8), odd);
  }
  const __m256 sum = _mm256_add_ps(even, odd);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

}  // namespace quarry::baselines
