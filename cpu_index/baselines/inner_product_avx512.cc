#include <immintrin.h>

#include "cpu_index/baselines/inner_product.h"

namespace quarry::baselines {

float InnerProductAvx512(const float* a, const float* b, size_t n) {
  __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
  size_t i = 0;
  for (; i + 32 <= n; i += 32) {
    even = _mm512_fmadd_ps(_mm512_loadu_ps(a + i), _mm512_loadu_ps(b + i), even);
    odd = _mm512_fmadd_ps(_mm512_loadu_ps(a + i + 16), _mm512_loadu_ps(b + i + 16), odd);
  }
  if (i < n) even = _mm512_fmadd_ps(_mm512_loadu_ps(a + i), _mm512_loadu_ps(b + i), even);
  return _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
}

}  // namespace quarry::baselines
