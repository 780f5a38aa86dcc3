#include "gpu/weights/weight_store.h"

#include <algorithm>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "gpu/weights/pack_matrix.h"
#include "proto/check.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

// What kernels and the products' library like best.
constexpr size_t kAlignment = 256;

size_t Aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

uint64_t UnitBytes(const Device& device, const StoredUnit& unit) {
  uint64_t bytes = 0;
  for (const StoredMatrix& m : unit) {
    bytes += Aligned(LayoutFor(device, m.stacked, m.width, m.form).bytes());
  }
  return bytes;
}

absl::StatusOr<std::unique_ptr<WeightStore>> WeightStore::Create(Device* device,
                                                                 std::span<const StoredUnit> units,
                                                                 const Residence& residence) {
  QUARRY_CHECK(residence.streamed.size() == units.size());
  std::unique_ptr<WeightStore> out(new WeightStore(device, residence));
  out->slots_.resize(residence.slots);
  for (Slot& slot : out->slots_) {
    QUARRY_ASSIGN_OR_RETURN(slot.memory,
                            device->Allocate(residence.slot_bytes, "weights on their way"));
  }
  ThreadTeam team(std::max(1u, std::thread::hardware_concurrency()));
  out->units_.resize(units.size());
  for (size_t u = 0; u < units.size(); ++u) {
    QUARRY_RETURN_IF_ERROR(out->Add(units[u], u, &team));
  }
  return out;
}

// The slots' memory may have other owners only when nothing is on its way to it.
WeightStore::~WeightStore() {
  for (const Slot& slot : slots_) {
    if (slot.holds != kNone) device_->WaitFor(slot.upload);
  }
}

absl::Status WeightStore::Add(const StoredUnit& stored, size_t index, ThreadTeam* team) {
  Unit& unit = units_[index];
  for (const StoredMatrix& m : stored) {
    const MatrixLayout layout = LayoutFor(*device_, m.stacked, m.width, m.form);
    unit.parts.push_back({layout, unit.bytes});
    unit.bytes += Aligned(layout.bytes());
  }
  const std::string what = stored.empty() ? "weights" : stored.front().name;
  const bool streamed = residence_.streamed[index];
  if (streamed) {
    QUARRY_CHECK(unit.bytes <= residence_.slot_bytes);
    unit.turn = streamed_.size();
    streamed_.push_back(index);
    QUARRY_ASSIGN_OR_RETURN(unit.host, device_->AllocateHost(unit.bytes, what));
  } else {
    QUARRY_ASSIGN_OR_RETURN(unit.resident, device_->Allocate(unit.bytes, what));
  }
  for (size_t i = 0; i < stored.size(); ++i) {
    const StoredMatrix& m = stored[i];
    const Part& part = unit.parts[i];
    QUARRY_RETURN_IF_ERROR(streamed
                               ? PackMatrix(m.stacked, part.layout, m.name,
                                            unit.host.bytes().data() + part.offset, team)
                               : UploadMatrix(m.stacked, part.layout, m.name,
                                              unit.resident.raw() + part.offset, device_, team));
  }
  return absl::OkStatus();
}

std::vector<DeviceMatrix> WeightStore::Borrow(size_t index) const {
  const Unit& unit = units_[index];
  std::byte* const base = residence_.streamed[index]
                              ? slots_[unit.turn % slots_.size()].memory.raw()
                              : unit.resident.raw();
  std::vector<DeviceMatrix> out;
  for (const Part& part : unit.parts) {
    out.push_back({DeviceBuffer(nullptr, base + part.offset, part.layout.bytes()),
                   part.layout.dtype, part.layout.rows, part.layout.width, part.layout.form});
  }
  return out;
}

void WeightStore::Fetch(size_t turn) {
  Slot& slot = SlotOf(turn);
  const Unit& unit = units_[streamed_[turn]];
  slot.upload = device_->StartUpload(slot.memory.raw(), unit.host.bytes());
  slot.holds = turn;
}

// Slots hold the next streamed units, from this one on; those of units that were used before are
// free, for an upload runs behind the operations that read them.
void WeightStore::Use(size_t index) {
  if (index == in_use_ || streamed_.empty()) return;
  in_use_ = index;
  const bool streamed = residence_.streamed[index];
  const auto first = std::lower_bound(streamed_.begin(), streamed_.end(), index);
  const size_t next = static_cast<size_t>(first - streamed_.begin()) % streamed_.size();
  for (size_t i = 0; i < slots_.size(); ++i) {
    const size_t turn = (next + i) % streamed_.size();
    if (SlotOf(turn).holds == turn) continue;
    // Of an odd number the first one's slot is the last one's too.
    if (i > 0 && &SlotOf(turn) == &SlotOf(next)) continue;
    Fetch(turn);
  }
  if (streamed) device_->WaitFor(SlotOf(next).upload);
}

}  // namespace quarry
