#include "gpu/sparse/sampled_layers.h"

#include <algorithm>
#include <cstring>
#include <random>

#include "absl/strings/str_cat.h"
#include "gpu/query_recorder.h"
#include "gpu/sequence.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

// [token][kv_head][head_dim] as [kv_head][token][head_dim].
std::vector<std::byte> ByHead(std::span<const std::byte> from, uint32_t tokens,
                              const KvShape& shape) {
  const size_t row = shape.vector_bytes();
  std::vector<std::byte> out(from.size());
  for (uint32_t t = 0; t < tokens; ++t) {
    for (uint32_t h = 0; h < shape.kv_heads; ++h) {
      std::memcpy(&out[(size_t{h} * tokens + t) * row],
                  &from[(size_t{t} * shape.kv_heads + h) * row], row);
    }
  }
  return out;
}

absl::Status TakeLayer(Sequence& sequence, uint32_t layer, const QueryRecorder::Queries& queries,
                       const std::function<absl::Status(const SampledLayer&)>& take) {
  const KvShape& shape = sequence.shape();
  const uint32_t tokens = sequence.tokens();
  if (queries.positions.size() != tokens) {
    return absl::InternalError(absl::StrCat("layer ", layer, " has ", queries.positions.size(),
                                            " queries of ", tokens, " tokens"));
  }
  std::vector<std::byte> k(size_t{tokens} * shape.kv_heads * shape.vector_bytes()), v(k.size());
  QUARRY_RETURN_IF_ERROR(sequence.ReadKv(layer, k, v));
  k = ByHead(k, tokens, shape);
  v = ByHead(v, tokens, shape);
  SampledLayer out;
  out.layer = layer;
  out.kv = {{k.data(), v.data(), tokens * shape.vector_bytes(), {0, tokens}},
            shape.dtype,
            shape.heads,
            shape.kv_heads,
            shape.head_dim};
  out.q = queries.q;
  return take(out);
}

}  // namespace

absl::Status SampleLayers(const Model& model, Device& device, const SampleRun& run,
                          const std::function<absl::Status(const SampledLayer&)>& take) {
  const uint32_t layers = model.config().layers;
  const uint32_t step = run.layers_at_a_time == 0 ? layers : run.layers_at_a_time;
  for (uint32_t first = 0; first < layers; first += step) {
    QueryRecorderOptions recording;
    for (uint32_t l = first; l < std::min(first + step, layers); ++l) recording.layers.push_back(l);
    // One from each of as many stretches as there are tokens: all of them.
    recording.prompt_queries = static_cast<uint32_t>(run.tokens.size());
    QUARRY_ASSIGN_OR_RETURN(QueryRecorder recorder,
                            QueryRecorder::Create(model.config(), recording));
    SequenceOptions options;
    options.kv_dtype = model.config().dtype;
    options.recorder = &recorder;
    QUARRY_ASSIGN_OR_RETURN(
        std::unique_ptr<Sequence> sequence,
        Sequence::Open(model, device, nullptr, options, run.tokens, run.max_tokens));
    QUARRY_RETURN_IF_ERROR(sequence->Extend(run.tokens, Sequence::Role::kPrompt).status());
    for (const auto& [layer, queries] : recorder.layers()) {
      QUARRY_RETURN_IF_ERROR(TakeLayer(*sequence, layer, queries.prompt, take));
    }
  }
  return absl::OkStatus();
}

std::vector<uint32_t> MadeTokens(uint32_t tokens, uint32_t vocab, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<uint32_t> out;
  while (out.size() < tokens) {
    const bool again = out.size() > 64 && random() % 4 == 0;
    const size_t from = again ? random() % (out.size() - 32) : 0;
    for (uint32_t i = 0; i < 32 && out.size() < tokens; ++i) {
      out.push_back(again ? out[from + i] : static_cast<uint32_t>(random() % vocab));
    }
  }
  return out;
}

}  // namespace quarry
