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

absl::StatusOr<std::unique_ptr<WeightStore>> WeightStore::Create(
    Device* device, std::span<const StoredUnit> units, const Residence& residence,
    std::optional<uint64_t> leave_free) {
  QUARRY_CHECK(residence.streamed.size() == units.size());
  std::unique_ptr<WeightStore> out(new WeightStore(device, residence));
  // Beside another store of the device this one has no spare memory.
  if (leave_free && residence.slots > 0 && device->SetSpareOwner(out.get())) {
    out->leave_free_ = leave_free;
  }
  out->slots_.resize(residence.slots);
  for (Place& slot : out->slots_) {
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

// Memory may have other owners only when nothing is on its way to it.
WeightStore::~WeightStore() {
  if (leave_free_) device_->SetSpareOwner(nullptr);
  for (const Place& slot : slots_) {
    if (slot.upload != 0) device_->WaitFor(slot.upload);
  }
  for (const Unit& unit : units_) {
    if (unit.spare.upload != 0) device_->WaitFor(unit.spare.upload);
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

WeightStore::Place* WeightStore::Find(size_t index) {
  Unit& unit = units_[index];
  if (unit.has_spare()) return unit.spare.holds == index ? &unit.spare : nullptr;
  const auto slot = std::ranges::find(slots_, index, &Place::holds);
  return slot != slots_.end() ? &*slot : nullptr;
}

// Of a unit that is nowhere, for it could not be brought and the device says so where results are
// read, any memory does.
const std::byte* WeightStore::At(size_t index) const {
  if (!residence_.streamed[index]) return units_[index].resident.raw();
  const Place* const place = Find(index);
  return (place != nullptr ? *place : slots_.front()).memory.raw();
}

std::vector<DeviceMatrix> WeightStore::Borrow(size_t index) const {
  const Unit& unit = units_[index];
  auto* const base = const_cast<std::byte*>(At(index));
  std::vector<DeviceMatrix> out;
  for (const Part& part : unit.parts) {
    out.push_back({DeviceBuffer(nullptr, base + part.offset, part.layout.bytes()),
                   part.layout.dtype, part.layout.rows, part.layout.width, part.layout.form});
  }
  return out;
}

void WeightStore::Fetch(size_t index, Place* to) {
  to->upload = device_->StartUpload(to->memory.raw(), units_[index].host.bytes());
  to->holds = to->upload != 0 ? index : kNone;
  ++moves_;
}

// Units that should be there or on their way when this one is used: the next streamed ones from it
// on, as many as there are slots, but for those that are in spare memory already.
std::vector<size_t> WeightStore::Wanted(size_t index) const {
  const auto first = std::ranges::lower_bound(streamed_, index) - streamed_.begin();
  std::vector<size_t> out;
  for (size_t i = 0; i < streamed_.size() && out.size() < slots_.size(); ++i) {
    const size_t unit = streamed_[(static_cast<size_t>(first) + i) % streamed_.size()];
    if (!units_[unit].has_spare() || Find(unit) == nullptr) out.push_back(unit);
  }
  return out;
}

// Uploads run behind the operations called before, and so behind those that read what a slot held.
void WeightStore::Use(size_t index) {
  if (streamed_.empty()) return;
  if (in_use_ == kNone || index < in_use_) TakeSpare();
  in_use_ = index;
  const std::vector<size_t> wanted = Wanted(index);
  for (const size_t unit : wanted) {
    if (Find(unit) != nullptr) continue;
    Place* to = &units_[unit].spare;
    if (!units_[unit].has_spare()) {
      // There is one: as many are wanted as there are, and this one is in none.
      to = &*std::ranges::find_if(
          slots_, [&](const Place& slot) { return std::ranges::count(wanted, slot.holds) == 0; });
    }
    Fetch(unit, to);
  }
  Place* const place = residence_.streamed[index] ? Find(index) : nullptr;
  if (place != nullptr && place->upload != 0) {
    device_->WaitFor(place->upload);
    place->upload = 0;
  }
}

// As much as there is, until the slots hold all other units.
void WeightStore::TakeSpare() {
  if (!leave_free_) return;
  const auto in_turns =
      std::ranges::count_if(streamed_, [&](size_t u) { return !units_[u].has_spare(); });
  for (auto n = static_cast<size_t>(in_turns); n > slots_.size(); --n) {
    Unit& unit = units_[MostCrowded()];
    absl::StatusOr<DeviceBuffer> memory =
        device_->AllocateSpare(unit.bytes, *leave_free_, "streamed weights");
    if (!memory.ok()) return;
    unit.spare.memory = *std::move(memory);
    ++moves_;
  }
}

// The middle one of the longest series of units that take turns: the work on those that stay hides
// the copies of the others.
size_t WeightStore::MostCrowded() const {
  size_t longest = 0, middle = kNone;
  for (size_t at = 0, n = 0; at < streamed_.size(); at += n + 1) {
    for (n = 0; at + n < streamed_.size() && !units_[streamed_[at + n]].has_spare();) ++n;
    if (n <= longest) continue;
    longest = n;
    middle = streamed_[at + n / 2];
  }
  return middle;
}

// The nearest to what is no spare memory, so that the room before it grows in one piece. That of
// the unit in use is still read by what is called next.
bool WeightStore::GiveBack() {
  Place* nearest = nullptr;
  for (const size_t u : streamed_) {
    Unit& unit = units_[u];
    if (!unit.has_spare() || u == in_use_) continue;
    if (nearest == nullptr || unit.spare.memory.raw() < nearest->memory.raw()) {
      nearest = &unit.spare;
    }
  }
  if (nearest == nullptr) return false;
  if (nearest->upload != 0) device_->WaitFor(nearest->upload);
  *nearest = {};
  ++moves_;
  return true;
}

uint64_t WeightStore::spare_bytes() const {
  uint64_t bytes = 0;
  for (const Unit& unit : units_) bytes += unit.spare.memory.bytes();
  return bytes;
}

}  // namespace quarry
