// What the tests of reuse at another position share: a document cached behind one text, asked for
// behind another, and its keys turned in double.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "tests/daemon/engine_fixture.h"
#include "tests/support/seed.h"

namespace quarry {

// [first text][document][rest]; token ids of other texts never meet.
inline std::vector<uint32_t> Prompt(uint32_t text, uint32_t text_tokens, uint32_t document_tokens,
                                    uint32_t rest) {
  std::vector<uint32_t> tokens = Tokens(text_tokens, text);
  for (const uint32_t id : Tokens(document_tokens, 50000)) tokens.push_back(id);
  for (const uint32_t id : Tokens(rest, text + 10000)) tokens.push_back(id);
  return tokens;
}

struct RopeCase {
  const char* name;
  RopeSpec rope;
};

// The kinds of ropes that models have, with about the frequencies of `plain`.
inline std::vector<RopeCase> Ropes(const RopeSpec& plain) {
  RopeSpec partial = plain, longrope = plain, llama3 = plain;
  partial.inv_freq.resize(plain.inv_freq.size() * 3 / 4);
  partial.rotary_dim = 2 * static_cast<uint32_t>(partial.inv_freq.size());
  for (size_t i = 0; i < plain.inv_freq.size(); ++i) {
    longrope.inv_freq[i] /= 1.0f + 1.5f * static_cast<float>(i);
    if (plain.inv_freq[i] < 0.01f) llama3.inv_freq[i] /= 8;
  }
  longrope.attention_scale = 1.19024f;
  longrope.regime = RopeRegime::kLong;
  RopeSpec longrope_short = plain;
  longrope_short.attention_scale = 1.19024f;
  longrope_short.regime = RopeRegime::kShort;
  longrope_short.regime_max_tokens = 4096;
  RopeSpec interleaved = plain, partial_interleaved = partial;
  interleaved.interleaved = partial_interleaved.interleaved = true;
  return {{"default", plain},
          {"llama3", llama3},
          {"longrope long", longrope},
          {"longrope short", longrope_short},
          {"partial", partial},
          {"interleaved", interleaved},
          {"partial interleaved", partial_interleaved}};
}

// The data in fp32, [0, tokens) of them.
inline KvData Widened(const KvData& data, uint32_t tokens) {
  KvShape shape = data.shape();
  shape.dtype = DType::kFp32;
  KvData wide(shape, tokens, 1);
  const size_t elements = size_t{shape.kv_heads} * shape.head_dim;
  for (uint32_t l = 0; l < shape.layers; ++l) {
    for (uint32_t t = 0; t < std::min(tokens, data.tokens()); ++t) {
      for (size_t i = 0; i < elements; ++i) {
        StoreFromFloat(wide.k(l, t), i, DType::kFp32,
                       LoadAsFloat(data.k(l, t), i, data.shape().dtype));
        StoreFromFloat(wide.v(l, t), i, DType::kFp32,
                       LoadAsFloat(data.v(l, t), i, data.shape().dtype));
      }
    }
  }
  return wide;
}

// Takes tokens of `from`, at `range` less the shift, into `range` of `to` (fp32), as if their keys
// had been computed there.
inline void Move(const KvData& from, const RopeSpec& rope, const ShiftedRange& range, KvData* to) {
  const KvShape& s = from.shape();
  const uint32_t pairs = rope.rotary_dim / 2;
  for (uint32_t l = 0; l < s.layers; ++l) {
    for (uint32_t t = range.tokens.lo; t < range.tokens.hi; ++t) {
      const uint32_t source = t - range.shift;
      for (uint32_t h = 0; h < s.kv_heads; ++h) {
        std::vector<double> key(s.head_dim);
        for (uint32_t d = 0; d < s.head_dim; ++d) key[d] = from.K(l, source, h, d);
        for (uint32_t i = 0; i < pairs; ++i) {
          double& a = key[rope.interleaved ? 2 * i : i];
          double& b = key[rope.interleaved ? 2 * i + 1 : i + pairs];
          const double angle = double{rope.inv_freq[i]} * range.shift;
          const double turned = a * std::cos(angle) - b * std::sin(angle);
          b = b * std::cos(angle) + a * std::sin(angle);
          a = turned;
        }
        for (uint32_t d = 0; d < s.head_dim; ++d) {
          const uint32_t i = h * s.head_dim + d;
          StoreFromFloat(to->k(l, t), i, DType::kFp32, static_cast<float>(key[d]));
          StoreFromFloat(to->v(l, t), i, DType::kFp32, from.V(l, source, h, d));
        }
      }
    }
  }
}

class ShiftTest : public EngineTest {
 protected:
  static constexpr uint32_t kFirstText = 512, kDocument = 1024, kRest = 300;
  static constexpr uint32_t kSecondText = 256;
  static constexpr uint32_t kTotal = kSecondText + kDocument + kRest;
  static constexpr ShiftedRange kMoved = {{kSecondText, kSecondText + kDocument}, -256};

  void SetUp() override { Start(); }

  OpenRequest First(const ModelSpec& spec) const {
    return OpenFor(spec, Prompt(100000, kFirstText, kDocument, kRest), 4096);
  }
  OpenRequest Second(const ModelSpec& spec) const {
    OpenRequest request = OpenFor(spec, Prompt(200000, kSecondText, kDocument, kRest), 4096);
    request.reuse_shifted = true;
    return request;
  }
  // Opens and appends what is neither reused nor placed.
  OpenResult OpenAround(SessionId session, const OpenRequest& request, const KvData& data) {
    auto opened = engine_->Open(session, request);
    EXPECT_TRUE(opened.ok()) << opened.status();
    if (!opened.ok()) return {};
    uint32_t lo = opened->reused_tokens;
    for (const ShiftedRange& range : opened->shifted) {
      EXPECT_OK(AppendAll(*engine_, session, opened->context, data, {lo, range.tokens.lo}));
      lo = range.tokens.hi;
    }
    const auto end = static_cast<uint32_t>(request.tokens.size());
    EXPECT_OK(AppendAll(*engine_, session, opened->context, data, {lo, end}));
    return *opened;
  }

  const ModelSpec spec_ = SmallModel();
  KvData first_{SmallShape(), kFirstText + kDocument + kRest, Seed()};
  KvData second_{SmallShape(), kTotal, Seed() + 1};
};

}  // namespace quarry
