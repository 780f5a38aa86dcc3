#include "gpu/kv_service.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

class ClientKvService final : public KvService {
 public:
  explicit ClientKvService(std::unique_ptr<Client> client) : client_(std::move(client)) {}

  absl::StatusOr<OpenResult> Open(const OpenRequest& r) override { return client_->Open(r); }
  absl::Status Append(const AppendRequest& r) override { return client_->Append(r); }
  absl::StatusOr<ContextId> Fork(const ForkRequest& r) override { return client_->Fork(r); }
  absl::Status DeclareTokens(ContextId context, std::span<const uint32_t> ids) override {
    return client_->DeclareTokens(context, ids);
  }
  absl::Status Close(ContextId context) override { return client_->Close(context); }
  absl::Status Read(ContextId context, uint32_t layer, TokenRange range, std::span<std::byte> k,
                    std::span<std::byte> v) override {
    return client_->Read(context, layer, range, k, v);
  }
  absl::StatusOr<std::unique_ptr<PendingAttend>> Attend(std::span<const AttendRow> rows,
                                                        std::span<AttendAnswer> answers) override {
    return client_->AttendAsync(rows, answers);
  }
  std::span<std::byte> channel_memory() override { return client_->channel_memory(); }
  absl::StatusOr<std::unique_ptr<RungAttends>> RingElsewhere(std::span<const AttendRow> rows,
                                                             uint32_t messages) override {
    return client_->RingElsewhere(rows, messages);
  }
  void Arm(bool armed) override { armed ? client_->Arm() : client_->Disarm(); }

  absl::StatusOr<uint64_t> HeldBytes(ContextId context) override {
    QUARRY_ASSIGN_OR_RETURN(std::vector<ContextInfo> contexts, client_->ListContexts());
    for (const ContextInfo& info : contexts) {
      if (info.context == context) return info.private_bytes + info.shared_bytes;
    }
    return absl::NotFoundError(absl::StrCat("context ", context.value, " is not there"));
  }

 private:
  const std::unique_ptr<Client> client_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<RungAttends>> KvService::RingElsewhere(std::span<const AttendRow>,
                                                                      uint32_t) {
  return absl::UnimplementedError("this service has no memory for a device to ring in");
}

std::unique_ptr<KvService> MakeKvService(std::unique_ptr<Client> client) {
  return std::make_unique<ClientKvService>(std::move(client));
}

}  // namespace quarry
