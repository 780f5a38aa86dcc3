// The device seam: where the worker's memory lives and its arithmetic runs. Activations are fp32
// row-major matrices; K and V are stored in the context's dtype, as the daemon stores them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>

#include "absl/status/statusor.h"
#include "proto/types.h"

namespace quarry {

class Device;

// Memory of a device's arena, given back with the object. Move-only.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  DeviceBuffer(Device* device, void* data, size_t bytes)
      : device_(device), data_(data), bytes_(bytes) {}
  ~DeviceBuffer() { Reset(); }
  DeviceBuffer(DeviceBuffer&& other) noexcept { *this = std::move(other); }
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept;
  void Reset();

  size_t bytes() const { return bytes_; }
  float* floats() const { return static_cast<float*>(data_); }
  std::byte* raw() const { return static_cast<std::byte*>(data_); }

 private:
  Device* device_ = nullptr;
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

// K and V of consecutive tokens of one KV head: [tokens][head_dim] each, of `dtype`.
struct DeviceKv {
  const void* k = nullptr;
  const void* v = nullptr;
  TokenRange tokens;
};

// Attention of rows over local K/V, one KV head of one layer: for query head g of row r,
//   q at r * q_stride + g * head_dim;  range[r]: tokens it sees;
//   o at r * q_stride + g * head_dim and lse at r * lse_stride + g are written (natural log;
//   an empty set gives o = 0 and -infinity).
struct DeviceAttention {
  std::span<const DeviceKv> parts;  // disjoint, in token order; gaps between them are allowed
  uint32_t head_dim = 0;
  DType dtype = DType::kBf16;
  uint32_t rows = 0, group = 0;
  const float* q = nullptr;
  size_t q_stride = 0;              // floats
  std::span<const TokenRange> range;
  float* o = nullptr;
  float* lse = nullptr;
  size_t lse_stride = 0;
};

struct DeviceStats {
  uint64_t capacity_bytes = 0, used_bytes = 0, peak_bytes = 0;
};

// All operations finish before they return. Not thread-safe, except Attend.
class Device {
 public:
  virtual ~Device() = default;
  virtual std::string_view name() const = 0;

  // ResourceExhausted names what was asked for, its bytes and the budget.
  virtual absl::StatusOr<DeviceBuffer> Allocate(size_t bytes, std::string_view what) = 0;
  virtual DeviceStats Stats() const = 0;

  // y[rows][out] = x[rows][in] * w[out][in]^T, or added to y if `accumulate`.
  enum class Output { kOverwrite, kAccumulate };
  virtual void MatMul(const float* x, const float* w, float* y, size_t rows, size_t in, size_t out,
                      Output output) = 0;
  // y[r] = x[r] / sqrt(mean(x[r]^2) + eps) * weight, in fp32.
  virtual void RmsNorm(const float* x, const float* weight, float eps, float* y, size_t rows,
                       size_t width) = 0;
  // Rotates the first rotary_dim elements of each head in place (halves, as neox), with cosines
  // and sines of fp32(position) * inv_freq, both times attention_scale.
  virtual void Rope(float* x, size_t rows, size_t stride, uint32_t heads, uint32_t head_dim,
                    uint32_t first_position, std::span<const float> inv_freq,
                    float attention_scale) = 0;
  // y[r][i] = silu(gate[r * stride + i]) * up[r * stride + i]
  virtual void SwiGlu(const float* gate, const float* up, size_t stride, float* y, size_t rows,
                      size_t width) = 0;
  virtual void Embed(const float* table, std::span<const uint32_t> tokens, float* y,
                     size_t width) = 0;
  virtual void Attend(const DeviceAttention& attention) = 0;
  // Merges partial b into a by their lse: [rows] of head_dim and one lse each.
  virtual void Merge(float* o_a, float* lse_a, const float* o_b, const float* lse_b, size_t rows,
                     uint32_t head_dim) = 0;

  virtual void Release(void* data, size_t bytes) = 0;  // DeviceBuffer's
};

struct HostDeviceOptions {
  uint64_t capacity_bytes = 16ull << 30;
  uint32_t threads = 0;  // 0: all cores
};
std::unique_ptr<Device> MakeHostDevice(const HostDeviceOptions& options);

}  // namespace quarry
