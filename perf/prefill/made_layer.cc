#include "perf/prefill/made_layer.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numbers>
#include <numeric>
#include <random>

#include "proto/half.h"

namespace quarry::perf {
namespace {

constexpr LayerShape kShapes[] = {
    {"llama-3-8b", 32, 8, 128}, {"phi-3-mini", 32, 32, 96}, {"small", 8, 2, 64}};

constexpr uint32_t kNoiseLength = 1u << 20, kMostHeadDim = 128;
// The length of a key in each of its parts; scores are this times a gain by root of head_dim.
constexpr float kKeyPart = 10.0f;
constexpr float kKeyNoise = 0.3f;
constexpr uint32_t kMarkDims = 16, kSinks = 4, kStretch = 384;
constexpr double kPeriod = 12288, kHeavyShare = 0.012, kHeavySpread = 0.08;
// How many times the mass of all else has what a head seeks.
constexpr double kSoughtMass = 250;
// The mean of e^z where z is the noise's scores: e^(s^2 / 2).
constexpr double kNoiseMass = 1.35;
constexpr double kDrift = 0.08, kJitter = 0.03;

enum Stream : uint32_t {
  kKeyNoiseStream,
  kValueNoise,
  kQueryNoise,
  kTopic,
  kSoughtTopic,
  kTopicValue,
  kHeavy,
  kHeavyWeight,
  kRowGain,
  kOfHead
};

// A row of 16 signs, orthogonal to the others, of length 1.
float Mark(uint32_t mark, uint32_t i) { return std::popcount(mark & i) % 2 == 0 ? 0.25f : -0.25f; }
constexpr uint32_t kSinkMark = 1, kFirstMark = 2, kSecondMark = 4;

uint64_t Mixed(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

double Share(uint64_t hash) { return static_cast<double>(hash >> 11) * 0x1p-53; }
// Between `least` and as much above 1, log-uniformly.
double Spread(uint64_t hash, double least) { return least * std::pow(least, -2 * Share(hash)); }

}  // namespace

std::span<const LayerShape> LayerShapes() { return kShapes; }

std::string_view MadeHeadName(MadeHead kind) {
  switch (kind) {
    case MadeHead::kLines:
      return "lines";
    case MadeHead::kLocal:
      return "local";
    case MadeHead::kBlocks:
      return "blocks";
    case MadeHead::kDiffuse:
      return "diffuse";
  }
  return "";
}

std::vector<std::string> LayerKinds() { return {"lines", "local", "blocks", "diffuse", "mixed"}; }

std::vector<MadeHead> MadeHeads(std::string_view kinds, uint32_t heads) {
  for (const MadeHead kind :
       {MadeHead::kLines, MadeHead::kLocal, MadeHead::kBlocks, MadeHead::kDiffuse}) {
    if (MadeHeadName(kind) == kinds) return std::vector<MadeHead>(heads, kind);
  }
  if (kinds != "mixed") return {};
  constexpr MadeHead kEight[] = {MadeHead::kLines, MadeHead::kLines,  MadeHead::kLocal,
                                 MadeHead::kLines, MadeHead::kLines,  MadeHead::kBlocks,
                                 MadeHead::kLines, MadeHead::kDiffuse};
  std::vector<MadeHead> out;
  for (uint32_t h = 0; h < heads; ++h) out.push_back(kEight[h % std::size(kEight)]);
  return out;
}

MadeLayer::MadeLayer(const Options& options, ThreadTeam* team)
    : options_(options),
      pairs_(options.shape.head_dim / 4),
      comb_pairs_(pairs_ * 5 / 8),
      topics_((options.shape.head_dim / 2 - kMarkDims) / 2),
      noise_(kNoiseLength + kMostHeadDim) {
  std::mt19937_64 random(options.seed);
  std::normal_distribution<float> normal;
  for (float& x : noise_) x = normal(random);
  pair_weight_.resize(pairs_);
  for (uint32_t m = 0; m < pairs_; ++m) {  // Fejer's weights: one peak, nothing else above 0
    const float of_comb = 2 * static_cast<float>(comb_pairs_ - m) /
                          static_cast<float>(comb_pairs_ * (comb_pairs_ + 1));
    pair_weight_[m] =
        std::sqrt(m < comb_pairs_ ? of_comb : 1.0f / static_cast<float>(pairs_ - comb_pairs_));
  }
  const LayerShape& shape = options.shape;
  for (uint32_t h = 0; h < shape.kv_heads; ++h) {
    const double period = kPeriod * Spread(Hash(kOfHead, h, 0), 0.75);
    std::vector<double>& turns = turns_.emplace_back();
    for (uint32_t m = 0; m < pairs_; ++m) {
      const double place = static_cast<double>(m - comb_pairs_) / (pairs_ - comb_pairs_ - 1);
      const double near = 128 * std::pow(64.0, place) * Spread(Hash(kOfHead, h, m + 1), 0.9);
      turns.push_back(m < comb_pairs_ ? (m + 1) / period : 1 / near);
    }
  }
  const size_t d = shape.head_dim, bytes = DTypeBytes(options.dtype);
  const size_t stride = size_t{options.tokens} * d * bytes;
  k_.reset(new std::byte[shape.kv_heads * stride]);
  v_.reset(new std::byte[shape.kv_heads * stride]);
  constexpr uint32_t kStep = 1024;
  const size_t steps = (options.tokens + kStep - 1) / kStep;
  team->For(steps * shape.kv_heads, [&](size_t task) {
    const auto h = static_cast<uint32_t>(task / steps);
    const auto lo = static_cast<uint32_t>(task % steps * kStep);
    std::vector<float> k(d), v(d);
    for (uint32_t token = lo; token < std::min(lo + kStep, options_.tokens); ++token) {
      MakeKeyAndValue(h, token, k.data(), v.data());
      Round(k.data(), &k_[h * stride + token * d * bytes], d);
      Round(v.data(), &v_[h * stride + token * d * bytes], d);
    }
  });
  kv_ = {{k_.get(), v_.get(), stride, {0, options.tokens}},
         options.dtype,
         shape.heads,
         shape.kv_heads,
         shape.head_dim};
}

void MadeLayer::Queries(std::span<const MadeHead> kinds, std::span<const uint32_t> tokens, float* q,
                        ThreadTeam* team) const {
  std::vector<Gains> gains;
  for (uint32_t h = 0; h < kinds.size(); ++h) gains.push_back(GainsOf(kinds[h], h));
  const size_t width = size_t{options_.shape.heads} * options_.shape.head_dim;
  constexpr size_t kStep = 16;
  team->For((tokens.size() + kStep - 1) / kStep, [&](size_t task) {
    const size_t end = std::min((task + 1) * kStep, tokens.size());
    for (size_t r = task * kStep; r < end; ++r) MakeQueries(gains, tokens[r], q + r * width);
  });
}

void MadeLayer::Queries(std::span<const MadeHead> kinds, TokenRange rows, float* q,
                        ThreadTeam* team) const {
  std::vector<uint32_t> tokens(rows.size());
  std::iota(tokens.begin(), tokens.end(), rows.lo);
  Queries(kinds, tokens, q, team);
}

uint64_t MadeLayer::Hash(uint32_t stream, uint32_t head, uint32_t token) const {
  return Mixed(Mixed(uint64_t{options_.seed} << 32 | stream) ^ (uint64_t{head} << 32 | token));
}

const float* MadeLayer::Noise(uint32_t stream, uint32_t head, uint32_t token) const {
  return &noise_[Hash(stream, head, token) % kNoiseLength];
}

// Stretches of a head begin somewhere of their own, not where key blocks do.
uint32_t MadeLayer::TopicOf(uint32_t stream, uint32_t head, uint32_t token) const {
  const auto first = static_cast<uint32_t>(Hash(kOfHead, head, 1000) % kStretch);
  return static_cast<uint32_t>(Hash(stream, head, (token + first) / kStretch) % topics_);
}

// Of length 1 in the comb's pairs, and in the others.
void MadeLayer::Rotation(uint32_t kv_head, uint32_t token, float* out) const {
  for (uint32_t m = 0; m < pairs_; ++m) {
    const double turns = token * turns_[kv_head][m];
    const auto angle = static_cast<float>(2 * std::numbers::pi * (turns - std::floor(turns)));
    out[2 * m] = pair_weight_[m] * std::cos(angle);
    out[2 * m + 1] = pair_weight_[m] * std::sin(angle);
  }
}

void MadeLayer::MakeKeyAndValue(uint32_t kv_head, uint32_t token, float* k, float* v) const {
  const uint32_t d = options_.shape.head_dim;
  const uint32_t topic = TopicOf(kTopic, kv_head, token);
  std::fill(k, k + d, 0.0f);
  float* const marks = k + 2 * pairs_;
  if (token < kSinks) {
    for (uint32_t i = 0; i < kMarkDims; ++i) marks[i] = kKeyPart * Mark(kSinkMark, i);
  } else {
    const uint64_t heavy = Hash(kHeavy, kv_head, token);
    if (Share(heavy) < kHeavyShare * Spread(Hash(kOfHead, kv_head, 2000), 0.75)) {
      const float length =
          kKeyPart * (1 + static_cast<float>(kHeavySpread) * *Noise(kHeavyWeight, kv_head, token));
      const uint32_t mark = heavy % 2 == 0 ? kFirstMark : kSecondMark;
      for (uint32_t i = 0; i < kMarkDims; ++i) marks[i] = length * Mark(mark, i);
    } else {
      Rotation(kv_head, token, k);
      for (uint32_t i = 0; i < 2 * pairs_; ++i) k[i] *= kKeyPart;
    }
    float* const topics = marks + kMarkDims;
    topics[2 * topic] = kKeyPart * 0.6f;
    topics[2 * topic + 1] = kKeyPart * -0.8f;
    const float* const noise = Noise(kKeyNoiseStream, kv_head, token);
    for (uint32_t i = 0; i < d; ++i) k[i] += kKeyNoise * noise[i];
  }

  const float* const own = Noise(kValueNoise, kv_head, token);
  const float* const of_topic = Noise(kTopicValue, kv_head, topic);
  const float length = token < kSinks ? 0.1f : 0.7f;
  for (uint32_t i = 0; i < d; ++i) v[i] = length * (own[i] + of_topic[i]);
}

void MadeLayer::MakeQueries(std::span<const Gains> gains, uint32_t token, float* q) const {
  const LayerShape& shape = options_.shape;
  const uint32_t d = shape.head_dim, group = shape.heads / shape.kv_heads;
  std::vector<float> rotation(2 * pairs_);
  for (uint32_t h = 0; h < shape.heads; ++h, q += d) {
    const Gains& g = gains[h];
    const uint32_t kv_head = h / group;
    if (h % group == 0) Rotation(kv_head, token, rotation.data());
    const float* const noise = Noise(kQueryNoise, h, token);
    for (uint32_t i = 0; i < d; ++i) q[i] = g.noise * noise[i];
    const float all = 1 + static_cast<float>(kJitter) * *Noise(kRowGain, h, token);
    for (uint32_t i = 0; i < 2 * pairs_; ++i) {
      q[i] += all * (i < 2 * comb_pairs_ ? g.comb : g.near) * rotation[i];
    }
    const double turns = token / (0.7 * options_.tokens) + g.phase;
    const auto drift = static_cast<float>(kDrift * std::sin(2 * std::numbers::pi * turns));
    float* const marks = q + 2 * pairs_;
    for (uint32_t i = 0; i < kMarkDims; ++i) {
      marks[i] +=
          all * (g.sink * Mark(kSinkMark, i) + g.heavy * ((1 + drift) * Mark(kFirstMark, i) +
                                                          (1 - drift) * Mark(kSecondMark, i)));
    }
    if (g.topic > 0) {
      // The topics of keys are their KV head's, what is sought each head's own.
      const uint32_t topic = TopicOf(kSoughtTopic, h, token);
      float* const topics = marks + kMarkDims;
      topics[2 * topic] += all * g.topic * 0.6f;
      topics[2 * topic + 1] -= all * g.topic * 0.8f;
    }
    for (uint32_t i = 0; i < d; ++i) {
      q[i] = options_.dtype == DType::kBf16 ? Bf16ToFloat(FloatToBf16(q[i]))
                                            : Fp16ToFloat(FloatToFp16(q[i]));
    }
  }
}

MadeLayer::Gains MadeLayer::GainsOf(MadeHead kind, uint32_t head) const {
  const double n = options_.tokens, d = options_.shape.head_dim;
  // The gain with which `count` keys have `share` of what a last row seeks.
  const auto gain = [&](double share, double count) {
    const double z = std::log(share * kSoughtMass * kNoiseMass * n / count);
    return static_cast<float>(std::max(0.0, z) * std::sqrt(d) / kKeyPart);
  };
  // Keys at a comb's peak, as wide as those of e^z are with z near 9.
  const double at_peak = 0.28 / comb_pairs_;
  Gains g;
  g.noise = 0.3f;
  g.phase = static_cast<float>(Share(Hash(kOfHead, head, 3000)));
  switch (kind) {
    case MadeHead::kLines:
      g.sink = gain(0.08, kSinks);
      g.heavy = gain(0.46, 1.3 * kHeavyShare * n);
      g.comb = gain(0.46, n * at_peak + kPeriod * at_peak);
      break;
    case MadeHead::kLocal:  // ten times as sharp: nothing else must look as if it were near
      g.sink = gain(3, kSinks);
      g.near = gain(7, 100) * 2 / 3;
      g.comb = g.near / 2;
      break;
    case MadeHead::kBlocks:
      g.sink = gain(0.05, kSinks);
      g.topic = gain(0.95, n / topics_);
      break;
    case MadeHead::kDiffuse:
      g.noise = 1.0f;
      g.sink = gain(0.1 / kSoughtMass, kSinks);
      break;
  }
  return g;
}

void MadeLayer::Round(const float* from, std::byte* to, size_t elements) const {
  for (size_t i = 0; i < elements; ++i) StoreFromFloat(to, i, options_.dtype, from[i]);
}

}  // namespace quarry::perf
