#include "gpu/cuda/weight_products.h"

#include <algorithm>
#include <utility>

#include "gpu/cuda/cuda_status.h"
#include "gpu/cuda/overhead.h"
#include "gpu/cuda/row_kernels.h"
#include "gpu/cuda/weight_kernels.h"
#include "gpu/weights/matrix_layout.h"
#include "proto/status_macros.h"

namespace quarry::cuda {
namespace {

// Rows of a product at a time: bounds its rounded activations (32 MiB at a width of 4,096).
constexpr size_t kProductRows = 4096;
// What NVIDIA recommends for Hopper; a small budget gives a 32nd of its own.
constexpr uint64_t kWorkspaceBytes = 32ull << 20;
// Widened codes at a time: they stay in a large card's L2 cache between their making and their use.
constexpr size_t kWidenedBytes = size_t{32} << 20;
// Rows of weights that are widened together, if not all: a multiple of every product's tile.
constexpr size_t kWidenedRows = 256;

static_assert(kGroupCodes == kCodeGroup);

// Rows [lo, hi) of the weights.
CodedWeights CodesOf(const DeviceMatrix& w, size_t lo, size_t hi) {
  const MatrixLayout layout = LayoutOf(w);
  const auto* const scales = reinterpret_cast<const uint16_t*>(w.data.raw() + layout.scales_at());
  return {w.data.raw() + lo * layout.row_bytes(), scales + lo * layout.scales_per_row(),
          static_cast<uint32_t>(hi - lo), static_cast<uint32_t>(w.width),
          static_cast<uint32_t>(layout.groups())};
}

}  // namespace

absl::StatusOr<std::unique_ptr<WeightProducts>> WeightProducts::Create(
    Device* device, Arena* arena, std::unique_ptr<Products> products, cudaStream_t stream) {
  std::unique_ptr<WeightProducts> out(
      new WeightProducts(device, arena, std::move(products), stream));
  QUARRY_ASSIGN_OR_RETURN(out->workspace_,
                          device->Allocate(std::min(kWorkspaceBytes, arena->map().limit() / 32),
                                           "workspace of matrix products"));
  return out;
}

absl::Status WeightProducts::Multiply(const float* x, const DeviceMatrix& w, float* y, size_t rows,
                                      Device::Output output) {
  const bool coded = w.form != WeightForm::kPlain;
  if (coded && rows <= kMaxCodeRows) return MultiplyFew(x, w, y, rows, output);
  const bool rounds = w.dtype != DType::kFp32;
  DeviceBuffer rounded;
  if (rounds) {
    const size_t elements = std::min(rows, kProductRows) * w.width;
    QUARRY_ASSIGN_OR_RETURN(
        rounded, device_->Allocate(elements * DTypeBytes(w.dtype), "rounded activations"));
  }
  for (size_t lo = 0; lo < rows; lo += kProductRows) {
    const size_t n = std::min(kProductRows, rows - lo);
    const float* const from = x + lo * w.width;
    if (rounds) {
      QUARRY_RETURN_IF_ERROR(
          CudaStatus(LaunchRound(from, w.dtype, rounded.raw(), n * w.width, stream_), "Round"));
    }
    Product product = {};
    product.x = rounds ? static_cast<const void*>(rounded.raw()) : from;
    product.w = w.data.raw();
    product.y = y + lo * w.rows;
    product.dtype = w.dtype;
    product.rows = n;
    product.out = product.y_stride = w.rows;
    product.in = w.width;
    product.output = output;
    QUARRY_RETURN_IF_ERROR(coded ? MultiplyCoded(product, w) : Run(product));
  }
  return absl::OkStatus();
}

absl::Status WeightProducts::MultiplyFew(const float* x, const DeviceMatrix& w, float* y,
                                         size_t rows, Device::Output output) {
  CodeProductArgs args = {};
  args.w = CodesOf(w, 0, w.rows);
  args.x = x;
  args.y = y;
  args.rows = static_cast<uint32_t>(rows);
  args.adds = output == Device::Output::kAccumulate;
  args.vectors = w.width % 4 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
  return CudaStatus(LaunchCodeProduct(args, w.form, w.dtype, stream_), "product with codes");
}

// `all` but for its weights, which are made a piece at a time.
absl::Status WeightProducts::MultiplyCoded(const Product& all, const DeviceMatrix& w) {
  const size_t row_bytes = std::max<size_t>(1, w.width * DTypeBytes(w.dtype));
  const size_t fit = kWidenedBytes / row_bytes / kWidenedRows * kWidenedRows;
  const size_t step = std::min(w.rows, std::max(fit, kWidenedRows));
  QUARRY_ASSIGN_OR_RETURN(const DeviceBuffer widened,
                          device_->Allocate(step * row_bytes, "widened weights"));
  for (size_t lo = 0; lo < w.rows; lo += step) {
    const size_t hi = std::min(w.rows, lo + step);
    QUARRY_RETURN_IF_ERROR(CudaStatus(
        LaunchDecode(CodesOf(w, lo, hi), w.form, w.dtype, widened.raw(), stream_), "codes"));
    Product piece = all;
    piece.w = widened.raw();
    piece.y = all.y + lo;
    piece.out = hi - lo;
    QUARRY_RETURN_IF_ERROR(Run(piece));
  }
  return absl::OkStatus();
}

// The first product of a shape may load code to the card: that is overhead too.
absl::Status WeightProducts::Run(const Product& product) {
  const Products::Workspace workspace{workspace_.raw(), workspace_.bytes()};
  if (!products_->IsNew(product)) return products_->Run(product, workspace, stream_);
  const uint64_t before = TakenBytes();
  QUARRY_RETURN_IF_ERROR(products_->Run(product, workspace, stream_));
  CountOverhead(before, arena_);
  return absl::OkStatus();
}

}  // namespace quarry::cuda
