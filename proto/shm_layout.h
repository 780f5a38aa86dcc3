// The shared-memory protocol's memory layout, versions 1 to 3. Plain data only; the rules of use
// stand in proto/SHM.md, good enough to write a client from. All integers are little-endian; offsets
// are bytes; everything a client writes is untrusted: the daemon copies it once, validates the
// copy, and uses only that.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace quarry::shm {

// Bytes of an engine key, and of its namespace.
inline constexpr uint32_t kMaxNameBytes = 256;
inline constexpr uint32_t kMagic = 0x31595251;  // "QRY1"
inline constexpr uint16_t kMinVersion = 1;
// 2: more kinds of budget, and `merged`; 3: answers say `shifted_tokens`.
inline constexpr uint16_t kMaxVersion = 3;

// Limits of one channel; the daemon's configuration may lower them.
inline constexpr uint32_t kMaxSlots = 256;
inline constexpr uint64_t kMinSlotBytes = 16 * 1024;
inline constexpr uint64_t kMaxSlotBytes = 64ull << 20;
inline constexpr uint32_t kMaxRows = 1024;  // per attend message

// ---- Handshake: SOCK_SEQPACKET Unix socket, one message each way, then requests by the client.
struct HelloRequest {
  uint32_t magic;
  uint16_t min_version, max_version;  // the range the client speaks
  uint32_t slots;                     // wanted; 0: the daemon's default
  uint32_t reserved;
  uint64_t slot_bytes;                // wanted; 0: the daemon's default
  char client_name[40];               // for people; NUL-padded
};
static_assert(sizeof(HelloRequest) == 64);

// Carries two descriptors when status == 0: the channel memfd and the doorbell eventfd.
struct HelloReply {
  uint32_t magic;
  uint16_t version;                   // the highest both speak; 0 if none
  uint16_t min_version, max_version;  // the daemon's range, also when refused
  uint16_t reserved0;
  uint32_t status;                    // absl::StatusCode
  uint64_t session;
  uint64_t channel_bytes;
  uint64_t slot_bytes;
  uint32_t slots;
  uint32_t reserved1;
  char tenant[64];
  char message[144];                  // why it was refused
};
static_assert(sizeof(HelloReply) == 256);

enum class SocketRequestKind : uint32_t { kExtent = 1 };

// Asks for the descriptor of a read extent that a lease named.
struct SocketRequest {
  uint32_t kind;
  uint32_t extent;
};
// Carries one descriptor when status == 0: the extent, sealed against writing.
struct SocketReply {
  uint32_t kind;
  uint32_t status;  // NotFound also for another tenant's extent
  uint32_t extent;
  uint32_t numa_node;
  uint64_t bytes;
  uint64_t page_bytes;
};
static_assert(sizeof(SocketReply) == 32);

// ---- The channel: header page, submit ring, slots.
struct alignas(64) ChannelHeader {
  uint32_t magic;
  uint16_t version;
  uint16_t reserved;
  uint32_t slots;          // also the ring's length; a power of two
  uint32_t ring_offset;
  uint64_t slots_offset;
  uint64_t slot_bytes;
  alignas(64) std::atomic<uint32_t> armed;   // client: 1 while a token is in flight; the poller spins
  alignas(64) std::atomic<uint32_t> parked;  // daemon: 1 while the poller sleeps; ring the doorbell
  std::atomic<uint32_t> closing;             // daemon: 1 once draining; no new requests are taken
};
static_assert(sizeof(ChannelHeader) == 192);
inline constexpr uint32_t kHeaderBytes = 4096;

enum class Opcode : uint16_t {
  kCall = 1,     // CallHeader + protobuf request -> CallReply + protobuf reply
  kAppend = 2,   // AppendHeader + K + V
  kAttend = 3,   // AttendHeader + AttendRowPod[] + buffers -> AttendAnswerPod[] in place
  kLease = 4,    // LeaseHeader -> LeaseReply
  kRelease = 5,  // ReleaseHeader
  kPut = 6,      // PutHeader + key + bytes -> PutReply
  kNop = 7,      // answered at once by the poller: the protocol's own cost
};

// Entry i of the ring is valid for round r when sequence == r * slots + i + 1 (release store by
// the client, last). The daemon keeps its own cursor and reads each entry once.
struct alignas(64) SubmitEntry {
  std::atomic<uint64_t> sequence;
  uint32_t slot;
  uint16_t opcode;
  uint16_t flags;          // must be 0
  uint64_t request_bytes;  // from kSlotPayload
  uint32_t generation;     // of the slot's request: not 0, not the slot's last one
  uint32_t reserved;
};
static_assert(sizeof(SubmitEntry) == 64);

// A slot carries one request at a time. The client waits until done == generation (acquire),
// spinning or by futex on `done`; a waiter sets `waiting` first.
struct alignas(64) SlotHeader {
  std::atomic<uint32_t> waiting;  // client: 1 while it sleeps on done
  uint32_t reserved0[15];
  alignas(64) std::atomic<uint32_t> done;  // daemon: generation answered; client: ~0u, never one,
                                           // to give up
  uint32_t status;                         // absl::StatusCode of the whole request
  uint64_t response_bytes;                 // from kSlotPayload
};
static_assert(sizeof(SlotHeader) == 128);
inline constexpr uint32_t kSlotPayload = 128;

// ---- Payloads. A request whose status is not OK is answered by the message text alone, except
// kAttend, where each row has its own status.

// Methods of kCall: the unary methods of the gRPC services, with the same messages.
enum class Method : uint32_t {
  kOpen = 1,
  kSeal = 2,
  kFork = 3,
  kClose = 4,
  kRead = 5,
  kExists = 6,
  kLongestPrefix = 7,
  kPin = 8,
  kUnpin = 9,
  kPurge = 10,
  kTopK = 11,
  kStatus = 12,
  kStatistics = 13,
  kDrain = 14,
  kListContexts = 15,
  kListBlocks = 16,
  kDeclareTokens = 17,
  kAudit = 18,
  kFlush = 19,
  kPrefetch = 20,
};
struct CallHeader {
  uint32_t method;
  uint32_t reserved;
};

struct AppendHeader {
  uint64_t context;
  uint32_t layer, first_kv_head, kv_heads;
  uint32_t token_lo, token_hi;
  uint32_t new_token_ids;    // count; u32 ids at ids_offset
  uint32_t query_samples;    // count; fp32 samples at samples_offset, u32 positions at positions_offset
  uint32_t reserved;
  // Offsets from the slot's start. K and V: [token][kv_head][head_dim] of the context's dtype.
  uint64_t k_offset, v_offset, ids_offset, samples_offset, positions_offset;
};
static_assert(sizeof(AppendHeader) == 80);

struct AttendHeader {
  uint32_t rows;
  uint32_t reserved;
};
struct AttendRowPod {
  uint64_t context;
  uint32_t layer;
  uint32_t range_lo, range_hi;
  uint32_t first_head, heads;
  uint8_t budget_kind, q_dtype, has_token;
  uint8_t merged;          // version 2; before: 0
  uint32_t budget_k;
  float budget_amount;     // mass, error or beta, by the kind
  uint32_t token_position;
  uint32_t budget_seed;    // version 2; before: 0
  // Offsets from the slot's start, 4-byte aligned; o: [heads][head_dim] fp32, lse: [heads] fp32.
  uint64_t q_offset, k_offset, v_offset, o_offset, lse_offset;
};
static_assert(sizeof(AttendRowPod) == 88);
// AttendAnswerPod[rows] stands at kSlotPayload when the slot is done.
struct AttendAnswerPod {
  uint32_t status;       // absl::StatusCode; not 0: this row's token is void
  uint32_t generation;   // the request's, for a merge on a device that reads nothing else
  uint32_t covered_lo, covered_hi;
  uint64_t tokens_attended;
  uint64_t bytes_touched;
  float error_estimate;
  uint32_t shifted_tokens;  // version 3; before: 0
};
static_assert(sizeof(AttendAnswerPod) == 40);
static_assert(sizeof(AttendAnswerPod) <= sizeof(AttendRowPod));

enum class LeaseKind : uint32_t { kContextBlock = 1, kEngineKey = 2 };
struct LeaseHeader {
  uint32_t kind;
  uint32_t block;        // index in the context (kContextBlock)
  uint64_t context;
  uint32_t namespace_bytes, key_bytes;  // kEngineKey: both follow this header
};
struct LeaseReply {
  uint64_t lease;
  uint64_t offset, bytes;
  uint64_t digest_low, digest_high;
  uint32_t extent;
  uint32_t reserved;
};
struct ReleaseHeader {
  uint64_t lease;
};
struct PutHeader {
  uint32_t namespace_bytes, key_bytes;  // namespace, key, then the bytes at data_offset
  uint64_t data_offset, data_bytes;
  uint64_t digest_low, digest_high;     // of the bytes, if has_digest: DataLoss on mismatch
  uint32_t has_digest;
  uint32_t reserved;
};
struct PutReply {
  uint8_t block_id[32];
  uint64_t digest_low, digest_high;
  uint32_t existed;      // 1: the block was already published; the bytes were dropped
  uint32_t reserved;
};

}  // namespace quarry::shm
