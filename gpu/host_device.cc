// The device that every machine has: OpenBLAS for products, cpu_index's kernels for attention.
#include <cblas.h>
#include <tbb/blocked_range.h>
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "cpu_index/key_index.h"
#include "cpu_index/partial.h"
#include "gpu/device.h"

namespace quarry {
namespace {

// Rows attended in one kernel call: with a group of three heads of 128, the queries of 16 rows
// (24 KiB) stay in the L1 cache beside a tile of scores.
constexpr uint32_t kRowsPerCall = 16;

class HostDevice final : public Device {
 public:
  explicit HostDevice(const HostDeviceOptions& options)
      : capacity_(options.capacity_bytes),
        threads_(options.threads != 0 ? options.threads
                                      : std::max(1u, std::thread::hardware_concurrency())),
        arena_(static_cast<int>(threads_)) {
    openblas_set_num_threads(static_cast<int>(threads_));
  }

  std::string_view name() const override { return "host"; }

  absl::StatusOr<DeviceBuffer> Allocate(size_t bytes, std::string_view what) override {
    const uint64_t used = used_.load();
    if (bytes > capacity_ || used > capacity_ - bytes) {
      return absl::ResourceExhaustedError(absl::StrCat("device memory: ", bytes, " bytes for ",
                                                       std::string(what), ", ", used,
                                                       " in use of a budget of ", capacity_));
    }
    void* data = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (data == nullptr) {
      return absl::ResourceExhaustedError(
          absl::StrCat("device memory: the system has no ", bytes, " bytes for ",
                       std::string(what)));
    }
    used_ += bytes;
    peak_ = std::max(peak_.load(), used_.load());
    return DeviceBuffer(this, data, bytes);
  }

  void Release(void* data, size_t bytes) override {
    std::free(data);
    used_ -= bytes;
  }

  DeviceStats Stats() const override { return {capacity_, used_.load(), peak_.load()}; }

  void MatMul(const float* x, const float* w, float* y, size_t rows, size_t in, size_t out,
              Output output) override {
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, static_cast<int>(rows),
                static_cast<int>(out), static_cast<int>(in), 1.0f, x, static_cast<int>(in), w,
                static_cast<int>(in), output == Output::kAccumulate ? 1.0f : 0.0f, y,
                static_cast<int>(out));
  }

  void RmsNorm(const float* x, const float* weight, float eps, float* y, size_t rows,
               size_t width) override {
    for (size_t r = 0; r < rows; ++r) {
      const float* in = x + r * width;
      double squares = 0;
      for (size_t i = 0; i < width; ++i) squares += double{in[i]} * in[i];
      const float scale =
          1.0f / std::sqrt(static_cast<float>(squares / static_cast<double>(width)) + eps);
      for (size_t i = 0; i < width; ++i) y[r * width + i] = in[i] * scale * weight[i];
    }
  }

  void Rope(float* x, size_t rows, size_t stride, uint32_t heads, uint32_t head_dim,
            uint32_t first_position, std::span<const float> inv_freq,
            float attention_scale) override {
    const size_t half = inv_freq.size();
    std::vector<float> cosine(half), sine(half);
    for (size_t r = 0; r < rows; ++r) {
      const float position = static_cast<float>(first_position + r);
      for (size_t i = 0; i < half; ++i) {
        const float angle = position * inv_freq[i];
        cosine[i] = std::cos(angle) * attention_scale;
        sine[i] = std::sin(angle) * attention_scale;
      }
      for (uint32_t h = 0; h < heads; ++h) {
        float* head = x + r * stride + size_t{h} * head_dim;
        for (size_t i = 0; i < half; ++i) {
          const float a = head[i], b = head[i + half];
          head[i] = a * cosine[i] - b * sine[i];
          head[i + half] = b * cosine[i] + a * sine[i];
        }
      }
    }
  }

  void SwiGlu(const float* gate, const float* up, size_t stride, float* y, size_t rows,
              size_t width) override {
    for (size_t r = 0; r < rows; ++r) {
      for (size_t i = 0; i < width; ++i) {
        const float g = gate[r * stride + i];
        y[r * width + i] = g / (1.0f + std::exp(-g)) * up[r * stride + i];
      }
    }
  }

  void Embed(const float* table, std::span<const uint32_t> tokens, float* y,
             size_t width) override {
    for (size_t r = 0; r < tokens.size(); ++r) {
      std::memcpy(y + r * width, table + size_t{tokens[r]} * width, width * sizeof(float));
    }
  }

  void Attend(const DeviceAttention& a) override {
    arena_.execute([&] {
      tbb::parallel_for(tbb::blocked_range<uint32_t>(0, (a.rows + kRowsPerCall - 1) / kRowsPerCall,
                                                     1),
                        [&](const tbb::blocked_range<uint32_t>& blocks) {
                          for (uint32_t b = blocks.begin(); b != blocks.end(); ++b) {
                            AttendRows(a, b * kRowsPerCall,
                                       std::min(a.rows, (b + 1) * kRowsPerCall));
                          }
                        });
    });
  }

  void Merge(float* o_a, float* lse_a, const float* o_b, const float* lse_b, size_t rows,
             uint32_t head_dim) override {
    for (size_t r = 0; r < rows; ++r) {
      MergeFinished(std::span(o_a + r * head_dim, head_dim), lse_a + r,
                    std::span(o_b + r * head_dim, head_dim), lse_b[r]);
    }
  }

 private:
  static void AttendRows(const DeviceAttention& a, uint32_t first, uint32_t last) {
    const uint32_t queries = (last - first) * a.group;
    std::vector<float> q(size_t{queries} * a.head_dim), acc(q.size());
    std::vector<TokenRange> ranges(queries);
    std::vector<Partial> partials(queries);
    for (uint32_t i = 0; i < queries; ++i) {
      const uint32_t row = first + i / a.group;
      std::memcpy(q.data() + size_t{i} * a.head_dim,
                  a.q + row * a.q_stride + size_t{i % a.group} * a.head_dim,
                  a.head_dim * sizeof(float));
      ranges[i] = a.range[row];
      partials[i].acc = std::span(acc).subspan(size_t{i} * a.head_dim, a.head_dim);
    }
    const QueryBlock block{q.data(), DType::kFp32, queries, a.head_dim,
                           1.0f / std::sqrt(static_cast<float>(a.head_dim)), ranges};
    for (const DeviceKv& part : a.parts) {
      const KvSegment segment{part.k, part.v, part.tokens};
      ExactScan().AttendAll({std::span(&segment, 1), a.head_dim, a.dtype}, block, partials);
    }
    for (uint32_t i = 0; i < queries; ++i) {
      const uint32_t row = first + i / a.group, head = i % a.group;
      a.lse[row * a.lse_stride + head] = partials[i].Finish(
          std::span(a.o + row * a.q_stride + size_t{head} * a.head_dim, a.head_dim));
    }
  }

  const uint64_t capacity_;
  const uint32_t threads_;
  tbb::task_arena arena_;
  std::atomic<uint64_t> used_{0}, peak_{0};
};

}  // namespace

DeviceBuffer& DeviceBuffer::operator=(DeviceBuffer&& other) noexcept {
  std::swap(device_, other.device_);
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

void DeviceBuffer::Reset() {
  if (data_ != nullptr) device_->Release(data_, bytes_);
  data_ = nullptr;
  bytes_ = 0;
}

std::unique_ptr<Device> MakeHostDevice(const HostDeviceOptions& options) {
  return std::make_unique<HostDevice>(options);
}

}  // namespace quarry
