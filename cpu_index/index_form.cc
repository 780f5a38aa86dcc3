#include "cpu_index/index_form.h"

#include <bit>
#include <limits>
#include <string>

#include "absl/strings/str_cat.h"
#include "proto/byte_digest.h"
#include "proto/check.h"
#include "proto/half.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

static_assert(std::endian::native == std::endian::little);
constexpr std::string_view kMagic = "QRYINDEX";
constexpr size_t kKindBytes = 16, kVersionAt = 24, kSizeAt = 32;

absl::Status CheckNumber(std::string_view name, float number, float least) {
  // Also of NaN.
  if (number >= least && number <= std::numeric_limits<float>::max()) return absl::OkStatus();
  return absl::DataLossError(absl::StrCat("an index's ", std::string(name), " of ", number,
                                          " is not a finite number of at least ", least));
}

}  // namespace

IndexWriter::IndexWriter(std::string_view kind, uint32_t version) {
  QUARRY_CHECK(kind.size() <= kKindBytes);
  char padded[kKindBytes] = {};
  std::memcpy(padded, kind.data(), kind.size());
  PutAll(std::span(kMagic));
  PutAll(std::span<const char>(padded));
  Put(version);
  Put(uint32_t{0});
  Put(uint64_t{0});
}

std::vector<std::byte> IndexWriter::Finish() && {
  const uint64_t size = bytes_.size() - kIndexFormHeaderBytes;
  std::memcpy(bytes_.data() + kSizeAt, &size, sizeof(size));
  const ByteDigest digest = DigestOf(bytes_);
  static_assert(sizeof(digest) == kIndexFormDigestBytes);
  Put(digest);
  return std::move(bytes_);
}

absl::StatusOr<std::string_view> IndexReader::KindOf(std::span<const std::byte> bytes) {
  if (bytes.size() < kIndexFormHeaderBytes + kIndexFormDigestBytes ||
      std::memcmp(bytes.data(), kMagic.data(), kMagic.size()) != 0) {
    return absl::DataLossError(absl::StrCat(bytes.size(), " bytes are no index"));
  }
  const auto* const at = reinterpret_cast<const char*>(bytes.data()) + kMagic.size();
  return std::string_view(at, strnlen(at, kKindBytes));
}

absl::StatusOr<IndexReader> IndexReader::Open(std::string_view kind, uint32_t version,
                                              std::span<const std::byte> bytes) {
  QUARRY_ASSIGN_OR_RETURN(const std::string_view found_kind, KindOf(bytes));
  const std::span<const std::byte> sealed = bytes.first(bytes.size() - kIndexFormDigestBytes);
  const ByteDigest digest = DigestOf(sealed);
  if (std::memcmp(&digest, bytes.data() + sealed.size(), sizeof(digest)) != 0) {
    return absl::DataLossError(absl::StrCat("the checksum of an index of ", bytes.size(),
                                            " bytes is not that of its bytes"));
  }
  uint64_t size = 0;
  uint32_t found = 0;
  std::memcpy(&size, bytes.data() + kSizeAt, sizeof(size));
  std::memcpy(&found, bytes.data() + kVersionAt, sizeof(found));
  if (size != sealed.size() - kIndexFormHeaderBytes) {
    return absl::DataLossError(absl::StrCat("an index of ", size, " bytes of data has ",
                                            sealed.size() - kIndexFormHeaderBytes));
  }
  if (found_kind != kind || found != version) {
    return absl::InvalidArgumentError(
        absl::StrCat("an index of kind '", std::string(found_kind), "' and version ", found,
                     " is not of kind '", std::string(kind), "' and version ", version));
  }
  return IndexReader(sealed.subspan(kIndexFormHeaderBytes));
}

absl::Status IndexReader::GetNumbers(std::string_view name, uint64_t count, float least,
                                     std::vector<float>* out) {
  QUARRY_RETURN_IF_ERROR(GetVector(count, out));
  for (float number : *out) QUARRY_RETURN_IF_ERROR(CheckNumber(name, number, least));
  return absl::OkStatus();
}

absl::Status IndexReader::GetNumber(std::string_view name, float least, float* out) {
  QUARRY_RETURN_IF_ERROR(Get(out));
  return CheckNumber(name, *out, least);
}

absl::Status IndexReader::GetBf16(std::string_view name, uint64_t count, float least,
                                  std::vector<uint16_t>* out) {
  QUARRY_RETURN_IF_ERROR(GetVector(count, out));
  for (uint16_t number : *out) {
    QUARRY_RETURN_IF_ERROR(CheckNumber(name, Bf16ToFloat(number), least));
  }
  return absl::OkStatus();
}

absl::Status IndexReader::Finish() const {
  if (left_.empty()) return absl::OkStatus();
  return absl::DataLossError(absl::StrCat(left_.size(), " bytes follow an index's data"));
}

absl::Status IndexReader::Short(size_t wanted) const {
  return absl::DataLossError(
      absl::StrCat("an index's data end ", left_.size(), " bytes on, not ", wanted));
}

}  // namespace quarry
