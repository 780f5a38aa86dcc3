// The device seam: where the worker's memory lives and its arithmetic runs. An address of the
// device is meaningful to the device alone: the host reaches its memory by Upload and Download.
// Activations are fp32 row-major matrices; K and V are stored in the context's dtype, as the
// daemon stores them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "gpu/sampler.h"
#include "proto/rung_attend.h"
#include "proto/types.h"

namespace quarry {

class Device;
// gpu/sparse/
struct HeadPattern;
struct HeadPlan;

// Memory of a device's budget, given back with the object. Move-only; the device outlives it.
// Without a device it borrows: a part of another buffer, which outlives it.
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
  // Addresses of the device.
  float* floats() const { return static_cast<float*>(data_); }
  std::byte* raw() const { return static_cast<std::byte*>(data_); }

 private:
  Device* device_ = nullptr;
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

// Rows of a stored matrix in the host's memory, [rows][width] of `dtype`.
struct HostMatrix {
  std::span<const std::byte> bytes;
  DType dtype = DType::kBf16;
  size_t rows = 0;
};

// Memory of the host that a device copies from and to beside its operations, and that these reach
// too, over the link, given back with the object. Move-only; the device outlives it.
class HostBuffer {
 public:
  HostBuffer() = default;
  HostBuffer(Device* device, std::span<std::byte> bytes) : device_(device), bytes_(bytes) {}
  ~HostBuffer();
  HostBuffer(HostBuffer&& other) noexcept { *this = std::move(other); }
  HostBuffer& operator=(HostBuffer&& other) noexcept;

  std::span<std::byte> bytes() const { return bytes_; }

 private:
  Device* device_ = nullptr;
  std::span<std::byte> bytes_;
};

// Memory of the host that a device's operations read and write while the host does, until it is
// given back with the object. Move-only; device and memory outlive it.
class HostMapping {
 public:
  HostMapping() = default;
  HostMapping(Device* device, std::span<std::byte> bytes) : device_(device), bytes_(bytes) {}
  ~HostMapping();
  HostMapping(HostMapping&& other) noexcept { *this = std::move(other); }
  HostMapping& operator=(HostMapping&& other) noexcept;

 private:
  Device* device_ = nullptr;
  std::span<std::byte> bytes_;
};

// How weights are stored: elements as they are, or codes with scales (gpu/weights/matrix_layout.h).
enum class WeightForm : uint8_t { kPlain, kInt8, kInt4 };

// Weights, [rows][width], in the form the device computes with; a vector has one row.
struct DeviceMatrix {
  DeviceBuffer data;
  DType dtype = DType::kFp32;  // of elements; what codes stand for is rounded to it, if anywhere
  size_t rows = 0, width = 0;
  WeightForm form = WeightForm::kPlain;
};

// K and V of consecutive tokens of every KV head of a layer: the vectors of one head are
// contiguous, [tokens][head_dim], and head h begins h * head_stride bytes behind k and v.
struct DeviceKv {
  const void* k = nullptr;
  const void* v = nullptr;
  size_t head_stride = 0;
  TokenRange tokens;
  bool operator==(const DeviceKv&) const = default;
};

// Where an operation's rows stand, and what the part of K and V that grows by them holds. It lies
// on the device and is read when the operation runs, so that the same operation serves other
// tokens, as a recorded one does (Device::Record).
struct DevicePlace {
  uint32_t first_token = 0;  // of the rows
  uint32_t kv_lo = 0;        // the growing part's first token,
  uint32_t kv_slot = 0;      // and how many vectors behind its k and v that one lies
};

// K and V of consecutive tokens, from as a layer makes them to as attention reads them.
struct DeviceKvStore {
  const void* k = nullptr;  // [rows][kv_heads][vector_bytes]
  const void* v = nullptr;
  void* to_k = nullptr;  // [kv_heads][...][vector_bytes], head h h * head_stride bytes behind
  void* to_v = nullptr;
  size_t head_stride = 0, vector_bytes = 0;
  uint32_t rows = 0, kv_heads = 0;
  uint32_t slot = 0;                   // how many vectors behind to_k and to_v the first row goes
  const DevicePlace* place = nullptr;  // not null: to kv_slot + first_token - kv_lo instead
};

// Attention of consecutive tokens over parts of one layer's K and V, causal: row r is token
// first_token + r and sees itself and what is before it, at most `window` tokens (0: all).
// lse is natural; a row that sees nothing of the parts has o = 0 and lse = -infinity.
struct DeviceAttention {
  std::span<const DeviceKv> parts;  // disjoint; gaps between them are allowed
  DType dtype = DType::kBf16;       // of k and v
  uint32_t heads = 0, kv_heads = 0, head_dim = 0;
  uint32_t first_token = 0, rows = 0, window = 0;
  const float* q = nullptr;  // [rows][heads][head_dim]
  float* o = nullptr;        // the same
  float* lse = nullptr;      // [rows][heads]
  // Not null: in place of first_token, and of what the last part holds: [kv_lo, first_token +
  // rows), kv_slot vectors behind its k and v. How the work is cut up still follows from what is
  // said here.
  const DevicePlace* place = nullptr;

  // What row r sees, in all parts and between them.
  TokenRange Visible(uint32_t r) const {
    const uint32_t hi = first_token + r + 1;
    return {window != 0 && hi > window ? hi - window : 0, hi};
  }
};

// Rotation of heads of consecutive tokens in place: the first 2 * inv_freq.size() elements of
// each head, in halves (neox), by fp32(token) * inv_freq; cosines and sines times attention_scale.
struct DeviceRope {
  float* x = nullptr;  // [rows][heads][head_dim]
  uint32_t first_token = 0, rows = 0, heads = 0, head_dim = 0;
  std::span<const float> inv_freq;
  float attention_scale = 1.0f;
  const DevicePlace* place = nullptr;  // not null: its first_token instead,
  bool place_each = false;             // or, of [rows] places, each row that of its own
};

// An attend message that a device writes into its slot and submits, and its answer (proto/SHM.md,
// Devices). The channel's memory is mapped.
struct DeviceRing {
  RungLayout layout;
  RungMessage message;
  const void* head = nullptr;  // [layout.head_bytes]
  const float* q = nullptr;    // [rows][heads][head_dim]
  const void* k = nullptr;     // [rows][layout.kv_bytes]
  const void* v = nullptr;
  float* o = nullptr;       // as q
  float* lse = nullptr;     // [rows][heads]
  float* far_lse = nullptr;  // the same: room for the answer's
  void* outcome = nullptr;  // RungOutcome, AttendAnswerPod[rows]
  // The outcome and the generation of the message before; null: there is none. If it was given up,
  // this one is neither written nor submitted.
  const void* before = nullptr;
  uint32_t before_generation = 0;
  // Not null: the message on the device, behind the one before it. What these say when an operation
  // runs takes the place of `message`, but for slot and answered_bit, and of before_generation.
  const RungMessage* at = nullptr;
};

// `count` pieces of `bytes` each, from one place of the device to another.
struct DeviceCopy {
  void* to = nullptr;
  size_t to_stride = 0;  // bytes
  const void* from = nullptr;
  size_t from_stride = 0;
  size_t bytes = 0, count = 0;
};

// What the heads of a layer attend in a prefill, kept where the device that made it attends by it;
// which outlives it.
class SparsePlan {
 public:
  virtual ~SparsePlan() = default;
  // The same on the host, [heads]. Waits for the device.
  virtual absl::StatusOr<std::vector<HeadPlan>> Heads() const = 0;
};

// Operations that a device keeps, with the memory that they take while they run; which outlives it.
class DeviceRecording {
 public:
  virtual ~DeviceRecording() = default;
};

// Logits of some rows: of `tile` ids of the vocabulary after the other, and what is left of it at
// the end, all rows, [rows][ids].
struct DeviceLogits {
  const float* logits = nullptr;
  uint32_t rows = 0, vocab = 0, tile = 0;  // tile: at least 1
};
// [vocab] of one row, where they lie in memory of the host.
std::vector<float> RowOf(const DeviceLogits& logits, uint32_t row);

struct ChosenToken {
  uint32_t id = 0;
  uint32_t unfit = kEveryToken;  // FirstUnfit; if there is one, nothing is chosen
};

struct DeviceStats {
  // The budget, what is handed out of it, and the most that ever was.
  uint64_t capacity_bytes = 0, used_bytes = 0, peak_bytes = 0;
  // Also out of the budget: what the device's own software takes (contexts, code, libraries).
  uint64_t overhead_bytes = 0;
  // Memory that is taken from the system to hand out; it stays taken. 0: as much as is used.
  uint64_t mapped_bytes = 0;
  // What the driver says is taken of the whole device, by everybody. 0: there is nobody to ask.
  uint64_t driver_used_bytes = 0;
};

// Used by one thread. Operations run in the order they are called and may still run when they
// return; Download waits for everything before it. Download and Upload report the first failure
// since the last report, and name the operation; an Upload may come before the failure is known.
// Pointers are addresses of the device; spans are the host's. Shapes are the caller's duty.
class Device {
 public:
  virtual ~Device() = default;
  virtual std::string_view name() const = 0;

  // Not initialised. ResourceExhausted names what was asked for, its bytes and the budget; before
  // that, spare memory is taken back, but for what is recorded.
  virtual absl::StatusOr<DeviceBuffer> Allocate(size_t bytes, std::string_view what) = 0;
  // Memory for what only gains by it, while nobody else wants it: somewhere at the far end, if
  // `leave_free` bytes of the budget stay free; else, or where there is no such memory,
  // ResourceExhausted. Its owner gives it back when asked.
  virtual absl::StatusOr<DeviceBuffer> AllocateSpare(size_t bytes, size_t leave_free,
                                                     std::string_view what);
  class SpareOwner {
   public:
    virtual ~SpareOwner() = default;
    // Releases some of it; false: there is none that could be. Called by any Allocate; what is
    // released may be written by operations that are called later.
    virtual bool GiveBack() = 0;
  };
  // One owner at a time: false if there is another. Null: nobody any more.
  bool SetSpareOwner(SpareOwner* owner);
  virtual DeviceStats Stats() const = 0;

  // The host's memory may be reused when they return.
  virtual absl::Status Upload(void* to, std::span<const std::byte> from) = 0;
  virtual absl::Status Download(std::span<std::byte> to, const void* from) = 0;
  virtual void Copy(const DeviceCopy& copy) = 0;

  // Memory of the host; ResourceExhausted names the bytes.
  virtual absl::StatusOr<HostBuffer> AllocateHost(size_t bytes, std::string_view what);
  // Copies behind all operations called before, beside those called later: they wait for it where
  // WaitFor is called with what this returns. Until then nobody uses or releases `to`; `from` lies
  // in a HostBuffer, and stays as it is. A failure is reported as one of an operation, and if it
  // was seen at once the ticket is 0, of an upload that nobody waits for. Uploads run one after the
  // other, so that waiting for one is waiting for those before it.
  using UploadTicket = uint64_t;
  virtual UploadTicket StartUpload(void* to, std::span<const std::byte> from);
  virtual void WaitFor(UploadTicket upload);
  // The same the other way: `to` lies in a HostBuffer and is filled when FinishDownload, which says
  // what has failed as Download does, has returned. Operations called behind WaitForDownload may
  // write `from`.
  using DownloadTicket = uint64_t;
  virtual DownloadTicket StartDownload(std::span<std::byte> to, const void* from);
  virtual void WaitForDownload(DownloadTicket download);
  virtual absl::Status FinishDownload(DownloadTicket download);

  // The dtype of elements in which the device computes with stored ones: holds them exactly.
  virtual DType WeightDType(DType stored) const;
  // The matrices one above the other, all of one width. Plain values stay exact; InvalidArgument if
  // a value that becomes a code is not finite.
  absl::StatusOr<DeviceMatrix> Load(std::span<const HostMatrix> stacked, size_t width,
                                    std::string_view what, WeightForm form = WeightForm::kPlain);

  // y[r][w.rows] = x[r][w.width] * w^T, or added to y.
  enum class Output { kOverwrite, kAccumulate };
  virtual void MatMul(const float* x, const DeviceMatrix& w, float* y, size_t rows,
                      Output output) = 0;
  // y[r] = x[r] / sqrt(mean(x[r]^2) + eps) * weight, which is plain.
  virtual void RmsNorm(const float* x, const DeviceMatrix& weight, float eps, float* y,
                       size_t rows) = 0;
  virtual void Rope(const DeviceRope& rope) = 0;
  // y[r][i] = silu(gate_up[r][i]) * gate_up[r][width + i], i < width.
  virtual void SwiGlu(const float* gate_up, float* y, size_t rows, size_t width) = 0;
  // y[r] = table[tokens[r]], which is plain.
  virtual void Embed(const DeviceMatrix& table, std::span<const uint32_t> tokens, float* y) = 0;
  // draws [logits.rows]; out [logits.rows], on the device: ChooseToken of each row (gpu/sampler.h),
  // but for rounding.
  virtual void Choose(const DeviceLogits& logits, std::span<const TokenDraw> draws,
                      ChosenToken* out) = 0;
  // to[i] = from[i] rounded to nearest even.
  virtual void Round(const float* from, DType dtype, void* to, size_t elements) = 0;
  virtual void StoreKv(const DeviceKvStore& store) = 0;
  virtual void Attend(const DeviceAttention& attention) = 0;
  // The same of each, which do not depend on one another.
  virtual void StoreKvEach(std::span<const DeviceKvStore> stores);
  virtual void AttendEach(std::span<const DeviceAttention> attentions);

  // Sparse prefill, if the device has it; else Unimplemented. `attention` has one part, of all
  // tokens from 0 to its last row or beyond, and no window.
  // What each head attends in a prefill of rows `prefill` (gpu/sparse/build_index.h), by its keys
  // and its last queries: the rows of `last`, min(64, rows of the prefill) of them; no o and lse.
  virtual absl::StatusOr<std::unique_ptr<SparsePlan>> PlanSparse(
      std::span<const HeadPattern> patterns, TokenRange prefill, const DeviceAttention& last);
  // Attention by a plan of this device, of rows that begin a multiple of 128 rows behind the
  // prefill's first one.
  virtual absl::Status AttendSparse(const SparsePlan& plan, const DeviceAttention& attention);
  // Merges partial b into a: `rows` outputs of head_dim, one lse each.
  virtual void Merge(float* o_a, float* lse_a, const float* o_b, const float* lse_b, size_t rows,
                     uint32_t head_dim) = 0;

  // InvalidArgument for no bytes; FailedPrecondition names what the device lacks for Ring and
  // TakeAnswer.
  virtual absl::StatusOr<HostMapping> MapHost(std::span<std::byte> bytes);
  // Writes the message into its slot and submits it, unless an operation has failed.
  virtual void Ring(const DeviceRing& ring);
  // Waits for the message's answer, or until it is given up, and fills `outcome`. Rows that count
  // are merged into o and lse. The host may go on: who waits here is the device.
  virtual void TakeAnswer(const DeviceRing& ring);

  // Keeps the operations that `call` calls instead of running them: those that return nothing, but
  // for uploads beside. The device memory and the matrices that they name are there whenever they
  // are replayed; what spans hold is kept with them. Unimplemented if the device keeps none; errors
  // are of what cannot be kept, or of the memory for it.
  virtual absl::StatusOr<std::unique_ptr<DeviceRecording>> Record(
      const std::function<void()>& call);
  // As if they were called, in their order; but none of them, if an operation before has failed.
  virtual void Replay(const DeviceRecording& recording);

  virtual void Release(void* data, size_t bytes) = 0;    // DeviceBuffer's
  virtual void ReleaseHost(std::span<std::byte> bytes);  // HostBuffer's
  virtual void UnmapHost(std::span<std::byte> bytes);    // HostMapping's

 protected:
  // Whether there may be more room now.
  bool TakeSpareBack() { return spare_owner_ != nullptr && spare_owner_->GiveBack(); }

 private:
  SpareOwner* spare_owner_ = nullptr;
};

inline DeviceBuffer& DeviceBuffer::operator=(DeviceBuffer&& other) noexcept {
  std::swap(device_, other.device_);
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

inline void DeviceBuffer::Reset() {
  if (device_ != nullptr && data_ != nullptr) device_->Release(data_, bytes_);
  data_ = nullptr;
  bytes_ = 0;
}

inline HostBuffer& HostBuffer::operator=(HostBuffer&& other) noexcept {
  std::swap(device_, other.device_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

inline HostBuffer::~HostBuffer() {
  if (!bytes_.empty()) device_->ReleaseHost(bytes_);
}

inline HostMapping& HostMapping::operator=(HostMapping&& other) noexcept {
  std::swap(device_, other.device_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

inline HostMapping::~HostMapping() {
  if (device_ != nullptr) device_->UnmapHost(bytes_);
}

struct HostDeviceOptions {
  uint64_t capacity_bytes = 16ull << 30;
  uint32_t threads = 0;  // 0: all cores
};
// The device that every machine has. Weights are widened to fp32, and so is what codes stand for,
// a few rows at a time. The threads' scratch, up to 1 MiB each, is not in the budget.
std::unique_ptr<Device> MakeHostDevice(const HostDeviceOptions& options);

}  // namespace quarry
