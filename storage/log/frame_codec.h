// How frames are made of bytes, for the files that know what is in each: storage/FORMAT.md.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "proto/check.h"
#include "proto/types.h"
#include "storage/disk/aligned_buffer.h"
#include "storage/log/frames.h"

namespace quarry {

static_assert(std::endian::native == std::endian::little, "the log is little-endian");

inline constexpr size_t kFrameHeadBytes = 64, kFrameCrcOffset = 12, kFrameCrcBytes = 4;

class FrameWriter {
 public:
  explicit FrameWriter(std::span<std::byte> out) : out_(out) {}

  void Bytes(const void* data, size_t n) {
    QUARRY_CHECK(n <= out_.size() - at_);
    std::memcpy(out_.data() + at_, data, n);
    at_ += n;
  }
  template <typename T>
  void Number(T value) {
    static_assert(std::is_integral_v<T>);
    Bytes(&value, sizeof(value));
  }
  template <typename Tag>
  void Digest(const quarry::Digest<Tag>& digest) {
    Bytes(digest.bytes.data(), digest.bytes.size());
  }
  void Digest(const ByteDigest& digest) {
    Number(digest.low);
    Number(digest.high);
  }
  // The length first, 4 bytes.
  void Text(std::string_view text) {
    Number(static_cast<uint32_t>(text.size()));
    Bytes(text.data(), text.size());
  }
  size_t at() const { return at_; }

 private:
  std::span<std::byte> out_;
  size_t at_ = 0;
};

// Past the end all is zero, and ok() false.
class FrameReader {
 public:
  explicit FrameReader(std::span<const std::byte> in) : in_(in) {}

  void Bytes(void* out, size_t n) {
    ok_ &= n <= in_.size() - at_;
    if (!ok_) {
      std::memset(out, 0, n);
      return;
    }
    std::memcpy(out, in_.data() + at_, n);
    at_ += n;
  }
  template <typename T>
  T Number() {
    T value;
    Bytes(&value, sizeof(value));
    return value;
  }
  template <typename Tag>
  void Digest(quarry::Digest<Tag>* digest) {
    Bytes(digest->bytes.data(), digest->bytes.size());
  }
  void Digest(ByteDigest* digest) {
    digest->low = Number<uint64_t>();
    digest->high = Number<uint64_t>();
  }
  std::string Text() {
    const auto n = Number<uint32_t>();
    ok_ &= n <= in_.size() - at_;
    if (!ok_) return {};
    std::string text(n, '\0');
    Bytes(text.data(), n);
    return text;
  }
  bool ok() const { return ok_; }

 private:
  std::span<const std::byte> in_;
  size_t at_ = 0;
  bool ok_ = true;
};

// A frame with room for a body of so many bytes, and its head.
AlignedBuffer NewFrame(FrameKind kind, const FramePlace& place, uint64_t sequence,
                       size_t body_bytes);
inline std::span<std::byte> BodyOf(AlignedBuffer* frame) {
  return frame->bytes().subspan(kFrameHeadBytes);
}
// With its checksum.
AlignedBuffer FinishFrame(AlignedBuffer frame);

// The frame's body, once all that its head says is as it should be.
absl::StatusOr<std::span<const std::byte>> CheckedBody(std::span<const std::byte> frame,
                                                       FrameKind kind, FrameHead* head);
// The same of a frame that must say that it is here.
absl::StatusOr<std::span<const std::byte>> BodyAt(std::span<const std::byte> frame, FrameKind kind,
                                                  const FramePlace& place, uint64_t sequence);
absl::Status MalformedFrame(std::string_view what);

}  // namespace quarry
