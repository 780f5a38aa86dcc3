// The only place where wire messages meet plain types. FromProto validates sizes and enums and
// names the field that is wrong (InvalidArgument); it does not check what only the engine knows.
#pragma once

#include "absl/status/statusor.h"
#include "proto/audit_types.h"
#include "proto/kv_types.h"
#include "proto/retrieval_types.h"
#include "quarry/v1/admin.pb.h"
#include "quarry/v1/kv_store.pb.h"
#include "quarry/v1/retrieval.pb.h"

namespace quarry {

namespace wire = ::quarry::v1;

// Lists longer than this in one message are refused.
inline constexpr int kMaxListEntries = 1 << 20;

template <typename Tag>
std::string ToBytes(const Digest<Tag>& d) {
  return std::string(reinterpret_cast<const char*>(d.bytes.data()), d.bytes.size());
}
// An empty string gives the all-zero digest when `may_be_empty`.
enum class EmptyDigest { kRefused, kIsZero };
template <typename D>
absl::StatusOr<D> DigestFromBytes(const std::string& bytes, const char* field, EmptyDigest empty) {
  D d;
  if (bytes.empty() && empty == EmptyDigest::kIsZero) return d;
  if (bytes.size() != d.bytes.size()) {
    return absl::InvalidArgumentError(std::string(field) + " has " + std::to_string(bytes.size()) +
                                      " bytes, must have 32");
  }
  std::memcpy(d.bytes.data(), bytes.data(), d.bytes.size());
  return d;
}

absl::StatusOr<DType> DTypeFromWire(int value, const char* field);
wire::TokenRange ToProto(const TokenRange& range);
TokenRange FromProto(const wire::TokenRange& message);
wire::ByteDigest ToProto(const ByteDigest& digest);
ByteDigest FromProto(const wire::ByteDigest& message);

wire::ModelSpec ToProto(const ModelSpec& spec);
absl::StatusOr<ModelSpec> FromProto(const wire::ModelSpec& message);
wire::KvShape ToProto(const KvShape& shape);
absl::StatusOr<KvShape> FromProto(const wire::KvShape& message);

wire::OpenRequest ToProto(const OpenRequest& request);
absl::StatusOr<OpenRequest> FromProto(const wire::OpenRequest& message);
wire::LongestPrefixReply ToProto(const LongestPrefix& prefix);
absl::StatusOr<LongestPrefix> FromProto(const wire::LongestPrefixReply& message);
wire::OpenReply ToProto(const OpenResult& result);
absl::StatusOr<OpenResult> FromProto(const wire::OpenReply& message);

// The plain request borrows the message's buffers: the message must outlive it.
absl::StatusOr<AppendRequest> FromProto(const wire::AppendRequest& message);
// k_bytes, v_bytes: sizes of the request's buffers; samples_floats of its query samples.
wire::AppendRequest ToProto(const AppendRequest& request, size_t k_bytes, size_t v_bytes,
                            size_t samples_floats);

wire::ForkRequest ToProto(const ForkRequest& request);
absl::StatusOr<ForkRequest> FromProto(const wire::ForkRequest& message);
wire::ContextInfo ToProto(const ContextInfo& info);
absl::StatusOr<ContextInfo> FromProto(const wire::ContextInfo& message);
wire::PinRequest ToProto(const PinRequest& request);
absl::StatusOr<PinRequest> FromProto(const wire::PinRequest& message);
wire::FlushRequest ToProto(const FlushRequest& request);
absl::StatusOr<FlushRequest> FromProto(const wire::FlushRequest& message);
wire::FlushReply ToProto(const FlushResult& result);
FlushResult FromProto(const wire::FlushReply& message);
wire::PurgeRequest ToProto(const PurgeRequest& request);
absl::StatusOr<PurgeRequest> FromProto(const wire::PurgeRequest& message);

wire::HeadAudit ToProto(const HeadAudit& audit);
absl::StatusOr<HeadAudit> FromProto(const wire::HeadAudit& message);

wire::Budget ToProto(const Budget& budget);
absl::StatusOr<Budget> FromProto(const wire::Budget& message);

// The plain row borrows the message's buffers. Sizes are checked against each other here as far
// as the message alone allows; k and v sizes are returned for the engine's shape check.
struct RowFromWire {
  AttendRow row;
  size_t q_bytes = 0, k_bytes = 0, v_bytes = 0;
};
absl::StatusOr<RowFromWire> FromProto(const wire::AttendRow& message);
wire::AttendRow ToProto(const AttendRow& row, uint32_t head_dim, uint32_t group, DType kv_dtype);
wire::AttendAnswer ToProto(const AttendAnswer& answer);
// Fills answer (o and lse must have the message's sizes).
absl::Status FromProto(const wire::AttendAnswer& message, AttendAnswer* answer);
wire::TopKReply ToProto(const TopKAnswer& answer);
absl::StatusOr<TopKAnswer> FromProto(const wire::TopKReply& message);

}  // namespace quarry
