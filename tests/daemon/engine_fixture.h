// What the engine's tests share: small models, random K and V, and attention in double.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/synchronization/notification.h"
#include "daemon/engine.h"
#include "proto/half.h"
#include "tests/support/eventually.h"

namespace quarry {

#define ASSERT_OK(expression)                  \
  do {                                         \
    const absl::Status status_ = (expression); \
    ASSERT_TRUE(status_.ok()) << status_;      \
  } while (false)
#define EXPECT_OK(expression)                  \
  do {                                         \
    const absl::Status status_ = (expression); \
    EXPECT_TRUE(status_.ok()) << status_;      \
  } while (false)

inline KvShape SmallShape(DType dtype = DType::kBf16) {
  return {.layers = 2, .heads = 4, .kv_heads = 2, .head_dim = 32, .dtype = dtype};
}

inline ModelSpec SmallModel(const KvShape& shape = SmallShape()) {
  ModelSpec spec;
  spec.name = "small";
  spec.shape = shape;
  spec.weights.bytes[0] = 1;
  spec.tokenizer.bytes[0] = 2;
  spec.rope.rotary_dim = shape.head_dim;
  for (uint32_t i = 0; i < shape.head_dim / 2; ++i) {
    spec.rope.inv_freq.push_back(std::pow(10000.0f, -2.0f * i / shape.head_dim));
  }
  return spec;
}

inline std::vector<uint32_t> Tokens(uint32_t count, uint32_t first = 1000) {
  std::vector<uint32_t> tokens(count);
  for (uint32_t i = 0; i < count; ++i) tokens[i] = first + i;
  return tokens;
}

inline OpenRequest OpenFor(const ModelSpec& spec, std::vector<uint32_t> tokens,
                           uint32_t max_tokens) {
  OpenRequest request;
  request.spec = spec;
  request.tokens = std::move(tokens);
  request.max_tokens = max_tokens;
  return request;
}

// Random K and V of a sequence, rounded to the model's dtype: [layer][token][kv_head][head_dim].
class KvData {
 public:
  KvData(const KvShape& shape, uint32_t tokens, uint64_t seed) : shape_(shape), tokens_(tokens) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal;
    const size_t elements = size_t{tokens} * shape.kv_heads * shape.head_dim;
    for (uint32_t l = 0; l < shape.layers; ++l) {
      for (auto* part : {&k_, &v_}) {
        std::string& bytes = part->emplace_back(elements * DTypeBytes(shape.dtype), '\0');
        for (size_t i = 0; i < elements; ++i) {
          StoreFromFloat(bytes.data(), i, shape.dtype, normal(random));
        }
      }
    }
  }

  const KvShape& shape() const { return shape_; }
  uint32_t tokens() const { return tokens_; }
  const char* k(uint32_t layer, uint32_t token) const { return At(k_, layer, token); }
  const char* v(uint32_t layer, uint32_t token) const { return At(v_, layer, token); }
  char* k(uint32_t layer, uint32_t token) { return const_cast<char*>(At(k_, layer, token)); }
  char* v(uint32_t layer, uint32_t token) { return const_cast<char*>(At(v_, layer, token)); }
  size_t token_bytes() const { return shape_.kv_heads * shape_.vector_bytes(); }

  // Takes tokens [from, ...) from another sequence.
  void Overwrite(uint32_t from, const KvData& other) {
    for (uint32_t l = 0; l < shape_.layers; ++l) {
      for (uint32_t t = from; t < std::min(tokens_, other.tokens_); ++t) {
        std::memcpy(k(l, t), other.k(l, t), token_bytes());
        std::memcpy(v(l, t), other.v(l, t), token_bytes());
      }
    }
  }

  float K(uint32_t layer, uint32_t token, uint32_t kv_head, uint32_t d) const {
    return LoadAsFloat(k(layer, token), kv_head * shape_.head_dim + d, shape_.dtype);
  }
  float V(uint32_t layer, uint32_t token, uint32_t kv_head, uint32_t d) const {
    return LoadAsFloat(v(layer, token), kv_head * shape_.head_dim + d, shape_.dtype);
  }

 private:
  const char* At(const std::vector<std::string>& part, uint32_t layer, uint32_t token) const {
    return part[layer].data() + token * token_bytes();
  }
  KvShape shape_;
  uint32_t tokens_;
  std::vector<std::string> k_, v_;
};

// Appends tokens [range.lo, range.hi) of all layers and KV heads.
inline absl::Status AppendAll(Engine& engine, SessionId session, ContextId context,
                              const KvData& data, TokenRange range) {
  if (range.empty()) return absl::OkStatus();
  for (uint32_t l = 0; l < data.shape().layers; ++l) {
    AppendRequest request;
    request.context = context;
    request.layer = l;
    request.kv_heads = data.shape().kv_heads;
    request.range = range;
    request.k = data.k(l, range.lo);
    request.v = data.v(l, range.lo);
    if (absl::Status status = engine.Append(session, request); !status.ok()) return status;
  }
  return absl::OkStatus();
}

// A row with its buffers: all heads of one layer.
struct OwnedRow {
  OwnedRow(const KvShape& shape, ContextId context, uint32_t layer, TokenRange range, uint64_t seed)
      : shape(shape), q(size_t{shape.heads} * shape.head_dim), o(q.size()), lse(shape.heads) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal;
    for (float& x : q) x = normal(random);
    row.context = context;
    row.layer = layer;
    row.range = range;
    row.heads = shape.heads;
    row.q = q.data();
    answer.o = o;
    answer.lse = lse;
  }
  OwnedRow(const OwnedRow&) = delete;
  KvShape shape;
  std::vector<float> q, o, lse;
  AttendRow row;
  AttendAnswer answer;
};

// Blocks until the batch is answered; the answers are copied back into the rows.
inline void AttendRows(Engine& engine, SessionId session,
                       std::span<const std::unique_ptr<OwnedRow>> owned) {
  std::vector<AttendRow> rows;
  std::vector<AttendAnswer> answers;
  for (const auto& row : owned) {
    row->row.q = row->q.data();
    rows.push_back(row->row);
    answers.push_back(row->answer);
  }
  absl::Notification done;
  engine.Attend(session, rows, answers, [&] { done.Notify(); });
  done.WaitForNotification();
  for (size_t i = 0; i < owned.size(); ++i) owned[i]->answer = answers[i];
}

inline std::unique_ptr<OwnedRow> AttendOne(Engine& engine, SessionId session, const KvShape& shape,
                                           ContextId context, uint32_t layer, TokenRange range,
                                           uint64_t seed, Budget budget = {}) {
  std::unique_ptr<OwnedRow> rows[1] = {
      std::make_unique<OwnedRow>(shape, context, layer, range, seed)};
  rows[0]->row.budget = budget;
  AttendRows(engine, session, rows);
  return std::move(rows[0]);
}

struct ReferenceHead {
  std::vector<double> o;
  double lse = -std::numeric_limits<double>::infinity();
};

// Attention of one query head in double, over the tokens of `range` that `keep` accepts.
template <typename Keep>
ReferenceHead ReferenceAttention(const KvData& data, uint32_t layer, TokenRange range,
                                 const float* q, uint32_t head, Keep keep) {
  const KvShape& s = data.shape();
  const uint32_t kv_head = head / s.group();
  ReferenceHead reference;
  reference.o.resize(s.head_dim);
  std::vector<double> z;
  double top = -std::numeric_limits<double>::infinity();
  for (uint32_t t = range.lo; t < range.hi; ++t) {
    double score = 0;
    for (uint32_t d = 0; d < s.head_dim; ++d) score += double{q[d]} * data.K(layer, t, kv_head, d);
    z.push_back(score / std::sqrt(static_cast<double>(s.head_dim)));
    if (keep(t)) top = std::max(top, z.back());
  }
  double sum = 0;
  for (uint32_t t = range.lo; t < range.hi; ++t) {
    if (!keep(t)) continue;
    const double weight = std::exp(z[t - range.lo] - top);
    sum += weight;
    for (uint32_t d = 0; d < s.head_dim; ++d) {
      reference.o[d] += weight * data.V(layer, t, kv_head, d);
    }
  }
  if (sum == 0) return reference;
  for (double& x : reference.o) x /= sum;
  reference.lse = top + std::log(sum);
  return reference;
}

// ||o - ref|| / ||ref|| of the worst head.
inline double OutputError(const KvData& data, const OwnedRow& row, double lse_tolerance) {
  double worst = 0;
  for (uint32_t h = 0; h < row.row.heads; ++h) {
    const uint32_t head = row.row.first_head + h;
    const ReferenceHead reference = ReferenceAttention(
        data, row.row.layer, row.row.range, row.q.data() + size_t{h} * row.shape.head_dim, head,
        [](uint32_t) { return true; });
    double difference = 0, norm = 0;
    for (uint32_t d = 0; d < row.shape.head_dim; ++d) {
      const double o = row.o[size_t{h} * row.shape.head_dim + d];
      difference += (o - reference.o[d]) * (o - reference.o[d]);
      norm += reference.o[d] * reference.o[d];
    }
    worst = std::max(worst, std::sqrt(difference / norm));
    EXPECT_NEAR(row.lse[h], reference.lse, lse_tolerance) << "head " << head;
  }
  return worst;
}
// The same of an exact answer.
inline double WorstError(const KvData& data, const OwnedRow& row) {
  return OutputError(data, row, 1e-3);
}

class EngineTest : public ::testing::Test {
 protected:
  static EngineOptions SmallOptions() {
    EngineOptions options;
    options.arena.capacity_bytes = 256ull << 20;
    options.arena.extent_bytes = 1ull << 20;
    options.arena.huge_pages = ArenaOptions::HugePages::kNever;
    options.arena.prefault = false;
    options.executor_threads = 2;
    options.run_tokens = 1024;
    options.task_tokens = 512;
    options.index.choice.kind = IndexKind::kExact;  // tests of indexes ask for them
    options.inline_bytes = 64 << 10;  // so that tests take both ways
    return options;
  }
  // Runs from `first_run_token` on are indexed as clusters, however short.
  static EngineOptions ClusterOptions(uint32_t run_tokens, uint32_t first_run_token) {
    EngineOptions options = SmallOptions();
    options.run_tokens = run_tokens;
    options.first_run_token = first_run_token;
    options.index.choice.kind = IndexKind::kClusters;
    return options;
  }
  void Start(const EngineOptions& options = SmallOptions()) {
    auto engine = Engine::Create(options);
    ASSERT_TRUE(engine.ok()) << engine.status();
    engine_ = *std::move(engine);
    session_ = NewSession("alice");
  }
  SessionId NewSession(std::string_view tenant) {
    auto session = engine_->StartSession(tenant, "test");
    EXPECT_TRUE(session.ok()) << session.status();
    return session.value_or(SessionId{});
  }
  // Opens and appends what is not reused.
  OpenResult OpenAndFill(SessionId session, const OpenRequest& request, const KvData& data) {
    auto opened = engine_->Open(session, request);
    EXPECT_TRUE(opened.ok()) << opened.status();
    if (!opened.ok()) return {};
    const auto tokens = static_cast<uint32_t>(request.tokens.size());
    EXPECT_OK(AppendAll(*engine_, session, opened->context, data, {opened->reused_tokens, tokens}));
    return *opened;
  }
  // Fills, seals and closes a context, so that its blocks are cached.
  void Cache(SessionId session, const OpenRequest& request, const KvData& data) {
    const OpenResult opened = OpenAndFill(session, request, data);
    EXPECT_TRUE(engine_->Seal(session, opened.context).ok());
    EXPECT_OK(engine_->Close(session, opened.context));
  }
  uint32_t Reused(SessionId session, const OpenRequest& request) {
    auto opened = engine_->Open(session, request);
    EXPECT_TRUE(opened.ok()) << opened.status();
    if (!opened.ok()) return ~0u;
    EXPECT_OK(engine_->Close(session, opened->context));
    return opened->reused_tokens;
  }

  // Until the background has come that far.
  void WaitFor(const std::function<bool(const EngineStats&)>& reached) {
    const bool there = testing::Eventually([&] { return reached(engine_->Stats()); });
    const EngineStats stats = engine_->Stats();
    ASSERT_TRUE(there) << stats.runs_live << " runs, " << stats.index.built << " built, "
                       << stats.index.failed << " failed, " << stats.index.relearned
                       << " learned again, " << stats.audit.done << " audited, "
                       << stats.audit.drifts << " drifts";
  }
  // Until so many heads' indexes were built since the start, and nothing more is to be.
  void WaitForBuilt(uint64_t heads) {
    WaitFor(
        [&](const EngineStats& s) { return s.index.built >= heads && s.index.queued_runs == 0; });
    ASSERT_EQ(engine_->Stats().index.built, heads);
  }
  // Until the background has attached so many runs.
  void WaitForRuns(uint64_t runs) {
    WaitFor([&](const EngineStats& s) { return s.runs_live >= runs; });
    ASSERT_EQ(engine_->Stats().runs_live, runs);
  }
  // Background work may hold a closed context's blocks for a moment, and publish them after it.
  void WaitUntilUnleased() {
    WaitFor([](const EngineStats& s) {
      return s.store.leased == 0 && s.store.blocks <= s.store.published;
    });
  }

  std::unique_ptr<Engine> engine_;
  SessionId session_;
};

}  // namespace quarry
