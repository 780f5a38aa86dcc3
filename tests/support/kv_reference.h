// Random K/V as a worker would make them, and exact attention over them in double.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "proto/half.h"
#include "proto/model_spec.h"
#include "proto/retrieval_types.h"

namespace quarry::testing {

// A small model; `tag` tells weights apart.
inline ModelSpec SmallSpec(DType dtype = DType::kBf16, uint8_t tag = 1) {
  ModelSpec spec;
  spec.name = "small";
  spec.shape = {.layers = 2, .heads = 4, .kv_heads = 2, .head_dim = 64, .dtype = dtype};
  spec.weights.bytes.fill(tag);
  spec.rope.rotary_dim = 64;
  for (int i = 0; i < 32; ++i) {
    spec.rope.inv_freq.push_back(std::pow(10000.0f, -static_cast<float>(i) / 32));
  }
  return spec;
}

// K and V of a whole context, [layer][token][kv_head][head_dim] in the shape's dtype.
struct KvData {
  KvShape shape;
  std::vector<uint32_t> tokens;
  std::vector<std::vector<char>> k, v;  // one buffer per layer

  KvData(const KvShape& s, uint32_t count, uint32_t seed) : shape(s) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (uint32_t i = 0; i < count; ++i) tokens.push_back(static_cast<uint32_t>(random() % 2048));
    size_t elements = size_t{count} * s.kv_heads * s.head_dim;
    for (uint32_t layer = 0; layer < s.layers; ++layer) {
      for (auto* part : {&k, &v}) {
        std::vector<char>& buffer = part->emplace_back(elements * DTypeBytes(s.dtype));
        for (size_t i = 0; i < elements; ++i) {
          StoreFromFloat(buffer.data(), i, s.dtype, normal(random));
        }
      }
    }
  }
  size_t offset(uint32_t token, uint32_t kv_head = 0) const {
    return (size_t{token} * shape.kv_heads + kv_head) * shape.vector_bytes();
  }
};

struct ReferenceAnswer {
  std::vector<double> o;
  double lse = -std::numeric_limits<double>::infinity();
};

// Exact attention of one query head over tokens [range.lo, range.hi).
inline ReferenceAnswer Reference(const KvData& data, uint32_t layer, uint32_t head,
                                 TokenRange range, const float* q) {
  uint32_t d = data.shape.head_dim, kv_head = head / data.shape.group();
  ReferenceAnswer out;
  out.o.assign(d, 0.0);
  std::vector<double> z;
  double largest = -std::numeric_limits<double>::infinity();
  for (uint32_t t = range.lo; t < range.hi; ++t) {
    const char* key = data.k[layer].data() + data.offset(t, kv_head);
    double dot = 0;
    for (uint32_t i = 0; i < d; ++i) dot += double{q[i]} * LoadAsFloat(key, i, data.shape.dtype);
    z.push_back(dot / std::sqrt(static_cast<double>(d)));
    largest = std::max(largest, z.back());
  }
  if (z.empty()) return out;
  double sum = 0;
  for (uint32_t t = range.lo; t < range.hi; ++t) {
    double w = std::exp(z[t - range.lo] - largest);
    sum += w;
    const char* value = data.v[layer].data() + data.offset(t, kv_head);
    for (uint32_t i = 0; i < d; ++i) out.o[i] += w * LoadAsFloat(value, i, data.shape.dtype);
  }
  for (double& x : out.o) x /= sum;
  out.lse = largest + std::log(sum);
  return out;
}

// Norm of the difference over norm of the reference.
inline double RelativeError(std::span<const float> o, const std::vector<double>& reference) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < reference.size(); ++i) {
    difference += (o[i] - reference[i]) * (o[i] - reference[i]);
    norm += reference[i] * reference[i];
  }
  return norm == 0 ? std::sqrt(difference) : std::sqrt(difference / norm);
}

}  // namespace quarry::testing
