#include "perf/retrieval/synthetic_head.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "gpu/rope.h"
#include "proto/half.h"

namespace quarry::perf {
namespace {

constexpr double kTheta = 500000;     // Llama 3's
constexpr float kFastWeight = 0.35f;  // of content where positions turn by more than a radian
constexpr float kTopicShare = 0.5f;   // of a latent's variance
constexpr float kTopicKeeps = 0.97f;  // correlation of a topic between neighbours
constexpr float kNewTopic = 1.0f / 512;
constexpr float kValueFromLatent = 0.35f, kValueMean = 0.3f, kValueNoise = 0.9f;
constexpr float kGroupNoise = 0.3f;  // what a query head seeks beside what its group does
constexpr float kQueryNoise = 0.2f;
constexpr float kGainSpread = 0.6f;  // log of how differently queries weigh directions
constexpr uint32_t kSets = 16;
constexpr float kMark = 1.5f;  // of a needle's key, where a key's spread is 1
constexpr float kMarkValue = 2.0f;

void Add(float factor, const float* x, std::span<float> to) {
  for (size_t i = 0; i < to.size(); ++i) to[i] += factor * x[i];
}

// Makes the root mean square `length`.
void Normalise(float length, std::span<float> x) {
  double squares = 0;
  for (float f : x) squares += double{f} * f;
  const double factor =
      squares > 0 ? length / std::sqrt(squares / static_cast<double>(x.size())) : 0;
  for (float& f : x) f = static_cast<float>(f * factor);
}

}  // namespace

SyntheticHead::SyntheticHead(const HeadRecipe& recipe, const RandomTraceOptions& shape,
                             std::span<const uint32_t> seed)
    : recipe_(recipe), shape_(shape) {
  std::seed_seq sequence(seed.begin(), seed.end());
  random_.seed(sequence);
  const uint32_t dim = shape.head_dim, rank = recipe.rank;
  RopeConfig rope;
  rope.theta = kTheta;
  const Vector frequencies = ComputeRope(rope, dim, shape.tokens, shape.tokens).inv_freq;
  weight_.assign(dim, 1.0f);
  Vector still(dim, 1.0f);
  if (recipe.rope) {
    inv_freq_ = frequencies;
    for (uint32_t i = 0; i < dim; ++i) {
      const float turn = frequencies[i % (dim / 2)] * static_cast<float>(shape.tokens);
      if (turn > 1) weight_[i] = kFastWeight;
      if (turn > 1) still[i] = 0;
    }
  }
  key_mean_ = Direction(1);
  if (recipe.still_mean) {
    for (uint32_t i = 0; i < dim; ++i) key_mean_[i] *= still[i];
  }
  Normalise(recipe.key_mean, key_mean_);
  query_mean_ = Direction(recipe.query_offset);
  later_query_mean_ = Direction(recipe.query_offset);
  value_mean_ = Normals(dim);
  value_map_ = Normals(size_t{rank} * dim);
  for (uint32_t r = 0; r < rank; ++r) {
    const Vector direction = Direction(1);
    // Neighbours in a pair have the same strength: drift turns from one to the other.
    const float strength = 1.0f / std::sqrt(1.0f + static_cast<float>(r / 2));
    const float gain = std::exp(kGainSpread * normal_(random_));
    for (float f : direction) {
      key_map_.push_back(strength * f);
      query_map_.push_back(gain * f);
    }
  }
  Normalise(std::sqrt((1 - recipe.noise * recipe.noise) / static_cast<float>(rank)), key_map_);
  Normalise(1.0f / std::sqrt(static_cast<float>(rank)), value_map_);
  MakeLatents();
  PlaceNeedles();
}

SyntheticHead::Vector SyntheticHead::Normals(size_t n) {
  Vector out(n);
  for (float& f : out) f = normal_(random_);
  return out;
}

SyntheticHead::Vector SyntheticHead::Direction(float length) {
  Vector out = Normals(shape_.head_dim);
  for (size_t i = 0; i < out.size(); ++i) out[i] *= weight_[i];
  Normalise(length, out);
  return out;
}

void SyntheticHead::MakeLatents() {
  const uint32_t rank = recipe_.rank;
  std::uniform_real_distribution<float> uniform;
  latent_.resize(size_t{shape_.tokens} * rank);
  Vector topic = Normals(rank);
  for (uint32_t t = 0; t < shape_.tokens; ++t) {
    const bool fresh = uniform(random_) < kNewTopic;
    const float keeps = fresh ? 0.0f : kTopicKeeps;
    const float change = std::sqrt(1 - keeps * keeps);
    for (uint32_t r = 0; r < rank; ++r) {
      topic[r] = keeps * topic[r] + change * normal_(random_);
      latent_[size_t{t} * rank + r] =
          std::sqrt(kTopicShare) * topic[r] + std::sqrt(1 - kTopicShare) * normal_(random_);
    }
  }
}

void SyntheticHead::PlaceNeedles() {
  set_.assign(shape_.tokens, -1);
  if (recipe_.needles == 0) return;
  for (uint32_t s = 0; s < kSets; ++s) {
    for (float f : Direction(kMark)) marks_.push_back(f);
    for (float f : Normals(shape_.head_dim)) mark_values_.push_back(kMarkValue * f);
  }
  // Where a window has them they would not be sought.
  std::uniform_int_distribution<uint32_t> place(shape_.tokens / 16, shape_.tokens / 16 * 13);
  const uint64_t most = shape_.tokens / 2;
  const uint64_t wanted = std::min<uint64_t>(uint64_t{recipe_.needles} * kSets, most);
  for (uint64_t i = 0; i < wanted;) {
    int& set = set_[place(random_)];
    if (set >= 0) continue;
    set = static_cast<int>(i++ % kSets);
  }
}

void SyntheticHead::WriteTokens(std::byte* k, std::byte* v) {
  const uint32_t dim = shape_.head_dim, rank = recipe_.rank;
  Vector key(dim), value(dim);
  for (uint32_t t = 0; t < shape_.tokens; ++t) {
    const float* const z = latent_.data() + size_t{t} * rank;
    for (uint32_t i = 0; i < dim; ++i) {
      key[i] = key_mean_[i] + recipe_.noise * normal_(random_);
      value[i] = kValueMean * value_mean_[i] + kValueNoise * normal_(random_);
    }
    for (uint32_t r = 0; r < rank; ++r) {
      Add(z[r], key_map_.data() + size_t{r} * dim, key);
      Add(kValueFromLatent * z[r], value_map_.data() + size_t{r} * dim, value);
    }
    if (set_[t] >= 0) {
      const size_t mark = static_cast<size_t>(set_[t]) * dim;
      Add(1, marks_.data() + mark, key);
      Add(1, mark_values_.data() + mark, value);
    }
    Rotate(t, key.data());
    for (uint32_t i = 0; i < dim; ++i) {
      StoreFromFloat(k, size_t{t} * dim + i, shape_.dtype, key[i]);
      StoreFromFloat(v, size_t{t} * dim + i, shape_.dtype, value[i]);
    }
  }
}

// The latent that a position's queries seek, of length 1 per direction.
SyntheticHead::Vector SyntheticHead::Sought(uint32_t position, float progress) {
  const uint32_t rank = recipe_.rank;
  const uint32_t at = std::uniform_int_distribution<uint32_t>(0, position)(random_);
  Vector out(latent_.begin() + size_t{at} * rank, latent_.begin() + (size_t{at} + 1) * rank);
  if (recipe_.drift) {
    const float angle = progress * std::numbers::pi_v<float> / 2;
    for (uint32_t r = 0; r < rank; ++r) out[r] *= r % 2 == 0 ? std::cos(angle) : std::sin(angle);
  }
  Normalise(1, out);
  return out;
}

void SyntheticHead::Query(uint32_t position, Purpose purpose, float progress, float* out) {
  const uint32_t dim = shape_.head_dim, rank = recipe_.rank;
  const Vector sought = Sought(position, progress);
  uint32_t set = std::uniform_int_distribution<uint32_t>(0, kSets - 1)(random_);
  if (purpose == Purpose::kTraining) set = set / 2 * 2;
  const float angle = recipe_.drift ? progress * std::numbers::pi_v<float> / 2 : 0;
  for (uint32_t g = 0; g < shape_.group; ++g) {
    const std::span<float> q(out + size_t{g} * dim, dim);
    std::fill(q.begin(), q.end(), 0.0f);
    for (uint32_t r = 0; r < rank; ++r) {
      // A direction that is not sought stays so.
      const float own = sought[r] * (1 + kGroupNoise * normal_(random_));
      Add(own, query_map_.data() + size_t{r} * dim, q);
    }
    Normalise(1, q);
    if (!marks_.empty()) Add(1, marks_.data() + size_t{set} * dim, q);
    Add(std::cos(angle), query_mean_.data(), q);
    Add(std::sin(angle), later_query_mean_.data(), q);
    for (float& f : q) f += kQueryNoise * normal_(random_);
    Rotate(position, q.data());
  }
}

void SyntheticHead::Rotate(uint32_t position, float* x) const {
  const size_t half = inv_freq_.size();
  for (size_t i = 0; i < half; ++i) {
    const float angle = static_cast<float>(position) * inv_freq_[i];
    const float c = std::cos(angle), s = std::sin(angle);
    const float a = x[i], b = x[half + i];
    x[i] = a * c - b * s;
    x[half + i] = b * c + a * s;
  }
}

}  // namespace quarry::perf
