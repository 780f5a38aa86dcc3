#include "gpu/weights/pack_matrix.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gpu/weights/codes.h"
#include "proto/check.h"
#include "proto/half.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

// Bytes on their way to a device at a time.
constexpr size_t kPieceBytes = size_t{64} << 20;
// Rows of one step of a team's thread.
constexpr size_t kRowsPerStep = 16;

// Where row r of the stacked matrices is stored.
struct StoredRow {
  const std::byte* data;
  DType dtype;
};
StoredRow Find(std::span<const HostMatrix> stacked, size_t width, size_t row) {
  for (const HostMatrix& part : stacked) {
    if (row < part.rows) {
      return {part.bytes.data() + row * width * DTypeBytes(part.dtype), part.dtype};
    }
    row -= part.rows;
  }
  QUARRY_CHECK(false);
  return {};
}

void Widen(const StoredRow& row, std::span<float> to) {
  if (row.dtype == DType::kFp32) {
    std::memcpy(to.data(), row.data, to.size_bytes());
    return;
  }
  for (size_t i = 0; i < to.size(); ++i) to[i] = LoadAsFloat(row.data, i, row.dtype);
}

// f(row) for rows [lo, hi).
template <typename F>
void ForRows(size_t lo, size_t hi, ThreadTeam* team, const F& f) {
  const auto step = [&](size_t i) {
    const size_t first = lo + i * kRowsPerStep;
    for (size_t r = first; r < std::min(hi, first + kRowsPerStep); ++r) f(r);
  };
  const size_t steps = (hi - lo + kRowsPerStep - 1) / kRowsPerStep;
  if (team != nullptr) return team->For(steps, step);
  for (size_t i = 0; i < steps; ++i) step(i);
}

absl::Status PackCodes(std::span<const HostMatrix> stacked, const MatrixLayout& layout,
                       std::string_view what, std::byte* to, ThreadTeam* team) {
  auto* const scales = reinterpret_cast<uint16_t*>(to + layout.scales_at());
  std::atomic<size_t> bad{layout.rows};
  ForRows(0, layout.rows, team, [&](size_t r) {
    thread_local std::vector<float> row;
    row.resize(layout.width);
    Widen(Find(stacked, layout.width, r), row);
    if (!EncodeRow(layout.form, row, to + r * layout.row_bytes(),
                   scales + r * layout.scales_per_row())) {
      for (size_t first = bad; r < first && !bad.compare_exchange_weak(first, r);) {
      }
    }
  });
  if (bad == layout.rows) return absl::OkStatus();
  std::vector<float> row(layout.width);
  Widen(Find(stacked, layout.width, bad), row);
  const auto at = std::find_if(row.begin(), row.end(), [](float x) { return !std::isfinite(x); });
  return absl::InvalidArgumentError(
      absl::StrCat(std::string(what), "[", bad.load(), "][", at - row.begin(), "] is ", *at, ": ",
                   std::string(WeightFormName(layout.form)), " has no code for it"));
}

}  // namespace

MatrixLayout LayoutFor(const Device& device, std::span<const HostMatrix> stacked, size_t width,
                       WeightForm form) {
  MatrixLayout out{DType::kFp32, 0, width, form};
  bool same = true, fp16 = true;
  for (const HostMatrix& part : stacked) {
    out.rows += part.rows;
    same = same && part.dtype == stacked.front().dtype;
    fp16 = fp16 && part.dtype == DType::kFp16;
  }
  if (form != WeightForm::kPlain) {
    out.dtype = fp16 ? DType::kFp16 : DType::kBf16;
  } else if (same && !stacked.empty()) {
    out.dtype = device.WeightDType(stacked.front().dtype);
  }
  return out;
}

void PackPlain(std::span<const HostMatrix> stacked, const MatrixLayout& layout, size_t lo,
               size_t hi, std::byte* to, ThreadTeam* team) {
  ForRows(lo, hi, team, [&](size_t r) {
    std::byte* const at = to + (r - lo) * layout.row_bytes();
    const StoredRow row = Find(stacked, layout.width, r);
    if (row.dtype == layout.dtype) {
      std::memcpy(at, row.data, layout.row_bytes());
      return;
    }
    QUARRY_CHECK(layout.dtype == DType::kFp32);
    Widen(row, {reinterpret_cast<float*>(at), layout.width});
  });
}

absl::Status PackMatrix(std::span<const HostMatrix> stacked, const MatrixLayout& layout,
                        std::string_view what, std::byte* to, ThreadTeam* team) {
  if (layout.form != WeightForm::kPlain) return PackCodes(stacked, layout, what, to, team);
  PackPlain(stacked, layout, 0, layout.rows, to, team);
  return absl::OkStatus();
}

absl::Status UploadMatrix(std::span<const HostMatrix> stacked, const MatrixLayout& layout,
                          std::string_view what, std::byte* to, Device* device, ThreadTeam* team) {
  if (layout.form != WeightForm::kPlain) {
    const auto packed = std::make_unique_for_overwrite<std::byte[]>(layout.bytes());
    QUARRY_RETURN_IF_ERROR(PackCodes(stacked, layout, what, packed.get(), team));
    return device->Upload(to, {packed.get(), layout.bytes()});
  }
  if (stacked.size() == 1 && stacked.front().dtype == layout.dtype) {
    return device->Upload(to, stacked.front().bytes.first(layout.bytes()));
  }
  const size_t row_bytes = std::max<size_t>(1, layout.row_bytes());
  const size_t step =
      std::clamp<size_t>(kPieceBytes / row_bytes, 1, std::max<size_t>(1, layout.rows));
  const auto piece = std::make_unique_for_overwrite<std::byte[]>(step * row_bytes);
  for (size_t lo = 0; lo < layout.rows; lo += step) {
    const size_t hi = std::min(layout.rows, lo + step);
    PackPlain(stacked, layout, lo, hi, piece.get(), team);
    QUARRY_RETURN_IF_ERROR(
        device->Upload(to + lo * row_bytes, {piece.get(), (hi - lo) * row_bytes}));
  }
  return absl::OkStatus();
}

}  // namespace quarry
