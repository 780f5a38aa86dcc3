// A KvService in plain memory, which fails where it is told to.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "gpu/kv_service.h"
#include "proto/half.h"

namespace quarry::testing {

// Keeps contexts in plain memory and attends in double. Fails where it is told to.
class FakeService final : public KvService {
 public:
  struct Context {
    KvShape shape;
    NumericRecipe recipe;
    uint32_t max_tokens = 0;
    std::vector<uint32_t> ids;
    std::vector<std::vector<std::byte>> k, v;  // per layer, [token][kv_head][head_dim]
  };

  absl::StatusOr<OpenResult> Open(const OpenRequest& r) override {
    Context c{r.spec.shape, r.recipe, r.max_tokens, r.tokens, {}, {}};
    c.k.resize(c.shape.layers);
    c.v.resize(c.shape.layers);
    OpenResult out;
    out.context = {++last_};
    if (reuse != nullptr) {
      const size_t token = TokenBytes(c);
      out.reused_tokens = reuse_tokens;
      for (uint32_t l = 0; l < c.shape.layers; ++l) {
        c.k[l].assign(reuse->k[l].begin(), reuse->k[l].begin() + reuse_tokens * token);
        c.v[l].assign(reuse->v[l].begin(), reuse->v[l].begin() + reuse_tokens * token);
      }
    }
    contexts[last_] = std::move(c);
    return out;
  }
  absl::Status Append(const AppendRequest& r) override {
    Context& c = contexts.at(r.context.value);
    const size_t token = TokenBytes(c);
    if (appends++ == fail_append) return failure;
    EXPECT_EQ(c.k[r.layer].size(), r.range.lo * token);
    Add(&c.k[r.layer], r.k, r.range.size() * token);
    Add(&c.v[r.layer], r.v, r.range.size() * token);
    samples += r.query_positions.size();
    if (r.layer == 0) {
      sampled.insert(sampled.end(), r.query_positions.begin(), r.query_positions.end());
    }
    return absl::OkStatus();
  }
  absl::StatusOr<ContextId> Fork(const ForkRequest& r) override {
    Context c = contexts.at(r.context.value);
    c.recipe = r.recipe;
    for (auto* part : {&c.k, &c.v}) {
      for (auto& layer : *part) layer.resize(std::min(layer.size(), r.tokens * TokenBytes(c)));
    }
    c.ids.resize(std::min<size_t>(c.ids.size(), r.tokens));
    contexts[++last_] = std::move(c);
    return ContextId{last_};
  }
  absl::Status DeclareTokens(ContextId id, std::span<const uint32_t> ids) override {
    auto& known = contexts.at(id.value).ids;
    known.insert(known.end(), ids.begin(), ids.end());
    return absl::OkStatus();
  }
  absl::Status Close(ContextId id) override {
    return contexts.erase(id.value) == 1 ? absl::OkStatus() : absl::NotFoundError("closed twice");
  }
  absl::Status Read(ContextId id, uint32_t layer, TokenRange range, std::span<std::byte> k,
                    std::span<std::byte> v) override {
    const Context& c = contexts.at(id.value);
    std::memcpy(k.data(), c.k[layer].data() + range.lo * TokenBytes(c), k.size());
    std::memcpy(v.data(), c.v[layer].data() + range.lo * TokenBytes(c), v.size());
    return absl::OkStatus();
  }

  absl::StatusOr<std::unique_ptr<PendingAttend>> Attend(std::span<const AttendRow> rows,
                                                        std::span<AttendAnswer> answers) override;
  void Arm(bool armed) override { armed_balance += armed ? 1 : -1; }
  absl::StatusOr<uint64_t> HeldBytes(ContextId) override { return 0; }

  static size_t TokenBytes(const Context& c) { return c.shape.kv_heads * c.shape.vector_bytes(); }

  std::map<uint64_t, Context> contexts;
  const Context* reuse = nullptr;
  uint32_t reuse_tokens = 0;
  size_t samples = 0;
  std::vector<uint32_t> sampled;  // positions, of layer 0
  int armed_balance = 0;
  int attends = 0, appends = 0;
  int fail_attend = -1;     // the first attend that fails,
  int fail_attends = 1;     // how many fail,
  absl::Status failure;     // as a whole if Unavailable, else in the first row, whose o is nonsense
  bool cover_less = false;  // instead of failing, the first row's answer leaves a token out
  int fail_append = -1;     // the append that fails
  uint64_t tokens_attended = 0;

 private:
  static void Add(std::vector<std::byte>* out, const void* data, size_t bytes) {
    const auto* p = static_cast<const std::byte*>(data);
    out->insert(out->end(), p, p + bytes);
  }
  uint64_t last_ = 0;
};

inline absl::StatusOr<std::unique_ptr<PendingAttend>> FakeService::Attend(
    std::span<const AttendRow> rows, std::span<AttendAnswer> answers) {
  class Ready final : public PendingAttend {
   public:
    explicit Ready(absl::Status status) : status_(std::move(status)) {}
    bool Done() const override { return true; }
    absl::Status Wait() override { return status_; }

   private:
    const absl::Status status_;
  };
  const bool fails =
      attends >= fail_attend && attends < fail_attend + fail_attends && fail_attend >= 0;
  ++attends;
  if (fails && absl::IsUnavailable(failure)) return std::make_unique<Ready>(failure);
  for (size_t i = 0; i < rows.size(); ++i) {
    const AttendRow& row = rows[i];
    Context& c = contexts.at(row.context.value);
    EXPECT_LT(row.token_position, c.max_tokens);
    EXPECT_EQ(c.k[row.layer].size(), row.token_position * TokenBytes(c)) << "layer " << row.layer;
    Add(&c.k[row.layer], row.k, TokenBytes(c));
    Add(&c.v[row.layer], row.v, TokenBytes(c));
    answers[i].status = fails && i == 0 && !cover_less ? failure : absl::OkStatus();
    answers[i].covered = row.range;
    if (fails && i == 0 && cover_less) ++answers[i].covered.lo;
    const uint32_t d = c.shape.head_dim;
    for (uint32_t h = 0; h < row.heads; ++h) {
      const uint32_t kv = h / c.shape.group();
      std::vector<double> z, o(d, 0.0);
      double largest = -1e300, sum = 0;
      for (uint32_t t = row.range.lo; t < row.range.hi; ++t) {
        double dot = 0;
        for (uint32_t j = 0; j < d; ++j) {
          dot += double{static_cast<const float*>(row.q)[h * d + j]} *
                 LoadAsFloat(c.k[row.layer].data(), (size_t{t} * c.shape.kv_heads + kv) * d + j,
                             c.shape.dtype);
        }
        z.push_back(dot / std::sqrt(double{1} * d));
        largest = std::max(largest, z.back());
      }
      for (uint32_t t = row.range.lo; t < row.range.hi; ++t) {
        const double w = std::exp(z[t - row.range.lo] - largest);
        sum += w;
        for (uint32_t j = 0; j < d; ++j) {
          o[j] += w * LoadAsFloat(c.v[row.layer].data(),
                                  (size_t{t} * c.shape.kv_heads + kv) * d + j, c.shape.dtype);
        }
      }
      for (uint32_t j = 0; j < d; ++j) {
        answers[i].o[h * d + j] = sum > 0 ? static_cast<float>(o[j] / sum) : 0.0f;
      }
      answers[i].lse[h] = sum > 0 ? static_cast<float>(largest + std::log(sum)) : kEmptyLse;
    }
    if (fails && i == 0) std::fill(answers[i].o.begin(), answers[i].o.end(), 1e30f);
    answers[i].tokens_attended = uint64_t{row.range.size()} * row.heads;
    tokens_attended += answers[i].tokens_attended;
  }
  return std::make_unique<Ready>(absl::OkStatus());
}

}  // namespace quarry::testing
