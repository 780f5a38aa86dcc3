#include "client/append_message.h"

#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

constexpr uint64_t kAlign = 64;

uint64_t Align(uint64_t x) { return (x + kAlign - 1) / kAlign * kAlign; }

// One message: tokens [lo, hi) of the request.
class Piece {
 public:
  Piece(const AppendRequest& request, const KvShape& shape, uint32_t lo, uint32_t hi)
      : request_(request), lo_(lo), hi_(hi) {
    token_bytes_ = request.kv_heads * shape.vector_bytes();
    header_.context = request.context.value;
    header_.layer = request.layer;
    header_.first_kv_head = request.first_kv_head;
    header_.kv_heads = request.kv_heads;
    header_.token_lo = lo;
    header_.token_hi = hi;
    const uint64_t kv = uint64_t{hi - lo} * token_bytes_;
    end_ = Align(shm::kSlotPayload + sizeof(header_));
    header_.k_offset = Place(kv);
    header_.v_offset = Place(kv);
    // The ids end where the range does, and begin where the daemon's knowledge ends, which may be
    // before the range: the first piece brings those as well.
    const auto ids = static_cast<uint32_t>(request.new_token_ids.size());
    const uint32_t ids_lo = request.range.hi - ids;
    const uint32_t from = lo == request.range.lo ? ids_lo : std::max(ids_lo, lo);
    if (from < hi) {
      first_id_ = from - ids_lo;
      header_.new_token_ids = hi - from;
      header_.ids_offset = Place(uint64_t{header_.new_token_ids} * 4);
    }
    if (lo == request.range.lo && !request.query_positions.empty()) {
      header_.query_samples = static_cast<uint32_t>(request.query_positions.size());
      sample_bytes_ = header_.query_samples * uint64_t{request.kv_heads} * shape.group() *
                      shape.head_dim * sizeof(float);
      header_.samples_offset = Place(sample_bytes_);
      header_.positions_offset = Place(header_.query_samples * 4);
    }
  }
  uint64_t request_bytes() const { return end_ - shm::kSlotPayload; }

  void Write(std::byte* slot) const {
    const uint64_t first = lo_ - request_.range.lo, tokens = hi_ - lo_;
    std::memcpy(slot + shm::kSlotPayload, &header_, sizeof(header_));
    const auto copy = [&](uint64_t offset, const void* from, uint64_t skip, uint64_t bytes) {
      std::memcpy(slot + offset, static_cast<const char*>(from) + skip, bytes);
    };
    copy(header_.k_offset, request_.k, first * token_bytes_, tokens * token_bytes_);
    copy(header_.v_offset, request_.v, first * token_bytes_, tokens * token_bytes_);
    if (header_.new_token_ids > 0) {
      copy(header_.ids_offset, request_.new_token_ids.data(), uint64_t{first_id_} * 4,
           uint64_t{header_.new_token_ids} * 4);
    }
    if (header_.query_samples > 0) {
      copy(header_.samples_offset, request_.query_samples, 0, sample_bytes_);
      copy(header_.positions_offset, request_.query_positions.data(), 0,
           header_.query_samples * 4);
    }
  }

 private:
  uint64_t Place(uint64_t bytes) {
    const uint64_t at = end_;
    end_ = Align(at + bytes);
    return at;
  }
  const AppendRequest& request_;
  const uint32_t lo_, hi_;
  shm::AppendHeader header_{};
  uint32_t first_id_ = 0;
  uint64_t token_bytes_ = 0, sample_bytes_ = 0, end_ = 0;
};

}  // namespace

absl::Status SendAppend(ClientChannel& channel, const KvShape& shape,
                        const AppendRequest& request) {
  if (request.range.empty() || request.k == nullptr || request.v == nullptr ||
      request.kv_heads == 0 || request.kv_heads > shape.kv_heads) {
    return absl::InvalidArgumentError(absl::StrCat(
        "append of tokens [", request.range.lo, ", ", request.range.hi, ") and ",
        request.kv_heads, " KV heads of ", shape.kv_heads, " without data or with wrong sizes"));
  }
  if (request.new_token_ids.size() > request.range.hi) {
    return absl::InvalidArgumentError(absl::StrCat(request.new_token_ids.size(),
                                                   " token ids for tokens up to ",
                                                   request.range.hi));
  }
  for (uint32_t lo = request.range.lo; lo < request.range.hi;) {
    uint32_t hi = request.range.hi;
    while (hi > lo && Piece(request, shape, lo, hi).request_bytes() > channel.payload_bytes()) {
      hi = lo + (hi - lo) / 2;
    }
    if (hi == lo) {
      return absl::InvalidArgumentError(absl::StrCat(
          "one token of ", request.kv_heads, " KV heads with ", request.query_positions.size(),
          " query samples does not fit a slot of ", channel.payload_bytes(), " bytes"));
    }
    const Piece piece(request, shape, lo, hi);
    QUARRY_ASSIGN_OR_RETURN(ClientChannel::Slot slot, channel.Take());
    piece.Write(channel.slot_start(slot));
    channel.Submit(slot, shm::Opcode::kAppend, piece.request_bytes());
    uint64_t bytes = 0;
    const absl::Status status = channel.Wait(slot, &bytes);
    channel.Abandon(slot);
    QUARRY_RETURN_IF_ERROR(status);
    lo = hi;
  }
  return absl::OkStatus();
}

}  // namespace quarry
