// What devices have in common, and what those do that have nothing better.
#include "gpu/device.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>

#include "absl/strings/str_cat.h"
#include "gpu/weights/pack_matrix.h"
#include "proto/status_macros.h"
#include "proto/submit_entry.h"

namespace quarry {

std::vector<float> RowOf(const DeviceLogits& l, uint32_t row) {
  std::vector<float> out(l.vocab);
  for (uint32_t first = 0; first < l.vocab; first += l.tile) {
    const uint32_t ids = std::min(l.tile, l.vocab - first);
    std::copy_n(l.logits + size_t{l.rows} * first + size_t{row} * ids, ids, out.begin() + first);
  }
  return out;
}

absl::StatusOr<DeviceBuffer> Device::AllocateSpare(size_t bytes, size_t, std::string_view what) {
  return absl::ResourceExhaustedError(absl::StrCat(
      std::string(name()), " has no spare memory: ", bytes, " bytes for ", std::string(what)));
}

bool Device::SetSpareOwner(SpareOwner* owner) {
  if (owner != nullptr && spare_owner_ != nullptr) return false;
  spare_owner_ = owner;
  return true;
}

absl::StatusOr<HostBuffer> Device::AllocateHost(size_t bytes, std::string_view what) {
  void* const data = std::aligned_alloc(64, std::max<size_t>(64, (bytes + 63) / 64 * 64));
  if (data == nullptr) {
    return absl::ResourceExhaustedError(
        absl::StrCat("host memory: the system has no ", bytes, " bytes for ", std::string(what)));
  }
  return HostBuffer(this, {static_cast<std::byte*>(data), bytes});
}

void Device::ReleaseHost(std::span<std::byte> bytes) { std::free(bytes.data()); }

Device::UploadTicket Device::StartUpload(void* to, std::span<const std::byte> from) {
  return Upload(to, from).ok() ? 1 : 0;
}

void Device::WaitFor(UploadTicket) {}

Device::DownloadTicket Device::StartDownload(std::span<std::byte> to, const void* from) {
  (void)Download(to, from);  // of a device whose downloads cannot fail
  return 0;
}

void Device::WaitForDownload(DownloadTicket) {}

absl::Status Device::FinishDownload(DownloadTicket) { return absl::OkStatus(); }

DType Device::WeightDType(DType) const { return DType::kFp32; }

absl::StatusOr<DeviceMatrix> Device::Load(std::span<const HostMatrix> stacked, size_t width,
                                          std::string_view what, WeightForm form) {
  const MatrixLayout layout = LayoutFor(*this, stacked, width, form);
  QUARRY_ASSIGN_OR_RETURN(DeviceBuffer data, Allocate(layout.bytes(), what));
  QUARRY_RETURN_IF_ERROR(UploadMatrix(stacked, layout, what, data.raw(), this, nullptr));
  return DeviceMatrix{std::move(data), layout.dtype, layout.rows, layout.width, layout.form};
}

void Device::StoreKvEach(std::span<const DeviceKvStore> stores) {
  for (const DeviceKvStore& store : stores) StoreKv(store);
}

void Device::AttendEach(std::span<const DeviceAttention> attentions) {
  for (const DeviceAttention& attention : attentions) Attend(attention);
}

absl::StatusOr<std::unique_ptr<SparsePlan>> Device::PlanSparse(std::span<const HeadPattern>,
                                                               TokenRange, const DeviceAttention&) {
  return absl::UnimplementedError(absl::StrCat("no sparse prefill on ", std::string(name())));
}

absl::Status Device::AttendSparse(const SparsePlan&, const DeviceAttention&) {
  return absl::UnimplementedError(absl::StrCat("no sparse prefill on ", std::string(name())));
}

absl::StatusOr<HostMapping> Device::MapHost(std::span<std::byte> bytes) {
  if (bytes.empty()) return absl::InvalidArgumentError("no memory of the host to map");
  return HostMapping(this, bytes);
}

void Device::UnmapHost(std::span<std::byte>) {}

absl::StatusOr<std::unique_ptr<DeviceRecording>> Device::Record(const std::function<void()>&) {
  return absl::UnimplementedError(absl::StrCat("no recordings on ", std::string(name())));
}

void Device::Replay(const DeviceRecording&) {}

void Device::Ring(const DeviceRing& ring) {
  const RungLayout& layout = ring.layout;
  const RungMessage& message = ring.at != nullptr ? *ring.at : ring.message;
  if (ring.before != nullptr) {
    RungOutcome before;
    std::memcpy(&before, ring.before, sizeof(before));
    const uint32_t expected = ring.at != nullptr ? ring.at[-1].generation : ring.before_generation;
    if (before.done != expected) return;
  }
  std::memcpy(message.slot + shm::kSlotPayload, ring.head, layout.head_bytes);
  const size_t q_bytes = size_t{layout.heads} * layout.head_dim * sizeof(float);
  for (uint32_t r = 0; r < layout.rows; ++r) {
    std::byte* const row = message.slot + r * layout.row_stride;
    std::memcpy(row + layout.q, reinterpret_cast<const std::byte*>(ring.q) + r * q_bytes, q_bytes);
    std::memcpy(row + layout.k, static_cast<const std::byte*>(ring.k) + r * layout.kv_bytes,
                layout.kv_bytes);
    std::memcpy(row + layout.v, static_cast<const std::byte*>(ring.v) + r * layout.kv_bytes,
                layout.kv_bytes);
  }
  shm::SubmitTo(message.entry, message.sequence, message.slot_index, shm::Opcode::kAttend,
                message.request_bytes, message.generation);
}

void Device::TakeAnswer(const DeviceRing& ring) {
  const RungLayout& layout = ring.layout;
  const RungMessage& message = ring.at != nullptr ? *ring.at : ring.message;
  auto* const header = reinterpret_cast<shm::SlotHeader*>(message.slot);
  uint32_t done = 0;
  // Whoever answers may need this core.
  while (((done = header->done.load(std::memory_order_acquire)) & message.answered_bit) == 0) {
    std::this_thread::yield();
  }
  const RungOutcome outcome{done, header->status};
  const size_t pod_bytes = RungOutcomeBytes(layout.rows) - sizeof(outcome);
  auto* const pods = static_cast<std::byte*>(ring.outcome) + sizeof(outcome);
  std::memcpy(ring.outcome, &outcome, sizeof(outcome));
  std::memcpy(pods, message.slot + shm::kSlotPayload, pod_bytes);
  if (done != message.generation || outcome.status != 0) return;
  for (uint32_t r = 0; r < layout.rows; ++r) {
    shm::AttendAnswerPod pod;
    std::memcpy(&pod, pods + r * sizeof(pod), sizeof(pod));
    if (pod.generation != message.generation || pod.status != 0) continue;
    const std::byte* const row = message.slot + r * layout.row_stride;
    Merge(ring.o + size_t{r} * layout.heads * layout.head_dim, ring.lse + size_t{r} * layout.heads,
          reinterpret_cast<const float*>(row + layout.o),
          reinterpret_cast<const float*>(row + layout.lse), layout.heads, layout.head_dim);
  }
}

}  // namespace quarry
