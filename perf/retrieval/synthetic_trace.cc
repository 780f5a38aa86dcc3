#include "perf/retrieval/synthetic_trace.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <random>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "perf/retrieval/mass_scale.h"
#include "perf/retrieval/synthetic_head.h"
#include "perf/retrieval/truth.h"
#include "proto/head_dim.h"

namespace quarry::perf {
namespace {

using Purpose = SyntheticHead::Purpose;

constexpr uint32_t kFewestTraceTokens = 2048;
// Queries that settle a head's strength, one of a group each: how many tokens hold their mass
// differs threefold from query to query.
constexpr uint32_t kSamples = 256;
// Of the logs of the counts, where each query has a strength of its own.
constexpr float kTargetSpread = 0.35f;

enum class Strengths {
  kOfHead,   // one, so that queries differ as they may
  kOfQuery,  // each its own
};

struct Family {
  const char* name;
  HeadRecipe recipe;
  std::array<uint32_t, 4> targets;  // of KV heads in turn
  Strengths strengths = Strengths::kOfHead;
  double share = 0.9;  // of the mass, on so many tokens
};

constexpr std::array<uint32_t, 4> kSpread = {30, 300, 1000, 3000};
constexpr std::array<uint32_t, 4> All(uint32_t tokens) { return {tokens, tokens, tokens, tokens}; }

const Family kFamilies[] = {
    {"needles", {.needles = 1}, {2, 16, 64, 256}, Strengths::kOfHead, 0.97},
    {"drift", {.drift = true}, kSpread},
    {"rope", {.key_mean = 2, .query_offset = 4}, kSpread},
    {"mean-key", {.key_mean = 6, .still_mean = true}, kSpread},
    {"low-rank", {.rank = 8, .noise = 0.02f, .rope = false}, kSpread},
    {"mass-30", {}, All(30), Strengths::kOfQuery},
    {"mass-300", {}, All(300), Strengths::kOfQuery},
    {"mass-3000", {}, All(3000), Strengths::kOfQuery},
    {"mass-30000", {}, All(30000), Strengths::kOfQuery},
};

const Family* Find(const std::string& name) {
  const auto* const found = std::find_if(std::begin(kFamilies), std::end(kFamilies),
                                         [&](const Family& f) { return name == f.name; });
  return found == std::end(kFamilies) ? nullptr : found;
}

double TargetOf(const Family& family, uint32_t kv_head, uint32_t tokens) {
  return std::min(family.targets[kv_head % family.targets.size()], tokens / 4);
}

// Fills one KV head's part of a trace.
class HeadWriter {
 public:
  HeadWriter(const Family& family, const RandomTraceOptions& shape, uint32_t kv_head, Trace* trace)
      : target_(TargetOf(family, kv_head, shape.tokens)),
        kv_head_(kv_head),
        row_(size_t{shape.group} * shape.head_dim),
        strengths_(family.strengths),
        share_(family.share),
        trace_(*trace),
        head_(RecipeOf(family, static_cast<uint32_t>(target_)), shape,
              std::array<uint32_t, 3>{shape.seed, static_cast<uint32_t>(&family - kFamilies),
                                      kv_head}),
        random_(shape.seed + kv_head) {}

  void Write() {
    const size_t bytes = trace_.k.size() / trace_.kv_heads;
    std::byte* const k = trace_.k.data() + bytes * kv_head_;
    std::byte* const v = trace_.v.data() + bytes * kv_head_;
    head_.WriteTokens(k, v);
    segment_ = {k, v, {0, trace_.tokens}};
    if (strengths_ == Strengths::kOfHead) strength_ = StrengthOfHead();
    WriteQueries(trace_.q_train_pos, Purpose::kTraining, &trace_.q_train);
    WriteQueries(trace_.q_pos, Purpose::kTest, &trace_.q);
  }

 private:
  static HeadRecipe RecipeOf(const Family& family, uint32_t target) {
    HeadRecipe recipe = family.recipe;
    if (recipe.needles > 0) recipe.needles = target;
    return recipe;
  }

  // With which the queries, which all retrieve from `rest`, take so many tokens.
  float Strength(std::span<const float> q, TokenRange rest, double tokens) const {
    const auto count = static_cast<uint32_t>(q.size() / trace_.head_dim);
    const std::vector<TokenRange> ranges(count, rest);
    return ScaleForMass({{&segment_, 1}, trace_.head_dim, trace_.dtype},
                        {q.data(), DType::kFp32, count, trace_.head_dim, trace_.scale, ranges},
                        {.share = share_, .tokens = tokens});
  }

  // Of queries at the end, as at the beginning of the generation.
  float StrengthOfHead() {
    std::vector<float> group(row_), q;
    for (uint32_t i = 0; i < kSamples; ++i) {
      head_.Query(trace_.tokens - 1 - i, Purpose::kTest, 0, group.data());
      const auto one = group.begin() + i % trace_.group() * trace_.head_dim;
      q.insert(q.end(), one, one + trace_.head_dim);
    }
    return Strength(q, Window().Rest(trace_.tokens - kSamples), target_);
  }

  float StrengthOfQuery(uint32_t position, std::span<const float> q) {
    const double wanted = target_ * std::exp(kTargetSpread * normal_(random_));
    TokenRange rest = Window().Rest(position + 1);
    if (rest.empty()) rest = {0, position + 1};
    return Strength(q, rest, std::min(wanted, std::ceil(rest.size() / 4.0)));
  }

  void WriteQueries(std::span<const uint32_t> positions, Purpose purpose, std::vector<float>* out) {
    for (size_t i = 0; i < positions.size(); ++i) {
      const float progress = purpose == Purpose::kTraining || positions.size() < 2
                                 ? 0.0f
                                 : static_cast<float>(i) / static_cast<float>(positions.size() - 1);
      const std::span<float> group(out->data() + (i * trace_.kv_heads + kv_head_) * row_, row_);
      head_.Query(positions[i], purpose, progress, group.data());
      for (uint32_t g = 0; g < trace_.group(); ++g) {
        const std::span<float> q = group.subspan(g * trace_.head_dim, trace_.head_dim);
        const float strength =
            strengths_ == Strengths::kOfHead ? strength_ : StrengthOfQuery(positions[i], q);
        for (float& x : q) x *= strength;
      }
    }
  }

  const double target_;
  const uint32_t kv_head_;
  const size_t row_;  // floats of a group's queries
  const Strengths strengths_;
  const double share_;
  Trace& trace_;
  SyntheticHead head_;
  KvSegment segment_;
  float strength_ = 1;
  std::mt19937 random_;
  std::normal_distribution<double> normal_;
};

}  // namespace

std::vector<std::string> SyntheticFamilies() {
  std::vector<std::string> names;
  for (const Family& family : kFamilies) names.emplace_back(family.name);
  return names;
}

double SyntheticTarget(const std::string& family, uint32_t kv_head, uint32_t tokens) {
  const Family* const found = Find(family);
  return found == nullptr ? 0 : TargetOf(*found, kv_head, tokens);
}

absl::StatusOr<Trace> SyntheticTrace(const std::string& family, const RandomTraceOptions& shape) {
  const Family* const found = Find(family);
  if (found == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat("no synthetic family ", family, "; there are ",
                                                   absl::StrJoin(SyntheticFamilies(), ", ")));
  }
  if (shape.tokens < kFewestTraceTokens || !IsHeadDim(shape.head_dim) || shape.kv_heads == 0 ||
      shape.group == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("a synthetic trace of ", shape.tokens, " tokens with ", shape.kv_heads,
                     " KV heads of ", shape.group, " queries and ", shape.head_dim,
                     " dimensions: wanted are at least ", kFewestTraceTokens,
                     " tokens and a multiple of ", kHeadDimStep, " up to ", kMaxHeadDim,
                     " dimensions"));
  }
  Trace trace = TraceOfShape(shape);
  trace.name = absl::StrCat(family, "-", shape.tokens, "-", shape.seed);
  trace.model = absl::StrCat("synthetic ", family);
  const size_t row = size_t{trace.heads} * trace.head_dim;
  trace.q_train.resize(trace.q_train_pos.size() * row);
  trace.q.resize(trace.q_pos.size() * row);
  std::vector<std::thread> threads;
  for (uint32_t h = 0; h < shape.kv_heads; ++h) {
    threads.emplace_back([&, h] { HeadWriter(*found, shape, h, &trace).Write(); });
  }
  for (std::thread& t : threads) t.join();
  return trace;
}

}  // namespace quarry::perf
