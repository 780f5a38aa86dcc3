#include "daemon/call_handlers.h"

#include <unistd.h>

#include <span>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "proto/attend_shape.h"
#include "proto/convert.h"
#include "proto/identity.h"
#include "proto/shm_layout.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

absl::Status CheckReplyBytes(std::string_view what, uint64_t bytes, const Caller& caller) {
  if (bytes <= caller.max_reply_bytes) return absl::OkStatus();
  return absl::ResourceExhaustedError(
      absl::StrCat("the reply to ", absl::string_view(what.data(), what.size()), " has ", bytes,
                   " bytes, more than the ", caller.max_reply_bytes,
                   " a message carries; ask for less at once"));
}

// Messages name the offending key by its place.
absl::Status CheckKeys(const google::protobuf::RepeatedPtrField<std::string>& keys) {
  if (keys.size() > kMaxListEntries) {
    return absl::InvalidArgumentError(
        absl::StrCat(keys.size(), " keys in one request, at most ", kMaxListEntries, " are taken"));
  }
  for (int i = 0; i < keys.size(); ++i) {
    if (keys[i].empty() || keys[i].size() > shm::kMaxNameBytes) {
      return absl::InvalidArgumentError(absl::StrCat(
          "key ", i, " has ", keys[i].size(), " bytes; 1 to ", shm::kMaxNameBytes, " are allowed"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status Call(const ServiceParts& parts, const Caller& caller, const v1::OpenRequest& in,
                  v1::OpenReply* out) {
  QUARRY_ASSIGN_OR_RETURN(const OpenRequest request, FromProto(in));
  if (request.reuse_shifted && !caller.flags_shifted) {
    return absl::FailedPreconditionError(
        "reuse at other positions needs shared-memory version 3, in which answers say so");
  }
  QUARRY_ASSIGN_OR_RETURN(const OpenResult result, parts.engine.Open(caller.session, request));
  *out = ToProto(result);
  return absl::OkStatus();
}

absl::Status Call(const ServiceParts& parts, const Caller& caller,
                  const v1::DeclareTokensRequest& in, v1::DeclareTokensReply*) {
  return parts.engine.DeclareTokens(caller.session, {in.context()},
                                    {in.tokens().data(), static_cast<size_t>(in.tokens_size())});
}

absl::Status Call(const ServiceParts& parts, const Caller& caller, const v1::SealRequest& in,
                  v1::SealReply* out) {
  QUARRY_ASSIGN_OR_RETURN(const ContextInfo info,
                          parts.engine.Seal(caller.session, {in.context()}));
  *out->mutable_info() = ToProto(info);
  return absl::OkStatus();
}

absl::Status Call(const ServiceParts& parts, const Caller& caller, const v1::ForkRequest& in,
                  v1::ForkReply* out) {
  QUARRY_ASSIGN_OR_RETURN(const ForkRequest request, FromProto(in));
  QUARRY_ASSIGN_OR_RETURN(const ContextId context, parts.engine.Fork(caller.session, request));
  out->set_context(context.value);
  return absl::OkStatus();
}

absl::Status Call(const ServiceParts& parts, const Caller& caller, const v1::CloseRequest& in,
                  v1::CloseReply*) {
  return parts.engine.Close(caller.session, {in.context()});
}

absl::Status Call(const ServiceParts& parts, const Caller& caller, const v1::ListContextsRequest&,
                  v1::ListContextsReply* out) {
  QUARRY_ASSIGN_OR_RETURN(const std::vector<ContextInfo> contexts,
                          parts.engine.ListContexts(caller.session));
  for (const ContextInfo& info : contexts) *out->add_contexts() = ToProto(info);
  return absl::OkStatus();
}

absl::Status Call(const ServiceParts& parts, const Caller& caller, const v1::ReadRequest& in,
                  v1::ReadReply* out) {
  const ContextId context{in.context()};
  QUARRY_ASSIGN_OR_RETURN(const ContextInfo info, parts.engine.Info(caller.session, context));
  const TokenRange range{in.range().lo(), in.range().hi()};
  if (range.lo > range.hi || range.hi > info.max_tokens) {
    return absl::InvalidArgumentError(absl::StrCat("range [", range.lo, ", ", range.hi,
                                                   ") of a context of ", info.tokens, " tokens"));
  }
  const uint64_t part = info.shape.kv_heads * info.shape.vector_bytes() * range.size();
  QUARRY_RETURN_IF_ERROR(CheckReplyBytes("Read", 2 * part + 32, caller));
  out->mutable_k()->resize(part);
  out->mutable_v()->resize(part);
  const auto bytes = [](std::string* s) {
    return std::as_writable_bytes(std::span<char>(s->data(), s->size()));
  };
  return parts.engine.Read(caller.session, context, in.layer(), range, bytes(out->mutable_k()),
                           bytes(out->mutable_v()));
}

absl::Status Call(const ServiceParts& parts, const Caller& caller,
                  const v1::LongestPrefixRequest& in, v1::LongestPrefixReply* out) {
  QUARRY_ASSIGN_OR_RETURN(const OpenRequest request, FromProto(in.open()));
  QUARRY_ASSIGN_OR_RETURN(const LongestPrefix prefix,
                          parts.engine.FindLongestPrefix(caller.session, request));
  *out = ToProto(prefix);
  return absl::OkStatus();
}

absl::Status Call(const ServiceParts& parts, const Caller& caller, const v1::PrefetchRequest& in,
                  v1::PrefetchReply* out) {
  QUARRY_ASSIGN_OR_RETURN(const OpenRequest request, FromProto(in.open()));
  QUARRY_ASSIGN_OR_RETURN(const uint64_t blocks, parts.engine.Prefetch(caller.session, request));
  out->set_blocks(blocks);
  return absl::OkStatus();
}

absl::Status Call(const ServiceParts& parts, const Caller& caller, const v1::ExistsRequest& in,
                  v1::ExistsReply* out) {
  QUARRY_RETURN_IF_ERROR(CheckKeys(in.keys()));
  const std::vector<std::string> keys(in.keys().begin(), in.keys().end());
  QUARRY_ASSIGN_OR_RETURN(const std::vector<bool> exists,
                          parts.engine.Exists(caller.session, in.engine_namespace(), keys));
  for (const bool e : exists) out->add_exists(e);
  return absl::OkStatus();
}

absl::Status Call(const ServiceParts& parts, const Caller& caller, const v1::PinRequest& in,
                  v1::PinReply* out) {
  QUARRY_ASSIGN_OR_RETURN(const PinRequest request, FromProto(in));
  QUARRY_ASSIGN_OR_RETURN(const uint64_t bytes, parts.engine.Pin(caller.session, request));
  out->set_bytes(bytes);
  return absl::OkStatus();
}

absl::Status Call(const ServiceParts& parts, const Caller& caller, const v1::UnpinRequest& in,
                  v1::UnpinReply*) {
  return parts.engine.Unpin(caller.session, in.name());
}

absl::Status Call(const ServiceParts& parts, const Caller& caller, const v1::PurgeRequest& in,
                  v1::PurgeReply* out) {
  QUARRY_ASSIGN_OR_RETURN(const PurgeRequest request, FromProto(in));
  QUARRY_ASSIGN_OR_RETURN(const uint64_t blocks, parts.engine.Purge(caller.session, request));
  out->set_blocks(blocks);
  return absl::OkStatus();
}

absl::Status Call(const ServiceParts& parts, const Caller& caller, const v1::FlushRequest& in,
                  v1::FlushReply* out) {
  QUARRY_ASSIGN_OR_RETURN(const FlushRequest request, FromProto(in));
  QUARRY_ASSIGN_OR_RETURN(const FlushResult result, parts.engine.Flush(caller.session, request));
  *out = ToProto(result);
  return absl::OkStatus();
}

absl::Status Call(const ServiceParts& parts, const Caller& caller, const v1::ListBlocksRequest& in,
                  v1::ListBlocksReply* out) {
  QUARRY_ASSIGN_OR_RETURN(const std::vector<BlockInfo> blocks,
                          parts.engine.ListBlocks(caller.session, in.limit()));
  for (const BlockInfo& block : blocks) {
    v1::BlockInfo& message = *out->add_blocks();
    message.set_id(ToBytes(block.id));
    message.set_parent(ToBytes(block.parent));
    message.set_namespace_digest(ToBytes(block.name_space));
    message.set_bytes(block.bytes);
    message.set_state(
        IsIndexNamespace(block.name_space) ? "INDEX" : std::string(BlockStateName(block.state)));
    message.set_leases(block.leases);
    for (const std::string& pin : block.pins) message.add_pins(pin);
    message.set_children(block.children);
    message.set_in_ram(block.in_ram);
    message.set_on_disk(block.on_disk);
  }
  return absl::OkStatus();
}

absl::Status Call(const ServiceParts& parts, const Caller& caller, const v1::TopKRequest& in,
                  v1::TopKReply* out) {
  QUARRY_ASSIGN_OR_RETURN(const RowFromWire from_wire, FromProto(in.row()));
  const AttendRow& row = from_wire.row;
  QUARRY_ASSIGN_OR_RETURN(const ContextInfo info, parts.engine.Info(caller.session, row.context));
  QUARRY_ASSIGN_OR_RETURN(const AttendRowBytes bytes, BytesOfRow(row, info.shape));
  if (row.has_token) return absl::InvalidArgumentError("top-k stores no token");
  if (from_wire.q_bytes != bytes.q) {
    return absl::InvalidArgumentError(
        absl::StrCat("q has ", from_wire.q_bytes, " bytes, must have ", bytes.q));
  }
  const uint64_t entries = std::min<uint64_t>(in.k(), row.range.size());
  const uint64_t entry_bytes = 10 + (in.gather() ? 2 * info.shape.vector_bytes() : 0);
  QUARRY_RETURN_IF_ERROR(CheckReplyBytes("TopK", row.heads * (32 + entries * entry_bytes), caller));
  const TopKAnswer answer = parts.engine.TopK(caller.session, row, in.k(), in.gather());
  QUARRY_RETURN_IF_ERROR(answer.status);
  *out = ToProto(answer);
  return absl::OkStatus();
}

absl::Status Call(const ServiceParts& parts, const Caller& caller, const v1::StatusRequest&,
                  v1::StatusReply* out) {
  out->set_version(parts.version);
  out->set_pid(static_cast<uint64_t>(getpid()));
  out->set_uptime_seconds(parts.uptime_seconds());
  out->set_draining(parts.draining());
  out->set_tenant(caller.peer.tenant);
  out->set_simd_level(parts.simd_level);
  out->set_shm_min_version(shm::kMinVersion);
  out->set_shm_max_version(shm::kMaxVersion);
  return absl::OkStatus();
}

absl::Status Call(const ServiceParts& parts, const Caller&, const v1::StatisticsRequest&,
                  v1::StatisticsReply* out) {
  for (const auto& [name, value] : parts.metrics.Flat()) (*out->mutable_values())[name] = value;
  return absl::OkStatus();
}

absl::Status Call(const ServiceParts& parts, const Caller& caller, const v1::AuditRequest&,
                  v1::AuditReply* out) {
  QUARRY_ASSIGN_OR_RETURN(const std::vector<HeadAudit> audits, parts.engine.Audits(caller.session));
  for (const HeadAudit& audit : audits) *out->add_heads() = ToProto(audit);
  return absl::OkStatus();
}

absl::Status Call(const ServiceParts& parts, const Caller& caller, const v1::DrainRequest&,
                  v1::DrainReply*) {
  if (!caller.peer.admin) {
    return absl::PermissionDeniedError(
        absl::StrCat("Drain needs the daemon's own user or one of admin.users; the caller is of "
                     "tenant ",
                     caller.peer.tenant));
  }
  parts.request_drain();
  return absl::OkStatus();
}

}  // namespace quarry
