// The unary methods of the services, typed: one function per method, used by the gRPC services
// and by DispatchCall. Each checks the message, calls the engine and fills the reply.
#pragma once

#include "absl/status/status.h"
#include "daemon/call_dispatch.h"
#include "quarry/v1/admin.pb.h"
#include "quarry/v1/kv_store.pb.h"
#include "quarry/v1/retrieval.pb.h"

namespace quarry {

namespace v1 = ::quarry::v1;

absl::Status Call(const ServiceParts&, const Caller&, const v1::OpenRequest&, v1::OpenReply*);
absl::Status Call(const ServiceParts&, const Caller&, const v1::DeclareTokensRequest&,
                  v1::DeclareTokensReply*);
absl::Status Call(const ServiceParts&, const Caller&, const v1::SealRequest&, v1::SealReply*);
absl::Status Call(const ServiceParts&, const Caller&, const v1::ForkRequest&, v1::ForkReply*);
absl::Status Call(const ServiceParts&, const Caller&, const v1::CloseRequest&, v1::CloseReply*);
absl::Status Call(const ServiceParts&, const Caller&, const v1::ListContextsRequest&,
                  v1::ListContextsReply*);
absl::Status Call(const ServiceParts&, const Caller&, const v1::ReadRequest&, v1::ReadReply*);
absl::Status Call(const ServiceParts&, const Caller&, const v1::LongestPrefixRequest&,
                  v1::LongestPrefixReply*);
absl::Status Call(const ServiceParts&, const Caller&, const v1::PrefetchRequest&,
                  v1::PrefetchReply*);
absl::Status Call(const ServiceParts&, const Caller&, const v1::ExistsRequest&, v1::ExistsReply*);
absl::Status Call(const ServiceParts&, const Caller&, const v1::PinRequest&, v1::PinReply*);
absl::Status Call(const ServiceParts&, const Caller&, const v1::UnpinRequest&, v1::UnpinReply*);
absl::Status Call(const ServiceParts&, const Caller&, const v1::PurgeRequest&, v1::PurgeReply*);
absl::Status Call(const ServiceParts&, const Caller&, const v1::FlushRequest&, v1::FlushReply*);
absl::Status Call(const ServiceParts&, const Caller&, const v1::ListBlocksRequest&,
                  v1::ListBlocksReply*);
absl::Status Call(const ServiceParts&, const Caller&, const v1::TopKRequest&, v1::TopKReply*);
absl::Status Call(const ServiceParts&, const Caller&, const v1::StatusRequest&, v1::StatusReply*);
absl::Status Call(const ServiceParts&, const Caller&, const v1::StatisticsRequest&,
                  v1::StatisticsReply*);
absl::Status Call(const ServiceParts&, const Caller&, const v1::AuditRequest&, v1::AuditReply*);
// PermissionDenied unless the caller is the daemon's own user or a configured administrator.
absl::Status Call(const ServiceParts&, const Caller&, const v1::DrainRequest&, v1::DrainReply*);

}  // namespace quarry
