#include "daemon/call_dispatch.h"

#include <climits>

#include "absl/strings/str_cat.h"
#include "daemon/call_handlers.h"
#include "proto/shm_layout.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

template <typename Request, typename Reply>
absl::StatusOr<std::string> Run(const ServiceParts& parts, const Caller& caller,
                                std::string_view bytes) {
  Request request;
  if (bytes.size() > INT_MAX ||
      !request.ParseFromArray(bytes.data(), static_cast<int>(bytes.size()))) {
    return absl::InvalidArgumentError(
        absl::StrCat(bytes.size(), " bytes are no ", Request::descriptor()->full_name()));
  }
  Reply reply;
  QUARRY_RETURN_IF_ERROR(Call(parts, caller, request, &reply));
  const size_t reply_bytes = reply.ByteSizeLong();
  if (reply_bytes > caller.max_reply_bytes) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "the ", Reply::descriptor()->full_name(), " has ", reply_bytes, " bytes, more than the ",
        caller.max_reply_bytes, " a message carries; ask for less at once"));
  }
  return reply.SerializeAsString();
}

}  // namespace

absl::StatusOr<std::string> DispatchCall(const ServiceParts& parts, const Caller& caller,
                                         uint32_t method, std::string_view in) {
  using shm::Method;
  switch (static_cast<Method>(method)) {
    case Method::kOpen:
      return Run<v1::OpenRequest, v1::OpenReply>(parts, caller, in);
    case Method::kSeal:
      return Run<v1::SealRequest, v1::SealReply>(parts, caller, in);
    case Method::kFork:
      return Run<v1::ForkRequest, v1::ForkReply>(parts, caller, in);
    case Method::kClose:
      return Run<v1::CloseRequest, v1::CloseReply>(parts, caller, in);
    case Method::kRead:
      return Run<v1::ReadRequest, v1::ReadReply>(parts, caller, in);
    case Method::kExists:
      return Run<v1::ExistsRequest, v1::ExistsReply>(parts, caller, in);
    case Method::kLongestPrefix:
      return Run<v1::LongestPrefixRequest, v1::LongestPrefixReply>(parts, caller, in);
    case Method::kPin:
      return Run<v1::PinRequest, v1::PinReply>(parts, caller, in);
    case Method::kUnpin:
      return Run<v1::UnpinRequest, v1::UnpinReply>(parts, caller, in);
    case Method::kPurge:
      return Run<v1::PurgeRequest, v1::PurgeReply>(parts, caller, in);
    case Method::kPrefetch:
      return Run<v1::PrefetchRequest, v1::PrefetchReply>(parts, caller, in);
    case Method::kFlush:
      return Run<v1::FlushRequest, v1::FlushReply>(parts, caller, in);
    case Method::kTopK:
      return Run<v1::TopKRequest, v1::TopKReply>(parts, caller, in);
    case Method::kStatus:
      return Run<v1::StatusRequest, v1::StatusReply>(parts, caller, in);
    case Method::kStatistics:
      return Run<v1::StatisticsRequest, v1::StatisticsReply>(parts, caller, in);
    case Method::kAudit:
      return Run<v1::AuditRequest, v1::AuditReply>(parts, caller, in);
    case Method::kDrain:
      return Run<v1::DrainRequest, v1::DrainReply>(parts, caller, in);
    case Method::kListContexts:
      return Run<v1::ListContextsRequest, v1::ListContextsReply>(parts, caller, in);
    case Method::kListBlocks:
      return Run<v1::ListBlocksRequest, v1::ListBlocksReply>(parts, caller, in);
    case Method::kDeclareTokens:
      return Run<v1::DeclareTokensRequest, v1::DeclareTokensReply>(parts, caller, in);
  }
  return absl::UnimplementedError(absl::StrCat("method ", method, " is unknown to this version"));
}

}  // namespace quarry
