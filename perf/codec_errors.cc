#include "perf/codec_errors.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "perf/die.h"
#include "proto/half.h"
#include "storage/codecs/kv_codecs.h"

namespace quarry::perf {
namespace {

// K or V of one head: as they are, and as they come back from a codec.
struct Part {
  std::vector<float> exact, decoded;  // [tokens][head_dim]

  Part(const Trace& trace, std::span<const std::byte> rows, KvPart part, KvCodec codec)
      : exact(size_t{trace.tokens} * trace.head_dim) {
    for (size_t i = 0; i < exact.size(); ++i) exact[i] = LoadAsFloat(rows.data(), i, trace.dtype);
    decoded = exact;
    const CodedStrip strip{codec, part, trace.head_dim, kBlockTokens};
    std::vector<std::byte> coded(strip.bytes());
    for (uint32_t t = 0; t + kBlockTokens <= trace.tokens; t += kBlockTokens) {
      float* at = decoded.data() + size_t{t} * trace.head_dim;
      EncodeStrip(strip, DType::kFp32, at, coded);
      Die(DecodeStrip(strip, coded, DType::kFp32, at), "decode");
    }
  }
  const float* Row(uint32_t token, uint32_t head_dim, TokenRange coded) const {
    const std::vector<float>& from = token >= coded.lo && token < coded.hi ? decoded : exact;
    return from.data() + size_t{token} * head_dim;
  }
};

struct Answer {
  std::vector<double> o;
  double lse;
};

Answer Attend(const Trace& trace, const Part& k, const Part& v, const float* q, uint32_t tokens,
              TokenRange coded) {
  std::vector<double> z(tokens);
  double largest = -std::numeric_limits<double>::infinity(), sum = 0;
  for (uint32_t t = 0; t < tokens; ++t) {
    const float* key = k.Row(t, trace.head_dim, coded);
    double dot = 0;
    for (uint32_t d = 0; d < trace.head_dim; ++d) dot += double{q[d]} * key[d];
    z[t] = dot * trace.scale;
    largest = std::max(largest, z[t]);
  }
  Answer answer{std::vector<double>(trace.head_dim), 0};
  for (uint32_t t = 0; t < tokens; ++t) {
    const float* value = v.Row(t, trace.head_dim, coded);
    const double w = std::exp(z[t] - largest);
    sum += w;
    for (uint32_t d = 0; d < trace.head_dim; ++d) answer.o[d] += w * value[d];
  }
  for (double& x : answer.o) x /= sum;
  answer.lse = largest + std::log(sum);
  return answer;
}

}  // namespace

CodecErrors ErrorsOn(const Trace& trace, const KvCoding& coding) {
  CodecErrors errors;
  for (uint32_t h = 0; h < trace.kv_heads; ++h) {
    const Part k(trace, trace.Keys(h), KvPart::kKey, coding.codec);
    const Part v(trace, trace.Values(h), KvPart::kValue, coding.codec);
    for (uint32_t i = 0; i < trace.q_pos.size(); ++i) {
      const std::span<const float> q = trace.Queries(trace.q, i, h);
      const uint32_t tokens = trace.q_pos[i] + 1;
      for (uint32_t g = 0; g < trace.group(); ++g) {
        const float* at = q.data() + size_t{g} * trace.head_dim;
        const Answer exact = Attend(trace, k, v, at, tokens, {});
        const Answer coded = Attend(trace, k, v, at, tokens, coding.CodedTokens(tokens));
        double error = 0, size = 0;
        for (uint32_t d = 0; d < trace.head_dim; ++d) {
          error += std::pow(coded.o[d] - exact.o[d], 2);
          size += exact.o[d] * exact.o[d];
        }
        errors.o.push_back(std::sqrt(error / std::max(size, 1e-30)));
        errors.lse.push_back(std::abs(coded.lse - exact.lse));
      }
    }
  }
  return errors;
}

double Mean(const std::vector<double>& x) {
  return x.empty() ? 0 : std::accumulate(x.begin(), x.end(), 0.0) / static_cast<double>(x.size());
}

}  // namespace quarry::perf
