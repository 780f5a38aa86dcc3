// What integration tests do with a client again and again.
#pragma once

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "client/client.h"
#include "tests/support/kv_reference.h"

namespace quarry::testing {

inline absl::StatusOr<std::unique_ptr<Client>> ConnectTo(const std::string& socket,
                                                         absl::Duration deadline =
                                                             absl::Seconds(20)) {
  ClientOptions options;
  options.socket_path = socket;
  options.name = "integration";
  options.deadline = deadline;
  return Client::Connect(options);
}

inline OpenRequest OpenFor(const ModelSpec& spec, const KvData& data, uint32_t max_tokens) {
  OpenRequest request;
  request.spec = spec;
  request.tokens = data.tokens;
  request.max_tokens = max_tokens;
  request.accepts = {NumericRecipe{}};
  return request;
}

// Appends tokens [lo, hi) of every layer.
inline absl::Status AppendTokens(Client* client, ContextId context, const KvData& data,
                                 uint32_t lo, uint32_t hi) {
  for (uint32_t layer = 0; layer < data.shape.layers; ++layer) {
    AppendRequest append;
    append.context = context;
    append.layer = layer;
    append.kv_heads = data.shape.kv_heads;
    append.range = {lo, hi};
    append.k = data.k[layer].data() + data.offset(lo);
    append.v = data.v[layer].data() + data.offset(lo);
    if (layer == 0) append.new_token_ids = std::span(data.tokens).subspan(lo, hi - lo);
    absl::Status status = client->Append(append);
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

// One row of all heads with a random query, and its answer's buffers.
struct OneRow {
  std::vector<float> q, o, lse;
  AttendRow row;
  AttendAnswer answer;

  OneRow(const KvShape& shape, ContextId context, uint32_t layer, TokenRange range, uint32_t seed)
      : q(size_t{shape.heads} * shape.head_dim), o(q.size(), NAN), lse(shape.heads, NAN) {
    std::mt19937 random(seed);
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
  OneRow(const OneRow&) = delete;
  OneRow& operator=(const OneRow&) = delete;

  absl::Status Run(Client* client) {
    absl::Status status = client->Attend(std::span(&row, 1), std::span(&answer, 1));
    status.Update(answer.status);
    return status;
  }
  // Largest relative error over the heads against exact attention.
  double Error(const KvData& data) const {
    double worst = 0;
    uint32_t d = data.shape.head_dim;
    for (uint32_t h = 0; h < data.shape.heads; ++h) {
      ReferenceAnswer want = Reference(data, row.layer, h, row.range, q.data() + size_t{h} * d);
      worst = std::max(worst, RelativeError(std::span(o).subspan(size_t{h} * d, d), want.o));
    }
    return worst;
  }
};

}  // namespace quarry::testing
