// The C interface over the C++ client.
#include "client/quarry.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "client/client.h"

struct quarry_client {
  std::unique_ptr<quarry::Client> client;
};

struct quarry_block {
  std::unique_ptr<quarry::LeasedBlock> block;
};

struct quarry_pending_lease {
  std::unique_ptr<quarry::PendingLease> pending;
};

struct quarry_attend {
  std::vector<quarry::AttendAnswer> answers;
  quarry_answer* out = nullptr;
  std::unique_ptr<quarry::PendingAttend> pending;
};

namespace {

thread_local std::string last_error;

quarry_code Report(const absl::Status& status) {
  if (!status.ok()) last_error = std::string(status.message());
  return static_cast<quarry_code>(status.code());
}

absl::Status Wrong(const char* what, uint64_t value) {
  return absl::InvalidArgumentError(absl::StrCat(what, " is ", value));
}

// Numbers that are narrower inside are checked while they are wide: 258 is no fp16.
absl::StatusOr<quarry::DType> DTypeOf(const char* what, uint32_t value) {
  if (value < 1 || value > 3) return Wrong(what, value);
  return static_cast<quarry::DType>(value);
}

template <typename D>
D DigestOfBytes(const uint8_t* bytes) {
  D d;
  std::memcpy(d.bytes.data(), bytes, d.bytes.size());
  return d;
}

absl::StatusOr<quarry::ModelSpec> SpecOf(const quarry_model* m) {
  if (m == nullptr || m->struct_bytes != sizeof(quarry_model)) {
    return Wrong("quarry_model.struct_bytes", m == nullptr ? 0 : m->struct_bytes);
  }
  quarry::ModelSpec spec;
  spec.name = m->name == nullptr ? "" : m->name;
  absl::StatusOr<quarry::DType> dtype = DTypeOf("quarry_model.kv_dtype", m->kv_dtype);
  if (!dtype.ok()) return dtype.status();
  spec.shape = {m->layers, m->heads, m->kv_heads, m->head_dim, *dtype};
  spec.weights = DigestOfBytes<quarry::WeightsDigest>(m->weights_digest);
  spec.tokenizer = DigestOfBytes<quarry::TokenizerDigest>(m->tokenizer_digest);
  spec.rope.rotary_dim = m->rope_rotary_dim;
  if (m->rope_rotary_dim > 0) {
    if (m->rope_inv_freq == nullptr || m->rope_rotary_dim > 1024) {
      return Wrong("quarry_model.rope_rotary_dim", m->rope_rotary_dim);
    }
    spec.rope.inv_freq.assign(m->rope_inv_freq, m->rope_inv_freq + m->rope_rotary_dim / 2);
  }
  spec.rope.attention_scale = m->rope_attention_scale;
  spec.rope.interleaved = m->rope_interleaved != 0;
  if (m->rope_regime < 0 || m->rope_regime > 2) {
    return Wrong("quarry_model.rope_regime", static_cast<uint64_t>(m->rope_regime));
  }
  spec.rope.regime = static_cast<quarry::RopeRegime>(m->rope_regime);
  spec.rope.regime_max_tokens = m->rope_regime_max_tokens;
  return spec;
}

absl::StatusOr<quarry::AttendRow> RowOf(const quarry_row& r) {
  if (r.struct_bytes != sizeof(quarry_row)) return Wrong("quarry_row.struct_bytes", r.struct_bytes);
  if (r.budget_kind > static_cast<uint32_t>(quarry::Budget::kLastKind)) return Wrong("quarry_row.budget_kind", r.budget_kind);
  absl::StatusOr<quarry::DType> q_dtype = DTypeOf("quarry_row.q_dtype", r.q_dtype);
  if (!q_dtype.ok()) return q_dtype.status();
  quarry::AttendRow row;
  row.context = {r.context};
  row.layer = r.layer;
  row.range = {r.token_lo, r.token_hi};
  row.first_head = r.first_head;
  row.heads = r.heads;
  row.budget = {.kind = static_cast<quarry::Budget::Kind>(r.budget_kind),
                .k = r.budget_k,
                .mass = r.budget_mass,
                .error = r.budget_error,
                .beta = r.budget_beta,
                .seed = r.budget_seed};
  row.merged = r.merged != 0;
  row.q_dtype = *q_dtype;
  row.q = r.q;
  row.has_token = r.has_token != 0;
  row.token_position = r.token_position;
  row.k = r.k;
  row.v = r.v;
  return row;
}

absl::StatusOr<quarry::OpenRequest> OpenOf(const quarry_model* model, const uint32_t* tokens,
                                           size_t token_count, uint32_t max_tokens) {
  absl::StatusOr<quarry::ModelSpec> spec = SpecOf(model);
  if (!spec.ok()) return spec.status();
  quarry::OpenRequest request;
  request.spec = *std::move(spec);
  if (token_count > 0) request.tokens.assign(tokens, tokens + token_count);
  request.max_tokens = max_tokens;
  request.accepts = {quarry::NumericRecipe{}};
  return request;
}

std::string_view KeyOf(const void* key, size_t bytes) {
  return {static_cast<const char*>(key), key == nullptr ? 0 : bytes};
}

std::string_view TextOf(const char* text) { return text == nullptr ? std::string_view() : text; }

// The head_dim of a row's context is not in the row: the sizes of o and lse come with the answer,
// so the library asks the daemon's list once per context.
absl::StatusOr<uint32_t> HeadDimOf(quarry_client* client, uint64_t context) {
  absl::StatusOr<quarry::KvShape> shape = client->client->Shape({context});
  if (!shape.ok()) return shape.status();
  return shape->head_dim;
}

absl::StatusOr<std::unique_ptr<quarry_attend>> Start(quarry_client* client, const quarry_row* rows,
                                                     size_t count, quarry_answer* answers) {
  std::vector<quarry::AttendRow> list;
  auto attend = std::make_unique<quarry_attend>();
  attend->out = answers;
  attend->answers.resize(count);
  for (size_t i = 0; i < count; ++i) {
    absl::StatusOr<quarry::AttendRow> row = RowOf(rows[i]);
    if (!row.ok()) return row.status();
    absl::StatusOr<uint32_t> head_dim = HeadDimOf(client, rows[i].context);
    if (!head_dim.ok()) return head_dim.status();
    if (answers[i].o == nullptr || answers[i].lse == nullptr) return Wrong("answer without o or lse", i);
    attend->answers[i].o = {answers[i].o, size_t{row->heads} * *head_dim};
    attend->answers[i].lse = {answers[i].lse, row->heads};
    list.push_back(*row);
  }
  absl::StatusOr<std::unique_ptr<quarry::PendingAttend>> pending =
      client->client->AttendAsync(list, attend->answers);
  if (!pending.ok()) return pending.status();
  attend->pending = *std::move(pending);
  return attend;
}

}  // namespace

extern "C" {

uint32_t quarry_abi_version(void) { return QUARRY_ABI_VERSION; }

const char* quarry_last_error(void) { return last_error.c_str(); }

quarry_code quarry_connect(const char* socket_path, const char* client_name, uint64_t slot_bytes,
                           uint32_t deadline_ms, quarry_client** out) {
  quarry::ClientOptions options;
  if (socket_path != nullptr) options.socket_path = socket_path;
  if (client_name != nullptr) options.name = client_name;
  options.slot_bytes = slot_bytes;
  if (deadline_ms > 0) options.deadline = absl::Milliseconds(deadline_ms);
  absl::StatusOr<std::unique_ptr<quarry::Client>> client = quarry::Client::Connect(options);
  if (!client.ok()) return Report(client.status());
  *out = new quarry_client{*std::move(client)};
  return 0;
}

void quarry_disconnect(quarry_client* client) { delete client; }

quarry_code quarry_open(quarry_client* client, const quarry_model* model, const uint32_t* tokens,
                        size_t token_count, uint32_t max_tokens, uint64_t* context,
                        uint32_t* reused_tokens) {
  absl::StatusOr<quarry::OpenRequest> request = OpenOf(model, tokens, token_count, max_tokens);
  if (!request.ok()) return Report(request.status());
  absl::StatusOr<quarry::OpenResult> opened = client->client->Open(*request);
  if (!opened.ok()) return Report(opened.status());
  *context = opened->context.value;
  *reused_tokens = opened->reused_tokens;
  return 0;
}

quarry_code quarry_open_shifted(quarry_client* client, const quarry_model* model,
                                const uint32_t* tokens, size_t token_count, uint32_t max_tokens,
                                uint64_t* context, uint32_t* reused_tokens,
                                quarry_shifted_range* shifted, size_t* ranges) {
  absl::StatusOr<quarry::OpenRequest> request = OpenOf(model, tokens, token_count, max_tokens);
  if (!request.ok()) return Report(request.status());
  request->reuse_shifted = true;
  absl::StatusOr<quarry::OpenResult> opened = client->client->Open(*request);
  if (!opened.ok()) return Report(opened.status());
  const size_t room = std::exchange(*ranges, opened->shifted.size());
  if (*ranges > room) {
    const absl::Status closed = client->client->Close(opened->context);
    return Report(closed.ok() ? absl::ResourceExhaustedError(absl::StrCat(
                                    *ranges, " shifted ranges, there is room for ", room))
                              : closed);
  }
  *context = opened->context.value;
  *reused_tokens = opened->reused_tokens;
  for (size_t i = 0; i < *ranges; ++i) {
    const quarry::ShiftedRange& range = opened->shifted[i];
    shifted[i] = {range.tokens.lo, range.tokens.hi, range.shift};
  }
  return 0;
}

quarry_code quarry_longest_prefix(quarry_client* client, const quarry_model* model,
                                  const uint32_t* tokens, size_t token_count, uint32_t max_tokens,
                                  uint32_t* reused_tokens) {
  absl::StatusOr<quarry::OpenRequest> request = OpenOf(model, tokens, token_count, max_tokens);
  if (!request.ok()) return Report(request.status());
  const absl::StatusOr<quarry::LongestPrefix> prefix = client->client->LongestPrefix(*request);
  if (!prefix.ok()) return Report(prefix.status());
  *reused_tokens = prefix->tokens;
  return 0;
}

quarry_code quarry_declare_tokens(quarry_client* client, uint64_t context, const uint32_t* tokens,
                                  size_t token_count) {
  return Report(client->client->DeclareTokens({context}, {tokens, token_count}));
}

quarry_code quarry_append(quarry_client* client, uint64_t context, uint32_t layer,
                          uint32_t kv_heads, uint32_t token_lo, uint32_t token_hi, const void* k,
                          const void* v) {
  return quarry_append_heads(client, context, layer, 0, kv_heads, token_lo, token_hi, k, v);
}

quarry_code quarry_append_heads(quarry_client* client, uint64_t context, uint32_t layer,
                                uint32_t first_kv_head, uint32_t kv_heads, uint32_t token_lo,
                                uint32_t token_hi, const void* k, const void* v) {
  quarry::AppendRequest request;
  request.context = {context};
  request.layer = layer;
  request.first_kv_head = first_kv_head;
  request.kv_heads = kv_heads;
  request.range = {token_lo, token_hi};
  request.k = k;
  request.v = v;
  return Report(client->client->Append(request));
}

quarry_code quarry_read(quarry_client* client, uint64_t context, uint32_t layer, uint32_t token_lo,
                        uint32_t token_hi, void* k, void* v, size_t bytes_each) {
  return Report(client->client->Read({context}, layer, {token_lo, token_hi},
                                     {static_cast<std::byte*>(k), bytes_each},
                                     {static_cast<std::byte*>(v), bytes_each}));
}

quarry_code quarry_seal(quarry_client* client, uint64_t context) {
  return Report(client->client->Seal({context}).status());
}

quarry_code quarry_fork(quarry_client* client, uint64_t context, uint32_t tokens,
                        uint32_t max_tokens, uint64_t* fork) {
  absl::StatusOr<quarry::ContextId> id =
      client->client->Fork({{context}, tokens, max_tokens, quarry::NumericRecipe{}});
  if (!id.ok()) return Report(id.status());
  *fork = id->value;
  return 0;
}

quarry_code quarry_close(quarry_client* client, uint64_t context) {
  return Report(client->client->Close({context}));
}

void quarry_arm(quarry_client* client, int armed) {
  armed != 0 ? client->client->Arm() : client->client->Disarm();
}

quarry_code quarry_attend_start(quarry_client* client, const quarry_row* rows, size_t row_count,
                                quarry_answer* answers, quarry_attend** out) {
  absl::StatusOr<std::unique_ptr<quarry_attend>> attend =
      Start(client, rows, row_count, answers);
  if (!attend.ok()) return Report(attend.status());
  *out = attend->release();
  return 0;
}

int quarry_attend_done(const quarry_attend* attend) { return attend->pending->Done() ? 1 : 0; }

quarry_code quarry_attend_wait(quarry_attend* attend) {
  const std::unique_ptr<quarry_attend> owned(attend);
  const absl::Status status = owned->pending->Wait();
  for (size_t i = 0; i < owned->answers.size(); ++i) {
    const quarry::AttendAnswer& answer = owned->answers[i];
    quarry_answer& out = owned->out[i];
    out.code = Report(answer.status);
    out.covered_lo = answer.covered.lo;
    out.covered_hi = answer.covered.hi;
    out.tokens_attended = answer.tokens_attended;
    out.bytes_touched = answer.bytes_touched;
    out.error_estimate = answer.error_estimate;
    out.shifted_tokens = answer.shifted_tokens;
  }
  return Report(status);
}

quarry_code quarry_attend_rows(quarry_client* client, const quarry_row* rows, size_t row_count,
                               quarry_answer* answers) {
  quarry_attend* attend = nullptr;
  const quarry_code code = quarry_attend_start(client, rows, row_count, answers, &attend);
  return code != 0 ? code : quarry_attend_wait(attend);
}

quarry_code quarry_top_k(quarry_client* client, const quarry_row* row, uint32_t k,
                         uint32_t* tokens, float* scores, uint32_t* found) {
  absl::StatusOr<quarry::AttendRow> query = RowOf(*row);
  if (!query.ok()) return Report(query.status());
  absl::StatusOr<quarry::TopKAnswer> answer = client->client->TopK(*query, k, false);
  if (!answer.ok()) return Report(answer.status());
  *found = k;
  for (size_t h = 0; h < answer->heads.size(); ++h) {
    const std::vector<quarry::TopKEntry>& entries = answer->heads[h];
    *found = std::min<uint32_t>(*found, static_cast<uint32_t>(entries.size()));
    for (size_t i = 0; i < entries.size() && i < k; ++i) {
      tokens[h * k + i] = entries[i].token;
      scores[h * k + i] = entries[i].score;
    }
  }
  return 0;
}

quarry_code quarry_pin_context(quarry_client* client, const char* name, uint64_t context,
                               uint64_t ttl_ms, uint64_t* pinned_bytes) {
  quarry::PinRequest request;
  request.name = std::string(TextOf(name));
  request.context = quarry::ContextId{context};
  request.ttl_ms = ttl_ms;
  absl::StatusOr<uint64_t> bytes = client->client->Pin(request);
  if (!bytes.ok()) return Report(bytes.status());
  *pinned_bytes = *bytes;
  return 0;
}

quarry_code quarry_unpin(quarry_client* client, const char* name) {
  return Report(client->client->Unpin(TextOf(name)));
}

quarry_code quarry_put(quarry_client* client, const char* engine_namespace, const void* key,
                       size_t key_bytes, const void* data, size_t data_bytes) {
  return Report(client->client->Put(TextOf(engine_namespace), KeyOf(key, key_bytes),
                                    {static_cast<const std::byte*>(data), data_bytes}));
}

quarry_code quarry_lease(quarry_client* client, const char* engine_namespace, const void* key,
                         size_t key_bytes, quarry_block** out) {
  quarry_pending_lease* pending = nullptr;
  const quarry_code code = quarry_lease_start(client, engine_namespace, key, key_bytes, &pending);
  return code != 0 ? code : quarry_lease_wait(pending, out);
}

quarry_code quarry_lease_start(quarry_client* client, const char* engine_namespace,
                               const void* key, size_t key_bytes, quarry_pending_lease** out) {
  absl::StatusOr<std::unique_ptr<quarry::PendingLease>> pending =
      client->client->LeaseAsync(TextOf(engine_namespace), KeyOf(key, key_bytes));
  if (!pending.ok()) return Report(pending.status());
  *out = new quarry_pending_lease{*std::move(pending)};
  return 0;
}

quarry_code quarry_lease_wait(quarry_pending_lease* pending, quarry_block** out) {
  const std::unique_ptr<quarry_pending_lease> owned(pending);
  absl::StatusOr<std::unique_ptr<quarry::LeasedBlock>> block = owned->pending->Wait();
  if (!block.ok()) return Report(block.status());
  *out = new quarry_block{*std::move(block)};
  return 0;
}

const void* quarry_block_data(const quarry_block* block, size_t* bytes) {
  *bytes = block->block->bytes().size();
  return block->block->bytes().data();
}

quarry_code quarry_block_copy(const quarry_block* block, void* out, size_t bytes) {
  if (bytes != block->block->bytes().size()) {
    return Report(Wrong("the block's size", block->block->bytes().size()));
  }
  return Report(block->block->CopyTo(0, {static_cast<std::byte*>(out), bytes}));
}

void quarry_block_release(quarry_block* block) { delete block; }

quarry_code quarry_flush(quarry_client* client, uint32_t timeout_ms, uint64_t* blocks) {
  const absl::StatusOr<quarry::FlushResult> result =
      client->client->Flush({.whole_tenant = true}, absl::Milliseconds(timeout_ms));
  if (!result.ok()) return Report(result.status());
  if (blocks != nullptr) *blocks = result->durable_blocks;
  return 0;
}

quarry_code quarry_exists(quarry_client* client, const char* engine_namespace, const void* key,
                          size_t key_bytes, int* exists) {
  const std::string keys[] = {std::string(KeyOf(key, key_bytes))};
  absl::StatusOr<std::vector<bool>> answer =
      client->client->Exists(TextOf(engine_namespace), keys);
  if (!answer.ok()) return Report(answer.status());
  *exists = (*answer)[0] ? 1 : 0;
  return 0;
}

}  // extern "C"
