// The client over shared memory: every call is a message in a slot of its channel.
#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "client/append_message.h"
#include "client/attend_message.h"
#include "client/calls.h"
#include "client/channel.h"
#include "client/client.h"
#include "client/leased_block.h"
#include "client/shm_rung_attends.h"
#include "proto/byte_digest.h"
#include "proto/convert.h"
#include "proto/status_macros.h"
#include "quarry/v1/admin.pb.h"

namespace quarry {
namespace {

// Room that a protobuf reply needs besides its bytes fields.
constexpr uint64_t kReplyOverhead = 256;

class ShmPendingAttend final : public PendingAttend {
 public:
  ShmPendingAttend(std::shared_ptr<LeaseHome> home, ClientChannel::Slot slot,
                   AttendMessage message, std::span<AttendAnswer> answers)
      : home_(std::move(home)), slot_(slot), message_(std::move(message)), answers_(answers) {}
  ~ShmPendingAttend() override {
    if (!waited_) home_->channel->Abandon(slot_);
  }

  bool Done() const override { return waited_ || home_->channel->Done(slot_); }

  absl::Status Wait() override {
    if (waited_) return status_;
    uint64_t bytes = 0;
    status_ = home_->channel->Wait(slot_, &bytes);
    if (status_.ok()) {
      message_.ReadAnswers(home_->channel->slot_start(slot_), slot_.generation, answers_);
    }
    for (AttendAnswer& answer : answers_) {
      if (!status_.ok()) answer.status = status_;
    }
    home_->channel->Abandon(slot_);
    waited_ = true;
    return status_;
  }

 private:
  const std::shared_ptr<LeaseHome> home_;
  const ClientChannel::Slot slot_;
  const AttendMessage message_;
  const std::span<AttendAnswer> answers_;
  bool waited_ = false;
  absl::Status status_;
};

class ShmClient final : public Client {
 public:
  ShmClient(const ClientOptions& options, std::unique_ptr<ClientChannel> channel)
      : options_(options),
        home_(std::make_shared<LeaseHome>(std::move(channel))),
        channel_(*home_->channel) {}

  const std::string& tenant() const override { return channel_.tenant(); }
  SessionId session() const override { return channel_.session(); }

  absl::StatusOr<OpenResult> Open(const OpenRequest& request) override {
    QUARRY_RETURN_IF_ERROR(ValidateModelSpec(request.spec));
    if (request.reuse_shifted && channel_.version() < 3) {
      return absl::FailedPreconditionError(
          absl::StrCat("reuse at other positions needs shared-memory version 3, quarryd speaks ",
                       channel_.version()));
    }
    QUARRY_ASSIGN_OR_RETURN(wire::OpenReply reply, Call<wire::OpenReply>(channel_, shm::Method::kOpen,
                                                                         ToProto(request)));
    QUARRY_ASSIGN_OR_RETURN(OpenResult result, FromProto(reply));
    Remember(result.context, request.spec.shape);
    return result;
  }

  absl::StatusOr<quarry::LongestPrefix> LongestPrefix(const OpenRequest& request) override {
    QUARRY_RETURN_IF_ERROR(ValidateModelSpec(request.spec));
    wire::LongestPrefixRequest message;
    *message.mutable_open() = ToProto(request);
    QUARRY_ASSIGN_OR_RETURN(
        wire::LongestPrefixReply reply,
        Call<wire::LongestPrefixReply>(channel_, shm::Method::kLongestPrefix, message));
    return FromProto(reply);
  }

  absl::StatusOr<uint64_t> Prefetch(const OpenRequest& request) override {
    QUARRY_RETURN_IF_ERROR(ValidateModelSpec(request.spec));
    wire::PrefetchRequest message;
    *message.mutable_open() = ToProto(request);
    QUARRY_ASSIGN_OR_RETURN(wire::PrefetchReply reply,
                            Call<wire::PrefetchReply>(channel_, shm::Method::kPrefetch, message));
    return reply.blocks();
  }

  absl::Status DeclareTokens(ContextId context, std::span<const uint32_t> ids) override {
    wire::DeclareTokensRequest request;
    request.set_context(context.value);
    request.mutable_tokens()->Add(ids.begin(), ids.end());
    return Call<wire::DeclareTokensReply>(channel_, shm::Method::kDeclareTokens, request).status();
  }

  absl::Status Append(const AppendRequest& request) override {
    QUARRY_ASSIGN_OR_RETURN(KvShape shape, Shape(request.context));
    return SendAppend(channel_, shape, request);
  }

  absl::StatusOr<ContextInfo> Seal(ContextId context) override {
    wire::SealRequest request;
    request.set_context(context.value);
    QUARRY_ASSIGN_OR_RETURN(wire::SealReply reply,
                            Call<wire::SealReply>(channel_, shm::Method::kSeal, request));
    return FromProto(reply.info());
  }

  absl::StatusOr<ContextId> Fork(const ForkRequest& request) override {
    QUARRY_ASSIGN_OR_RETURN(KvShape shape, Shape(request.context));
    QUARRY_ASSIGN_OR_RETURN(
        wire::ForkReply reply,
        Call<wire::ForkReply>(channel_, shm::Method::kFork, ToProto(request)));
    const ContextId fork{reply.context()};
    Remember(fork, shape);
    return fork;
  }

  absl::Status Close(ContextId context) override {
    {
      absl::MutexLock lock(&mutex_);
      shapes_.erase(context.value);
    }
    wire::CloseRequest request;
    request.set_context(context.value);
    return Call<wire::CloseReply>(channel_, shm::Method::kClose, request).status();
  }

  absl::StatusOr<std::vector<ContextInfo>> ListContexts() override {
    QUARRY_ASSIGN_OR_RETURN(wire::ListContextsReply reply,
                            Call<wire::ListContextsReply>(channel_, shm::Method::kListContexts,
                                                          wire::ListContextsRequest()));
    std::vector<ContextInfo> out;
    for (const wire::ContextInfo& message : reply.contexts()) {
      QUARRY_ASSIGN_OR_RETURN(ContextInfo info, FromProto(message));
      out.push_back(std::move(info));
    }
    return out;
  }

  // Of a context of this session, or of another session of the tenant.
  absl::StatusOr<KvShape> Shape(ContextId context) override {
    {
      absl::MutexLock lock(&mutex_);
      auto it = shapes_.find(context.value);
      if (it != shapes_.end()) return it->second;
    }
    QUARRY_ASSIGN_OR_RETURN(std::vector<ContextInfo> contexts, ListContexts());
    for (const ContextInfo& info : contexts) {
      if (info.context != context) continue;
      Remember(context, info.shape);
      return info.shape;
    }
    return absl::NotFoundError(absl::StrCat("context ", context.value, " is not there"));
  }

  absl::Status Read(ContextId context, uint32_t layer, TokenRange range, std::span<std::byte> k,
                    std::span<std::byte> v) override {
    QUARRY_ASSIGN_OR_RETURN(KvShape shape, Shape(context));
    const uint64_t token_bytes = shape.kv_heads * shape.vector_bytes();
    if (k.size() != range.size() * token_bytes || v.size() != k.size()) {
      return absl::InvalidArgumentError(
          absl::StrCat("read of ", range.size(), " tokens into ", k.size(), " and ", v.size(),
                       " bytes, ", range.size() * token_bytes, " each are needed"));
    }
    const uint64_t room = channel_.payload_bytes() - kReplyOverhead;
    const uint32_t step = static_cast<uint32_t>(std::max<uint64_t>(1, room / (2 * token_bytes)));
    for (uint32_t lo = range.lo; lo < range.hi; lo += std::min(step, range.hi - lo)) {
      wire::ReadRequest request;
      request.set_context(context.value);
      request.set_layer(layer);
      request.mutable_range()->set_lo(lo);
      request.mutable_range()->set_hi(lo + std::min(step, range.hi - lo));
      QUARRY_ASSIGN_OR_RETURN(wire::ReadReply reply,
                              Call<wire::ReadReply>(channel_, shm::Method::kRead, request));
      const uint64_t bytes = uint64_t{request.range().hi() - lo} * token_bytes;
      if (reply.k().size() != bytes || reply.v().size() != bytes) {
        return absl::DataLossError(absl::StrCat("read gave ", reply.k().size(), " and ",
                                                reply.v().size(), " bytes, expected ", bytes));
      }
      std::memcpy(k.data() + (lo - range.lo) * token_bytes, reply.k().data(), bytes);
      std::memcpy(v.data() + (lo - range.lo) * token_bytes, reply.v().data(), bytes);
    }
    return absl::OkStatus();
  }

  absl::StatusOr<std::unique_ptr<LeasedBlock>> LeaseContextBlock(ContextId context,
                                                                 uint32_t block) override {
    shm::LeaseHeader header{};
    header.kind = static_cast<uint32_t>(shm::LeaseKind::kContextBlock);
    header.context = context.value;
    header.block = block;
    QUARRY_ASSIGN_OR_RETURN(const std::unique_ptr<PendingLease> pending,
                            AskForLease(home_, header, {}, {}, options_.verify));
    return pending->Wait();
  }

  absl::Status Put(std::string_view engine_namespace, std::string_view key,
                   std::span<const std::byte> bytes) override {
    shm::PutHeader header{};
    header.namespace_bytes = static_cast<uint32_t>(engine_namespace.size());
    header.key_bytes = static_cast<uint32_t>(key.size());
    const uint64_t names = shm::kSlotPayload + sizeof(header);
    header.data_offset = (names + engine_namespace.size() + key.size() + 63) / 64 * 64;
    header.data_bytes = bytes.size();
    const uint64_t request_bytes = header.data_offset - shm::kSlotPayload + bytes.size();
    if (request_bytes > channel_.payload_bytes()) {
      return absl::InvalidArgumentError(
          absl::StrCat("put of ", bytes.size(), " bytes, a slot carries ",
                       channel_.payload_bytes(), "; connect with larger slot_bytes"));
    }
    QUARRY_ASSIGN_OR_RETURN(ClientChannel::Slot slot, channel_.Take());
    std::byte* start = channel_.slot_start(slot);
    char* const names_at = reinterpret_cast<char*>(start + names);
    engine_namespace.copy(names_at, engine_namespace.size());
    key.copy(names_at + engine_namespace.size(), key.size());
    if (options_.verify == ClientOptions::Verify::kAlways) {
      const ByteDigest digest =
          CopyAndDigest(start + header.data_offset, bytes.data(), bytes.size());
      header.digest_low = digest.low;
      header.digest_high = digest.high;
      header.has_digest = 1;
    } else {
      std::copy(bytes.begin(), bytes.end(), start + header.data_offset);
    }
    std::memcpy(start + shm::kSlotPayload, &header, sizeof(header));
    channel_.Submit(slot, shm::Opcode::kPut, request_bytes);
    return Finish(slot);
  }

  absl::StatusOr<std::unique_ptr<LeasedBlock>> Lease(std::string_view engine_namespace,
                                                     std::string_view key) override {
    QUARRY_ASSIGN_OR_RETURN(const std::unique_ptr<PendingLease> pending,
                            LeaseAsync(engine_namespace, key));
    return pending->Wait();
  }

  absl::StatusOr<std::unique_ptr<PendingLease>> LeaseAsync(std::string_view engine_namespace,
                                                           std::string_view key) override {
    shm::LeaseHeader header{};
    header.kind = static_cast<uint32_t>(shm::LeaseKind::kEngineKey);
    return AskForLease(home_, header, engine_namespace, key, options_.verify);
  }

  absl::StatusOr<std::string> Get(std::string_view engine_namespace,
                                  std::string_view key) override {
    QUARRY_ASSIGN_OR_RETURN(std::unique_ptr<LeasedBlock> block, Lease(engine_namespace, key));
    std::string out(block->bytes().size(), '\0');
    QUARRY_RETURN_IF_ERROR(block->CopyTo(0, std::as_writable_bytes(std::span(out))));
    return out;
  }

  absl::StatusOr<std::vector<bool>> Exists(std::string_view engine_namespace,
                                           std::span<const std::string> keys) override {
    wire::ExistsRequest request;
    request.set_engine_namespace(std::string(engine_namespace));
    for (const std::string& key : keys) request.add_keys(key);
    QUARRY_ASSIGN_OR_RETURN(wire::ExistsReply reply,
                            Call<wire::ExistsReply>(channel_, shm::Method::kExists, request));
    if (reply.exists_size() != static_cast<int>(keys.size())) {
      return absl::DataLossError(
          absl::StrCat("exists answered ", reply.exists_size(), " of ", keys.size(), " keys"));
    }
    return std::vector<bool>(reply.exists().begin(), reply.exists().end());
  }

  absl::StatusOr<uint64_t> Pin(const PinRequest& request) override {
    QUARRY_ASSIGN_OR_RETURN(wire::PinReply reply, Call<wire::PinReply>(channel_, shm::Method::kPin,
                                                                       ToProto(request)));
    return reply.bytes();
  }

  absl::Status Unpin(std::string_view name) override {
    wire::UnpinRequest request;
    request.set_name(std::string(name));
    return Call<wire::UnpinReply>(channel_, shm::Method::kUnpin, request).status();
  }

  absl::StatusOr<uint64_t> Purge(const PurgeRequest& request) override {
    QUARRY_ASSIGN_OR_RETURN(
        wire::PurgeReply reply,
        Call<wire::PurgeReply>(channel_, shm::Method::kPurge, ToProto(request)));
    return reply.blocks();
  }

  absl::StatusOr<FlushResult> Flush(const FlushRequest& request, absl::Duration longest) override {
    constexpr absl::Duration kLongestPause = absl::Milliseconds(50);
    const absl::Time end = absl::Now() + longest;
    for (absl::Duration pause = absl::Milliseconds(1);;
         pause = std::min(2 * pause, kLongestPause)) {
      QUARRY_ASSIGN_OR_RETURN(
          wire::FlushReply reply,
          Call<wire::FlushReply>(channel_, shm::Method::kFlush, ToProto(request)));
      const FlushResult result = FromProto(reply);
      const std::string counts = absl::StrCat(
          result.durable_blocks, " blocks are durable, ", result.pending_blocks, " pending, ",
          result.refused_blocks, " refused, ", result.missing_blocks, " in no tier");
      if (result.refused_blocks > 0) {
        return absl::UnavailableError(absl::StrCat(counts, ": ", result.refusal));
      }
      if (result.pending_blocks == 0) {
        if (result.missing_blocks > 0) return absl::NotFoundError(counts);
        return result;
      }
      if (absl::Now() + pause > end) return absl::DeadlineExceededError(counts);
      absl::SleepFor(pause);
    }
  }

  absl::StatusOr<std::vector<BlockSummary>> ListBlocks(uint32_t limit) override {
    wire::ListBlocksRequest request;
    request.set_limit(limit);
    QUARRY_ASSIGN_OR_RETURN(
        wire::ListBlocksReply reply,
        Call<wire::ListBlocksReply>(channel_, shm::Method::kListBlocks, request));
    std::vector<BlockSummary> out;
    for (const wire::BlockInfo& b : reply.blocks()) {
      BlockSummary& block = out.emplace_back();
      QUARRY_ASSIGN_OR_RETURN(block.id,
                              DigestFromBytes<BlockId>(b.id(), "block id", EmptyDigest::kRefused));
      QUARRY_ASSIGN_OR_RETURN(block.parent,
                              DigestFromBytes<BlockId>(b.parent(), "parent", EmptyDigest::kIsZero));
      QUARRY_ASSIGN_OR_RETURN(
          block.name_space, DigestFromBytes<NamespaceDigest>(b.namespace_digest(),
                                                             "namespace_digest",
                                                             EmptyDigest::kIsZero));
      block.bytes = b.bytes();
      block.state = b.state();
      block.leases = b.leases();
      block.children = b.children();
      block.in_ram = b.in_ram();
      block.on_disk = b.on_disk();
      block.pins.assign(b.pins().begin(), b.pins().end());
    }
    return out;
  }

  absl::StatusOr<DaemonStatus> Status() override {
    QUARRY_ASSIGN_OR_RETURN(
        wire::StatusReply reply,
        Call<wire::StatusReply>(channel_, shm::Method::kStatus, wire::StatusRequest()));
    return DaemonStatus{reply.version(), reply.pid(), reply.uptime_seconds(), reply.draining(),
                        reply.tenant(), reply.simd_level()};
  }

  absl::StatusOr<std::map<std::string, double>> Statistics() override {
    QUARRY_ASSIGN_OR_RETURN(
        wire::StatisticsReply reply,
        Call<wire::StatisticsReply>(channel_, shm::Method::kStatistics, wire::StatisticsRequest()));
    return std::map<std::string, double>(reply.values().begin(), reply.values().end());
  }

  absl::StatusOr<std::vector<HeadAudit>> Audits() override {
    QUARRY_ASSIGN_OR_RETURN(
        wire::AuditReply reply,
        Call<wire::AuditReply>(channel_, shm::Method::kAudit, wire::AuditRequest()));
    std::vector<HeadAudit> audits;
    for (const wire::HeadAudit& head : reply.heads()) {
      QUARRY_ASSIGN_OR_RETURN(audits.emplace_back(), FromProto(head));
    }
    return audits;
  }

  absl::Status Drain() override {
    return Call<wire::DrainReply>(channel_, shm::Method::kDrain, wire::DrainRequest()).status();
  }

  void Arm() override { channel_.Arm(true); }
  void Disarm() override { channel_.Arm(false); }

  absl::Status Attend(std::span<const AttendRow> rows, std::span<AttendAnswer> answers) override {
    QUARRY_ASSIGN_OR_RETURN(std::unique_ptr<PendingAttend> pending, AttendAsync(rows, answers));
    return pending->Wait();
  }

  absl::StatusOr<std::unique_ptr<PendingAttend>> AttendAsync(
      std::span<const AttendRow> rows, std::span<AttendAnswer> answers) override {
    if (rows.size() != answers.size()) {
      return absl::InvalidArgumentError(
          absl::StrCat(rows.size(), " rows with ", answers.size(), " answers"));
    }
    std::vector<KvShape> shapes;
    for (const AttendRow& row : rows) {
      QUARRY_ASSIGN_OR_RETURN(KvShape shape, Shape(row.context));
      shapes.push_back(shape);
    }
    QUARRY_ASSIGN_OR_RETURN(AttendMessage message,
                            AttendMessage::Plan(rows, shapes, channel_.payload_bytes(),
                                                channel_.version()));
    QUARRY_ASSIGN_OR_RETURN(ClientChannel::Slot slot, channel_.Take());
    message.Write(rows, channel_.slot_start(slot));
    channel_.Submit(slot, shm::Opcode::kAttend, message.request_bytes());
    return std::make_unique<ShmPendingAttend>(home_, slot, std::move(message), answers);
  }

  std::span<std::byte> channel_memory() override { return channel_.memory(); }

  absl::StatusOr<std::unique_ptr<RungAttends>> RingElsewhere(std::span<const AttendRow> rows,
                                                             uint32_t messages) override {
    if (rows.empty()) return absl::InvalidArgumentError("no rows for a device to ring");
    QUARRY_ASSIGN_OR_RETURN(const KvShape shape, Shape(rows[0].context));
    for (const AttendRow& row : rows) {
      QUARRY_ASSIGN_OR_RETURN(const KvShape other, Shape(row.context));
      if (other == shape) continue;
      return absl::InvalidArgumentError(
          absl::StrCat("contexts ", rows[0].context.value, " and ", row.context.value,
                       " have different shapes, a device rings rows of one"));
    }
    return ShmRungAttends::Begin(channel_, Watchdog(), rows, shape, messages);
  }

  absl::StatusOr<TopKAnswer> TopK(const AttendRow& row, uint32_t k, bool gather) override {
    QUARRY_ASSIGN_OR_RETURN(KvShape shape, Shape(row.context));
    wire::TopKRequest request;
    *request.mutable_row() = ToProto(row, shape.head_dim, shape.group(), shape.dtype);
    request.set_k(k);
    request.set_gather(gather);
    QUARRY_ASSIGN_OR_RETURN(wire::TopKReply reply,
                            Call<wire::TopKReply>(channel_, shm::Method::kTopK, request));
    return FromProto(reply);
  }

  absl::Status Nop() override {
    QUARRY_ASSIGN_OR_RETURN(ClientChannel::Slot slot, channel_.Take());
    channel_.Submit(slot, shm::Opcode::kNop, 0);
    return Finish(slot);
  }

 private:
  absl::Status Finish(const ClientChannel::Slot& slot) {
    uint64_t bytes = 0;
    const absl::Status status = channel_.Wait(slot, &bytes);
    channel_.Abandon(slot);
    return status;
  }

  RingWatchdog& Watchdog() {
    absl::MutexLock lock(&mutex_);
    if (watchdog_ == nullptr) watchdog_ = std::make_unique<RingWatchdog>(channel_);
    return *watchdog_;
  }

  void Remember(ContextId context, const KvShape& shape) {
    absl::MutexLock lock(&mutex_);
    shapes_[context.value] = shape;
  }

  const ClientOptions options_;
  const std::shared_ptr<LeaseHome> home_;  // shared with the leases and attends it gave out
  ClientChannel& channel_;
  absl::Mutex mutex_;
  std::unique_ptr<RingWatchdog> watchdog_ ABSL_GUARDED_BY(mutex_);  // once a device rings
  absl::flat_hash_map<uint64_t, KvShape> shapes_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace

absl::StatusOr<std::unique_ptr<Client>> Client::Connect(const ClientOptions& options) {
  shm::HelloRequest hello{};
  hello.magic = shm::kMagic;
  hello.min_version = shm::kMinVersion;
  hello.max_version = shm::kMaxVersion;
  hello.slots = options.slots;
  hello.slot_bytes = options.slot_bytes;
  std::memcpy(hello.client_name, options.name.data(),
              std::min(options.name.size(), sizeof(hello.client_name) - 1));
  QUARRY_ASSIGN_OR_RETURN(std::unique_ptr<ClientChannel> channel,
                          ClientChannel::Connect(options.socket_path, hello, options.deadline));
  return std::make_unique<ShmClient>(options, std::move(channel));
}

}  // namespace quarry
