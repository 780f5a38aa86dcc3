// Contexts with the structure of real ones, filled and decoded as an engine does, for benchmarks of
// a daemon. What fails ends the program with a message.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "client/client.h"
#include "perf/retrieval/random_trace.h"
#include "proto/model_spec.h"

namespace quarry::perf {

// Keys, values and queries of a model's layers, which take turns with the traces of some families.
class MadeModel {
 public:
  struct Options {
    std::vector<std::string> families;  // retrieval/synthetic_trace.h
    uint32_t layers = 1;
    uint32_t prompt_tokens = 0;  // keys and values are of kDecoded more
    uint32_t query_samples = 0;  // of the prompt
    uint32_t kv_heads = 1, group = 1, head_dim = 128;
    uint32_t seed = 1;
  };
  static constexpr uint32_t kDecoded = 256;

  // InvalidArgument: SyntheticTrace's, or a shape that no context can have.
  static absl::StatusOr<MadeModel> Make(const Options& options);

  const ModelSpec& spec() const { return spec_; }
  const KvShape& shape() const { return spec_.shape; }
  uint32_t prompt_tokens() const { return prompt_tokens_; }
  uint32_t samples() const { return samples_; }

  // [tokens][kv_head][head_dim] of bf16, from a token on.
  const std::byte* Keys(uint32_t layer, uint32_t token) const { return Row(Of(layer).k, token); }
  const std::byte* Values(uint32_t layer, uint32_t token) const { return Row(Of(layer).v, token); }
  // [head][head_dim] fp32: what the prompt's sampled positions asked, and what decoding asks.
  std::span<const float> Sample(uint32_t layer, uint32_t i) const {
    return std::span(Of(layer).samples).subspan(i * q_floats(), q_floats());
  }
  uint32_t SamplePosition(uint32_t i) const { return layers_.front().positions[i]; }
  const float* Query(uint32_t layer, uint32_t i) const {
    const Layer& of = Of(layer);
    return of.queries.data() + i * q_floats() % of.queries.size();
  }

 private:
  struct Layer {
    std::vector<std::byte> k, v;
    std::vector<float> samples, queries;
    std::vector<uint32_t> positions;
  };
  MadeModel() = default;
  static Layer LayerOf(const Trace& trace, uint32_t prompt_tokens);
  const Layer& Of(uint32_t layer) const { return layers_[layer % layers_.size()]; }
  size_t q_floats() const { return size_t{shape().heads} * shape().head_dim; }
  const std::byte* Row(const std::vector<std::byte>& rows, uint32_t token) const {
    return rows.data() + token * shape().kv_heads * shape().vector_bytes();
  }

  ModelSpec spec_;
  uint32_t prompt_tokens_ = 0, samples_ = 0;
  std::vector<Layer> layers_;
};

// One prompt in the daemon and tokens decoded behind it. Not thread-safe.
class MadeContext {
 public:
  enum class Ids {
    kAtOpen,  // as engines do: runs are indexed layer by layer, and blocks published when they are
              // full
    kLater,   // with DeclarePrompt: until then no run is there
  };
  struct Options {
    uint32_t first_id = 0;  // of the prompt's tokens: other ids, other blocks
    Ids ids = Ids::kAtOpen;
    uint32_t samples = 0;  // the first so many of the model's are sent with the prompt
    double layer_seconds =
        0;                 // of the prefill: it computes so long before each layer's K and V come
    float error = 0.05f;   // tolerated when decoding
  };

  // Opens it and appends the prompt layer by layer, as a prefill does.
  MadeContext(Client* client, const MadeModel& model, const Options& options);
  // Closes it.
  ~MadeContext();
  MadeContext(const MadeContext&) = delete;
  MadeContext& operator=(const MadeContext&) = delete;

  void DeclarePrompt();
  // Sends the model's samples [lo, hi) too, with one more token.
  void SendSamples(uint32_t lo, uint32_t hi);
  // One token of decoding in a fork of the prompt: its id is declared if the prompt's are, and each
  // layer's K and V are stored and the context attended but for the window (retrieval/truth.h).
  // After MadeModel::kDecoded tokens a new fork begins, so that the length stays the same
  // but for these; making it is not counted. Returns microseconds.
  double Step();

 private:
  void Append(uint32_t layer, TokenRange range, std::span<const uint32_t> samples);
  void BeginFork();

  Client* const client_;
  const MadeModel& model_;
  const Options options_;
  bool declared_ = false;
  uint32_t tokens_ = 0;  // of the prompt and what came with SendSamples
  ContextId prompt_, fork_;
  uint32_t decoded_ = MadeModel::kDecoded;  // in the fork
  uint64_t steps_ = 0;
  std::vector<float> o_, lse_;
};

}  // namespace quarry::perf
