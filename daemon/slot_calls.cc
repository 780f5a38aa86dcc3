#include "daemon/slot_calls.h"

#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>

#include "absl/strings/str_cat.h"
#include "daemon/attend_slot.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

// A request's payload: bytes [kSlotPayload, kSlotPayload + request_bytes) of its slot.
class Payload {
 public:
  Payload(const Channel& channel, const Submission& request)
      : slot_(channel.slot(request.slot)), end_(shm::kSlotPayload + request.request_bytes) {}

  template <typename Header>
  absl::StatusOr<Header> HeaderOf(std::string_view what) const {
    if (end_ - shm::kSlotPayload < sizeof(Header)) {
      return absl::InvalidArgumentError(absl::StrCat(
          absl::string_view(what.data(), what.size()), " of ", end_ - shm::kSlotPayload,
          " bytes is shorter than its header of ", sizeof(Header)));
    }
    return CopyOnce<Header>(slot_ + shm::kSlotPayload);
  }

  // Bytes [offset, offset + count * element) from the slot's start.
  absl::StatusOr<const std::byte*> At(std::string_view what, uint64_t offset, uint64_t count,
                                      uint64_t element, uint64_t alignment) const {
    if (count == 0) return slot_ + shm::kSlotPayload;
    if (offset < shm::kSlotPayload || offset > end_ || offset % alignment != 0 ||
        count > (end_ - offset) / element) {
      return absl::InvalidArgumentError(
          absl::StrCat(absl::string_view(what.data(), what.size()), ": ", count, " elements of ",
                       element, " bytes at offset ", offset, " do not lie, aligned to ", alignment,
                       ", inside the request's [", shm::kSlotPayload, ", ", end_, ")"));
    }
    return slot_ + offset;
  }

  // A private copy.
  absl::StatusOr<std::string> Text(std::string_view what, uint64_t offset, uint64_t bytes) const {
    QUARRY_ASSIGN_OR_RETURN(const std::byte* at, At(what, offset, bytes, 1, 1));
    return std::string(reinterpret_cast<const char*>(at), bytes);
  }

  // The namespace and the key behind a header, of lengths that the header says: checked before
  // they are copied.
  struct Names {
    std::string name_space, key;
  };
  absl::StatusOr<Names> NamesAt(uint64_t offset, uint32_t namespace_bytes,
                                uint32_t key_bytes) const {
    if (namespace_bytes > shm::kMaxNameBytes || key_bytes > shm::kMaxNameBytes) {
      return absl::InvalidArgumentError(
          absl::StrCat("engine namespace of ", namespace_bytes, " bytes and key of ", key_bytes,
                       "; at most ", shm::kMaxNameBytes, " each are allowed"));
    }
    Names names;
    QUARRY_ASSIGN_OR_RETURN(names.name_space, Text("namespace", offset, namespace_bytes));
    QUARRY_ASSIGN_OR_RETURN(names.key, Text("key", offset + namespace_bytes, key_bytes));
    return names;
  }

  uint64_t end() const { return end_; }

 private:
  std::byte* const slot_;
  const uint64_t end_;
};

// What an answered request leaves in the slot: bytes written so far.
using Reply = absl::StatusOr<uint64_t>;

template <typename T>
uint64_t WriteReply(Channel& channel, const Submission& request, const T& reply) {
  static_assert(std::is_trivially_copyable_v<T>);
  std::memcpy(channel.payload(request.slot).data(), &reply, sizeof(T));
  return sizeof(T);
}

Reply RunCall(const SlotServices& services, Channel& channel, const Submission& request) {
  const Payload payload(channel, request);
  QUARRY_ASSIGN_OR_RETURN(const auto header, payload.HeaderOf<shm::CallHeader>("call"));
  // Protobuf reads its input more than once, so it gets a private copy.
  constexpr uint64_t kStart = shm::kSlotPayload + sizeof(shm::CallHeader);
  QUARRY_ASSIGN_OR_RETURN(const std::string message,
                          payload.Text("call", kStart, payload.end() - kStart));
  const std::span<std::byte> out = channel.payload(request.slot);
  const Caller caller{channel.owner().session, channel.owner().peer, out.size(),
                      channel.geometry().version >= 3};
  QUARRY_ASSIGN_OR_RETURN(const std::string reply,
                          DispatchCall(services.parts, caller, header.method, message));
  std::memcpy(out.data(), reply.data(), reply.size());
  return reply.size();
}

Reply RunAppend(const SlotServices& services, Channel& channel, const Submission& request) {
  const Payload payload(channel, request);
  QUARRY_ASSIGN_OR_RETURN(const auto header, payload.HeaderOf<shm::AppendHeader>("append"));
  Engine& engine = services.parts.engine;
  AppendRequest append;
  append.context = {header.context};
  append.layer = header.layer;
  append.first_kv_head = header.first_kv_head;
  append.kv_heads = header.kv_heads;
  append.range = {header.token_lo, header.token_hi};
  QUARRY_ASSIGN_OR_RETURN(const ContextInfo info,
                          engine.Info(channel.owner().session, append.context));
  const KvShape& shape = info.shape;
  if (header.kv_heads == 0 || header.kv_heads > shape.kv_heads ||
      header.token_hi <= header.token_lo) {
    return absl::InvalidArgumentError(absl::StrCat("append of ", header.kv_heads, " KV heads of ",
                                                   shape.kv_heads, ", tokens [", header.token_lo,
                                                   ", ", header.token_hi, ")"));
  }
  const uint64_t vectors = uint64_t{append.range.size()} * header.kv_heads;
  QUARRY_ASSIGN_OR_RETURN(append.k,
                          payload.At("k", header.k_offset, vectors, shape.vector_bytes(), 4));
  QUARRY_ASSIGN_OR_RETURN(append.v,
                          payload.At("v", header.v_offset, vectors, shape.vector_bytes(), 4));

  // Ids, samples and positions are small and read more than once: private copies.
  std::vector<uint32_t> ids(0), positions(0);
  QUARRY_ASSIGN_OR_RETURN(const std::byte* ids_at, payload.At("new token ids", header.ids_offset,
                                                              header.new_token_ids, 4, 4));
  ids.resize(header.new_token_ids);
  if (!ids.empty()) std::memcpy(ids.data(), ids_at, ids.size() * 4);
  append.new_token_ids = ids;
  std::vector<float> samples;
  if (header.query_samples > 0) {
    const uint64_t floats = uint64_t{header.kv_heads} * shape.group() * shape.head_dim;
    QUARRY_ASSIGN_OR_RETURN(
        const std::byte* samples_at,
        payload.At("query samples", header.samples_offset, header.query_samples, floats * 4, 4));
    QUARRY_ASSIGN_OR_RETURN(
        const std::byte* positions_at,
        payload.At("query positions", header.positions_offset, header.query_samples, 4, 4));
    samples.resize(floats * header.query_samples);
    positions.resize(header.query_samples);
    std::memcpy(samples.data(), samples_at, samples.size() * 4);
    std::memcpy(positions.data(), positions_at, positions.size() * 4);
    append.query_samples = samples.data();
    append.query_positions = positions;
  }
  QUARRY_RETURN_IF_ERROR(engine.Append(channel.owner().session, append));
  return 0;
}

Reply RunPut(const SlotServices& services, Channel& channel, const Submission& request) {
  const Payload payload(channel, request);
  QUARRY_ASSIGN_OR_RETURN(const auto header, payload.HeaderOf<shm::PutHeader>("put"));
  constexpr uint64_t kNames = shm::kSlotPayload + sizeof(shm::PutHeader);
  QUARRY_ASSIGN_OR_RETURN(const Payload::Names names,
                          payload.NamesAt(kNames, header.namespace_bytes, header.key_bytes));
  QUARRY_ASSIGN_OR_RETURN(const std::byte* data,
                          payload.At("data", header.data_offset, header.data_bytes, 1, 1));
  std::optional<ByteDigest> digest;
  if (header.has_digest != 0) digest = ByteDigest{header.digest_low, header.digest_high};
  QUARRY_ASSIGN_OR_RETURN(const PutResult result,
                          services.parts.engine.Put(channel.owner().session, names.name_space, names.key,
                                                    {data, header.data_bytes}, digest));
  shm::PutReply reply{};
  std::memcpy(reply.block_id, result.id.bytes.data(), sizeof(reply.block_id));
  reply.digest_low = result.digest.low;
  reply.digest_high = result.digest.high;
  reply.existed = result.existed ? 1 : 0;
  return WriteReply(channel, request, reply);
}

Reply RunLease(const SlotServices& services, Channel& channel, const Submission& request) {
  const Payload payload(channel, request);
  QUARRY_ASSIGN_OR_RETURN(const auto header, payload.HeaderOf<shm::LeaseHeader>("lease"));
  Engine& engine = services.parts.engine;
  const SessionId session = channel.owner().session;
  absl::StatusOr<BlockLease> lease =
      absl::InvalidArgumentError(absl::StrCat("lease kind ", header.kind, " is unknown"));
  if (header.kind == static_cast<uint32_t>(shm::LeaseKind::kContextBlock)) {
    lease = engine.LeaseContextBlock(session, {header.context}, header.block);
  } else if (header.kind == static_cast<uint32_t>(shm::LeaseKind::kEngineKey)) {
    constexpr uint64_t kNames = shm::kSlotPayload + sizeof(shm::LeaseHeader);
    QUARRY_ASSIGN_OR_RETURN(const Payload::Names names,
                            payload.NamesAt(kNames, header.namespace_bytes, header.key_bytes));
    lease = engine.LeaseEngineBlock(session, names.name_space, names.key);
  }
  QUARRY_RETURN_IF_ERROR(lease.status());
  shm::LeaseReply reply{};
  reply.lease = lease->lease.value;
  reply.offset = lease->offset;
  reply.bytes = lease->bytes;
  reply.digest_low = lease->digest.low;
  reply.digest_high = lease->digest.high;
  reply.extent = lease->extent;
  return WriteReply(channel, request, reply);
}

Reply RunRelease(const SlotServices& services, Channel& channel, const Submission& request) {
  const Payload payload(channel, request);
  QUARRY_ASSIGN_OR_RETURN(const auto header, payload.HeaderOf<shm::ReleaseHeader>("release"));
  QUARRY_RETURN_IF_ERROR(
      services.parts.engine.ReleaseLease(channel.owner().session, {header.lease}));
  return 0;
}

using Runner = Reply (*)(const SlotServices&, Channel&, const Submission&);

void Finish(const SlotServices& services, Channel& channel, const Submission& request,
            const Reply& reply) {
  if (reply.ok()) return channel.Answer(request, absl::StatusCode::kOk, *reply);
  services.counters.shm_request_errors.fetch_add(1, std::memory_order_relaxed);
  channel.AnswerError(request, reply.status());
}

void RunInBulk(const SlotServices& services, const std::shared_ptr<Channel>& channel,
               const Submission& request, Runner runner) {
  // One client's backlog never fills the queue for the others.
  const bool admitted = channel->bulk_in_flight.load() < services.bulk_per_client;
  if (admitted) channel->bulk_in_flight.fetch_add(1);
  if (admitted && services.bulk.TrySubmit([&services, channel, request, runner] {
        const Reply reply = runner(services, *channel, request);
        channel->bulk_in_flight.fetch_sub(1);
        Finish(services, *channel, request, reply);
      })) {
    return;
  }
  if (admitted) channel->bulk_in_flight.fetch_sub(1);
  services.counters.shm_bulk_refused.fetch_add(1, std::memory_order_relaxed);
  Finish(services, *channel, request,
         absl::ResourceExhaustedError("the daemon's queue for calls, appends and puts is full"));
}

}  // namespace

void ServeRequest(const SlotServices& services, const std::shared_ptr<Channel>& channel,
                  const Submission& request) {
  const size_t known = request.opcode < services.counters.shm_requests.size() ? request.opcode : 0;
  services.counters.shm_requests[known].fetch_add(1, std::memory_order_relaxed);
  if (request.request_bytes > channel->geometry().slot_bytes - shm::kSlotPayload) {
    return Finish(services, *channel, request,
                  absl::InvalidArgumentError(
                      absl::StrCat("request of ", request.request_bytes, " bytes in a slot of ",
                                   channel->geometry().slot_bytes - shm::kSlotPayload)));
  }
  if (services.parts.draining() && request.opcode != static_cast<uint16_t>(shm::Opcode::kRelease)) {
    return Finish(services, *channel, request,
                  absl::UnavailableError("the daemon is draining; it takes no new requests"));
  }
  switch (static_cast<shm::Opcode>(request.opcode)) {
    case shm::Opcode::kNop:
      return channel->Answer(request, absl::StatusCode::kOk, 0);
    case shm::Opcode::kAttend:
      return ServeAttend(services.parts.engine, services.counters, channel, request);
    case shm::Opcode::kRelease:
      return Finish(services, *channel, request, RunRelease(services, *channel, request));
    // Look-ups in the RAM tier are shorter than a hand-over to another thread.
    case shm::Opcode::kLease:
      return Finish(services, *channel, request, RunLease(services, *channel, request));
    case shm::Opcode::kCall:
      return RunInBulk(services, channel, request, RunCall);
    case shm::Opcode::kAppend:
      return RunInBulk(services, channel, request, RunAppend);
    case shm::Opcode::kPut:
      return RunInBulk(services, channel, request, RunPut);
  }
  Finish(services, *channel, request,
         absl::InvalidArgumentError(
             absl::StrCat("opcode ", request.opcode, " is unknown, or flags are not 0")));
}

}  // namespace quarry
