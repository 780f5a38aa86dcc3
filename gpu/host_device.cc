// The device that every machine has: the host's memory, OpenBLAS for products, and cpu_index's
// kernels for attention.
#include <cblas.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "cpu_index/partial.h"
#include "gpu/device.h"
#include "gpu/host_attention.h"
#include "gpu/sparse/build_index.h"
#include "gpu/sparse/sparse_attention.h"
#include "gpu/thread_team.h"
#include "gpu/weights/codes.h"
#include "gpu/weights/matrix_layout.h"
#include "proto/check.h"
#include "proto/half.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

// Queries of one attention task: they and their sums (64 KiB at head_dim 128) stay in the L2 cache;
// more do not make the exact scan faster.
constexpr uint32_t kQueriesPerTask = 64;
// A loop smaller than this is not worth waking a thread for (65 us across CPUs).
constexpr size_t kFlopsPerTask = 8 << 20;
// Weights decoded at a time by a thread: 1 MiB stays in its L2 cache.
constexpr size_t kDecodedFloats = 256 << 10;

struct HostRecording final : DeviceRecording {
  std::vector<std::function<void()>> operations;
};

struct HostPlan final : SparsePlan {
  explicit HostPlan(std::vector<HeadPlan> plans) : heads(std::move(plans)) {}
  absl::StatusOr<std::vector<HeadPlan>> Heads() const override { return heads; }
  const std::vector<HeadPlan> heads;
};

class HostDevice final : public Device {
 public:
  explicit HostDevice(const HostDeviceOptions& options)
      : capacity_(options.capacity_bytes),
        team_(options.threads != 0 ? options.threads
                                   : std::max(1u, std::thread::hardware_concurrency())) {
    // The team divides the products; its threads sleep when idle, OpenBLAS's would spin.
    openblas_set_num_threads(1);
  }

  std::string_view name() const override { return "host"; }

  absl::StatusOr<DeviceBuffer> Allocate(size_t bytes, std::string_view what) override {
    while (bytes > capacity_ || used_ > capacity_ - bytes) {
      if (bytes <= capacity_ && TakeSpareBack()) continue;
      return absl::ResourceExhaustedError(absl::StrCat("device memory: ", bytes, " bytes for ",
                                                       std::string(what), ", ", used_,
                                                       " in use of a budget of ", capacity_));
    }
    void* data = std::aligned_alloc(64, std::max<size_t>(64, (bytes + 63) / 64 * 64));
    if (data == nullptr) {
      return absl::ResourceExhaustedError(absl::StrCat("device memory: the system has no ", bytes,
                                                       " bytes for ", std::string(what)));
    }
    used_ += bytes;
    peak_ = std::max(peak_, used_);
    return DeviceBuffer(this, data, bytes);
  }

  absl::StatusOr<DeviceBuffer> AllocateSpare(size_t bytes, size_t leave_free,
                                             std::string_view what) override {
    if (leave_free > capacity_ || used_ > capacity_ - leave_free ||
        bytes > capacity_ - leave_free - used_) {
      return absl::ResourceExhaustedError(
          absl::StrCat("device memory: no ", bytes, " bytes to spare for ", std::string(what)));
    }
    return Allocate(bytes, what);
  }

  void Release(void* data, size_t bytes) override {
    std::free(data);
    used_ -= bytes;
  }

  DeviceStats Stats() const override { return {capacity_, used_, peak_}; }

  absl::Status Upload(void* to, std::span<const std::byte> from) override {
    std::memcpy(to, from.data(), from.size());
    return absl::OkStatus();
  }

  absl::Status Download(std::span<std::byte> to, const void* from) override {
    std::memcpy(to.data(), from, to.size());
    return absl::OkStatus();
  }

  void Copy(const DeviceCopy& c) override {
    if (Keeps([=, this] { Copy(c); })) return;
    auto* to = static_cast<std::byte*>(c.to);
    auto* from = static_cast<const std::byte*>(c.from);
    for (size_t i = 0; i < c.count; ++i) {
      std::memcpy(to + i * c.to_stride, from + i * c.from_stride, c.bytes);
    }
  }

  void MatMul(const float* x, const DeviceMatrix& w, float* y, size_t rows,
              Output output) override {
    if (Keeps([=, this, &w] { MatMul(x, w, y, rows, output); })) return;
    const size_t tasks = std::clamp<size_t>(2 * rows * w.rows * w.width / kFlopsPerTask, 1,
                                            size_t{4} * team_.threads());
    if (rows >= 64 * tasks) {
      const size_t step = (rows + tasks - 1) / tasks;
      team_.For(tasks, [&](size_t task) {
        const size_t lo = std::min(rows, task * step), hi = std::min(rows, lo + step);
        Multiply(x + lo * w.width, w, 0, w.rows, y + lo * w.rows, hi - lo, output);
      });
      return;
    }
    const size_t step = (w.rows + tasks - 1) / tasks;
    team_.For(tasks, [&](size_t task) {
      const size_t lo = std::min(w.rows, task * step), hi = std::min(w.rows, lo + step);
      Multiply(x, w, lo, hi, y, rows, output);
    });
  }

  void RmsNorm(const float* x, const DeviceMatrix& weight, float eps, float* y,
               size_t rows) override {
    if (Keeps([=, this, &weight] { RmsNorm(x, weight, eps, y, rows); })) return;
    const size_t width = weight.width;
    ForRows(rows, width * 4, [&](size_t r) {
      const float* in = x + r * width;
      double squares = 0;
      for (size_t i = 0; i < width; ++i) squares += double{in[i]} * in[i];
      const float mean = static_cast<float>(squares / static_cast<double>(width));
      const float scale = 1.0f / std::sqrt(mean + eps);
      const float* by = weight.data.floats();
      for (size_t i = 0; i < width; ++i) y[r * width + i] = in[i] * scale * by[i];
    });
  }

  void Rope(const DeviceRope& rope) override {
    if (recording_ != nullptr) {
      const std::vector<float> inv_freq(rope.inv_freq.begin(), rope.inv_freq.end());
      Keeps([this, kept = rope, inv_freq]() mutable {
        kept.inv_freq = inv_freq;
        Rope(kept);
      });
      return;
    }
    const size_t half = rope.inv_freq.size();
    const auto token = [&](size_t r) {
      if (rope.place == nullptr) return rope.first_token + static_cast<uint32_t>(r);
      if (rope.place_each) return rope.place[r].first_token;
      return rope.place->first_token + static_cast<uint32_t>(r);
    };
    ForRows(rope.rows, half * (40 + 6 * rope.heads), [&](size_t r) {
      thread_local std::vector<float> turn;  // cosines, then sines
      turn.resize(2 * half);
      const float position = static_cast<float>(token(r));
      for (size_t i = 0; i < half; ++i) {
        const float angle = position * rope.inv_freq[i];
        turn[i] = std::cos(angle) * rope.attention_scale;
        turn[half + i] = std::sin(angle) * rope.attention_scale;
      }
      for (uint32_t h = 0; h < rope.heads; ++h) {
        float* head = rope.x + (r * rope.heads + h) * rope.head_dim;
        for (size_t i = 0; i < half; ++i) {
          const float a = head[i], b = head[i + half];
          head[i] = a * turn[i] - b * turn[half + i];
          head[i + half] = b * turn[i] + a * turn[half + i];
        }
      }
    });
  }

  void SwiGlu(const float* gate_up, float* y, size_t rows, size_t width) override {
    if (Keeps([=, this] { SwiGlu(gate_up, y, rows, width); })) return;
    ForRows(rows, width * 20, [&](size_t r) {
      const float* gate = gate_up + r * 2 * width;
      const float* up = gate + width;
      for (size_t i = 0; i < width; ++i) {
        y[r * width + i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
      }
    });
  }

  void Embed(const DeviceMatrix& table, std::span<const uint32_t> tokens, float* y) override {
    if (recording_ != nullptr) {
      const std::vector<uint32_t> kept(tokens.begin(), tokens.end());
      Keeps([=, this, &table] { Embed(table, kept, y); });
      return;
    }
    for (size_t r = 0; r < tokens.size(); ++r) {
      std::memcpy(y + r * table.width, table.data.floats() + size_t{tokens[r]} * table.width,
                  table.width * sizeof(float));
    }
  }

  void Choose(const DeviceLogits& l, std::span<const TokenDraw> draws, ChosenToken* out) override {
    if (recording_ != nullptr) {
      const std::vector<TokenDraw> kept(draws.begin(), draws.end());
      Keeps([=, this] { Choose(l, kept, out); });
      return;
    }
    for (uint32_t r = 0; r < l.rows; ++r) {
      const std::vector<float> row = RowOf(l, r);
      const uint32_t unfit = FirstUnfit(row);
      out[r] = {unfit == kEveryToken ? ChooseToken(row, draws[r]) : 0, unfit};
    }
  }

  void Round(const float* from, DType dtype, void* to, size_t elements) override {
    if (Keeps([=, this] { Round(from, dtype, to, elements); })) return;
    for (size_t i = 0; i < elements; ++i) StoreFromFloat(to, i, dtype, from[i]);
  }

  void StoreKv(const DeviceKvStore& store) override {
    if (Keeps([=, this] { StoreKv(store); })) return;
    const DevicePlace* const place = store.place;
    const size_t slot =
        place != nullptr ? place->kv_slot + place->first_token - place->kv_lo : store.slot;
    for (const auto& [to, from] : {std::pair{store.to_k, store.k}, {store.to_v, store.v}}) {
      for (size_t i = 0; i < size_t{store.rows} * store.kv_heads; ++i) {
        const size_t row = i / store.kv_heads, head = i % store.kv_heads;
        std::memcpy(static_cast<std::byte*>(to) + head * store.head_stride +
                        (slot + row) * store.vector_bytes,
                    static_cast<const std::byte*>(from) + i * store.vector_bytes,
                    store.vector_bytes);
      }
    }
  }

  void Attend(const DeviceAttention& attention) override {
    DeviceAttention a = attention;
    std::vector<DeviceKv> parts(a.parts.begin(), a.parts.end());
    if (Keeps([this, a, parts]() mutable {
          a.parts = parts;
          Attend(a);
        })) {
      return;
    }
    if (a.place != nullptr) {
      a.first_token = a.place->first_token;
      DeviceKv& last = parts.back();
      const size_t skip = size_t{a.place->kv_slot} * a.head_dim * DTypeBytes(a.dtype);
      last.k = static_cast<const std::byte*>(last.k) + skip;
      last.v = static_cast<const std::byte*>(last.v) + skip;
      last.tokens = {a.place->kv_lo, a.first_token + a.rows};
      a.parts = parts;
    }
    AttendParts(a);
  }

  absl::StatusOr<std::unique_ptr<SparsePlan>> PlanSparse(std::span<const HeadPattern> patterns,
                                                         TokenRange prefill,
                                                         const DeviceAttention& last) override {
    return std::make_unique<HostPlan>(
        PlanHeads({LayerOf(last), prefill, patterns, last.q}, &team_));
  }

  absl::Status AttendSparse(const SparsePlan& plan, const DeviceAttention& a) override {
    const LayerKv layer = LayerOf(a);
    const SparseIndex index = BuildIndex(static_cast<const HostPlan&>(plan).heads,
                                         {layer, a.first_token, a.rows, a.q}, &team_);
    quarry::AttendSparse({layer, &index, {}, a.q, a.o, a.lse}, &team_);
    return absl::OkStatus();
  }

  void Merge(float* o_a, float* lse_a, const float* o_b, const float* lse_b, size_t rows,
             uint32_t head_dim) override {
    if (Keeps([=, this] { Merge(o_a, lse_a, o_b, lse_b, rows, head_dim); })) return;
    for (size_t r = 0; r < rows; ++r) {
      MergeFinished(std::span(o_a + r * head_dim, head_dim), lse_a + r,
                    std::span(o_b + r * head_dim, head_dim), lse_b[r]);
    }
  }

  void Ring(const DeviceRing& ring) override {
    if (!Keeps([=, this] { Ring(ring); })) Device::Ring(ring);
  }
  void TakeAnswer(const DeviceRing& ring) override {
    if (!Keeps([=, this] { TakeAnswer(ring); })) Device::TakeAnswer(ring);
  }

  absl::StatusOr<std::unique_ptr<DeviceRecording>> Record(
      const std::function<void()>& call) override {
    auto recording = std::make_unique<HostRecording>();
    recording_ = recording.get();
    call();
    recording_ = nullptr;
    return std::unique_ptr<DeviceRecording>(std::move(recording));
  }
  void Replay(const DeviceRecording& recording) override {
    for (const auto& operation : static_cast<const HostRecording&>(recording).operations) {
      operation();
    }
  }

 private:
  // Whether operations are kept: then this is one more.
  template <typename F>
  bool Keeps(F&& operation) {
    if (recording_ == nullptr) return false;
    recording_->operations.emplace_back(std::forward<F>(operation));
    return true;
  }

  void AttendParts(const DeviceAttention& a) {
    const uint32_t step = std::max(1u, kQueriesPerTask / (a.heads / a.kv_heads));
    const size_t blocks = (a.rows + step - 1) / step;
    // The last rows see the most: they come first, so that no thread is left alone with them.
    const auto run = [&](size_t task) {
      const auto block = static_cast<uint32_t>(blocks - 1 - task / a.kv_heads);
      HostAttend(a, static_cast<uint32_t>(task % a.kv_heads), block * step,
                 std::min(a.rows, (block + 1) * step));
    };
    size_t flops = 0;
    for (const DeviceKv& part : a.parts) {
      flops += size_t{4} * a.rows * a.heads * a.head_dim * part.tokens.size();
    }
    const size_t tasks = blocks * a.kv_heads;
    if (flops >= 2 * kFlopsPerTask) return team_.For(tasks, run);
    for (size_t task = 0; task < tasks; ++task) run(task);
  }

  static LayerKv LayerOf(const DeviceAttention& a) {
    QUARRY_CHECK(a.parts.size() == 1 && a.window == 0);
    return {a.parts[0], a.dtype, a.heads, a.kv_heads, a.head_dim};
  }

  // y[.][lo, hi) = x * (rows [lo, hi) of w)^T
  static void Multiply(const float* x, const DeviceMatrix& w, size_t lo, size_t hi, float* y,
                       size_t rows, Output output) {
    if (lo >= hi || rows == 0) return;
    if (w.form == WeightForm::kPlain) {
      return MultiplyRows(x, w.data.floats() + lo * w.width, w, lo, hi, y, rows, output);
    }
    const size_t step = std::max<size_t>(1, kDecodedFloats / std::max<size_t>(1, w.width));
    const MatrixLayout layout = LayoutOf(w);
    const auto* const scales = reinterpret_cast<const uint16_t*>(w.data.raw() + layout.scales_at());
    thread_local std::vector<float> decoded;
    for (; lo < hi; lo += step) {
      const size_t end = std::min(hi, lo + step);
      decoded.resize((end - lo) * w.width);
      for (size_t r = lo; r < end; ++r) {
        DecodeRow(w.form, w.data.raw() + r * layout.row_bytes(),
                  scales + r * layout.scales_per_row(),
                  std::span(decoded).subspan((r - lo) * w.width, w.width));
      }
      MultiplyRows(x, decoded.data(), w, lo, end, y, rows, output);
    }
  }

  // The same with these rows at `from`, [hi - lo][w.width].
  static void MultiplyRows(const float* x, const float* from, const DeviceMatrix& w, size_t lo,
                           size_t hi, float* y, size_t rows, Output output) {
    const float beta = output == Output::kAccumulate ? 1.0f : 0.0f;
    const int out = static_cast<int>(hi - lo), in = static_cast<int>(w.width);
    if (rows == 1) {
      cblas_sgemv(CblasRowMajor, CblasNoTrans, out, in, 1.0f, from, in, x, 1, beta, y + lo, 1);
      return;
    }
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, static_cast<int>(rows), out, in, 1.0f, x,
                in, from, in, beta, y + lo, static_cast<int>(w.rows));
  }

  // f(r) for every row, each about `flops` of work.
  template <typename F>
  void ForRows(size_t rows, size_t flops, const F& f) {
    const size_t step = std::max<size_t>(1, kFlopsPerTask / 4 / std::max<size_t>(1, flops));
    team_.For((rows + step - 1) / step, [&](size_t task) {
      for (size_t r = task * step; r < std::min(rows, (task + 1) * step); ++r) f(r);
    });
  }

  const uint64_t capacity_;
  ThreadTeam team_;
  uint64_t used_ = 0, peak_ = 0;
  HostRecording* recording_ = nullptr;  // while one is made
};

}  // namespace

std::unique_ptr<Device> MakeHostDevice(const HostDeviceOptions& options) {
  return std::make_unique<HostDevice>(options);
}

}  // namespace quarry
