#include "proto/convert.h"

#include "absl/strings/str_cat.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

absl::Status TooMany(const char* field, int count) {
  return absl::InvalidArgumentError(
      absl::StrCat(field, " has ", count, " entries, at most ", kMaxListEntries, " are taken"));
}

template <typename D, typename List>
absl::StatusOr<std::vector<D>> DigestList(const List& list, const char* field) {
  if (list.size() > kMaxListEntries) return TooMany(field, list.size());
  std::vector<D> out;
  out.reserve(list.size());
  for (const std::string& bytes : list) {
    QUARRY_ASSIGN_OR_RETURN(D d, DigestFromBytes<D>(bytes, field, EmptyDigest::kRefused));
    out.push_back(d);
  }
  return out;
}

// An empty recipe means dense.
absl::StatusOr<NumericRecipe> RecipeFromWire(const std::string& bytes, const char* field) {
  QUARRY_ASSIGN_OR_RETURN(RecipeDigest d,
                          DigestFromBytes<RecipeDigest>(bytes, field, EmptyDigest::kIsZero));
  return NumericRecipe{d};
}

absl::StatusOr<RopeSpec> RopeFromWire(const wire::RopeSpec& message) {
  if (message.inv_freq_size() > kMaxListEntries) return TooMany("rope inv_freq", message.inv_freq_size());
  RopeSpec rope;
  rope.inv_freq.assign(message.inv_freq().begin(), message.inv_freq().end());
  rope.attention_scale = message.attention_scale();
  rope.rotary_dim = message.rotary_dim();
  rope.interleaved = message.interleaved();
  QUARRY_ASSIGN_OR_RETURN(rope.dtype, DTypeFromWire(message.dtype(), "rope dtype"));
  if (message.regime() < 0 || message.regime() > 2) {
    return absl::InvalidArgumentError(
        absl::StrCat("rope regime is ", static_cast<int>(message.regime()), ", not a known regime"));
  }
  rope.regime = static_cast<RopeRegime>(message.regime());
  rope.regime_max_tokens = message.regime_max_tokens();
  return rope;
}

}  // namespace

absl::StatusOr<DType> DTypeFromWire(int value, const char* field) {
  DType dtype = static_cast<DType>(value);
  if (value < 0 || value > 255 || !IsValid(dtype)) {
    return absl::InvalidArgumentError(absl::StrCat(field, " is ", value, ", not a known dtype"));
  }
  return dtype;
}

wire::TokenRange ToProto(const TokenRange& range) {
  wire::TokenRange out;
  out.set_lo(range.lo);
  out.set_hi(range.hi);
  return out;
}

TokenRange FromProto(const wire::TokenRange& message) { return {message.lo(), message.hi()}; }

wire::ByteDigest ToProto(const ByteDigest& digest) {
  wire::ByteDigest out;
  out.set_low(digest.low);
  out.set_high(digest.high);
  return out;
}

ByteDigest FromProto(const wire::ByteDigest& message) { return {message.low(), message.high()}; }

wire::KvShape ToProto(const KvShape& shape) {
  wire::KvShape out;
  out.set_layers(shape.layers);
  out.set_heads(shape.heads);
  out.set_kv_heads(shape.kv_heads);
  out.set_head_dim(shape.head_dim);
  out.set_dtype(static_cast<wire::DType>(shape.dtype));
  return out;
}

absl::StatusOr<KvShape> FromProto(const wire::KvShape& message) {
  KvShape shape;
  shape.layers = message.layers();
  shape.heads = message.heads();
  shape.kv_heads = message.kv_heads();
  shape.head_dim = message.head_dim();
  QUARRY_ASSIGN_OR_RETURN(shape.dtype, DTypeFromWire(message.dtype(), "shape dtype"));
  return shape;
}

wire::ModelSpec ToProto(const ModelSpec& spec) {
  wire::ModelSpec out;
  out.set_name(spec.name);
  *out.mutable_shape() = ToProto(spec.shape);
  out.set_weights_digest(ToBytes(spec.weights));
  out.set_tokenizer_digest(ToBytes(spec.tokenizer));
  for (const AdapterDigest& a : spec.adapters) out.add_adapter_digests(ToBytes(a));
  wire::RopeSpec* rope = out.mutable_rope();
  rope->mutable_inv_freq()->Add(spec.rope.inv_freq.begin(), spec.rope.inv_freq.end());
  rope->set_attention_scale(spec.rope.attention_scale);
  rope->set_rotary_dim(spec.rope.rotary_dim);
  rope->set_interleaved(spec.rope.interleaved);
  rope->set_dtype(static_cast<wire::DType>(spec.rope.dtype));
  rope->set_regime(static_cast<wire::RopeRegime>(spec.rope.regime));
  rope->set_regime_max_tokens(spec.rope.regime_max_tokens);
  return out;
}

absl::StatusOr<ModelSpec> FromProto(const wire::ModelSpec& message) {
  ModelSpec spec;
  spec.name = message.name();
  QUARRY_ASSIGN_OR_RETURN(spec.shape, FromProto(message.shape()));
  QUARRY_ASSIGN_OR_RETURN(spec.weights,
                          DigestFromBytes<WeightsDigest>(message.weights_digest(), "weights_digest",
                                                         EmptyDigest::kRefused));
  QUARRY_ASSIGN_OR_RETURN(
      spec.tokenizer, DigestFromBytes<TokenizerDigest>(message.tokenizer_digest(),
                                                       "tokenizer_digest", EmptyDigest::kIsZero));
  QUARRY_ASSIGN_OR_RETURN(
      spec.adapters, DigestList<AdapterDigest>(message.adapter_digests(), "adapter_digests"));
  QUARRY_ASSIGN_OR_RETURN(spec.rope, RopeFromWire(message.rope()));
  QUARRY_RETURN_IF_ERROR(ValidateModelSpec(spec));
  return spec;
}

wire::OpenRequest ToProto(const OpenRequest& request) {
  wire::OpenRequest out;
  *out.mutable_model() = ToProto(request.spec);
  out.mutable_tokens()->Add(request.tokens.begin(), request.tokens.end());
  for (const InputDigest& d : request.inputs) out.add_input_digests(ToBytes(d));
  out.set_max_tokens(request.max_tokens);
  out.set_recipe(ToBytes(request.recipe.digest));
  for (const NumericRecipe& r : request.accepts) out.add_accepted_recipes(ToBytes(r.digest));
  out.set_reuse_shifted(request.reuse_shifted);
  if (request.max_load_ms.has_value()) out.set_max_load_ms(*request.max_load_ms);
  return out;
}

absl::StatusOr<OpenRequest> FromProto(const wire::OpenRequest& message) {
  OpenRequest request;
  QUARRY_ASSIGN_OR_RETURN(request.spec, FromProto(message.model()));
  request.tokens.assign(message.tokens().begin(), message.tokens().end());
  QUARRY_ASSIGN_OR_RETURN(request.inputs,
                          DigestList<InputDigest>(message.input_digests(), "input_digests"));
  request.max_tokens = message.max_tokens();
  QUARRY_ASSIGN_OR_RETURN(request.recipe, RecipeFromWire(message.recipe(), "recipe"));
  if (message.accepted_recipes_size() > kMaxListEntries) {
    return TooMany("accepted_recipes", message.accepted_recipes_size());
  }
  for (const std::string& bytes : message.accepted_recipes()) {
    QUARRY_ASSIGN_OR_RETURN(NumericRecipe r, RecipeFromWire(bytes, "accepted_recipes"));
    request.accepts.push_back(r);
  }
  if (request.accepts.empty()) request.accepts.push_back(request.recipe);
  request.reuse_shifted = message.reuse_shifted();
  if (message.has_max_load_ms()) {
    if (!(message.max_load_ms() >= 0)) {
      return absl::InvalidArgumentError(
          absl::StrCat("max_load_ms ", message.max_load_ms(), " is no time"));
    }
    request.max_load_ms = message.max_load_ms();
  }
  return request;
}

wire::LongestPrefixReply ToProto(const LongestPrefix& prefix) {
  wire::LongestPrefixReply out;
  out.set_tokens(prefix.tokens);
  for (const BlockId& id : prefix.blocks) out.add_blocks(ToBytes(id));
  out.set_ram_tokens(prefix.ram_tokens);
  out.set_load_bytes(prefix.load_bytes);
  out.set_expected_load_ms(prefix.expected_load_ms);
  return out;
}

absl::StatusOr<LongestPrefix> FromProto(const wire::LongestPrefixReply& message) {
  LongestPrefix prefix;
  prefix.tokens = message.tokens();
  QUARRY_ASSIGN_OR_RETURN(prefix.blocks, DigestList<BlockId>(message.blocks(), "blocks"));
  prefix.ram_tokens = message.ram_tokens();
  prefix.load_bytes = message.load_bytes();
  prefix.expected_load_ms = message.expected_load_ms();
  return prefix;
}

wire::OpenReply ToProto(const OpenResult& result) {
  wire::OpenReply out;
  out.set_context(result.context.value);
  out.set_reused_tokens(result.reused_tokens);
  for (const BlockId& id : result.reused_blocks) out.add_reused_blocks(ToBytes(id));
  out.set_unloaded_tokens(result.unloaded_tokens);
  out.set_expected_load_ms(result.expected_load_ms);
  out.set_reused_dense(result.reused_dense);
  for (const ShiftedRange& range : result.shifted) {
    wire::ShiftedRange* const message = out.add_shifted();
    *message->mutable_tokens() = ToProto(range.tokens);
    message->set_shift(range.shift);
  }
  return out;
}

absl::StatusOr<OpenResult> FromProto(const wire::OpenReply& message) {
  OpenResult result;
  result.context.value = message.context();
  result.reused_tokens = message.reused_tokens();
  QUARRY_ASSIGN_OR_RETURN(result.reused_blocks,
                          DigestList<BlockId>(message.reused_blocks(), "reused_blocks"));
  result.unloaded_tokens = message.unloaded_tokens();
  result.expected_load_ms = message.expected_load_ms();
  result.reused_dense = message.reused_dense();
  for (const wire::ShiftedRange& range : message.shifted()) {
    result.shifted.push_back({FromProto(range.tokens()), range.shift()});
  }
  return result;
}

absl::StatusOr<AppendRequest> FromProto(const wire::AppendRequest& message) {
  AppendRequest request;
  request.context.value = message.context();
  request.layer = message.layer();
  request.first_kv_head = message.first_kv_head();
  request.kv_heads = message.kv_heads();
  request.range = FromProto(message.range());
  if (message.k().size() != message.v().size()) {
    return absl::InvalidArgumentError(absl::StrCat("append of layer ", request.layer, ": k has ",
                                                   message.k().size(), " bytes, v has ",
                                                   message.v().size()));
  }
  request.k = message.k().data();
  request.v = message.v().data();
  request.new_token_ids = {message.new_token_ids().data(),
                           static_cast<size_t>(message.new_token_ids_size())};
  request.query_samples = message.query_samples().data();
  request.query_positions = {message.query_positions().data(),
                             static_cast<size_t>(message.query_positions_size())};
  return request;
}

wire::AppendRequest ToProto(const AppendRequest& request, size_t k_bytes, size_t v_bytes,
                            size_t samples_floats) {
  wire::AppendRequest out;
  out.set_context(request.context.value);
  out.set_layer(request.layer);
  out.set_first_kv_head(request.first_kv_head);
  out.set_kv_heads(request.kv_heads);
  *out.mutable_range() = ToProto(request.range);
  out.set_k(request.k, k_bytes);
  out.set_v(request.v, v_bytes);
  out.mutable_new_token_ids()->Add(request.new_token_ids.begin(), request.new_token_ids.end());
  out.mutable_query_samples()->Add(request.query_samples, request.query_samples + samples_floats);
  out.mutable_query_positions()->Add(request.query_positions.begin(),
                                     request.query_positions.end());
  return out;
}

wire::ForkRequest ToProto(const ForkRequest& request) {
  wire::ForkRequest out;
  out.set_context(request.context.value);
  out.set_tokens(request.tokens);
  out.set_max_tokens(request.max_tokens);
  out.set_recipe(ToBytes(request.recipe.digest));
  return out;
}

absl::StatusOr<ForkRequest> FromProto(const wire::ForkRequest& message) {
  ForkRequest request;
  request.context.value = message.context();
  request.tokens = message.tokens();
  request.max_tokens = message.max_tokens();
  QUARRY_ASSIGN_OR_RETURN(request.recipe, RecipeFromWire(message.recipe(), "recipe"));
  return request;
}

wire::ContextInfo ToProto(const ContextInfo& info) {
  wire::ContextInfo out;
  out.set_context(info.context.value);
  out.set_model(info.model);
  *out.mutable_shape() = ToProto(info.shape);
  out.set_tokens(info.tokens);
  out.set_known_tokens(info.known_tokens);
  out.set_shared_tokens(info.shared_tokens);
  out.set_max_tokens(info.max_tokens);
  out.set_sealed(info.sealed);
  out.set_private_bytes(info.private_bytes);
  out.set_shared_bytes(info.shared_bytes);
  out.set_shifted_tokens(info.shifted_tokens);
  return out;
}

absl::StatusOr<ContextInfo> FromProto(const wire::ContextInfo& message) {
  ContextInfo info;
  info.context.value = message.context();
  info.model = message.model();
  QUARRY_ASSIGN_OR_RETURN(info.shape, FromProto(message.shape()));
  info.tokens = message.tokens();
  info.known_tokens = message.known_tokens();
  info.shared_tokens = message.shared_tokens();
  info.max_tokens = message.max_tokens();
  info.sealed = message.sealed();
  info.private_bytes = message.private_bytes();
  info.shared_bytes = message.shared_bytes();
  info.shifted_tokens = message.shifted_tokens();
  return info;
}

wire::PinRequest ToProto(const PinRequest& request) {
  wire::PinRequest out;
  out.set_name(request.name);
  for (const BlockId& id : request.blocks) out.add_blocks(ToBytes(id));
  out.set_context(request.context.value_or(ContextId{}).value);
  out.set_ttl_ms(request.ttl_ms);
  return out;
}

absl::StatusOr<PinRequest> FromProto(const wire::PinRequest& message) {
  PinRequest request;
  request.name = message.name();
  QUARRY_ASSIGN_OR_RETURN(request.blocks, DigestList<BlockId>(message.blocks(), "blocks"));
  if (message.context() != 0) request.context = ContextId{message.context()};
  request.ttl_ms = message.ttl_ms();
  return request;
}

wire::FlushRequest ToProto(const FlushRequest& request) {
  wire::FlushRequest out;
  out.set_whole_tenant(request.whole_tenant);
  out.set_context(request.context.value_or(ContextId{}).value);
  for (const BlockId& id : request.blocks) out.add_blocks(ToBytes(id));
  return out;
}

absl::StatusOr<FlushRequest> FromProto(const wire::FlushRequest& message) {
  FlushRequest request;
  request.whole_tenant = message.whole_tenant();
  if (message.context() != 0) request.context = ContextId{message.context()};
  QUARRY_ASSIGN_OR_RETURN(request.blocks, DigestList<BlockId>(message.blocks(), "blocks"));
  return request;
}

wire::FlushReply ToProto(const FlushResult& result) {
  wire::FlushReply out;
  out.set_durable_blocks(result.durable_blocks);
  out.set_durable_bytes(result.durable_bytes);
  out.set_leading_blocks(result.leading_blocks);
  out.set_pending_blocks(result.pending_blocks);
  out.set_refused_blocks(result.refused_blocks);
  out.set_missing_blocks(result.missing_blocks);
  out.set_refusal(result.refusal);
  out.set_tokens(result.tokens);
  return out;
}

FlushResult FromProto(const wire::FlushReply& message) {
  FlushResult result;
  result.durable_blocks = message.durable_blocks();
  result.durable_bytes = message.durable_bytes();
  result.leading_blocks = message.leading_blocks();
  result.pending_blocks = message.pending_blocks();
  result.refused_blocks = message.refused_blocks();
  result.missing_blocks = message.missing_blocks();
  result.refusal = message.refusal();
  result.tokens = message.tokens();
  return result;
}

wire::PurgeRequest ToProto(const PurgeRequest& request) {
  wire::PurgeRequest out;
  out.set_whole_tenant(request.whole_tenant);
  if (request.name_space) out.set_namespace_digest(ToBytes(*request.name_space));
  for (const BlockId& id : request.blocks) out.add_blocks(ToBytes(id));
  return out;
}

absl::StatusOr<PurgeRequest> FromProto(const wire::PurgeRequest& message) {
  PurgeRequest request;
  request.whole_tenant = message.whole_tenant();
  if (!message.namespace_digest().empty()) {
    QUARRY_ASSIGN_OR_RETURN(
        request.name_space, DigestFromBytes<NamespaceDigest>(message.namespace_digest(),
                                                             "namespace_digest",
                                                             EmptyDigest::kRefused));
  }
  QUARRY_ASSIGN_OR_RETURN(request.blocks, DigestList<BlockId>(message.blocks(), "blocks"));
  int set = (request.whole_tenant ? 1 : 0) + (request.name_space ? 1 : 0) +
            (request.blocks.empty() ? 0 : 1);
  if (set != 1) {
    return absl::InvalidArgumentError(absl::StrCat(
        "purge sets ", set, " of whole_tenant, namespace_digest and blocks, must set exactly one"));
  }
  return request;
}

}  // namespace quarry
